"""The end of a compressed file is the end of its data, or the file is refused.

What is whole is what `zstd -t` and Python's gzip, bz2 and lzma say. Two cases are stricter here
than these modules, because data could be lost unseen: an empty file with the name of a compressed
one, and bytes behind the last stream (bz2 and lzma stop there and do not say so).
"""

import bz2
import gzip
import io
import json
import lzma
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

zstandard = pytest.importorskip("zstandard")


from megatron_dwm.cli import preprocess as preprocess_data  # noqa: E402
from megatron_dwm.cli import tokenizer as train_tokenizer  # noqa: E402
from megatron_dwm.cli import weights  # noqa: E402
from megatron_dwm.errors import InputError  # noqa: E402
from megatron_dwm.files.text_files import TextFile, read_blocks, read_texts  # noqa: E402

FIRST = b"".join(b'{"text": "%d 1 2"}\n' % i for i in range(40))
SECOND = b"".join(b'{"text": "%d 3"}\n' % i for i in range(40, 60))


def zstd(data: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def skippable(data: bytes, number: int = 0) -> bytes:
    """A frame that decoders pass over (RFC 8878, 3.1.2)."""
    magic = (0x184D2A50 + number).to_bytes(4, "little")
    return magic + len(data).to_bytes(4, "little") + data


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
UNPACK = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
SUFFIXES = list(PACK)


def read(path: Path, data: bytes) -> bytes:
    """Returns the content that the tools see."""
    path.write_bytes(data)
    with TextFile(path) as file:
        return b"".join(block for _, block in read_blocks(file, 100))


def refusal(path: Path, data: bytes) -> str:
    """Returns the message of a file that is refused, one line that names it."""
    with pytest.raises(InputError) as refused:
        read(path, data)
    text = str(refused.value)
    assert str(path) in text and "\n" not in text
    return text


# --- every cut ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c.jsonl.zst", "c.txt.zst"])
@pytest.mark.parametrize("options", [{}, {"write_checksum": True}, {"write_content_size": False}])
def test_a_zstd_file_is_whole_at_the_end_of_a_frame_only(tmp_path, name, options):
    first, second = zstd(FIRST, **options), zstd(SECOND, **options)
    whole = first + second
    contents = {len(first): FIRST, len(whole): FIRST + SECOND}
    for cut in range(1, len(whole) + 1):
        path = tmp_path / name
        if cut in contents:
            assert read(path, whole[:cut]) == contents[cut]
        else:
            assert "damaged or truncated" in refusal(path, whole[:cut])


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the program zstd gives the verdict")
def test_the_verdict_is_that_of_zstd(tmp_path):
    first, second = zstd(FIRST, write_checksum=True), zstd(SECOND)
    skipped = skippable(b"a note", 3)
    files = {
        "empty": b"",
        "one": first,
        "two": first + second,
        "an empty frame": zstd(b""),
        "empty frames around": zstd(b"") + first + zstd(b""),
        "skippable": skipped,
        "skippable first": skipped + first,
        "skippable between": first + skipped + second,
        "skippable last": first + skipped,
        "skippable cut": first + skipped[:-1],
        "skippable header cut": first + skipped[:6],
        "garbage behind": first + b"garbage behind the frame",
        "a letter behind": first + b"x",
        "zeros behind": first + bytes(20),
        "checksum wrong": first[:-1] + bytes([first[-1] ^ 1]),
        "a bit wrong": first[:30] + bytes([first[30] ^ 1]) + first[31:],
        "plain text": FIRST,
        "gzip": gzip.compress(FIRST)[:-1],
        **{f"cut at {cut}": (first + second)[:cut] for cut in range(1, 60, 7)},
        **{f"header cut at {cut}": first + second[:cut] for cut in range(1, 10)},
    }
    for what, data in files.items():
        path = tmp_path / "c.jsonl.zst"
        path.write_bytes(data)
        done = subprocess.run(["zstd", "-t", "-q", str(path)], capture_output=True)
        if done.returncode:
            refusal(path, data)
        else:
            plain = subprocess.run(["zstd", "-dc", str(path)], capture_output=True).stdout
            assert read(path, data) == plain, what


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_cut_is_noticed_as_the_modules_notice_it(tmp_path, suffix):
    first, second = PACK[suffix](FIRST), PACK[suffix](SECOND)
    whole = first + second
    accepted = set()
    for cut in range(1, len(whole) + 1):
        try:
            expected = UNPACK[suffix](whole[:cut])
        except (OSError, EOFError, ValueError, lzma.LZMAError):
            expected = None
        # lzma and bz2 themselves take a second stream that is cut in its header for garbage.
        if expected is not None and cut in (len(first), len(whole)):
            assert read(tmp_path / f"c.jsonl{suffix}", whole[:cut]) == expected
            accepted.add(cut)
        else:
            refusal(tmp_path / f"c.jsonl{suffix}", whole[:cut])
    assert accepted == {len(first), len(whole)}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_behind_the_last_stream_are_not_passed_over(tmp_path, suffix):
    path = tmp_path / f"c.jsonl{suffix}"
    for behind in (b"garbage", b"\x01", FIRST):
        assert "damaged or truncated" in refusal(path, PACK[suffix](FIRST) + behind)
    # A flipped bit in the second stream's header must not make the file a shorter one.
    second = bytearray(PACK[suffix](SECOND))
    second[1] ^= 1
    assert "damaged or truncated" in refusal(path, PACK[suffix](FIRST) + second)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_zero_bytes_of_a_tape_may_follow(tmp_path, suffix):
    whole = PACK[suffix](FIRST) + bytes(2048)
    if suffix != ".xz":
        assert UNPACK[suffix](whole) == FIRST
    # Those of the xz format (its specification, 2.2: "Stream Padding") are unknown to lzma.
    assert read(tmp_path / f"c.jsonl{suffix}", whole) == FIRST
    assert read(tmp_path / f"c.jsonl{suffix}", whole + PACK[suffix](SECOND)) == FIRST + SECOND


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_file_is_no_empty_archive(tmp_path, suffix):
    path = tmp_path / f"c.jsonl{suffix}"
    assert "it is empty" in refusal(path, b"")
    assert read(path, PACK[suffix](b"")) == b""
    assert read(tmp_path / "c.jsonl", b"") == b""


# --- the first bytes decide --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["c.jsonl", "c.txt", "c.jsonl.gz", "c.jsonl.zst", "c.jsonl.xz"])
def test_a_compression_is_recognised_whatever_the_name_says(tmp_path, suffix, name):
    assert read(tmp_path / name, PACK[suffix](FIRST) * 2) == FIRST * 2


def test_old_lzma_files_and_skippable_frames_are_recognised(tmp_path):
    assert read(tmp_path / "c.jsonl", lzma.compress(FIRST, format=lzma.FORMAT_ALONE)) == FIRST
    for number in range(16):
        assert read(tmp_path / "c.jsonl", skippable(b"note", number) + zstd(FIRST)) == FIRST


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_plain_text_by_the_name_of_a_compression_is_refused(tmp_path, suffix):
    message = refusal(tmp_path / f"c.jsonl{suffix}", FIRST)
    assert "begins otherwise" in message and f"remove {suffix} from its name" in message


@pytest.mark.parametrize(
    "start", [b"BZh9 is how bzip2 begins\n", b"PAR1 \n", b"PK\n", b"ORC war\n"]
)
def test_text_that_begins_like_a_format_is_text(tmp_path, start):
    assert read(tmp_path / "c.txt", start * 5) == start * 5


def zip_archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", FIRST)
    return file.getvalue()


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(3))
    return file.getvalue()


