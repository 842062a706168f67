"""Compares logits and losses of a Megatron checkpoint and a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path
from typing import Any

import torch

from megatron_dwm.conversion.hf_folder import find_weights
from megatron_dwm.conversion.import_model import RELEASE
from megatron_dwm.conversion.trainer_flags import FLAGS_FILE
from megatron_dwm.errors import ConversionError, in_short

_SEED = 20


@dataclasses.dataclass
class Comparison:
    """What `verify` found.

    Attributes:
        absolute: `[s]` largest absolute difference of a logit at each position.
        relative: `[s]` the same over the position's largest logit, or 1 if that is larger.
        losses: Loss of Megatron and of transformers over the vocabulary that both share, and
            Megatron's with its padded rows, as in training; None without data.
    """

    absolute: torch.Tensor
    relative: torch.Tensor
    losses: tuple[float, float, float] | None

    def worst(self) -> float:
        """Returns the value that is compared with the tolerance; NaN if anything is NaN."""
        values = [float(self.relative.max())]
        if self.losses is not None:
            ours, theirs, _ = self.losses
            values.append(abs(ours - theirs) / max(abs(ours), 1.0))
        return math.nan if any(math.isnan(value) for value in values) else max(values)


def compare(folder: Path, hf_path: Path, data: str | None, tokens: int) -> Comparison:
    """Runs the same tokens through both models.

    Args:
        folder: Checkpoint folder.
        hf_path: Hugging Face folder.
        data: Prefix of an indexed data set, or None for random tokens.
        tokens: How many tokens to run, in sequences of the run's length.

    Raises:
        DWMError: One of the sides cannot be loaded, or the data does not fit.
    """
    from megatron_dwm.hosts import cpu

    theirs = _hugging_face(hf_path)
    cpu.install()
    from megatron_dwm.hosts.megatron_lm.language_model import load_language_model, logits_of

    ours, args = load_language_model(folder, _printed_flags(folder))
    size = int(theirs.config.vocab_size)
    # An imported model has no sequence length that it was trained with.
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
                f"{padded.size(1)} with padding: it is not an export of this model."
            )
        with torch.no_grad():
            found = theirs(input_ids=inputs.to(theirs.device)).logits[0].float().cpu()
        both = padded[:, :size], found
        # A NaN is kept: `maximum` treats it as larger than everything.
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
    except Exception as error:  # transformers may raise anything for a damaged folder
        raise ConversionError(f"--hf-path {folder} cannot be loaded ({in_short(error)})") from error
    wrong = sorted([*report["missing_keys"], *report["unexpected_keys"]])
    if wrong:
        raise ConversionError(
            f"--hf-path {folder} is not a complete language model: {', '.join(wrong[:4])} missing "
            "or unknown."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def _samples(data: str | None, size: int, length: int, count: int) -> torch.Tensor:
    """Returns `[count, length + 1]` tokens, random ones or the first of a data set."""
    if data is None:
        generator = torch.Generator().manual_seed(_SEED)
        return torch.randint(0, size, (count, length + 1), generator=generator)
    from megatron_dwm.data.index import read_index
    from megatron_dwm.data.token_reader import TokenReader

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
            "(use --tokens N for shorter ones)."
        )
    rows = min(rows, count)
    return stream[: rows * (length + 1)].reshape(rows, length + 1)
