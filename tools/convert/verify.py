"""Compares a Megatron checkpoint with a Hugging Face folder: the same tokens through both."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_dwm.conversion import ConversionError, find_checkpoint
from megatron_dwm.conversion.hf_folder import find_weights
from megatron_dwm.conversion.trainer_flags import FLAGS_FILE
from megatron_dwm.errors import DWMError, in_short
from tools.convert.import_ import RELEASE

_HELP = """Runs the same tokens through Megatron's model and through transformers, both in float32,
and compares the logits position by position. Megatron's model is built in this process from the
checkpoint's own arguments; that of an import, from the flags that the import printed. The relative
difference of a position is its largest absolute one over the largest logit there, or over 1 where
all are smaller. With --data the language-model loss is compared as well.
Both models are in memory at the same time.
Exit code 0: the largest relative difference is within --tolerance, 1: it is not, 2: bad input."""

_SEED = 20
_ROWS = 8


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers `verify` and its flags."""
    command = commands.add_parser(
        "verify",
        help="same logits and loss on both sides?",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=verify)
    add = command.add_argument
    add(
        "--megatron-path",
        required=True,
        metavar="RUN",
        help="run folder (its latest checkpoint is taken) or one iter_ folder",
    )
    add("--hf-path", required=True, metavar="DIR", help="Hugging Face folder")
    add("--iteration", type=int, metavar="N", help="iteration to take from a run folder")
    add(
        "--data",
        metavar="PREFIX",
        help="indexed data set whose first tokens are taken (default: random tokens, and no loss)",
    )
    add("--tolerance", type=float, default=1e-4, metavar="T", help="largest difference (1e-4)")
    add("--tokens", type=int, default=512, metavar="N", help="tokens to run (512)")


@dataclasses.dataclass
class Comparison:
    """What `verify` found.

    Attributes:
        absolute: `[s]` largest absolute difference of a logit at each position.
        relative: `[s]` the same over the position's largest logit, or 1 if that is larger.
        losses: Loss of Megatron and of transformers over the vocabulary that both have, and
            Megatron's with its padded rows, as in training; None without data.
    """

    absolute: torch.Tensor
    relative: torch.Tensor
    losses: tuple[float, float, float] | None

    def worst(self) -> float:
        """Returns what is compared with the tolerance; NaN if anything is NaN."""
        values = [float(self.relative.max())]
        if self.losses is not None:
            ours, theirs, _ = self.losses
            values.append(abs(ours - theirs) / max(abs(ours), 1.0))
        return math.nan if any(math.isnan(value) for value in values) else max(values)


def verify(
    megatron_path: str,
    hf_path: str,
    iteration: int | None = None,
    data: str | None = None,
    tolerance: float = 1e-4,
    tokens: int = 512,
) -> int:
    """Compares both sides; the arguments are the command line's.

    Returns:
        0: they agree; 1: they do not; 2: bad input, which one line names.
    """
    try:
        if not (tolerance > 0 and math.isfinite(tolerance)):
            raise ConversionError(f"--tolerance is {tolerance:g}; give a number above 0.")
        if tokens < 2:
            raise ConversionError(f"--tokens is {tokens}; give 2 or more.")
        folder = find_checkpoint(megatron_path, iteration)
        found = compare(folder, Path(hf_path), data, tokens)
    except (DWMError, OSError) as error:
        print(f"tools/convert verify: {error}", file=sys.stderr)
        return 2
    worst = found.worst()
    agree = worst <= tolerance
    print("\n".join(_table(found)))
    verdict = "agree" if agree else "DO NOT AGREE"
    print(f"largest relative difference {worst:.2e}, tolerance {tolerance:g}: the two {verdict}")
    return 0 if agree else 1


