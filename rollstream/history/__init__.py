"""The log of a run: archive, audit, replay, and its removal."""
