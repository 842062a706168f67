r"""Makes, combines and shows weight files: how often documents of a data set are drawn.

    megatron-dwm weights make data/web_text_document --from quality.csv --column score \
        --scores --temperature 0.5 --domain web
    megatron-dwm weights show data/web_text_document

PREFIX.weights lies beside PREFIX.idx and PREFIX.bin and has one number for every document of the
index, and optionally its domain. A document of weight 2 is drawn twice as often as one of weight 1.
`make` reads numbers from .npy, .csv or .jsonl, `merge` combines weight files of one data set
(quality times domain, say), `concat` joins those of data sets that Megatron's merge_datasets.py has
concatenated. `megatron-dwm weights COMMAND --help` shows the flags.
Exit code 0: done; 2: something is wrong, and one line says what.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dwm.cli.command import completed, layout, new_parser, print_json
from megatron_dwm.errors import InputError
from megatron_dwm.progress import working

if TYPE_CHECKING:
    from megatron_dwm.data.weight_file import WeightFile

SUFFIX = ".weights"
SHOWN_DOMAINS = 40
PRIOR_TOKENS = 200.0
# The keys of `weight_combine.COMBINE`, available without NumPy.
COMBINATIONS = ("mean", "product", "max", "min")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands and their flags."""
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help="what to do"
    )
    about = "make PREFIX.weights from numbers in a file"
    example = "megatron-dwm weights make data/web_text_document --from quality.csv --column score"
    make = commands.add_parser("make", help=about, **_explained(about, example))
    _add_make_args(make)
    # Further checks report errors in the parser's way.
    make.set_defaults(refuse=make.error)

    about = "show what is in a weight file"
    example = "megatron-dwm weights show data/web_text_document"
    command = commands.add_parser(
        "show", aliases=["inspect"], help=about, **_explained(about, example)
    )
    command.add_argument("file", metavar="FILE|PREFIX", help="weight file, or prefix of one")
    command.add_argument(
        "--index", metavar="PREFIX", help="dataset to compare with (default: the one beside it)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")

    about = "combine weight files of the same data set"
    example = "megatron-dwm weights merge data/web quality.weights domain.weights --how product"
    command = commands.add_parser("merge", help=about, **_explained(about, example))
    command.add_argument("output", metavar="OUT", help="weight file to write, or its prefix")
    command.add_argument("files", nargs="+", metavar="FILE", help="weight files, or prefixes")
    command.add_argument("--how", choices=COMBINATIONS, required=True, help="element by element")
    command.add_argument(
        "--no-normalise",
        action="store_true",
        help="use the weights as they are; do not scale each file to mean 1 first",
    )
    _add_force(command)

    about = "make weight files from the document weights of a run with --dwm-document-weights"
    example = "megatron-dwm weights from-run runs/small data/web data/books --blend blend.txt"
    command = commands.add_parser("from-run", help=about, **_explained(about, example))
    command.add_argument("run", metavar="RUN", help="--save folder of that run")
    command.add_argument(
        "prefixes",
        nargs="*",
        metavar="PREFIX",
        help="data sets to make weight files for, in the run's order (default: the run's own)",
    )
    command.add_argument("--iteration", type=int, metavar="N", help="default: the last")
    command.add_argument(
        "--prior-tokens",
        type=float,
        default=PRIOR_TOKENS,
        metavar="P",
        help="tokens of the data set's mean weight that are added to those of each document "
        f"(default: {PRIOR_TOKENS:g}); the more, the less one visit says",
    )
    command.add_argument(
        "--shares",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="share of each data set in that run's blend (default: in proportion to tokens read)",
    )
    command.add_argument(
        "--blend", metavar="FILE", help="write the new shares for --data-args-path"
    )
    _add_force(command)

    about = "join the weights of data sets that were concatenated"
    example = "megatron-dwm weights concat data/all data/web data/books"
    command = commands.add_parser("concat", help=about, **_explained(about, example))
    command.add_argument("output", metavar="OUT_PREFIX", help="prefix of the joined data set")
    command.add_argument("parts", nargs="+", metavar="PREFIX", help="its parts, in their order")
    command.add_argument(
        "--normalise",
        action="store_true",
        help="scale each part to mean 1 first, so that no part as a whole is drawn more often",
    )
    _add_force(command)


