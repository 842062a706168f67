"""`megatron-dwm score` with models that the trainer saved on two ranks (TP2).

The ranks train twice and score once; one process with a single rank (this file, run as a script)
scores all the rest and computes what the scores must be from the checkpoint's tensors, read
without a process group, document by document.

Not exercised here: GPUs, Transformer Engine's layers, more than one machine.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dwm.data.index import read_index
from megatron_dwm.data.weight_file import read_weights
from tests.functional.corpus import write_dataset
from tests.functional.harness import (
    DWM,
    ROOT,
    TINY,
    Run,
    environment,
    free_port,
    run_all,
    torchrun,
)

TOOL = str(ROOT / "tools" / "score_corpus.py")
LENGTH = 32
TRAIN = """
--tensor-model-parallel-size 2 --train-iters 3 --save-interval 3 --eval-iters 0
--ckpt-format torch_dist --dwm-head-lr 0.05 --dwm-backbone-lr 1e-2 --dwm-temperature 2
--dwm-stages 1
""".split()
MODELS = {
    "mean": [],
    "last": "--dwm-pooling last --dwm-init llm:2 --dwm-schedule staged".split(),
}
# Sequences of each document of the odd corpus: none, short, exactly one window, one more, several.
ODD = [[7], [], [1], [LENGTH], [LENGTH + 1], [20, 30, 40], [3 * LENGTH], [0, 5]]
REFERENCES = 100
DOCUMENTS = 300
# So small that there are hundreds of chunks.
CHUNK = ["--chunk-tokens", "200"]


def write_odd(prefix: Path, largest: int) -> str:
    """Writes the documents of ODD; token ids are below `largest`, and 0 is among them."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(3)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for lengths in ODD:
        tokens = rng.integers(0, largest, size=sum(lengths)).astype(np.int32)
        tokens[-1:] = 0
        builder.add_document(torch.from_numpy(tokens), lengths)
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


# --------------------------------------------------------------------- the process with one rank


def tokens_of(prefix: str) -> list[np.ndarray]:
    """Reads each document with Megatron's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(prefix)
    bounds = data.document_indices
    return [
        np.concatenate([np.zeros(0, np.int32), *(data[k] for k in range(a, b))])
        for a, b in itertools.pairwise(bounds)
    ]


def alone(score: Any, prefix: str) -> list[float]:
    """Returns what the first documents' scores must be: alone, by windows, without padding."""
    import torch

    found = []
    for tokens in tokens_of(prefix)[:REFERENCES]:
        parts = [tokens[k : k + LENGTH] for k in range(0, len(tokens), LENGTH)]
        total = sum(score(torch.tensor(p[None], dtype=torch.long)) * len(p) for p in parts)
        found.append(total / len(tokens) if parts else -np.inf)
    return found


