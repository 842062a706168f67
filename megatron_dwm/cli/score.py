r"""Scores every document of a corpus with a trained data weighting model (DWM), giving weights.

    megatron-dwm score --checkpoint runs/dwm --data data/web_text_document --domain web
    torchrun --nproc-per-node 8 -m megatron_dwm score --checkpoint runs/dwm \
        --data data/web_text_document data/books_text_document --domain web books

writes PREFIX.weights beside each PREFIX.idx and prints the share of each domain. Every rank holds
the whole model, whatever layout it was trained with, and takes its share of the documents; without
torchrun there is one rank. On a CPU each rank uses one thread, so that the result does not depend
on the number of ranks: start one rank per core.

A document is scored by itself, from its first token. One longer than --seq-length is cut into
windows of that length, and its score is the mean of their scores, weighted by their number of
tokens. (In training the DWM saw packed samples of full length, so very short documents are out of
distribution.) A document without tokens gets weight 0.

Weights are w = exp((s - max s) / T), scaled to mean 1 over all documents with tokens, over all
files together, so they are comparable across files.

A killed run resumes when it is started again, on any number of ranks, and ends with the same bytes
(it needs --force if some of the weight files were already written). Finished chunks of scores are
kept in PREFIX.weights.scores until the weights are written. Another model, corpus, --seq-length,
--micro-batch-size or --chunk-tokens starts from scratch; another --temperature or --top-fraction
does not.

Exit code 0: done; 2: bad input (torchrun itself then exits with 1).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import TYPE_CHECKING

from megatron_dwm.cli.command import completed, new_parser, say_error
from megatron_dwm.errors import DWMError

if TYPE_CHECKING:
    from megatron_dwm.scoring.score_chunk import WindowScorer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="PREFIX", help="corpora (.idx and .bin)")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        help="a run's --save folder (its latest checkpoint, else its last snapshot), one iter_* "
        "folder or one dwm_stage_* snapshot",
    )
    model.add_argument(
        "--hf",
        metavar="FOLDER",
        help="a Hugging Face AutoModelForSequenceClassification with one label, such as an export "
        "of a DWM (`megatron-dwm convert export-dwm`, either pooling); no code in it is run",
    )
    add(
        "--seq-length",
        type=_positive(int),
        metavar="N",
        help="longest window in tokens (default: the run's --seq-length, which an export keeps; "
        "with another --hf the model's max_position_embeddings)",
    )
    add(
        "--micro-batch-size",
        type=_positive(int),
        default=8,
        metavar="B",
        help="windows of --seq-length per batch, or as many tokens in shorter windows (8)",
    )
    add(
        "--chunk-tokens",
        type=_positive(int),
        default=1 << 20,
        metavar="N",
        help="tokens per chunk, the most work that a killed run loses on a rank (2^20)",
    )
    add(
        "--temperature",
        type=_positive(float),
        metavar="T",
        help="a difference of T in score is a factor of e in weight (default: the run's "
        "--dwm-temperature; 1 if that is unknown)",
    )
    add(
        "--top-fraction",
        type=_positive(float),
        metavar="F",
        help="keep the best share F of all documents, the others get weight 0 (default: all)",
    )
    add(
        "--output",
        nargs="+",
        metavar="FILE",
        help="weight files, one for each prefix (default: PREFIX.weights)",
    )
    add(
        "--domain",
        nargs="+",
        metavar="NAME",
        help="domain of all documents of each prefix (default: those of the existing weight file, "
        "if any)",
    )
    add("--force", action="store_true", help="replace existing weight files")
    add(
        "--keep-scores",
        action="store_true",
        help="keep the work folder, and write the scores as PREFIX.scores.npy (float32; -inf for "
        "a document without tokens)",
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = new_parser("score", __doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.top_fraction is not None and args.top_fraction > 1:
        parser.error(f"--top-fraction {args.top_fraction:g}: expected at most 1")
    return args


def _positive(kind: type):
    def number(text: str):
        value = kind(text)
        if not (value > 0 and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
        return value

    number.__name__ = kind.__name__
    return number


def load_scorer(args: argparse.Namespace) -> WindowScorer:
    """Loads the weighting model, on all ranks.

    Raises:
        DWMError: it cannot be loaded.
    """
    from megatron_dwm.core.ranks import rank_0_first

    if args.hf is not None:
        from megatron_dwm.scoring.huggingface import HuggingFaceScorer, usable_device

        return rank_0_first(lambda: HuggingFaceScorer(args.hf, usable_device()))
    from megatron_dwm.scoring.model_loading import MegatronScorer, read_saved

    return MegatronScorer(rank_0_first(lambda: read_saved(args.checkpoint)))


def run(args: argparse.Namespace) -> None:
    """Scores and writes.

    Raises:
        DWMError: something that a user can fix.
    """
    import torch.distributed as dist

    from megatron_dwm.core.ranks import rank_0_first
    from megatron_dwm.scoring.run import plan, score, window_length, write

    first = dist.get_rank() == 0
    corpora = rank_0_first(
        lambda: plan(args.data, args.output, args.domain, args.force, args.keep_scores, first)
    )
    scorer = load_scorer(args)
    seq_length = window_length(scorer, args.seq_length)
    temperature = args.temperature or scorer.temperature or 1.0
    if first:
        for note in scorer.notes:
            print(f"NOTE: {note}", file=sys.stderr)
        print(
            f"weighting model {scorer.where}: windows of {seq_length} tokens, temperature "
            f"{temperature:g}, {dist.get_world_size()} rank(s)",
            flush=True,
        )
    folders = score(corpora, scorer, seq_length, args.micro_batch_size, args.chunk_tokens)
    if not first:
        return
    text = write(corpora, folders, temperature, args.top_fraction, args.keep_scores)
    print(text)
    for corpus, folder in zip(corpora, folders, strict=True):
        print(f"wrote {corpus.output}")
        if folder.root.exists() and (others := folder.others()):
            print(
                f"NOTE: {folder.root} holds scores of {len(others)} other model(s) or settings; "
                "delete them unless they are to be continued",
                file=sys.stderr,
            )


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments after the command's name; None takes the process's own.

    Returns:
        0, or 2 after an error that was printed as one line.
    """
    args = parse_args(argv)
    return completed("score", lambda: _on_this_rank(args), "; finished chunks are kept")


def _on_this_rank(args: argparse.Namespace) -> int:
    """Joins the other ranks and scores; an error that all ranks see is printed once."""
    import torch
    import torch.distributed as dist

    from megatron_dwm.core.ranks import start_ranks
    from megatron_dwm.hosts import cpu

    try:
        # Before Megatron is imported.
        if args.checkpoint is not None:
            cpu.install()
        if cpu.wanted():
            # More threads would change the order of sums, and with it the last bits of the scores.
            torch.set_num_threads(1)
        else:
            local = int(os.environ.get("LOCAL_RANK", "0"))
            torch.cuda.set_device(local % torch.cuda.device_count())
        start_ranks()
        run(args)
    except DWMError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0 or error.this_rank_only:
            # The cursor may be at the end of rank 0's progress bar.
            if rank:
                print(file=sys.stderr)
            say_error("score", str(error))
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
