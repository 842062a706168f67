"""Runs any script that calls Megatron's `pretrain`, unchanged, with the weighting model attached.

    torchrun ... -m megatron_dwm.launch SCRIPT ARGS --dwm --dwm-meta-data-path ...

`megatron-dwm train SCRIPT ARGS` and `torchrun ... -m megatron_dwm train SCRIPT ARGS` come here.
Without `--dwm` it is the stock trainer.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from megatron_dwm.core.ranks import stand_alone
from megatron_dwm.hosts import cpu


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a script.

    Args:
        argv: The script and its arguments; None takes the process's own.

    Raises:
        SystemExit: What the script raised, or code 2 after one line on standard error.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: torchrun ... -m megatron_dwm.launch SCRIPT [ARGS ...] [--dwm ...]")
        raise SystemExit(0 if words else 2)
    script = words[0]
    if not os.path.isfile(script):
        print(
            f"megatron_dwm: error: script '{script}' does not exist; give the path of your "
            "training script first, then its flags",
            file=sys.stderr,
        )
        raise SystemExit(2)
    # As python itself does for a script, so that it finds the modules beside it. This comes first:
    # if the script is in a checkout of Megatron, that Megatron is used.
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    try:
        cpu.install()
    except (RuntimeError, ValueError) as error:
        print(f"megatron_dwm: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    stand_alone()
    sys.argv = words
    if not any(word.startswith("--dwm") for word in words):
        runpy.run_path(script, run_name="__main__")
        return
    from megatron_dwm.hosts.megatron_lm.attach import attach_to_script

    with attach_to_script():
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
