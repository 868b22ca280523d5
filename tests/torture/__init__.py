"""The torture of the queue, `make torture`: its roles, its accidents, and books of its own."""
