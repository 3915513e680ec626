"""What a run was: its settings, a line a step, what it cost and how it ended; from its folder or from MLflow. No torch.

A folder's log is read as the trainer leaves it: what a restart or a roll-back went back over counts in the time that the run
took and nowhere else. MLflow has the settings and the metrics only.
"""

import contextlib
import json
import math
import sqlite3
from ast import literal_eval
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.config import Config, ConfigError, UserError, flatten, load_config, read_yaml
from pipeline.estimate import flops_per_image
from pipeline.mlflow_run import KEY_TAG, STATE, brief, is_training, prepare_mlflow, redact
from pipeline.runlog import CHANGED, DISCARDED, LOG, Record, read_log

CONFIG, WHY = "config.yaml", "why_stopped.json"
STARTS: Final = ("start", "resume")
# What only a process that trains writes; a probe's eval lines may come days later.
TRAINER: Final = frozenset({*STARTS, "train", "checkpoint", "skip", "straggler", "rollback", "stop"})
HELDOUT: Final = "heldout_loss"
ONLINE: Final = "effective_rank"  # in every line of the trainer's online signals
NO_SCORES: Final = ("kind", "time", "step", "heldout_images", "val_images", "online_images", "online_s")
WINDOW: Final = 50  # training lines in a mean

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Session:
    """A process group's time with a run, in seconds since 1970, and the line that it began with."""

    began: float
    ended: float
    line: Record

    @property
    def seconds(self) -> float:
        """How long it trained."""
        return self.ended - self.began

    @property
    def cost(self) -> float:
        """Process-seconds; NaN where the log does not say how many processes there were."""
        return self.seconds * self.processes

    @property
    def processes(self) -> float:
        """How many, or NaN."""
        return float(self.line.get("processes", math.nan))


@dataclass(frozen=True)
class History:
    """A run. Arrays have an entry a step that counts, NaN where nothing is known; ``facts`` has None there.

    ``labels``: names, the shortest first; ``origin``: where it was read; ``key``: what finds it in MLflow.
    ``points``: of held-out loss and probes by name, (step, value) in the order of the log. ``changed``: by name, the settings in
    which the newest was measured otherwise than the run says, where there are any.
    """

    labels: tuple[str, ...]
    origin: str
    is_folder: bool
    key: str | None
    params: dict[str, Any]
    steps: Floats
    loss: Floats
    images: Floats
    flops: Floats
    hours: Floats
    points: dict[str, list[tuple[int, float]]]
    changed: dict[str, dict[str, Any]]
    facts: dict[str, Any]


def counting(records: Sequence[Record]) -> list[Record]:
    """The records without those that a start, a resume or a roll-back went back over."""
    kept: list[Record] = []
    highest = -1
    for record in records:
        step = record.get("step", -1)
        if record["kind"] in (*STARTS, "rollback") and step < highest:
            kept = [other for other in kept if other.get("step", -1) <= step]
            highest = step
        kept.append(record)
        highest = max(highest, step)
    return kept


def sessions(records: Sequence[Record]) -> list[Session]:
    """Each from a start or resume line to the trainer's last line before the next one, in the order of time."""
    own = [record for record in records if record["kind"] in TRAINER or HELDOUT in record or ONLINE in record]
    starts = {record["time"]: record for record in own if record["kind"] in STARTS}
    began = np.array(sorted(starts))
    times = np.array([record["time"] for record in own])
    place = np.searchsorted(began, times, side="right") - 1
    return [Session(at, float(times[place == number].max()), starts[at]) for number, at in enumerate(began.tolist())]


def process_hours(parts: Sequence[Session], times: Floats) -> Floats:
    """What the run had cost at each of ``times``; NaN before its first session and where processes are not known."""
    if not parts:
        return np.full(len(times), np.nan)
    began = np.array([part.began for part in parts])
    before = np.cumsum([0.0, *(part.cost for part in parts)])
    place = np.searchsorted(began, times, side="right") - 1
    within = (times - began[place]) * np.array([part.processes for part in parts])[place]
    return np.where(place < 0, np.nan, before[place] + within) / 3600


def _column(lines: Sequence[Record], name: str) -> Floats:
    return np.array([line.get(name, math.nan) for line in lines], dtype=np.float64)


