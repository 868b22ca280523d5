"""Rollouts: demand, dispatch, generation, and the workers that run it."""
