"""Your own training loop over Megatron-Core, `examples/own_loop.py`, weighted by `OwnLoop`.

Two ranks, made-up text with half of the samples shuffled. Not exercised: GPUs, and layouts other
than data parallelism (the step is the one of Megatron-LM's trainer, see tests/distributed).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_dwm import DWMConfig, DWMError
from megatron_dwm.hosts import cpu

cpu.install()

from megatron_dwm.hosts.own_loop import OwnLoop  # noqa: E402
from megatron_dwm.logs.log_file import CLOCK_FIGURES, FILE_NAME, read_log  # noqa: E402
from tests.functional.harness import ROOT, torchrun  # noqa: E402

SCRIPT = str(ROOT / "examples" / "own_loop.py")
STEPS, STOP = 80, 50


def text(words: int, seed: int) -> str:
    """Returns sentences of made-up words, in an order that can be learned."""
    draw = random.Random(seed)
    syllables = ["ka", "lo", "mi", "ren", "tu", "sal", "ver", "po", "nim", "da"]
    known = ["".join(random.Random(k).choices(syllables, k=3)) for k in range(60)]
    found, at = [], 0
    for _ in range(words):
        at = (7 * at + draw.choice([1, 2, 3])) % len(known)
        found.append(known[at] + (".\n" if draw.random() < 0.1 else ""))
    return " ".join(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own_loop")
    (folder / "good.txt").write_text(text(20000, 1))
    letters = list(text(20000, 2))
    random.Random(3).shuffle(letters)
    (folder / "noise.txt").write_text("".join(letters))
    (folder / "meta.txt").write_text(text(8000, 4))
    return folder


def run(folder: Path, *words: str, ranks: int = 2) -> dict[str, Any]:
    """Returns what the script has printed at its end."""
    train = ["--train", str(folder / "good.txt"), str(folder / "noise.txt")]
    rest = ["--meta", str(folder / "meta.txt"), "--steps", str(STEPS), *words]
    done = torchrun(ranks, [SCRIPT, *train, *rest])
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(line)


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    return run(folder, "--save", str(folder / "whole"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Any]:
    return run(folder, "--policy", "none")


def test_weights_of_one_leave_the_loop_as_it_is_bit_for_bit(
    folder: Path, plain: dict[str, Any]
) -> None:
    found = run(folder, "--policy", "uniform")
    assert found["losses"] == plain["losses"]
    assert found["held_out"] == plain["held_out"]


def test_what_is_learned_pays(whole: dict[str, Any], plain: dict[str, Any]) -> None:
    assert whole["weights"]["noise"] < 0.6 < 1.4 < whole["weights"]["good"]
    assert whole["held_out"] < plain["held_out"] - 0.02


def test_ranks_do_not_change_what_is_learned(folder: Path, whole: dict[str, Any]) -> None:
    alone = run(folder, "--stop", "40", ranks=1)
    assert alone["losses"] == pytest.approx(whole["losses"][:40], abs=1e-4)


def test_a_resumed_loop_is_the_one_that_was_not_stopped(
    folder: Path, whole: dict[str, Any]
) -> None:
    words = ["--save", str(folder / "parts")]
    first = run(folder, *words, "--stop", str(STOP))
    second = run(folder, *words)
    assert first["losses"] + second["losses"] == whole["losses"]
    assert second["held_out"] == whole["held_out"]

    def lines(name: str) -> list[dict[str, Any]]:
        found = read_log(str(folder / name / FILE_NAME))
        return [{k: v for k, v in line.items() if k not in CLOCK_FIGURES} for line in found]

    assert [line["iteration"] for line in lines("parts")] == list(range(1, STEPS + 1))
    assert lines("parts") == lines("whole")
    assert set(lines("whole")[-1]["domain_weight"]) <= {"good", "noise"}
    stages = sorted(path.name for path in (folder / "whole").glob("dwm_stage_*"))
    assert stages == [f"dwm_stage_{k:03d}" for k in range(1, 6)]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"enabled": False}, "enabled is False"),
        ({"form": "model"}, "--dwm-form is model"),
        ({"sampling": "weights"}, "--dwm-sampling is weights"),
        ({"meta_data_path": ["x"]}, "--dwm-meta-data-path is given"),
        ({"verify_meta_gradient": 1}, "--dwm-verify-meta-gradient is given"),
        ({"document_weights": True}, "--dwm-document-weights is given"),
    ],
)
def test_what_a_loop_cannot_follow_is_refused_with_a_way_out(
    setting: dict[str, Any], named: str
) -> None:
    config = DWMConfig(**{"enabled": True, **setting})
    with pytest.raises(DWMError, match=named) as error:
        OwnLoop.__new__(OwnLoop).check(config)
    assert "your own training loop: " in str(error.value)
