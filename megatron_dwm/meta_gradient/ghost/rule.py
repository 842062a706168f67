"""`GhostRule`: what a layer type provides for per-sample inner products `<v, g_i>`.

Every layer here is linear in its own parameters, so `<v, dl_i/dp>` is the gradient of its output
times the layer's output with v in place of p, summed over the sample's tokens: for a linear layer
`sum_t <grad_out_t, V x_t>`. No per-sample gradient is ever formed. Source: ghost dot products
(In-Run Data Shapley, arXiv 2406.11011), here with an arbitrary direction v, for every layer of GPT
and Llama models, and under tensor and sequence parallelism.

Shapes: s tokens, b samples of a micro-batch; inside the transformer `[s, b, ...]`, in the
embeddings `[b, s, h]`. Under sequence parallelism a norm sees `[s / tp, b, h]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

Direction = Callable[[torch.nn.Parameter], torch.Tensor | None]
Share = Callable[[torch.nn.Parameter], float]


class SampleMap(Protocol):
    """Which sample each entry of a layer's input and output belongs to."""

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Returns each sample's inner product of two tensors of equal shape, `[b]` float32."""
        ...

    def none(self, like: torch.Tensor) -> torch.Tensor:
        """Returns zeros `[b]` for a missing term, on the device of a tensor."""
        ...

    def problem(self, grad: torch.Tensor, samples: int) -> str | None:
        """Returns why an output's gradient cannot have this number of samples; None if it can."""
        ...


@dataclass(frozen=True)
class ByDimension:
    """Samples are along one dimension: 1 inside the transformer, 0 in the embeddings."""

    dim: int = 1

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """See `SampleMap.dot`."""
        return (a.float() * b).sum([d for d in range(a.dim()) if d != self.dim])

    def none(self, like: torch.Tensor) -> torch.Tensor:
        """See `SampleMap.none`."""
        return torch.zeros(like.size(self.dim), dtype=torch.float32, device=like.device)

    def problem(self, grad: torch.Tensor, samples: int) -> str | None:
        """See `SampleMap.problem`."""
        if grad.size(self.dim) == samples:
            return None
        return f"shape {list(grad.shape)}, not {samples} samples in dimension {self.dim}"


@dataclass(frozen=True)
class ByRow:
    """Each row of the first dimension may belong to another sample, as in an expert's input.

    Attributes:
        samples: `[rows]` integers, the sample of each row; -1 for rows of padding.
        count: b; with `replicas`, the samples of all of them, replica by replica.
        bias_scale: `[rows]`, factor on a bias that is added after the layer; None: none.
        replicas: the group of ranks whose samples have rows here; None: only this rank's do.
    """

    samples: torch.Tensor
    count: int
    bias_scale: torch.Tensor | None = None
    replicas: Any = None

    def of(self, rows: slice) -> ByRow:
        """Returns the map of some of the rows."""
        scale = None if self.bias_scale is None else self.bias_scale[rows]
        return replace(self, samples=self.samples[rows], bias_scale=scale)

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """See `SampleMap.dot`."""
        rows = (a.float() * b).flatten(1).sum(1)
        found = torch.zeros(self.count + 1, dtype=torch.float32, device=rows.device)
        # Padding goes into a place after the last sample.
        return found.index_add_(0, self.samples % (self.count + 1), rows)[: self.count]

    def none(self, like: torch.Tensor) -> torch.Tensor:
        """See `SampleMap.none`."""
        return torch.zeros(self.count, dtype=torch.float32, device=like.device)

    def problem(self, grad: torch.Tensor, samples: int) -> str | None:
        """See `SampleMap.problem`."""
        samples *= 1 if self.replicas is None else self.replicas.size()
        if (grad.size(0), self.count) == (self.samples.numel(), samples):
            return None
        return f"shape {list(grad.shape)}, not {self.samples.numel()} rows of {samples} samples"


@dataclass
class Call:
    """One forward call of a layer.

    Attributes:
        module: the layer.
        x: its first input.
        weight: the weight that it used; not always its own (tied embeddings); None for a layer with
            several weights.
        samples: which sample each entry of the input and output belongs to.
        inputs: all its positional inputs.
        named_inputs: its keyword inputs.
    """

    module: Any
    x: torch.Tensor
    weight: Any
    samples: SampleMap = ByDimension()
    inputs: tuple[Any, ...] = ()
    named_inputs: dict[str, Any] = field(default_factory=dict)


Formula = Callable[[Call, torch.Tensor, Direction, Share], torch.Tensor]


def one_dimension(module: torch.nn.Module) -> SampleMap:
    """Returns the map of layers inside the transformer, `[s, b, ...]`."""
    return ByDimension(1)


@dataclass(frozen=True)
class GhostRule:
    """How a type of layer takes part in `<v, g_i>`.

    Attributes:
        formula: `(call, grad, v, share) -> [b]` float32, this rank's part of `<v, g_i>`: `grad` is
            the gradient of the call's (first) output, `v(parameter)` the direction in the
            parameter's shape or None if it is not trained, `share(parameter)` how much the term of
            a parameter that tensor-parallel ranks replicate counts on this rank.
        samples: returns a layer's sample map; called at each of its forward calls.
    """

    formula: Formula
    samples: Callable[[torch.nn.Module], SampleMap] = one_dimension


# ------------------------------------------------------------------------- shared by formulas


def tensor_parallel_group(module: Any) -> Any:
    """Returns the group over which a layer is split; None if it is whole."""
    group = getattr(module, "tp_group", None)
    return None if group is None or group.size() == 1 else group


def own_part(whole: torch.Tensor, group: Any) -> torch.Tensor:
    """Returns this rank's part of the last dimension."""
    return whole if group is None else whole.chunk(group.size(), dim=-1)[group.rank()]


def bias_dot(
    call: Call, grad: torch.Tensor, v: Direction, share: Share, name: str = "bias"
) -> torch.Tensor:
    """Returns the term of a bias, whose gradient is the output's, even if it is added later."""
    bias = getattr(call.module, name, None)
    # Transformer Engine keeps an empty tensor if there is no bias.
    direction = v(bias) if isinstance(bias, torch.nn.Parameter) and bias.numel() else None
    part = 0.0 if direction is None else share(bias)
    if direction is None or not part:
        return call.samples.none(grad)
    scale = getattr(call.samples, "bias_scale", None)
    if scale is not None:
        grad = grad * scale.unsqueeze(-1)
    return part * call.samples.dot(grad, direction)