@pytest.mark.parametrize("name", ["c.jsonl", "c.txt", "c.jsonl.zst", "c.jsonl.gz"])
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (zip_archive(), "a zip archive"),
        (b"\x04\x22\x4d\x18\x64\x40\xa7" + bytes(20), "lz4"),
        (b"PAR1\x15\x04" + bytes(30) + b"PAR1", "a Parquet file"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(30), "a 7z archive"),
        (b"\x27\xb5\x2f\xfd" + bytes(30), "zstd of a version before 0.8"),
        (array(), "a NumPy array"),
    ],
    ids=["zip", "lz4", "parquet", "7z", "old zstd", "npy"],
)
def test_formats_that_cannot_be_read_are_named_with_the_way_out(tmp_path, name, data, what):
    message = refusal(tmp_path / name, data)
    assert f"this is {what}, which cannot be read here; " in message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_lies_in_a_compressed_file_must_be_text(tmp_path, suffix):
    path = tmp_path / f"c.jsonl{suffix}"
    assert "compressed twice (gzip inside)" in refusal(path, PACK[suffix](gzip.compress(FIRST)))
    assert "inside this is a zip archive" in refusal(path, PACK[suffix](zip_archive()))


def test_a_window_that_is_too_large_is_named(tmp_path):
    def compressed(bits: int) -> bytes:
        parameters = zstandard.ZstdCompressionParameters(window_log=bits, enable_ldm=True)
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        return compressor.compress(FIRST) + compressor.flush()

    # 2^27 bytes are the most that `zstd -d` takes without --long.
    assert read(tmp_path / "c.jsonl.zst", compressed(27)) == FIRST
    data = compressed(31)
    assert zstandard.get_frame_parameters(data).window_size == 1 << 31
    for broken in (data, zstd(FIRST) + data):
        message = refusal(tmp_path / "c.jsonl.zst", broken)
        assert "a window of 2048 MiB" in message and "zstd -d --long=31" in message
        assert "truncated" not in message


