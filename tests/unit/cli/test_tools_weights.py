"""`megatron-dwm weights` on small datasets written byte by byte.

Proves: numbers and domains arrive at the right documents from every format, in the order of the
rows and by document number; every malformed input is one line that names the file and the place;
scores, the best fraction, merge and concat agree with the formulas; nothing is overwritten
without --force. What this file does NOT exercise: damaged weight files (test_damaged_files.py)
and the summaries' numbers (test_weight_file.py).
"""

import gzip
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.cli import weights
from megatron_dwm.data import read_index, weight_sources
from megatron_dwm.data.weight_file import read_weights, write_weights


def make_dataset(prefix, lengths):
    """Writes a pair with one sequence a document and one byte a token."""
    lengths = np.asarray(lengths, "<i4")
    pointers = (np.cumsum(lengths) - lengths).astype("<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 1, len(lengths), len(lengths) + 1)
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    arrays = lengths.tobytes() + pointers.tobytes() + documents.tobytes()
    Path(f"{prefix}.idx").write_bytes(header + arrays)
    Path(f"{prefix}.bin").write_bytes(bytes(int(lengths.sum())))
    return str(prefix)


@pytest.fixture
def prefix(tmp_path):
    return make_dataset(tmp_path / "data", [5, 1, 0, 4])


@pytest.fixture
def small_batches(monkeypatch):
    """Batches of 3 rows and blocks of one line, so that few rows take several."""
    monkeypatch.setattr(weight_sources, "_BATCH_ROWS", 3)
    monkeypatch.setattr(weight_sources, "_BLOCK_BYTES", 1)


def run(*argv):
    return weights.main([str(argument) for argument in argv])


def read(prefix):
    return read_weights(f"{prefix}.weights", read_index(prefix))


def error_line(capsys, *argv):
    """Runs a command that must fail; returns its one line."""
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"megatron-dwm weights \w+: error: [^\n]+\n", captured.err)
    return captured.err


