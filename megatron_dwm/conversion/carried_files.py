"""The files beside the weights of a Hugging Face folder: import stores, export restores them.

An import keeps these files in the folder that the run's --tokenizer-model names, so that an export
finds them after any training; a record beside them says which model they belong to.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dwm.conversion.families import shape_from_config
from megatron_dwm.conversion.hf_folder import Weights, _read_json
from megatron_dwm.conversion.shape import ModelShape
from megatron_dwm.conversion.tokenizer_files import tokenizer_files
from megatron_dwm.errors import ConversionError

CONFIG, GENERATION = "config.json", "generation_config.json"
RECORD = "import.json"
FOLDER = "tokenizer"
# Entries of a config.json that are about files, not about the model.
_ABOUT_FILES = (
    "_name_or_path",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "transformers_weights",
)
# Numbers of a shape that training may change, and the padding of the vocabulary.
_FREE: dict[str, Any] = {
    "vocab_size": 0,
    "max_position_embeddings": 0,
    "rotary_base": 0.0,
    "rope_scaling": None,
    "router_aux_loss": 0.0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}


def sort_out(folder: Path, weights: Weights) -> tuple[list[str], list[str]]:
    """Sorts the files beside a folder's weights.

    Args:
        folder: A Hugging Face folder.
        weights: Its weights, as `find_weights` found them.

    Returns:
        Names of files to carry, relative to the folder, and names of those left behind; folders end
        with a slash.
    """
    carried = tokenizer_files(folder)
    carried += [name for name in (CONFIG, GENERATION) if (folder / name).is_file()]
    known = {weights.chosen.name, *(path.name for path in weights.files), *weights.unread}
    known |= set(carried)
    left: list[str] = []
    for path in sorted(folder.iterdir()):
        inside = [name for name in carried if name.startswith(f"{path.name}/")]
        if path.name in known:
            continue
        if not path.is_dir():
            left.append(path.name)
        elif not inside:
            left.append(f"{path.name}/")
        else:
            names = (f"{path.name}/{inner.name}" for inner in sorted(path.iterdir()))
            left += [name for name in names if name not in inside]
    return carried, left


def carry(source: Path, names: list[str], out: Path, vocab_size: int) -> None:
    """Copies files into an import's folder, with a record of the model that they belong to."""
    out.mkdir()
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, out / name)
    text = json.dumps({"vocab_size": vocab_size}, indent=2) + "\n"
    (out / RECORD).write_text(text, encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Carried:
    """The files that an import has carried.

    Attributes:
        folder: Their folder.
        config: The model's config.json.
        vocab_size: Rows of the vocabulary that the model had.
    """

    folder: Path
    config: Mapping[str, Any]
    vocab_size: int

    def fits(self, shape: ModelShape) -> bool:
        """Returns whether a model is the imported one, perhaps after further training."""
        try:
            theirs = shape_from_config(self.config)
        except ConversionError:
            return False
        same = dataclasses.replace(theirs, **_FREE) == dataclasses.replace(shape, **_FREE)
        return same and self.vocab_size <= shape.vocab_size

    def merged_config(self, config: Mapping[str, Any], ids: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the contents of config.json: the model's, completed from the import's.

        Args:
            config: The model's own entries.
            ids: Ids of special tokens, from the tokenizer.
        """
        kept = {name: value for name, value in self.config.items() if name not in _ABOUT_FILES}
        known = {k: v if self.config.get(k) is None else self.config[k] for k, v in ids.items()}
        # A model without padding keeps none, because its embedding would treat that row
        # differently.
        known |= {k: v for k, v in self.config.items() if k == "pad_token_id"}
        return {**kept, **config, **known}

    def write(self, out: Path, with_tokenizer: bool) -> None:
        """Copies what `out` does not have yet, except config.json."""
        names = tokenizer_files(self.folder) if with_tokenizer else []
        for name in (*names, GENERATION):
            if (self.folder / name).is_file() and not (out / name).exists():
                (out / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(self.folder / name, out / name)


def find_carried(checkpoint: Path, args: Any, tokenizer: str | None) -> Carried | None:
    """Finds the files carried by the import that a run started from.

    Args:
        checkpoint: Folder of the checkpoint.
        args: Its arguments.
        tokenizer: The value of --tokenizer-model; with another tokenizer than the run's, nothing is
            found.

    Raises:
        ConversionError: The files are damaged.
    """
    named = getattr(args, "tokenizer_model", None) if tokenizer in (None, "none") else tokenizer
    places = [Path(named)] if named else []
    if tokenizer in (None, "none"):
        places.append(checkpoint.absolute().parent / FOLDER)
    for place in places:
        folder = place if place.is_dir() else place.parent
        if (folder / RECORD).is_file():
            size = _read_json(folder / RECORD).get("vocab_size")
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConversionError(
                    f"{folder / RECORD} has vocab_size {size!r}; import the model again, or take "
                    "the file away to export without what the import has carried."
                )
            return Carried(folder, _read_json(folder / CONFIG), size)
    return None
