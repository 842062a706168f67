"""What weighting adds to a run, by arithmetic alone: nothing is run, allocated or sent.

    model     what is trained: matrices and norms of each pipeline stage, and the layout
    flops     arithmetic, a pass
    traffic   bytes that a rank sends, a process group
    memory    bytes that a rank keeps
    plan      all of it for a run, and what it comes to in steps of the stock trainer

The formulas follow from what the passes of `step.train_step` and Megatron's layers do; each module
says where its own come from.

`tests/functional/test_plan.py` holds to runs on four CPU ranks, with tensor, pipeline, data and
expert parallelism: parameters, FLOPs of Megatron's own layers, bytes of each group, and of memory
theta, theta+, v and the step's gradient. `benchmarks/plan.py` adds sequence parallelism, virtual
stages with full recomputation, bf16 and the separate model.

Only worked out are time, Transformer Engine's layers, latent attention, context parallelism, other
recomputation, and the rest of memory: the work space, what the head and the separate model keep,
and the trainer's own.
"""