def usage_error(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def domain_of_each(file):
    return [None if d < 0 else file.domain_names[d] for d in file.domains]


# --- make -------------------------------------------------------------------------------------


def sources(folder):
    """The same weights and domains in every format, by row and by document number."""
    (folder / "row.csv").write_text("weight,src\n1,web\n0,\n2.5,code\n1e-3,web\n")
    (folder / "number.csv").write_text(
        'src,document,weight\r\ncode,2,2.5\r\n"web",3,1e-3\r\nweb,0,1\r\n\r\n,1,0\r\n'
    )
    (folder / "bom.csv").write_text("weight,src\n1,web\n0,\n2.5,code\n.001,web", "utf-8-sig")
    rows = [
        {"weight": w, "src": s} for w, s in ((1, "web"), (0, None), (2.5, "code"), (1e-3, "web"))
    ]
    (folder / "row.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbered = [{**row, "document": number} for number, row in enumerate(rows)]
    (folder / "number.jsonl").write_text("\n\n".join(map(json.dumps, reversed(numbered))))
    with gzip.open(folder / "zipped.jsonl.gz", "wt") as file:
        file.write((folder / "row.jsonl").read_text())


@pytest.mark.parametrize(
    "name",
    ["row.csv", "number.csv", "bom.csv", "row.jsonl", "number.jsonl", "zipped.jsonl.gz"],
)
@pytest.mark.parametrize("batches", ["small", "large"])
def test_formats_agree(tmp_path, prefix, name, batches, request):
    if batches == "small":
        request.getfixturevalue("small_batches")
    sources(tmp_path)
    assert run("make", prefix, "--from", tmp_path / name, "--domain-column", "src") == 0
    file = read(prefix)
    assert file.weights.tolist() == np.array([1, 0, 2.5, 1e-3], np.float32).tolist()
    assert domain_of_each(file) == ["web", None, "code", "web"]


def test_many_rows_in_random_order_against_numpy(tmp_path, small_batches):
    rng = np.random.default_rng(0)
    prefix = make_dataset(tmp_path / "data", np.ones(500, int))
    expected = rng.exponential(size=500)
    domains = rng.integers(0, 40, size=500)
    order = rng.permutation(500)
    lines = [f"{d},{float(expected[d])!r},{domains[d]}" for d in order.tolist()]
    path = tmp_path / "w.csv"
    path.write_text("document,quality,topic\n" + "\n".join(lines))
    argv = ("--from", path, "--column", "quality", "--domain-column", "topic")
    assert run("make", prefix, *argv) == 0
    file = read(prefix)
    assert file.weights.tolist() == expected.astype(np.float32).tolist()
    assert domain_of_each(file) == [str(d) for d in domains]


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i8", "u1", ">f8"])
def test_npy(tmp_path, prefix, dtype):
    np.save(tmp_path / "w.npy", np.array([1, 0, 2, 7], dtype))
    assert run("make", prefix, "--from", tmp_path / "w.npy", "--domain", "web") == 0
    file = read(prefix)
    assert file.weights.tolist() == [1, 0, 2, 7]
    assert domain_of_each(file) == ["web"] * 4


def test_integer_domains_in_json(tmp_path, prefix):
    rows = [{"domain": d} for d in (7, 3, None, 7)]
    (tmp_path / "w.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ("--from", tmp_path / "w.jsonl", "--domain-column", "domain", "--domains-only")
    assert run("make", prefix, *argv) == 0
    assert read(prefix).weights.tolist() == [1, 1, 1, 1]
    assert domain_of_each(read(prefix)) == ["7", "3", None, "7"]


def test_default_fills_what_the_file_leaves_out(tmp_path, prefix):
    (tmp_path / "w.csv").write_text("document,weight,domain\n2,3,web\n")
    argv = ("--from", tmp_path / "w.csv", "--default", "0.5", "--domain-column", "domain")
    assert run("make", prefix, *argv) == 0
    assert read(prefix).weights.tolist() == [0.5, 0.5, 3, 0.5]
    assert domain_of_each(read(prefix)) == [None, None, "web", None]


def test_scores(tmp_path, prefix):
    scores = np.array([0.0, -1.0, 2.0, 1.0])
    np.save(tmp_path / "s.npy", scores)
    argv = ("--from", tmp_path / "s.npy", "--scores", "--temperature", "0.7")
    assert run("make", prefix, *argv) == 0
    raw = np.exp(scores / 0.7)
    np.testing.assert_allclose(read(prefix).weights, raw / raw.mean(), rtol=1e-6)
    assert run("make", prefix, *argv[:-2], "--force") == 0
    raw = np.exp(scores)
    np.testing.assert_allclose(read(prefix).weights, raw / raw.mean(), rtol=1e-6)


def test_default_of_scores_is_a_score(tmp_path, prefix):
    (tmp_path / "s.csv").write_text("document,weight\n0,1\n1,1\n2,1\n")
    argv = ("--from", tmp_path / "s.csv", "--scores", "--default", "1")
    assert run("make", prefix, *argv) == 0
    assert read(prefix).weights.tolist() == [1, 1, 1, 1]


def test_top_fraction(tmp_path, prefix):
    np.save(tmp_path / "w.npy", np.array([3, 1, 3, 2]))
    argv = ("--from", tmp_path / "w.npy", "--top-fraction")
    assert run("make", prefix, *argv, "0.75") == 0
    assert read(prefix).weights.tolist() == [3, 0, 3, 2]
    assert run("make", prefix, *argv, "0.25", "--force") == 0
    assert read(prefix).weights.tolist() == [3, 0, 0, 0]


def test_several_datasets(tmp_path, prefix):
    other = make_dataset(tmp_path / "other", [1, 1])
    assert run("make", prefix, other, "--equal", "--domain", "web", "code") == 0
    assert read(prefix).weights.tolist() == [1] * 4
    assert read(prefix).domain_names == ("web",)
    assert read(other).domain_names == ("code",)
    np.save(tmp_path / "a.npy", np.arange(4))
    np.save(tmp_path / "b.npy", np.arange(2) + 5)
    argv = ("--from", tmp_path / "a.npy", tmp_path / "b.npy", "--force")
    assert run("make", prefix, other, *argv) == 0
    assert read(prefix).weights.tolist() == [0, 1, 2, 3]
    assert read(other).weights.tolist() == [5, 6]


def test_replaces_only_with_force(tmp_path, prefix, capsys):
    other = make_dataset(tmp_path / "other", [1, 1])
    assert run("make", other, "--equal") == 0
    before = Path(f"{other}.weights").read_bytes()
    capsys.readouterr()
    assert "other.weights: exists already" in error_line(capsys, "make", prefix, other, "--equal")
    # The first is not made either: a run that fails changes nothing that it need not.
    assert not Path(f"{prefix}.weights").exists()
    assert Path(f"{other}.weights").read_bytes() == before
    assert run("make", prefix, other, "--equal", "--domain", "web", "--force") == 0
    assert Path(f"{other}.weights").read_bytes() != before


def test_output(tmp_path, prefix):
    assert run("make", prefix, "--equal", "--output", tmp_path / "b.weights") == 0
    assert read_weights(tmp_path / "b.weights", read_index(prefix)).documents == 4
    assert not Path(f"{prefix}.weights").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.csv", "", "the column 'weight' is not in the header: -;"),
        ("w.csv", "a,b\n1,2\n", "the column 'weight' is not in the header: a, b;"),
        ("w.csv", "weight,weight\n1,2\n", "'weight' is twice in the header"),
        ("w.csv", "weight,document,document\n1,2,2\n", "'document' is twice in the header"),
        ("w.csv", "weight\n1\nx\n1\n1\n", "line 3: 'weight' is 'x', expected a number"),
        ("w.csv", "weight\n1\n1\n\n1\n", r"no row for document 3 \(1 of the 4 documents of .*data"),
        (
            "w.csv",
            "weight\n1\n1\n1\n1\n1\n",
            "line 6: a row for document 4, but .* has 4 documents",
        ),
        ("w.csv", "weight,b\n1,2\n1\n", "line 3: 1 values, but the header has 2 columns"),
        ("w.csv", "weight,document\n1,0\n1,1\n1,3\n", "no row for document 2"),
        ("w.csv", "weight,document\n1,0\n1,1\n1,3\n1,1\n", "line 5: a second row for document 1"),
        ("w.csv", "weight,document\n1,0\n1,-1\n", "line 3: a row for document -1"),
        ("w.csv", "weight,document\n1,0\n1,9" + "9" * 30 + "\n", "line 3: 'document' is '999"),
        ("w.csv", "weight,document\n1,1.0\n", "'document' is '1.0', expected a document number"),
        ("w.csv", 'weight\n"1\n1\n', "not CSV"),
        ("w.csv", b"weight\n1\n\xff\n", "line 3: not UTF-8"),
        ("w.csv", "weight\n1\n1\nnan\n1\n", "document 2 has the weight nan"),
        ("w.csv", "weight\n1\n1\n1\n-1\n", "document 3 has the weight -1"),
        ("w.csv", "weight\n0\n0\n0\n0\n", "all 4 weights are zero"),
        ("w.jsonl", "1\n", "line 1: a JSON int, expected an object"),
        ("w.jsonl", '{"weight": 1}\n{\n', "line 2: not JSON"),
        ("w.jsonl", '{"weight": 1}\n' + "[" * 100_000, "line 2: not JSON"),
        ("w.jsonl", '{"weight": 1}\n{"w": 2}\n', r"line 2: no key 'weight' \(keys found: w\)"),
        ("w.jsonl", '{"weight": true}\n', "line 1: 'weight' is True, expected a number"),
        ("w.jsonl", '{"weight": "1"}\n', "line 1: 'weight' is '1', expected a number"),
        ("w.jsonl", '{"weight": 1' + "0" * 400 + "}\n", "line 1: 'weight' is 1000+, expected"),
        ("w.jsonl", '{"weight": 1, "document": 0}\n{"weight": 1}', "line 2: no key 'document'"),
        ("w.jsonl", '{"weight": 1}\n{"weight": 1, "document": 0}', "line 2: a key 'document'"),
        ("w.jsonl", '{"weight": 1, "document": 1.0}', "'document' is 1.0, expected a document"),
        ("w.jsonl", "\n\n", "no row for document 0"),
        ("w.jsonl.gz", b"no archive", "damaged or truncated"),
        ("w.npy", b"", "not an .npy file"),
        ("w.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr: garbage", "not an .npy file"),
        ("w.txt", "1\n1\n1\n1\n", "the name does not tell the format"),
        ("w", "1\n", "the name does not tell the format"),
    ],
)
@pytest.mark.parametrize("batches", ["small", "large"])
def test_malformed_source(tmp_path, prefix, capsys, request, name, content, message, batches):
    if batches == "small":
        request.getfixturevalue("small_batches")
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = error_line(capsys, "make", prefix, "--from", path)
    assert re.search(message, line), line
    assert str(path) in line or "data.weights" in line
    assert not Path(f"{prefix}.weights").exists()


def test_doubled_rows_are_refused_with_a_default_too(tmp_path, prefix, capsys):
    (tmp_path / "w.csv").write_text("weight,document\n1,2\n1,2\n")
    line = error_line(capsys, "make", prefix, "--from", tmp_path / "w.csv", "--default", "1")
    assert "line 3: a second row for document 2" in line


def test_npy_of_other_shapes(tmp_path, prefix, capsys):
    path = tmp_path / "w.npy"
    for array in (np.ones(3), np.ones((4, 1)), np.array(list("abcd")), np.ones(4, complex)):
        np.save(path, array)
        line = error_line(capsys, "make", prefix, "--from", path)
        assert "expected one number for each of the 4 documents" in line
    np.save(path, np.array([{}] * 4), allow_pickle=True)
    assert "not an .npy file" in error_line(capsys, "make", prefix, "--from", path)
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(4))
    assert "an archive of arrays" in error_line(capsys, "make", prefix, "--from", path)
    np.save(path, np.ones(4))
    path.write_bytes(path.read_bytes()[:-1])
    assert "not an .npy file" in error_line(capsys, "make", prefix, "--from", path)
    np.save(path, np.ones(4))
    line = error_line(capsys, "make", prefix, "--from", path, "--domain-column", "a")
    assert "has no domains" in line


