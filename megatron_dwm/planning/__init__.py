"""What weighting adds to a run, by arithmetic alone: nothing is run, allocated or sent.

    model     what is trained: matrices and norms of each pipeline stage, and the layout
    flops     arithmetic, a pass
    traffic   bytes that a rank sends, a process group
    memory    bytes that a rank keeps
    plan      all of it for a run, and what it comes to in steps of the stock trainer

The formulas follow from what the passes of `step.train_step` and Megatron's layers do; each module
says where its own come from. `tests/functional/test_plan.py` holds them to measured runs.
"""