def model_of(run: str, pooling: str, like_llm: bool) -> Any:
    """Builds the weighting model as the trainer does and fills it from the checkpoint's tensors."""
    import torch
    from megatron.core import mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dwm.conversion import TorchDistCheckpoint, find_checkpoint
    from megatron_dwm.conversion.llama_layers import FUSED_NORM_NAMES
    from megatron_dwm.weighting_model.transformer import (
        DataWeightingModel,
        EmbeddingShape,
        dwm_transformer_config,
    )

    llm = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        transformer_impl="local",
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
    )
    shape = {"hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 4}
    if not mpu.model_parallel_is_initialized():
        mpu.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    saved = TorchDistCheckpoint(find_checkpoint(run))
    words = saved.load("dwm.embedding.word_embeddings.weight")
    model = DataWeightingModel(
        config=dwm_transformer_config(llm, 2, like_llm, **({} if like_llm else shape)),
        embedding=EmbeddingShape(words.size(0), LENGTH),
        pooling=pooling,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        pre_process=True,
        post_process=True,
    )
    for name, parameter in model.named_parameters():
        parts = name.split(".", 3)
        if parts[:2] == ["decoder", "layers"]:
            fused = {local: stored for stored, local in FUSED_NORM_NAMES.items()}
            name = ".".join([*parts[:3], fused.get(parts[3], parts[3])])
        parameter.data.copy_(saved.load(f"dwm.{name}"))
    return model.eval()


def save_damaged(folder: Path, source: str) -> tuple[str, str]:
    """Saves a snapshot whose head is NaN, and a checkpoint without a weighting model."""
    from megatron.core import dist_checkpointing

    from megatron_dwm.scoring.model_loading import MegatronScorer, read_saved

    found = read_saved(source)
    scorer = MegatronScorer(found)
    scorer._model.score.weight.data.fill_(float("nan"))
    state = scorer._model.sharded_state_dict(prefix="dwm.")
    nan, stock = folder / "nan" / "dwm_stage_001", folder / "stock"
    for path, content in (
        (nan, {"dwm": {"shape": found.shape, "model": state}}),
        (stock, {"iteration": 3}),
    ):
        path.mkdir(parents=True)
        dist_checkpointing.save(content, str(path))
    return str(nan), str(stock)


def write_classifier(folder: str, vocab_size: int = 256) -> Any:
    """Writes a small Hugging Face classifier with one label, and returns it."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        num_labels=1,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    return model.eval()


def bad_input(folder: Path, flags: list[str], nan: str, stock: str) -> dict[str, list[str]]:
    """Returns command lines that must be refused."""
    odd, mean = str(folder / "odd"), str(folder / "mean")
    wild = write_odd(folder / "wild", 300)
    empty = folder / "empty"
    empty.mkdir()
    return {
        "no-folder": ["--data", odd, "--checkpoint", str(folder / "gone")],
        "no-checkpoint": ["--data", odd, "--checkpoint", str(empty)],
        "no-dwm": ["--data", odd, "--checkpoint", stock],
        "vocabulary": ["--data", wild, "--checkpoint", mean],
        "too-long": ["--data", odd, "--checkpoint", mean, "--seq-length", "64"],
        "exists": [*flags],
        "no-length": ["--data", odd, "--checkpoint", nan],
        "nan": ["--data", odd, "--checkpoint", nan, "--seq-length", "32"],
        "no-config": ["--data", odd, "--hf", str(empty)],
    }


def single_rank(folder: Path) -> None:
    """Takes all runs with one rank and writes what came out, and what the scores must be."""
    from megatron_dwm.hosts import cpu

    cpu.install()
    import torch
    import torch.distributed as dist

    from megatron_dwm.cli.score import main
    from megatron_dwm.core.ranks import start_ranks

    big, odd = str(folder / "big"), str(folder / "odd")
    found: dict[str, Any] = {"code": {}, "stdout": {}, "stderr": {}, "expected": {}}

    def run(name: str, flags: list[str]) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            found["code"][name] = main(flags)
        found["stdout"][name], found["stderr"][name] = out.getvalue(), err.getvalue()

    run("one", command(folder, "one"))
    run("resumed", command(folder, "killed"))
    for name, source in (("last", "last"), ("snapshot", "last/dwm_stage_001")):
        flags = ["--data", odd, "--checkpoint", str(folder / source), "--keep-scores"]
        run(name, [*flags, "--output", str(folder / f"{name}.weights")])
    for path in outputs(folder, "best"):
        # Finished scores serve again: what they become is no part of what they depend on.
        shutil.copytree(f"{path.replace('best', 'one')}.scores", f"{path}.scores")
    best = ["--data", big, odd, "--checkpoint", str(folder / "mean"), *CHUNK]
    best += ["--top-fraction", "0.25", "--temperature", "0.5"]
    run("best", [*best, "--output", *outputs(folder, "best")])
    classifier = write_classifier(str(folder / "hf"))
    flags = ["--data", odd, "--hf", str(folder / "hf"), "--keep-scores"]
    run("hf", [*flags, "--output", str(folder / "hf.weights")])

    start_ranks()
    with torch.no_grad():
        positions = torch.arange(LENGTH)[None]
        for name, prefix, pooling in (
            ("big", big, "mean"),
            ("odd", odd, "mean"),
            ("last", odd, "last"),
        ):
            source = str(folder / ("last" if name == "last" else "mean"))
            model = model_of(source, pooling, like_llm=name == "last")
            found["expected"][name] = alone(
                lambda t, model=model: model(t, positions[:, : t.size(1)]).item(), prefix
            )
        # One at a time and without an id for padding: the last token is the last.
        classifier.config.pad_token_id = None
        found["expected"]["hf"] = alone(lambda t: classifier(t).logits.item(), odd)
    nan, stock = save_damaged(folder, str(folder / "last"))
    dist.destroy_process_group()
    for name, flags in bad_input(folder, command(folder, "one"), nan, stock).items():
        run(f"bad-{name}", flags)
    (folder / "single.json").write_text(json.dumps(found))


# ------------------------------------------------------------------------------------ fixtures


def outputs(folder: Path, name: str) -> list[str]:
    return [str(folder / f"{name}-{corpus}.weights") for corpus in ("big", "odd")]


def command(folder: Path, name: str) -> list[str]:
    """Returns the flags that score both corpora into files of their own."""
    return [
        *("--data", str(folder / "big"), str(folder / "odd"), "--domain", "web", "books"),
        *("--checkpoint", str(folder / "mean"), "--output", *outputs(folder, name)),
        *("--keep-scores", *CHUNK),
    ]


def parts(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*.weights.scores/*/*.part"))


def kill_in_the_middle(folder: Path) -> list[int]:
    """Starts two ranks and kills them once there is a chunk; returns the sizes of their files."""
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    words += [str(free_port()), TOOL, *command(folder, "killed")]
    with open(folder / "killed.log", "w") as log:
        started = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment(), stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + 300
            while not any(path.stat().st_size for path in parts(folder, "killed")):
                assert started.poll() is None and time.monotonic() < deadline, (
                    folder / "killed.log"
                ).read_text()[-3000:]
                time.sleep(0.002)
        finally:
            kill_all(started.pid)
            started.wait()
    return [path.stat().st_size for path in parts(folder, "killed")]


def kill_all(pid: int) -> None:
    """Kills torchrun and its ranks, at once and without notice."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(pid)
        processes = [*launcher.children(recursive=True), launcher]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                os.kill(process.pid, signal.SIGKILL)
        psutil.wait_procs(processes[:-1], timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score")
    data = {name: write_dataset(folder / name, seed) for seed, name in enumerate(("train", "meta"))}
    write_dataset(folder / "big", 5, documents=DOCUMENTS)
    write_odd(folder / "odd", 255)
    at = TINY.index("--split")
    common = [*TINY[:at], *TINY[at + 2 :], *DWM, *TRAIN, "--train-data-path", data["train"]]
    common += ["--dwm-meta-data-path", data["meta"], "--data-cache-path", str(folder / "cache")]
    runs = [
        Run(name, [*common, *flags, "--save", str(folder / name)]) for name, flags in MODELS.items()
    ]
    results = run_all(2, runs, folder)
    for name in MODELS:
        results.succeeded(name)
    return folder


@pytest.fixture(scope="module")
def killed(folder: Path) -> list[int]:
    return kill_in_the_middle(folder)


@pytest.fixture(scope="module")
def single(folder: Path, killed: list[int]) -> dict[str, Any]:
    """Returns what the process with one rank found; beside it, two ranks score all."""
    with ThreadPoolExecutor(2) as pool:
        two = pool.submit(torchrun, 2, [TOOL, *command(folder, "two")])
        one = pool.submit(
            subprocess.run,
            [sys.executable, __file__, str(folder)],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )
    for done in (one.result(), two.result()):
        assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "single.json").read_text())


