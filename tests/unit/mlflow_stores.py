"""Runs in MLflow stores, for the tests of tracking."""

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from pipeline.runlog import LOG
from pipeline.tracking import MlflowSink, RunLog


def open_sink(folder: Path, uri: str | None, **overrides: Any) -> MlflowSink:
    options = {"experiment": "test", "run_name": "a run", "params": {"train.seed": 3}, "tags": {"method": "mae"}}
    return MlflowSink(folder, uri, **(options | overrides))


def train(folder: Path, sink: MlflowSink | None, first: int, last: int, **fields: Any) -> None:
    with RunLog(folder / LOG) as run_log:
        for step in range(first, last + 1):
            record = run_log.write("train", step=step, **({"loss": 1 / step, "lr": 0.1, "epoch": 0} | fields))
            if sink:
                sink.log(step, record)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def runs_in(uri: str) -> list[Run]:
    client = MlflowClient(uri)
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def the_run(uri: str) -> Run:
    (run,) = runs_in(uri)
    return run


def history(uri: str, key: str) -> list[Metric]:
    return MlflowClient(uri).get_metric_history(the_run(uri).info.run_id, key)


def assert_once(uri: str, keys: list[str], steps: range) -> None:
    for key in keys:
        assert Counter(metric.step for metric in history(uri, key)) == Counter(steps), key


def state_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "mlflow.json").read_text()))