def _told(parts: Sequence[Session], name: str) -> list[Any] | None:
    """The values of a start line's key, one for each change; None where no line has it."""
    values = [part.line.get(name) for part in parts]
    changes = [value for number, value in enumerate(values) if not number or value != values[number - 1]]
    return changes if any(value is not None for value in values) else None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _last(column: Floats) -> float | None:
    return _known(float(column[-1])) if len(column) else None


def _points(kept: Sequence[Record]) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for record in (record for record in kept if record["kind"] == "eval"):
        for name, value in record.items():
            if name not in NO_SCORES and isinstance(value, int | float):
                points.setdefault(name, []).append((record.get("step", 0), float(value)))
    return points


def _changed(kept: Sequence[Record]) -> dict[str, dict[str, Any]]:
    newest = {name: record.get(CHANGED, {}) for record in kept if record["kind"] == "eval" for name in record}
    return {name: settings for name, settings in newest.items() if settings and name not in (*NO_SCORES, CHANGED)}


def _history(labels: tuple[str, ...], origin: str, key: str | None, params: dict[str, Any], cfg: Config | None,
             records: Sequence[Record], gone: Sequence[Record], ended: str | None, mlflow: str | None, *,
             is_folder: bool) -> History:  # fmt: skip
    """``gone``: records that the trainer discarded. What is no folder has metrics only, and no other kinds of records."""
    kept, everything, whole = counting(records), [*gone, *records], is_folder and bool(records)
    by_step = {record["step"]: record for record in kept if record["kind"] == "train" and "step" in record}
    lines = [by_step[step] for step in sorted(by_step)]
    parts = sessions(everything)
    steps, rate = _column(lines, "step"), _column(lines, "images_per_s")
    images = _column(lines, "samples_seen")
    if cfg is not None:
        images = np.where(np.isnan(images), steps * cfg.train.global_batch, images)
    told = [part.line["flops_per_image"] for part in parts if "flops_per_image" in part.line]
    each = told[-1] if told else flops_per_image(cfg).step if cfg is not None else math.nan
    totals = [part.line["total_steps"] for part in parts if "total_steps" in part.line]
    facts = {
        "method": params.get("method.name"), "model": params.get("model.name"), "step": lines[-1]["step"] if lines else None,
        "total_steps": totals[-1] if totals else cfg.train.steps if cfg is not None else None,
        "images": _last(images), "flops": _last(images * each),
        **{name: _told(parts, name) for name in ("engine", "processes", "precision", "device")},
        "hours": sum(part.seconds for part in parts) / 3600 if parts else None,
        "process_hours": _known(sum(part.cost for part in parts) / 3600) if parts else None,
        "images_per_s": float(np.nanmedian(rate)) if np.isfinite(rate).any() else None,
        "restarts": len(parts) - 1 if parts else None,
        "rollbacks": len({line["time"] for line in everything if line["kind"] == "rollback"}) if whole else None,
        "skipped": len({line.get("step") for line in kept if line["kind"] == "skip"}) if whole else None,
        "ended": ended, "mlflow": mlflow,
    }  # fmt: skip
    return History(labels, origin, is_folder, key, params, steps, _column(lines, "loss"), images, images * each,
                   process_hours(parts, _column(lines, "time")), _points(kept), _changed(kept), facts)  # fmt: skip


def read_folder(folder: Path) -> History:
    """A run from its folder. Raises UserError when it is none, cannot be read, or its log is damaged."""
    try:
        path = folder.resolve()
        config, log = (path / CONFIG).is_file(), (path / LOG).is_file()
        if not config and not log:
            raise UserError(
                f"{folder} is no run folder: it has no {CONFIG} and no {LOG}; give the run.dir of `patchmill train`"
            )
        records, gone = _records(path / LOG), _records(path / DISCARDED)
        params, cfg = _settings(path / CONFIG) if config else ({}, None)
        state = _object(path / STATE)
        sent = f"{state['run_id']} in {state.get('uri')}" if state.get("run_id") else None
        ended = _ended(path, records)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.filename}: {error.strerror})") from None
    labels = tuple("/".join(path.parts[-n:]) for n in range(1, len(path.parts)))
    return _history(labels or (str(path),), str(path), state.get("key"), params, cfg, records, gone, ended, sent,
                    is_folder=True)  # fmt: skip


