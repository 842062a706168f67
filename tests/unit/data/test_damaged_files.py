"""Thousands of seeded damages to .weights, .idx, .bin and the sources of weights.

Proves: whatever happened to a file, reading it is a one-line error that names it, or a result
that is right; never another exception, a crash or a wrong result. A weight file has checksums, so
that every change of a byte is noticed, and the checks behind them are met with checksums that fit.
What this file does NOT exercise: a file that shrinks while it is mapped, and disks that fail.
"""

import dataclasses
import json
import os
import random
import struct
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.data import DatasetError, read_index
from megatron_dwm.data.document_weights import domain_summary, weight_summary
from megatron_dwm.data.weight_file import read_weights, write_weights
from megatron_dwm.data.weight_sources import Columns, read_values
from megatron_dwm.errors import InputError

LENGTHS = [[3], [0, 2], [], [4], [1, 1, 5], [0], [9]]
NAMES = ["web", "code", "müsli"]
FIELDS = struct.Struct("<8sIIQQQQI")
HEADER_BYTES = 64
EDGES = [0, 1, 6, 7, 8, 2**31 - 1, 2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def make_dataset(prefix):
    lengths = np.array([n for document in LENGTHS for n in document], "<i4")
    firsts = np.cumsum([0] + [len(document) for document in LENGTHS]).astype("<i8")
    pointers = 2 * (np.cumsum(lengths) - lengths).astype("<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(firsts))
    Path(f"{prefix}.idx").write_bytes(
        header + lengths.tobytes() + pointers.tobytes() + firsts.tobytes()
    )
    Path(f"{prefix}.bin").write_bytes(bytes(range(2 * int(lengths.sum()))))


@dataclasses.dataclass
class Files:
    """A sound dataset with weights, and a copy of each file to damage."""

    folder: Path

    def __post_init__(self):
        self.prefix = str(self.folder / "data")
        make_dataset(self.prefix)
        self.index = read_index(self.prefix)
        rng = np.random.default_rng(0)
        weights = rng.exponential(size=len(LENGTHS))
        domains = np.array([0, 1, 2, -1, 0, 2, 1])
        self.named = self._written("named", weights, domains, NAMES)
        self.bare = self._written("bare", weights, domains, [])
        self.plain = self._written("plain", weights, None, [])
        self.target = self.folder / "damaged.weights"

    def _written(self, name, *arrays):
        path = self.folder / f"{name}.weights"
        write_weights(path, arrays[0], self.index, *arrays[1:])
        return path.read_bytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("damaged"))


def damage(rng, content):
    """Truncates, lengthens, flips bits, overwrites, removes, doubles or swaps."""
    content = bytearray(content)
    size = len(content)
    kind = rng.randrange(8)
    at = rng.randrange(size)
    # Headers are small, so that few random places would fall into them.
    if rng.random() < 0.5:
        at = rng.randrange(min(size, HEADER_BYTES))
    length = rng.randrange(1, 20)
    if kind == 0:
        del content[at:]
    elif kind == 1:
        content += rng.randbytes(length)
    elif kind == 2:
        for _ in range(rng.choice([1, 1, 2, 3, 8])):
            content[rng.randrange(size)] ^= 1 << rng.randrange(8)
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 3:
        content[at : at + length] = rng.randbytes(length)
    elif kind == 4:
        del content[at : at + length]
    elif kind == 5:
        content[at:at] = content[at : at + length]
    elif kind == 6:
        content[at : at + 8] = struct.pack("<Q", rng.choice(EDGES))
    else:
        other = rng.randrange(size)
        content[at], content[other] = content[other], content[at]
    return bytes(content)


def assert_names(error, path):
    assert str(path) in str(error), error
    assert "\n" not in str(error)


def with_checksums(content):
    """The file with the two checksums that fit what it says."""
    content = bytearray(content)
    content[FIELDS.size - 4 : FIELDS.size] = struct.pack("<I", zlib.crc32(content[HEADER_BYTES:]))
    content[FIELDS.size : FIELDS.size + 4] = struct.pack("<I", zlib.crc32(content[: FIELDS.size]))
    return bytes(content)


def replaced(content, offset, form, *values):
    content = bytearray(content)
    struct.pack_into(form, content, offset, *values)
    return with_checksums(content)


def refused(files, content, index=None, verify=True):
    """The message with which a weight file of this content is refused."""
    files.target.write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        read_weights(files.target, index, verify)
    assert_names(caught.value, files.target)
    return str(caught.value)


class TestWeights:
    @pytest.mark.parametrize("kind", ["named", "bare", "plain"])
    def test_every_random_damage_is_noticed(self, files, kind):
        rng = random.Random(f"weights {kind}")
        sound = getattr(files, kind)
        noticed = 0
        for _ in range(1500):
            content = damage(rng, sound)
            if content != sound:
                refused(files, content, rng.choice([None, files.index]))
                noticed += 1
        assert noticed > 1300

    @pytest.mark.parametrize("kind", ["named", "bare", "plain"])
    def test_every_single_bit(self, files, kind):
        sound = getattr(files, kind)
        for bit in range(8 * len(sound)):
            content = bytearray(sound)
            content[bit // 8] ^= 1 << bit % 8
            refused(files, bytes(content))

    def test_every_length(self, files):
        for length in range(len(files.named)):
            for verify in (True, False):
                refused(files, files.named[:length], files.index, verify)

    @pytest.mark.parametrize("kind", ["named", "bare", "plain"])
    @pytest.mark.parametrize("verify", [True, False])
    def test_damage_with_fitting_checksums(self, files, kind, verify):
        rng = random.Random(f"forged {kind} {verify}")
        sound = getattr(files, kind)
        accepted = 0
        for _ in range(1500):
            content = damage(rng, sound)
            if len(content) < HEADER_BYTES:
                continue
            files.target.write_bytes(with_checksums(content))
            index = rng.choice([None, files.index])
            try:
                file = read_weights(files.target, index, verify)
            except DatasetError as error:
                assert_names(error, files.target)
                continue
            accepted += 1
            if verify:
                self.check_sound(file, with_checksums(content), index)
                if accepted % 8 == 0:
                    json.dumps([weight_summary(file), domain_summary(file, index)], allow_nan=False)
        # Some damages give other weights that are as good, others cannot pass.
        assert 50 < accepted < 1200

    def check_sound(self, file, content, index):
        """What was accepted is what the bytes say, and fit to draw by."""
        documents = struct.unpack_from("<Q", content, 16)[0]
        assert file.documents == documents == len(file.weights)
        floats = struct.unpack_from(f"<{documents}f", content, HEADER_BYTES)
        assert file.weights.tolist() == list(floats)
        assert all(0 <= w < float("inf") for w in floats) and any(floats)
        if file.domains is not None:
            numbers = struct.unpack_from(f"<{documents}i", content, HEADER_BYTES + 4 * documents)
            assert file.domains.tolist() == list(numbers)
            assert min(numbers) >= -1
            names = json.loads(content[HEADER_BYTES + 8 * documents :])
            assert list(file.domain_names) == names
            assert not names or max(numbers) < len(names)
        if index is not None:
            assert (file.documents, file.sequences, file.tokens) == (
                index.documents,
                index.sequences,
                index.tokens,
            )

    @pytest.mark.parametrize("offset", [16, 24, 32, 40])
    @pytest.mark.parametrize("value", EDGES)
    @pytest.mark.parametrize("kind", ["named", "bare", "plain"])
    def test_counts_of_any_size(self, files, offset, value, kind):
        content = replaced(getattr(files, kind), offset, "<Q", value)
        if content == getattr(files, kind):
            return
        # Only sizes are seen without an index: sequences and tokens are then just numbers.
        if offset in (16, 40):
            message = refused(files, content)
            assert "expected" in message and "bytes for" in message
        message = refused(files, content, files.index)
        assert "bytes for" in message or f"made for {value}" in message

    def test_documents_and_sizes_that_overflow_to_the_right_size(self, files):
        # 4 * (2^62 + 7) is 28 modulo 2^64, 8 * (2^61 + 7) is 56.
        assert "truncated" in refused(files, replaced(files.plain, 16, "<Q", 2**62 + 7))
        assert "truncated" in refused(files, replaced(files.named, 16, "<Q", 2**61 + 7))

    def test_magic_version_and_flags(self, files):
        assert "not a weight file" in refused(files, replaced(files.plain, 0, "<8s", b"MMIDIDX\0"))
        for version in (0, 2, 2**32 - 1):
            assert f"found {version}" in refused(files, replaced(files.plain, 8, "<I", version))
        for flags in (2, 3, 2**31):
            assert "unknown flags" in refused(files, replaced(files.plain, 12, "<I", flags))
        content = replaced(files.plain + b"[]", 40, "<Q", 2)
        assert "names without domains" in refused(files, content, verify=False)
        # One kind of file under the flags of the other.
        refused(files, replaced(files.plain, 12, "<I", 1))
        refused(files, replaced(files.named, 12, "<I", 0))

    @pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, -1.0, -1e-45])
    @pytest.mark.parametrize("document", range(len(LENGTHS)))
    def test_weights_that_no_draw_can_use(self, files, bad, document):
        for sound in (files.named, files.plain):
            content = replaced(sound, HEADER_BYTES + 4 * document, "<f", bad)
            message = refused(files, content, files.index)
            assert f"document {document} has the weight" in message

    def test_all_weights_zero(self, files):
        for zero in (0.0, -0.0):
            content = replaced(files.plain, HEADER_BYTES, "<7f", *[zero] * 7)
            assert "all 7 weights are zero" in refused(files, content)

    def test_domains_without_a_name(self, files):
        for sound, bad in ((files.named, 3), (files.named, -2), (files.bare, -(2**31))):
            content = replaced(sound, HEADER_BYTES + 28 + 4 * 2, "<i", bad)
            assert f"document 2 has the domain {bad}" in refused(files, content)

    @pytest.mark.parametrize(
        "names",
        [
            b"",
            b"{}",
            b"null",
            b"[",
            b"[1]",
            b'["a", "a"]',
            b'["a"] x',
            b"\xff",
            b'["\\ud800"]',
            b"[" * 200_000,
            b"9" * 10_000,
            b'{"a": ' * 100_000,
        ],
    )
    def test_names_that_are_none(self, files, names):
        content = files.named[: HEADER_BYTES + 56] + names
        for verify in (True, False):
            refused(files, replaced(content, 40, "<Q", len(names)), files.index, verify)

    def test_another_dataset(self, files):
        for what in ("documents", "sequences", "tokens"):
            other = dataclasses.replace(files.index)
            vars(other)[what] = getattr(files.index, what) + 1
            for verify in (True, False):
                message = refused(files, files.named, other, verify)
                assert f"{what}, but {files.prefix}.idx has" in message


