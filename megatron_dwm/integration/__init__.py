"""The only place that rebinds a name of Megatron's trainer: checked, and restored on exit."""
