"""What is run: sizes, regimes, arms, and the list of runs in their order."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PROSE = ("books", "encyclopedia", "recipes", "speeches")
OTHERS = ("code", "multilingual", "dictionary", "glosses", "html", "techdocs")
LENGTHS = (0.5, 1.5, 2.0)  # of the uniform runs that the compute multiplier is read from
WARMUP_SHARE = 0.2  # of a run, before anything is weighted
EVALUATIONS = 12  # in a run
SCARCE_EPOCHS = 16  # over the prose of the regime `scarce`
# Environment variable in which the oracle finds the weight of each data set, a JSON list.
ORACLE_VARIABLE = "QUALITY_ORACLE"


@dataclass(frozen=True)
class Size:
    """A model and how it is trained; everything but what an arm changes.

    Attributes:
        vocabulary: 256: bytes; else pieces of a SentencePiece model.
        eval_samples: of the held-out target, read at the end of a run.
        curve_samples: the first of them, read at every evaluation during the run; a divisor.
    """

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    sequence: int
    micro_batch: int
    batch: int
    steps: int
    lr: float
    vocabulary: int
    eval_batch: int
    eval_samples: int
    curve_samples: int

    @property
    def tokens(self) -> int:
        """Tokens that a run reads."""
        return self.steps * self.batch * self.sequence


SIZES = {
    "toy": Size("toy", 2, 64, 192, 4, 96, 16, 32, 1200, 3e-3, 256, 256, 8192, 2048),
    "17m": Size("17m", 8, 384, 1024, 6, 256, 64, 64, 900, 1e-3, 4096, 64, 768, 768),
}
SMALL_STEPS = 600
TIMING_STEPS = 400


@dataclass(frozen=True)
class Regime:
    """A mix of data sources: which share of the samples each has, and which are useful.

    Attributes:
        letter: under which the regime is known.
        about: one line.
        shares: share of the samples by data set; they add up to 1.
        useful: data sets that the oracle keeps; empty where there is no oracle.
    """

    letter: str
    about: str
    shares: dict[str, float]
    useful: tuple[str, ...] = ()

    def oracle_weights(self) -> list[float]:
        """Returns the weight of each data set's samples: 0, or what keeps the mean at 1."""
        kept = sum(self.shares[name] for name in self.useful)
        return [1 / kept if name in self.useful else 0.0 for name in self.shares]


def _alike(names: Iterable[str], total: float) -> dict[str, float]:
    names = tuple(names)
    return {name: total / len(names) for name in names}


NOISE = {"ocr": 0.05, "boilerplate": 0.04, "duplicates": 0.03, "language": 0.03}
SHUFFLED = tuple(f"shuffled_{name}" for name in PROSE)
SCARCE = tuple(f"scarce_{name}" for name in PROSE)
REGIMES = {
    "shuffled": Regime(
        "a",
        "half of the samples are prose with its tokens shuffled",
        {**_alike(PROSE, 0.5), **_alike(SHUFFLED, 0.5)},
        PROSE,
    ),
    "noise": Regime(
        "b",
        "natural noise, 15% of the samples: OCR 5%, boilerplate 4%, near-duplicates 3%, wrong "
        "language 3%",
        {**_alike(PROSE, 1 - sum(NOISE.values())), **NOISE},
        PROSE,
    ),
    "target": Regime(
        "c",
        "clean domains, a quarter of the samples from the target's (prose)",
        {**_alike(PROSE, 0.25), **_alike(OTHERS, 0.75)},
        PROSE,
    ),
    "nothing": Regime("d", "nothing to win: prose only, meta set alike", _alike(PROSE, 1.0)),
    "scarce": Regime(
        "e",
        f"as `target`, but with so little prose that the run reads it {SCARCE_EPOCHS} times",
        {**_alike(SCARCE, 0.25), **_alike(OTHERS, 0.75)},
        SCARCE,
    ),
}

