from __future__ import annotations

import csv
import html.parser
import io
import json
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest

from fedlora.report import REPORT, write_report
from fedlora.report.people import GAINS
from tests.report.run_folders import ADAPTERS, round_lines, write_comparison, write_run

pytest.importorskip("matplotlib")

VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)> $\\frac{1}'


class Page(html.parser.HTMLParser):
    """A page that is well-formed, with its elements, links and texts."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.files: dict[str, list[list[str]]] = {}
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        found = dict(attrs)
        if "download" in found:
            head, _, data = str(found["href"]).partition(",")
            assert head == "data:text/csv;charset=utf-8"
            self.files[str(found["download"])] = list(csv.reader(io.StringIO(unquote(data))))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += f" {data}"

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose clients have names that no page should believe."""
    names = (HOSTILE, "=1+1", "日本 \x07 user", *"defghijkl")
    dropped = [{"client": HOSTILE, "reason": f"client {HOSTILE!r}: <b>no</b>"}]
    lines = round_lines(4, names) + round_lines(1, names, round=5, dropped=dropped)
    path = write_run(tmp_path_factory.mktemp("runs") / "run", names=names, lines=lines, cross=4)
    write_report(path)
    return path


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(folder / REPORT)


def test_each_client_s_values_are_in_the_page_with_all_their_digits(
    page: Page, folder: Path
) -> None:
    head, *rows = page.files["clients-by-adapter.csv"]
    assert head == ["client", "held out", *ADAPTERS]
    lines = (folder / "clients.jsonl").read_text().splitlines()
    expected = {tuple(r["scores"][a]["loss"] for a in ADAPTERS) for r in map(json.loads, lines)}
    assert {tuple(map(float, row[2:])) for row in rows} == expected


def test_gains_are_sorted_and_their_mean_is_that_of_the_summary(page: Page, folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    file = "".join(c if c.isalnum() else "-" for c in GAINS[0][2].lower())
    rows = page.files[f"{file}.csv"][1:]
    gains = [float(row[2]) for row in rows]
    assert gains == sorted(gains, reverse=True)
    mine = [float(row[2]) for row in rows if row[1] == "no"]
    mean = summary["extra"]["gain_global_over_base"]["mean"]
    assert sum(mine) / len(mine) == pytest.approx(mean, abs=1e-12)  # another order of the sum
    assert f"{mean:+.4f}" in page.text


def test_rounds_are_those_of_the_run(page: Page) -> None:
    head, *rows = page.files["training-loss.csv"]
    assert head == ["round", "loss"]
    assert [(int(r), float(loss)) for r, loss in rows[:4]] == [
        (1, 3.9), (2, 3.8), (3, 3.7), (4, 3.6),
    ]  # fmt: skip
    assert page.files["bytes.csv"][1] == ["1", "1.0", "1.1"]
    assert page.files["clients.csv"][0] == ["round", "asked", "counted", "dropped"]
    assert page.files["clients.csv"][5] == ["5", "4", "3", "1"]
    assert page.files["where-a-round-s-time-goes.csv"][0][0] == "round"


def test_the_four_adapters_means_are_in_the_words(page: Page, folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    for adapter in ADAPTERS:
        for key in ("mean", "median", "worst_tenth"):
            assert f"{summary[adapter][key]:.4f}" in page.text
            assert f"{summary['held_out'][adapter][key]:.4f}" in page.text
    assert "a note for the reader" in page.text


def test_nothing_is_asked_of_any_network(page: Page) -> None:
    assert page.tags["script"] == page.tags["iframe"] == page.tags["img"] == 0
    for tag, name, value in page.attributes:
        if name in ("src", "href", "action", "srcset", "xlink:href", "data", "poster"):
            assert value.startswith(("#", "data:")), (tag, name, value[:80])
        assert not name.startswith("on"), (tag, name)
        if name in ("style", "clip-path"):
            assert "url(" not in value or value.startswith("url(#"), value
    assert "default-src 'none'" in " ".join(page.values("content"))
    assert page.tags["style"] == 1  # matplotlib's own, which is for every element, is gone
    assert page.tags["metadata"] == 0


def test_ids_are_there_once_and_everything_that_is_named_is_there(page: Page) -> None:
    ids = page.values("id")
    assert [name for name, times in Counter(ids).items() if times > 1] == []
    named = [v[1:] for v in page.values("href") if v.startswith("#")]
    named += [v[5:-1] for v in page.values("clip-path")]
    named += " ".join(page.values("aria-labelledby")).split()
    assert named
    assert set(named) <= set(ids)


def test_every_plot_has_words_a_table_and_a_file(page: Page) -> None:
    plots = page.tags["svg"]
    assert plots == page.tags["figure"] == page.tags["figcaption"] == page.tags["details"]
    assert plots == len(page.files) == page.values("role").count("img")


def test_what_a_client_calls_itself_is_text(page: Page, folder: Path) -> None:
    assert "<script>alert(1)</script>" in page.text
    assert "<b>no</b>" in page.text
    assert "<script" not in (folder / REPORT).read_text()
    clients = [row[0] for row in page.files["clients-by-adapter.csv"][1:]]
    assert "'=1+1" in clients  # a spreadsheet would compute it
    assert "日本 � user" in clients


def test_text_stays_text_and_colors_are_the_page_s(page: Page) -> None:
    assert page.tags["text"] > 50
    styles = " ".join(page.values("style"))
    assert "var(--ink)" in styles
    assert "#0" not in styles, "a colour that the dark page cannot change"
    assert "DejaVu" not in styles


def test_a_run_of_117_people_is_small(tmp_path: Path) -> None:
    names = tuple(f"{number:08x}" for number in range(117))
    folder = write_run(tmp_path / "run", names=names, held_out=23, rounds=20, cross=12)
    # 0.39 MB for the real one, of which three quarters are the plots; the bound is 3 MB.
    assert write_report(folder).stat().st_size < 800_000


def test_a_large_population_is_boxes_and_its_tables_end(tmp_path: Path) -> None:
    names = tuple(f"{number:08x}" for number in range(450))
    folder = write_run(tmp_path / "run", names=names, held_out=20, rounds=1)
    page = Page(write_report(folder))
    assert len(page.files["clients-by-adapter.csv"]) == 451
    assert page.tags["tr"] < 1000
    assert "The first 200 of 450 rows." in page.text
    assert (folder / REPORT).stat().st_size < 500_000


def test_a_comparison_has_its_methods_intervals_and_verdicts(tmp_path: Path) -> None:
    page = Page(write_report(write_comparison(tmp_path / "compared"), tmp_path / "page.html"))
    assert page.files["the-global-adapter.csv"] == [
        ["method", "mean", "low", "high"],
        ["fedit", "0.8", "0.75", "0.85"],
        ["rolora", "0.8", "0.75", "0.85"],
    ]
    assert page.files["paired--global.csv"][1] == [
        "rolora", "-0.02", "-0.05", "0.01",
    ]  # fmt: skip
    assert "rolora, global: no evidence (-0.0200 [-0.0500, +0.0100], positive is better)" in (
        page.text
    )
    assert "0.8000 ± 0.0500" in page.text
