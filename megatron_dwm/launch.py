"""Runs any script that calls Megatron's `pretrain`, unchanged, with the weighting model attached.

    torchrun ... -m megatron_dwm.launch SCRIPT ARGS --dwm --dwm-meta-data-path ...

Without `--dwm` it is the stock trainer.
"""

from __future__ import annotations

import os
import runpy
import sys

from megatron_dwm.hosts import cpu


def main() -> None:
    """Entry point of `python -m megatron_dwm.launch`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: torchrun ... -m megatron_dwm.launch SCRIPT [ARGS ...] [--dwm ...]")
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    script = sys.argv[1]
    if not os.path.isfile(script):
        print(f"megatron_dwm: error: script '{script}' does not exist", file=sys.stderr)
        raise SystemExit(2)
    # As python itself does for a script, so that it finds the modules beside it. Before all else:
    # the script may lie in a checkout of Megatron, which then is the one that is used.
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    try:
        cpu.install()
    except (RuntimeError, ValueError) as error:
        print(f"megatron_dwm: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    sys.argv = [script, *sys.argv[2:]]
    if not any(word.startswith("--dwm") for word in sys.argv):
        runpy.run_path(script, run_name="__main__")
        return
    from megatron_dwm.hosts.megatron_lm.attach import attach

    with attach(add_arguments=True):
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
