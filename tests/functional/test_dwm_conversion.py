"""The weighting model leaves and comes back; verify, inspect; a damaged checkpoint is named.

Two ranks (TP2) train twice: mean pooling with a model of its own, last-token pooling with the
language model's layers. Then one process with a single rank (this file, run as a script) scores
with Megatron, scores corpora with the exports and runs `verify`, while two ranks start from the
exports (TP2 and PP2) and try to resume from damaged copies of the run.

Not exercised: GPUs, Transformer Engine's layers, bf16, files that are damaged while they are read.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dwm.cli.convert.command import main as convert
from megatron_dwm.conversion import iter_hf_tensors
from tests.functional.corpus import write_dataset
from tests.functional.harness import DWM, TINY, Results, Run, environment, run_all

# The run's tokenizer takes the place of the null one.
_DROPPED = ("--split", "--tokenizer-type", "--vocab-size", "--train-iters")
TRAIN = """
--tensor-model-parallel-size 2 --train-iters 4 --save-interval 2 --eval-iters 0
--ckpt-format torch_dist --init-method-std 0.1 --dwm-head-lr 0.05 --dwm-backbone-lr 1e-2
--dwm-temperature 2 --dwm-schedule staged --dwm-stages 2
""".split()
MODELS = {"mean": [], "last": "--dwm-pooling last --dwm-init llm:2".split()}
# No step moves anything by as much as one bit.
STILL = "--train-iters 1 --save-interval 1 --dwm-head-lr 1e-30 --dwm-backbone-lr 1e-30".split()
SOURCES = ("mean", "last", "mean/dwm_stage_001")
TEXTS = [
    "the weight of a sample",
    "naïve 日本 what the model learns from it",
    "x",
    "Straße 123 the model</s>",
    " the  model " * 3,
]
VOCABULARY = 300


def without(flags: list[str], names: tuple[str, ...]) -> list[str]:
    """Returns the flags without some that take one value."""
    found, words = [], iter(flags)
    for word in words:
        if word in names:
            next(words)
        else:
            found.append(word)
    return found


def train_tokenizer(folder: Path) -> str:
    import sentencepiece

    words = "the weight of a sample is what the model learns from it Straße naïve 日本 123 x"
    lines = [f"{a} {b}  {a}{b}" for a in words.split() for b in words.split()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tiny"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return str(folder / "tiny.model")


# ------------------------------------------------------------------------------ damaged copies


def _shard(checkpoint: Path) -> Path:
    return sorted(checkpoint.glob("*.distcp"))[-1]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def _common(checkpoint: Path) -> None:
    """Changes a byte of the checkpoint's arguments."""
    for path in checkpoint.glob("*.distcp"):
        at = path.read_bytes().find(b"padded_vocab_size")
        if at >= 0:
            _flip(path, at)


# name -> what is done to the latest checkpoint, and what the error must name.
DAMAGES: dict[str, tuple[Any, str]] = {
    "missing": (lambda c: _shard(c).unlink(), "__1_0.distcp is missing"),
    "truncated": (lambda c: _truncate(_shard(c)), "__1_0.distcp is truncated"),
    "index": (lambda c: _flip(c / ".metadata", 1000), ".metadata is damaged"),
    "marker": (lambda c: _flip(c / "metadata.json", 20), "metadata.json is damaged"),
    "common": (_common, "the common state"),
    "unfinished": (lambda c: (c / "metadata.json").unlink(), "the save was not finished"),
    "gone": (shutil.rmtree, "iter_0000004 is not there"),
}


def write_damaged(folder: Path) -> None:
    """Copies the run once for each damage, and does it."""
    for name, (damage, _) in DAMAGES.items():
        copy = folder / f"damaged-{name}"
        for part in ("iter_0000002", "iter_0000004"):
            shutil.copytree(folder / "mean" / part, copy / part)
        (copy / "latest_checkpointed_iteration.txt").write_text("4")
        damage(copy / "iter_0000004")
    # The stage before is damaged too, and the latest is marked by no tracker.
    both = folder / "damaged-both"
    shutil.copytree(folder / "damaged-missing", both)
    _shard(both / "iter_0000002").unlink()