def test_sources_that_are_not_there(tmp_path, prefix, capsys):
    assert "no such file" in error_line(capsys, "make", prefix, "--from", tmp_path / "no.csv")
    assert "a folder" in error_line(capsys, "make", prefix, "--from", tmp_path)
    line = error_line(capsys, "make", tmp_path / "no", "--equal")
    assert "no.idx: no such file" in line


def test_bad_scores_name_the_file_and_the_document(tmp_path, prefix, capsys):
    np.save(tmp_path / "s.npy", np.array([0, 0, np.inf, 0]))
    line = error_line(capsys, "make", prefix, "--from", tmp_path / "s.npy", "--scores")
    assert "s.npy: document 2 has the score inf" in line


def test_empty_dataset(tmp_path, capsys):
    prefix = make_dataset(tmp_path / "data", [])
    assert "weights are zero" in error_line(capsys, "make", prefix, "--equal")
    line = error_line(capsys, "make", prefix, "--equal", "--top-fraction", "1")
    assert "data.idx" in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--from --equal is required"),
        (["--equal", "--from", "a.csv"], "not allowed with"),
        (["--from", "a.csv", "b.csv"], "2 files for 1 datasets"),
        (["--equal", "--domain", "a", "b"], "2 names for 1 datasets"),
        (["--equal", "--column", "a"], "--column: needs --from"),
        (["--equal", "--default", "0"], "--default: needs --from"),
        (["--equal", "--scores"], "--scores: needs --from"),
        (["--from", "a.csv", "--temperature", "1"], "--temperature: needs --scores"),
        (["--from", "a.csv", "--scores", "--temperature", "0"], "--temperature 0.0: must be"),
        (["--from", "a.csv", "--top-fraction", "0"], "--top-fraction 0.0: must be"),
        (["--from", "a.csv", "--default", "nan"], "--default nan: must be finite"),
        (["--from", "a.csv", "--domains-only"], "--domains-only: name the column"),
        (["--from", "a.csv", "--domain", "a", "--domain-column", "b"], "give one of them"),
        (["--equal", "--output", "data.idx"], "ends in .weights"),
        (
            ["--from", "a.csv", "--domain-column", "b", "--domains-only", "--scores"],
            "--scores: --domains-only reads no numbers",
        ),
    ],
)
def test_flags_that_do_not_go_together(prefix, capsys, argv, message):
    assert message in usage_error(capsys, "make", prefix, *argv)


