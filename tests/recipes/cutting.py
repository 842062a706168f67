"""Makes a recipe small enough for two CPU ranks, by a stated rule: sizes go, everything else stays.

Three tables say what happens to a flag, and the docs list them:

    SIZES      what a size becomes
    REPLACED   what the CPU lacks (Transformer Engine and its kernels, FP8, CUDA graphs)
    LEFT_OUT   intervals and machines

Parallel sizes: two ranks hold one dimension. It is expert parallelism where the recipe has it, else
pipeline stages (virtual ones stay two), else tensor parallelism where it goes without sequence
parallelism, else data parallelism.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("recipes.toml")
STEPS = 4
BATCH = 8

# The values of a flag, none for a switch, in the order of the recipe.
type Flags = dict[str, list[str]]

# What a size becomes; a function takes the recipe's value.
SIZES: dict[str, str] = {
    "--num-layers": "4",
    "--hidden-size": "64",
    "--ffn-hidden-size": "128",
    "--num-attention-heads": "4",
    "--num-query-groups": "2",
    "--kv-channels": "16",
    "--seq-length": "32",
    "--max-position-embeddings": "32",
    "--global-batch-size": str(BATCH),
    "--num-experts": "4",
    "--moe-ffn-hidden-size": "32",
    "--moe-shared-expert-intermediate-size": "32",
    "--q-lora-rank": "16",
    "--kv-lora-rank": "16",
    "--qk-head-dim": "16",
    "--qk-pos-emb-head-dim": "8",
    "--v-head-dim": "16",
    "--mamba-state-dim": "16",
    "--mamba-head-dim": "16",
    "--mamba-num-heads": "8",
    "--mamba-num-groups": "2",
    "--window-size": "7,0",
    "--train-iters": str(STEPS),
    "--lr-decay-iters": str(STEPS),
    "--lr-warmup-iters": "1",
    "--train-samples": str(STEPS * BATCH),
    "--lr-decay-samples": str(STEPS * BATCH),
    "--lr-warmup-samples": str(BATCH),
    "--lr-wsd-decay-samples": str(BATCH),
    "--lr-warmup-fraction": "0.25",
    "--eval-iters": "1",
    "--eval-interval": "100",
    "--log-interval": "1",
    "--num-layers-at-end-in-bf16": "1",
    "--ddp-num-buckets": "2",
}
# At most.
CAPS = {
    "--micro-batch-size": 2,
    "--moe-router-topk": 2,
    "--moe-router-num-groups": 2,
    "--moe-router-group-topk": 1,
}
PARALLEL = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank",
    "--pipeline-model-parallel-layout",
    "--account-for-embedding-in-pipeline-split",
    "--account-for-loss-in-pipeline-split",
    "--context-parallel-size",
    "--expert-model-parallel-size",
    "--expert-tensor-parallel-size",
)
# What the CPU lacks, and what stands in its place (nothing: the flag is left out).
REPLACED: dict[str, list[str]] = {
    "--transformer-impl": [],  # the host's own flags ask for the local layers
    "--attention-backend": [],
    "--use-flash-attn": [],
    "--apply-layernorm-1p": [],
    "--cross-entropy-fusion-impl": ["--cross-entropy-fusion-impl", "native"],
    "--moe-grouped-gemm": [],
    "--moe-permute-fusion": [],
    "--moe-router-fusion": [],
    "--moe-flex-dispatcher-backend": [],
    "--moe-hybridep-num-sms": [],
    "--moe-token-dispatcher-type": ["--moe-token-dispatcher-type", "alltoall"],
    "--moe-shared-expert-overlap": [],
    "--moe-latent-size": [],
    "--tp-comm-overlap": [],
    "--fp8-format": [],
    "--fp8-recipe": [],
    "--fp8-amax-history-len": [],
    "--fp8-amax-compute-algo": [],
    "--fp8-param-gather": [],
    "--reuse-grad-buf-for-mxfp8-param-ag": [],
    "--moe-router-padding-for-quantization": [],
    "--first-last-layers-bf16": [],
    "--num-layers-at-start-in-bf16": [],
    "--num-layers-at-end-in-bf16": [],
    "--cuda-graph-impl": [],
    "--cuda-graph-modules": [],
    "--cuda-graph-warmup-steps": [],
    "--te-rng-tracker": [],
    "--use-precision-aware-optimizer": [],
    "--spec": ["--spec", "tests.recipes.stand_ins", "hybrid_stack_spec"],
    "--overlap-moe-expert-parallel-comm": [],
    "--delay-wgrad-compute": [],
    "--high-priority-stream-groups": [],
    "--disable-gloo-process-groups": [],
    "--use-megatron-fsdp": [],
    "--data-parallel-sharding-strategy": [],
    "--init-model-with-meta-device": [],
}
# Values of --recompute-modules that need Transformer Engine.
FUSED_MODULES = ("moe_act", "layernorm")
LEFT_OUT = ("--ckpt-format", "--check-weight-hash-across-dp-replicas-interval")
# What every recipe gets: data, and a vocabulary of as few ids as bytes.
GIVEN = "--mock-data --tokenizer-type NullTokenizer --vocab-size 255 --num-workers 0 --seed 1234"


@dataclass
class Recipe:
    """One recipe.

    Attributes:
        name: by which it is asked for.
        title: for readers.
        source: where its settings stand.
        model: where the model's sizes stand, where that is another page.
        flags: at full size.
    """

    name: str
    title: str
    source: str
    model: str | None
    flags: Flags

    def words(self) -> list[str]:
        """Returns the flags at full size, as a shell would hand them on."""
        return _words(self.flags)

    def small(self) -> list[str]:
        """Returns the flags of the small run, without those of the host."""
        flags = dict(self.flags)
        for name in LEFT_OUT:
            flags.pop(name, None)
        modules = [m for m in flags.pop("--recompute-modules", []) if m not in FUSED_MODULES]
        if modules:
            flags["--recompute-modules"] = modules
        if _norms_are_fused(flags):
            flags.pop("--qk-layernorm")
        for name in list(flags):
            if name in REPLACED:
                flags.pop(name)
                stand_in = REPLACED[name]
                if stand_in:
                    flags[stand_in[0]] = stand_in[1:]
            elif name in SIZES:
                flags[name] = [SIZES[name]]
            elif name in CAPS:
                flags[name] = [str(min(int(flags[name][0]), CAPS[name]))]
        _cut_patterns(flags)
        parallel = {name: flags.pop(name) for name in PARALLEL if name in flags}
        flags.update(_two_ranks(parallel, flags))
        return [*_words(flags), *GIVEN.split()]

    def replaced(self) -> list[str]:
        """Returns the flags that the CPU lacks, with what stands in their place."""
        found = ["--qk-layernorm"] if _norms_are_fused(self.flags) else []
        for name, values in self.flags.items():
            fused = [value for value in values if value in FUSED_MODULES]
            if name == "--recompute-modules" and fused:
                found.append(" ".join([name, *fused]))
            if name in REPLACED and [name, *values] != REPLACED[name]:
                if name != "--transformer-impl":
                    found.append(" ".join([name, *values]))
        return found


def read_recipes() -> list[Recipe]:
    """Returns all recipes, in the file's order."""
    with open(FILE, "rb") as file:
        content = tomllib.load(file)
    recipes = []
    for name, entry in content["recipe"].items():
        text = " ".join([*(content["groups"][group] for group in entry.get("with", ())), ""])
        flags = _flags(shlex.split(text + entry["flags"]))
        recipes.append(Recipe(name, entry["title"], entry["source"], entry.get("model"), flags))
    return recipes


