"""Reports what a run's data weighting model preferred, and compares runs.

    megatron-dwm report --run runs/dwm
    megatron-dwm report --run runs/dwm --log dwm.log --stock-log stock.log --bad-domain corrupt
    megatron-dwm report --compare stock=stock.log --compare DWM=dwm.log --plot report.png
    megatron-dwm report runs/dwm runs/uniform --html report.html

RUN is the run's --save folder with `dwm_log.jsonl` and its older parts; the logs are what the
trainer printed. All runs of --compare are compared with the first, at equal tokens and at equal
time. The plot shows their validation losses over both, and the weights of RUN's domains.

--html makes one page with up to 8 runs side by side, which needs no network and no other file:
loss, evidence and weights over the steps, domains and cost. For a run started with
--dwm-document-weights it also shows how its documents are weighted by length, variety, repetition
and symbols, with the passages of highest and lowest weight. Their texts need the tokenizer; without
one, tokens below 256 are read as bytes.
Exit code 0: done; 2: bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import TYPE_CHECKING

from megatron_dwm.cli.command import completed, new_parser, print_json
from megatron_dwm.corpus.tokenizer_flags import add_tokenizer_args
from megatron_dwm.errors import DWMError

if TYPE_CHECKING:
    from megatron_dwm.logs.html_report import Documents
    from megatron_dwm.logs.passages import Decode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add = parser.add_argument
    add(
        "runs",
        nargs="*",
        metavar="RUN",
        help="--save folders of runs with --dwm; several only with --html",
    )
    add("--run", metavar="RUN", help="one more RUN")
    add("--log", metavar="FILE", help="what the trainer printed in that run")
    add("--stock-log", metavar="FILE", help="what the stock trainer printed on the same data")
    add(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=LOG",
        help="a run's name and what its trainer printed; once for each run, the baseline first",
    )
    add("--plot", metavar="FILE.png", help="also draw a plot (needs matplotlib)")
    add("--bad-domain", default="corrupt", help="a domain that is known to be bad")
    add("--good-domains", nargs="+", default=[], help="domains that the bad one should end below")
    add("--json", action="store_true", help="print one JSON object")
    group = parser.add_argument_group("page for a browser")
    add = group.add_argument
    add("--html", metavar="FILE.html", help="write the page (needs matplotlib)")
    add("--png", metavar="FOLDER", help="also write the charts of the page as PNG")
    add(
        "--data",
        nargs="+",
        metavar="PREFIX",
        help="where the training data sets lie now, in the order of the run's (default: where "
        "they lay)",
    )
    add("--documents", type=int, default=2000, metavar="N", help="documents to read (2000)")
    add("--seed", type=int, default=1234, help="seed for choosing them (1234)")
    add_tokenizer_args(parser, required=False)
    # Nothing is tokenized here, only decoded.
    parser.set_defaults(append_eod=False, pad_vocab_size=False)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = new_parser("report", __doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    return completed("report", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Reads, prints, and draws the plot or writes the page if asked to.

    Raises:
        DWMError: The given runs or logs cannot be reported.
    """
    folders = [*args.runs, *([] if args.run is None else [args.run])]
    if not folders and not args.compare:
        raise DWMError("there is nothing to report; give --run RUN, or --compare NAME=LOG, or both")
    _check_page(args, folders)
    from megatron_dwm.logs import summary

    if args.plot:
        from megatron_dwm.logs.plot import check_plot, domain_weights_over_run, draw

        check_plot(args.plot)
    # The tables on a terminal show one run; the page shows several side by side.
    log = summary.step_log(folders[0]) if len(folders) == 1 else None
    by_stage = None if log is None else summary.stages_of(log)
    found = summary.Summary(
        by_stage,
        summary.compared_runs(args.compare),
        summary.pair_of(args.log, args.stock_log),
        summary.verdict_on(args.bad_domain, args.good_domains, by_stage or {}),
    )
    if args.plot:
        lines = [] if log is None else list(summary.read_lines(log, "reading the log again"))
        draw(args.plot, found.comparison, domain_weights_over_run(lines))
    if args.html:
        _write_page(args, folders)
    if args.json:
        print_json(found.figures())
        return
    if text := found.text():
        print(text)
    if args.html:
        print(f"wrote {args.html}")


