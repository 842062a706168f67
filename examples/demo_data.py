"""Turns the demo corpus into Megatron data sets, all in one process.

    python examples/demo_data.py CORPUS DATA

Each one equals the output of `megatron-dwm preprocess --input FILE --output-prefix DATA/NAME ...`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_dwm.cli import preprocess
from megatron_dwm.data.index import num_packed_samples, read_index

SEQUENCE_LENGTH = 128


def main(corpus: Path, data: Path) -> int:
    """Preprocesses every training domain, the meta set and the validation set."""
    files = [
        *sorted((corpus / "train").glob("*.jsonl")),
        *sorted((corpus / "target").glob("*.jsonl")),
    ]
    for file in files:
        target = data / file.stem
        if Path(f"{target}.idx").exists() and Path(f"{target}.bin").exists():
            print(f"{target}: done already")
            continue
        code = preprocess.main(
            [
                *("--input", str(file), "--output-prefix", str(target)),
                *("--tokenizer-type", "SentencePieceTokenizer"),
                *("--tokenizer-model", str(corpus / "tokenizer.model")),
                *("--append-eod", "--workers", "2"),
            ]
        )
        if code:
            return code
        for ending in (".bin", ".idx"):
            os.replace(f"{target}_text_document{ending}", f"{target}{ending}")
    print(
        f"{'data set':<14} {'documents':>9} {'tokens':>10} {'samples':>8}  (of {SEQUENCE_LENGTH})"
    )
    for file in files:
        index = read_index(str(data / file.stem))
        samples = num_packed_samples(index.tokens, SEQUENCE_LENGTH)
        print(f"{file.stem:<14} {index.documents:>9} {index.tokens:>10} {samples:>8}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), Path(sys.argv[2])))
