"""`megatron-dwm convert`: one module for each of its commands."""
