"""What the checks say of a recipe as it stands, at full size, before any of it is cut or run."""

from __future__ import annotations

import re
import sys

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.training.arguments import parse_args  # noqa: E402

from megatron_dwm.config import DWMConfig  # noqa: E402
from megatron_dwm.hosts.unsupported import unsupported  # noqa: E402
from megatron_dwm.meta_gradient.optimizers.optimizer_rules import refused_settings  # noqa: E402


def refused_at_full_size(words: list[str]) -> list[str]:
    """Returns the flags by which the default head refuses a recipe, as the error names them.

    Args:
        words: the recipe's flags.
    """
    given, sys.argv = sys.argv, ["recipe", *words]
    try:
        args = parse_args()
    finally:
        sys.argv = given
    config = DWMConfig(enabled=True).with_defaults()
    found = [re.split(r" is not supported| must", line)[0] for line in unsupported(config, args)]
    args.optimizer = args.optimizer.removeprefix("dist_")  # as the trainer's own checks do
    if refused_settings(args, config.jacobian) is not None:
        found.append(f"--optimizer {args.optimizer}")
    return found
