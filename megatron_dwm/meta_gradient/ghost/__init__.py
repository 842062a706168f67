"""The ghost estimator: one rule per layer type."""