# ----------------------------------------------------------------------------- wrong exports


def write_headless(folder: Path) -> None:
    """Copies an export without its score head."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "hf_mean", folder / "hf_headless")
    path = folder / "hf_headless" / "model.safetensors"
    state = load_file(path)
    del state["score.weight"]
    save_file(state, path, metadata={"format": "pt"})


def write_wrong(folder: Path) -> None:
    """Copies the exported language model and makes it wrong, as a bad converter would."""
    from safetensors.torch import load_file, save_file

    for name in ("swapped", "shifted"):
        shutil.copytree(folder / "lm", folder / f"lm-{name}")
        path = folder / f"lm-{name}" / "model.safetensors"
        state = load_file(path)
        if name == "swapped":
            layer = "model.layers.1.self_attn."
            # Equal in shape, as k has half of q's heads.
            k, v = state[f"{layer}k_proj.weight"], state[f"{layer}v_proj.weight"]
            rows = k.size(0)
            q = state[f"{layer}q_proj.weight"].clone()
            state[f"{layer}k_proj.weight"], q[:rows] = q[:rows].clone(), k
            state[f"{layer}q_proj.weight"] = q
            assert v.shape == k.shape
        else:
            words = state["model.embed_tokens.weight"]
            state["model.embed_tokens.weight"] = words.roll(1, 0)
        save_file({n: t.contiguous() for n, t in state.items()}, path, metadata={"format": "pt"})


# --------------------------------------------------------------------- the process with one rank


def encoded() -> list[list[int]]:
    """Returns the texts as the run's tokenizer reads them."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file="tiny.model")
    # The end-of-document token is no piece of text.
    ids = [model.encode(text.removesuffix("</s>")) for text in TEXTS[:3]]
    ids.append([*model.encode("Straße 123 the model"), model.eos_id()])
    return [*ids, model.encode(TEXTS[4])]


def single_rank(folder: Path) -> None:
    """Scores with Megatron's own modules, with score_corpus, and runs verify."""
    from megatron_dwm.hosts import cpu

    cpu.install()
    import torch.distributed as dist

    from megatron_dwm.cli.score import main as score_corpus
    from megatron_dwm.core.ranks import start_ranks

    found: dict[str, Any] = {"scores": {}, "code": {}, "stdout": {}, "stderr": {}}

    def run(name: str, main: Any, flags: list[str]) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            found["code"][name] = main(flags)
        found["stdout"][name], found["stderr"][name] = out.getvalue(), err.getvalue()

    for name in MODELS:
        for kind, flag, source in (("run", "--checkpoint", name), ("hf", "--hf", f"hf_{name}")):
            flags = ["--data", str(folder / "train"), flag, str(folder / source), "--keep-scores"]
            output = folder / f"{kind}-{name}.weights"
            run(f"{kind}-{name}", score_corpus, [*flags, "--output", str(output)])

    start_ranks()
    from megatron_dwm.scoring.model_loading import MegatronScorer, read_saved

    ids = encoded()
    lengths = torch.tensor([len(row) for row in ids])
    tokens = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
    for row, values in zip(tokens, ids, strict=True):
        row[: len(values)] = torch.tensor(values)
    with torch.no_grad():
        for source in SOURCES:
            scorer = MegatronScorer(read_saved(str(folder / source)))
            found["scores"][source] = scorer.scores(tokens, lengths).tolist()

    path = ["verify", "--megatron-path", str(folder / "mean"), "--hf-path"]
    data = ["--data", str(folder / "train")]
    run("verify-good", convert, [*path, str(folder / "lm"), *data])
    run("verify-random", convert, [*path, str(folder / "lm"), "--iteration", "4"])
    run("verify-strict", convert, [*path, str(folder / "lm"), "--tolerance", "1e-12"])
    run("verify-earlier", convert, [*path, str(folder / "lm"), "--iteration", "2"])
    for name in ("swapped", "shifted"):
        run(f"verify-{name}", convert, [*path, str(folder / f"lm-{name}"), *data])
    run("verify-nothing", convert, [*path, str(folder / "nothing")])
    run("verify-classifier", convert, [*path, str(folder / "hf_last")])
    run("verify-data", convert, [*path, str(folder / "lm"), "--data", str(folder / "gone")])
    run("verify-tokens", convert, [*path, str(folder / "lm"), "--tokens", "1"])
    dist.destroy_process_group()
    (folder / "single.json").write_text(json.dumps(found))


