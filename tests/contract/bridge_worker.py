"""Run under torchrun, where Megatron-Bridge can be imported: all cases of as many ranks.

Every rank writes to the folder OUT, as JSON, what each case of `bridge_cases.py` left: losses and
gradient norms by step, a digest of the parameters, the weighting's log, or the error.
"""

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main():
    """Takes the cases."""
    from megatron_dwm.hosts import cpu

    cpu.install()
    if importlib.util.find_spec("transformer_engine") is None:
        # Megatron-Bridge imports it.
        from tests.transformer_engine_cpu.install import install

        install(os.environ["TRANSFORMER_ENGINE"])
    # Only now, and only here: what writes checkpoints starts processes that import this file.
    import torch

    from tests.contract import bridge_cases

    # One for all cases: with one of its own for each, the second `pretrain` on two ranks hangs.
    torch.distributed.init_process_group(backend="gloo" if cpu.is_cpu() else "nccl")
    alone = os.environ["WORLD_SIZE"] == "1"
    found = {}
    for name, case in (bridge_cases.one_rank() if alone else bridge_cases.two_ranks()).items():
        print(f"case {name}", file=sys.stderr, flush=True)
        try:
            found[name] = case()
        except Exception:  # told to the test of this case, which fails by it
            found[name] = {"failed": traceback.format_exc()}
    torch.distributed.destroy_process_group()
    Path(os.environ["OUT"], f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
