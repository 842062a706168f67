"""Learned weights on real data sets: stop and resume, checkpoints, snapshots, logs, bad input.

Two ranks take all runs. Exactness is compared on exact numbers (losses, gradient norms, parameter
hashes) and on the step log's lines.

Not exercised here: GPUs; kills in the middle of a save; another layout on resume.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dwm.logs.log_file import CLOCK_FIGURES, FILE_NAME, read_log
from tests.functional.corpus import write_dataset
from tests.functional.harness import DWM, MOCK, TINY, Results, Run, run_all, torchrun

LAYOUTS = {
    "pp2": "--pipeline-model-parallel-size 2",
    "dp2-bf16": "--use-distributed-optimizer --bf16 --dist-ckpt-optim-fully-reshardable",
    "dp2-overlap-llm2": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
    "--dwm-init llm:2 --dwm-warmup-steps 2",
    "tp2-llm2": "--tensor-model-parallel-size 2 --dwm-init llm:2 --dwm-schedule staged "
    "--dwm-stages 2 --dwm-warmup-steps 1",
}
# Replaces the flag's value, or adds the flag, in a working command line; the message must hold
# each of the words.
BAD = {
    "hidden-heads": (["--dwm-hidden-size", "66"], ["--dwm-hidden-size 66", "not divisible"]),
    "heads-tp": (
        ["--tensor-model-parallel-size", "2", "--dwm-num-attention-heads", "1"],
        ["--dwm-num-attention-heads 1", "--tensor-model-parallel-size 2"],
    ),
    "policy": (["--dwm-policy", "clever"], ["--dwm-policy is 'clever'", "learned"]),
    "schedule": (["--dwm-schedule", "never"], ["--dwm-schedule is 'never'", "staged"]),
    "estimator": (["--dwm-estimator", "guess"], ["--dwm-estimator is 'guess'"]),
    "init": (["--dwm-init", "llm:9"], ["--dwm-init llm:9", "--num-layers 4"]),
    "meta-batch": (["--dwm-meta-batch-size", "3"], ["--dwm-meta-batch-size 3", "multiple of"]),
    "load": (["--dwm-load", "nowhere"], ["--dwm-load nowhere", "no such folder"]),
    "non-persistent": (
        ["--non-persistent-ckpt-type", "global", "--non-persistent-save-interval", "2"],
        ["--non-persistent-ckpt-type global", "--save-interval"],
    ),
    "context-parallel": (["--context-parallel-size", "2"], ["--context-parallel-size 2"]),
    "two-at-once": (
        ["--dwm-policy", "clever", "--dwm-temperature", "0"],
        ["--dwm-policy is 'clever'", "--dwm-temperature is 0"],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learning")


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, str]:
    names = ("good", "odd", "meta", "valid")
    return {name: write_dataset(folder / name, seed) for seed, name in enumerate(names)}


@pytest.fixture(scope="module")
def data_flags(data: dict[str, str], folder: Path) -> list[str]:
    return [
        *("--train-data-path", "0.5", data["good"], "0.5", data["odd"]),
        *("--valid-data-path", data["valid"]),
        *("--dwm-meta-data-path", data["meta"]),
        *("--data-cache-path", str(folder / "cache")),
    ]


def write_llama(folder: Path) -> Path:
    """Writes a random Hugging Face Llama with grouped queries, and returns its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=250,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def without_split(words: list[str]) -> list[str]:
    """The split goes with one --data-path, not with a path for each part."""
    at = words.index("--split")
    return words[:at] + words[at + 2 :]


