"""Makes what a run needs of a smaller one, then becomes that run.

    python prepare.py JOB      (see `runner.prepared`)

The smaller run, the teacher, is taken once for all runs that learn from it. Recipes:

    from-run   weight files and shares of the data sets, of what the teacher made of the documents
    snapshot   the teacher's head, as it was at each stage's end
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def taught(job: dict[str, Any]) -> Path:
    """Returns the folder of the teacher's run, taking it if it has not been taken."""
    folder, save = Path(job["folder"]), Path(job["save"])
    done = folder / "done"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(save.parent, ignore_errors=True)
            save.parent.mkdir(parents=True)
            subprocess.run(job["teacher"], check=True)
            done.touch()
    return save


def from_run(job: dict[str, Any], save: Path) -> list[str]:
    """Returns the blend of data sets with weight files beside them."""
    from megatron_dwm.cli import weights

    made = Path(job["folder"]) / "made"
    blend = made / "blend.txt"
    if not blend.exists():
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        for name in job["names"]:
            for suffix in (".bin", ".idx"):
                (made / f"{name}{suffix}").symlink_to(Path(job["data"]) / f"{name}{suffix}")
        prefixes = [str(made / name) for name in job["names"]]
        partial = made / "blend.part"
        if weights.main(["from-run", str(save), *prefixes, "--blend", str(partial)]):
            raise SystemExit(1)
        partial.rename(blend)
    return blend.read_text().split()


def snapshot(job: dict[str, Any], save: Path) -> None:
    """Puts the teacher's snapshots where the run looks for them."""
    made = Path(job["folder"]) / "made"
    if not made.is_symlink():
        made.symlink_to(save)


def main(job: dict[str, Any]) -> None:
    """Makes it, and becomes the run."""
    save, run = taught(job), job["run"]
    if job["recipe"] == "from-run":
        first = run.index("--train-data-path") + 1
        last = run.index("--valid-data-path")
        run = [*run[:first], *from_run(job, save), *run[last:]]
    else:
        snapshot(job, save)
    sys.stdout.flush()
    os.execv(run[0], run)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
