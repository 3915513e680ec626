"""MLflow behind ``log.jsonl``: what the log says reaches the server sooner or later, once, and never holds training up.

MLflow deletes no point and its client may block for minutes, hence: everything is in the log first; a background
thread sends it on; whenever that thread is unsure (a new process, an outage, a full queue) it asks the server for the
last step of each metric and goes on from there in the log. ``sync`` compares whole histories instead and fills any gap.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.config import UserError, flatten, load_config
from pipeline.mlflow_run import (
    STATE,
    Point,
    Remote,
    brief,
    load_state,
    only_writer,
    points_of,
    prepare_mlflow,
    redact,
    save_state,
)
from pipeline.runlog import LOG, Record, RunLog, discard_after, read_log, read_whole

__all__ = [
    "MlflowSink",
    "RunLog",
    "SyncReport",
    "discard_after",
    "nest",
    "read_log",
    "resolve_uri",
    "send_figures",
    "sync",
    "tag",
]

FLUSH_S = 5.0
MAX_RETRY_S = 30.0
QUEUE_RECORDS = 10_000

log = logging.getLogger("patchmill")


SQLITE: Final = "sqlite:///"


def store_beside(run_dir: Path) -> Path:
    """The sqlite file beside a run folder; of a run in another's, such as a fine-tuning, beside that."""
    folder = run_dir.resolve().parent
    while (folder / "config.yaml").is_file():
        folder = folder.parent
    return folder / "mlflow.db"


def resolve_uri(setting: str, run_dir: Path) -> str | None:
    """``tracking.uri`` in force: auto is MLFLOW_TRACKING_URI, else a sqlite file beside the run; none is None."""
    if setting == "none":
        return None
    if setting == "auto":
        setting = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{store_beside(run_dir)}"
    if setting.startswith(SQLITE):
        return f"{SQLITE}{Path(setting.removeprefix(SQLITE)).resolve()}"
    return setting


class MlflowSink:
    """Sends a run to MLflow from a thread of its own. No call raises; only ``close`` waits, to its deadline."""

    def __init__(self, run_dir: Path, uri: str | None, experiment: str, run_name: str, params: Mapping[str, Any],
                 tags: Mapping[str, str], inputs: Sequence[Mapping[str, str]] = ()) -> None:  # fmt: skip
        """Starts the thread; it imports MLflow, connects, and catches up with the log. ``uri=None`` sends nothing.

        ``params`` have dotted keys; ``inputs`` are datasets of ``pipeline.mlflow_layout``. A run folder that has a run in
        the store already continues that one.
        """
        self._dir, self._uri, self._params = run_dir, uri, params
        self._tags = {name: redact(value) for name, value in tags.items()}
        known = load_state(run_dir, experiment=experiment, run_name=run_name)
        self._state = known | {"tags": known["tags"] | self._tags, "inputs": list(inputs)}
        if self._state != known or not (run_dir / STATE).exists():
            save_state(run_dir, self._state)  # sync makes the same run from it, should nothing ever connect
        self._queue: queue.Queue[Record | Path] = queue.Queue(QUEUE_RECORDS)
        self._closing, self._behind, self._complete = threading.Event(), True, False
        self._status, self._last_step, self._said = "FINISHED", -1, set[str]()
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True) if uri else None
        if self._thread:
            prepare_mlflow()
            self._thread.start()

    def log(self, step: int, record: Record) -> None:
        """Take over a record that is in the log already. When the queue is full the thread reads it there."""
        if self._thread:
            self._last_step = step
            self._put(record)

    def log_figure(self, path: Path) -> None:
        """Take over a picture in the run's ``figures`` folder that is written already."""
        if self._thread:
            self._put(path)

    def _put(self, item: Record | Path) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._behind = True

    def close(self, status: str = "FINISHED", deadline_s: float = 10.0) -> None:
        """Send what is left, set the run's status (FINISHED, KILLED or FAILED); a warning says what did not make it."""
        if not self._thread:
            return
        self._status = status
        self._closing.set()
        self._thread.join(deadline_s)
        if not self._complete:
            sent = self._state["sent_step"]
            has = f"this run up to step {sent} of {self._last_step}" if sent >= 0 else "nothing of this run"
            log.warning("MLflow has %s; the log has the rest: patchmill sync %s sends it", has, self._dir)

    def _say_once(self, text: str, error: BaseException) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("MLflow (%s) %s", redact(str(self._uri)), f"{text}: {brief(error)}")

    def _run(self) -> None:
        wait_s = 1.0
        while not self._complete:
            last = self._closing.is_set()  # an attempt that began before is followed by one more
            try:
                with only_writer(self._dir):
                    self._feed()
            except Exception as error:  # whatever MLflow raises must not reach training
                self._say_once("takes nothing now; training goes on, the log has all of it, trying again", error)
                if last:
                    return
                self._behind = True
                self._closing.wait(wait_s)
                wait_s = min(2 * wait_s, MAX_RETRY_S)

    def _feed(self) -> None:
        """One connection, until the end or until it fails."""
        remote = Remote(self._dir, self._state, str(self._uri))
        remote.set_status("RUNNING")
        remote.describe(self._params, self._tags)
        self._send_files(remote)
        monitor = _start_monitor(remote.run_id, str(self._uri))
        try:
            while True:
                closing = self._closing.wait(FLUSH_S)
                self._send_queue(remote)
                if closing and self._queue.empty() and not self._behind:
                    break
        finally:
            monitor.finish()
        self._send_files(remote)
        remote.set_status(self._status)
        self._complete = True

    def _send_queue(self, remote: Remote) -> None:
        behind, self._behind = self._behind, False
        items: list[Record | Path] = []
        with contextlib.suppress(queue.Empty):
            while len(items) < QUEUE_RECORDS:
                items.append(self._queue.get_nowait())
        # The queue is emptied before the log is read: a record that comes in between is in both and counts once.
        records = read_whole(self._dir / LOG)[0] if behind else [item for item in items if isinstance(item, dict)]
        remote.send_new(records)
        if any(isinstance(item, Path) for item in items):
            self._send_files(remote)

    def _send_files(self, remote: Remote) -> None:
        try:
            remote.send_files()
        except Exception as error:  # an artifact store may be closed to us while the metrics' is open
            self._say_once("takes no files; metrics go on, patchmill sync sends the files later", error)


