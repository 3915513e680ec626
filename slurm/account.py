"""What a run has cost so far: how often it was started again and why, steps lost, goodput; from its folder alone."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from slurm.job import attempts

RECENT: Final = 50  # training lines that speak for the speed
OUTSIDE: Final = "ended from outside: its host failed, or Slurm ended it"


@dataclass(frozen=True)
class Account:
    """``reasons``: of each end that a start followed, how often. ``lost_steps``: that were computed again, of those
    that had come to the log (``log.every_steps``).

    ``goodput``: seconds of steps that stayed over those since the first start; None before there are two steps.
    """

    restarts: int
    reasons: dict[str, int]
    lost_steps: int
    goodput: float | None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of lines, without one that is not whole; none where there is no file."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # the last one, while it is written
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def train_lines(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The training lines of a log that have all that is asked of them here."""
    needed = {"time", "step", "loss", "images_per_s"}
    return [line for line in log if line.get("kind") == "train" and needed <= line.keys()]


def pace(train: list[dict[str, Any]]) -> float | None:
    """Seconds of a step of late; None before there are two in a row."""
    seconds = [b["time"] - a["time"] for a, b in zip(train, train[1:], strict=False) if b["step"] == a["step"] + 1]
    return median(seconds[-RECENT:]) if seconds else None


def account(run: Path) -> Account:
    """What a run has cost until now."""
    history, train = attempts(run), train_lines(read_lines(run / "log.jsonl"))
    begun = [line for line in history if line["event"] == "begin"]
    ends = {line["attempt"]: str(line.get("reason")) for line in history if line["event"] == "end"}
    spent = train[-1]["time"] - begun[0]["time"] if begun and train else None
    a_step = pace(train)
    return Account(
        max(0, len(begun) - 1),
        dict(Counter(ends.get(line["attempt"], OUTSIDE) for line in begun[:-1])),
        sum(line.get("kind") == "train" for line in read_lines(run / "log.discarded.jsonl")),
        min(1.0, a_step * len(train) / spent) if a_step and spent else None,
    )
