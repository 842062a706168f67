"""The step log: what each step's weights were, where that is written, and what it says."""
