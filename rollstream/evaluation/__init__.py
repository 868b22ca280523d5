"""Rollouts of a model folder on the validation set, and their metrics."""