def contents(folder: Path, name: str) -> list[bytes]:
    files = [f"{name}-{c}.{e}" for c in ("big", "odd") for e in ("weights", "scores.npy")]
    return [(folder / file).read_bytes() for file in files]


def scores(folder: Path, name: str) -> np.ndarray:
    return np.load(folder / f"{name}.scores.npy")


# --------------------------------------------------------------------------------------- tests


def test_the_number_of_ranks_does_not_matter(folder: Path, single: dict[str, Any]) -> None:
    """Weights and scores of one rank and of two are the same bytes."""
    assert single["code"]["one"] == 0, single["stderr"]["one"]
    assert contents(folder, "one") == contents(folder, "two")
    assert len(parts(folder, "two")) >= 3  # both ranks wrote


def test_killed_run_goes_on(folder: Path, single: dict[str, Any], killed: list[int]) -> None:
    """Killed on two ranks and continued on one: the same bytes, and no chunk is scored twice."""
    assert single["code"]["resumed"] == 0, single["stderr"]["resumed"]
    whole = sum(path.stat().st_size for path in parts(folder, "one"))
    assert 0 < sum(killed) < whole / 2
    assert contents(folder, "killed") == contents(folder, "one")
    added = sum(path.stat().st_size for path in parts(folder, "killed")) - sum(killed)
    # A record that the kill cut short is written again, whole: 20 bytes and a few scores.
    assert whole - sum(killed) <= added < whole - sum(killed) + 2 * 200
    kept = re.search(r"NOTE: (\d+) of 308 documents were scored", single["stderr"]["resumed"])
    assert kept is not None and 0 < int(kept[1]) < 308


