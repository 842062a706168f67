r"""Calculates what weighting will cost a run, from its flags alone: no rank is started.

    megatron-dwm plan --world-size 1024 pretrain_gpt.py YOUR FLAGS \
        --dwm --dwm-meta-data-path data/meta_text_document

takes the same arguments as `megatron-dwm train`, and runs on any machine. It prints what a plain
step and a meta step add to the stock trainer's step: arithmetic by pass, bytes that a rank sends by
process group, memory that it keeps and what for, and time in stock steps per step, from arithmetic
and idle pipeline stages. With `--dwm-estimator auto`, both estimators are shown, the chosen one
first. Lines at the end say what the run itself would refuse; data files are not read.

Exit code 0: the run would start; 1: it would be refused; 2: no plan can be made from its flags.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from typing import Any

from megatron_dwm.cli.command import completed, new_parser, print_json
from megatron_dwm.config.flags import add_dwm_args
from megatron_dwm.errors import DWMError

_WIDTH = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    _add_own(parser)
    parser.add_argument("script", metavar="SCRIPT", nargs="?", help="your script; it is not run")
    parser.add_argument("words", metavar="...", nargs=argparse.REMAINDER, help="its flags")
    add_dwm_args(parser)


def _add_own(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="ranks of the run; default: WORLD_SIZE"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        parser = new_parser("plan", __doc__)
        add_arguments(parser)
        parser.parse_args(words or ["--help"])
    own = argparse.ArgumentParser(prog="megatron-dwm plan", add_help=False, allow_abbrev=False)
    _add_own(own)
    given, rest = own.parse_known_args(words)
    if rest and not rest[0].startswith("-"):
        rest = rest[1:]
    return completed("plan", lambda: _plan(given, rest))


def _plan(given: argparse.Namespace, words: list[str]) -> int:
    size = _world_size(given.world_size)
    # The host and Megatron print lines here that belong to a real run.
    with contextlib.redirect_stderr(io.StringIO()):
        from megatron_dwm.hosts import cpu

        try:
            cpu.install()
        except (RuntimeError, ValueError) as error:
            raise DWMError(str(error)) from None
        from megatron_dwm.hosts.megatron_lm.planned import planned
    plan = planned(words, size).plan()
    if given.json:
        print_json(plan)
    else:
        print("\n".join(table(plan)))
    return int(bool(plan["refused"]))


def _world_size(given: int | None) -> int:
    if given is None:
        word = os.environ.get("WORLD_SIZE")
        if word is None:
            raise DWMError("--world-size is missing: how many ranks will the run have?")
        if not word.isdigit():
            raise DWMError(f"WORLD_SIZE is '{word}'; give --world-size N")
        given = int(word)
    if given < 1:
        raise DWMError(f"--world-size {given}; it must be 1 or more")
    return given


# ------------------------------------------------------------------------------------ the table


def table(plan: dict[str, Any]) -> list[str]:
    """Returns the lines of a plan for a reader."""
    model, layout, batch = plan["model"], plan["layout"], plan["batch"]
    lines = [
        f"model    {_count(model['parameters'])} parameters, "
        f"{_count(model['active_parameters'])} of them for a token",
        f"layout   {_layout(layout)}",
        f"step     {batch['samples']} samples of {batch['seq']} tokens in "
        f"{batch['micro_batches']} micro-batches; {plan['stock']['flops']:.3g} FLOPs",
    ]
    methods = plan["methods"]
    if methods:
        every = plan["meta_steps"]["interval"]
        lines.append(
            f"meta     {batch['meta_samples']} samples in {batch['meta_micro_batches']} "
            f"micro-batches, every {every} steps; estimator {methods[0]['estimator']}: "
            f"{plan['chosen']}"
        )
    columns = [plan["plain"], *methods]
    names = ["every step", *(f"{m['estimator']}, {m['lookahead']}" for m in methods)]
    head = ["", "plain step", *["meta step"] * len(methods)]
    lines += ["", _row(head), _row(["", *names])]
    passes = list(dict.fromkeys(n for c in columns for n in c["flops"]["total"]))
    lines.append("FLOPs added, as a share of a stock step's")
    for name in passes:
        shares = [c["flops"]["share_of_stock"].get(name) for c in columns]
        lines.append(_row([f"  {name}", *map(_share, shares)]))
    sums = [sum(c["flops"]["share_of_stock"].values()) for c in columns]
    lines.append(_row(["  all", *map(_share, sums)]))
    lines.append("time, in stock steps per step")
    lines.append(_row(["  this step", *(f"{c['stock_steps']:.3f}" for c in columns)]))
    if methods:
        for words, key in (
            (f"  mean of {plan['meta_steps']['interval']} steps", "stock_steps"),
            ("  mean of the run", "stock_steps_of_run"),
        ):
            lines.append(_row([words, "", *(f"{m['average'][key]:.3f}" for m in methods)]))
    lines.append("bytes added that a rank sends (in the stage that sends most)")
    for group in dict.fromkeys(g for c in columns for g in c["sent"]["most"]):
        lines.append(_row([f"  {group}", *(_bytes(c["sent"]["most"].get(group)) for c in columns)]))
    lines += _memory(plan, columns)
    for note in plan["notes"]:
        lines.append(f"note: {note}")
    if plan["left_to_the_script"]:
        lines.append(
            f"note: left to your script, as neither Megatron nor megatron_dwm knows them: "
            f"{' '.join(plan['left_to_the_script'])}"
        )
    lines.append("")
    lines += [f"refused: {line}" for line in plan["refused"]] or [
        "nothing is refused (data files are not read)"
    ]
    return lines


def _memory(plan: dict[str, Any], columns: list[dict[str, Any]]) -> list[str]:
    """Returns the memory of each stage, and what that of the fullest one consists of."""
    stock = plan["stock"]["bytes_by_stage"]
    lines = ["memory kept beyond the trainer's, by rank of a stage"]
    sums = [[sum(of_stage.values()) for of_stage in c["kept"]] for c in columns]
    groups: list[list[int]] = []
    for stage in range(len(stock)):
        same = groups and all(s[stage] == s[groups[-1][0]] for s in sums)
        if same and stock[stage] == stock[groups[-1][0]]:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    for group in groups:
        named = str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}"
        words = f"  stage {named} (has {_bytes(stock[group[0]])})"
        lines.append(_row([words, *(_bytes(s[group[0]]) for s in sums)]))
    most = [max(range(len(s)), key=s.__getitem__) for s in sums]
    parts = dict.fromkeys(n for c in columns for of_stage in c["kept"] for n in of_stage)
    for part in parts:
        found = [c["kept"][k].get(part) for c, k in zip(columns, most, strict=True)]
        lines.append(_row([f"    {part}", *map(_bytes, found)]))
    return lines


def _row(cells: list[str]) -> str:
    first, *rest = cells
    return (f"{first:<{_WIDTH + 8}}" + "".join(f"{cell:>28}" for cell in rest)).rstrip()


def _layout(layout: dict[str, Any]) -> str:
    names = {"tp": "TP", "pp": "PP", "vp": "virtual", "cp": "CP", "dp": "DP"}
    found = [f"{word} {layout[key]}" for key, word in names.items() if layout[key] > 1]
    text = f"{' x '.join(found) or 'one rank'}"
    if layout["ep"] > 1:
        text += f", EP {layout['ep']}"
    return f"{text}: {layout['world_size']} ranks"


def _count(number: float) -> str:
    for size, word in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f}{word}"
    return f"{number:.0f}"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _bytes(size: float | None) -> str:
    if size is None:
        return ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
