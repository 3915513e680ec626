"""The points of a sweep: a grid, a list or random draws over dotted keys, read from YAML."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Discriminator, Field, JsonValue, Tag, ValidationError, model_validator

from pipeline.config import ConfigError, find_config, read_yaml
from pipeline.settings import Positive, Section
from slurm.job import read_json

SWEEP: Final = "sweep.json"  # in a sweep's folder: the settings of each of its runs
MAX_POINTS: Final = 1000  # of Slurm's arrays as they are set up by default
FIXED: Final = ("run.", "slurm.", "tracking.")  # one job array and one parent run have one of each

Settings = dict[str, JsonValue]
Values = Annotated[list[JsonValue], Field(min_length=1)]


class Range(Section):
    """Draws from ``low`` to ``high``, whole numbers when both are; ``log``: evenly in the logarithm."""

    low: float | int
    high: float | int
    log: bool = False

    @model_validator(mode="after")
    def _in_order(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"low = {self.low} should be below high = {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low = {self.low} should be above 0 with log: true")
        return self

    def draw(self, share: float) -> float | int:
        """The value at a share in [0, 1) of the range, with four digits."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        low, high = (self.low, self.high + 1) if whole else (self.low, self.high)
        at = low * (high / low) ** share if self.log else low + (high - low) * share
        return math.floor(at) if whole else min(max(float(f"{at:.4g}"), self.low), self.high)


class Draws(Section):
    """``draws`` points, of which each key has a value from a range or a list. ``seed``: the same draws each time."""

    draws: Positive
    seed: int = 0
    keys: Annotated[dict[str, Annotated[Annotated[Range, Tag("range")] | Annotated[Values, Tag("list")],
                                        Discriminator(lambda value: "list" if isinstance(value, list) else "range")]],
                    Field(min_length=1)]  # fmt: skip


class Space(Section):
    """What a sweep's YAML file holds: one of ``grid``, ``list`` and ``random``; ``parallel``: so many jobs at a time."""

    grid: Annotated[dict[str, Values], Field(min_length=1)] | None = None
    listed: Annotated[list[Annotated[Settings, Field(min_length=1)]], Field(min_length=1)] | None = Field(
        None, alias="list"
    )
    random: Draws | None = None
    parallel: Positive | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "Space":
        if sum(kind is not None for kind in (self.grid, self.listed, self.random)) != 1:
            raise ValueError("set exactly one of grid, list and random")
        return self

    def points(self) -> list[Settings]:
        """The settings of each point, in order."""
        if self.grid is not None:
            return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        if self.listed is not None:
            return self.listed
        assert self.random is not None
        chance, keys = random.Random(self.random.seed), self.random.keys  # noqa: S311  no secret
        return [{key: values[int(chance.random() * len(values))] if isinstance(values, list) else values.draw(chance.random())
                 for key, values in keys.items()} for _ in range(self.random.draws)]  # fmt: skip


def read_space(name: str) -> Space:
    """A space from a file or a shipped one by name (``sweep/lr``). Raises ConfigError with every problem."""
    path = find_config(name)
    try:
        space = Space.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError([_explain(path, item) for item in error.errors()]) from None
    problems = list(_problems(space))
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return space


def _explain(path: Path, error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if part not in ("range",))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        known = (Space, Draws, Range)[min(len(error["loc"]), 3) - 1]
        message = f"there is no such setting; known here: {', '.join(f.alias or name for name, f in known.model_fields.items())}"
    return f"{path}: {where}: {message}" if where else f"{path}: {message}"


def _problems(space: Space) -> Any:
    size = space.random.draws if space.random else math.prod(len(values) for values in (space.grid or {}).values())
    if size > MAX_POINTS:
        yield f"has {size} points; {MAX_POINTS} at most fit an array of jobs"
        return
    points = space.points()
    for key in dict.fromkeys(key for point in points for key in point):
        if f"{key}.".startswith(FIXED):
            yield f"{key}: is the same for all points; set it on the command line"
    first: dict[str, str] = {}
    for name, point in zip(names(len(points)), points, strict=True):
        same = first.setdefault(json.dumps(point, sort_keys=True), name)
        if same != name:
            yield f"point {name} is the same as {same}: {shown(point)}; leave it out" + (
                ", or draw fewer, or from more" if space.random else "")  # fmt: skip


def names(count: int) -> list[str]:
    """The folders' names of so many points."""
    return [f"{index:03d}" for index in range(count)]


def overrides(settings: Settings) -> list[str]:
    """Settings as words of a command line."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def shown(settings: Settings) -> str:
    """Settings for people, a setting by the last part of its name where that is enough."""
    last = [key.split(".")[-1] for key in settings]
    named = {
        key if last.count(end) > 1 else end: value for (key, value), end in zip(settings.items(), last, strict=True)
    }
    return " ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in named.items())


def settings_of(run: Path) -> Settings:
    """What distinguishes a point of a sweep; nothing for any other run."""
    found = read_json(run.parent / SWEEP).get("points", {})
    return found.get(run.name, {}) if isinstance(found, dict) else {}


def name_of(run: Path) -> str:
    """A run's name; that of a point has its sweep's before it."""
    return f"{run.parent.name}/{run.name}" if settings_of(run) else run.name