class TestIndex:
    def check_sound(self, index, idx, bin_bytes):
        """What was accepted is what the bytes say, and all of it lies in the .bin."""
        _, _, code, sequences, entries = struct.unpack_from("<9sQBQQ", idx)
        size = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}[code]
        lengths = struct.unpack_from(f"<{sequences}i", idx, 34)
        pointers = struct.unpack_from(f"<{sequences}q", idx, 34 + 4 * sequences)
        firsts = struct.unpack_from(f"<{entries}q", idx, 34 + 12 * sequences)
        assert index.dtype.itemsize == size
        assert index.sequence_lengths.tolist() == list(lengths)
        for length, pointer in zip(lengths, pointers, strict=True):
            assert length >= 0 and pointer >= 0 and pointer + length * size <= bin_bytes
        assert list(firsts) == sorted(firsts) and firsts[0] == 0 and firsts[-1] == sequences
        assert index.documents == entries - 1
        assert index.document_tokens(0, index.documents).tolist() == [
            sum(lengths[a:b]) for a, b in pairwise(firsts)
        ]
        assert index.tokens == sum(lengths)

    def test_random_damage_to_the_index(self, files, tmp_path):
        rng = random.Random("idx")
        prefix = tmp_path / "data"
        idx, tokens = Path(f"{files.prefix}.idx").read_bytes(), Path(f"{files.prefix}.bin")
        Path(f"{prefix}.bin").write_bytes(tokens.read_bytes())
        outcomes = {"refused": 0, "accepted": 0}
        for _ in range(4000):
            content = damage(rng, idx)
            Path(f"{prefix}.idx").write_bytes(content)
            try:
                index = read_index(prefix)
            except DatasetError as error:
                assert_names(error, f"{prefix}.idx")
                outcomes["refused"] += 1
                continue
            self.check_sound(index, content, tokens.stat().st_size)
            outcomes["accepted"] += 1
        assert outcomes["refused"] > 2500
        assert outcomes["accepted"] > 50

    @pytest.mark.parametrize("offset", [18, 26])
    @pytest.mark.parametrize("value", EDGES)
    def test_counts_of_any_size(self, files, tmp_path, offset, value):
        content = bytearray(Path(f"{files.prefix}.idx").read_bytes())
        if struct.unpack_from("<Q", content, offset)[0] == value:
            return
        struct.pack_into("<Q", content, offset, value)
        (tmp_path / "data.idx").write_bytes(content)
        (tmp_path / "data.bin").write_bytes(Path(f"{files.prefix}.bin").read_bytes())
        with pytest.raises(DatasetError) as caught:
            read_index(tmp_path / "data")
        assert_names(caught.value, tmp_path / "data.idx")

    def test_damage_to_the_tokens(self, files, tmp_path):
        rng = random.Random("bin")
        sound, prefix = Path(f"{files.prefix}.bin").read_bytes(), tmp_path / "data"
        Path(f"{prefix}.idx").write_bytes(Path(f"{files.prefix}.idx").read_bytes())
        for _ in range(1000):
            content = damage(rng, sound)
            Path(f"{prefix}.bin").write_bytes(content)
            if len(content) < len(sound):
                with pytest.raises(DatasetError) as caught:
                    read_index(prefix)
                assert_names(caught.value, f"{prefix}.bin")
            else:
                # Any token is a token, and more bytes than the index uses do no harm.
                index = read_index(prefix)
                assert index.bin_bytes == len(content)
                assert index.tokens == files.index.tokens


