"""Data sets: importers, and drawn scenes."""
