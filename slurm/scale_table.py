"""What the points of ``patchmill scale`` were measured to do, beside what ``patchmill estimate`` predicts for them."""

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.config import Config, RunFailed
from slurm.checks import prediction
from slurm.scale import INTERVAL, Standing, progress_of

TRAINER: Final = ("start", "resume")
METRICS: Final = ("images_per_s", "efficiency", "of_estimate", "mfu", "data_wait", "memory_gib")


@dataclass(frozen=True)
class Measured:
    """Of the steps after the warm-up the median images/s of all processes, between which 90 % lie, the share that waits for data.

    ``memory_gib``: the most that one process has had, on ``device``; ``time``: when it ended, seconds since 1970.
    """

    images_per_s: float
    low: float
    high: float
    data_wait: float
    memory_gib: float | None
    device: str
    time: float


@dataclass(frozen=True)
class Row:
    """A point. ``efficiency``: images/s a process over those of the series' point with the fewest processes; None: not known.

    ``of_estimate``: measured images/s over predicted ones. ``batch`` and ``micro_batch`` in images.
    """

    point: str
    series: str
    state: str
    processes: int
    batch: int
    micro_batch: int
    images_per_s: float | None = None
    low: float | None = None
    high: float | None = None
    efficiency: float | None = None
    data_wait: float | None = None
    memory_gib: float | None = None
    mfu: float | None = None
    estimate_images_per_s: float | None = None
    estimate_efficiency: float | None = None
    estimate_gib: float | None = None
    of_estimate: float | None = None
    device: str = ""
    time: float | None = None
    why: str = ""


