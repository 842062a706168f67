"""`dL_meta/dw` of every sample: estimators, and rules for layers and optimizers."""
