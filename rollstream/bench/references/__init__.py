"""The plain ways of doing what rollstream does fast, to be measured against."""
