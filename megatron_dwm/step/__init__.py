"""The modified training step, its passes, and what may go wrong in it."""
