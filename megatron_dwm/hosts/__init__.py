"""Where the weighting runs: the trainer it is attached to, and the stand-in for a GPU."""
