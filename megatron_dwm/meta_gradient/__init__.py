"""`dL_meta/dw` for every sample: estimators, and how they see layers and optimizers."""