def test_scores_are_the_models_own(folder: Path, single: dict[str, Any]) -> None:
    """Each is that of the document alone, whatever it was padded and batched with."""
    for name, file in (("big", "one-big"), ("odd", "one-odd"), ("last", "last"), ("hf", "hf")):
        expected = np.array(single["expected"][name])
        found = scores(folder, file)[: len(expected)]
        some = np.isfinite(expected)
        assert np.array_equal(some, np.isfinite(found))
        assert np.abs(found[some] - expected[some]).max() < 1e-5, name
        # So far apart that a wrong token or document would show.
        assert np.diff(np.sort(expected[some])).max() > 1e-3, name
        assert expected[some].std() > 1e-3, name


def test_long_document_is_pooled_from_its_windows(folder: Path, single: dict[str, Any]) -> None:
    """The document of 90 tokens in three sequences: two windows of 32 and one of 26."""
    expected, found = single["expected"]["odd"], scores(folder, "one-odd")
    assert found[5] == pytest.approx(expected[5], abs=1e-5)
    assert sum(ODD[5]) == 90 and found[1] == -np.inf


def test_snapshot_scores_as_the_checkpoint_it_was_taken_at(
    folder: Path, single: dict[str, Any]
) -> None:
    assert single["code"]["last"] == single["code"]["snapshot"] == 0, single["stderr"]["snapshot"]
    assert "dwm_stage_001" in single["stdout"]["snapshot"]
    assert np.array_equal(scores(folder, "last"), scores(folder, "snapshot"))


def test_weights_follow_from_the_scores_of_all_files(folder: Path, single: dict[str, Any]) -> None:
    """With the run's own temperature; domains are the flag's; nothing is left but what is kept."""
    found = [
        read_weights(path, read_index(str(folder / corpus)))
        for path, corpus in zip(outputs(folder, "one"), ("big", "odd"), strict=True)
    ]
    values = np.concatenate([scores(folder, "one-big"), scores(folder, "one-odd")]).astype(float)
    some = np.isfinite(values)
    expected = np.exp(values / 2)
    expected /= expected[some].mean()
    weights = np.concatenate([file.weights for file in found])
    assert weights == pytest.approx(expected, rel=1e-5) and weights[DOCUMENTS + 1] == 0
    assert [file.domain_names for file in found] == [("web",), ("books",)]
    printed = single["stdout"]["one"]
    assert "temperature 2, 1 rank(s)" in printed and "effective sample size" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["web", str(DOCUMENTS)] in [row[:2] for row in rows]
    assert ["books", str(len(ODD))] in [row[:2] for row in rows]


def test_top_fraction_keeps_the_best(folder: Path, single: dict[str, Any]) -> None:
    """A quarter of the 307 documents with tokens keeps a weight; the work folder is gone."""
    assert single["code"]["best"] == 0, single["stderr"]["best"]
    values = np.concatenate([scores(folder, "one-big"), scores(folder, "one-odd")])
    weights = np.concatenate([read_weights(path).weights for path in outputs(folder, "best")])
    kept = weights > 0
    assert np.count_nonzero(kept) == 77
    assert values[kept].min() >= values[~kept].max()
    assert "NOTE: 308 of 308 documents were scored" in single["stderr"]["best"]
    assert not list(folder.glob("best-*.scores")) and not list(folder.glob("best-*.npy"))


REFUSED = {
    "no-folder": ["--checkpoint", "gone: no such folder"],
    "no-checkpoint": ["empty is neither a checkpoint", "nor a run"],
    "no-dwm": ["stock holds no weighting model"],
    "vocabulary": ["wild.bin: document 3 has the token id", "vocabulary has 255 ids"],
    "too-long": ["--seq-length 64 is longer than the 32 positions"],
    "exists": ["one-big.weights is there already", "--force"],
    "no-length": ["does not say what sequence length", "--seq-length"],
    "nan": ["the score of document 0 of", "is nan"],
    "no-config": ["--hf", "has no config.json"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_code_2(single: dict[str, Any], name: str) -> None:
    assert single["code"][f"bad-{name}"] == 2
    printed = single["stderr"][f"bad-{name}"]
    lines = [x for x in printed.splitlines() if x.startswith("megatron-dwm score: error:")]
    assert len(lines) == 1 and "Traceback" not in printed
    for word in REFUSED[name]:
        assert word in lines[0]


if __name__ == "__main__":
    single_rank(Path(sys.argv[1]))