# ------------------------------------------------------------------ the page


def _check_page(args: argparse.Namespace, folders: list[str]) -> None:
    """Checks, before any work, whether the page can be made.

    Raises:
        DWMError: It cannot.
    """
    if not args.html:
        if len(folders) > 1:
            raise DWMError(
                f"{len(folders)} runs ({', '.join(folders)}); give --html FILE.html, which shows "
                "them side by side, or one run"
            )
        for flag in ("png", "data", "tokenizer_type", "tokenizer_model"):
            if getattr(args, flag) is not None:
                raise DWMError(f"--{flag.replace('_', '-')} is for the page; give --html FILE.html")
        return
    from megatron_dwm.logs.html_report import MOST_RUNS
    from megatron_dwm.logs.plot import check_matplotlib

    check_matplotlib("--html")
    if not folders:
        raise DWMError(f"--html {args.html}: there is no run to show; give RUN")
    if len(folders) > MOST_RUNS:
        raise DWMError(
            f"--html: {len(folders)} runs, but more than {MOST_RUNS} lines cannot be told apart; "
            "give fewer runs"
        )
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise DWMError(f"--html: a run is named twice ({', '.join(folders)}); name each once")
    if not args.html.lower().endswith((".html", ".htm")):
        raise DWMError(f"--html {args.html}: the name must end in .html")
    folder = os.path.dirname(args.html) or "."
    if not os.path.isdir(folder):
        raise DWMError(f"--html {args.html}: there is no folder {folder}; make it first")
    if args.documents < 1:
        raise DWMError(f"--documents {args.documents}: expected at least 1")


def _write_page(args: argparse.Namespace, folders: list[str]) -> None:
    """Makes the page and writes it."""
    from megatron_dwm.logs.html_report import build
    from megatron_dwm.logs.run_log import read_run_log, run_names

    runs = [read_run_log(*pair) for pair in zip(run_names(folders), folders, strict=True)]
    decode = _decoder(args)
    build(runs, [_documents_of(folder, args, decode) for folder in folders]).write(
        args.html, args.png
    )


def _documents_of(folder: str, args: argparse.Namespace, decode: Decode | None) -> Documents:
    """Reads a run's documents.

    Raises:
        DWMError: They cannot be read though the flags name them.
    """
    from megatron_dwm.logs.html_report import Documents
    from megatron_dwm.logs.passages import sample_documents

    named = args.data is not None or decode is not None
    try:
        sample = sample_documents(folder, args.data, decode, args.documents, args.seed)
    except DWMError as error:
        if named:
            raise
        # They were not asked for explicitly: the rest of the report works without them.
        print(f"NOTE: {folder}: documents are left out: {error}", file=sys.stderr)
        return Documents(None, f"Documents are left out: {error}")
    if sample is None:
        return Documents(
            None, "The run has kept no weights of documents; --dwm-document-weights does."
        )
    return Documents(sample)


def _decoder(args: argparse.Namespace) -> Decode | None:
    """Returns a function that turns token ids into text; None if tokens are bytes.

    Raises:
        DWMError: No tokenizer can be built from the flags.
    """
    if args.tokenizer_type is None:
        if args.tokenizer_model is None:
            return None
        file = os.path.isfile(args.tokenizer_model)
        args.tokenizer_type = "SentencePieceTokenizer" if file else "HuggingFaceTokenizer"
    # Its token ids are values as they are: in a data set of text, bytes.
    if args.tokenizer_type == "NullTokenizer":
        return None
    from megatron_dwm.corpus.preprocess_workers import (
        build_megatron_tokenizer,
        quiet_megatron_import,
    )
    from megatron_dwm.progress import working

    with working("loading the tokenizer"), quiet_megatron_import():
        tokenizer = build_megatron_tokenizer(args)
    end = None
    with contextlib.suppress(Exception):  # a tokenizer without one raises its own kind of error
        end = tokenizer.eod

    def decode(tokens: list[int]) -> str:
        return tokenizer.detokenize([token for token in tokens if token != end])

    return decode
