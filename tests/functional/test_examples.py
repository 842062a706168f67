"""The example script and its launcher: what they would run, and that they do run.

`pretrain_dwm.sh` is called as a user calls it, by environment variables. Its dry run is checked
word by word; two launchers on one machine then train as two nodes would.

Not exercised here: GPUs (the flags for one are checked, not run), a network between nodes, and
SLURM (its script is only checked for syntax).
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dwm.logs.compare import read_run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LAUNCHER = EXAMPLES / "pretrain_dwm.sh"
SCRIPT = EXAMPLES / "pretrain_dwm.py"

# The variables that a default run needs; nothing reads the files in a dry run.
REQUIRED = {"DATA_PATH": "corpus", "META_DATA_PATH": "meta", "TOKENIZER_MODEL": "tok.model"}

# Names of the caller's environment that reach the launcher; all others could change the command.
KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "GLOO_SOCKET_IFNAME")


def environment(**variables: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return {**kept, "PYTHON": sys.executable, "MEGATRON_DWM_HOST": "cpu", **variables}


def launch(*words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(LAUNCHER), *words],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@functools.cache
def command_of(*words: str, **variables: str) -> list[str]:
    """Returns the words of the command that a dry run prints."""
    done = launch(*words, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def flags_of(*words: str, **variables: str) -> dict[str, list[str]]:
    """Returns each flag of the dry run's command with its values."""
    flags: dict[str, list[str]] = {}
    values: list[str] = []
    for word in command_of(*words, **variables):
        if word == str(SCRIPT):
            values = []
        elif word.startswith("--"):
            values = flags.setdefault(word, [])
        else:
            values.append(word)
    return flags


def parameter_count(flags: dict[str, list[str]], padded_vocab_size: int) -> int:
    """Parameters of an untied Llama model with gated MLP, RMSNorm and no biases."""

    def size(name: str) -> int:
        return int(flags[f"--{name}"][0])

    hidden = size("hidden-size")
    groups = size("num-query-groups") / size("num-attention-heads")
    attention = 2 * hidden * hidden + 2 * hidden * int(hidden * groups)  # q, out; k, v
    mlp = 3 * hidden * size("ffn-hidden-size")
    layer = attention + mlp + 2 * hidden
    return 2 * padded_vocab_size * hidden + size("num-layers") * layer + hidden


# ----------------------------------------------------------------------------------- dry runs


def test_defaults_are_one_node_on_the_cpu_with_a_learned_weighting_model():
    command = command_of(**REQUIRED)
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert str(SCRIPT) in command

    flags = flags_of(**REQUIRED)
    assert flags["--nnodes"] == ["1"]
    assert flags["--node-rank"] == ["0"]
    assert flags["--nproc-per-node"] == ["1"]
    assert flags["--distributed-backend"] == ["gloo"]
    assert "--bf16" not in flags
    assert flags["--data-path"] == ["corpus"]
    assert flags["--tokenizer-type"] == ["SentencePieceTokenizer"]
    assert flags["--dwm"] == []
    assert flags["--dwm-policy"] == ["learned"]
    assert flags["--dwm-meta-data-path"] == ["meta"]
    assert "--save" not in flags
    assert "--load" not in flags


def test_the_weighting_s_defaults_are_those_of_the_flags():
    given = {flag for flag in flags_of(**REQUIRED) if flag.startswith("--dwm")}
    assert given == {"--dwm", "--dwm-policy", "--dwm-meta-data-path"}


def test_every_variable_is_a_flag_of_the_product():
    """The launcher's two lists, against the parser."""
    from argparse import ArgumentParser

    from megatron_dwm import add_dwm_args

    lists = re.findall(r"^(?:ANY_FORM|ONLY_MODEL)=\((.*?)\)$", LAUNCHER.read_text(), re.M | re.S)
    names = [name for words in lists for name in words.split()]
    assert len(lists) == 2 and len(names) == len(set(names)) > 30
    known = add_dwm_args(ArgumentParser())._option_string_actions
    assert [n for n in names if f"--dwm-{n.lower().replace('_', '-')}" not in known] == []


