"""Exports the tokenizer of a run into a Hugging Face folder.

A SentencePiece model is written as `tokenizer.model` and, rebuilt from its own pieces and
normaliser, as `tokenizer.json`. The rebuilt tokenizer is compared with SentencePiece on probe texts
before it is written, because a differing tokenizer silently ruins a model.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dwm.core.vocabulary import vocabulary_size
from megatron_dwm.errors import ConversionError, in_short

# The files of a Hugging Face tokenizer; a folder may hold weights beside them.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

# The same for tokenizers of particular families and versions of transformers.
_MORE_FILES = re.compile(r"tokenizer\..+\.json|tekken\.json|.+\.tiktoken|.+\.model(\.v\d+)?")
# The folder with further chat templates, one file each.
_TEMPLATES = "additional_chat_templates"

# Texts that tell tokenizers apart: spaces and line breaks in odd places, digits, cases,
# compatibility characters, scripts without spaces, and characters outside most vocabularies.
PROBES = (
    "Hello world, this is a test.",
    " leading space",
    "trailing space ",
    "two  spaces,   three",
    "line\nbreaks\n\nand\ttabs\t",
    "x = [1, 22, 333.4444]; def f(a_b): return -1",
    "MiXeD CaSe don't WON'T",
    "naïve café, Straße, e\u0301, ﬁne, ½, ①, Ａ",
    "Привет, мир! Γειά σου",
    "日本語のテキスト。中文文本",
    "مرحبا بالعالم 안녕하세요",
    "emoji 🙂👩‍🚀 and \u200b zero width",
    "a",
    "",
)


@dataclasses.dataclass
class Tokenizer:
    """What the exported model's configuration needs to know about its tokenizer.

    Attributes:
        write: Writes the tokenizer's files into a folder; returns a warning or None.
        vocab_size: Rows that its ids need, the largest id + 1, with the special tokens of the
            run; None when there is no tokenizer.
        tokens: Number of tokens, which is smaller if ids have gaps.
        ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, as far as they exist.
        note: A line for the user, or None.
    """

    write: Callable[[Path], str | None] = lambda folder: None
    vocab_size: int | None = None
    tokens: int | None = None
    ids: dict[str, int] = dataclasses.field(default_factory=dict)
    note: str | None = None


def tokenizer_files(folder: Path) -> list[str]:
    """Returns the names of a folder's tokenizer files and chat templates, relative to it."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    found = [name for name in names if name in TOKENIZER_FILES or _MORE_FILES.fullmatch(name)]
    templates = sorted((folder / _TEMPLATES).glob("*.jinja"))
    return [*found, *(f"{_TEMPLATES}/{path.name}" for path in templates)]


def largest_id(folder: Path, kind: str) -> int:
    """Returns the largest id of a folder's tokenizer.

    Args:
        folder: A Hugging Face folder.
        kind: Megatron's `--tokenizer-type`, HuggingFaceTokenizer or SentencePieceTokenizer.

    Raises:
        Exception: Whatever the tokenizer's library raises if it cannot load it.
    """
    if kind == "SentencePieceTokenizer":
        import sentencepiece

        model = str(folder / "tokenizer.model")
        return sentencepiece.SentencePieceProcessor(model_file=model).get_piece_size() - 1
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return max(tokenizer.get_vocab().values(), default=-1)


def find_tokenizer(args: Any, flag: str | None) -> Tokenizer:
    """Finds the tokenizer of a run.

    Args:
        args: The checkpoint's arguments (`tokenizer_type`, `tokenizer_model`).
        flag: The value of --tokenizer-model: a SentencePiece model, a Hugging Face folder,
            `none` to export without one, or None to use the one that the checkpoint names.

    Returns:
        The tokenizer; an empty one with a note if the run had none.

    Raises:
        ConversionError: The tokenizer is not where the checkpoint or the flag says.
    """
    kind = getattr(args, "tokenizer_type", None)
    if flag == "none":
        return Tokenizer(note="No tokenizer is written, as --tokenizer-model none asks.")
    if flag is None and kind in (None, "NullTokenizer", "NullMultimodalTokenizer"):
        return Tokenizer(
            note=f"The run has no tokenizer (--tokenizer-type {kind}), so none is written."
        )
    named = flag or getattr(args, "tokenizer_model", None)
    origin = f"--tokenizer-model {named}" + ("" if flag else " (from the checkpoint)")
    remedy = "Give --tokenizer-model FILE, or --tokenizer-model none to export without one."
    if not named:
        raise ConversionError(
            f"The run's --tokenizer-type {kind} names no file that could be carried. {remedy}"
        )
    path = Path(named)
    # --tokenizer-special-tokens, which Megatron adds to the loaded tokenizer.
    added = list(dict.fromkeys(getattr(args, "special_tokens", None) or ()))
    if path.is_dir():
        return _hugging_face(path, origin, added)
    if not path.is_file():
        raise ConversionError(f"{origin} was not found on this machine. {remedy}")
    if path.name in ("tokenizer.json", "tokenizer_config.json"):
        return _hugging_face(path.parent, origin, added)
    return _sentencepiece(path, origin, remedy, added)


