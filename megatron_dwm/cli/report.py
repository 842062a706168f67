"""Reports what a run's data weighting model preferred, and how runs did against each other.

    megatron-dwm report --run runs/dwm
    megatron-dwm report --run runs/dwm --log dwm.log --stock-log stock.log --bad-domain corrupt
    megatron-dwm report --compare stock=stock.log --compare DWM=dwm.log --plot report.png

RUN is the run's --save folder with `dwm_log.jsonl` and its older parts; the logs are what the
trainer printed. All runs of --compare are set against the first, at equal tokens and at equal time.
The plot shows their validation losses over both, and the weights of RUN's domains.
Exit code 0: done, 2: bad input.
"""

from __future__ import annotations

import argparse

from megatron_dwm.cli.command import completed, new_parser, print_json
from megatron_dwm.errors import DWMError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add = parser.add_argument
    add("--run", metavar="RUN", help="the --save folder of a run with --dwm")
    add("--log", metavar="FILE", help="what the trainer printed in that run")
    add("--stock-log", metavar="FILE", help="what the stock trainer printed on the same data")
    add(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=LOG",
        help="a run's name and what its trainer printed; once for each run, the baseline first",
    )
    add("--plot", metavar="FILE.png", help="draw it as well (needs matplotlib)")
    add("--bad-domain", default="corrupt", help="a domain that is known to be bad")
    add("--good-domains", nargs="+", default=[], help="domains that it should end below")
    add("--json", action="store_true", help="print one JSON object")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = new_parser("report", __doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    return completed("report", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Reads, prints, and draws the plot where one is asked for.

    Raises:
        DWMError: What is given cannot be reported.
    """
    if args.run is None and not args.compare:
        raise DWMError("there is nothing to report; give --run RUN, or --compare NAME=LOG, or both")
    from megatron_dwm.logs import summary

    if args.plot:
        from megatron_dwm.logs.plot import check_plot, domain_weights_over_run, draw

        check_plot(args.plot)
    log = None if args.run is None else summary.step_log(args.run)
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
    if args.json:
        print_json(found.figures())
    else:
        print(found.text())