@pytest.mark.parametrize(
    ("variables", "meta"),
    [
        ({"DWM_POLICY": "truncation"}, None),
        ({"DWM_POLICY": "linupper"}, None),
        ({"DWM_POLICY": "uniform"}, None),
        ({"DWM_SCHEDULE": "frozen", "DWM_LOAD": "runs/a"}, None),
        ({"DWM_POLICY": "influence", "DWM_SCHEDULE": "frozen"}, ["meta"]),
        ({"DWM_POLICY": "shuffled"}, ["meta"]),
        ({"DWM_POLICY": "my.policies:Own"}, ["meta"]),
    ],
)
def test_the_meta_set_goes_to_policies_that_use_one(variables, meta):
    flags = flags_of(**REQUIRED, **variables)
    assert flags.get("--dwm-meta-data-path") == meta
    assert flags["--dwm-policy"] == [variables.get("DWM_POLICY", "learned")]


def test_another_script_takes_the_same_flags():
    other = command_of(SCRIPT="mine.py", **REQUIRED)
    assert [word.replace("mine.py", str(SCRIPT)) for word in other] == command_of(**REQUIRED)


def test_default_model_has_370m_parameters():
    flags = flags_of(**REQUIRED)
    count = parameter_count(flags, padded_vocab_size=32000)
    assert count == 373_867_520
    assert f"{count:,}" in LAUNCHER.read_text(), "the launcher's comment states another number"


def test_gpu_host_trains_in_bf16_with_transformer_engine():
    flags = flags_of(MEGATRON_DWM_HOST="cuda", TP="2", GPUS_PER_NODE="8", **REQUIRED)
    assert "--bf16" in flags
    assert flags["--transformer-impl"] == ["transformer_engine"]
    assert "--sequence-parallel" in flags
    assert "--use-distributed-optimizer" in flags
    assert flags["--nproc-per-node"] == ["8"]
    assert "--distributed-backend" not in flags


def test_two_nodes():
    flags = flags_of(
        NNODES="2",
        NODE_RANK="1",
        MASTER_ADDR="node0",
        MASTER_PORT="2345",
        GPUS_PER_NODE="4",
        TP="2",
        PP="2",
        **REQUIRED,
    )
    assert flags["--nnodes"] == ["2"]
    assert flags["--node-rank"] == ["1"]
    assert flags["--master-addr"] == ["node0"]
    assert flags["--master-port"] == ["2345"]
    assert flags["--nproc-per-node"] == ["4"]
    assert flags["--tensor-model-parallel-size"] == ["2"]
    assert flags["--pipeline-model-parallel-size"] == ["2"]


