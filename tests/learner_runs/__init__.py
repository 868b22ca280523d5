"""Runs of the learner or of its loop in this process: real optimizer steps on tiny models and fakes."""