def test_a_dictionary_is_named(tmp_path):
    samples = [b'{"text": "%d %d"}' % (i, i * i) for i in range(2000)]
    words = zstandard.train_dictionary(4096, samples)
    message = refusal(tmp_path / "c.jsonl.zst", zstd(FIRST, dict_data=words))
    assert f"a dictionary (number {words.dict_id()})" in message


# --- the tools ---------------------------------------------------------------------------------

BROKEN = {
    "cut.jsonl.zst": (zstd(FIRST) + zstd(SECOND))[:-5],
    "cut.jsonl.gz": (gzip.compress(FIRST) + gzip.compress(SECOND))[:-5],
    "cut.jsonl": (zstd(FIRST) + zstd(SECOND))[:-5],
    "lz4.jsonl": b"\x04\x22\x4d\x18\x64\x40\xa7" + bytes(20),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_preprocess_writes_nothing(tmp_path, capsys, name, kind):
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    argv = ["--input", str(path), "--output-prefix", f"{tmp_path}/o", "--workers", "1"]
    argv += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100", "--input-format", kind]
    assert preprocess_data.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(path) in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_train_tokenizer_writes_nothing(tmp_path, capsys, name, kind):
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    argv = ["--input", str(path), "--out", f"{tmp_path}/t", "--vocab-size", "280"]
    assert train_tokenizer.main([*argv, "--input-format", kind]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(path) in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["w.csv.zst", "w.jsonl.zst", "w.csv", "w.jsonl"])
def test_weights_of_a_cut_file_are_refused(tmp_path, capsys, name):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{tmp_path}/d.bin", np.uint16)
    for _ in range(4):
        builder.add_document([1, 2], [2])
    builder.finalize(f"{tmp_path}/d.idx")
    rows = [f"{i}.5" for i in range(4)]
    if name.startswith("w.csv"):
        parts = ["weight\n" + "\n".join(rows[:2]) + "\n", "\n".join(rows[2:]) + "\n"]
    else:
        lines = [json.dumps({"weight": float(row)}) + "\n" for row in rows]
        parts = ["".join(lines[:2]), "".join(lines[2:])]
    whole = b"".join(zstd(part.encode()) for part in parts)
    path = tmp_path / name
    argv = ["make", f"{tmp_path}/d", "--from", str(path), "--default", "1"]
    path.write_bytes(whole[:-4])
    assert weights.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(path) in lines[0] and "damaged or truncated" in lines[0]
    assert not (tmp_path / "d.weights").exists()
    path.write_bytes(whole)
    assert weights.main(argv) == 0


def test_documents_before_the_cut_are_not_taken_for_the_file(tmp_path):
    path = tmp_path / "c.jsonl.zst"
    path.write_bytes((zstd(FIRST) + zstd(SECOND))[:-3])
    taken = []
    with pytest.raises(InputError, match="damaged or truncated"):
        for text, _ in read_texts(path, "text"):
            taken.append(text)
    assert len(taken) <= 40