def test_variables_reach_their_flags(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    flags = flags_of(
        "--weight-decay",
        "0.2",
        "--wandb-project",
        "two words",
        DATA_PATH="0.7 first 0.3 second",
        VALID_DATA_PATH="held_out",
        META_DATA_PATH="0.5 m1 0.5 m2",
        TOKENIZER_MODEL=str(tokenizer),
        NUM_LAYERS="2",
        NUM_HEADS="8",
        NUM_QUERY_GROUPS="4",
        SEQ_LENGTH="128",
        SAVE_DIR="runs/a",
        DWM_FORM="model",
        DWM_META_BATCH_SIZE="16",
        DWM_META_INTERVAL="8",
        DWM_WARMUP_STEPS="30",
        DWM_GATE="off",
        DWM_HEAD_LR="1e-3",
        DWM_INIT="llm:2",
        DWM_POOLING="last",
        DWM_NUM_ATTENTION_HEADS="2",
    )
    assert flags["--train-data-path"] == ["0.7", "first", "0.3", "second"]
    assert flags["--valid-data-path"] == ["held_out"]
    assert "--split" not in flags, "Megatron refuses a split beside per-split data"
    assert flags["--tokenizer-type"] == ["HuggingFaceTokenizer"]
    assert flags["--num-layers"] == ["2"]
    assert flags["--num-query-groups"] == ["4"]
    assert flags["--max-position-embeddings"] == ["128"]
    assert flags["--save"] == flags["--load"] == ["runs/a"], "a restart continues the run"
    assert flags["--dwm-meta-data-path"] == ["0.5", "m1", "0.5", "m2"]
    assert flags["--dwm-meta-batch-size"] == ["16"]
    assert flags["--dwm-form"] == ["model"]
    assert flags["--dwm-meta-interval"] == ["8"]
    assert flags["--dwm-warmup-steps"] == ["30"]
    assert flags["--dwm-gate"] == ["off"]
    assert flags["--dwm-init"] == ["llm:2"]
    assert flags["--dwm-pooling"] == ["last"]
    assert flags["--dwm-head-lr"] == ["1e-3"]
    assert flags["--dwm-num-attention-heads"] == ["2"]
    assert flags["--weight-decay"] == ["0.1", "0.2"], "extra words must come last to win"
    assert flags["--wandb-project"] == ["two words"]


def test_stock_trainer_gets_the_same_command_without_dwm_flags():
    learned = command_of(**REQUIRED)
    stock = command_of(DWM="0", DATA_PATH="corpus", TOKENIZER_MODEL="tok.model")
    assert not [word for word in stock if word.startswith("--dwm")]
    start = learned.index("--dwm")
    stop = learned.index("--log-interval")
    assert learned[:start] + learned[stop:] == stock


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"META_DATA_PATH": "m", "TOKENIZER_MODEL": "t"}, "DATA_PATH is not set"),
        ({"DATA_PATH": "d", "TOKENIZER_MODEL": "t"}, "META_DATA_PATH is not set"),
        ({"DATA_PATH": "d", "META_DATA_PATH": "m"}, "TOKENIZER_MODEL is not set"),
        ({**REQUIRED, "TOKENIZER_TYPE": "NullTokenizer"}, "VOCAB_SIZE is not set"),
        ({**REQUIRED, "NNODES": "2", "MASTER_ADDR": "n"}, "NODE_RANK is not set"),
        ({**REQUIRED, "NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        ({**REQUIRED, "DWM": "yes"}, "DWM is 'yes'"),
        ({"DATA_PATH": "d", "TOKENIZER_MODEL": "t", "DWM_POLICY": "influence"}, "META_DATA_PATH"),
        ({**REQUIRED, "DWM_INIT": "llm:2"}, "DWM_INIT is about the separate model"),
        ({**REQUIRED, "DWM_FORM": "head", "DWM_HEAD_LR": "1"}, "DWM_HEAD_LR is about"),
        ({**REQUIRED, "DWM_POLICY": "head", "DWM_REPLAY": "1"}, "set DWM_FORM=model"),
    ],
)
def test_a_missing_variable_is_one_clear_line(variables, named):
    done = launch(DRY_RUN="1", **variables)
    assert done.returncode == 2
    assert done.stdout == ""
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_slurm_script_is_valid_bash():
    subprocess.run(["bash", "-n", str(EXAMPLES / "pretrain_dwm.slurm")], check=True)


# ----------------------------------------------------------------------------------- the demo


# Stands in for Python in `demo.sh`: trainings are recorded, and leave the files of a finished run;
# the launcher's question about the host is answered by Python itself; all else does nothing.
STAND_IN = """#!/usr/bin/env bash
if [[ "$1" == -c ]]; then exec "$REAL_PYTHON" "$@"; fi
if [[ "$2" == torch.distributed.run ]]; then
    printf '%s\\x1f' "$@" >>"$RECORD"
    echo >>"$RECORD"
    echo "validation loss at iteration $TRAIN_ITERS"
    mkdir -p "$SAVE_DIR"
    echo "$TRAIN_ITERS" >"$SAVE_DIR/latest_checkpointed_iteration.txt"
fi
"""


