"""One rule per Megatron tensor: its shape, and the Hugging Face tensors that it holds.

Export and import both follow the rules, so that they cannot disagree.
"""

from __future__ import annotations

import dataclasses

import torch

from megatron_dwm.conversion.layouts import SAME, Transform


@dataclasses.dataclass(frozen=True)
class Rule:
    """One Megatron tensor and its counterparts on the other side.

    Attributes:
        megatron: Megatron's name, as its local layers spell it.
        hf: Names of the Hugging Face tensors that it holds, in the transform's order.
        shape: Megatron's shape, unsharded.
        transform: The change of layout.
        kind: `norm` (a weight that may be stored as an offset from one), `vocab` (rows after the
            true vocabulary are padding), or empty.
    """

    megatron: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]
    transform: Transform = SAME
    kind: str = ""

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each Hugging Face tensor by name."""
        parts = self.transform.to_hf(torch.empty(self.shape, device="meta"))
        return {name: tuple(part.shape) for name, part in zip(self.hf, parts, strict=True)}

    def to_hf(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Converts Megatron's tensor, into views if the layout allows."""
        return dict(zip(self.hf, self.transform.to_hf(tensor), strict=True))

    def to_megatron(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Converts Hugging Face's tensors, given in the order of `hf`."""
        return self.transform.to_megatron(*parts)

    def inside(self, megatron_prefix: str, hf_prefix: str) -> Rule:
        """Returns the rule under a prefix on both sides."""
        names = tuple(hf_prefix + name for name in self.hf)
        return dataclasses.replace(self, megatron=megatron_prefix + self.megatron, hf=names)


def compare(
    found: dict[str, tuple[int, ...]], needed: dict[str, tuple[int, ...]], limit: int = 8
) -> str:
    """Compares names and shapes.

    Returns:
        Every difference in one line (the first `limit`, and how many follow), or nothing.
    """
    issues = [f"{name} is missing" for name in sorted(needed.keys() - found.keys())]
    issues += [f"{name} is unknown" for name in sorted(found.keys() - needed.keys())]
    issues += [
        f"{name} is {found[name]}, needs {needed[name]}"
        for name in sorted(needed.keys() & found.keys())
        if found[name] != needed[name]
    ]
    return joined(issues, limit)


def joined(issues: list[str], limit: int = 8) -> str:
    """Joins issues into one line, each once, and says how many are left out."""
    issues = list(dict.fromkeys(issues))
    more = f"; and {len(issues) - limit} more" if len(issues) > limit else ""
    return "; ".join(issues[:limit]) + more
