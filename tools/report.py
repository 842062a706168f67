#!/usr/bin/env python
"""Reports what a run's data weighting model preferred, and how the run did against another.

python tools/report.py --run RUN [--log RUN.log] [--stock-log STOCK.log] [--bad-domain corrupt]

RUN is the run's --save folder with `dwm_log.jsonl` and its older parts; the logs are what the
trainer printed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys

from megatron_dwm.errors import DWMError
from megatron_dwm.logs.log_file import FILE_NAME, iterate_log, parts
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


def report(args: argparse.Namespace) -> str:
    """Returns the whole report as text."""
    path = os.path.join(args.run, FILE_NAME)
    if not parts(path):
        raise DWMError(f"{path}: no such file; --run is the --save folder of a run with --dwm")
    try:
        by_stage = domain_weights_by_stage(iterate_log(path))
    except DWMError as error:
        raise DWMError(f"{path}: {error}") from None
    texts = [format_table(by_stage)]
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
    return "\n\n".join(texts)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="the --save folder of a run with --dwm")
    parser.add_argument("--log", help="what the trainer printed in that run")
    parser.add_argument("--stock-log", help="what the stock trainer printed on the same data")
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
