"""Where the weighting runs: the trainers it is attached to, and the CPU stand-in for CUDA."""
