"""Learned data weighting for pre-training with NVIDIA Megatron.

A data weighting model (DWM) gives every sample of the global batch a weight while the
language model trains, and is itself trained by bilevel optimisation on a small meta set.
Importing this package has no side effects.
"""

__version__ = "0.1.0"
