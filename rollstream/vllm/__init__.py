"""The vLLM servers of a run: their plan, start and end."""
