"""Everything that crosses a process boundary, and the one door to the broker.

Importing this package loads neither redis nor torch.
"""
