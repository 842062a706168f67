"""Run as ranks: several recipes, each by the launcher, stock and weighted, in the same processes.

Reads a JSON list ({"name", "args"}) from the file named by RUNS and writes what came out to OUT, a
file for each run and rank (`run_many.py`): `NAME-stock`, `NAME-uniform` and `NAME-head`.
"""

import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from tests.functional import run_many  # noqa: E402  (installs the host before Megatron)

# isort: split
from tests.recipes import stand_ins  # noqa: E402

# A meta step in every step and no gate, so that the few steps show what they can.
KINDS = {
    "stock": [],
    "uniform": ["--dwm", "--dwm-policy", "uniform"],
    "head": ["--dwm", "--dwm-meta-interval", "1", "--dwm-gate", "off"],
}


def main():
    with open(os.environ["RUNS"]) as file:
        recipes = json.load(file)
    stand_ins.install()
    runs = []
    for recipe in recipes:
        for kind, flags in KINDS.items():
            name, args = f"{recipe['name']}-{kind}", [*recipe["args"], *flags]
            runs.append({"name": name, "args": args, "launched": True})
    run_many.run_in_order(runs)


if __name__ == "__main__":
    main()
