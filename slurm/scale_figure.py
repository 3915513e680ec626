"""The figure of ``patchmill scale``: images/s and efficiency against the number of processes, a colour a series."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from slurm.scale_table import Row

MEASURED: Final = {"ls": "-", "marker": "o", "ms": 4, "lw": 1.6, "zorder": 3}
IDEAL: Final = {"ls": "--", "lw": 1.0, "alpha": 0.6, "zorder": 1}
ESTIMATE: Final = {"ls": ":", "lw": 1.4, "marker": "x", "ms": 4, "zorder": 2}


def _columns(rows: Sequence[Row], *names: str) -> list[np.ndarray]:
    """Numbers of each row, in the order of processes; NaN where they are not known."""
    rows = sorted(rows, key=lambda row: row.processes)
    return [np.array([getattr(row, name) for row in rows], dtype=float) for name in names]


def _series(above: Axes, below: Axes, rows: Sequence[Row], colour: str) -> None:
    x, speed, low, high, predicted = _columns(rows, "processes", "images_per_s", "low", "high", "estimate_images_per_s")
    above.plot(x, speed, color=colour, **MEASURED, gid="measured")
    above.vlines(x, low, high, color=colour, lw=1.2, zorder=3)
    above.plot(x, predicted, color=colour, **ESTIMATE, gid="estimate")
    if np.isfinite(speed[0]):
        above.plot(x, speed[0] / x[0] * x, color=colour, **IDEAL, gid="ideal")
    share, expected = _columns(rows, "efficiency", "estimate_efficiency")
    below.plot(x, 100 * share, color=colour, **MEASURED, gid="measured")
    below.plot(x, 100 * expected, color=colour, **ESTIMATE, gid="estimate")


def _axes(above: Axes, below: Axes, rows: Sequence[Row]) -> None:
    counts = sorted({row.processes for row in rows})
    for axes in (above, below):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(counts))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(alpha=0.25, lw=0.5)
        axes.set_axisbelow(True)
    above.set_yscale("log")
    values = [value for row in rows for value in (row.images_per_s, row.estimate_images_per_s) if value]
    wide = max(values) / min(values) > 100
    above.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    above.yaxis.set_major_formatter(EngFormatter(sep=""))
    above.yaxis.set_minor_formatter(NullFormatter())
    above.set_ylabel("images/s, all processes")
    below.axhline(100, color="0.3", **IDEAL, gid="ideal")
    shares = [100 * value for row in rows for value in (row.efficiency, row.estimate_efficiency) if value]
    below.set_ylim(0, max([110, *(1.1 * share for share in shares)]))
    below.set(xlabel="processes", ylabel="images/s a process,\n% of the fewest processes")


def draw(rows: Sequence[Row], title: str) -> Figure:
    """Two panels above each other with one legend. Raises ValueError without a measured row."""
    from pipeline.compare_figure import COLOURS

    figure = Figure(figsize=(7.6, 7.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    names = list(dict.fromkeys(row.series for row in rows))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    _axes(above, below, rows)
    for name, colour in colours.items():
        _series(above, below, [row for row in rows if row.series == name], colour)
    entries = [Line2D([], [], color=colour, lw=2, label=name) for name, colour in colours.items()]
    kinds = {"measured": MEASURED, "ideal": IDEAL}
    if any(row.estimate_images_per_s for row in rows):
        kinds["estimate"] = ESTIMATE
    entries += [Line2D([], [], color="0.3", **style, label=name) for name, style in kinds.items()]
    figure.legend(handles=entries, loc="outside lower center", ncols=min(4, len(entries)), frameon=False, fontsize=9)
    figure.suptitle(f"{title}; bars: 5 to 95 % of them", fontsize=10)
    return figure
