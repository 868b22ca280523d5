"""One wiring function for each role: the only code that knows every concrete class."""
