"""One run in an MLflow store: found or made for a run folder, then fed. MLflow is imported here, when it is needed."""

import contextlib
import fcntl
import json
import logging
import os
import re
import sqlite3
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pipeline.config import UserError
from pipeline.runlog import Record, replace_file

STATE = "mlflow.json"
KEY_TAG = "patchmill.key"
PREFIXES = {"train": "", "eval": "eval/"}
NO_METRIC = ("step", "time", "heldout_images")  # the last is the same at every step

T = TypeVar("T")


class Point(NamedTuple):
    """One value of one metric; ``timestamp`` in milliseconds, taken from the log so that sending twice adds nothing."""

    key: str
    value: float
    timestamp: int
    step: int


def points_of(record: Record) -> Iterator[Point]:
    """The metrics of a record: the numbers of a training line, and those of an eval line under ``eval/``."""
    if record["kind"] not in PREFIXES or "step" not in record:
        return
    for name, value in record.items():
        if name not in NO_METRIC and isinstance(value, int | float) and not isinstance(value, bool):
            yield Point(PREFIXES[record["kind"]] + name, value, int(record["time"] * 1000), record["step"])


def is_training(key: str) -> bool:
    """Whether a metric comes from training lines."""
    return not key.startswith(("eval/", "system/"))


def redact(text: str) -> str:
    """Without the user and password of any URL."""
    return re.sub(r"://[^/@\s'\"]+@", "://", text)


def brief(error: BaseException) -> str:
    """An error's first line, of at most 200 characters, without secrets of a URL."""
    return redact(f"{type(error).__name__}: {error}".splitlines()[0][:200])


def prepare_mlflow() -> None:
    """Bound each request and silence MLflow; a value that the user has set wins."""
    quick = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
             "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1", "MLFLOW_LOGGING_LEVEL": "CRITICAL",
             "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "MLFLOW_DISABLE_TELEMETRY": "true",
             "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}  # fmt: skip
    for name, value in quick.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", "SOCKS support in urllib3")  # where a proxy is set that MLflow does not need
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors reach us as exceptions, without a page of traceback


@contextlib.contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """One process at a time sends a run. Raises BlockingIOError when another one does."""
    with (run_dir / ".mlflow.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def load_state(run_dir: Path, **defaults: Any) -> Record:
    """``mlflow.json``; without one, what a new run starts with. ``key`` finds the run again in any store."""
    path = run_dir / STATE
    new: Record = {"run_id": None, "experiment": "patchmill", "uri": None, "sent_step": -1, "key": uuid.uuid4().hex,
           "run_name": run_dir.resolve().name, "tags": {}, "inputs": []}  # fmt: skip
    if not path.exists():
        return {**new, **defaults}
    try:
        return {**new, **json.loads(path.read_text())}
    except (ValueError, TypeError):
        raise UserError(f"{path}: is damaged; remove it, then `patchmill sync --uri` sends the run anew") from None


def save_state(run_dir: Path, state: Record) -> None:
    """Write ``mlflow.json``, atomically."""
    replace_file(run_dir / STATE, json.dumps(state, indent=1).encode())


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _make_sqlite(path: Path) -> None:
    """Make the database aside and rename it: one whose making was cut off cannot be opened again."""
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for old in path.parent.glob(f".{path.name}.*.partial*"):
                old.unlink()
            # A new name each time: MLflow keeps a connection to every store that it has seen.
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
            MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)
            temporary.rename(path)
    # MLflow tries a database that cannot be opened for minutes before it says so.
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA schema_version")