# --- inspect ----------------------------------------------------------------------------------


def test_inspect_json(prefix, capsys):
    index = read_index(prefix)
    domains = np.array([0, 1, 1, -1])
    write_weights(f"{prefix}.weights", np.array([1, 2, 0, 1]), index, domains, ["web", "code"])
    for name in (prefix, f"{prefix}.weights"):
        assert run("inspect", name, "--json") == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["path"] == f"{prefix}.weights"
        assert (summary["documents"], summary["tokens"], summary["zero_share"]) == (4, 10, 0.25)
        assert summary["effective_sample_size"] == pytest.approx(16 / 6 / 4)
        assert [row["tokens"] for row in summary["domains"]] == [5, 1, 4]
        # Weight times tokens: 5, 2 and 4 of 11.
        shares = [row["expected_token_share"] for row in summary["domains"]]
        assert shares == pytest.approx([5 / 11, 2 / 11, 4 / 11])


def test_inspect_text(prefix, capsys):
    index = read_index(prefix)
    file = write_weights(
        f"{prefix}.weights", np.array([1, 2, 0, 1]), index, np.array([0, 1, 1, -1]), ["web", "code"]
    )
    assert run("inspect", prefix) == 0
    out = capsys.readouterr().out
    assert file.digest in out
    assert re.search(r"^share of zero weights +25\.00%$", out, re.M)
    assert re.search(r"^code +2 +1 +50\.00% +18\.18%$", out, re.M)
    assert re.search(r"^\(none\) +1 +4 +25\.00% +36\.36%$", out, re.M)


