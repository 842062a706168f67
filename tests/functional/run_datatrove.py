"""Runs a datatrove pipeline: `run_datatrove.py PIPELINE FOLDER [RANK_TO_KILL]`.

The task of that rank kills itself, once, amid its documents. Its executor then waits for it without
end, as a pool of processes does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from megatron_dwm.corpus.datatrove_blocks import (
    DsirCounts,
    DsirScores,
    MergeDsir,
    MergeIndexed,
    ReadTexts,
    WriteIndexed,
)

TASKS = 2


class KillOnce(PipelineStep):
    """Kills its own process at the 20th document, unless it has done so before."""

    name, type = "kill", "TEST"

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__()
        self.marker, self.rank = folder / "killed", rank

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        for count, document in enumerate(data, 1):
            if rank == self.rank and count == 20 and not self.marker.exists():
                # The other task goes through meanwhile.
                while not (self.marker.parent / f"log/0/completions/{1 - rank:05d}").exists():
                    time.sleep(0.05)
                self.marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield document


def indexed(folder: Path, kill: list[PipelineStep]) -> list[list[PipelineStep]]:
    write = WriteIndexed(
        f"{folder}/blocks",
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=f"{folder}/tokenizer.model",
        append_eod=True,
    )
    # Before and after: killed while a part is being written.
    return [[read(folder, "input"), write, *kill], [MergeIndexed(f"{folder}/blocks")]]


def dsir(folder: Path, kill: list[PipelineStep]) -> list[list[PipelineStep]]:
    output = f"{folder}/blocks.csv"
    return [
        [read(folder, "input"), DsirCounts(output), *kill],
        [read(folder, "target"), DsirCounts(output, target=True)],
        [read(folder, "input"), DsirScores(output)],
        [MergeDsir(output, select=0.3)],
    ]


def score(folder: Path, kill: list[PipelineStep]) -> list[list[PipelineStep]]:
    from megatron_dwm.scoring import datatrove_blocks
    from megatron_dwm.scoring.work_folder import WorkFolder

    if kill:
        (killing,) = kill
        append = WorkFolder.append

        def once(self: WorkFolder, chunk: int, scores: Any) -> None:
            append(self, chunk, scores)
            # An executor with as many workers as tasks: the name says which task it is.
            if chunk % TASKS == killing.rank and chunk >= 4 and not killing.marker.exists():
                deque_of(killing.run([None] * 20, killing.rank))

        WorkFolder.append = once
    common = {"seq_length": 32, "chunk_tokens": 300, "output": f"{folder}/blocks.weights"}
    prefix, hf = f"{folder}/whole_text_document", f"{folder}/hf"
    return [
        [datatrove_blocks.ScoreParts(prefix, hf, **common)],
        [datatrove_blocks.MergeScores(prefix, hf, temperature=0.5, **common)],
    ]


def deque_of(documents: Any) -> None:
    for _ in documents:
        pass


def read(folder: Path, name: str) -> ReadTexts:
    return ReadTexts([f"{folder}/{name}/*"])


def main(name: str, folder: Path, kill: list[PipelineStep]) -> None:
    stages = {"indexed": indexed, "dsir": dsir, "score": score}[name](folder, kill)
    for number, stage in enumerate(stages):
        tasks = 1 if len(stage) == 1 and stage[0].name.endswith(("merged", "weights")) else TASKS
        LocalPipelineExecutor(
            stage,
            tasks=tasks,
            workers=tasks,
            logging_dir=f"{folder}/log/{number}",
            start_method="fork",
        ).run()


if __name__ == "__main__":
    place = Path(sys.argv[2])
    main(sys.argv[1], place, [KillOnce(place, int(r)) for r in sys.argv[3:]])
