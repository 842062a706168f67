"""The weighting's state in Megatron's checkpoints, snapshots, and checks for damage."""
