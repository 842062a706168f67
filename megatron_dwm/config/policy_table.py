"""The policies that `--dwm-policy` can name, and what each needs from a step."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any

from megatron_dwm.errors import DWMError


@dataclass(frozen=True)
class Needs:
    """What a policy asks for.

    Attributes:
        tokens: the step's token ids before the trainer's own step (`StepView.batches`).
        losses: per-token losses and their mask in `weights`.
        states: the language model's final hidden states in `weights`.
        domains: which data set of the blend each sample comes from.
        influence: each sample's influence on the meta loss, on meta steps.
        influence_ahead: the same, before every weighted step.
        model: a separate weighting model, which `PolicyContext.scorer` builds.
        map: the map from scores to weights that the settings ask for, see `policies.maps`.
        whole_batch: the map is called once for all samples of a step, so any map works.
        documents: settings that name a number of each document, which `weights` reads.
        loss_shape: weights are a shape function of the scaled loss at a temperature, after a
            burn-in.

    Settings for anything that the policy does not ask for are refused, see `choices.READ_BY`.
    """

    tokens: bool = False
    losses: bool = False
    states: bool = False
    domains: bool = False
    influence: bool = False
    influence_ahead: bool = False
    model: bool = False
    map: bool = False
    whole_batch: bool = False
    loss_shape: bool = False
    documents: tuple[str, ...] = ()

    def __or__(self, other: Needs) -> Needs:
        """Returns what two policies ask for together."""
        names = [spec.name for spec in dataclasses.fields(self) if spec.name != "documents"]
        either = {name: getattr(self, name) or getattr(other, name) for name in names}
        documents = tuple(dict.fromkeys([*self.documents, *other.documents]))
        return Needs(**either, documents=documents)


# Name in --dwm-policy -> where it is defined, and what it needs (repeated from its class, so that
# settings can be checked without importing it). `learned` stands for the form that --dwm-form
# names.
_HOME = "megatron_dwm.policies"
_LOSS_SHAPE = Needs(losses=True, loss_shape=True)
BUILT_IN = {
    "uniform": (f"{_HOME}.controls:Uniform", Needs()),
    "shuffled": (f"{_HOME}.controls:Shuffled", Needs()),  # needs what the learned policy needs
    "head": (f"{_HOME}.head:Head", Needs(losses=True, states=True, influence=True, map=True)),
    "model": (
        f"{_HOME}.model:Model",
        Needs(tokens=True, influence=True, model=True, map=True, whole_batch=True),
    ),
    "linupper": (f"{_HOME}.loss_based:LinUpper", _LOSS_SHAPE),
    "quadratic": (f"{_HOME}.loss_based:Quadratic", _LOSS_SHAPE),
    "extremes": (f"{_HOME}.loss_based:Extremes", _LOSS_SHAPE),
    "truncation": (f"{_HOME}.loss_based:Truncation", Needs(losses=True)),
    "static": (f"{_HOME}.document_based:Static", Needs(documents=("static_weights",))),
    "curriculum": (f"{_HOME}.document_based:Curriculum", Needs(documents=("curriculum_by",))),
    "rho": (
        f"{_HOME}.document_based:ExcessLoss",
        Needs(losses=True, map=True, documents=("reference_losses",)),
    ),
    "domains": (f"{_HOME}.domains:Domains", Needs(domains=True, influence=True, map=True)),
    "influence": (
        f"{_HOME}.influence:Influence",
        Needs(influence_ahead=True, map=True, whole_batch=True),
    ),
}


def policy_needs(name: str) -> Needs:
    """Returns what the named policy needs; built-in policies are not imported.

    Args:
        name: of one policy, or of several joined by `+`.

    Raises:
        DWMError: see `named`; or the name stands for something that is not a policy.
    """
    first, *others = name.split("+")
    if others:
        together = policy_needs(first)
        for other in others:
            together = together | policy_needs(other)
        return together
    if name in BUILT_IN:
        return BUILT_IN[name][1]
    needs = getattr(named(name), "needs", None)
    if not isinstance(needs, Needs):
        raise no_policy(name)
    return needs


def named(name: str) -> Any:
    """Returns the object that a name in `BUILT_IN`, or a path `package.module:Class`, stands for.

    Raises:
        DWMError: there is no such object.
    """
    path = BUILT_IN[name][0] if name in BUILT_IN else name
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise DWMError(
            f"--dwm-policy is '{name}'; allowed are learned, {', '.join(BUILT_IN)}, and one "
            "of your own as package.module:Class; several work together with + between them"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise DWMError(
            f"--dwm-policy {name}: the module {module} cannot be imported ({error}); is its folder "
            "on PYTHONPATH?"
        ) from error
    except AttributeError:
        raise DWMError(f"--dwm-policy {name}: {module} has no {attribute}") from None


def no_policy(name: str) -> DWMError:
    """Returns the error for a name that stands for something that is not a policy."""
    return DWMError(
        f"--dwm-policy {name} is not a subclass of megatron_dwm.policies.base.WeightPolicy"
    )