def demo(folder: Path, **variables: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """Runs `demo.sh` with the stand-in; returns how it ended, and the trainings' commands."""
    stand_in, record = folder / "python", folder / "record"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    record.write_text("")
    train = folder / "out" / "corpus" / "train"
    train.mkdir(parents=True, exist_ok=True)
    for domain in ("books", "corrupt"):
        (train / f"{domain}.jsonl").touch()
    # What the trainer reads from these names must come from the demo itself.
    kept = environment(
        REAL_PYTHON=sys.executable, RECORD=str(record), DEMO_DIR=str(folder / "out"), **variables
    )
    done = subprocess.run(
        ["bash", str(EXAMPLES / "demo.sh")],
        env={**kept, "PYTHON": str(stand_in)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = record.read_text().splitlines()
    return done, [line.split("\x1f")[:-1] for line in lines]


def test_the_demo_s_runs_differ_in_their_weights_alone_and_are_not_trained_twice(tmp_path):
    done, commands = demo(tmp_path, DEMO_ITERS="90", DEMO_SEED="7")
    assert done.returncode == 0, done.stderr
    assert len(commands) == 3
    runs = tmp_path / "out" / "seed_7"
    kept = []
    for name, command in zip(("stock", "loss_based", "dwm"), commands, strict=True):
        stop = command.index("--log-interval")
        start = command.index("--dwm") if "--dwm" in command else stop
        assert (name == "stock") == (start == stop)
        shared = command[:start] + command[stop:]
        assert str(runs / name) in shared
        kept.append([word.replace(str(runs / name), "RUN") for word in shared])
    assert kept[0] == kept[1] == kept[2], "not the same samples, or not in the same order"
    assert not [word for word in commands[2] if word == "--dwm-sampling"]
    where = commands[0].index("--train-data-path")
    assert commands[0][where + 1 : where + 5 : 2] == ["1", "3"]
    assert commands[0][commands[0].index("--seed") + 1] == "7"
    assert commands[0][commands[0].index("--train-iters") + 1] == "90"

    done, commands = demo(tmp_path, DEMO_ITERS="90", DEMO_SEED="7")
    assert done.returncode == 0 and commands == []
    assert done.stdout.count("is complete") == 3


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"DEMO_ITERS": "60"}, "is a run with DEMO_ITERS=90"),
        ({"DEMO_ITERS": "90", "DEMO_APT": "1"}, "set DEMO_DIR to another folder"),
        ({"DEMO_ITERS": "0"}, "DEMO_ITERS is '0'"),
        ({"DEMO_ITERS": "many"}, "DEMO_ITERS is 'many'"),
        ({"DEMO_SEED": "-1"}, "DEMO_SEED is '-1'"),
    ],
)
def test_the_demo_refuses_settings_that_do_not_fit(tmp_path, variables, named):
    (tmp_path / "out" / "stock").mkdir(parents=True)
    (tmp_path / "out" / "settings.txt").write_text("DEMO_ITERS=90 DEMO_APT=0\n")
    done, commands = demo(tmp_path, **variables)
    assert done.returncode == 2 and commands == []
    assert named in done.stderr and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "out" / "settings.txt").read_text() == "DEMO_ITERS=90 DEMO_APT=0\n"


# --------------------------------------------------------------------------------- real runs