def not_a_file(path, kind):
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "link to itself":
        path.symlink_to(path)
    else:
        assert kind == "missing"


NO_FILES = ["folder", "empty", "pipe", "dangling link", "link to itself", "missing"]


class TestNoFile:
    @pytest.mark.parametrize("kind", NO_FILES)
    def test_weights(self, files, tmp_path, kind):
        path = tmp_path / "data.weights"
        not_a_file(path, kind)
        for verify in (True, False):
            with pytest.raises(DatasetError) as caught:
                read_weights(path, files.index, verify)
            assert_names(caught.value, path)

    @pytest.mark.parametrize("kind", NO_FILES)
    @pytest.mark.parametrize("suffix", [".idx", ".bin"])
    def test_dataset(self, files, tmp_path, kind, suffix):
        for ending in {".idx", ".bin"} - {suffix}:
            source = Path(files.prefix + ending)
            (tmp_path / f"data{ending}").write_bytes(source.read_bytes())
        not_a_file(tmp_path / f"data{suffix}", kind)
        with pytest.raises(DatasetError) as caught:
            read_index(tmp_path / "data")
        assert_names(caught.value, tmp_path / f"data{suffix}")

    @pytest.mark.parametrize("name", ["a\0b", "x" * 5000, ""])
    def test_names_that_no_file_has(self, name):
        with pytest.raises(DatasetError):
            read_weights(name)
        with pytest.raises(DatasetError):
            read_index(name)

    def test_no_permission(self, files, tmp_path):
        for suffix, content in ((".idx", b"x" * 99), (".weights", files.named)):
            path = tmp_path / f"data{suffix}"
            path.write_bytes(content)
            path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(DatasetError, match="Permission denied") as caught:
            read_weights(tmp_path / "data.weights")
        assert_names(caught.value, tmp_path / "data.weights")
        with pytest.raises(DatasetError, match="Permission denied") as caught:
            read_index(tmp_path / "data")
        assert_names(caught.value, tmp_path / "data.idx")


