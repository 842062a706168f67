"""What the checks say of a recipe as it stands, at full size, before any of it is cut or run."""

from __future__ import annotations

import re
import sys

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.training.arguments import parse_args  # noqa: E402

from megatron_dwm.config import DWMConfig  # noqa: E402
from megatron_dwm.hosts.unsupported import unsupported  # noqa: E402
from megatron_dwm.meta_gradient.optimizers.optimizer_rules import has_rule  # noqa: E402

KINDS = {
    "uniform": DWMConfig(enabled=True, policy="uniform"),
    "head": DWMConfig(enabled=True),
}


def refused_at_full_size(words: list[str]) -> dict[str, list[str]]:
    """Returns the flags by which a recipe is refused, kind by kind.

    With uniform weights nothing is refused for what it is; what such a run is known to do, the
    small runs show.

    Args:
        words: the recipe's flags.

    Returns:
        Flag by flag, as the error names it.
    """
    given, sys.argv = sys.argv, ["recipe", *words]
    try:
        args = parse_args()
    finally:
        sys.argv = given
    found = {}
    for kind, config in KINDS.items():
        config = config.with_defaults()
        lines = unsupported(config, args) if config.scores else []
        found[kind] = [re.split(r" is not supported| must", line)[0] for line in lines]
        optimizer = args.optimizer.removeprefix("dist_")
        if config.uses_meta_set and config.jacobian == "exact" and not has_rule(optimizer):
            found[kind].append(f"--optimizer {args.optimizer}")
    return found
