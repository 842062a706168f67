"""The weighting model, and how its scores become weights in the loss."""
