"""Learn small, apply large, on real text: what one run has learned is used by another.

The text is this project's own: its pages against as many random bytes, the target another one.
Two ranks take all runs. Not exercised here: how much it wins (benchmarks/quality.py --more), GPUs.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from tests.functional.harness import DWM, ROOT, Results, Run, run_all
from tests.functional.resuming import DP2, log_of, words_on

pytestmark = pytest.mark.extended

STEPS = 60
MODEL = DWM[: DWM.index("--dwm-rule")] + DWM[DWM.index("--dwm-rule") + 2 :]
TP2 = "--tensor-model-parallel-size 2 --lr 1e-2"
LEARNS = "--dwm-meta-interval 1 --dwm-gate off --dwm-stages 2"


def write_text(prefix: Path, text: bytes, seed: int | None = None) -> str:
    """Writes a text as documents of some lines each; with a seed, as random bytes instead."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    rng = numpy.random.default_rng(seed)
    lines = text.split(b"\n")
    for start in range(0, len(lines), 6):
        piece = numpy.frombuffer(b"\n".join(lines[start : start + 6]) + b"\n", numpy.uint8) % 255
        if seed is not None:
            piece = rng.integers(0, 255, size=len(piece))
        builder.add_document(torch.from_numpy(piece.astype(numpy.int32)), [len(piece)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def changed(words: list[str], **values: object) -> list[str]:
    """Returns flags with other values."""
    words = list(words)
    for name, value in values.items():
        words[words.index(f"--{name.replace('_', '-')}") + 1] = str(value)
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transfer")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    pages = sorted((ROOT / "docs").glob("*.md"))
    text, target = (
        b"\n".join(page.read_bytes() for page in pages)[:54_000],
        (ROOT / "CONTRIBUTING.md").read_bytes(),
    )
    data = {
        "text": write_text(folder / "text", text),
        "noise": write_text(folder / "noise", text, 1),
        "meta": write_text(folder / "meta", target),
        "valid": write_text(folder / "valid", target[::2]),
        "text2": write_text(folder / "text2", (ROOT / "CHANGELOG.md").read_bytes()),
        "noise2": write_text(folder / "noise2", (ROOT / "CHANGELOG.md").read_bytes(), 2),
    }

    def common(*names: str, **values: object) -> list[str]:
        words = words_on(folder, [data[name] for name in names], data["valid"])
        words += ["--save-interval", str(STEPS)]
        return changed(words, train_iters=STEPS, log_interval=10, **values)

    save, load = {}, {}
    for name in ("head", "model"):
        save[name] = ["--save", str(folder / name)]
        load[name] = ["--dwm-load", str(folder / name), "--dwm-schedule", "frozen"]
    meta = ["--dwm-meta-data-path", data["meta"], *LEARNS.split()]
    small = common("text", "noise", num_layers=2)
    head = ["--dwm", "--dwm-document-weights", *DP2.split()]
    frozen = ["--dwm", "--dwm-gate", "off", "--dwm-stages", "2"]
    other = common("text2", "noise2", micro_batch_size=4, global_batch_size=8)
    wide = changed(other, hidden_size=96, num_attention_heads=6)
    by_model = [*MODEL, "--dwm-gate", "off", "--dwm-stages", "2"]
    same = common("text2", "noise2", num_layers=2, micro_batch_size=4, global_batch_size=8)
    goes_on = ["--load", str(folder / "head"), "--finetune", "--save", f"{folder}/continued"]
    runs = [
        Run("head", [*small, *head, *meta, *save["head"]]),
        Run("model", [*small, *MODEL, *DP2.split(), *meta, *save["model"]]),
        # The same model on other data, with another batch and at another layout.
        Run("continued", [*same, *frozen, *load["head"], *TP2.split(), *goes_on]),
        # Twice the layers, from the beginning.
        Run("frozen", [*other, *frozen, *load["head"], *TP2.split(), "--save", f"{folder}/frozen"]),
        Run("wide", [*wide, *frozen, *load["head"], *DP2.split()]),
        Run("wide-by-model", [*wide, *by_model, *load["model"], *DP2.split()]),
    ]
    runs[-1].args += ["--save", f"{folder}/wide-by-model"]
    return run_all(2, runs, folder)


def weight_on_text(folder: Path, name: str, steps: slice) -> float:
    """Returns the mean weight of the text's samples over that of the noise's."""
    found = [line["domain_weight"] for line in log_of(folder, name)[steps]]
    text, noise = ([line[k] for line in found if k in line] for k in sorted(found[0])[::-1])
    return float(numpy.mean(text) / numpy.mean(noise))


def test_a_small_run_tells_text_from_noise(results: Results, folder: Path) -> None:
    """So that there is something to carry over."""
    results.succeeded("head")
    assert weight_on_text(folder, "head", slice(30, None)) > 1.3


def test_its_head_weighs_for_its_model_on_other_data(results: Results, folder: Path) -> None:
    out = results.succeeded("continued")[0]["stdout"]
    lines = log_of(folder, "continued")
    assert all("meta_loss" not in line for line in lines)
    assert weight_on_text(folder, "continued", slice(5, None)) > 1.3
    # Stages are matched by progress.
    assert out.index("dwm_stage_001") < out.index("dwm_stage_002")


def test_its_head_runs_on_a_deeper_model(results: Results, folder: Path) -> None:
    """Whose states are others: what it prefers there is anyone's guess, and not asked for."""
    out = results.succeeded("frozen")[0]["stdout"]
    assert all("meta_loss" not in line for line in log_of(folder, "frozen"))
    assert out.index("dwm_stage_001") < out.index("dwm_stage_002")


def test_another_width_is_refused_for_a_head(results: Results) -> None:
    found = results["wide"]
    assert [rank["code"] for rank in found] == [2, 2]
    assert "--hidden-size is 96, the checkpoint's is 64" in found[0]["stderr"]


def test_a_separate_model_weighs_for_a_wider_one(results: Results, folder: Path) -> None:
    results.succeeded("model")
    out = results.succeeded("wide-by-model")[0]["stdout"]
    assert "DWM: weights from" in out
    lines = log_of(folder, "wide-by-model")
    assert all("meta_loss" not in line for line in lines)
    assert max(line["max_weight"] for line in lines) > 1.005


def test_scores_become_samples(results: Results, folder: Path) -> None:
    """Drawn by what the small run has learned, text is read more than noise."""
    from megatron_dwm.cli import weights

    results.succeeded("head")
    blend = folder / "blend.txt"
    assert weights.main(["from-run", str(folder / "head"), "--blend", str(blend)]) == 0
    shares = [float(word) for word in blend.read_text().split()[::2]]
    assert shares[0] > 0.55
    words = changed(words_on(folder, [], str(folder / "valid")), train_iters=STEPS)
    at = words.index("--train-data-path") + 1
    words[at:at] = blend.read_text().split()
    words += ["--save-interval", str(STEPS), "--save", str(folder / "drawn")]
    words += ["--dwm", "--dwm-policy", "linupper", "--dwm-sampling", "weights", *DP2.split()]
    (folder / "drawn-run").mkdir()
    run_all(2, [Run("drawn", words)], folder / "drawn-run").succeeded("drawn")
    counts = {"text": 0, "noise": 0}
    for line in log_of(folder, "drawn"):
        for name, count in line["domain_samples"].items():
            counts[name] += count
    assert counts["text"] / (counts["text"] + counts["noise"]) == pytest.approx(shares[0], abs=0.05)
