"""What would go wrong with a run, said before it starts."""
