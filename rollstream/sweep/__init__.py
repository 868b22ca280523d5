"""The tuning grid: its cells, their runs, and the page that compares them."""
