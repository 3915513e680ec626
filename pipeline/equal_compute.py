"""Runs at equal compute: the four axes, where a run's points lie on them, and what each run had when all had spent as much.

Steps are no measure of compute between runs of other batches, images none between other models or methods: FLOPs and hours
are. FLOPs are those of the cost model, of training alone (without probes); hours those of all processes, with what restarts
and roll-backs threw away.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pipeline.history import HELDOUT, WINDOW, Floats, History

AXES: Final = (("steps", "steps"), ("images", "images seen"), ("flops", "FLOPs so far"), ("hours", "process-hours"))
PROBE: Final = re.compile(r"(?!val_)(.+)_(model|ema|untrained|pixels)")
CLASSIFIER: Final = re.compile(r"val_(top1|top5|loss)(_ema)?")  # of fine-tuning: of the weights, and of their average
SLACK: Final = 1e-3  # of an amount: runs made as long as each other end within a batch of it
UNTRAINED: Final = ("untrained", "pixels")


def on_gpus(run: History) -> bool:
    """Whether all of a run's processes had a GPU each, as far as its log says."""
    devices = run.facts.get("device") or [None]
    return all(device is not None and device != "cpu" for device in devices)


def axis_label(name: str, runs: Sequence[History]) -> str:
    """What stands at an axis; hours are called GPU-hours where every process of every run had a GPU."""
    return "GPU-hours" if name == "hours" and all(map(on_gpus, runs)) else dict(AXES)[name]


def place(run: History, axis: str, steps: Floats) -> Floats:
    """Where on an axis the state after ``steps`` lies: 0 at step 0, NaN where the log does not reach."""
    x: Floats = getattr(run, axis)
    found = np.interp(steps, run.steps, x, left=np.nan, right=np.nan) if len(x) else np.full(len(steps), np.nan)
    return np.where((steps == 0) & np.isfinite(x).any(), 0.0, found)


def by_step(points: Sequence[tuple[int, float]]) -> tuple[Floats, Floats]:
    """(steps, values) in the order of the steps; of a step that was measured twice the latest."""
    pairs = np.array(sorted(dict(points).items()), dtype=np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def is_loss(name: str) -> bool:
    """Whether less is better: a held-out loss, or a classifier's cross-entropy."""
    return name == HELDOUT or name.startswith("val_loss")


def is_top1(name: str) -> bool:
    """Whether points of this name are top-1 accuracies in percent: a probe's, or a classifier's."""
    found = CLASSIFIER.fullmatch(name)
    return found[1] == "top1" if found else PROBE.fullmatch(name) is not None


@dataclass(frozen=True)
class Budget:
    """As much as the run with the least had at its end: ``amount`` on an axis.

    ``found``: for each measure a (value, step) a run, or None: the loss (mean of the last lines), held-out loss and probes,
    each the last one within the amount, or a thousandth above it.
    """

    axis: str
    amount: float
    found: Mapping[str, Sequence[tuple[float, int] | None]]


def _loss_within(run: History, axis: str, amount: float) -> tuple[float, int] | None:
    within = np.flatnonzero(getattr(run, axis) <= amount)
    if not len(within):
        return None
    last = int(within[-1])
    lines = run.loss[max(0, last + 1 - WINDOW) : last + 1]
    finite = lines[np.isfinite(lines)]
    return (float(finite.mean()), int(run.steps[last])) if len(finite) else None


def _point_within(run: History, name: str, axis: str, amount: float) -> tuple[float, int] | None:
    steps, values = by_step(run.points.get(name, []))
    within = np.flatnonzero(place(run, axis, steps) <= amount)
    return (float(values[within[-1]]), int(steps[within[-1]])) if len(within) else None


def at_equal_compute(runs: Sequence[History]) -> list[Budget]:
    """A budget for each axis that two runs or more have; without what no training has changed, and what no run has."""
    names = sorted({name for run in runs for name in run.points if not name.endswith(UNTRAINED)})
    names = [name for name in names if name == HELDOUT or is_top1(name)]
    budgets = []
    for axis, _ in AXES:
        ends = [float(np.nanmax(x)) for x in (getattr(run, axis) for run in runs) if np.isfinite(x).any()]
        if len(ends) < 2:
            continue
        amount = min(ends)
        reach = amount * (1 + SLACK)
        found: dict[str, list[Any]] = {"loss": [_loss_within(run, axis, reach) for run in runs]}
        found |= {name: [_point_within(run, name, axis, reach) for run in runs] for name in names}
        budgets.append(Budget(axis, amount, {name: cells for name, cells in found.items() if any(cells)}))
    return budgets
