#!/usr/bin/env python
"""What weighting gains: every policy compared with uniform weights, on the real trainer.

    python benchmarks/quality.py [--small] [--jobs 2]

builds the data, trains every arm of every regime, and prints a table. It can be stopped at any
time: a finished run is kept in --out, and a second call takes the others. Regimes:

    a  shuffled  half of the samples are prose with its tokens shuffled
    b  noise     OCR errors, boilerplate, near-duplicates, wrong language: 15% in all
    c  target    clean domains, one of them the target's
    d  nothing   nothing to gain
    e  scarce    as c, with so little of the target's domain that it is read many times

The loss is that on held-out prose, on the same samples at every evaluation. `--only a/head/1` (or
`shuffled/head`, or `a`) takes some of the runs; `--variant 'head-16=head --dwm-meta-interval 16'`
adds an arm with other flags; `--tune` compares learning rates; `--table` tabulates what is there.
`--timing` measures the cost of each arm in separate runs: do nothing else at the same time.
`--known benchmarks/quality.json` continues from the results that are kept with the project.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from quality import data, figures, plan, plots, runner, tables  # noqa: E402 - the path must be set first


def get_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=plan.SIZES, default="toy", help="17m is for a GPU")
    add("--small", action="store_true", help="fewer arms, shorter runs: 20 minutes on two cores")
    add("--tune", action="store_true", help="uniform and head at three learning rates")
    add("--more", action="store_true", help="arms beyond the main ones: more policies, transfer")
    add("--timing", action="store_true", help="what each arm costs; alone on the machine")
    add("--only", nargs="+", default=[], metavar="REGIME[/ARM[/SEED]]", help="some of the runs")
    add("--variant", nargs="+", default=[], metavar="NAME=ARM FLAGS", help="more arms")
    add("--variant-seeds", type=int, default=1, help="seeds of each variant, default 1")
    add("--variant-regimes", nargs="+", choices=plan.REGIMES, default=["shuffled"])
    add("--jobs", type=int, default=1, help="runs at a time, default 1")
    add("--steps", type=int, help="steps of a run; an --out of its own is best")
    add("--lr", type=float, help="highest learning rate")
    add("--micro-batch", type=int, help="samples of a micro-batch")
    add("--out", type=Path, default=Path("quality_out"), help="where all of it goes")
    add("--corpus", type=Path, help="a finished corpus; default: it is built in --out")
    add("--data", action="store_true", help="build the data only")
    add("--list", action="store_true", help="name the runs and whether they are done")
    add("--table", action="store_true", help="train nothing, tabulate what is there")
    add("--write", action="store_true", help="put table, plot and results beside this script too")
    add("--known", type=Path, metavar="FILE", help="results that --write has put there: not again")
    return parser.parse_args(argv)


def planned(args: argparse.Namespace, size: plan.Size) -> list[plan.Run]:
    """Returns the runs that are asked for."""
    if args.variant:
        runs = plan.variants(size, args.variant, args.variant_seeds, args.variant_regimes)
    elif args.more:
        runs = plan.more_plan(size, args.variant_seeds, args.variant_regimes)
    elif args.timing:
        runs = plan.timing_plan(size)
    elif args.tune:
        runs = plan.tuning_plan(size)
    else:
        runs = plan.small_plan(size) if args.small else plan.full_plan(size)
    return [run for run in runs if run.chosen(args.only)]


def check(args: argparse.Namespace, size: plan.Size) -> None:
    """Raises `ValueError` for what cannot work."""
    if args.timing and (args.jobs > 1 or args.variant or args.tune or args.list or args.table):
        raise ValueError("--timing goes with none of --jobs, --variant, --tune, --list and --table")
    for name in ("jobs", "variant_seeds", "steps", "lr", "micro_batch"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if size.steps < plan.EVALUATIONS:
        raise ValueError(f"--steps is {size.steps}; {plan.EVALUATIONS} evaluations need as many")
    if size.batch % size.micro_batch:
        raise ValueError(
            f"--micro-batch is {size.micro_batch}; it must divide the batch of {size.batch}"
        )


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = get_args(argv)
    # As an exit, so that the runs under way end with this command.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    size = plan.SIZES[args.size]
    if args.small:
        size = plan.scaled(size, steps=plan.SMALL_STEPS)
    size = plan.scaled(size, steps=args.steps, lr=args.lr, micro_batch=args.micro_batch)
    name = f"{args.size}-small" if args.small else args.size
    out = args.out.resolve()
    place = runner.Place(out / name / "runs", out / name / "work", out / name / "data")
    try:
        check(args, size)
        runs = planned(args, size)
        if args.known:
            runner.take_over(place, args.known, size)
        if not runs:
            raise ValueError(f"--only {' '.join(args.only)} names none of the runs; see --list")
        if args.table:
            tabulate(place, name, args.write)
            return 0
        if args.list:
            for run in runs:
                done = place.result(run).exists()
                print(f"{run.key:40} {run.steps} steps{'  done' if done else ''}")
            return 0
        corpus = data.prepare(place.data, args.corpus, size)["corpus"]
        if args.data:
            return 0
        runs_at = runner.Place(place.timing, place.work, place.data) if args.timing else place
        failed = runner.take(runs_at, size, runs, corpus, args.jobs)
        if not args.timing:
            tabulate(place, name, args.write)
    except (data.DataError, runner.RunError, ValueError, OSError) as error:
        print(f"quality: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quality: stopped; the same command goes on", file=sys.stderr)
        return 130
    return int(failed > 0)


def tabulate(place: runner.Place, name: str, write: bool) -> None:
    """Prints the tables of all results, and writes table and plot."""
    found = runner.read_all(place.runs)
    if not found:
        raise ValueError(f"no results in {place.runs}; run without --table first, or give --out")
    timing = runner.read_all(place.timing)
    results = figures.Results(found, timing)
    text = tables.report(results)
    print(text)
    targets = [place.runs.parent / "quality.md"]
    if write:
        targets.append(
            Path(__file__).with_name("quality.md" if name == "toy" else f"quality_{name}.md")
        )
    for target in targets:
        picture = target.with_suffix(".png")
        target.write_text(
            f"# benchmarks/quality.py, size {name}\n\n![curves]({picture.name})\n\n{text}"
        )
        if target.parent == Path(__file__).parent:
            runner.keep(found, timing, target.with_suffix(".json"))
        try:
            plots.draw(results, picture)
        except ImportError as error:
            print(f"quality: no plot ({error}); install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
