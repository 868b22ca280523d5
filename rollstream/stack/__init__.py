"""The local stack: its plan, its processes, and the hand that restarts them."""