class TestSources:
    """The files that tools/weights.py reads weights from."""

    @pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".npy", ".csv.gz"])
    def test_random_damage(self, files, tmp_path, suffix):
        rng = random.Random(suffix)
        path = tmp_path / f"source{suffix}"
        columns = Columns("weight", None if suffix == ".npy" else "domain")
        if suffix == ".npy":
            np.save(path, np.arange(7.0))
            sound = path.read_bytes()
        elif suffix == ".jsonl":
            rows = [{"weight": n / 2, "domain": f"d{n % 3}", "document": n} for n in range(7)]
            sound = "\n".join(map(json.dumps, rows)).encode()
        else:
            sound = b"weight,domain,document\n" + b"".join(
                b'%d.5,"d%d",%d\n' % (n, n % 3, n) for n in range(7)
            )
            if suffix == ".csv.gz":
                sound = zlib.compress(sound, wbits=31)
        outcomes = {"refused": 0, "accepted": 0}
        for _ in range(1000):
            path.write_bytes(damage(rng, sound))
            try:
                values = read_values(path, files.index, columns, None)
            except InputError as error:
                assert_names(error, path)
                outcomes["refused"] += 1
                continue
            outcomes["accepted"] += 1
            assert values.numbers.shape == (7,)
            if values.domains is not None:
                assert values.domains.min() >= -1
                assert values.domains.max() < len(values.names)
        assert outcomes["refused"] > 200
        assert suffix == ".csv.gz" or outcomes["accepted"] > 20