# ------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Returns the folder of all that follows, and the flags that all runs share."""
    folder = tmp_path_factory.mktemp("dwm_conversion")
    data = {name: write_dataset(folder / name, seed) for seed, name in enumerate(("train", "meta"))}
    flags = [*without(TINY, _DROPPED), *DWM, *TRAIN, "--train-data-path", data["train"]]
    flags += ["--dwm-meta-data-path", data["meta"], "--data-cache-path", str(folder / "cache")]
    flags += ["--tokenizer-type", "SentencePieceTokenizer"]
    return folder, [*flags, "--tokenizer-model", train_tokenizer(folder)]


@pytest.fixture(scope="module")
def trained(common: tuple[Path, list[str]]) -> tuple[Path, Results]:
    """Trains on two ranks, exports everything, and writes what is wrong or damaged."""
    folder, flags = common
    runs = [Run(n, [*flags, *more, "--save", str(folder / n)]) for n, more in MODELS.items()]
    results = run_all(2, runs, folder)
    for name in MODELS:
        results.succeeded(name)
        paths = ["--megatron-path", str(folder / name), "--hf-path", str(folder / f"hf_{name}")]
        assert convert(["export-dwm", *paths]) == 0
    stages = ["--megatron-path", str(folder / "mean"), "--hf-path", str(folder / "stages")]
    assert convert(["export-dwm", *stages, "--all-stages"]) == 0
    lm = ["--megatron-path", str(folder / "mean"), "--hf-path", str(folder / "lm")]
    assert convert(["export", *lm]) == 0
    write_headless(folder)
    write_wrong(folder)
    write_damaged(folder)
    return folder, results


@pytest.fixture(scope="module")
def after(
    common: tuple[Path, list[str]], trained: tuple[Path, Results]
) -> tuple[dict[str, Any], Results]:
    """What the process with one rank found, and the runs that start from exports and copies."""
    folder, flags = common
    back = [*without(flags, tuple(w for w in STILL if w.startswith("--"))), *STILL]
    pipeline = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "2"]
    runs = [
        Run(
            f"back_{name}",
            [*back, *more, "--dwm-init", f"hf:{folder / source}"]
            + ["--save", str(folder / f"back_{name}")],
        )
        # The pooling is the export's own: last is not asked for.
        for name, source, more in (
            ("mean", "hf_mean", []),
            ("last", "hf_last", pipeline),
            ("lm", "lm", []),
            ("headless", "hf_headless", []),
        )
    ]
    runs += [
        Run(name, [*flags, "--load", str(folder / f"damaged-{name}")])
        for name in (*DAMAGES, "both")
    ]
    resumed = [*flags, "--load", str(folder / "damaged-missing"), "--ckpt-step", "2"]
    runs.append(Run("resumed", resumed))
    with ThreadPoolExecutor(2) as pool:
        two = pool.submit(run_all, 2, runs, folder)
        one = pool.submit(
            subprocess.run,
            [sys.executable, __file__, str(folder)],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )
        done, results = one.result(), two.result()
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "single.json").read_text()), results


@pytest.fixture(scope="module")
def single(after: tuple[dict[str, Any], Results]) -> dict[str, Any]:
    return after[0]


@pytest.fixture(scope="module")
def folder(trained: tuple[Path, Results]) -> Path:
    return trained[0]


# --------------------------------------------------------------------------------------- export