# Flags of each arm; META stands for what learns or looks ahead from a meta set.
META = "--dwm-meta-data-path {meta}"
MODEL = f"--dwm --dwm-form model --dwm-init llm:2 {META}"
ARMS = {
    "uniform": "",
    "oracle": "--dwm --dwm-policy quality.oracle:Oracle",
    "linupper": "--dwm --dwm-policy linupper",
    "truncation": "--dwm --dwm-policy truncation",
    "head": f"--dwm {META}",
    "shuffled": f"--dwm --dwm-policy shuffled {META}",
    "influence": f"--dwm --dwm-policy influence {META}",
    "model-regression": MODEL,
    "model-chain": f"{MODEL} --dwm-rule chain --dwm-schedule joint --dwm-meta-interval 4",
}
# Arms beyond those, taken with --more. Those of RECIPES need something made before them.
DRAWN = "--dwm --dwm-policy uniform --dwm-sampling weights"
MOE_ARM = "moe-"
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-2"
)
MORE = {
    "quadratic": "--dwm --dwm-policy quadratic",
    "extremes": "--dwm --dwm-policy extremes",
    "curriculum": "--dwm --dwm-policy curriculum",
    "domains": f"--dwm --dwm-policy domains {META}",
    "head+curriculum": f"--dwm --dwm-policy head+curriculum {META}",
    "head+domains": f"--dwm --dwm-policy head+domains {META}",
    "drawn": DRAWN,
    "drawn+head": f"--dwm --dwm-sampling weights {META}",
    "dsir": DRAWN,
    "dsir+head": f"--dwm --dwm-sampling weights {META}",
    "frozen": "--dwm --dwm-schedule frozen --dwm-load {made}",
    "moe-uniform": MOE,
    "moe-oracle": f"{ARMS['oracle']} {MOE}",
    "moe-head": f"{ARMS['head']} {MOE}",
}
# What is made: documents drawn by what a smaller model has learned; the half of them that DSIR
# selects by n-grams of the meta set; a head learned with another model.
RECIPES = {
    **dict.fromkeys(("drawn", "drawn+head"), "from-run"),
    **dict.fromkeys(("dsir", "dsir+head"), "dsir"),
    "frozen": "snapshot",
}
# Seeds of each arm in the first regime and elsewhere.
SEEDS = {"uniform": (5, 3), "oracle": (5, 1), "linupper": (5, 1), "truncation": (5, 1)}
SEEDS["head"] = (5, 3)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        arm: its name; of a variant the name that the user gave it.
        flags: trainer flags of the arm; `{meta}` stands for the meta set.
        steps: of the run.
        lr: highest learning rate.
        recipe: what is made before it, see `RECIPES`; nothing, if empty.
    """

    regime: str
    arm: str
    seed: int
    flags: str
    steps: int
    lr: float
    recipe: str = ""

    @property
    def key(self) -> str:
        """By which a run is named: `REGIME/ARM/SEED`."""
        return f"{self.regime}/{self.arm}/{self.seed}"

    def chosen(self, patterns: list[str]) -> bool:
        """Whether one of `REGIME[/ARM[/SEED]]` names it; letters stand for regimes."""
        names = ((self.regime, REGIMES[self.regime].letter), (self.arm,), (str(self.seed),))
        for pattern in patterns:
            words = pattern.split("/")
            if all(word in name for word, name in zip(words, names, strict=False)):
                return True
        return not patterns


def length_name(factor: float) -> str:
    """Returns the arm's name of a uniform run of another length."""
    return f"uniform-x{factor:g}"


def full_plan(size: Size) -> list[Run]:
    """Returns every run of the full benchmark, in order: seed by seed, then the other lengths."""
    runs = []
    for k, (regime, about) in enumerate(REGIMES.items()):
        for seed in range(1, 6):
            for arm, flags in ARMS.items():
                if arm == "oracle" and not about.useful:
                    continue
                if seed <= SEEDS.get(arm, (1, 1))[min(k, 1)]:
                    runs.append(Run(regime, arm, seed, flags, size.steps, size.lr))
        runs += lengths(size, regime, LENGTHS)
    return runs


def more_plan(size: Size, seeds: int, regimes: list[str]) -> list[Run]:
    """Returns the runs of the arms of `MORE`, arm by arm."""
    return [
        Run(regime, arm, seed, flags, size.steps, size.lr, RECIPES.get(arm, ""))
        for arm, flags in MORE.items()
        for regime in regimes
        for seed in range(1, seeds + 1)
    ]


