"""Counts which experts of the MoE layers the tokens of each domain are sent to.

Shapes: n samples on this rank, b in a micro-batch, m micro-batches, s tokens in a sample, L MoE
layers, E experts, K = 258 rows: samples without a domain, 256 domains, samples of all others.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.router import Router
from megatron.core.utils import unwrap_model

from megatron_dwm.core import collectives
from megatron_dwm.errors import DWMError

_MOST = 256  # domains that are counted separately


class ExpertLoad:
    """Counts tokens by domain and expert in the trainer's own passes, over several steps.

    It counts in the layers of the last pipeline stage, whose ranks know a micro-batch's samples.

    Args:
        chunk: the last model chunk of this rank (DDP-wrapped or not).
        interval: number of steps that are counted together.

    Raises:
        DWMError: it has no MoE layers.
    """

    def __init__(self, chunk: Any, interval: int) -> None:
        self.interval = interval
        # Layers of multi-token prediction may run several times in a pass.
        self.routers = [
            module
            for name, module in unwrap_model(chunk).named_modules()
            if isinstance(module, Router) and not name.startswith("mtp.")
        ]
        if not self.routers:
            raise DWMError(
                "--dwm-log-expert-load is about MoE layers, but the model has none on its last "
                "pipeline stage; leave it out",
                this_rank_only=True,
            )
        self._counts: torch.Tensor | None = None  # [L, K, E]

    @contextlib.contextmanager
    def listening(self, domains: torch.Tensor, num_microbatches: int) -> Iterator[None]:
        """A context in which the routers' decisions are counted.

        Args:
            domains: `[n]` domain of each local sample, -1 unknown.
            num_microbatches: m.
        """
        # Reading the largest value would wait for the device.
        by_micro_batch = (domains + 1).clamp(max=_MOST + 1).view(num_microbatches, -1)
        calls: Counter[int] = Counter()

        def count(layer: int, module: Any, args: tuple, output: Any) -> None:
            # With recomputation, the pass with gradients is the one that counts.
            if not torch.is_grad_enabled():
                return
            chosen = output[1]  # [s b, E], with the samples of one position next to each other
            k = calls[layer] % num_microbatches  # a step's passes may be repeated
            calls[layer] += 1
            places = by_micro_batch[k]
            places = places.repeat(chosen.size(0) // places.numel())
            self._room(chosen)[layer].index_add_(0, places, chosen.detach().double())

        handles = [
            router.register_forward_hook(lambda *given, layer=layer: count(layer, *given))
            for layer, router in enumerate(self.routers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self, groups: Any) -> torch.Tensor | None:
        """Returns the tokens `[L, K, E]` since the last call, over all ranks.

        Called on every rank that counts; None if no sample was seen.

        Args:
            groups: the language model's `ProcessGroupCollection`.
        """
        counts, self._counts = self._counts, None
        if counts is None:
            return None
        counts = collectives.sum_over_model_parallel(counts, groups.tp)
        return collectives.sum_over_data_parallel(counts, groups.dp_cp)

    def _room(self, chosen: torch.Tensor) -> torch.Tensor:
        """Returns the counts, creating them if needed."""
        if self._counts is None:
            shape = (len(self.routers), _MOST + 2, chosen.size(1))
            self._counts = torch.zeros(shape, dtype=torch.float64, device=chosen.device)
        return self._counts


def load_by_domain(counts: torch.Tensor, names: list[str]) -> dict[str, dict[str, float]]:
    """Returns how evenly experts are used, for each domain with tokens.

    Args:
        counts: see `ExpertLoad.take`.
        names: names of the domains.

    Returns:
        By domain, means over the layers: `imbalance`, the busiest expert's tokens divided by the
        mean (1: even), and `distance`, half the summed difference between the domain's distribution
        over experts and that of all samples (0: the same, 1: experts of its own).
    """
    counts = counts.cpu()
    everything = counts.sum(1)
    everything = everything / everything.sum(-1, keepdim=True).clamp(min=1)
    found = {}
    for place in range(counts.size(1)):
        total = counts[:, place].sum(-1, keepdim=True)
        if not bool((total > 0).all()):
            continue
        share = counts[:, place] / total
        name = {0: "(none)", _MOST + 1: "(others)"}.get(place, str(place - 1))
        if 0 < place <= min(_MOST, len(names)):
            name = names[place - 1]
        elif place == 0 and len(names) == 1:
            name = names[0]  # a single data set is not numbered by the loader
        found[name] = {
            "imbalance": (share.amax(-1) * share.size(-1)).mean().item(),
            "distance": ((share - everything).abs().sum(-1) / 2).mean().item(),
        }
    return found
