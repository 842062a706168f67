"""The ghost estimator: a rule a layer type."""
