"""The weighting inside Megatron's checkpoints, snapshots, and damage."""
