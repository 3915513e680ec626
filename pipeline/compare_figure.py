"""The figures of `patchmill compare`: losses and probes of runs against steps, images, FLOPs and process-hours."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pipeline.equal_compute import AXES, CLASSIFIER, PROBE, axis_label, by_step, place
from pipeline.history import HELDOUT, Floats, History

# Okabe and Ito, 2008: told apart by eyes without red, green or blue. Grey stands for their yellow, pale on white.
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00", "#7f7f7f")
DASHES: Final = ("-", "-.", ":")  # from one round of colours to the next
MARKERS: Final = "os^DvPX*"
SMOOTH: Final = 40  # a mean spans so many'th part of a run
MOST_POINTS: Final = 4000
LOG_FROM: Final = 2.5  # times the lowest loss: over less, a linear axis has the better ticks
NAME: Final = 44
LOSS: Final = "loss"
TOP1: Final = "top-1 %"
OF_CLASSIFIERS: Final = {"top1": TOP1, "top5": "top-5 %", "loss": "cross-entropy of a classifier"}

Style = dict[str, Any]


def _marker(number: int) -> Style:
    """Of a series; hollow from the second round on."""
    hollow = number // len(MARKERS) % 2 == 1
    return {"marker": MARKERS[number % len(MARKERS)], "ms": 5, **({"mfc": "white"} if hollow else {})}


@dataclass(frozen=True)
class Measure:
    """What one y axis shows. ``series``: of each marker its label and the names of its points; of the loss there are none."""

    label: str
    series: tuple[tuple[str, tuple[str, ...]], ...] = ()


def measures(runs: Sequence[History]) -> list[Measure]:
    """The loss; the probes where a run has any, each from its untrained weights on; and what else was evaluated."""
    names = sorted({name for run in runs for name in run.points} - {HELDOUT})
    probes: dict[str, list[str]] = {}
    classifiers: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for name in names:
        if own := CLASSIFIER.fullmatch(name):
            label = "fine-tuned (average)" if own[2] else "fine-tuned"
            classifiers.setdefault(OF_CLASSIFIERS[own[1]], []).append((label, (name,)))
        found = PROBE.fullmatch(name)
        if found and found[2] != "pixels":  # these are no encoder's
            probes.setdefault(f"{found[1]} (ema)" if found[2] == "ema" else found[1], []).append(name)
    trained = {label: own for label, own in probes.items() if any(not name.endswith("_untrained") for name in own)}
    top1 = (*((label, tuple(points)) for label, points in trained.items()), *classifiers.pop(TOP1, ()))
    others = [
        Measure(name, ((name, (name,)),)) for name in names if not (PROBE.fullmatch(name) or CLASSIFIER.fullmatch(name))
    ]
    return [Measure(LOSS), *([Measure(TOP1, top1)] if top1 else []),
            *(Measure(label, tuple(series)) for label, series in classifiers.items()), *others]  # fmt: skip


def smooth(values: Floats) -> Floats:
    """Centred means over a fortieth of the values, shorter at the ends; without those that are not finite."""
    half = max(1, len(values) // SMOOTH) // 2
    if not half:
        return values
    finite = np.isfinite(values)
    totals = np.cumsum([0.0, *np.where(finite, values, 0.0)])
    counts = np.cumsum([0, *finite])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))  # as far to both sides: else the ends lean inwards
    low, high = at - reach, at + reach + 1
    with np.errstate(invalid="ignore"):
        means: Floats = (totals[high] - totals[low]) / (counts[high] - counts[low])
    return means


def _thin(most: int, *series: Floats) -> Iterator[Floats]:
    stride = -(-len(series[0]) // most) or 1
    return (column[::stride] for column in series)


def _points(run: History, names: Sequence[str]) -> tuple[Floats, Floats]:
    return by_step([point for name in names for point in run.points.get(name, [])])


def _losses(axes: Axes, run: History, axis: str, style: Style, most: int) -> None:
    """The raw loss, faint, its means, and the held-out loss where there is one."""
    x = getattr(run, axis)
    axes.plot(*_thin(most, x, run.loss), color=style["color"], lw=0.6, alpha=0.18, zorder=1, gid="raw")
    axes.plot(*_thin(most, x, smooth(run.loss)), **style, lw=1.6, zorder=3, gid="loss")
    steps, losses = _points(run, [HELDOUT])
    if len(steps):
        axes.plot(place(run, axis, steps), losses, color=style["color"], lw=1.0, ls="--", marker="o", ms=3, mfc="white",
                  zorder=4, gid="heldout")  # fmt: skip


def _series(axes: Axes, run: History, axis: str, style: Style, measure: Measure) -> None:
    for number, (label, names) in enumerate(measure.series):
        steps, values = _points(run, names)
        if len(steps):
            axes.plot(place(run, axis, steps), values, **style, **_marker(number), lw=1.2, zorder=3, gid=label)  # fmt: skip


def _limits(runs: Sequence[History], measure: Measure) -> tuple[float, float, bool] | None:
    """(lowest, highest, logarithmic) of the y axis; of the loss without rare spikes of single steps."""
    if measure.series:
        shown = [_points(run, names)[1] for run in runs for _, names in measure.series]
    else:
        shown = [smooth(run.loss) for run in runs] + [_points(run, [HELDOUT])[1] for run in runs]
        shown += [np.percentile(raw, [0.5, 99.5]) for run in runs if len(raw := run.loss[np.isfinite(run.loss)])]
    values = np.concatenate(shown) if shown else np.array([])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if not measure.series and low > 0 and high / low >= LOG_FROM:
        return low / 1.08, high * 1.08, True
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin, False


def _scale(axes: Axes, low: float, high: float, *, logarithmic: bool) -> None:
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(low, high)


def _count(axes: Axes, label: str, highest: float) -> None:
    """Ticks of large numbers: 20k, 4M; from 10^12 on, where letters are little known, with the power in the label."""
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if highest >= 1e12:
        power = 3 * int(np.log10(highest) // 3)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10**power:g}"))
        label = f"{label}, $10^{{{power}}}$"
    axes.set_xlabel(label)


def _short(names: Sequence[str]) -> list[str]:
    """Long names without their middle, unless two would then be the same."""
    short = [name if len(name) <= NAME else f"{name[: NAME // 2 - 1]}…{name[-NAME // 2 :]}" for name in names]
    return short if len(set(short)) == len(set(names)) else list(names)


def styles_of(runs: Sequence[History]) -> list[Style]:
    """A colour and a dash for each run."""
    return [{"color": COLOURS[number % len(COLOURS)], "ls": DASHES[number // len(COLOURS) % len(DASHES)]}
            for number in range(len(runs))]  # fmt: skip


def panel(axes: Axes, measure: Measure, axis: str, runs: Sequence[History], names: Sequence[str],
          most: int = MOST_POINTS) -> None:  # fmt: skip
    """One measure of all runs against one axis; it says which runs it lacks because their log does."""
    lacking = []
    for run, name, style in zip(runs, names, styles_of(runs), strict=True):
        if not np.isfinite(getattr(run, axis)).any():
            lacking.append(name)
        elif measure.series:
            _series(axes, run, axis, style, measure)
        else:
            _losses(axes, run, axis, style, most)
    if lacking:
        axes.set_title(f"not known of {', '.join(lacking)}" if len(lacking) < 3 else f"not known of {len(lacking)} runs",
                       fontsize=8, color="0.35", loc="right", parse_math=False)  # fmt: skip
    limits = _limits(runs, measure)
    if limits:
        _scale(axes, *limits[:2], logarithmic=limits[2])
    label = axis_label(axis, runs)
    axes.set(xlabel=label, ylabel=measure.label)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if axis != "hours":
        _count(axes, label, max((float(np.nanmax(getattr(run, axis), initial=0)) for run in runs), default=0))
    axes.grid(alpha=0.25, lw=0.5)
    axes.set_axisbelow(True)


def markers_of(measure: Measure, runs: Sequence[History]) -> list[tuple[str, Style]]:
    """What the lines of a measure mean beside the runs' colours: (label, style)."""
    if measure.series:
        return [(label, {"ls": "-", **_marker(number)})
                for number, (label, _) in enumerate(measure.series)]  # fmt: skip
    heldout = any(HELDOUT in run.points for run in runs)
    return [("held-out loss", {"ls": "--", "marker": "o", "ms": 3, "mfc": "white"})] if heldout else []


