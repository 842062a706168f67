"""Builds the demo corpus: fetch, read, split, corrupt, write, and record in a manifest."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_dwm.files.json_files import JsonError, read_object

from .corruption import corrupt
from .packages import Package, PackageError, fetch
from .readers import Document
from .recipes import DOMAINS, LAMBADA, Domain, Source
from .splits import MIN_CHARS, clean, halves, in_hash_order, is_held_out

# Part of the manifest: a change of what the recipes yield must not pass for a finished corpus.
FORMAT = 1
CORRUPT = "corrupt"
# The held-out part of a domain is capped at this share of the training part's cap.
HELD_OUT_CAP = 0.1

Row = dict[str, str]


@dataclass(frozen=True)
class Arguments:
    """What decides the content of the corpus.

    Attributes:
        domains: Names of domains, `corrupt` included if wanted.
        max_mb_per_domain: Cap on the training part of a domain, in MB of text.
        debian: Use Debian packages where available.
        lambada: Also write LAMBADA as a target.
        seed: Seed of the corruption.
    """

    domains: tuple[str, ...]
    max_mb_per_domain: float = 8.0
    debian: bool = True
    lambada: bool = False
    seed: int = 1234

    def as_json(self) -> dict:
        """The form in the manifest."""
        return {**asdict(self), "domains": list(self.domains)}


class CorpusBuilder:
    """One build of the corpus into a folder."""

    def __init__(
        self,
        arguments: Arguments,
        out: Path,
        cache: Path,
        fetch_package: Callable[[Source, Path], Package] = fetch,
        domains: tuple[Domain, ...] = DOMAINS,
    ):
        """Keeps what to build and where.

        Args:
            arguments: What to build.
            out: Folder of the corpus.
            cache: Folder of downloads.
            fetch_package: Brings a source's package; raises PackageError.
            domains: The table of domains.
        """
        self.arguments = arguments
        self.out = out
        self.cache = cache
        self.notes: list[str] = []
        self._fetch = fetch_package
        self._domains = domains
        self._files: dict[str, dict] = {}
        self._packages: dict[str, dict] = {}
        self._licences: dict[str, list[str]] = {}
        self._seen: set[bytes] = set()

    def is_complete(self) -> bool:
        """Tells whether the folder holds this corpus, judging by arguments and sizes."""
        manifest = read_manifest(self.out)
        if manifest.get("format") != FORMAT:
            return False
        if manifest.get("arguments") != self.arguments.as_json():
            return False
        files = manifest.get("files")
        return isinstance(files, dict) and all(
            isinstance(entry, dict)
            and (self.out / name).is_file()
            and (self.out / name).stat().st_size == entry.get("bytes")
            for name, entry in files.items()
        )

    def build(self, progress: Callable[[Iterable], Iterable] = iter) -> dict:
        """Builds everything.

        Args:
            progress: Wraps the loop over domains, for a progress bar.

        Returns:
            The manifest.

        Raises:
            PackageError: A Python package is not available, or no prose domain yielded text.
        """
        self._remove_old()
        wanted = [d for d in self._domains if d.name in self.arguments.domains]
        prose_train: dict[str, list[Document]] = {}
        prose_held_out: dict[str, list[Document]] = {}
        for domain in progress(wanted):
            train, held_out = self._split(domain)
            if not train:
                continue
            self._write(f"train/{domain.name}.jsonl", domain.name, rows(domain.name, train))
            self._write(f"heldout/{domain.name}.jsonl", domain.name, rows(domain.name, held_out))
            if domain.prose:
                prose_train[domain.name] = train
                prose_held_out[domain.name] = held_out
        if not prose_train:
            raise PackageError("no prose domain yielded text, so there is no target to serve.")
        if CORRUPT in self.arguments.domains:
            self._write_corrupt(prose_train)
        self._write_targets(prose_held_out)
        if self.arguments.lambada:
            self._write_lambada()
        manifest = {
            "format": FORMAT,
            "arguments": self.arguments.as_json(),
            "files": self._files,
            "packages": sorted(self._packages.values(), key=lambda p: p["name"]),
            "licences": self._licences,
            "notes": self.notes,
        }
        write_atomically(
            self.out / "manifest.json", [json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"]
        )
        return manifest

    def _remove_old(self) -> None:
        """Removes the files that an earlier build lists, the manifest first."""
        old = read_manifest(self.out)
        (self.out / "manifest.json").unlink(missing_ok=True)
        for name in old.get("files", {}):
            path = (self.out / name).resolve()
            if path.is_relative_to(self.out.resolve()):
                path.unlink(missing_ok=True)

    def _split(self, domain: Domain) -> tuple[list[Document], list[Document]]:
        train: list[Document] = []
        held_out: list[Document] = []
        for source in domain.sources:
            if package := self._package(domain, source):
                self._licences.setdefault(domain.name, []).append(
                    f"{package.name} {package.version}: {source.licence}"
                )
                for document in self._documents(source, package):
                    is_out = is_held_out(domain.name, document, source.held_out_groups)
                    (held_out if is_out else train).append(document)
        cap = self.arguments.max_mb_per_domain * 1e6
        return (
            in_hash_order(domain.name, train, cap),
            in_hash_order(domain.name, held_out, cap * HELD_OUT_CAP),
        )

    def _package(self, domain: Domain, source: Source) -> Package | None:
        if source.debian and not self.arguments.debian:
            return None
        try:
            package = self._fetch(source, self.cache)
        except PackageError as error:
            if not source.debian:
                raise
            self.notes.append(f"{domain.name}: without {source.package} ({error})")
            return None
        self._packages[package.name] = {
            "name": package.name,
            "version": package.version,
            "registry": "Debian" if source.debian else "PyPI",
            "licence": source.licence,
        }
        return package

    def _documents(self, source: Source, package: Package) -> Iterable[Document]:
        """Cleaned documents; short ones and exact repeats, in whatever domain, are left out."""
        for document in source.reader(package.root):
            text = clean(document.text)
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if len(text) >= MIN_CHARS and digest not in self._seen:
                self._seen.add(digest)
                yield Document(document.key, text, document.group)

    def _write_corrupt(self, prose_train: dict[str, list[Document]]) -> None:
        sizes = sorted(
            sum(len(d.text.encode()) for d in documents) for documents in prose_train.values()
        )
        good = [
            (f"{name}/{document.key}", document.text)
            for name, documents in prose_train.items()
            for document in documents
        ]
        made = corrupt(good, sizes[len(sizes) // 2], self.arguments.seed)
        self._write(
            f"train/{CORRUPT}.jsonl",
            CORRUPT,
            (
                {
                    "text": text,
                    "id": f"{CORRUPT}/{number}",
                    "domain": CORRUPT,
                    "corruption": kind,
                    "source": key,
                }
                for number, (key, kind, text) in enumerate(made)
            ),
        )
        self._licences[CORRUPT] = [f"made from {', '.join(prose_train)}: theirs"]

    def _write_targets(self, prose_held_out: dict[str, list[Document]]) -> None:
        meta: list[Row] = []
        valid: list[Row] = []
        for name, documents in prose_held_out.items():
            by_key = {document.key: document for document in documents}
            size = {key: len(document.text.encode()) for key, document in by_key.items()}
            for half, keys in zip((meta, valid), halves(by_key, size), strict=True):
                half.extend(rows(name, [by_key[key] for key in sorted(keys)]))
        self._write("target/meta.jsonl", "target", meta)
        self._write("target/valid.jsonl", "target", valid)

    def _write_lambada(self) -> None:
        domain = Domain("lambada", (LAMBADA,))
        package = self._package(domain, LAMBADA)
        documents = list(self._documents(LAMBADA, package))
        self._write("target/lambada.jsonl", "lambada", rows("lambada", documents))
        self._licences["lambada"] = [f"{package.name} {package.version}: {LAMBADA.licence}"]

    def _write(self, name: str, domain: str, table: Iterable[Row]) -> None:
        table = list(table)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in table]
        digest = write_atomically(self.out / name, lines)
        self._files[name] = {
            "domain": domain,
            "documents": len(table),
            "text_bytes": sum(len(row["text"].encode()) for row in table),
            "bytes": (self.out / name).stat().st_size,
            "sha256": digest,
        }


def rows(domain: str, documents: Iterable[Document]) -> list[Row]:
    """JSON Lines records of documents."""
    return [{"text": d.text, "id": f"{domain}/{d.key}", "domain": domain} for d in documents]


def read_manifest(out: Path) -> dict:
    """The manifest of a corpus, empty if there is none or it cannot be read."""
    try:
        return read_object(out / "manifest.json")
    except (OSError, JsonError):
        return {}


def write_atomically(path: Path, lines: Iterable[str]) -> str:
    """Writes a file under a temporary name and renames it.

    Args:
        path: The file.
        lines: Its content.

    Returns:
        Its SHA-256.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        for line in lines:
            data = line.encode()
            digest.update(data)
            file.write(data)
    os.replace(partial, path)
    return digest.hexdigest()
