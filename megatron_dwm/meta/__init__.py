"""Meta-gradients: optimizer Jacobians, per-sample influence, their collectives and a probe."""
