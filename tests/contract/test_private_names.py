"""Every private name of others that the package relies on: where it is used, and that it is there.

A walk over the sources finds them, so that a new one fails here until it has its line below.

Not exercised here: what the names do, which the other contract tests are about.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core.datasets.gpt_dataset import GPTDataset  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402
from megatron.core.timers import Timers  # noqa: E402

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_dwm"

# Name -> who has it, and its parameters; None: it is no function.
MEGATRON: dict[str, tuple[Any, list[str] | None]] = {
    "_get_all_rng_states": (megatron_random, []),
    "_set_all_rng_states": (
        megatron_random,
        ["cpu_rng_state", "cuda_rng_state", "cuda_rng_state_tracker"],
    ),
    "_get_cuda_rng_state": (megatron_random, ["device", "clone", "graph_safe"]),
    "_set_cuda_rng_state": (megatron_random, ["new_state", "device", "graph_safe"]),
    "_get_model_param_range_map": (DistributedOptimizer, ["self", "param"]),
    "_get_main_param_and_optimizer_states": (DistributedOptimizer, ["self", "model_param"]),
    "_set_main_param_and_optimizer_states": (
        DistributedOptimizer,
        ["self", "model_param", "tensors"],
    ),
    "_build_document_sample_shuffle_indices": (GPTDataset, ["self"]),
    "_query_document_sample_shuffle_indices": (GPTDataset, ["self", "idx"]),
    "_timers": (Timers(log_level=0, log_option="max"), None),
}
OTHERS: dict[str, Any] = {
    "_exit": os,
    "_actions": argparse.ArgumentParser(),
    "_SubParsersAction": argparse,
    "_BaseDataLoaderIter": torch.utils.data.dataloader,
    "_get_default_store": torch.distributed.distributed_c10d,
    "_get_layout": torch.serialization,
    "_C": torch,
    "_len_torch_function_stack": torch._C,
    "_engine_run_backward": torch.autograd,
}
# `_scales` of Transformer Engine's FusedAdam, which cannot be installed here: asked for with a
# default, and `stand_in_fused_adam` has it. `_tokenizer` of tokenizers is set when one is made,
# which tests/cases/test_ids_with_gaps.py does. `_make_activation_op` is a method of a class that is
# there with Transformer Engine only: test_ghost_transformer_engine.py runs it.
ON_OBJECTS = {"_scales", "_tokenizer", "_make_activation_op"}


def private(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[a-zA-Z]\w*", name) is not None


def trees() -> Iterator[tuple[str, ast.Module]]:
    """Yields every module of the package, by its path in it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text())


def own_attributes() -> Counter[str]:
    """Returns the attributes and methods of the package's own classes, and of how many each is."""
    found: Counter[str] = Counter()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                names = set()
                for part in ast.walk(node):
                    if isinstance(part, ast.FunctionDef | ast.ClassDef):
                        names.add(part.name)
                    elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                        names.add(part.id)
                    elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                        if isinstance(part.value, ast.Name) and part.value.id == "self":
                            names.add(part.attr)
                found.update(names)
    return found


def asked_of_super() -> Counter[str]:
    """Returns what the package's classes ask `super()` for, and how many of them do."""
    found: Counter[str] = Counter()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                calls = [part for part in ast.walk(node) if isinstance(part, ast.Attribute)]
                found.update(
                    {
                        c.attr
                        for c in calls
                        if getattr(getattr(c.value, "func", None), "id", "") == "super"
                    }
                )
    return found


def foreign_names() -> dict[str, set[str]]:
    """Returns the private names of others, and the modules that use them.

    What `super()` is asked for is another's unless a class of ours has it that does not ask.
    """
    found: dict[str, set[str]] = {}
    own, asking = own_attributes(), asked_of_super()
    for path, tree in trees():
        names = []
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(
                "megatron_dwm"
            ):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute):
                asked = getattr(getattr(node.value, "func", None), "id", None) == "super"
                if own[node.attr] <= (asking[node.attr] if asked else 0):
                    names.append(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("getattr", "setattr", "hasattr") and len(node.args) > 1:
                    names.append(getattr(node.args[1], "value", None))
        for name in filter(private, names):
            found.setdefault(name, set()).add(path)
    return found


def test_every_private_name_is_known_and_none_is_out_of_use() -> None:
    assert set(foreign_names()) == {*MEGATRON, *OTHERS, *ON_OBJECTS}


def test_those_of_megatron_are_used_in_core_and_hosts_only() -> None:
    for name, modules in foreign_names().items():
        if name in MEGATRON or name in ON_OBJECTS:
            assert all(m.startswith(("core/", "hosts/cpu/")) for m in modules), (name, modules)


@pytest.mark.parametrize("name", MEGATRON)
def test_megatron_has_it_with_these_parameters(name: str) -> None:
    owner, parameters = MEGATRON[name]
    assert hasattr(owner, name)
    if parameters is not None:
        # Of the source, as the host for machines without a GPU replaces some of them.
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        (found,) = [n for n in ast.walk(tree) if getattr(n, "name", None) == name]
        assert isinstance(found, ast.FunctionDef)
        assert [argument.arg for argument in found.args.args] == parameters


@pytest.mark.parametrize("name", OTHERS)
def test_others_have_it(name: str) -> None:
    assert hasattr(OTHERS[name], name)