def _flags(words: list[str]) -> Flags:
    flags: Flags = {}
    values: list[str] = []
    for word in words:
        if re.match(r"--[a-z]", word):
            if word in flags:
                raise ValueError(f"{word} stands twice in: {shlex.join(words)}")
            values = flags[word] = []
        else:
            values.append(word)
    return flags


def _words(flags: Flags) -> list[str]:
    return [word for name, values in flags.items() for word in (name, *values)]


def _norms_are_fused(flags: Flags) -> bool:
    """Whether latent attention norms its queries within the projection, as only TE can."""
    latent = "--multi-latent-attention" in flags and "--q-lora-rank" not in flags
    return latent and "--qk-layernorm" in flags


def _cut_patterns(flags: Flags) -> None:
    """Cuts what says something of each layer: the first layer of each kind stays."""
    if "--moe-layer-freq" in flags:
        flags["--moe-layer-freq"] = ["([0]*1+[1]*3)"]
    if "--hybrid-layer-pattern" in flags:
        main, *further = flags["--hybrid-layer-pattern"][0].split("/")
        kinds = "".join(dict.fromkeys(main))
        flags["--hybrid-layer-pattern"] = ["/".join([kinds, *further])]
        # Sizes that a recipe leaves to the trainer's defaults.
        flags.update({name: [SIZES[name]] for name in SIZES if name.startswith("--mamba")})
    if "--step-batch-size-schedule" in flags:
        # From half of the batch to all of it after the first step; the trainer takes no other size.
        flags["--step-batch-size-schedule"] = [f"0:{BATCH // 2} {BATCH * 16}:{BATCH}"]
        # Megatron 0.19 takes one of them.
        flags.pop("--global-batch-size", None)


def _two_ranks(parallel: Flags, flags: Flags) -> Flags:
    """Returns the parallel sizes of the small run."""

    def size(name: str) -> int:
        return int(parallel.get(name, ["1"])[0])

    if size("--expert-model-parallel-size") > 1:
        return {"--expert-model-parallel-size": ["2"]}
    if size("--pipeline-model-parallel-size") > 1:
        found: Flags = {"--pipeline-model-parallel-size": ["2"]}
        virtual = size("--num-virtual-stages-per-pipeline-rank")
        if virtual > 1 or "--num-layers-per-virtual-pipeline-stage" in parallel:
            found["--num-virtual-stages-per-pipeline-rank"] = ["2"]
        return found
    if size("--tensor-model-parallel-size") > 1 and "--sequence-parallel" not in flags:
        return {"--tensor-model-parallel-size": ["2"]}
    return {}