@pytest.mark.slow
def test_flags_of_other_trainings_are_refused_in_one_line():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--num-layers", "2", "--sft=1"],
        env=environment(PYTHONPATH=str(EXAMPLES.parent)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("--sft is not supported")
    assert "Traceback" not in done.stderr


# Writes documents of random tokens as Megatron's indexed data set: PREFIX SEED.
WRITE_CORPUS = """
import sys
import numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
for prefix, seed in zip(sys.argv[1::2], sys.argv[2::2]):
    rng = numpy.random.default_rng(int(seed))
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.uint16)
    for _ in range(50):
        tokens = torch.from_numpy(rng.integers(0, 60, rng.integers(10, 60)))
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(prefix + ".idx")
"""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> list[str]:
    """Two training corpora and a validation corpus, as prefixes."""
    folder = tmp_path_factory.mktemp("corpora")
    prefixes = [str(folder / name) for name in ("first", "second", "held_out")]
    words = [word for seed, prefix in enumerate(prefixes) for word in (prefix, str(seed))]
    subprocess.run([sys.executable, "-c", WRITE_CORPUS, *words], check=True, timeout=300)
    return prefixes


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def train_on_two_nodes(corpora: list[str], logs: Path, **variables: str) -> str:
    """Trains a tiny model by two launchers of one process each; returns what both printed.

    Once more where torchrun's agents lose each other after the training: the one that keeps their
    store may end before the other has left their exit barrier.
    """
    codes, text = launched(corpora, logs, **variables)
    if codes != [0, 0] and "Error waiting on exit barrier" in text:
        codes, text = launched(corpora, logs, **variables)
    assert codes == [0, 0], text[-5000:]
    return text


def launched(corpora: list[str], logs: Path, **variables: str) -> tuple[list[int], str]:
    """Returns the exit codes of both launchers, and what they printed."""
    first, second, held_out = corpora
    shared = environment(
        NNODES="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=free_port(),
        GPUS_PER_NODE="1",
        OMP_NUM_THREADS="1",
        DATA_PATH=f"0.6 {first} 0.4 {second}",
        VALID_DATA_PATH=held_out,
        TOKENIZER_TYPE="NullTokenizer",
        VOCAB_SIZE="63",
        NUM_LAYERS="2",
        HIDDEN_SIZE="32",
        FFN_HIDDEN_SIZE="64",
        NUM_HEADS="4",
        NUM_QUERY_GROUPS="2",
        SEQ_LENGTH="16",
        MICRO_BATCH_SIZE="2",
        GLOBAL_BATCH_SIZE="8",
        TRAIN_ITERS="4",
        LR="1e-3",
        LOG_INTERVAL="1",
        EVAL_ITERS="1",
        **variables,
    )
    # The launcher leaves the distributed optimizer to GPU hosts; it works here but for loading.
    words = ("--num-workers", "0", "--use-distributed-optimizer")
    nodes = []
    outputs = [logs / f"node{rank}.log" for rank in range(2)]
    try:
        for rank, output in enumerate(outputs):
            with output.open("w") as log:
                nodes.append(
                    subprocess.Popen(
                        ["bash", str(LAUNCHER), *words],
                        env={**shared, "NODE_RANK": str(rank)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        codes = [node.wait(timeout=300) for node in nodes]
    finally:
        # A node that waits for one that died would outlive the test.
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
    return codes, "\n".join(output.read_text() for output in outputs)


def reported(text: str) -> list[tuple[str, str]]:
    """Returns (loss, gradient norm) of every step and the validation losses, as printed."""
    steps = re.findall(r"lm loss: (\S+) .*?grad norm: (\S+)", text)
    return steps + re.findall(r"(validation) loss .*?lm loss value: (\S+)", text)


@pytest.mark.slow
def test_two_nodes_train_and_uniform_weights_change_nothing(corpora, tmp_path):
    stock = train_on_two_nodes(corpora, tmp_path, DWM="0")
    timed = str(EXAMPLES / "demo_train.py")
    uniform = train_on_two_nodes(corpora, tmp_path, DWM="1", DWM_POLICY="uniform", SCRIPT=timed)

    flags = flags_of(
        DWM="0",
        DATA_PATH="d",
        TOKENIZER_TYPE="NullTokenizer",
        VOCAB_SIZE="63",
        NUM_LAYERS="2",
        HIDDEN_SIZE="32",
        FFN_HIDDEN_SIZE="64",
        NUM_HEADS="4",
        NUM_QUERY_GROUPS="2",
    )
    [count] = set(re.findall(r"model parallel rank .*: (\d+)$", stock, flags=re.MULTILINE))
    assert int(count) == parameter_count(flags, padded_vocab_size=128)

    losses = reported(stock)
    assert len([loss for loss in losses if loss[0] != "validation"]) == 4
    assert any(loss[0] == "validation" for loss in losses)
    assert reported(uniform) == losses

    # What the report reads of it.
    (tmp_path / "uniform.log").write_text(uniform)
    run = read_run("uniform", str(tmp_path / "uniform.log"))
    assert run.sequence_length == 16
    assert run.samples == {1: 8, 2: 16, 3: 24, 4: 32}
    assert list(run.losses) == [4] and 3 < run.losses[4] < 5, "of 63 tokens at random"
    for times in (run.clock, run.processor):
        assert sorted(times.known) == [2, 3, 4], "the first step is left out"
        assert all(0 < seconds < 60 for seconds in times.known.values())
    assert "processor time" not in stock
