"""What a logged step costs with MLflow: its sink behind ``log.jsonl``, and the usual call at every step, on sqlite stores.

A line of 12 metrics is written for each step. Measured is the whole process's CPU time, so what the sink's thread does
counts too, from a store that is connected to one that has every point; and by the clock how long the calls held training
up. The sink sends every 5 s; here it is given what 5 s have at 10 steps a second, and the pause between is cut short.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest import mock

from pipeline import tracking
from pipeline.bench.interleaved import Contestant, Figures, Progress, measure
from pipeline.bench.loop import Stopwatch
from pipeline.mlflow_run import STATE, _make_sqlite, points_of, prepare_mlflow
from pipeline.runlog import LOG, Record, RunLog

METRICS: Final = 12
PORTION: Final = 50  # steps that the sink sends together
PAUSE_S: Final = 0.02  # in place of tracking.FLUSH_S
ALONE_TIMES: Final = 20  # as many steps of the log alone, which takes microseconds
PEER_SHARE: Final = 8  # one step in so many of the peer, which takes milliseconds
PATIENCE_S: Final = 60.0
ALONE: Final = "log.jsonl alone"
OURS: Final = "patchmill's sink"
PEER: Final = "mlflow.log_metrics a step"
GOAL_MS: Final = 1.0


@dataclass(frozen=True)
class Row:
    """A way to log: CPU milliseconds of the process a logged step over the log alone, A/A ratio of the whole.

    ``blocked_ms`` a step, by the clock, training waits for the call. ``goal_ms``: what ``cpu_ms_per_step`` should be at
    most; None for the peer and the log alone, whose own time it is.
    """

    name: str
    cpu_ms_per_step: float
    a_over_a: float
    blocked_ms: float
    goal_ms: float | None

    def __str__(self) -> str:
        """One line of a table."""
        goal = "" if self.goal_ms is None else f" (goal <= {self.goal_ms:.0f})"
        return (f"{self.name:<28}{self.cpu_ms_per_step:8.3f} CPU ms a logged step{goal}   A/A {self.a_over_a:.3f}   "
                f"training waits {self.blocked_ms:.3f} ms")  # fmt: skip


@dataclass
class Waits:
    """Seconds by the clock that calls took, and how many there were; the fastest run counts, as for CPU time."""

    best_s: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, steps: range, log: Callable[[int], object]) -> None:
        """Make a call for each step."""
        began = time.perf_counter()
        for step in steps:
            log(step)
        each = (time.perf_counter() - began) / len(steps)
        self.best_s[name] = min(each, self.best_s.get(name, each))


def line(step: int) -> dict[str, float]:
    """A training line's numbers: with these it has 12 metrics."""
    known = {"samples_seen": step * 256, "epoch": 0, "lr": 1e-4, "loss": 0.5, "grad_norm": 1.0, "images_per_s": 100.0,
             "data_wait": 0.0}  # fmt: skip
    return known | {f"monitor_{number}": step / (number + 1) for number in range(METRICS - len(known))}


def _wait_until_sent(folder: Path, step: int) -> None:
    """Until the store has a step. Raises RuntimeError after a minute."""
    until = time.monotonic() + PATIENCE_S
    while json.loads((folder / STATE).read_text())["sent_step"] < step:
        if time.monotonic() > until:
            raise RuntimeError(f"the store has not taken step {step} within {PATIENCE_S:.0f} s")
        time.sleep(0.02)


@contextmanager
def _sink(folder: Path, uri: str, log: RunLog) -> Iterator[tracking.MlflowSink]:
    """A sink that is connected and has sent step 0."""
    with mock.patch.object(tracking, "FLUSH_S", PAUSE_S):
        sink = tracking.MlflowSink(folder, uri, "bench", folder.name, params={}, tags={})
        try:
            sink.log(0, log.write("train", step=0, **line(0)))
            _wait_until_sent(folder, 0)
            yield sink
        finally:
            sink.close(deadline_s=PATIENCE_S)


def log_alone(folder: Path, steps: int, stopwatch: Stopwatch, waits: Waits) -> int:
    """Lines in the log."""
    with RunLog(folder / LOG) as log:
        stopwatch.start()
        waits.run(ALONE, range(1, steps + 1), lambda step: log.write("train", step=step, **line(step)))
        stopwatch.stop()
    return steps


def log_ours(folder: Path, uri: str, steps: int, stopwatch: Stopwatch, waits: Waits) -> int:
    """Lines in the log that the sink sends behind it."""
    with RunLog(folder / LOG) as log, _sink(folder, uri, log) as sink:
        stopwatch.start()
        for first in range(1, steps + 1, PORTION):
            records = {
                step: log.write("train", step=step, **line(step))
                for step in range(first, min(first + PORTION, steps + 1))
            }
            waits.run(OURS, range(first, first + len(records)), lambda step, some=records: sink.log(step, some[step]))  # type: ignore[misc]
            _wait_until_sent(folder, max(records))
        stopwatch.stop()
    return steps


def _metrics(record: Record) -> dict[str, float]:
    return {point.key: point.value for point in points_of(record)}


def log_peer(folder: Path, uri: str, steps: int, stopwatch: Stopwatch, waits: Waits) -> int:
    """Lines in the log, and a synchronous call of MLflow for each."""
    import mlflow

    with RunLog(folder / LOG) as log:
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient(uri)
        run_id = client.create_run(client.create_experiment(folder.name)).info.run_id

        def call(step: int) -> None:
            mlflow.log_metrics(_metrics(records[step]), step=step, synchronous=True, run_id=run_id)

        stopwatch.start()
        records = {step: log.write("train", step=step, **line(step)) for step in range(1, steps + 1)}
        waits.run(PEER, range(1, steps + 1), call)
        stopwatch.stop()
    return steps


def _contestants(root: Path, steps: int, stopwatch: Stopwatch, waits: Waits) -> dict[str, Contestant]:
    prepare_mlflow()

    def fresh(log: Callable[..., int], *more: Any) -> int:
        folder = Path(tempfile.mkdtemp(dir=root))
        return log(folder, *more, stopwatch, waits)

    # A store each: the one is not to grow by the other's points.
    stores = root / "ours.db", root / "peer.db"
    _make_sqlite(stores[0])
    shutil.copy(*stores)
    ours, peer = (f"sqlite:///{store}" for store in stores)
    return {
        ALONE: lambda number: fresh(log_alone, steps * ALONE_TIMES),
        OURS: lambda number: fresh(log_ours, ours, steps),
        PEER: lambda number: fresh(log_peer, peer, max(1, steps // PEER_SHARE)),
    }


def compare(figures: Figures, waits: Waits) -> list[Row]:
    """Rows of measured figures: the log's own time, and what MLflow adds to it."""
    alone = figures[ALONE][0]
    rows = []
    for name, (seconds, ratio) in figures.items():
        over = seconds if name == ALONE else seconds - alone
        rows.append(Row(name, 1e3 * over, ratio, 1e3 * waits.best_s[name], GOAL_MS if name == OURS else None))
    return rows


def run(steps: int = 400, *, rounds: int = 8, progress: Progress | None = None) -> list[Row]:
    """Measure runs of ``steps`` logged steps (more of the log alone, fewer of the peer); ``rounds`` is at least 8.

    Raises UserError when the machine is too restless to tell.
    """
    stopwatch, waits = Stopwatch(), Waits()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(lambda: _contestants(Path(folder), steps, stopwatch, waits), rounds, progress, stopwatch)
    return compare(figures, waits)