def _explained(about: str, example: str) -> dict[str, Any]:
    return layout(f"{about[0].upper()}{about[1:]}.\n\n    {example}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = new_parser("weights", __doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.command == "make":
        _check_make_args(args)
    return args


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace an existing weight file")


def _add_make_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prefixes", nargs="+", metavar="PREFIX", help="path of a dataset without .idx and .bin")
    group = parser.add_argument_group("source of the weights (one of these)")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        metavar="FILE",
        help="one file for each PREFIX: .npy (one number per document), .csv with a header, or "
        ".jsonl; rows are in document order unless they have a 'document' number",
    )
    source.add_argument("--equal", action="store_true", help="weight 1 for every document")
    group = parser.add_argument_group("reading the file")
    add = group.add_argument
    add("--column", metavar="NAME", help="column or key that holds the number (default: weight)")
    add("--domain-column", metavar="NAME", help="column or key that holds the document's domain")
    add(
        "--domains-only",
        action="store_true",
        help="read only the domains of the file and give every document weight 1",
    )
    add("--default", type=float, metavar="W", help="number for documents that the file leaves out")
    add(
        "--scores",
        action="store_true",
        help="the numbers s are scores: weight exp(s / temperature)",
    )
    add("--temperature", type=float, metavar="T", help="temperature for --scores (default: 1)")
    group = parser.add_argument_group("result")
    add = group.add_argument
    add("--top-fraction", type=float, metavar="F", help="weight 0 for all but the best share F")
    add(
        "--domain",
        dest="domains",
        nargs="+",
        metavar="NAME",
        help="domain of all documents; one for all datasets or one for each",
    )
    add("--output", metavar="FILE", help="file to write (default: PREFIX.weights)")
    _add_force(parser)


def _check_make_args(args: argparse.Namespace) -> None:
    refuse, count = args.refuse, len(args.prefixes)
    if args.sources and len(args.sources) != count:
        refuse(
            f"--from: {len(args.sources)} files for {count} datasets; give one for each, in the "
            f"same order, after the last PREFIX"
        )
    if args.domains and len(args.domains) not in (1, count):
        refuse(f"--domain: {len(args.domains)} names for {count} datasets; give 1 or {count}")
    if args.output and count > 1:
        refuse("--output: names one file, for one PREFIX")
    # Any other name might be the index itself.
    if args.output and not args.output.endswith(SUFFIX):
        refuse(f"--output {args.output}: the name of a weight file ends in {SUFFIX}")
    if args.domains and args.domain_column:
        refuse("--domain and --domain-column both set the domain; give one of them")
    if args.domains_only and not args.domain_column:
        refuse("--domains-only: name the column with --domain-column")
    needs_file = ("column", "domain_column", "domains_only", "default", "scores", "temperature")
    for name in needs_file if args.equal else ():
        value = getattr(args, name)
        # An explicit 0 counts as given, although it equals False.
        if value is not None and value is not False:
            refuse(f"--{name.replace('_', '-')}: needs --from")
    if args.domains_only and (args.column or args.scores):
        refuse(f"--{'column' if args.column else 'scores'}: --domains-only reads no numbers")
    if args.temperature is not None and not args.scores:
        refuse("--temperature: needs --scores")
    if args.temperature is None:
        args.temperature = 1.0
    if not 0 < args.temperature < math.inf:
        refuse(f"--temperature {args.temperature}: must be a finite number above 0")
    if args.top_fraction is not None and not 0 < args.top_fraction <= 1:
        refuse(f"--top-fraction {args.top_fraction}: must be above 0 and at most 1")
    if args.default is not None and not math.isfinite(args.default):
        refuse(f"--default {args.default}: must be finite")


def make(args: argparse.Namespace) -> None:
    """Makes the weight files.

    Raises:
        DWMError: A data set is damaged, the weights cannot be used for drawing, a file of `--from`
            is bad, or an output exists.
    """
    from megatron_dwm.data import weight_making
    from megatron_dwm.data.weight_file import weights_path
    from megatron_dwm.data.weight_sources import Columns

    outputs = [args.output or weights_path(prefix) for prefix in args.prefixes]
    for output in outputs:
        _refuse_existing(output, args.force)
    columns = Columns(None if args.domains_only else args.column or "weight", args.domain_column)
    for number, (prefix, output) in enumerate(zip(args.prefixes, outputs, strict=True)):
        domains = args.domains or [None]
        recipe = weight_making.Recipe(
            source=Path(args.sources[number]) if args.sources else None,
            columns=columns,
            default=args.default,
            temperature=args.temperature if args.scores else None,
            top_fraction=args.top_fraction,
            domain=domains[number if len(domains) > 1 else 0],
        )
        _print_written(weight_making.make(prefix, output, recipe))


def _refuse_existing(path: str, force: bool) -> None:
    if os.path.lexists(path) and not force:
        raise InputError(f"{path}: exists already; give --force to replace it")


def _weight_file(name: str) -> str:
    from megatron_dwm.data.weight_file import weights_path

    return name if name.endswith(SUFFIX) else weights_path(name)


def _print_written(file: WeightFile) -> None:
    domains = f", {len(file.domain_names)} domains" if file.domains is not None else ""
    print(f"Wrote {file.path}: {file.documents} documents{domains}")


def show(args: argparse.Namespace) -> None:
    """Prints what is in a weight file.

    Raises:
        DWMError: The file or the dataset is damaged, or they do not belong together.
    """
    from megatron_dwm.data.document_weights import domain_summary, weight_summary
    from megatron_dwm.data.index import read_index
    from megatron_dwm.data.weight_file import read_weights

    path = _weight_file(args.file)
    prefix = args.index or path.removesuffix(SUFFIX)
    index = read_index(prefix) if args.index or os.path.exists(f"{prefix}.idx") else None
    with working("summing up"):
        file = read_weights(path, index)
        summary = {"path": path, **weight_summary(file), "domains": domain_summary(file, index)}
    if args.json:
        print_json(summary)
    else:
        _print_summary(summary)