def _legend(figure: Figure, runs: Sequence[History], names: Sequence[str], shown: Sequence[Measure]) -> None:
    entries = [Line2D([], [], **style, lw=2, label=name) for style, name in zip(styles_of(runs), names, strict=True)]
    entries += [Line2D([], [], color="0.3", lw=1, label=label, **style)
                for measure in shown for label, style in markers_of(measure, runs)]  # fmt: skip
    longest = max(len(str(entry.get_label())) for entry in entries)
    legend = figure.legend(handles=entries, loc="outside lower center", frameon=False, fontsize=9,
                           ncols=max(1, min(4, len(entries), 110 // (longest + 7))))  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # a run may be called $x$


def draw(runs: Sequence[History], names: Sequence[str]) -> Figure:
    """Four panels a measure, the loss first, with one legend."""
    shown, names = measures(runs), _short(names)
    figure = Figure(figsize=(11, 0.8 + 6.8 * len(shown)), layout="constrained")
    grid = figure.subplots(2 * len(shown), 2)
    for number, measure in enumerate(shown):
        for column, (axes, (axis, _)) in enumerate(zip(grid[2 * number : 2 * number + 2].flat, AXES, strict=True)):
            panel(axes, measure, axis, runs, names)
            axes.set_ylabel("" if column % 2 else measure.label)
    figure.suptitle("Loss: means over a fortieth of a run, single steps faint", fontsize=10)
    _legend(figure, runs, names, shown)
    return figure


def encode(figure: Figure, suffix: str) -> bytes:
    """The figure as a file of that kind, such as ``.png``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix.removeprefix("."), dpi=130)
    return buffer.getvalue()


def to_svg(figure: Figure, salt: str) -> str:
    """The figure as an element of a page: text as text, nothing from elsewhere; ``salt`` keeps its ids from others' on the page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :]