def classify(folder: Path, source: str, **options: Any) -> list[float]:
    """Scores the texts by `transformers.pipeline`."""
    from transformers import pipeline

    name = "stages/dwm_stage_001" if "stage" in source else f"hf_{source}"
    trust = {} if source == "last" else {"trust_remote_code": True}
    classifier = pipeline(
        "text-classification", model=str(folder / name), function_to_apply="none", **trust
    )
    return [found["score"] for found in classifier(TEXTS, **options)]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_pipeline_gives_the_score_of_training(
    folder: Path, single: dict[str, Any], source: str, batch_size: int
) -> None:
    """One text at a time, and padded in a batch; a text may end with the end-of-document token."""
    expected = np.array(single["scores"][source])
    found = np.array(classify(folder, source, batch_size=batch_size))
    assert np.abs(found - expected).max() <= 1e-4
    # So far apart that a wrong token, pooling or stage would show.
    assert np.diff(np.sort(expected)).min() > 1e-3
    others = [single["scores"][name] for name in SOURCES if name != source]
    assert all(np.abs(expected - other).max() > 1e-2 for other in others)


def test_last_pooling_needs_no_code_and_mean_pooling_says_so(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    """Without trust_remote_code a mean-pooling export is refused, not read as another model."""
    from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

    load = AutoModelForSequenceClassification.from_pretrained
    model = load(folder / "hf_last")
    assert type(model) is LlamaForSequenceClassification
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    with pytest.raises(ValueError, match="trust_remote_code|dwm_mean_llama"):
        load(folder / "hf_mean", trust_remote_code=False)
    trusted = load(folder / "hf_mean", trust_remote_code=True)
    assert isinstance(trusted, LlamaForSequenceClassification)
    out = [*("--hf-path", str(folder / "again")), "--force"]
    for name, told in (("mean", True), ("last", False)):
        assert convert(["export-dwm", "--megatron-path", str(folder / name), *out]) == 0
        assert ("trust_remote_code=True" in capsys.readouterr().out) is told


def test_mean_pooling_ignores_padding_on_either_side(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "hf_mean", trust_remote_code=True
    )
    pad = model.config.pad_token_id
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        alone = model(ids).logits
        for padded in ([5, 6, 7, 8, pad, pad], [pad, pad, 5, 6, 7, 8]):
            tokens = torch.tensor([padded])
            assert (model(tokens, (tokens != pad).long()).logits - alone).abs().max() < 1e-5
        right = torch.tensor([[5, 6, 7, 8, pad, pad]])
        assert (model(right).logits - alone).abs().max() < 1e-5
        counted = model(right, torch.ones_like(right)).logits
        assert (counted - alone).abs().max() > 1e-3, "padding that counts would show"
        labelled = model(ids, labels=torch.tensor([2.0]))
        assert labelled.loss.item() == pytest.approx((alone.item() - 2) ** 2, rel=1e-5)


def test_padding_is_no_token_of_a_text(folder: Path) -> None:
    """The tokenizer had none to pad with: one is added behind the vocabulary."""
    from transformers import AutoTokenizer

    for name in MODELS:
        tokenizer = AutoTokenizer.from_pretrained(folder / f"hf_{name}")
        config = json.loads((folder / f"hf_{name}" / "config.json").read_text())
        assert tokenizer.pad_token_id == config["pad_token_id"] == VOCABULARY
        assert config["vocab_size"] == VOCABULARY + 1
        assert tokenizer(TEXTS[0]).input_ids == tokenizer(TEXTS[0], padding=True).input_ids


def test_every_stage_is_exported(folder: Path) -> None:
    stages = {p.name: dict(iter_hf_tensors(p)) for p in (folder / "stages").iterdir()}
    assert sorted(stages) == ["dwm_stage_001", "dwm_stage_002"]
    last = dict(iter_hf_tensors(folder / "hf_mean"))
    assert all(torch.equal(stages["dwm_stage_002"][name], last[name]) for name in last)
    assert not torch.equal(stages["dwm_stage_001"]["score.weight"], last["score.weight"])


# ------------------------------------------------------------------------------------ the way back


@pytest.mark.parametrize("name", list(MODELS))
def test_an_export_comes_back_with_its_head(
    folder: Path, after: tuple[dict[str, Any], Results], name: str
) -> None:
    """Loaded by a run (TP2, and PP2), saved and exported again: the same bits, head and pooling."""
    results = after[1].succeeded(f"back_{name}")
    line = f"the score head of {folder / f'hf_{name}'} is taken, with its {name} pooling"
    assert line in results[0]["stdout"] + results[1]["stdout"]
    again = folder / f"again_{name}"
    paths = ["--megatron-path", str(folder / f"back_{name}"), "--hf-path", str(again)]
    assert convert(["export-dwm", *paths]) == 0
    first, second = (dict(iter_hf_tensors(f)) for f in (folder / f"hf_{name}", again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["score.weight"].abs().max() > 1e-2, "the head is not where it started"
    configs = [json.loads((f / "config.json").read_text()) for f in (folder / f"hf_{name}", again)]
    assert configs[0]["dwm_pooling"] == configs[1]["dwm_pooling"] == name
    log = [json.loads(row) for row in (folder / f"back_{name}/dwm_log.jsonl").open()]
    assert log[0]["effective_sample_size"] < 0.999, "weights are uniform from the first step"


def test_without_a_head_it_starts_at_zero_and_a_missing_one_is_named(
    folder: Path, after: tuple[dict[str, Any], Results]
) -> None:
    """A language model has none, and says so; a classifier that lacks its own is bad input."""
    results = after[1].succeeded("back_lm")
    assert (
        f"{folder / 'lm'} is no classifier: the score head starts at zero" in results[0]["stdout"]
    )
    log = [json.loads(row) for row in (folder / "back_lm/dwm_log.jsonl").open()]
    assert log[0]["effective_sample_size"] == pytest.approx(1)
    ranks = after[1]["back_headless"]
    assert [rank["code"] for rank in ranks] == [2, 2]
    assert "no tensors named score.*" in ranks[0]["stderr"]


@pytest.mark.parametrize("name", list(MODELS))
def test_score_corpus_gives_the_same_scores_from_an_export(
    folder: Path, single: dict[str, Any], name: str
) -> None:
    """--hf scores as --checkpoint does, with the run's windows and temperature."""
    assert single["code"][f"run-{name}"] == 0, single["stderr"][f"run-{name}"]
    assert single["code"][f"hf-{name}"] == 0, single["stderr"][f"hf-{name}"]
    ours, theirs = (np.load(folder / f"{kind}-{name}.scores.npy") for kind in ("run", "hf"))
    assert np.abs(ours - theirs).max() <= 1e-4
    assert ours.std() > 1e-2
    weights = [(folder / f"{kind}-{name}.weights").stat().st_size for kind in ("run", "hf")]
    assert weights[0] == weights[1]
    line = single["stdout"][f"hf-{name}"].splitlines()[0]
    assert "windows of 32 tokens, temperature 2," in line


# ----------------------------------------------------------------------------- verify and inspect


def test_verify_agrees_with_a_right_export(single: dict[str, Any]) -> None:
    for name in ("good", "random"):
        assert single["code"][f"verify-{name}"] == 0, single["stderr"][f"verify-{name}"]
    text = single["stdout"]["verify-good"]
    assert "28-31" in text and "the two agree" in text
    losses = text.split("loss: Megatron ")[1].split(", transformers ")
    assert float(losses[0]) == pytest.approx(float(losses[1].split(";")[0]), rel=1e-5)
    assert "loss" not in single["stdout"]["verify-random"]


def test_verify_sees_a_wrong_export(single: dict[str, Any]) -> None:
    """Rows of q and k swapped, the vocabulary off by one, another iteration, no tolerance."""
    for name in ("swapped", "shifted", "earlier", "strict"):
        assert single["code"][f"verify-{name}"] == 1, single["stderr"][f"verify-{name}"]
        assert "DO NOT AGREE" in single["stdout"][f"verify-{name}"]
    for name in ("swapped", "shifted"):
        found = float(
            single["stdout"][f"verify-{name}"].split("relative difference ")[1].split(",")[0]
        )
        assert found > 1e-2


def test_verify_names_bad_input(single: dict[str, Any]) -> None:
    for name, said in (
        ("nothing", "has no config.json"),
        ("classifier", "is not a complete language model"),
        ("data", "gone"),
        ("tokens", "--tokens is 1"),
    ):
        assert single["code"][f"verify-{name}"] == 2
        lines = [
            line
            for line in single["stderr"][f"verify-{name}"].splitlines()
            if "megatron-dwm convert verify: error:" in line
        ]
        assert len(lines) == 1 and said in lines[0], name


def test_inspect_lists_a_whole_run(folder: Path, capsys: pytest.CaptureFixture) -> None:
    out = folder / "found.json"
    assert convert(["inspect", str(folder / "mean"), "--deep", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    found = json.loads(out.read_text())
    names = [entry["name"] for entry in found["checkpoints"]]
    assert names == ["iter_0000002", "iter_0000004", "dwm_stage_001", "dwm_stage_002"]
    assert text.count(" whole ") == 4 and "DAMAGED" not in text
    assert found["tracker"] == "iter_0000004" and "<- loaded next" in text
    latest = found["checkpoints"][1]
    assert latest["parallel"]["tp"] == 2 and latest["parallel"]["ranks"] == 2
    assert (latest["model"]["layers"], latest["model"]["hidden_size"]) == (4, 64)
    assert latest["dwm"]["meta_steps"] == 2 and latest["dwm"]["optimizer"]
    assert not found["checkpoints"][2]["dwm"]["optimizer"]


@pytest.mark.parametrize("name", list(DAMAGES))
def test_inspect_names_the_damage(folder: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    assert convert(["inspect", str(folder / f"damaged-{name}")]) == 1
    text = capsys.readouterr().out
    said = DAMAGES[name][1] if name != "gone" else "names iter_0000004, which is not there"
    assert said in text and text.count(" whole ") == 1


def test_inspect_names_bad_input(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    for flags, said in (
        ([str(folder / "gone")], "is not a folder"),
        ([str(folder / "empty")], "has no iter_*"),
        ([str(folder / "mean"), "--iteration", "3"], "--iteration 3"),
        ([str(folder / "mean"), "--json", str(folder / "no" / "file")], "--json"),
    ):
        assert convert(["inspect", *flags]) == 2
        message = capsys.readouterr().err
        assert said in message and message.count("\n") == 1


def test_weight_flipped_in_a_tensor_is_seen_by_deep_only(
    folder: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """Sizes do not change; CRC-32 does. In our own file, so that the others stay as they are."""
    copy = tmp_path / "iter_0000004"
    shutil.copytree(folder / "mean" / "iter_0000004", copy)
    shard = max(copy.glob("*.distcp"), key=lambda path: path.stat().st_size)
    _flip(shard, shard.stat().st_size // 3)
    assert convert(["inspect", str(copy)]) == 0
    assert convert(["inspect", str(copy), "--deep"]) == 1
    assert f"{shard.name}: " in capsys.readouterr().out


# --------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_checkpoint_ends_the_run_with_one_line(
    after: tuple[dict[str, Any], Results], name: str
) -> None:
    """All ranks end with code 2; the first one names the file and the iteration that is whole."""
    ranks = after[1][name]
    assert [rank["code"] for rank in ranks] == [2, 2], ranks[0]["stderr"][-2000:]
    lines = [line for line in ranks[0]["stderr"].splitlines() if "error:" in line]
    assert len(lines) == 1 and DAMAGES[name][1] in lines[0]
    assert "with --ckpt-step 2" in lines[0]
    assert "Traceback" not in ranks[0]["stderr"] + ranks[1]["stderr"]
    assert "error:" not in ranks[1]["stderr"]
    assert not ranks[0]["steps"]


def test_without_a_whole_checkpoint_it_says_so(after: tuple[dict[str, Any], Results]) -> None:
    ranks = after[1]["both"]
    assert [rank["code"] for rank in ranks] == [2, 2]
    assert "No earlier iteration is whole" in ranks[0]["stderr"]


def test_the_way_out_that_it_names_works(
    trained: tuple[Path, Results], after: tuple[dict[str, Any], Results]
) -> None:
    """With --ckpt-step 2 the damaged run goes on, and ends as the run that was never damaged."""
    resumed, whole = after[1].succeeded("resumed"), trained[1].succeeded("mean")
    assert [step[0] for step in resumed[0]["steps"]] == [3, 4]
    assert [rank["parameters"] for rank in resumed] == [rank["parameters"] for rank in whole]


if __name__ == "__main__":
    single_rank(Path(sys.argv[1]))
