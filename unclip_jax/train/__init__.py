"""Training: the state and its updates (`state`), and what a run writes down (`log`)."""