class Remote:
    """A run folder's run in an MLflow store: found by its key, or made; then fed."""

    def __init__(self, run_dir: Path, state: Record, uri: str, began: float | None = None) -> None:
        """Connects, and notes run, store and highest step in ``state`` and ``mlflow.json``. Raises what MLflow raises.

        ``began``: when a run that is made now did begin, in seconds since 1970; by default now.
        """
        from mlflow import MlflowClient

        self._dir, self._state = run_dir, state
        self._sqlite = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
        if self._sqlite:
            _make_sqlite(self._sqlite)
        self._client = MlflowClient(uri)
        experiment = self._experiment()
        found = self._client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{state['key']}'", max_results=1)
        tags = {KEY_TAG: state["key"], **state["tags"]}
        start = None if began is None else int(began * 1000)
        self._run = found[0] if found else self._client.create_run(experiment, start, tags, state["run_name"])
        self.run_id: str = self._run.info.run_id
        # The step of each metric's last point: RunData shows it nowhere else (mlflow's own monitor reads it here too).
        self.latest: dict[str, int] = {metric.key: metric.step for metric in self._run.data._metric_objs}
        state.update(run_id=self.run_id, uri=redact(uri), sent_step=-1)
        self.note(max((step for key, step in self.latest.items() if is_training(key)), default=-1))

    def _experiment(self) -> str:
        name = self._state["experiment"]
        found = self._client.get_experiment_by_name(name)
        if found:
            return str(found.experiment_id)
        # Else MLflow puts a sqlite store's artifacts under whatever the working directory happens to be.
        location = (self._sqlite.parent / "mlartifacts").as_uri() if self._sqlite else None
        # Else MLflow's page shows what it has for language models.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(self._client.create_experiment(name, artifact_location=location, tags=kind))

    def note(self, step: int) -> None:
        """Remember the highest step that the store has."""
        self._state["sent_step"] = max(step, self._state["sent_step"])
        save_state(self._dir, self._state)

    def describe(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Parameters that are not there yet (MLflow's are final), cut to MLflow's limits, tags, and the state's datasets."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
        from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

        fit = {key[:MAX_ENTITY_KEY_LENGTH]: redact(str(value))[:MAX_PARAM_VAL_LENGTH] for key, value in params.items()}
        new = [Param(key, value) for key, value in fit.items() if key not in self._run.data.params]
        for part in _parts(new, MAX_PARAMS_TAGS_PER_BATCH):
            self._client.log_batch(self.run_id, params=part, synchronous=True)
        self._client.log_batch(self.run_id, tags=[RunTag(*item) for item in tags.items()], synchronous=True)
        # A run has a dataset once, however often it is told of; states of before they were kept have none.
        told = [{**data, "source": redact(data["source"])} for data in self._state.get("inputs", [])]
        sets = [DatasetInput(Dataset(**{key: text for key, text in data.items() if key != "context"}),
                             [InputTag("mlflow.data.context", data["context"])]) for data in told]  # fmt: skip
        if sets:
            self._client.log_inputs(self.run_id, sets)

    def send(self, points: Sequence[Point]) -> None:
        """Metrics, in as few requests as MLflow's limit allows."""
        from mlflow.entities import Metric
        from mlflow.utils.validation import MAX_METRICS_PER_BATCH

        for part in _parts(points, MAX_METRICS_PER_BATCH):
            self._client.log_batch(self.run_id, metrics=[Metric(*point) for point in part], synchronous=True)
            self.note(max((point.step for point in part if is_training(point.key)), default=-1))

    def send_new(self, records: Sequence[Record]) -> None:
        """The points past the last one of their metric."""
        new = []
        for point in (point for record in records for point in points_of(record)):
            if point.step > self.latest.get(point.key, -1):
                self.latest[point.key] = point.step
                new.append(point)
        self.send(new)

    def steps_of(self, key: str) -> set[int]:
        """The steps at which the store has a point of this metric."""
        return {metric.step for metric in self._client.get_metric_history(self.run_id, key)}

    def send_files(self) -> int:
        """The configuration and the seal as they are now, and the figures that are not there; returns how many."""
        sent = 0
        if (self._dir / "config.yaml").exists():
            self._client.log_text(self.run_id, redact((self._dir / "config.yaml").read_text()), "config.yaml")
            sent += 1
        if (self._dir / "data_seal.json").exists():
            self._client.log_artifact(self.run_id, str(self._dir / "data_seal.json"))
            sent += 1
        there = {Path(item.path).name for item in self._client.list_artifacts(self.run_id, "figures")}
        figures = [path for path in sorted(self._dir.glob("figures/*.png")) if path.name not in there]
        for path in figures:
            self._client.log_artifact(self.run_id, str(path), "figures")
        return sent + len(figures)

    def send_file(self, path: Path) -> None:
        """A file as it is now, in place of one of its name."""
        self._client.log_artifact(self.run_id, str(path))

    def model_with(self, tag: str, value: str) -> str | None:
        """The id of this run's whole model with that tag; one that was cut off is deleted."""
        for model in self._client.search_logged_models([self._run.info.experiment_id], f"tags.`{tag}` = '{value}'"):
            if model.source_run_id == self.run_id:
                if model.status == "READY":
                    return str(model.model_id)
                self._client.delete_logged_model(model.model_id)
        return None

    def make_model(self, name: str, tags: Mapping[str, str], params: Mapping[str, Any]) -> str:
        """A model of this run, which has nothing yet; its id."""
        model = self._client.create_logged_model(
            self._run.info.experiment_id, name, self.run_id, dict(tags), {key: str(value) for key, value in params.items()},
            "encoder")  # fmt: skip
        return str(model.model_id)

    def fill_model(self, model_id: str, folder: Path, step: int, points: Sequence[Point]) -> None:
        """Its files, the metrics that were measured of it, and its end: only then it counts as there."""
        from mlflow.entities import LoggedModelOutput, Metric

        self._client.log_model_artifacts(model_id, str(folder))
        metrics = [Metric(*point, model_id=model_id, run_id=self.run_id) for point in points]
        self._client.log_batch(self.run_id, metrics=metrics, synchronous=True)
        self._client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step)])
        self._client.finalize_logged_model(model_id, "READY")

    def set_status(self, status: str, ended: float | None = None) -> None:
        """RUNNING, FINISHED, KILLED or FAILED; ``ended`` in seconds since 1970, by default now."""
        if status == "RUNNING":
            self._client.update_run(self.run_id, status)
        else:
            self._client.set_terminated(self.run_id, status, None if ended is None else int(ended * 1000))