def _print_summary(summary: dict) -> None:
    lines = [
        ("documents", f"{summary['documents']:,}"),
        ("sequences", f"{summary['sequences']:,}"),
        ("tokens", f"{summary['tokens']:,}"),
        ("digest", summary["digest"]),
        ("weight", "min {min:.6g}  mean {mean:.6g}  max {max:.6g}".format(**summary)),
        ("share of zero weights", f"{summary['zero_share']:.2%}"),
        ("effective sample size", f"{summary['effective_sample_size']:.2%} of the documents"),
    ]
    for level, value in summary["quantiles"].items():
        lines.append((f"quantile {level}", f"{value:.6g}"))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    rows = summary["domains"]
    if not rows:
        return
    shown = sorted(rows, key=lambda row: -row["weight_share"])[:SHOWN_DOMAINS]
    width = max(len("domain"), *(len(row["domain"]) for row in shown))
    heads = f"{'documents':>14}  {'tokens':>18}  {'weight':>8}  {'tokens drawn':>12}"
    print(f"\n{'domain':<{width}}  {heads}")
    for row in shown:
        tokens = "-" if row["tokens"] is None else f"{row['tokens']:,}"
        drawn = row["expected_token_share"]
        print(
            f"{row['domain']:<{width}}  {row['documents']:>14,}  {tokens:>18}  "
            f"{row['weight_share']:>8.2%}  {'-' if drawn is None else f'{drawn:.2%}':>12}"
        )
    if len(shown) < len(rows):
        print(f"and {len(rows) - len(shown)} domains of less weight; --json lists all")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_args(argv)
    works = {
        "make": make,
        "show": show,
        "inspect": show,
        "merge": _merge,
        "concat": _concat,
        "from-run": _from_run,
    }
    work = works[args.command]
    return completed(f"weights {args.command}", lambda: work(args), "; no file is incomplete")


def _from_run(args: argparse.Namespace) -> None:
    from megatron_dwm.data import weights_seen
    from megatron_dwm.data.weight_file import weights_path
    from megatron_dwm.data.weights_from_run import write_from_run

    known = weights_seen.iterations(args.run)
    if not known or (args.iteration is not None and args.iteration not in known):
        wanted = "" if args.iteration is None else f" of iteration {args.iteration}"
        raise InputError(
            f"{args.run}: no document weights{wanted} of all ranks; found "
            f"{', '.join(map(str, known)) or 'none'}. Train with --dwm-document-weights and --save"
        )
    if not args.prior_tokens > 0:
        raise InputError(f"--prior-tokens {args.prior_tokens:g}: must be above 0")
    seen = weights_seen.read(args.run, known[-1] if args.iteration is None else args.iteration)
    prefixes = args.prefixes or seen.prefixes
    for name, given in (("PREFIX", prefixes), ("--shares", args.shares)):
        if given is not None and len(given) != len(seen.prefixes):
            raise InputError(
                f"{name}: {len(given)} given, but the run has read {len(seen.prefixes)} data "
                f"sets: {', '.join(seen.prefixes)}"
            )
    outputs = [weights_path(prefix) for prefix in prefixes]
    for path in [*outputs, *([args.blend] if args.blend else [])]:
        _refuse_existing(path, args.force)
    shares = args.shares or seen.shares()
    if not all(0 <= share < math.inf for share in shares) or not sum(shares) > 0:
        raise InputError(
            f"--shares {' '.join(map(str, shares))}: must be finite and at least 0, one of them "
            "above 0"
        )
    found = write_from_run(seen, prefixes, outputs, shares, args.prior_tokens)
    for prefix, one in zip(prefixes, found, strict=True):
        _print_written(one.file)
        print(f"  read {one.seen:.1%} of {prefix}; mean weight {one.mean:.3f}")
    blend = " ".join(f"{f.share:.6g} {prefix}" for f, prefix in zip(found, prefixes, strict=True))
    if args.blend:
        Path(args.blend).write_text(blend + "\n")
    if len(found) > 1:
        print(f"Shares between the data sets: --data-path {blend}")


def _merge(args: argparse.Namespace) -> None:
    from megatron_dwm.data.weight_combine import merge

    output = _weight_file(args.output)
    _refuse_existing(output, args.force)
    paths = [_weight_file(name) for name in args.files]
    _print_written(merge(output, paths, args.how, not args.no_normalise))


def _concat(args: argparse.Namespace) -> None:
    from megatron_dwm.data.weight_combine import concat

    output = _weight_file(args.output)
    _refuse_existing(output, args.force)
    prefix = output.removesuffix(SUFFIX)
    _print_written(concat(output, prefix, args.parts, args.normalise))
