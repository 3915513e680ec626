"""Equal compute by hand, the curves of probes, and the page: whole, escaped, and without anything from a network."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_compare import BATCH, FLOPS, Write, lines_of, note, row, steps, stop, turn, write
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.compare import describe, names_of, notes, tables
from pipeline.compare_figure import COLOURS, draw, measures
from pipeline.compare_page import page
from pipeline.equal_compute import at_equal_compute, axis_label, place
from pipeline.history import read_folder

__all__ = ["write"]  # the fixture
VOID = {"meta", "br", "wbr", "link", "img", "hr"}
ODD = "a<b>&\"'$x_1$"


@pytest.fixture
def slow(write: Write) -> Path:
    """Two processes, 6 steps of 10 s; probed untrained, at 3 and at 6."""
    probes = [note(500, 0, knn_untrained=10.0), note(501, 3, knn_model=20.0), note(502, 6, knn_model=30.0)]
    lines = [turn("start", 1000, 0, 2), *steps(1, 6, 1010), note(1035, 2, heldout_loss=1.5), stop(1060, 6, "done")]
    return write("slow", [*lines, *probes])


@pytest.fixture
def fast(write: Write) -> Path:
    """One process; an image costs three times as many FLOPs; 8 steps of 10 s."""
    lines = [turn("start", 0, 0) | {"flops_per_image": 3 * FLOPS}, *steps(1, 8, 10, lambda step: 1.0 * step)]
    return write(ODD, [*lines, stop(80, 8, "done"), note(90, 8, knn_model=50.0, effective_rank=7.5)])


# Equal compute


def test_where_points_lie_on_each_axis(slow: Path) -> None:
    run, at = read_folder(slow), np.array([0.0, 1.0, 2.5, 6.0, 7.0])
    by_hand = {"steps": [0, 1, 2.5, 6], "images": [0, 8, 20, 48], "flops": [0, 8e9, 20e9, 48e9],
               "hours": [0, 20 / 3600, 50 / 3600, 120 / 3600]}  # fmt: skip
    for axis, expected in by_hand.items():
        found = place(run, axis, at)
        assert found[:-1].tolist() == pytest.approx(expected) and np.isnan(found[-1])


def test_equal_compute_by_hand(slow: Path, fast: Path) -> None:
    budgets = {budget.axis: budget for budget in at_equal_compute([read_folder(slow), read_folder(fast)])}
    mean = lambda last: (sum(10 / step for step in range(1, last + 1)) / last, last)  # noqa: E731
    # Of 48 images, 48e9 FLOPs or 6 steps the slow run has all; for 48e9 FLOPs the fast one takes 2 steps of 8 x 3e9.
    assert {axis: budget.amount for axis, budget in budgets.items()} == {
        "steps": 6, "images": 6 * BATCH, "flops": 6 * BATCH * FLOPS, "hours": pytest.approx(80 / 3600)}  # fmt: skip
    assert budgets["steps"].found == {
        "loss": [pytest.approx(mean(6)), (3.5, 6)], "heldout_loss": [(1.5, 2), None], "knn_model": [(30, 6), None]}  # fmt: skip
    assert budgets["flops"].found["loss"] == [pytest.approx(mean(6)), (1.5, 2)]
    # The fast one ends after 80 process-seconds, the 4th of the slow one's steps, after which it was probed at the 3rd.
    assert budgets["hours"].found == {
        "loss": [pytest.approx(mean(4)), (4.5, 8)], "heldout_loss": [(1.5, 2), None], "knn_model": [(20, 3), (50, 8)]}  # fmt: skip


def test_runs_made_as_long_as_each_other_have_their_ends_though_one_is_a_little_longer(slow: Path) -> None:
    run = read_folder(slow)
    for factor, found in ((1.0005, (30, 6)), (1.002, (20, 3))):
        longer = replace(run, flops=run.flops * factor)
        (budget,) = (budget for budget in at_equal_compute([run, longer]) if budget.axis == "flops")
        assert budget.amount == 48e9 and budget.found["knn_model"] == [(30, 6), found]


def test_an_axis_that_one_run_knows_alone_has_no_budget(write: Write, slow: Path) -> None:
    old = write("old", [{"kind": "start", "time": 0, "step": 0}, *steps(1, 4, 10)])
    budgets = at_equal_compute([read_folder(slow), read_folder(old)])
    assert [budget.axis for budget in budgets] == ["steps", "images", "flops"]


def test_equal_compute_is_printed_and_in_json(slow: Path, fast: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", str(slow), str(fast), "--json", str(tmp_path / "a.json")])
    assert row(result.output, "knn_model within 0.0222 process-hours") == ["20.00 (3)", "50.00 (8)"]
    assert row(result.output, "loss within 48 images") == ["4.083 (6)", "3.5 (6)"]
    found = json.loads((tmp_path / "a.json").read_text())["equal_compute"]
    assert found[2]["axis"] == "flops" and found[2]["amount"] == 48e9
    assert found[2]["found"]["knn_model"] == {"slow": {"value": 30, "step": 6}}


@pytest.mark.parametrize(
    ("devices", "label"), [(["H100", "H100"], "GPU-hours"), (["H100", "cpu"], "process-hours"), (["H100", None], "process-hours")]
)  # fmt: skip
def test_hours_are_called_gpu_hours_where_all_processes_had_one(
    write: Write, devices: list[str | None], label: str
) -> None:
    folders = []
    for number, device in enumerate(devices):
        told = {} if device is None else {"device": device}
        folders.append(write(f"run{number}", [turn("start", 0, 0) | told, *steps(1, 3, 10), stop(40, 3, "done")]))
    runs = [read_folder(folder) for folder in folders]
    assert axis_label("hours", runs) == label and axis_label("steps", runs) == "steps"
    assert draw(runs, ["a", "b"]).axes[3].get_xlabel() == label
    assert describe(runs[0])["process-hours"] == "0.0111 (GPU-hours)"
    assert describe(runs[0])["device"] == "H100"


# Curves of probes


def test_probes_are_drawn_from_the_untrained_weights_on(slow: Path, fast: Path) -> None:
    runs = [read_folder(slow), read_folder(fast)]
    assert [measure.label for measure in measures(runs)] == ["loss", "top-1 %", "effective_rank"]
    figure = draw(runs, ["a", "b"])
    assert len(figure.axes) == 12
    for axes, unit in zip(figure.axes[4:8], (1, BATCH, BATCH * FLOPS, 20 / 3600), strict=True):
        one, other = lines_of(axes, "knn")
        assert one.get_xdata().tolist() == pytest.approx([0, 3 * unit, 6 * unit])
        assert one.get_ydata().tolist() == [10, 20, 30] and other.get_ydata().tolist() == [50]
        assert (one.get_color(), other.get_color()) == COLOURS[:2]
    assert figure.axes[8].get_ylabel() == "effective_rank"
    assert [line.get_ydata().tolist() for line in lines_of(figure.axes[8], "effective_rank")] == [[7.5]]


def test_ema_is_a_line_of_its_own_and_what_no_training_changed_is_none(write: Write) -> None:
    some = [
        turn("start", 0, 0),
        *steps(1, 2, 10),
        note(50, 2, knn_model=1.0, knn_ema=2.0, knn_pixels=9.0, linear_untrained=3.0),
    ]
    (_, probes) = measures([read_folder(write("run", some))])
    assert probes.series == (("knn (ema)", ("knn_ema",)), ("knn", ("knn_model",)))


def test_a_classifiers_metrics_stand_by_their_unit(write: Write) -> None:
    tested = {f"val_{name}{of}": 1.0 for name in ("top1", "top5", "loss") for of in ("", "_ema")}
    run = read_folder(
        write("run", [turn("start", 0, 0), *steps(1, 2, 10), note(50, 2, knn_model=1.0, val_images=9, **tested)])
    )
    pair = lambda name: (("fine-tuned", (f"val_{name}",)), ("fine-tuned (average)", (f"val_{name}_ema",)))  # noqa: E731
    assert {measure.label: measure.series for measure in measures([run])} == {
        "loss": (), "top-1 %": (("knn", ("knn_model",)), *pair("top1")), "cross-entropy of a classifier": pair("loss"),
        "top-5 %": pair("top5")}  # fmt: skip
    found = at_equal_compute([run, run])[0].found
    assert list(found) == ["loss", "knn_model", "val_top1", "val_top1_ema"]


def test_a_name_with_dollars_is_no_formula(fast: Path, slow: Path) -> None:
    figure = draw([read_folder(fast), read_folder(slow)], ["$\\frac$", "_b"])
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["$\\frac$", "_b"]


# The page


class Reader(HTMLParser):
    """The page's elements; every one that is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page(slow: Path, fast: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["compare", str(slow), str(fast), "--html", str(path)])
    assert result.exit_code == 0 and f"a page is in {path}" in result.output
    text = path.read_text()
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "img", "iframe", "b"} and "svg" in names
    # Nothing is fetched: every reference is to the page itself.
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert all(str(value).startswith("#") for _, attrs in reader.tags for key, value in attrs.items() if "href" in key)
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    references = set(re.findall(r"url\(#([^)]+)\)", text)) | {
        str(attrs["xlink:href"])[1:] for _, attrs in reader.tags if "xlink:href" in attrs
    }
    unique = [name for name in ids if name in references]
    assert references and set(unique) == references and len(unique) == len(set(unique))
    assert text.count("Content-Security-Policy") == 1 and ODD not in text
    assert sum(part == ODD for part in reader.text) >= 3  # in legends and the heads of tables
    for axis in (
        "steps",
        "images seen",
        "FLOPs so far",
        "process-hours",
    ):  # of three measures; some are a row of a table too
        assert sum(part.strip() == axis for part in reader.text) == 3 + (
            axis in ("FLOPs so far", "images seen", "process-hours")
        )
    assert sum(part.strip() == "top-1 %" for part in reader.text) == 4
    figures = [attrs["aria-label"] for tag, attrs in reader.tags if tag == "figure"]
    assert figures[4:8] == [
        f"top-1 % against {axis}" for axis in ("steps", "images seen", "FLOPs so far", "process-hours")
    ]


def test_the_page_has_what_the_tables_have(slow: Path, fast: Path) -> None:
    runs = [read_folder(slow), read_folder(fast)]
    reader = Reader()
    reader.feed(page(runs, names_of(runs), tables(runs), notes(runs)))
    told = "".join(reader.text)
    for title, rows in tables(runs):
        assert title[1:] in told
        for heading, cells in rows:
            assert heading in told and all(cell in told for cell in cells)
    assert all(line in told for line in notes(runs))


def test_a_page_of_long_runs_stays_small(write: Write) -> None:
    lines = [turn("start", 0, 0), *steps(1, 9000, 10, lambda step: 1 + (step * 7919 % 100) / 100)]
    runs = [read_folder(write(name, lines)) for name in ("a", "b")]
    assert len(page(runs, names_of(runs), tables(runs), notes(runs))) < 400_000