def teacher(size: Size, run: Run) -> tuple[Size, Run]:
    """Returns the run that another one learns from, and its size.

    Half as wide, a quarter of the matrices' parameters; a head is taken over where the width is
    the same, so that its teacher has half of the layers instead. Other samples in another order.
    """
    seed = run.seed + 1000
    if run.recipe == "snapshot":
        smaller = scaled(size, layers=max(1, size.layers // 2))
        flags = f"--dwm {META}"
    else:
        smaller = scaled(size, hidden=size.hidden // 2, ffn=size.ffn // 2)
        flags = f"--dwm --dwm-document-weights {META}"
    return smaller, Run(run.regime, f"teacher-{run.recipe}", seed, flags, size.steps, size.lr)


def lengths(size: Size, regime: str, factors: Iterable[float]) -> list[Run]:
    """Returns the uniform runs of other lengths, each with a schedule of its own."""
    return [Run(regime, length_name(f), 1, "", round(size.steps * f), size.lr) for f in factors]


def small_plan(size: Size) -> list[Run]:
    """Returns the runs of the small benchmark: the main arms, one seed, shorter runs."""
    runs = []
    for regime, about in REGIMES.items():
        arms = ["uniform", "oracle", "head"] if about.useful else ["uniform", "head"]
        if regime == "shuffled":
            arms += ["linupper", "truncation", "shuffled"]
        runs += [Run(regime, arm, 1, ARMS[arm], size.steps, size.lr) for arm in arms]
        runs += lengths(size, regime, (0.5, 2.0) if regime == "shuffled" else ())
    return runs


def tuning_plan(size: Size) -> list[Run]:
    """Returns uniform and the head at three learning rates, in the first regime."""
    return [
        Run("shuffled", f"{arm}-lr{size.lr * factor:g}", 1, ARMS[arm], size.steps, size.lr * factor)
        for factor in (1 / 3, 1, 3)
        for arm in ("uniform", "head")
    ]


def timing_plan(size: Size) -> list[Run]:
    """Returns a short run of each weighted arm, to be taken alone on a machine, for its cost."""
    steps = min(size.steps, TIMING_STEPS)
    arms = {arm: flags for arm, flags in ARMS.items() if flags}
    return [Run("shuffled", arm, 1, flags, steps, size.lr) for arm, flags in arms.items()]


_VARIANT = re.compile(r"([A-Za-z0-9_.-]+)=([a-z-]+)((?: .*)?)")


def variants(size: Size, words: list[str], seeds: int, regimes: list[str]) -> list[Run]:
    """Returns the runs of `NAME=ARM more flags`, an arm with other settings.

    Raises:
        ValueError: it is not of that form, there is no such arm, or the name is taken.
    """
    runs = []
    for word in words:
        found = _VARIANT.fullmatch(word.strip())
        if found is None or found[2] not in ARMS:
            raise ValueError(
                f"--variant '{word}': give NAME=ARM FLAGS, as in "
                f"'head-16=head --dwm-meta-interval 16'; arms are {', '.join(ARMS)}"
            )
        if found[1] in ARMS or found[1].startswith("uniform"):
            raise ValueError(f"--variant '{word}': the name {found[1]} is that of an arm")
        flags = f"{ARMS[found[2]]}{found[3]}"
        for regime in regimes:
            for seed in range(1, seeds + 1):
                runs.append(Run(regime, found[1], seed, flags, size.steps, size.lr))
    return runs


def scaled(size: Size, **changes: Any) -> Size:
    """Returns the size with the settings changed that are not None."""
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(size, **given)


def trainer_flags(size: Size, run: Run) -> list[str]:
    """Returns the flags of model and training, without those of the data."""
    warm = round(run.steps * WARMUP_SHARE)
    words = f"""
        --num-layers {size.layers} --hidden-size {size.hidden} --ffn-hidden-size {size.ffn}
        --num-attention-heads {size.heads} --seq-length {size.sequence}
        --max-position-embeddings {size.sequence} --swiglu --normalization RMSNorm
        --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
        --hidden-dropout 0 --attention-dropout 0 --micro-batch-size {size.micro_batch}
        --global-batch-size {size.batch} --train-iters {run.steps} --lr {run.lr:g}
        --min-lr {run.lr / 10:g} --lr-decay-style cosine --lr-decay-iters {run.steps}
        --lr-warmup-iters {min(100, run.steps // 10)} --adam-beta1 0.9 --adam-beta2 0.95
        --weight-decay 0.1 --clip-grad 1.0 --seed {run.seed}
        --eval-interval {max(1, run.steps // EVALUATIONS)} --eval-micro-batch-size {size.eval_batch}
        --eval-global-batch-size {size.eval_batch}
        --eval-iters {size.curve_samples // size.eval_batch} --log-interval {run.steps}
        --num-workers 0 --no-create-attention-mask-in-dataloader
    """.split()
    if "--dwm" in run.flags.split():
        words += ["--dwm-warmup-steps", str(warm), "--dwm-seed", str(run.seed)]
    return words