def compare(folder: Path, hf_path: Path, data: str | None, tokens: int) -> Comparison:
    """Runs the same tokens through both models.

    Args:
        folder: Checkpoint folder.
        hf_path: Hugging Face folder.
        data: Prefix of an indexed data set, or None for random tokens.
        tokens: How many; cut into sequences of the run's length.

    Raises:
        DWMError: One of the sides cannot be loaded, or the data does not fit.
    """
    from megatron_dwm.hosts import cpu

    theirs = _hugging_face(hf_path)
    cpu.install()
    from megatron_dwm.hosts.megatron_lm.language_model import load_language_model, logits_of

    ours, args = load_language_model(folder, _printed_flags(folder))
    size = int(theirs.config.vocab_size)
    # An imported model was trained with no sequence length of its own.
    limits = [
        getattr(args, "seq_length", None),
        args.max_position_embeddings,
        getattr(theirs.config, "max_position_embeddings", None),
        tokens,
    ]
    length = min(limit for limit in limits if limit)
    samples = _samples(data, size, length, max(1, tokens // length))
    absolute, relative = torch.zeros(length), torch.zeros(length)
    sums = torch.zeros(3, dtype=torch.float64)
    for sample in samples.split(1):
        inputs, labels = sample[:, :-1], sample[0, 1:]
        padded = logits_of(ours, inputs)[0]
        if padded.size(1) < size:
            raise ConversionError(
                f"--hf-path {hf_path} has a vocabulary of {size}, and {folder} one of "
                f"{padded.size(1)} with padding: it is no export of this model."
            )
        with torch.no_grad():
            found = theirs(input_ids=inputs.to(theirs.device)).logits[0].float().cpu()
        both = padded[:, :size], found
        # A NaN stays: it is larger than everything to `maximum`.
        difference = (both[0] - both[1]).abs().amax(dim=1)
        absolute = torch.maximum(absolute, difference)
        relative = torch.maximum(relative, difference / both[0].abs().amax(dim=1).clamp(min=1))
        for number, logits in enumerate((*both, padded)):
            loss = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
            sums[number] += loss
    losses = tuple((sums / (samples.size(0) * length)).tolist()) if data else None
    return Comparison(absolute, relative, losses)  # type: ignore[arg-type]


def _printed_flags(folder: Path) -> list[str] | None:
    """Returns the trainer's flags that an import printed; None for a run's own checkpoint."""
    path = folder.absolute().parent / FLAGS_FILE
    if folder.name != RELEASE or not path.is_file():
        return None
    try:
        return shlex.split(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is damaged ({error}); import the model again.") from error


def _hugging_face(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ConversionError(f"--hf-path {folder} has no config.json; give an exported model.")
    find_weights(folder)
    try:
        from transformers import AutoModelForCausalLM

        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever a damaged folder makes of transformers
        raise ConversionError(f"--hf-path {folder} cannot be loaded ({in_short(error)})") from error
    wrong = sorted([*report["missing_keys"], *report["unexpected_keys"]])
    if wrong:
        raise ConversionError(
            f"--hf-path {folder} is no complete language model: {', '.join(wrong[:4])} missing or "
            "unknown."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def _samples(data: str | None, size: int, length: int, count: int) -> torch.Tensor:
    """Returns `[count, length + 1]` tokens, random ones or the first of a data set."""
    if data is None:
        generator = torch.Generator().manual_seed(_SEED)
        return torch.randint(0, size, (count, length + 1), generator=generator)
    from megatron_dwm.data.index import read_index
    from megatron_dwm.scoring.documents import TokenReader

    index = read_index(data)
    reader = TokenReader(index, size)
    found: list[torch.Tensor] = []
    needed = count * (length + 1)
    for number in range(index.documents):
        found.append(torch.from_numpy(reader.document(number)))
        needed -= len(found[-1])
        if needed <= 0:
            break
    stream = torch.cat(found) if found else torch.zeros(0, dtype=torch.long)
    rows = len(stream) // (length + 1)
    if not rows:
        raise ConversionError(
            f"--data {data} has {len(stream)} tokens; {length + 1} are needed for one sequence "
            "(--tokens N takes shorter ones)."
        )
    rows = min(rows, count)
    return stream[: rows * (length + 1)].reshape(rows, length + 1)


def _table(found: Comparison) -> list[str]:
    length = len(found.absolute)
    step = math.ceil(length / _ROWS)
    lines = [f"{'positions':>12} {'max abs':>10} {'max rel':>10}"]
    for first in range(0, length, step):
        last = min(first + step, length)
        worst = [float(v[first:last].max()) for v in (found.absolute, found.relative)]
        lines.append(f"{f'{first}-{last - 1}':>12} {worst[0]:10.2e} {worst[1]:10.2e}")
    overall = float(found.absolute.max()), float(found.relative.max())
    lines.append(f"{'all':>12} {overall[0]:10.2e} {overall[1]:10.2e}")
    if found.losses is not None:
        ours, theirs, trained = found.losses
        lines.append(
            f"loss: Megatron {ours:.6f}, transformers {theirs:.6f}; Megatron's own, with padded "
            f"rows of the vocabulary: {trained:.6f}"
        )
    return lines