def measure(run: Path, warmup: int) -> Measured | None:
    """What the log of a run says of the steps after ``warmup`` of its newest start; None where it has none of them."""
    from pipeline.runlog import LOG, read_log

    records = read_log(run / LOG) if (run / LOG).exists() else []
    start = next((record for record in reversed(records) if record["kind"] in TRAINER), None)
    if start is None:
        return None
    # The images/s of an interval count when all its steps do.
    first = -(-(start["step"] + warmup) // INTERVAL) * INTERVAL
    lines = [record for record in records if record["kind"] == "train" and record["step"] > first]
    if not lines:
        return None
    low, middle, high = np.percentile([line["images_per_s"] for line in lines], [5, 50, 95]).tolist()
    stop = next((record for record in reversed(records) if record["kind"] == "stop"), {})
    waiting = float(np.median([line["data_wait"] for line in lines]))
    return Measured(middle, low, high, waiting, stop.get("peak_gib"), str(start.get("device", "")), lines[-1]["time"])


@dataclass(frozen=True)
class Predicted:
    """What the planner says of a job: images/s of all processes, GiB of a process at most, FLOP/s of all GPUs by datasheet."""

    images_per_s: float
    memory_gib: float
    peak: float


def predict(cfg: Config, stated: Mapping[str, float]) -> Predicted | None:
    """With the ``stated`` network and MFU; None where ``slurm.gpu`` names no GPU."""
    from pipeline.planner import GIB, peak_bytes, predict_step

    if cfg.slurm.gpu is None:
        return None
    machine, layout, micro = prediction(cfg, **stated)
    seconds = predict_step(cfg, machine, layout, micro).total
    held = peak_bytes(cfg, machine, layout, micro) / GIB
    return Predicted(cfg.train.global_batch / seconds, held, machine.gpus * machine.peak(cfg))


def row_of(standing: Standing, warmup: int, stated: Mapping[str, float]) -> Row:
    """A point without what only the others tell."""
    from pipeline.estimate import flops_per_image

    point, cfg = standing.point, standing.point.cfg
    world = cfg.slurm.world
    micro = cfg.train.global_batch // world if cfg.train.micro_batch == "auto" else cfg.train.micro_batch
    why = standing.status.why if standing.status and standing.state == "failed" else ""
    row = Row(point.name, point.series, progress_of(standing), world, cfg.train.global_batch, micro, why=why)
    told, predicted = measure(point.folder, warmup) if standing.state == "done" else None, predict(cfg, stated)
    if predicted is not None:
        row = replace(row, estimate_images_per_s=predicted.images_per_s, estimate_gib=predicted.memory_gib)
    if told is None:
        short = "restarted too late to be measured" if standing.state == "done" else row.why
        return replace(row, why=short)
    row = replace(row, **asdict(told))
    if predicted is None:
        return row
    flops = flops_per_image(cfg).step * told.images_per_s
    return replace(row, mfu=flops / predicted.peak, of_estimate=told.images_per_s / predicted.images_per_s)


def _efficiency(row: Row, first: Row, name: str) -> float | None:
    speed, of_first = getattr(row, name), getattr(first, name)
    return speed / row.processes / (of_first / first.processes) if speed and of_first else None


def compare(rows: Sequence[Row]) -> list[Row]:
    """The rows with their efficiencies, each against the point of its series with the fewest processes."""
    found = []
    for row in rows:
        first = min((other for other in rows if other.series == row.series), key=lambda other: other.processes)
        found.append(replace(row, efficiency=_efficiency(row, first, "images_per_s"),
                             estimate_efficiency=_efficiency(row, first, "estimate_images_per_s")))  # fmt: skip
    return found


# Heading, field, format of each column of numbers.
COLUMNS: Final = (
    ("processes", "processes", "d"),
    ("batch", "batch", "d"),
    ("images/s", "images_per_s", ",.1f"),
    ("5 %", "low", ",.1f"),
    ("95 %", "high", ",.1f"),
    ("efficiency", "efficiency", ".0%"),
    ("data wait", "data_wait", ".1%"),
    ("GiB", "memory_gib", ".2f"),
    ("MFU", "mfu", ".1%"),
    ("est. images/s", "estimate_images_per_s", ",.0f"),
    ("est. efficiency", "estimate_efficiency", ".0%"),
    ("est. GiB", "estimate_gib", ".2f"),
    ("of estimate", "of_estimate", ".1%"),
)


def table(rows: Sequence[Row], title: str) -> Any:
    """A rich table, a row a point; ``-`` is what is not known."""
    from rich.table import Table

    found = Table(title=title, title_justify="left", box=None, pad_edge=False)
    found.add_column("point", no_wrap=True)
    for heading, _, _ in COLUMNS:
        found.add_column(heading, justify="right", no_wrap=True)
    found.add_column("state", no_wrap=True)
    for row in rows:
        values = ((getattr(row, name), form) for _, name, form in COLUMNS)
        found.add_row(row.point, *("-" if value is None else format(value, form) for value, form in values), row.state)
    return found


def report(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write the table as JSON, in the form of `patchmill bench`, whose hardware is here the jobs'. Raises OSError."""
    from pipeline.bench.report import write_report

    devices = ", ".join(sorted({row.device for row in rows if row.device})) or "not known"
    write_report(path, rows, title=title, hardware=devices)


def publish(folder: Path, cfg: Config, rows: Sequence[Row], files: Sequence[Path], settings: Mapping[str, str]) -> None:
    """Send the table to MLflow as one run, with the number of processes as the step; nothing with ``tracking.uri=none``.

    Raises RunFailed when MLflow does not take it.
    """
    from pipeline.mlflow_run import Remote, brief, load_state, only_writer, prepare_mlflow
    from pipeline.tracking import resolve_uri

    uri = resolve_uri(cfg.tracking.uri, folder)
    if uri is None:
        return
    prepare_mlflow()
    from mlflow import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with only_writer(folder):
            state = load_state(folder, experiment=cfg.tracking.experiment, run_name=folder.name, tags={"kind": "scale"})
            remote = Remote(folder, state, uri)
            remote.describe(settings, state["tags"])
            _send(remote, rows)
            for path in files:
                remote.send_file(path)
            remote.set_status("FINISHED" if all(row.images_per_s for row in rows) else "RUNNING")
    except BlockingIOError:
        raise RunFailed(f"{folder}: another process sends it to MLflow now; call again") from None
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise RunFailed(f"{folder}: not sent to MLflow: {brief(error)}; call again, or set tracking.uri=none") from None


def _send(remote: Any, rows: Sequence[Row]) -> None:
    """The metrics of each series that are not there yet, such as ``images_per_s/vit_b`` at the step 16."""
    from pipeline.mlflow_run import Point

    points = [Point(f"{name}/{row.series}", getattr(row, name), int(1000 * row.time), row.processes)
              for row in rows for name in METRICS if row.time is not None and getattr(row, name) is not None]  # fmt: skip
    there = {(key, step) for key in {point.key for point in points} for step in remote.steps_of(key)}
    remote.send([point for point in points if (point.key, point.step) not in there])
