"""``patchmill scale``: a short job for each point of a product of settings, to see what more processes or another model give.

A point is a run of its own in the folder ``run.dir``, named by its settings. What has neither a result nor a job is queued.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from pipeline.config import Config, ConfigError, RunFailed, UserError, flatten, load_config
from slurm.job import CONFIG, read_json
from slurm.local import Line
from slurm.queue import LIVE
from slurm.status import Status, look
from slurm.submit import JOB, plan, submit

Batch = Literal["per-process", "fixed"]

SHORTHAND: Final = {"nodes": "slurm.nodes"}
PROCESSES: Final = ("slurm.nodes", "slurm.gpus_per_node", "slurm.tasks_per_node")
INTERVAL: Final = 5  # steps whose images/s are one number
POLL_S: Final = 2.0
UNHEARD_S: Final = 120.0  # of a job that Slurm does not know (any more), before it counts as ended
# What may differ between calls: it does not change what is measured.
FREE: Final = {"run.dir", "slurm.partition", "slurm.account", "slurm.qos", "slurm.time", "slurm.mem", "slurm.gpu",
               "slurm.signal_lead_s"}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A run to measure: its settings on the axes as text, and its configuration."""

    name: str
    settings: dict[str, str]
    cfg: Config

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.cfg.run.dir)

    @property
    def series(self) -> str:
        """All settings but the first one that says how many processes there are; points that agree in it are compared."""
        counted = next((key for key in PROCESSES if key in self.settings), None)
        others = {key: value for key, value in self.settings.items() if key != counted}
        return " ".join(words_of(others)) or f"{self.cfg.method.name} {self.cfg.model.name}"


@dataclass(frozen=True)
class Standing:
    """A point and what became of it: done, failed, missing, or its job's state."""

    point: Point
    state: str
    status: Status | None

    @property
    def is_live(self) -> bool:
        """Whether a job has it."""
        return self.state not in ("done", "failed", "missing")


def short(steps: int) -> dict[str, str]:
    """The settings that make a run a measurement."""
    return {
        "train.steps": str(steps), "train.epochs": "null", "optim.warmup_steps": str(steps - 1), "optim.warmup_epochs": "null",
        "checkpoint.every_steps": str(steps), "checkpoint.keep": "1", "log.every_steps": str(INTERVAL),
        "eval.loss_every": "null", "eval.online_every": "null", "profile.start_step": "null", "run.resume": "auto",
        "slurm.max_crashes": "1",
    }  # fmt: skip


def split(value: str) -> list[str]:
    """The parts of a value between commas; a list, a mapping and what is quoted are one part, with the commas in it."""
    text = f"[{value}]"
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return [value]  # whatever is wrong with it is said where it is read
    return [text[item.start_mark.index : item.end_mark.index] for item in node.value] or [value]


