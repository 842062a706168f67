"""Transformer Engine's own Python classes on the CPU, for tests.

Its classes (`transformer_engine.pytorch`) call a compiled extension, `transformer_engine_torch`,
for all arithmetic. `extension` is a reference of it in plain torch; what the tests do not need is
not written and raises by name. `source` has the classes themselves, from the package's wheel, in a
folder of their own: where Transformer Engine can be imported, Megatron behaves differently, so it
must not be in the environment of the other tests. `install` puts the two together.

What this does NOT show: that the compiled kernels compute these very functions, FP8, or speed.
"""
