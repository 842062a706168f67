"""Bytes that weighting keeps on a rank beyond the stock trainer's, and what they are for.

With P parameters on this rank, of p bytes, gradient buffers of g bytes, and S ranks that shard the
optimizer of a parameter (data-parallel ranks with the distributed optimizer, else 1):

    ghost, current      v                           g P         while the training pass runs
    ghost, next         theta + the step's gradient p P + 4 P / S in pass C; p P in pass D
    finite_difference   the same in pass C; theta and theta+, 2 p P, in pass D

    the step's gradient is kept if the optimizer's Jacobian needs it (`InnerStep.capture`): not with
    `--dwm-jacobian identity`, nor for SGD without clipping

(`step.influence_passes`; checked by `tests/distributed/test_meta_gradient.py` on live tensors.)
In addition, while one parameter or layer is processed:

    ghost               a layer's product and its float32 copy, T min(out, in) (p + 8), and its v in
                        the passes' precision
    finite_difference   two float32 copies of the largest parameter, and one of its v if gradient
                        buffers are in 16 bits (`finite_difference._move_back`)

and always

    head                k^2 sums of the regression and its solution, 6 F numbers of the running
                        moments and the projection, in float64; the step's features, n F float32
    model               p + g + (4 + 4 + 4) / S bytes per parameter of its own in bf16, 4 + g + 8 /
                        S in float32

Activations of the extra passes take no more memory than those of the trainer's own, which are freed
by then (the layer inputs that pass D keeps for its hooks are those that a training pass keeps).
"""

from __future__ import annotations

from megatron_dwm.planning.model import Method, Run, Stage

FLOAT64, FLOAT32 = 8, 4


def kept(run: Run, stage: int, method: Method | None) -> dict[str, float]:
    """Returns bytes on one rank of a stage, by purpose; if passes differ, the larger value.

    Args:
        run: what is planned.
        stage: pipeline rank.
        method: method of meta steps; None: no meta steps.
    """
    found: dict[str, float] = {}
    if method is not None:
        found.update(_of_meta_step(run, run.model.stages[stage], method))
    weighting, last = run.weighting, stage == len(run.model.stages) - 1
    if weighting.head:
        k, features = weighting.regression, weighting.head
        found["head: regression"] = FLOAT64 * (2 * k * k + 3 * k)
        found["head: moments and projection"] = FLOAT64 * 6 * features
        if last:
            samples = run.batch.samples // run.layout.dp
            # Float32, and in float64 while they are standardised.
            found["head: features of a step"] = samples * features * (FLOAT32 + 2 * FLOAT64)
    if weighting.dwm is not None:
        own = sum(weighting.dwm.stages[stage].parameters(run.layout))
        p = run.precision.parameter
        optimizer = 12 if p == 2 else 8
        found["model: parameters, gradients, optimizer"] = own * (
            p + FLOAT32 + optimizer / (run.layout.dp * run.layout.cp if _shared(run) else 1)
        )
    return found


def _of_meta_step(run: Run, stage: Stage, method: Method) -> dict[str, float]:
    precision = run.precision
    dense, experts = stage.parameters(run.layout)
    parameters = dense + experts
    room = _work_space(run, stage, method)
    if method.lookahead == "current":
        return {"v": float(precision.gradient * parameters), "work space": room}
    gradient = 0.0
    if run.weighting.exact and run.weighting.keeps_gradient:
        sharers = (run.layout.dp * run.layout.cp, run.layout.expert_dp) if _shared(run) else (1, 1)
        gradient = FLOAT32 * (dense / sharers[0] + experts / sharers[1])
    copy = float(precision.parameter * parameters)
    found = {"theta": copy, "the step's gradient": gradient}
    if method.estimator == "finite_difference" and copy > gradient:
        # Not at the same time as the gradient, which is freed once v is computed.
        found = {"theta": copy, "theta+": copy}
    return {**found, "work space": room}


def _work_space(run: Run, stage: Stage, method: Method) -> float:
    if method.estimator == "finite_difference":
        largest = max(
            (
                m.local(run.layout) / (m.copies // run.layout.ep if m.expert else 1)
                for m in stage.weights
            ),
            default=0.0,
        )
        return (2.0 if run.precision.gradient == FLOAT32 else 3.0) * FLOAT32 * largest
    layout, p = run.layout, run.precision.parameter
    tokens = run.batch.micro * run.batch.seq / layout.cp
    found = [0.0]
    for m in stage.matrices:
        ways = 1 if m.split == "none" else layout.etp if m.expert else layout.tp
        rows, columns = m.rows, m.columns
        if "column" in m.split:
            rows //= ways
        elif "row" in m.split:
            columns //= ways
        # An expert has as many rows as tokens that it gets on average.
        of_tokens = tokens * m.uses / m.copies if m.expert else tokens
        cast = p * rows * columns if p != run.precision.gradient else 0
        found.append(of_tokens * min(rows, columns) * (p + 2 * FLOAT32) + cast)
    return max(found)


def _shared(run: Run) -> bool:
    return run.precision.distributed


def stock(run: Run, stage: int) -> float:
    """Returns the bytes of the trainer's own parameters, gradients and optimizer (Adam)."""
    dense, experts = run.model.stages[stage].parameters(run.layout)
    p = run.precision
    of_optimizer = 12 if p.parameter == 2 else 8
    sharers = (run.layout.dp * run.layout.cp, run.layout.expert_dp) if p.distributed else (1, 1)
    total = (p.parameter + p.gradient) * (dense + experts)
    return total + of_optimizer * (dense / sharers[0] + experts / sharers[1])
