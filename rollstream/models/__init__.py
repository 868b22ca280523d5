"""Model folders: tiny ones with random weights, and the shipped checkpoint."""
