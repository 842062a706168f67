"""The only place that rebinds Megatron's trainer."""
