"""What the weights were: the step log and what can be read from it."""