def _start_monitor(run_id: str, uri: str) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


@dataclass(frozen=True)
class SyncReport:
    """What ``sync`` did: points sent now and found there, files sent, the run's status, the model's id where one was asked for."""

    uri: str
    run_id: str
    sent: int
    present: int
    files: int
    status: str
    model: str | None = None

    def __str__(self) -> str:
        """One line."""
        model = f", models:/{self.model}" if self.model else ""
        return (f"{self.uri}: run {self.run_id} ({self.status}): {self.sent} points sent, {self.present} were there, "
                f"{self.files} files sent{model}")  # fmt: skip


def _status_of(run_dir: Path, records: Sequence[Record]) -> str:
    with (run_dir / ".lock").open("w") as file:  # held by the process that trains here
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "RUNNING"
    turns = [record["kind"] for record in records if record["kind"] in ("start", "resume", "stop", "import")]
    if turns == ["import"]:  # trained elsewhere, to its end
        return "FINISHED"
    why = run_dir / "why_stopped.json"
    if turns[-1:] != ["stop"] or not why.exists():
        return "KILLED"
    try:
        stopped = json.loads(why.read_text())
        done, reason = stopped["done"], str(stopped["reason"])
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{why}: is damaged; remove it") from None
    return "FINISHED" if done else "KILLED" if reason.startswith("stopped by") else "FAILED"


def _replay(run_dir: Path, state: Record, uri: str, records: Sequence[Record], tags: Mapping[str, str],
            weights: str | None) -> SyncReport:  # fmt: skip
    # The run's own time, not that of the replay or of a probe that came later: MLflow compares durations.
    times = [record["time"] for record in records if record["kind"] != "eval"]
    remote = Remote(run_dir, state, uri, min(times, default=None))
    config = run_dir / "config.yaml"
    remote.describe(
        flatten(load_config([config]).model_dump(mode="json")) if config.exists() else {}, state["tags"] | tags
    )
    points: dict[tuple[str, int], Point] = {}
    for point in (point for record in records for point in points_of(record)):
        points.setdefault((point.key, point.step), point)  # the first, as the sink sends
    there = {(key, step) for key in {key for key, _ in points} for step in remote.steps_of(key)}
    missing = [point for place, point in points.items() if place not in there]
    remote.send(missing)
    files, status = remote.send_files(), _status_of(run_dir, records)
    remote.set_status(status, max(times, default=None))
    model = None
    if weights is not None:
        from pipeline.mlflow_model import send_model

        model = send_model(remote, run_dir, weights)
    return SyncReport(redact(uri), remote.run_id, len(missing), len(points) - len(missing), files, status, model)