def test_inspect_many_domains(tmp_path, capsys):
    prefix = make_dataset(tmp_path / "data", [1] * 100)
    write_weights(f"{prefix}.weights", np.arange(100), read_index(prefix), np.arange(100))
    assert run("inspect", prefix) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "and 60 domains of less weight; --json lists all"
    assert lines[-2].split()[0] == "60"


def test_inspect_without_the_dataset(tmp_path, prefix, capsys):
    assert run("make", prefix, "--equal", "--domain", "web") == 0
    moved = tmp_path / "else.weights"
    Path(f"{prefix}.weights").rename(moved)
    capsys.readouterr()
    assert run("inspect", moved) == 0
    assert re.search(r"^web +4 +- +100\.00% +-$", capsys.readouterr().out, re.M)
    assert run("inspect", moved, "--index", prefix) == 0
    assert re.search(r"^web +4 +10 +100\.00% +100\.00%$", capsys.readouterr().out, re.M)


def test_inspect_refuses_weights_of_another_dataset(prefix, capsys):
    assert run("make", prefix, "--equal") == 0
    make_dataset(prefix, [5, 1, 0, 3])
    capsys.readouterr()
    line = error_line(capsys, "inspect", prefix)
    assert "made for 10 tokens, but" in line
    assert "no such file" in error_line(capsys, "inspect", prefix + "x")