def _object(path: Path) -> Record:
    """The object in a JSON file, an empty one without the file. Raises UserError for what is none."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is damaged (not a JSON object)")
    return found


def _records(path: Path) -> list[Record]:
    records = read_log(path)
    if not all(isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("time"), int | float)
               and isinstance(record.get("step", 0), int) for record in records):  # fmt: skip
        raise UserError(
            f"{path} is not the log of a run: it has lines without kind and time, or whose step is no number"
        )
    return records


def _settings(path: Path) -> tuple[dict[str, Any], Config | None]:
    """The flat settings, whole where this version understands the file, else as they stand there."""
    try:
        cfg = load_config([path])
    except ConfigError:
        return flatten(read_yaml(path)), None
    return flatten(cfg.model_dump(mode="json")), cfg


def _ended(folder: Path, records: Sequence[Record]) -> str | None:
    """How the last session ended: the reason that was written, or that none was."""
    turns = [record for record in records if record["kind"] in (*STARTS, "stop")]
    if not turns:
        return None
    why = _object(folder / WHY)
    begun = sum(record["kind"] in STARTS for record in turns)
    reason = str(why["reason"]) if why.get("restarts") == begun - 1 else None  # else it is an earlier session's
    if turns[-1]["kind"] == "stop":
        told = str(turns[-1].get("reason"))
        return reason if reason is not None and reason.startswith(told) else told
    time = max(record["time"] for record in records if record["kind"] in TRAINER)
    last = datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M")
    return reason or f"running or killed (no stop line; last line {last})"


def _python(text: str) -> Any:
    """A parameter's value from what MLflow keeps, its text."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections. A key in what is a value already, as other programs' runs may have, is left out."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections_, last = key.split(".")
        part: Any = tree
        for name in sections_:
            part = part.setdefault(name, {}) if isinstance(part, dict) else None
        if isinstance(part, dict):
            part[last] = value
    return tree


def _open_store(uri: str) -> None:
    """Raises UserError for a sqlite store that is not there: MLflow would make it, or try for minutes."""
    if not uri.startswith("sqlite:///"):
        return
    path = Path(uri.removeprefix("sqlite:///"))
    if not path.is_file():
        raise UserError(f"MLflow store {uri}: there is no such file; name another with --uri")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'runs'").fetchone():
                raise UserError(f"MLflow store {uri}: holds no MLflow runs; name another with --uri")
    except sqlite3.Error as error:
        raise UserError(f"MLflow store {uri}: cannot be opened ({error}); name another with --uri") from None


def read_mlflow(run_id: str, uris: Sequence[str]) -> History:
    """A run from the first of the stores that has it. Raises UserError when none has it or one does not answer."""
    for uri in uris:
        _open_store(uri)
    prepare_mlflow()
    from mlflow import MlflowClient, MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for uri in uris:
        try:
            client = MlflowClient(uri)
            run = client.get_run(run_id)
            names = [
                "loss",
                "images_per_s",
                "samples_seen",
                *(key for key in run.data.metrics if key.startswith("eval/")),
            ]
            metrics = {name: client.get_metric_history(run_id, name) for name in names if name in run.data.metrics}
        except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                continue
            raise UserError(f"MLflow ({redact(uri)}) cannot be reached or refuses: {brief(error)}; start it, or name "
                            "another store with --uri") from None  # fmt: skip
        return _of_mlflow(run, metrics, f"{run_id} in {redact(uri)}")
    raise UserError(f"{run_id}: no such run in MLflow ({', '.join(map(redact, uris))}); name its store with --uri")


def _of_mlflow(run: Any, metrics: Mapping[str, Sequence[Any]], origin: str) -> History:
    lines: dict[int, Record] = {}
    evals: list[Record] = []
    for name, metric in ((name, metric) for name, points in metrics.items() for metric in points):
        if is_training(name):
            line = lines.setdefault(
                metric.step, {"kind": "train", "time": metric.timestamp / 1000, "step": metric.step}
            )
            line[name] = metric.value
        else:
            evals.append({"kind": "eval", "time": metric.timestamp / 1000, "step": metric.step,
                          name.removeprefix("eval/"): metric.value})  # fmt: skip
    params = {key: _python(text) for key, text in run.data.params.items()}
    try:
        cfg = load_config([], defaults=_tree(params))
    except UserError:
        cfg = None
    name, run_id = run.info.run_name or "run", run.info.run_id
    evals.sort(key=lambda record: record["time"])
    return _history((name, f"{name} {run_id[:8]}", f"{name} {run_id}"), origin, run.data.tags.get(KEY_TAG), params, cfg,
                    [*lines.values(), *evals], [], str(run.info.status).lower(), origin, is_folder=False)  # fmt: skip
