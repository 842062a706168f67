"""build_demo_corpus.py: corruption, splits and the whole build on a made-up table of domains."""

import base64
import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import build_demo_corpus  # noqa: E402
from demo_corpus import corruption, splits  # noqa: E402
from demo_corpus.build import Arguments, CorpusBuilder  # noqa: E402
from demo_corpus.packages import Package, PackageError  # noqa: E402
from demo_corpus.readers import Document  # noqa: E402
from demo_corpus.recipes import DOMAINS, Domain, Source  # noqa: E402

# --- corruption -------------------------------------------------------------------------------

TEXT = "It was the best of times,\nit was the worst of times.\n\nIt was the age of wisdom. " * 8


def test_shuffle_keeps_words_and_white_space():
    out = corruption.shuffle_words(TEXT, random.Random(0))
    assert out != TEXT
    assert sorted(out.split()) == sorted(TEXT.split())
    assert [c for c in out if c.isspace()] == [c for c in TEXT if c.isspace()]


def test_noise_changes_a_quarter_of_the_characters():
    out = corruption.add_character_noise(TEXT, random.Random(0))
    assert len(out) == len(TEXT)
    visible = [(a, b) for a, b in zip(TEXT, out, strict=True) if not a.isspace()]
    assert 0.2 < sum(a != b for a, b in visible) / len(visible) < 0.3
    assert all(a == b for a, b in zip(TEXT, out, strict=True) if a.isspace())


def test_loop_repeats_a_phrase_of_the_text():
    out = corruption.loop(TEXT, random.Random(0))
    assert 0.9 * len(TEXT) < len(out) <= len(TEXT)
    assert any(out.startswith(out[:n] * 3) for n in range(5, 200))
    assert corruption.loop("one", random.Random(0)) == "one"


def test_base64_decodes_to_the_text():
    assert base64.b64decode(corruption.encode_base64("naïve", random.Random(0))).decode() == "naïve"


def test_cut_paragraphs_keeps_all_text():
    text = "\n\n".join(["short", "line\n" * 50, "w " * 300, "x" * 500])
    pieces = corruption.cut_paragraphs(text, 200)
    assert max(map(len, pieces)) <= 200
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_corrupt_is_seeded_bounded_and_mixed():
    documents = [(str(i), TEXT + str(i)) for i in range(100)]
    first = list(corruption.corrupt(documents, 20_000, seed=1))
    assert first == list(corruption.corrupt(documents, 20_000, seed=1))
    assert first != list(corruption.corrupt(documents, 20_000, seed=2))
    size = sum(len(text.encode()) for _, _, text in first)
    assert 20_000 <= size < 22_000
    assert {kind for _, kind, _ in first} == set(corruption.CORRUPTIONS)


# --- splits -----------------------------------------------------------------------------------


def test_hash_split_is_stable_and_near_its_share():
    documents = [Document(str(i), "t") for i in range(4000)]
    held_out = [d for d in documents if splits.is_held_out("x", d, ())]
    assert 0.04 < len(held_out) / len(documents) < 0.06
    # Pinned: another value would move documents between the splits of existing corpora.
    assert splits.stable_hash("split", "x", "1") == pytest.approx(0.36318155802835617)
    # Named groups replace the hash.
    assert splits.is_held_out("x", Document("emma/1", "t", "emma"), ("emma",))
    assert not splits.is_held_out("x", held_out[0], ("emma",))


def test_groups_are_not_torn():
    for i in range(300):
        parts = [Document(f"{i}-{part}", "t", str(i)) for part in range(3)]
        assert len({splits.is_held_out("x", part, ()) for part in parts}) == 1


def test_cap_and_order():
    documents = [Document(str(i), "é" * 50) for i in range(100)]
    taken = splits.in_hash_order("x", documents, 1000)
    assert len(taken) == 10
    assert taken == splits.in_hash_order("x", reversed(documents), 1000)
    huge = [*documents, Document("huge", "a" * 10_000)]
    assert splits.in_hash_order("x", huge, 1000) == taken


def test_halves_are_disjoint_and_balanced():
    size = {str(i): i * i for i in range(41)}
    a, b = splits.halves(size, size)
    assert set(a) | set(b) == set(size)
    assert not set(a) & set(b)
    assert abs(sum(size[i] for i in a) - sum(size[i] for i in b)) < 50


def test_clean():
    assert splits.clean(" a\r\nb\rc\x00\x1b\fd\t \ud800") == "a\nb\nc\nd"


# --- the build --------------------------------------------------------------------------------


def numbered(prefix, count, words=40):
    def read(root):
        for i in range(count):
            rng = random.Random(f"{prefix}{i}")
            text = " ".join(f"{prefix}{rng.randint(0, 999)}" for _ in range(words))
            yield Document(f"d{i}", text)
        yield Document("repeat", text)
        yield Document("short", "x")

    return read


TABLE = (
    Domain("speeches", (Source("one", numbered("a", 400), "free", version="1"),), prose=True),
    Domain("books", (Source("two", numbered("b", 300), "free", version="2"),), prose=True),
    Domain("code", (Source("three", numbered("c", 50), "MIT", version="3"),)),
    Domain("html", (Source("four-[0-9]+", numbered("d", 50), "GPL", debian=True),)),
)
ALL = ("speeches", "books", "code", "html", "corrupt")


def fake_fetch(source, cache):
    if source.debian:
        raise PackageError("apt-cache knows no such package")
    return Package(source.package, source.version, cache)