# --- merge ------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path, prefix):
    """Two weight files of one dataset, with means 2 and 4, and the prefix."""
    index = read_index(prefix)
    write_weights(tmp_path / "a.weights", np.array([1, 0, 3, 4]), index)
    write_weights(tmp_path / "b.weights", np.array([4, 6, 2, 4]), index)
    return tmp_path / "a.weights", tmp_path / "b.weights"


@pytest.mark.parametrize(
    ("how", "normalised", "as_is"),
    [
        ("mean", [0.75, 0.75, 1, 1.5], [2.5, 3, 2.5, 4]),
        ("product", [0.5, 0, 0.75, 2], [4, 0, 6, 16]),
        ("max", [1, 1.5, 1.5, 2], [4, 6, 3, 4]),
        ("min", [0.5, 0, 0.5, 1], [1, 0, 2, 4]),
    ],
)
def test_merge(prefix, pair, how, normalised, as_is):
    assert run("merge", prefix, *pair, "--how", how) == 0
    assert read(prefix).weights.tolist() == normalised
    assert run("merge", f"{prefix}.weights", *pair, "--how", how, "--no-normalise", "--force") == 0
    assert read(prefix).weights.tolist() == as_is


def test_merge_needs_no_dataset_and_may_replace_its_input(tmp_path, pair):
    for path in tmp_path.glob("data.*"):
        path.unlink()
    before = read_weights(pair[0]).weights.tolist()
    assert run("merge", pair[0], *pair, "--how", "min", "--no-normalise", "--force") == 0
    assert before == [1, 0, 3, 4]
    assert read_weights(pair[0]).weights.tolist() == [1, 0, 2, 4]


def test_merge_takes_domains_from_where_they_are(tmp_path, prefix, pair):
    index = read_index(prefix)
    named = tmp_path / "named.weights"
    other = tmp_path / "other.weights"
    write_weights(named, np.ones(4), index, np.array([1, -1, 0, -1]), ["web", "code"])
    write_weights(other, np.ones(4), index, np.array([-1, 0, 1, -1]), ["books", "web"])
    assert run("merge", prefix, pair[0], named, other, "--how", "product") == 0
    assert domain_of_each(read(prefix)) == ["code", "books", "web", None]


def test_merge_of_bare_numbers(tmp_path, prefix):
    index = read_index(prefix)
    paths = [tmp_path / f"{name}.weights" for name in "abc"]
    write_weights(paths[0], np.ones(4), index, np.array([900, -1, 7, -1]))
    write_weights(paths[1], np.ones(4), index, np.array([-1, 8, 7, -1]))
    write_weights(paths[2], np.ones(4), index, np.array([-1, -1, 0, 1]), ["7", "900"])
    assert run("merge", prefix, *paths[:2], "--how", "max") == 0
    assert read(prefix).domains.tolist() == [900, 8, 7, -1]
    assert read(prefix).domain_names == ()
    # With a file that has names a number is a name.
    assert run("merge", prefix, *paths, "--how", "max", "--force") == 0
    assert domain_of_each(read(prefix)) == ["900", "8", "7", "900"]


