"""What the package relies on in megatron.core, the run's parallel layout, and the collectives."""
