"""Calculates what weighting adds to a run: nothing is run, allocated or sent.

    model     what is trained: matrices and norms of each pipeline stage, and the layout
    flops     arithmetic, per pass
    traffic   bytes that a rank sends, per process group
    memory    bytes that a rank keeps
    plan      all of it for a run, and the total in steps of the stock trainer

The formulas follow from the passes of `step.train_step` and Megatron's layers; each module states
the source of its own.

`tests/functional/test_plan.py` compares with runs on four CPU ranks, with tensor, pipeline, data
and expert parallelism: parameters, FLOPs of Megatron's own layers, bytes of each group, and the
memory of theta, theta+, v and the step's gradient. `benchmarks/plan.py` adds sequence parallelism,
virtual stages with full recomputation, bf16 and the separate model.

Calculated but not compared with runs are time, Transformer Engine's layers, latent attention,
context parallelism, other recomputation, and the rest of memory: the work space, what the head and
the separate model keep, and the trainer's own.
"""
