"""The figure of `patchmill compare`: the loss of runs against steps, images, FLOPs and process-hours."""

import io
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pipeline.history import HELDOUT, Floats, History

PANELS: Final = (("steps", "steps"), ("images", "images seen"), ("flops", "FLOPs so far"), ("hours", "process-hours"))
COLOURS: Final = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#17becf",
    "#7f7f7f",
    "#bcbd22",
)
DASHES: Final = ("-", "-.", ":")  # from one round of colours to the next
SMOOTH: Final = 40  # a mean spans so many'th part of a run
MOST_POINTS: Final = 4000
LOG_FROM: Final = 2.5  # times the lowest loss: over less, a linear axis has the better ticks
NAME: Final = 44


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


def _thin(*columns: Floats) -> Iterator[Floats]:
    stride = -(-len(columns[0]) // MOST_POINTS) or 1
    return (column[::stride] for column in columns)


def _heldout(run: History) -> tuple[Floats, Floats]:
    """(steps, losses)."""
    points = np.array(sorted(run.points.get(HELDOUT, [])), dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _curves(axes: Axes, run: History, x: Floats, style: dict[str, Any]) -> None:
    """The raw loss, faint, its means, and the held-out loss where there is one."""
    axes.plot(*_thin(x, run.loss), color=style["color"], lw=0.6, alpha=0.18, zorder=1, gid="raw")
    axes.plot(*_thin(x, smooth(run.loss)), **style, lw=1.6, zorder=3, gid="loss")
    steps, losses = _heldout(run)
    if len(steps) and len(x):
        # A held-out loss is taken between two training lines.
        at = np.interp(steps, run.steps, x, left=np.nan)
        axes.plot(
            at, losses, color=style["color"], lw=1.0, ls="--", marker="o", ms=3, mfc="white", zorder=4, gid="heldout"
        )


def _limits(runs: Sequence[History]) -> tuple[float, float, bool] | None:
    """(lowest, highest, logarithmic) of the loss axis, without rare spikes of single steps."""
    shown = [smooth(run.loss) for run in runs] + [_heldout(run)[1] for run in runs]
    shown += [np.percentile(raw, [0.5, 99.5]) for run in runs if len(raw := run.loss[np.isfinite(run.loss)])]
    values = np.concatenate(shown) if shown else np.array([])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low >= LOG_FROM:
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


def _legend(figure: Figure, runs: Sequence[History], names: Sequence[str], styles: Sequence[dict[str, Any]]) -> None:
    entries = [Line2D([], [], **style, lw=2, label=name) for style, name in zip(styles, names, strict=True)]
    if any(len(_heldout(run)[0]) for run in runs):
        entries.append(Line2D([], [], color="0.3", lw=1, ls="--", marker="o", ms=3, mfc="white", label="held-out loss"))
    longest = max(len(str(entry.get_label())) for entry in entries)
    figure.legend(handles=entries, loc="outside lower center", ncols=max(1, min(4, len(entries), 110 // (longest + 7))),
                  frameon=False, fontsize=9)  # fmt: skip


def draw(runs: Sequence[History], names: Sequence[str]) -> Figure:
    """Four panels with one loss axis and one legend; a panel says which runs it lacks because their log does."""
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    styles = [{"color": COLOURS[number % len(COLOURS)], "ls": DASHES[number // len(COLOURS) % len(DASHES)]}
              for number in range(len(runs))]  # fmt: skip
    names, limits = _short(names), _limits(runs)
    for number, (axes, (name, label)) in enumerate(zip(figure.subplots(2, 2).flat, PANELS, strict=True)):
        lacking = []
        for run, of, style in zip(runs, names, styles, strict=True):
            x = getattr(run, name)
            if np.isfinite(x).any():
                _curves(axes, run, x, style)
            else:
                lacking.append(of)
        if lacking:
            axes.set_title(f"not known of {', '.join(lacking)}" if len(lacking) < 3 else f"not known of {len(lacking)} runs",
                           fontsize=8, color="0.35", loc="right")  # fmt: skip
        if limits:
            _scale(axes, *limits[:2], logarithmic=limits[2])
        axes.set(xlabel=label, ylabel="loss" if number % 2 == 0 else "")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if name != "hours":
            _count(
                axes,
                label,
                max((float(np.nanmax(x, initial=0)) for x in (getattr(run, name) for run in runs)), default=0),
            )
        axes.grid(alpha=0.25, lw=0.5)
        axes.set_axisbelow(True)
    figure.suptitle("Loss: means over a fortieth of a run, single steps faint", fontsize=10)
    _legend(figure, runs, names, styles)
    return figure


def encode(figure: Figure, suffix: str) -> bytes:
    """The figure as a file of that kind, such as ``.png``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix.removeprefix("."), dpi=130)
    return buffer.getvalue()