def build(out, arguments=None, fetch=fake_fetch):
    builder = CorpusBuilder(arguments or Arguments(ALL), out, out / "cache", fetch, TABLE)
    return builder, builder.build()


def read(out, name):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def test_build_writes_disjoint_splits_and_a_true_manifest(tmp_path):
    builder, manifest = build(tmp_path)
    assert set(manifest["files"]) == {
        *(f"{split}/{d}.jsonl" for split in ("train", "heldout") for d in ALL[:3]),
        "train/corrupt.jsonl",
        "target/meta.jsonl",
        "target/valid.jsonl",
    }
    texts = {}
    for name, entry in manifest["files"].items():
        table = read(tmp_path, name)
        assert len(table) == entry["documents"] > 0
        assert sum(len(row["text"].encode()) for row in table) == entry["text_bytes"]
        assert len({row["id"] for row in table}) == len(table)
        texts[name] = {row["text"] for row in table}
    held_out = texts["heldout/speeches.jsonl"] | texts["heldout/books.jsonl"]
    meta, valid = texts["target/meta.jsonl"], texts["target/valid.jsonl"]
    assert meta | valid == held_out
    assert not meta & valid
    for name in manifest["files"]:
        if name.startswith("train/"):
            assert not texts[name] & (held_out | texts["heldout/code.jsonl"])
    assert len(texts["train/speeches.jsonl"] | texts["heldout/speeches.jsonl"]) == 400
    assert any("html: without four" in note for note in manifest["notes"])
    assert manifest["licences"]["code"] == ["three 3: MIT"]
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest


def test_corrupt_comes_from_training_prose_alone_and_is_as_large_as_a_domain(tmp_path):
    _, manifest = build(tmp_path)
    train = {
        row["id"] for name in ("speeches", "books") for row in read(tmp_path, f"train/{name}.jsonl")
    }
    corrupt = read(tmp_path, "train/corrupt.jsonl")
    assert {row["source"] for row in corrupt} <= train
    assert {row["corruption"] for row in corrupt} == set(corruption.CORRUPTIONS)
    good = manifest["files"]["train/speeches.jsonl"]["text_bytes"]
    assert 0.5 < manifest["files"]["train/corrupt.jsonl"]["text_bytes"] / good < 1.5


def test_build_is_deterministic(tmp_path):
    _, first = build(tmp_path / "a")
    _, second = build(tmp_path / "b")
    assert first == second


def test_cap_bounds_the_training_part(tmp_path):
    _, manifest = build(tmp_path, Arguments(ALL, max_mb_per_domain=0.03))
    for name, entry in manifest["files"].items():
        if name.startswith("train/"):
            assert entry["text_bytes"] <= 31_000


def test_complete_corpus_is_recognised_until_something_differs(tmp_path):
    builder, _ = build(tmp_path)
    assert builder.is_complete()
    assert not CorpusBuilder(Arguments(ALL, seed=5), tmp_path, tmp_path).is_complete()
    with open(tmp_path / "train/code.jsonl", "a") as file:
        file.write("\n")
    assert not builder.is_complete()
    (tmp_path / "manifest.json").write_text("{")
    assert not builder.is_complete()


def test_rebuild_removes_files_of_the_earlier_build(tmp_path):
    build(tmp_path)
    build(tmp_path, Arguments(("speeches",)))
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == ["speeches.jsonl"]
    assert read(tmp_path, "target/meta.jsonl")


def test_missing_python_package_is_fatal(tmp_path):
    def no_fetch(source, cache):
        raise PackageError("pip cannot download one==1")

    with pytest.raises(PackageError, match="pip cannot"):
        build(tmp_path, fetch=no_fetch)
    assert not (tmp_path / "manifest.json").exists()


# --- the command ------------------------------------------------------------------------------


def test_table_of_domains():
    names = [domain.name for domain in DOMAINS]
    assert len(set(names)) == len(names)
    for domain in DOMAINS:
        for source in domain.sources:
            assert source.licence
            assert source.debian != bool(source.version)
            assert source.debian or source.installed or len(source.sha256) == 64


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--domains", "speeches", "nosuch"], "--domains nosuch: unknown. Choose from speeches"),
        (["--domains", "code"], "no prose domain"),
        (["--domains", "speeches", "html", "--no-apt"], "--domains html: only from Debian"),
        (["--max-mb-per-domain", "0"], "must be positive"),
    ],
)
def test_usage_errors(tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        build_demo_corpus.main(["--out", str(tmp_path / "c"), *argv])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "c").exists()


def test_command_reports_and_does_nothing_the_second_time(tmp_path, capsys, monkeypatch):
    class Builder(CorpusBuilder):
        def __init__(self, arguments, out, cache):
            super().__init__(arguments, out, cache, fake_fetch, TABLE)

    monkeypatch.setattr(build_demo_corpus, "CorpusBuilder", Builder)
    argv = ["--out", str(tmp_path)]
    assert build_demo_corpus.main(argv) == 0
    out = capsys.readouterr().out
    assert "train/corrupt.jsonl" in out
    assert "note: html: without four" in out
    assert "code: three 3: MIT" in out
    assert build_demo_corpus.main(argv) == 0
    assert "is complete, nothing done" in capsys.readouterr().out
    assert build_demo_corpus.main([*argv, "--force"]) == 0
    assert "Built" in capsys.readouterr().out