def _hugging_face(folder: Path, origin: str, added: list[str]) -> Tokenizer:
    """A folder with Hugging Face tokenizer files, which are copied."""
    names = tokenizer_files(folder)
    if not names:
        raise ConversionError(
            f"{origin} is a folder without tokenizer files; expected one of {TOKENIZER_FILES}."
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ConversionError(
            f"{origin} cannot be loaded by transformers: {in_short(error)}"
        ) from error

    def write(out: Path) -> str | None:
        for name in names:
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, out / name)
        return None

    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {key: getattr(tokenizer, key) for key in keys}
    ids = {key: value for key, value in ids.items() if value is not None}
    vocabulary = tokenizer.get_vocab()
    new = [token for token in added if token not in vocabulary]
    tokenizer.add_tokens(new, special_tokens=True)
    return Tokenizer(write, vocabulary_size(tokenizer), len(tokenizer), ids, _note_of(new))


def _note_of(new: list[str]) -> str | None:
    """Returns a note about tokens that the run has added to its tokenizer."""
    if not new:
        return None
    return (
        f"The model has rows for {', '.join(new)} of the run's --tokenizer-special-tokens, which "
        "the tokenizer's files do not have."
    )


def _sentencepiece(path: Path, origin: str, remedy: str, added: list[str]) -> Tokenizer:
    """A SentencePiece model, which is copied and rebuilt as `tokenizer.json`."""
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ConversionError(
            f"{origin} is not a SentencePiece model ({error}). {remedy}"
        ) from error
    found = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
    ids = {f"{name}_token_id": value for name, value in found.items() if value >= 0}

    def write(out: Path) -> str | None:
        shutil.copyfile(path, out / "tokenizer.model")
        rebuilt, reason = None, ""
        around = [f"{s}one {s} two{s}three {s}" for s in _symbols(_proto(processor))]
        try:
            rebuilt = rebuild(processor)
        except ConversionError as error:
            reason = str(error)
        if rebuilt is not None:
            for text in (*PROBES, *around):
                expected = processor.encode(text)
                if rebuilt.encode(text, add_special_tokens=False).ids != expected:
                    rebuilt, reason = None, f"it would read {text!r} differently"
                    break
        if rebuilt is None:
            return (
                f"tokenizer.json is not written: {reason}. Use tokenizer.model with the "
                "sentencepiece library; AutoTokenizer would not give the ids of training."
            )
        rebuilt.save(str(out / "tokenizer.json"))
        tokens = {
            f"{name}_token": processor.id_to_piece(value)
            for name, value in {**found, "unk": processor.unk_id()}.items()
            if value >= 0
        }
        # The generic class uses tokenizer.json as it is; LlamaTokenizer would rebuild the
        # normaliser by its own rules, which differ for Unigram models and leading spaces.
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **tokens,
        }
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (out / "tokenizer_config.json").write_text(text, encoding="utf-8")
        return None

    new = [token for token in added if processor.piece_to_id(token) == processor.unk_id()]
    size = processor.get_piece_size() + len(new)
    return Tokenizer(write, size, size, ids, _note_of(new))


def rebuild(processor: Any) -> Any:
    """Builds a `tokenizers.Tokenizer` from a SentencePiece model's pieces and normaliser.

    Args:
        processor: A `sentencepiece.SentencePieceProcessor`.

    Returns:
        The tokenizer, which adds no special tokens.

    Raises:
        ConversionError: `tokenizers` does not support this kind of model.
    """
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer

    proto = _proto(processor)
    symbols = _symbols(proto)
    spec, norm = proto.trainer_spec, proto.normalizer_spec
    pieces = proto.pieces
    unk = processor.unk_id()
    model: Any
    if spec.model_type == spec.BPE:
        model = models.BPE(
            vocab={piece.piece: i for i, piece in enumerate(pieces)},
            merges=_merges(pieces),
            unk_token=pieces[unk].piece,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
            # A user-defined symbol is a piece that no merge produces.
            ignore_merges=bool(symbols),
        )
    elif spec.model_type == spec.UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in pieces]
        model = models.Unigram(scored, unk, spec.byte_fallback)
    else:
        raise ConversionError("the SentencePiece model is neither BPE nor Unigram")
    if not norm.escape_whitespaces or spec.treat_whitespace_as_suffix:
        raise ConversionError("the SentencePiece model marks spaces in an unusual way")

    # SentencePiece's own order: characters, spaces, the dummy prefix, the space mark.
    steps: list[Any] = []
    if norm.precompiled_charsmap:
        steps.append(normalizers.Precompiled(norm.precompiled_charsmap))
    if norm.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"^ +| +$"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if norm.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    tokenizer = FastTokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(steps)

    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if norm.add_dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(undo)
    kinds = proto.SentencePiece
    tokenizer.add_special_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in pieces
            if piece.type in (kinds.CONTROL, kinds.UNKNOWN)
        ]
    )
    # Text is split at user-defined symbols after it was normalised as a whole. Added tokens would
    # split earlier, and every part would get its own dummy prefix.
    if symbols:
        longest_first = sorted(symbols, key=len, reverse=True)
        pattern = Regex("|".join(re.escape(symbol) for symbol in longest_first))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    return tokenizer


def _symbols(proto: Any) -> list[str]:
    """Returns the user-defined symbols, which SentencePiece never splits."""
    return [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]


def _proto(processor: Any) -> Any:
    """Returns the model's protocol buffer: pieces, trainer and normaliser settings."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(processor.serialized_model_proto())
    return proto


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Returns the merges of a BPE model, best first: every way to form a piece from two."""
    normal = {piece.piece: piece.score for piece in pieces if piece.type == piece.NORMAL}
    merges = [
        (-score, text[:cut], text[cut:])
        for text, score in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    # Stable, so that equal scores keep the order of the vocabulary.
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]
