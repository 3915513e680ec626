"""The figure of `patchmill bench evidence`: every row's accuracies with all seeds, and accuracy against training's FLOPs."""

from collections.abc import Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.bench.evidence_report import EvidenceRow, Score, image_set
from pipeline.compare_figure import COLOURS

LABELS: Final = {"knn": "kNN top-1, %", "linear": "best linear head top-1, %", "exact": "softmax regression top-1, %"}
MARKERS: Final = "osD^vP*Xph<>"


def _points(axes: Axes, x: Sequence[float], y: Sequence[float], style: dict[str, Any]) -> None:
    axes.plot(x, y, ls="", ms=6, alpha=0.85, **style)


def _by_row(axes: Axes, rows: Sequence[EvidenceRow], probe: str, styles: dict[str, dict[str, Any]]) -> None:
    """A line a row: its seeds as points, their mean as a bar; the raw pixels as a line through all."""
    drawn = [row for row in rows if row.encoder is not None]
    for place, row in enumerate(drawn):
        score = row.scores[probe]
        _points(axes, list(score.by_seed.values()), [place] * len(score.by_seed), styles[row.name])
        if score.mean is not None:
            axes.plot([score.mean] * 2, [place - 0.3, place + 0.3], color=styles[row.name]["color"], lw=1.4)
    for row in rows:
        mean = row.scores[probe].mean
        if row.encoder is None and mean is not None:
            axes.axvline(mean, color="0.35", ls="--", lw=1)
    axes.set_yticks(range(len(drawn)), [row.name for row in drawn])
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.set_xlabel(LABELS[probe])
    axes.grid(alpha=0.25, lw=0.5)


def _against_flops(axes: Axes, rows: Sequence[EvidenceRow], probe: str, styles: dict[str, dict[str, Any]]) -> None:
    """The trained rows, and raw pixels as a line."""
    power = 12
    for row in rows:
        score: Score = row.scores[probe]
        if row.images:
            _points(axes, [row.flops / 10**power] * len(score.by_seed), list(score.by_seed.values()), styles[row.name])
        elif row.encoder is None and score.mean is not None:
            axes.axhline(score.mean, color="0.35", ls="--", lw=1)
    axes.set(xlabel=f"FLOPs of a run's training, $10^{{{power}}}$", ylabel=LABELS[probe])
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25, lw=0.5)


def draw(rows: Sequence[EvidenceRow]) -> Figure:
    """Above: accuracy by row, a column a probe; below: the same against FLOPs. One legend."""
    trained = [row for row in rows if row.images]
    styles: dict[str, dict[str, Any]] = {
        row.name: {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        for number, row in enumerate(trained)
    }
    styles |= {row.name: {"color": "0.35", "marker": "o", "mfc": "white"} for row in rows if not row.images}
    figure = Figure(figsize=(14, 8.4), layout="constrained")
    above, below = figure.subplots(2, len(LABELS), height_ratios=(1.15, 1))
    for column, probe in enumerate(LABELS):
        _by_row(above[column], rows, probe, styles)
        _against_flops(below[column], rows, probe, styles)
    for axes in above[1:]:
        axes.tick_params(labelleft=False)
    entries = [Line2D([], [], ls="", ms=6, label=row.name, **styles[row.name]) for row in trained]
    entries.append(Line2D([], [], color="0.35", ls="--", lw=1, label="raw pixels"))
    figure.legend(handles=entries, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(
        f"{image_set(rows)}, frozen encoders: a point a seed, a bar their mean; untrained encoders are hollow",
        fontsize=10,
    )
    return figure