def read_axes(words: Sequence[str], own: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """(values of each axis, the other settings). Raises ConfigError; ``own``: the keys of ``short``, which has the last word."""
    axes, others, problems = dict[str, list[str]](), list[str](), list[str]()
    for word in words:
        key, _, value = word.partition("=")
        key, values = SHORTHAND.get(key, key), split(value)
        if key in own and (len(values) > 1 or key == "train.steps"):  # other single values of them are replaced
            problems.append(f"{key}: is the measurement's own and cannot be set; --steps says how long a point is")
        elif key in axes:
            problems.append(f"{key}: is given twice")
        elif len(values) == 1:
            others.append(f"{key}={value}")
        elif key in ("run.dir", "tracking.uri"):
            problems.append(f"{key}: is one for all points; quote a value that has a comma")
        elif len(set(values)) < len(values):
            problems.append(f"{key} = {value}: has a value twice")
        else:
            axes[key] = values
    if not axes and not problems:
        problems.append(
            "no setting has several values: separate them by commas, such as nodes=1,2,4 model.name=vit_b,vit_l"
        )
    if problems:
        raise ConfigError(problems)
    return axes, others


def words_of(settings: Mapping[str, str]) -> list[str]:
    """A word for each setting that may be in a file's name, such as ``nodes-2`` and ``vit_l``."""
    texts = {key: re.sub(r"[^\w.+-]+", "-", value).strip("-") for key, value in settings.items()}
    return [text if key.endswith(".name") else f"{key.rpartition('.')[2]}-{text}" for key, text in texts.items()]


class Problems:
    """What is wrong with points, each problem once with the names of those that have it."""

    def __init__(self) -> None:
        """None yet."""
        self._found: dict[str, list[str]] = {}

    def add(self, name: str, error: UserError) -> None:
        """Take what was raised for a point."""
        for text in error.problems if isinstance(error, ConfigError) else [str(error)]:
            self._found.setdefault(text, []).append(name)

    def raise_any(self) -> None:
        """Raises ConfigError when there are any."""
        if self._found:
            raise ConfigError([f"{', '.join(names)}: {text}" for text, names in self._found.items()])


def read_points(settings: Sequence[str], steps: int, batch: Batch) -> tuple[Config, list[Point]]:
    """The configuration that the points share, as the first of them has it, and the points.

    The batch of the configuration is that of the points with the fewest processes; per-process, the others' grows with
    theirs. Raises ConfigError with every problem and the points that have it.
    """
    own = short(steps)
    axes, others = read_axes([word for word in settings if "=" in word], own)
    files = [word for word in settings if "=" not in word]
    chosen = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    words = [[*others, *(f"{key}={value}" for key, value in {**some, **own}.items())] for some in chosen]
    names, problems, first = ["_".join(words_of(some)) for some in chosen], Problems(), list[Config]()
    if len(set(names)) < len(names):
        raise UserError(
            f"two points would have one folder: {', '.join(sorted({n for n in names if names.count(n) > 1}))}"
        )
    for name, own_words in zip(names, words, strict=True):
        try:
            first.append(load_config(files, own_words))
        except ConfigError as error:
            problems.add(name, error)
    problems.raise_any()
    fewest, found = min(cfg.slurm.world for cfg in first), list[Point]()
    for name, some, own_words, cfg in zip(names, chosen, words, first, strict=True):
        size = cfg.train.global_batch * (cfg.slurm.world if batch == "per-process" else fewest) // fewest
        try:
            cfg = load_config(files, [*own_words, f"train.global_batch={size}", "tracking.uri=none"])
        except ConfigError as error:
            problems.add(name, error)
            continue
        place = cfg.run.model_copy(update={"dir": str(Path(cfg.run.dir) / name)})
        found.append(Point(name, some, cfg.model_copy(update={"run": place})))
    problems.raise_any()
    if (Path(first[0].run.dir) / "log.jsonl").exists():
        raise UserError(
            f"run.dir = {first[0].run.dir}: is the folder of a run; name another one, for the points' folders"
        )
    return first[0], found


def find(points: Sequence[Point]) -> list[Standing]:
    """What became of each point by now."""
    found = []
    for point in points:
        if not (point.folder / JOB).exists():
            found.append(Standing(point, "missing", None))
            continue
        status = look(point.folder)
        if read_json(point.folder / "why_stopped.json").get("done"):
            state = "done"
        else:
            state = status.state.lower() if status.state in LIVE else "failed"
        found.append(Standing(point, state, status))
    return found


def require_same(standings: Sequence[Standing]) -> None:
    """Raises ConfigError where a point that has a result or a job was queued with other settings."""
    problems = Problems()
    for standing in standings:
        if standing.is_live or standing.state == "done":
            point = standing.point
            old, new = (_compared(cfg) for cfg in (load_config([point.folder / CONFIG]), point.cfg))
            differing = [f"{key} = {old.get(key)} (not {new.get(key)})" for key in sorted(old.keys() | new.keys())
                         if old.get(key) != new.get(key)]  # fmt: skip
            if differing:
                problems.add(point.name, UserError(f"was measured with {'; '.join(differing)}; choose another run.dir, or "
                                                   "remove that folder"))  # fmt: skip
    problems.raise_any()


def _compared(cfg: Config) -> dict[str, Any]:
    return {key: value for key, value in flatten(cfg.model_dump(mode="json")).items() if key not in FREE}


def queue(standings: Sequence[Standing]) -> Iterator[str]:
    """Queue what has neither a result nor a job, once all of it is in order; a line for each. Raises ConfigError before that."""
    owed, problems = [one for one in standings if one.state in ("missing", "failed")], Problems()
    for standing in owed:
        try:
            plan(standing.point.cfg, queue=True)
        except UserError as error:
            problems.add(standing.point.name, error)
    problems.raise_any()
    line: Line | None = None  # without Slurm: what runs at the same time would be measured with it
    for standing in owed:
        point = standing.point
        again = f" again, it had failed: {standing.status.why or 'it left no word why'}" if standing.status else ""
        line = line or (Line(point.folder.parent, 1) if point.cfg.slurm.executor == "local" else None)
        submit(point.cfg, line)
        yield f"{point.name}: queued{again}; job {read_json(point.folder / JOB).get('job')}"


def follow(points: Sequence[Point]) -> list[Standing]:
    """Wait until no point has a job any more, with progress on stderr; what became of them."""
    from pipeline.metrics import Progress

    heard = dict.fromkeys((point.name for point in points), time.monotonic())
    with Progress("scale", len(points), "point") as progress:
        while True:
            standings = find(points)
            live = [one for one in standings if one.is_live]
            heard |= {
                one.point.name: time.monotonic() for one in standings if one.status and one.status.state != "UNKNOWN"
            }
            unsure = [one for one in standings if one.state == "failed" and one.status and one.status.state == "UNKNOWN"
                      and time.monotonic() - heard[one.point.name] < UNHEARD_S]  # fmt: skip
            progress.update(len(points) - len(live) - len(unsure), text=describe(live))
            if not live and not unsure:
                return standings
            time.sleep(POLL_S)


def describe(live: Sequence[Standing]) -> str:
    """Where the points that have a job are: those that run with their step, of the others how many."""
    running = [f"{one.point.name} {progress_of(one)}" for one in live if one.state == "running"]
    waiting = len(live) - len(running)
    return ", ".join([*running, *([f"{waiting} wait"] if waiting else [])]) or "all ended"


def progress_of(standing: Standing) -> str:
    """A point's state, of a job that runs with its step, of one that waits with Slurm's reason."""
    status = standing.status
    if status is None or not standing.is_live:
        return standing.state
    if standing.state == "running":
        return f"running {status.step}/{standing.point.cfg.train.steps}"
    return f"{standing.state} ({status.reason})" if status.reason else standing.state


def require_results(standings: Sequence[Standing]) -> None:
    """Raises RunFailed, naming the points that have no result."""
    failed = [one.point.name for one in standings if one.state != "done"]
    if failed:
        raise RunFailed(f"{len(failed)} of {len(standings)} points have no result: {', '.join(failed)}; the same command "
                        "queues them again")  # fmt: skip