def sync(run_dir: Path, uri: str | None = None, tags: Mapping[str, str] | None = None,
         weights: str | None = None) -> SyncReport:  # fmt: skip
    """Send to MLflow what the run folder has and the run in the store has not; makes the run if there is none.

    ``uri`` defaults to where the run was sent before; ``tags`` are set beside the run's own; ``weights`` names those of the
    encoder that is sent as a model, none by default. Raises UserError when the folder has no log or not these weights, no
    store is known, another process sends this run, or the store does not answer (within the client's timeout).
    """
    if not (run_dir / LOG).exists():
        raise UserError(f"{run_dir} is not a run folder: it has no {LOG}; give the run.dir of `patchmill train`")
    state = load_state(run_dir)
    target = resolve_uri(uri, run_dir) if uri else _known_store(run_dir, state)
    if target is None:
        raise UserError(f"{run_dir} was never sent to MLflow: name a store with --uri, such as http://127.0.0.1:5000")
    with _told(run_dir, target, "name another store with --uri"):
        return _replay(run_dir, state, target, read_log(run_dir / LOG), tags or {}, weights)


def _known_store(run_dir: Path, state: Mapping[str, Any]) -> str | None:
    """Where a run was sent, which is kept without user and password: with them while the settings still name that store.

    Raises UserError for a sqlite file that is gone, unless the one of the settings, such as one beside the run, is there.
    """
    config = run_dir / "config.yaml"
    setting = resolve_uri(load_config([config]).tracking.uri, run_dir) if config.exists() else None
    sent = resolve_uri(state["uri"], run_dir) if state["uri"] else None
    if sent is None or (setting is not None and redact(setting) == sent):
        return setting
    if state["run_id"] is not None and _is_gone(sent):
        if setting is None or not setting.startswith(SQLITE) or _is_gone(setting):
            raise UserError(f"{sent}: is not there any more, to which {run_dir} was sent; name a store with --uri")
        return setting
    return sent


def _is_gone(uri: str) -> bool:
    return uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists()


def nest(folder: Path, uri: str, experiment: str, params: Mapping[str, Any], tags: Mapping[str, str],
         runs: Sequence[Path]) -> str:  # fmt: skip
    """Make a run in the store for a folder of runs, under which those that have not begun will be; its id.

    A second call finds it. It is finished at once: it only says what the runs have in common. Raises UserError when the
    store does not answer.
    """
    state = load_state(folder, experiment=experiment)
    with _told(folder, uri, "set tracking.uri"):
        remote = Remote(folder, state, uri)
        remote.describe(params, tags)
        remote.set_status("FINISHED")
    for run in runs:
        if not (run / STATE).exists():
            under = {"mlflow.parentRunId": remote.run_id}
            name = f"{folder.name}/{run.name}"
            save_state(run, load_state(run, experiment=experiment, run_name=name, tags=under))
    return remote.run_id


def tag(run_dir: Path, uri: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run that its own process sends to ``uri``, also meanwhile; none while that has not begun.

    Raises UserError when the store does not answer.
    """
    run_id = load_state(run_dir)["run_id"]
    if run_id is not None:
        with _reachable(uri, "set tracking.uri"):
            from mlflow import MlflowClient
            from mlflow.entities import RunTag

            MlflowClient(uri).log_batch(run_id, tags=[RunTag(*item) for item in tags.items()], synchronous=True)


def send_figures(run_dir: Path, paths: Sequence[Path]) -> str | None:
    """Put pictures among the figures of the run's run in the store that has it, in place of those of their names; the store.

    None, with a warning, when it does not take them, and without one for a run that no store has.
    """
    state = load_state(run_dir)
    if state["run_id"] is None:
        return None
    uri = str(_known_store(run_dir, state))
    try:
        with _reachable(uri, "patchmill sync sends the pictures later"):
            from mlflow import MlflowClient

            client = MlflowClient(uri)
            for path in paths:
                client.log_artifact(state["run_id"], str(path), "figures")
    except UserError as error:
        log.warning("%s", error)
        return None
    return redact(uri)


@contextlib.contextmanager
def _told(run_dir: Path, uri: str, remedy: str) -> Iterator[None]:
    """As the only writer of a run. Raises UserError where another process is, and in place of what MLflow raises."""
    with _reachable(uri, remedy):
        try:
            with only_writer(run_dir):
                yield
        except BlockingIOError:
            raise UserError(
                f"{run_dir}: another process sends this run to MLflow; try again when it has ended"
            ) from None


@contextlib.contextmanager
def _reachable(uri: str, remedy: str) -> Iterator[None]:
    """MLflow's client is ready in here. Raises UserError in place of what it raises."""
    prepare_mlflow()
    from mlflow import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(f"{error.filename}: {error.strerror}") from error
        raise UserError(
            f"MLflow ({redact(uri)}) cannot be reached or refuses: {brief(error)}; start it, or {remedy}"
        ) from error
