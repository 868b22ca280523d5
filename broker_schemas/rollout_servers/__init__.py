"""vLLM servers over HTTP, as producers and the learner see them: requests, weight label, sync, lock."""
