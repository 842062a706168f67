"""What is relied on in megatron.core, the run's layout, and the collectives."""
