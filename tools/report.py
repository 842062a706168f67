#!/usr/bin/env python
"""Reports what a run's data weighting model preferred, and how runs did against each other.

python tools/report.py --run RUN [--log RUN.log] [--stock-log STOCK.log] [--bad-domain corrupt]
python tools/report.py [--run RUN] --compare stock=STOCK.log --compare DWM=RUN.log [--plot FILE.png]

RUN is the run's --save folder with `dwm_log.jsonl` and its older parts; the logs are what the
trainer printed. All runs of --compare are set against the first, at equal tokens and at equal time.
The plot shows their validation losses over both, and the weights of RUN's domains.
"""

from __future__ import annotations

import argparse
import os
import re
import sys

from megatron_dwm.errors import DWMError
from megatron_dwm.logs.compare import Comparison, Run, format_comparison, read_run
from megatron_dwm.logs.log_file import FILE_NAME, iterate_log, parts
from megatron_dwm.logs.plot import check_plot, domain_weights_over_run, draw
from megatron_dwm.logs.report import domain_weights_by_stage, format_table

_VALIDATION = re.compile(r"validation loss at (.+?) \| lm loss value: ([\d.E+-]+)")
_STEP_TIME = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")


def last_validation_loss(path: str) -> float:
    """Returns the last validation loss that the trainer printed.

    Raises:
        DWMError: there is none in the file.
    """
    with open(path, errors="replace") as file:
        found = [m for m in _VALIDATION.findall(file.read()) if "test set" not in m[0]]
    if not found:
        raise DWMError(f"{path}: no line 'validation loss at ...'; give the trainer's output")
    return float(found[-1][1])


def mean_step_seconds(path: str) -> float:
    """Returns the mean printed step time of a trainer's output, the first line left out."""
    with open(path, errors="replace") as file:
        times = [float(text) for text in _STEP_TIME.findall(file.read())][1:]
    return sum(times) / len(times) / 1000 if times else float("nan")


def compared_runs(words: list[str]) -> Comparison | None:
    """Reads the runs of `NAME=LOG` words; None without any.

    Raises:
        DWMError: a word is not `NAME=LOG`, or two have one name.
    """
    runs: dict[str, Run] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise DWMError(f"--compare {word}: give NAME=LOG, a name and what the trainer printed")
        if name in runs:
            raise DWMError(f"--compare {word}: there is a run named {name} already; name it apart")
        runs[name] = read_run(name, path)
    return Comparison.of(list(runs.values())) if runs else None


def report(args: argparse.Namespace) -> str:
    """Returns the whole report as text, and draws the plot where one is asked for."""
    if args.run is None and not args.compare:
        raise DWMError("there is nothing to report; give --run RUN, or --compare NAME=LOG, or both")
    if args.plot:
        check_plot(args.plot)
    texts, by_stage = [], {}
    path = None if args.run is None else os.path.join(args.run, FILE_NAME)
    if path is not None:
        if not parts(path):
            raise DWMError(f"{path}: no such file; --run is the --save folder of a run with --dwm")
        try:
            by_stage = domain_weights_by_stage(iterate_log(path))
        except DWMError as error:
            raise DWMError(f"{path}: {error}") from None
        texts.append(format_table(by_stage))
    comparison = compared_runs(args.compare)
    if comparison is not None:
        texts.append(format_comparison(comparison))
    if args.log and args.stock_log:
        learned, stock = last_validation_loss(args.log), last_validation_loss(args.stock_log)
        texts.append(
            f"validation loss on the held-out target, equal tokens\n"
            f"  stock trainer            {stock:.4f}\n"
            f"  data weighting model     {learned:.4f}   ({learned - stock:+.4f})\n"
            f"mean step time, DWM over stock: "
            f"{mean_step_seconds(args.log) / mean_step_seconds(args.stock_log):.2f}"
        )
    last = list(by_stage.values())[-1] if by_stage else {}
    good = {name: last[name] for name in args.good_domains or () if name in last}
    if args.bad_domain in last and good:
        bad = last[args.bad_domain]
        lowest = min(good, key=good.__getitem__)
        texts.append(
            f"the known-bad domain '{args.bad_domain}' ends at mean weight {bad:.3f}, "
            f"{'below' if bad < good[lowest] else 'NOT below'} every good domain "
            f"(lowest: {lowest}, {good[lowest]:.3f})"
        )
    if args.plot:
        lines = [] if path is None else list(iterate_log(path))
        draw(args.plot, comparison, domain_weights_over_run(lines))
    return "\n\n".join(texts)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", help="the --save folder of a run with --dwm")
    parser.add_argument("--log", help="what the trainer printed in that run")
    parser.add_argument("--stock-log", help="what the stock trainer printed on the same data")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=LOG",
        help="a run's name and what its trainer printed; once for each run, the baseline first",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw it as well (needs matplotlib)")
    parser.add_argument("--bad-domain", default="corrupt", help="a domain that is known to be bad")
    parser.add_argument("--good-domains", nargs="+", help="domains that it should end below")
    args = parser.parse_args(argv)
    try:
        print(report(args))
    except (DWMError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
