"""Runs' folders made up for reports: step logs, byte-level data sets, document weights."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy

from megatron_dwm.data.weights_seen import DocumentWeightsSeen

END = 255  # of a document
HOSTILE = "<script>alert('x')</script> & \x00 \u202eright to left"


def log_lines(
    steps: int = 60, kind: str = "learned", domain: str = "books"
) -> list[dict[str, Any]]:
    """A log: two stages and meta steps every 2 steps (`learned`), or no meta steps at all."""
    lines = []
    for i in range(1, steps + 1):
        window = "uniform" if kind == "uniform" else "warmup" if i <= 4 else "meta"
        line: dict[str, Any] = {"iteration": i, "window": window}
        if kind == "learned":
            line["stage"] = 1 if i <= steps // 2 else 2
        low = 1.0 if window != "meta" else 1.0 - 0.5 * i / steps
        line |= {
            "lm_loss": 3 + 4 / i,
            "effective_sample_size": low,
            "max_weight": 2.0 - low,
            "min_weight": low,
            "domain_weight": {domain: 2.0 - low, "code": low},
            "domain_samples": {domain: 6, "code": 2},
        }
        if kind == "learned" and i > 4 and i % 2 == 0:
            line |= {
                "meta_loss": 3 + 3 / i,
                "meta_seconds": 0.25,
                "seconds_meta_gradient": 0.1,
                "seconds_inner": 0.125,
                "score_correlation": 0.3,
                "score_correlation_mean": 0.4,
                "score_correlation_error": 0.05,
                "gate": 1.0,
                "weighting_time_share": 0.125,
                "weights": [2.0, 1.5, 0.5, 0.0],
                "influence": [-4.0, -2.0, 1.0, 3.0],
                "losses": [2.0, 2.5, 3.0, 3.5],
            }
        lines.append(line)
    return lines


def write_log(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dwm_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_bytes(prefix: Path, texts: list[str]) -> str:
    """Writes a data set of one byte a token, and returns its prefix."""
    documents = [text.encode() + bytes([END]) for text in texts]
    lengths = numpy.array([len(document) for document in documents], "<i4")
    pointers = (numpy.cumsum(lengths) - lengths).astype("<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 1, len(lengths), len(lengths) + 1)
    bounds = numpy.arange(len(lengths) + 1, dtype="<i8")
    index = header + lengths.tobytes() + pointers.tobytes() + bounds.tobytes()
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(b"".join(documents))
    return str(prefix)


def texts(count: int = 40) -> list[str]:
    """Texts of growing length, the later ones with more symbols; the last one is hostile."""
    found = [f"Document {k}: " + "word " * (8 + k) + "{;}" * k for k in range(count - 1)]
    return [*found, HOSTILE]


def write_seen(run: Path, prefixes: list[str], weights: list[list[float]], saves: int = 3) -> None:
    """Writes sums after each of some saves, 20 steps apart: 50 tokens a document and period.

    Args:
        run: its folder.
        prefixes: of the data sets.
        weights: by data set, of its documents in the first period; turned round in the last.
        saves: of them.
    """
    seen = DocumentWeightsSeen(prefixes)
    for save in range(1, saves + 1):
        for k, values in enumerate(weights):
            now = values if save < saves else values[::-1]
            ids = numpy.repeat(numpy.arange(len(values)), 50).reshape(len(values), 50)
            seen.add(ids, numpy.full(len(values), k), numpy.array(now, dtype=float))
        seen.save(str(run), 20 * save, 0, 1)


def whole_run(folder: Path, domain: str = "books") -> Path:
    """A learned run with documents: long ones weigh more, until the last period."""
    run = write_log(folder, log_lines(domain=domain))
    prefix = write_bytes(folder / "books", texts())
    write_seen(run, [prefix], [[math.log(2 + k) for k in range(40)]])
    return run
