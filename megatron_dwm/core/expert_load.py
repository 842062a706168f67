"""Which experts of the MoE layers the tokens of each domain are sent to.

Shapes: n samples on this rank, b in a micro-batch, m micro-batches, s tokens in a sample, L MoE
layers, E experts, K = 258 places: samples of no domain, 256 domains, those of all others.
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

_MOST = 256  # domains that are told apart


class ExpertLoad:
    """Counts tokens by domain and expert, of the trainer's own passes over some steps.

    Of the layers of the last pipeline stage, whose ranks know which samples a micro-batch has.

    Args:
        chunk: the last model chunk of this rank (DDP-wrapped or not).
        interval: steps that are counted together.

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
        """Within it, what the routers decide is counted.

        Args:
            domains: `[n]` domain of each local sample, -1 unknown.
            num_microbatches: m.
        """
        # No look at the largest one, for which the device would be waited for.
        by_micro_batch = (domains + 1).clamp(max=_MOST + 1).view(num_microbatches, -1)
        calls: Counter[int] = Counter()

        def count(layer: int, module: Any, args: tuple, output: Any) -> None:
            # Under recomputation the pass that counts is the one with gradients.
            if not torch.is_grad_enabled():
                return
            chosen = output[1]  # [s b, E], the samples of a position one after the other
            k = calls[layer] % num_microbatches  # a step's passes may be run again
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
        """Returns the tokens `[L, K, E]` since this was last called, over all ranks.

        On every rank that counts; None where no sample was seen.

        Args:
            groups: the language model's `ProcessGroupCollection`.
        """
        counts, self._counts = self._counts, None
        if counts is None:
            return None
        counts = collectives.sum_over_model_parallel(counts, groups.tp)
        return collectives.sum_over_data_parallel(counts, groups.dp_cp)

    def _room(self, chosen: torch.Tensor) -> torch.Tensor:
        """Returns the counts, new ones where there are none."""
        if self._counts is None:
            shape = (len(self.routers), _MOST + 2, chosen.size(1))
            self._counts = torch.zeros(shape, dtype=torch.float64, device=chosen.device)
        return self._counts


def load_by_domain(counts: torch.Tensor, names: list[str]) -> dict[str, dict[str, float]]:
    """Returns how evenly experts are used, for each domain of which there were tokens.

    Args:
        counts: see `ExpertLoad.take`.
        names: of the domains.

    Returns:
        By domain, means over the layers: `imbalance`, the busiest expert's tokens over the mean
        (1: even), and `distance`, the share of the domain's tokens that go to other experts than
        those of all samples do (0: as all, 1: to experts of its own).
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