@pytest.fixture(scope="module")
def results(folder: Path, data: dict[str, str], data_flags: list[str]) -> Results:
    tiny = [*without_split(TINY), "--train-iters", "6", "--ckpt-format", "torch_dist"]
    runs = []
    for name, flags in LAYOUTS.items():
        common = [*tiny, *data_flags, *DWM, *flags.split(), "--save-interval", "3"]
        whole, parts = str(folder / f"{name}-whole"), str(folder / f"{name}-parts")
        runs.append(Run(f"{name}-whole", [*common, "--save", whole]))
        runs.append(Run(f"{name}-first", [*common, "--save", parts, "--exit-interval", "3"]))
        runs.append(Run(f"{name}-second", [*common, "--save", parts, "--load", parts]))
    runs[0].args += ["--tensorboard-dir", str(folder / "tensorboard")]
    pp2 = [*tiny, *data_flags, "--pipeline-model-parallel-size", "2"]
    saved = ["--load", str(folder / "pp2-parts"), "--ckpt-step", "3"]
    stock = str(folder / "stock")
    at = pp2.index("--dwm-meta-data-path")
    plain = [*pp2[:at], *pp2[at + 2 :]]
    runs += [
        Run("stock", [*plain, "--save", stock, "--save-interval", "3", "--exit-interval", "3"]),
        Run("fresh", [*pp2, *DWM, "--load", stock]),
        Run("stock-loads-dwm", [*plain, *saved]),
        Run("frozen", [*pp2, *DWM, "--dwm-schedule", "frozen"]),
        Run("other-shape", [*pp2, *DWM, *saved, "--dwm-num-layers", "3"]),
    ]
    runs[-2].args += ["--dwm-load", str(folder / "pp2-whole")]
    llama = write_llama(folder / "llama")
    start = ["--save", str(folder / "hf"), "--save-interval", "6", "--dwm-init", f"hf:{llama}"]
    still = ["--dwm-head-lr", "1e-12", "--dwm-backbone-lr", "0"]
    runs += [
        Run("hf", [*tiny, *data_flags, *DWM, "--tensor-model-parallel-size", "2", *start, *still]),
        Run("shuffled", [*pp2, *DWM, "--dwm-policy", "shuffled"]),
    ]
    # Other learning rates on resume; then without the optimizers, saved, and loaded once more.
    other = str(folder / "other")
    frozen = ["--dwm-warmup-steps", "5"]  # no meta step before iteration 6
    runs += [
        Run("other-lr", [*pp2, *DWM, *saved, "--dwm-head-lr", "1e-4", "--dwm-backbone-lr", "0"]),
        Run(
            "no-optimizer",
            [*pp2, *DWM, *saved, *frozen, "--no-load-optim", "--save", other]
            + ["--save-interval", "1", "--exit-interval", "4"],
        ),
        Run("once-more", [*pp2, *DWM, *frozen, "--load", other]),
        Run("poisoned", [*pp2, *DWM], {"POISON_META_LOSS": "1"}),
        Run("no-dwm", [*plain, "--dwm-temperature", "2"]),
    ]
    base = [*tiny, *data_flags, *DWM]
    # An overhead budget: stopped and resumed; far too small, from a checkpoint without an account.
    budget = [*base, "--train-iters", "20", "--dwm-overhead-budget", "1.0", "--save-interval", "12"]
    budget += ["--save", str(folder / "budget")]
    small = "--dwm-overhead-budget 0.001 --train-iters 8 --override-opt-param-scheduler".split()
    runs += [
        Run("budget", [*budget, "--exit-interval", "12"]),
        Run("budget-resumed", [*budget, "--load", str(folder / "budget")]),
        Run("budget-small", [*pp2, *DWM, *saved, *small]),
    ]
    runs += [Run(f"bad-{name}", [*base, *flags]) for name, (flags, _) in BAD.items()]

    broken = write_dataset(folder / "broken", 9)
    index = Path(f"{broken}.idx")
    index.write_bytes(index.read_bytes()[:-20])
    copy = folder / "valid_copy"
    for ending in (".bin", ".idx"):
        Path(f"{copy}{ending}").write_bytes(Path(f"{data['valid']}{ending}").read_bytes())
    for name, prefix in (
        ("missing-prefix", str(folder / "nothing")),
        ("truncated-index", broken),
        ("meta-is-validation", data["valid"]),
        ("meta-is-copy", str(copy)),
    ):
        runs.append(Run(name, [*base, "--dwm-meta-data-path", prefix]))
    return run_all(2, runs, folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_run_is_the_same(results: Results, folder: Path, layout: str) -> None:
    """Losses, norms, weights, log and parameters after a stop are those of the whole run."""
    whole, second = results.succeeded(f"{layout}-whole"), results.succeeded(f"{layout}-second")
    first = results.succeeded(f"{layout}-first")
    for a, b, c in zip(whole, first, second, strict=True):
        assert [s[0] for s in c["steps"]] == [4, 5, 6]
        assert a["steps"] == b["steps"] + c["steps"]
        assert a["parameters"] == c["parameters"]
        assert a["valid"] == c["valid"]
    logs = [read_log(folder / f"{layout}-{part}" / FILE_NAME) for part in ("whole", "parts")]
    for log in logs:
        assert [line["iteration"] for line in log] == [1, 2, 3, 4, 5, 6]
        for line in log:
            for name in CLOCK_FIGURES:
                line.pop(name, None)
    assert logs[0] == logs[1]
    assert f"after {sum('meta_loss' in x for x in logs[0][:3])} meta steps" in second[0]["stdout"]


def test_log_has_what_the_weights_were(results: Results, folder: Path) -> None:
    """Each line holds the statistics, the domains by name, and the meta step's figures."""
    results.succeeded("pp2-whole")
    log = read_log(folder / "pp2-whole" / FILE_NAME)
    assert log[0]["max_weight"] == 1.0
    assert log[-1]["max_weight"] > 1.0
    for line in log:
        assert set(line["domain_weight"]) == {"good", "odd"}
        assert sum(line["domain_samples"].values()) == 16
        mean = sum(line["domain_weight"][d] * n for d, n in line["domain_samples"].items()) / 16
        assert mean == pytest.approx(1.0, abs=1e-4)
        assert line["meta_loss"] > 0 and line["meta_gradient_norm"] > 0
        assert line["dwm_grad_norm"] > 0 and line["dwm_updated"] == 1
    assert "dwm iteration" in results.succeeded("pp2-whole")[-1]["stdout"]


def test_tensorboard_has_the_same_figures(results: Results, folder: Path) -> None:
    """The scalars under dwm/ are the log's, one for each step."""
    named = {"entropy": "weights/entropy", "meta_loss": "loss/meta", "max_weight": "weights/max"}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results.succeeded("pp2-whole")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    log = read_log(folder / "pp2-whole" / FILE_NAME)
    for name, shown in named.items():
        values = [event.value for event in events.Scalars(f"dwm/{shown}")]
        assert values == pytest.approx([line[name] for line in log[: len(values)]])
        # The event file may lose its last scalars when a process ends.
        assert len(values) >= len(log) - 1
    assert events.Scalars("dwm/domain_weight/good")


def test_stages_follow_the_schedule(results: Results, folder: Path) -> None:
    """Warm-up, meta and frozen windows come as planned; each stage leaves a snapshot."""
    results.succeeded("tp2-llm2-whole")
    log = read_log(folder / "tp2-llm2-whole" / FILE_NAME)
    windows = ["warmup", "meta", "frozen", "meta", "meta", "frozen"]
    assert [line["window"] for line in log] == windows
    assert [("meta_loss" in line) for line in log] == [w == "meta" for w in windows]
    for stage in ("dwm_stage_001", "dwm_stage_002"):
        assert (folder / "tp2-llm2-whole" / stage / "metadata.json").exists()


def test_checkpoint_without_dwm_starts_a_fresh_one(results: Results) -> None:
    """Loading a stock checkpoint with --dwm says so and trains on."""
    fresh = results.succeeded("fresh")
    assert "holds no weighting model; a fresh one starts" in fresh[0]["stdout"]
    assert [s[0] for s in fresh[-1]["steps"]] == [4, 5, 6]


def test_stock_trainer_loads_a_dwm_checkpoint(results: Results) -> None:
    """The extra keys do not disturb a run without --dwm."""
    assert [s[0] for s in results.losses("stock-loads-dwm")] == [4, 5, 6]


def test_frozen_schedule_uses_snapshots(results: Results) -> None:
    """Weights from a snapshot apply from the first step, and no meta step is taken."""
    out = results.succeeded("frozen")
    assert "DWM: weights from" in out[0]["stdout"]
    lines = [line for line in out[-1]["stdout"].splitlines() if "dwm iteration" in line]
    assert len(lines) == 6
    assert not any("meta loss" in line for line in lines)
    assert not any("max weight: 1.000 " in line for line in lines)


def test_start_from_a_hugging_face_folder(results: Results, folder: Path) -> None:
    """Under TP2, the weighting model's tensors are the folder's, bit for bit.

    Its learning rates are so small that nothing moved. The shape came from the folder.
    """
    import torch

    from megatron_dwm.conversion.dist_checkpoint import TorchDistCheckpoint, find_checkpoint
    from megatron_dwm.conversion.hf_folder import iter_megatron_tensors

    out = results.succeeded("hf")
    assert "'hidden_size': 48" in out[0]["stdout"]
    saved = TorchDistCheckpoint(find_checkpoint(folder / "hf"))
    compared = 0
    # Megatron's checkpoints name norms as the fused layers do, whatever the layer spec.
    for name, tensor in iter_megatron_tensors(folder / "llama", fused_layernorm=True):
        if name == "output_layer.weight":
            continue
        stored = saved.load(f"dwm.{name}")
        if name == "embedding.word_embeddings.weight":
            assert not stored[250:].any()
            stored = stored[:250]
        assert torch.equal(stored, tensor), name
        compared += 1
    assert compared == 2 + 2 * 6


def test_shuffled_weights_train(results: Results) -> None:
    """The control policy runs, with weights that differ from 1."""
    lines = results.succeeded("shuffled")[-1]["stdout"].splitlines()
    assert "max weight: 1.000 " not in [x for x in lines if "dwm iteration" in x][-1]


def test_learning_rates_can_change_on_resume(results: Results) -> None:
    """The DWM's new rates are taken, its state is loaded, and the steps go on."""
    assert [s[0] for s in results.losses("other-lr")] == [4, 5, 6]
    assert "after 3 meta steps" in results["other-lr"][0]["stdout"]


def test_checkpoint_of_an_optimizer_without_state_loads(results: Results) -> None:
    """After --no-load-optim and a save in a window without meta steps, the next load works."""
    assert [s[0] for s in results.losses("no-optimizer")] == [4]
    assert [s[0] for s in results.losses("once-more")] == [5, 6]
    assert "NOTE: the schedule was" in results["no-optimizer"][0]["stdout"]


def test_meta_step_that_is_not_finite_is_skipped(results: Results) -> None:
    """NaN in the meta step's passes skips the DWM's update; the language model trains on."""
    steps = results.losses("poisoned")
    assert [s[0] for s in steps] == [1, 2, 3, 4, 5, 6]
    lines = [x for x in results["poisoned"][-1]["stdout"].splitlines() if "dwm iteration" in x]
    assert len(lines) == 6
    assert all("DWM update skipped" in line and "max weight: 1.000 " in line for line in lines)


def test_overhead_budget_spaces_meta_steps(results: Results, folder: Path) -> None:
    """A meta step is taken only while the share is within the budget, also after a resume.

    So the DWM's time never exceeds it by more than one meta step. That holds however noisy this
    machine's clock is; how far apart the meta steps lie does not, and is left to the unit tests.
    """
    from megatron.core import dist_checkpointing

    for name in ("budget", "budget-resumed"):
        ranks = results.succeeded(name)
        assert ranks[0]["parameters"] == ranks[1]["parameters"]
    log = read_log(folder / "budget" / FILE_NAME)
    assert [line["iteration"] for line in log] == list(range(1, 21))
    assert all(("meta_loss" in line) != ("meta_put_off" in line) for line in log)
    taken = [k for k, line in enumerate(log) if "meta_loss" in line]
    assert taken[0] == 0 and len(taken) < len(log)
    assert all(log[k - 1]["dwm_time_share"] <= 1.0 for k in taken[1:])
    accounts = []
    for iteration in (12, 20):
        saved = str(folder / "budget" / f"iter_{iteration:07d}")
        account = dist_checkpointing.load_common_state_dict(saved)["dwm"]["overhead_budget"]
        share = account["dwm_seconds"] / account["stock_seconds"]
        assert share == pytest.approx(log[iteration - 1]["dwm_time_share"], abs=1e-6)
        accounts.append(account)
    first, last = accounts
    assert 0 < first["stock_seconds"] < last["stock_seconds"]


def test_overhead_budget_below_scoring_is_said(results: Results) -> None:
    """One meta step to measure, then a warning. The checkpoint it starts from has no account."""
    out = results.succeeded("budget-small")[-1]["stdout"]
    lines = [line for line in out.splitlines() if "dwm iteration" in line]
    assert ["meta loss" in line for line in lines] == [True] + [False] * 4
    assert all("meta step put off" in line for line in lines[1:])
    assert out.count("NO FURTHER META STEP IS TAKEN") == 1
    assert "allows 0.10%" in out and "% of 0.10%" in lines[-1]


def test_flags_without_dwm_are_refused(results: Results) -> None:
    """A DWM setting alone would train without weights, so it is an error."""
    refused(results, "no-dwm", ["--dwm-temperature given without --dwm"])


def refused(results: Results, name: str, words: list[str]) -> None:
    """Every rank ended with code 2, before any step; rank 0 said why in one line."""
    found = results[name]
    assert [rank["code"] for rank in found] == [2] * len(found), found[0]["stderr"][-2000:]
    assert not any(rank["steps"] for rank in found)
    lines = [x for x in found[0]["stderr"].splitlines() if x.startswith("megatron_dwm: error:")]
    assert len(lines) == 1
    assert "Traceback" not in found[0]["stderr"]
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_are_refused(results: Results, name: str) -> None:
    """Each gives one line that names the flag and the value, on no rank a traceback or a hang."""
    refused(results, f"bad-{name}", BAD[name][1])


def test_bad_data_is_refused(results: Results, folder: Path, data: dict[str, str]) -> None:
    """Missing, truncated, and a meta set that is the validation set, by name or by content."""
    refused(results, "missing-prefix", [str(folder / "nothing")])
    refused(results, "truncated-index", ["broken.idx"])
    refused(results, "meta-is-validation", [data["valid"], "validation"])
    refused(results, "meta-is-copy", ["valid_copy", "validation"])


def test_checkpoint_of_another_shape_is_refused(results: Results) -> None:
    """The flag, its value and the checkpoint's value are named."""
    refused(results, "other-shape", ["--dwm-num-layers is 3", "checkpoint's is 2"])


def test_torchrun_ends_with_an_error(folder: Path) -> None:
    """Under torchrun a refused run ends soon, on all ranks, with a non-zero code."""
    from tests.functional.harness import ROOT, host_flags

    done = torchrun(
        2,
        [
            *("-m", "megatron_dwm.launch", str(ROOT / "examples" / "pretrain_dwm.py")),
            *(*host_flags(), *TINY, *MOCK, *DWM, "--dwm-policy", "clever"),
        ],
        timeout=120,
    )
    assert done.returncode != 0
    assert "megatron_dwm: error: --dwm-policy is 'clever'" in done.stderr


def test_unchanged_script_learns_under_the_launcher(folder: Path) -> None:
    """A script that knows nothing of the DWM is weighted by putting the launcher before it."""
    from tests.functional.harness import ROOT, host_flags

    done = torchrun(
        1,
        [
            *(
                "-m",
                "megatron_dwm.launch",
                str(ROOT / "tests" / "functional" / "_tiny_pretrain.py"),
            ),
            str(folder / "logits.pt"),
            *(*host_flags(), *TINY, *MOCK, *DWM, "--dwm-init", "llm:1", "--eval-iters", "0"),
        ],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "dwm iteration" in line]
    assert len(lines) == 4 and all("meta loss" in line for line in lines)


def test_log_is_json_lines(results: Results, folder: Path) -> None:
    """Any JSON reader can read the log."""
    results.succeeded("pp2-whole")
    with open(folder / "pp2-whole" / FILE_NAME) as file:
        assert all(isinstance(json.loads(line), dict) for line in file)