def test_merge_refuses(tmp_path, prefix, pair, capsys):
    index = read_index(prefix)
    one, two = tmp_path / "one.weights", tmp_path / "two.weights"
    write_weights(one, np.ones(4), index, np.array([0, 0, 0, 0]), ["web"])
    write_weights(two, np.ones(4), index, np.array([0, 0, 1, 0]), ["web", "code"])
    line = error_line(capsys, "merge", prefix, one, two, "--how", "mean")
    assert "two.weights: document 2 has another domain" in line

    other = make_dataset(tmp_path / "longer", [5, 1, 0, 5])
    write_weights(f"{other}.weights", np.ones(4), read_index(other))
    line = error_line(capsys, "merge", prefix, pair[0], other, "--how", "mean")
    assert "longer.weights: made for 11 tokens" in line and "a.weights for 10" in line

    write_weights(one, np.array([0, 1, 0, 0]), index)
    assert "all 4 weights are zero" in error_line(
        capsys, "merge", prefix, pair[0], one, "--how", "product"
    )
    huge = np.array([3e38, 1, 1, 1], np.float32)
    write_weights(one, huge, index)
    argv = ("merge", prefix, one, one, "--how", "product", "--no-normalise")
    assert "document 0 has the weight inf" in error_line(capsys, *argv)
    assert not Path(f"{prefix}.weights").exists()
    assert "exists already" in error_line(capsys, "merge", pair[0], *pair, "--how", "mean")


# --- concat -----------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path, prefix):
    """Prefixes of the two parts and of their concatenation."""
    second = make_dataset(tmp_path / "second", [2, 3])
    whole = make_dataset(tmp_path / "whole", [5, 1, 0, 4, 2, 3])
    first_index, second_index = read_index(prefix), read_index(second)
    domains = np.array([0, 0, 1, -1])
    write_weights(
        f"{prefix}.weights", np.array([1, 2, 3, 2]), first_index, domains, ["web", "code"]
    )
    write_weights(
        f"{second}.weights", np.array([3, 5]), second_index, np.array([1, 0]), ["math", "web"]
    )
    return prefix, second, whole


def test_concat(parts):
    first, second, whole = parts
    assert run("concat", whole, first, second) == 0
    assert read(whole).weights.tolist() == [1, 2, 3, 2, 3, 5]
    assert domain_of_each(read(whole)) == ["web", "web", "code", None, "web", "math"]
    assert run("concat", whole, first, second, "--normalise", "--force") == 0
    assert read(whole).weights.tolist() == [0.5, 1, 1.5, 1, 0.75, 1.25]


def test_concat_of_parts_with_and_without_domains(parts):
    first, second, whole = parts
    write_weights(f"{second}.weights", np.array([3, 5]), read_index(second))
    assert run("concat", whole, first, second) == 0
    assert domain_of_each(read(whole)) == ["web", "web", "code", None, None, None]
    write_weights(f"{first}.weights", np.array([1, 2, 3, 2]), read_index(first))
    assert run("concat", whole, first, second, "--force") == 0
    assert read(whole).domains is None


def test_concat_needs_no_index_of_the_parts(parts):
    first, second, whole = parts
    for part in (first, second):
        Path(f"{part}.idx").unlink()
    assert run("concat", whole, first, second) == 0
    assert read(whole).weights.tolist() == [1, 2, 3, 2, 3, 5]


def test_concat_refuses(parts, capsys):
    first, second, whole = parts
    line = error_line(capsys, "concat", whole, second, first)
    assert "second.idx: its sequences are not the sequences 0 to 1 of" in line
    line = error_line(capsys, "concat", whole, first)
    assert "whole.idx: 6 documents, but the parts have 4 together" in line
    line = error_line(capsys, "concat", whole, first, second, second)
    assert "not the sequences 6 to 7" in line
    assert "no such file" in error_line(capsys, "concat", whole, first, second + "x")
    assert not Path(f"{whole}.weights").exists()


def test_agrees_with_megatrons_merge_tool(parts):
    """Megatron's builder, as merge_datasets.py uses it, makes the whole that concat expects."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    first, second, whole = parts
    builder = IndexedDatasetBuilder(f"{whole}.bin", np.uint8)
    for part in (first, second):
        builder.add_index(part)
    builder.finalize(f"{whole}.idx")
    assert read_index(whole).documents == 6
    assert run("concat", whole, first, second) == 0
    assert read(whole).weights.tolist() == [1, 2, 3, 2, 3, 5]
