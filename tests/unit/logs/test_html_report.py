"""The preference report: what is on the page, that it stands alone, and that it takes any text.

Logs, data sets and document weights are made up by hand (`made_up_runs`), with known preferences.
That real runs write logs and weights of this form is not exercised here.
"""

from __future__ import annotations

import base64
import functools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest

from megatron_dwm.cli import report
from megatron_dwm.errors import DWMError
from megatron_dwm.logs.passages import passages as passages_of
from megatron_dwm.logs.passages import printable, sample_documents
from megatron_dwm.logs.run_log import WeightByRank, read_run_log, run_names
from tests.unit.logs.made_up_runs import (
    HOSTILE,
    log_lines,
    texts,
    whole_run,
    write_bytes,
    write_log,
    write_seen,
)

pytest.importorskip("matplotlib")
VOID = {"meta", "img", "br"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Page(HTMLParser):
    """Checks that elements are nested, and keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [pair for pair in attrs if pair[0] in ("src", "href", "srcset", "action")]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def made(folder: Path, *runs: Path, words: tuple[str, ...] = ()) -> str:
    """Makes a report by the command, and returns the page's text."""
    path = folder / "report.html"
    assert report.main([*map(str, runs), "--html", str(path), *words]) == 0
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("learned")
    run = whole_run(folder / "run", domain="<script>books</script>")
    return folder, made(folder, run, words=("--png", str(folder / "charts")))


def test_the_page_has_every_part(learned: tuple[Path, str]) -> None:
    text = Page(learned[1]).text
    for words in (
        "learned, 28 meta steps, mostly every 2 steps",
        "Out-of-sample correlation",
        "0.400 ± 0.050",
        "Effective share of the samples",
        "12.5%",
        "mean weight, stage 1 meta",
        "mean weight, stage 2 meta",
        "75.0%",  # of the samples are books
        "Most wanted: run",
        "Least wanted: run",
        "Uncertain: run",
        "1 to 20",
        "41 to 60",
        "Mean rank correlation of weight and usefulness within a step: 1.000",
        "Mean rank correlation of weight and loss within a step: -1.000",
    ):
        assert words in text, words
    assert "Not in the log" not in text


def test_it_stands_alone(learned: tuple[Path, str]) -> None:
    """No script, no address, no other file, and small."""
    page = Page(learned[1])
    assert "http" not in learned[1] and "@import" not in learned[1] and "url(" not in learned[1]
    assert all(name == "src" and str(value).startswith("data:") for name, value in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert len(learned[1].encode()) < 1 << 20
    assert learned[1].startswith("<!DOCTYPE html>") and '<html lang="en">' in learned[1]


def test_what_a_text_or_a_name_holds_is_shown_and_not_obeyed(learned: tuple[Path, str]) -> None:
    """Also within the charts, which are documents of their own."""
    page = Page(learned[1])
    assert "<script>books</script>" in page.text
    assert printable(HOSTILE) in page.text and "\x00" not in learned[1]
    for image in page.images:
        svg = base64.b64decode(str(image["src"]).partition(",")[2])
        assert svg.startswith(b"<?xml") and b"<script" not in svg


def test_pictures_have_words_and_headings_are_in_order(learned: tuple[Path, str]) -> None:
    page = Page(learned[1])
    assert len(page.images) == 5 + 1 + 1 + 2 + 4 + 1
    assert all(len(str(image.get("alt"))) > 20 for image in page.images)
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    # Every chart has its table.
    assert page.tags.count("details") == len(page.images)


def test_charts_are_files_too(learned: tuple[Path, str]) -> None:
    files = sorted(path.name for path in (learned[0] / "charts").iterdir())
    assert {"lm_loss.png", "run1_domains.png", "run1_length.png", "run1_periods.png"} < set(files)
    assert len(files) == len(Page(learned[1]).images)
    for name in files:
        assert (learned[0] / "charts" / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_same_run_makes_the_same_page(learned: tuple[Path, str], tmp_path: Path) -> None:
    assert made(tmp_path, learned[0] / "run") == learned[1]


@pytest.mark.parametrize("kind", ["uniform", "linupper"])
def test_runs_without_meta_steps(tmp_path: Path, kind: str) -> None:
    run = write_log(tmp_path / "run", log_lines(kind=kind))
    text = Page(made(tmp_path, run)).text
    expected = {"uniform": "uniform weights", "linupper": "weighted without meta steps"}
    assert expected[kind] in text
    assert "Not in the log: meta loss (run), out-of-sample correlation (run), gate (run)." in text
    assert "It needs --dwm-log-samples" in text and "--dwm-document-weights does" in text


def test_several_runs_are_side_by_side(tmp_path: Path) -> None:
    """Of the same name, they are told apart by their paths."""
    learned = whole_run(tmp_path / "a" / "run")
    uniform = write_log(tmp_path / "b" / "run", log_lines(steps=33, kind="uniform"))
    text = made(tmp_path, learned, uniform)
    page = Page(text)
    header = text.partition("<thead>")[2].partition("</thead>")[0]
    assert str(learned) in header and str(uniform) in header
    assert f"Not in the log: meta loss ({uniform})" in page.text
    # The shorter run has no values beyond its end.
    assert "1 to 33" in page.text and "–" in page.text
    assert run_names(["x/a", "y/a", "b/"]) == ["x/a", "y/a", "b"]


def test_a_run_that_is_still_in_its_warm_up(tmp_path: Path) -> None:
    lines = log_lines(steps=4)
    lines[0]["domain_weight"]["books"] = None  # NaN, as the log has it
    text = Page(made(tmp_path, write_log(tmp_path / "run", lines))).text
    assert "all of them were warm-up" in text


def test_many_domains_and_long_names(tmp_path: Path) -> None:
    names = [f"domain_{k}_" + "x" * 60 + "$_{$" for k in range(300)]
    lines = log_lines(steps=20, kind="linupper")
    for line in lines:
        line["domain_weight"] = dict.fromkeys(names, 1.0)
        line["domain_samples"] = dict.fromkeys(names, 1)
    html = made(tmp_path, write_log(tmp_path / "run", lines))
    assert "Of 300 domains, the 8 with most samples are drawn and 100 are listed." in html
    assert len(html) < 1 << 20


# ------------------------------------------------------------------ documents


def test_documents_are_what_the_run_has_weighed(tmp_path: Path) -> None:
    """Weights rise with the length, until the last of three periods turns them round."""
    run = whole_run(tmp_path / "run")
    sample = sample_documents(str(run), None, None, 2000, seed=1)
    assert sample is not None and sample.seen == 40 and len(sample.texts) == 40
    k = sample.numbers.tolist().index(10)
    assert sample.texts[k] == texts()[10]
    rise, turned = math.log(12), math.log(2 + 29)
    assert sample.weights[k] == pytest.approx((2 * rise + turned) / 3)
    assert sample.by_period[:, k] == pytest.approx([rise, rise, turned])
    assert sample.periods == [(1, 20), (21, 40), (41, 60)]
    assert sample.tokens.tolist() == [150.0] * 40
    assert sample.statistics["length"][k] == len(texts()[10]) + 1
    first, second, last = sample.over_periods("length")
    assert first == second > 0.8 and last == pytest.approx(-first)


def test_a_draw_is_a_part_and_the_same_for_a_seed(tmp_path: Path) -> None:
    run = str(whole_run(tmp_path / "run"))
    a, b, c = (sample_documents(run, None, None, 10, seed) for seed in (1, 1, 2))
    assert a is not None and b is not None and c is not None
    assert a.numbers.tolist() == b.numbers.tolist() != c.numbers.tolist()
    assert len(set(a.numbers.tolist())) == 10


def test_passages_are_the_ends_and_the_middle_each_once(tmp_path: Path) -> None:
    run = write_log(tmp_path / "run", log_lines())
    prefix = write_bytes(tmp_path / "data", ["long " * 200] * 40)
    write_seen(run, [prefix], [list(range(40))], saves=1)
    sample = sample_documents(str(run), None, None, 2000, seed=1)
    assert sample is not None
    # One save: the periods are turned round at once.
    found = {kind: [39 - p.number for p in shown] for kind, shown in passages_of(sample).items()}
    assert found["most wanted"] == [39, 38, 37, 36, 35, 34, 33, 32]
    assert found["least wanted"] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert sorted(found["uncertain"]) == [16, 17, 18, 19, 20, 21, 22, 23]
    text = passages_of(sample)["uncertain"][0].text
    assert len(text) == 401 and text.endswith("…")


def test_documents_elsewhere(tmp_path: Path) -> None:
    """Data sets that have moved are left out with a word, and found again by --data."""
    run = write_log(tmp_path / "run", log_lines())
    prefix = write_bytes(tmp_path / "data", texts())
    write_seen(run, [str(tmp_path / "gone")], [[1.0 + k for k in range(40)]])
    assert "Documents are left out" in made(tmp_path, run)
    assert "Most wanted: run" in made(tmp_path, run, words=("--data", prefix))


def test_a_tokenizer_turns_ids_into_text(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    sample = sample_documents(str(run), None, lambda ids: " ".join(map(str, ids)), 5, seed=1)
    assert sample is not None and re.fullmatch(r"[\d ]+", sample.texts[0])

    def refuses(ids: list[int]) -> str:
        raise IndexError("piece id is out of range")

    with pytest.raises(
        DWMError, match=r"books\.bin: document \d+ .*out of range.*--tokenizer-type"
    ):
        sample_documents(str(run), None, refuses, 5, seed=1)


def test_weight_goes_by_rank_within_a_step() -> None:
    """Steps with equal weights, or with a NaN, are left out."""
    found = WeightByRank()
    found.add([4.0, 2.0, 0.0], [1e9, 0.0, -1e-9])
    found.add([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    found.add([1.0, None, 2.0], [1.0, 2.0, 3.0])
    found.add([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    assert found.correlations == [pytest.approx(1)]
    assert [(m, n) for _, m, _, n in found.bins()] == [(0.0, 1), (1.0, 1), (2.0, 1)]


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "has no whole line"),
        ('{"iteration": 1, "wind', "has no whole line"),
        ('{"iteration": 1}\n', "the line of iteration 1 has no window, domain_weight"),
        (
            '{"iteration": 1, "window": "meta", "domain_weight": [1], "domain_samples": {}}\n',
            "the line of iteration 1 is damaged",
        ),
        (
            '{"iteration": 2, "window": "meta", "domain_weight": {"a": 1}, "domain_samples": {}}\n',
            "the line of iteration 2 is damaged",
        ),
    ],
)
def test_a_log_that_is_none_is_one_line(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "dwm_log.jsonl").write_text(content)
    with pytest.raises(DWMError, match=r"dwm_log\.jsonl: ") as caught:
        read_run_log("run", str(tmp_path))
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    run = write_log(tmp_path, log_lines(steps=10))
    with open(run / "dwm_log.jsonl", "a") as file:
        file.write(json.dumps(log_lines(steps=11)[-1])[:40])
    assert read_run_log("run", str(run)).last == 10


def test_documents_that_do_not_fit_are_named(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    short = write_bytes(tmp_path / "short", texts()[:5])
    words = Path(write_bytes(tmp_path / "wide", ["x"] * 40))
    index = bytearray(Path(f"{words}.idx").read_bytes())
    index[17] = 8  # two bytes a token
    Path(f"{words}.idx").write_bytes(index)
    Path(f"{words}.bin").write_bytes(numpy.full(80, 300, "<u2").tobytes())
    for prefixes, named in (
        ([short], "has 5 documents, but the run has read document 39"),
        ([short, short], "--data names 2 data sets, but"),
        ([str(tmp_path / "none")], "none.idx"),
        ([str(words)], "has the token id 300, so tokens are not bytes; give the tokenizer"),
    ):
        with pytest.raises(DWMError, match=re.escape(named)):
            sample_documents(str(run), prefixes, None, 2000, seed=1)


# ------------------------------------------------------------------ in a browser


@functools.cache
def browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.skipif(browser() is None, reason=f"none of {', '.join(BROWSERS)} is installed")
@pytest.mark.parametrize("width", [360, 390, 1280])
def test_nothing_is_wider_than_the_screen(
    learned: tuple[Path, str], tmp_path: Path, width: int
) -> None:
    """In a frame of that width, with every table unfolded; no picture is broken.

    The script is this test's own, around the page; whether the page is pleasant is not tested.
    """
    page = learned[1].replace("<details>", "<details open>")
    script = """
      const f = document.querySelector("iframe");
      f.onload = () => {
        const root = f.contentDocument.documentElement;
        const drawn = [...f.contentDocument.images].every((i) => i.complete && i.naturalWidth > 0);
        document.body.textContent = [root.scrollWidth, root.clientWidth, drawn].join(" ");
      };
      f.srcdoc = JSON.parse(document.querySelector("template").content.textContent);
    """
    data = json.dumps(page).replace("&", "&amp;").replace("<", "&lt;")
    frame = f'<iframe style="width:{width}px;height:800px;border:0"></iframe>'
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body>{frame}<template>{data}</template>'
        f"<script>{script}</script></body>"
    )
    done = subprocess.run(
        [
            *(str(browser()), "--headless", "--no-sandbox", "--disable-gpu"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"),
            *("--window-size=1400,900", "--dump-dom", outer.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    found = re.search(r"<body>(\d+) (\d+) (\w+)</body>", done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-2000:]
    assert int(found[1]) <= int(found[2]) <= width and found[3] == "true"
