"""Assembles a run's plan: what weighting adds, as plain values for a table or JSON."""

from __future__ import annotations

from typing import Any

from megatron_dwm.planning import flops, memory, traffic
from megatron_dwm.planning.model import Method, Run


def plan_of(run: Run, methods: list[Method]) -> dict[str, Any]:
    """Returns the plan of a run.

    Args:
        run: the run to plan.
        methods: possible ways to compute influence, the run's own first; empty: no meta steps.

    Returns:
        `model`, `layout` and `batch` for the reader; `stock` and `plain` steps; and under
        `methods` a meta step of each, with the total for a whole run. FLOPs are those of all ranks
        (`by_stage`: of one rank), bytes those of one rank.
    """
    layout = run.layout
    stages = range(len(run.model.stages))
    ranks = layout.world // layout.pp
    stock = [flops.stock_step(run, s) for s in stages]
    total = ranks * sum(stock)
    return {
        "model": {
            "parameters": run.model.parameters(),
            "active_parameters": run.model.active_parameters(),
            "parameters_by_stage": [sum(s.parameters(layout)) for s in run.model.stages],
            "layers_by_stage": [len(s.layers) for s in run.model.stages],
        },
        "layout": {**vars(layout), "world_size": layout.world, "expert_dp": layout.expert_dp},
        "batch": {
            **vars(run.batch),
            "micro_batches": run.batch.micro_batches(layout),
            "meta_micro_batches": run.batch.meta_micro_batches(layout),
        },
        "stock": {"flops": total, "bytes_by_stage": [memory.stock(run, s) for s in stages]},
        "plain": {
            "flops": _passes([flops.plain_step(run, s) for s in stages], ranks, total),
            "sent": _sent([traffic.plain_step(run, s) for s in stages]),
            "kept": [memory.kept(run, s, None) for s in stages],
            "stock_steps": flops.in_stock_steps(run, None),
        },
        "meta_steps": {"share": run.weighting.share, "interval": run.weighting.interval},
        "methods": [_method(run, method, ranks, total) for method in methods],
        "notes": list(run.notes),
    }


def _method(run: Run, method: Method, ranks: int, stock: float) -> dict[str, Any]:
    stages = range(len(run.model.stages))
    plain, meta = flops.in_stock_steps(run, None), flops.in_stock_steps(run, method)
    of_plain = sum(sum(flops.plain_step(run, s).values()) for s in stages)
    of_lesson = sum(flops.lesson(run, s) for s in stages)
    of_meta = sum(sum(flops.meta_step(run, s, method).values()) for s in stages)
    share = 1 / run.weighting.interval
    extra = ranks * ((1 - share) * (of_plain + of_lesson) + share * of_meta)
    return {
        "estimator": method.estimator,
        "lookahead": method.lookahead,
        "flops": _passes([flops.meta_step(run, s, method) for s in stages], ranks, stock),
        "sent": _sent([traffic.meta_step(run, s, method) for s in stages]),
        "kept": [memory.kept(run, s, method) for s in stages],
        "stock_steps": meta,
        "average": {
            "flops_share": extra / stock if stock else None,
            "stock_steps": plain + share * (meta - plain),
            "stock_steps_of_run": plain + run.weighting.share * (meta - plain),
        },
    }


def _passes(by_stage: list[dict[str, float]], ranks: int, stock: float) -> dict[str, Any]:
    names = list(dict.fromkeys(name for found in by_stage for name in found))
    totals = {name: ranks * sum(found.get(name, 0.0) for found in by_stage) for name in names}
    shares = {name: total / stock if stock else None for name, total in totals.items()}
    return {"total": totals, "share_of_stock": shares, "by_stage": by_stage}


def _sent(by_stage: list[Any]) -> dict[str, Any]:
    """Returns the bytes that a rank of each stage sends, and the maximum, by group."""
    names = [g for g in traffic.GROUPS if any(found.get(g) for found in by_stage)]
    return {
        "by_stage": [{name: float(found.get(name, 0.0)) for name in names} for found in by_stage],
        "most": {name: float(max(found.get(name, 0.0) for found in by_stage)) for name in names},
    }
