"""``patchmill status``, ``cancel`` and ``logs``: what became of submitted runs, read from their folders and from Slurm."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from pipeline.config import RunFailed, UserError
from slurm.account import RECENT, Account, account, pace, read_lines, train_lines
from slurm.job import CANCELLED, attempts, exits_of, failures, newest_step, read_json
from slurm.queue import LIVE, slurm_state, tell
from slurm.space import name_of, settings_of, shown
from slurm.submit import FOLDER, JOB

TAIL: Final = 5  # lines of the rank that failed first
MAX_TAG: Final = 5000  # characters that MLflow takes


@dataclass(frozen=True)
class Status:
    """A run's job as Slurm and the run folder have it."""

    run: Path
    job: str
    state: str
    reason: str
    step: int
    total: int | None
    loss: float | None
    images_per_s: float | None
    eta_s: float | None
    cost: Account
    why: str
    tail: list[str]


def find_runs(places: list[Path]) -> list[Path]:
    """Submitted runs: the folders themselves, or those in a folder and in its sweeps. Raises UserError where there is none."""
    found = []
    for place in places:
        inside = (path.parents[1] for pattern in (f"*/{JOB}", f"*/*/{JOB}") for path in place.glob(pattern))
        some = [place] if (place / JOB).is_file() else sorted(inside)
        if not some:
            nothing = "holds no run of `patchmill submit`, nor is it one" if place.exists() else "is not there"
            raise UserError(f"{place}: {nothing}")
        found += some
    return found


def look(run: Path) -> Status:
    """A run's status now."""
    record, log = read_json(run / JOB), read_lines(run / "log.jsonl")
    job = str(record.get("job", ""))
    state, reason = slurm_state(job) if job else ("UNKNOWN", "")
    train = train_lines(log)
    total = next((line.get("total_steps") for line in reversed(log) if line.get("kind") in ("start", "resume")), None)
    step = train[-1]["step"] if train else 0
    seconds = pace(train)
    speed = median(line["images_per_s"] for line in train[-RECENT:]) if train else None
    history = attempts(run)
    begun = [line for line in history if line["event"] == "begin"]
    why = read_json(run / "why_stopped.json")
    told = next((str(line.get("reason")) for line in reversed(history) if line["event"] == "end"), "")
    last = history[-1] if history else {}
    back = last.get("event") != "end" or last.get("requeue")  # it should be there
    if back and state not in (*LIVE, "UNKNOWN") and not why.get("done"):
        told = f"the job was ended from outside ({state.lower()}) and does not come back; submit the run again"
        if not history and not train:
            told = f"its job never began ({state.lower()})"
        if (run / CANCELLED).exists():
            told = "cancelled"
    if state == "FAILED" and (run / CANCELLED).exists():
        state = "CANCELLED"  # it has saved, and ended by itself
    alive = state in LIVE and not why.get("done")
    return Status(
        run, job, state, reason, step, total, float(train[-1]["loss"]) if train else None, speed,
        (total - step) * seconds if alive and seconds and total else None, account(run),
        told or str(why.get("reason", "")), [] if why.get("done") or not begun else first_failure(run, begun[-1]["attempt"]),
    )  # fmt: skip


def first_failure(run: Path, attempt: str) -> list[str]:
    """The last lines of the rank that failed first in an attempt; of none where none failed."""
    failed = failures(exits_of(run, attempt))
    if not failed:
        return []
    rank = failed[0]["rank"]
    path = log_file(run, attempt.rpartition("-")[0], rank)
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    # submitit's own report of it follows.
    own = [line for line in lines if line.strip() and not line.startswith(("submitit ", "srun:", "slurmstepd:"))]
    return [f"rank {rank}: {line}" for line in own[-TAIL:]]


def log_file(run: Path, job: str, rank: int) -> Path:
    """Where a process of a job writes; those of a sweep's jobs do so in the sweep's folder."""
    return run / read_json(run / JOB).get("logs", FOLDER) / f"{job}_{rank}_log.out"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d} h"
        if minutes >= 60
        else f"{seconds:.0f} s"
        if seconds < 120
        else f"{minutes} min"
    )


def table(found: list[Status]) -> Any:
    """A rich table, a row a run; for points of a sweep with what distinguishes them."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("run", "job", "Slurm", "step", "loss", "images/s", "left", "restarts", "steps lost", "goodput"):
        table.add_column(name, justify="left" if name in ("run", "job", "Slurm") else "right", no_wrap=True)
    settings = [shown(settings_of(run.run)) for run in found]
    if any(settings):
        table.add_column("settings")
    number = lambda value, form: "-" if value is None else format(value, form)  # noqa: E731
    for run, own in zip(found, settings, strict=True):
        table.add_row(name_of(run.run), run.job, f"{run.state} ({run.reason})" if run.reason else run.state,
                      f"{run.step}/{run.total or '-'}", number(run.loss, ".4f"), number(run.images_per_s, ".0f"),
                      _duration(run.eta_s), str(run.cost.restarts), str(run.cost.lost_steps),
                      number(run.cost.goodput, ".0%"), *([own] if any(settings) else []))  # fmt: skip
    return table


def tags(found: Status) -> dict[str, str]:
    """What MLflow is told of a run's job: tags, which may change, where parameters are final."""
    cost = found.cost
    reasons = "; ".join(f"{reason} ({count})" for reason, count in cost.reasons.items())
    told = {"job": found.job, "state": found.state, "why": found.why, "restarts": cost.restarts, "reasons": reasons,
            "lost_steps": cost.lost_steps, "goodput": "" if cost.goodput is None else f"{cost.goodput:.3f}"}  # fmt: skip
    return {f"slurm.{name}": str(value)[:MAX_TAG] for name, value in told.items()}


def replay(found: Status) -> str | None:
    """Send what the job has logged to MLflow, where the job itself may not, and its tags; a line when that fails."""
    run, record = found.run, read_json(found.run / JOB)
    if record.get("tracking", "none") == "none" or not (run / "log.jsonl").exists():
        return None
    from pipeline.tracking import sync, tag

    try:
        if record.get("tracking_waits"):
            sync(run, record["tracking"], tags(found))
        else:
            tag(run, record["tracking"], tags(found))
    except UserError as error:
        return f"{run.name}: not sent to MLflow: {error}"
    return None


def cancel(run: Path, patience_s: float) -> str:
    """Let a run save and end, and not come back; after ``patience_s`` it is ended all the same.

    Raises UserError without a job, RunFailed when it cannot be told: the run then goes on, and comes back as before.
    """
    job = str(read_json(run / JOB).get("job", ""))
    state, reason = slurm_state(job) if job else ("UNKNOWN", "")
    if state not in LIVE:
        why = f"{state.lower()}, {reason}" if reason else state.lower()
        raise UserError(f"{run}: has no job that could be cancelled ({why})")
    (run / CANCELLED).touch()
    if state == "RUNNING":
        _tell(run, job, save=True)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if slurm_state(job)[0] not in (*LIVE, "UNKNOWN"):
                return f"job {job} has ended; the newest checkpoint is of step {newest_step(run)}"
            time.sleep(0.5)
    _tell(run, job, save=False)
    late = f" and had not ended after {patience_s:g} s" if state == "RUNNING" else ""
    return f"job {job} is cancelled; it was {state.lower()}{late}"


def _tell(run: Path, job: str, *, save: bool) -> None:
    code, said = tell(job, save=save)
    if code:
        (run / CANCELLED).unlink(missing_ok=True)
        raise RunFailed(f"{run}: job {job} could not be told ({said.strip()}) and goes on")


def follow(run: Path, rank: int, *, forever: bool) -> Iterator[str]:
    """Lines of a rank's log of the newest job; ``forever``: those to come too, until the job has ended."""
    job = str(read_json(run / JOB).get("job", ""))
    path = log_file(run, job, rank)
    if not path.exists() and not (forever and job and slurm_state(job)[0] in LIVE):
        raise UserError(f"{path}: is not there; the job has not started, or has no rank {rank}")
    if not path.exists():
        yield f"patchmill: job {job} has not begun; waiting for its log (Ctrl-C ends that)"
    position, ended, silent = 0, False, False
    while True:
        if path.exists():
            with path.open(errors="replace") as file:
                file.seek(position)
                yield from (line.rstrip("\n") for line in file)
                position = file.tell()
        if ended or not forever:
            return
        state = slurm_state(job)[0]
        if state == "UNKNOWN" and not silent:
            yield f"patchmill: Slurm does not say how job {job} is; waiting for what it writes (Ctrl-C ends that)"
        silent = state == "UNKNOWN"
        # What it wrote last is still read. Without accounting Slurm forgets a job; the verdict stays in the folder.
        ended = _is_over(run, job) if silent else state not in LIVE
        time.sleep(1.0)


def _is_over(run: Path, job: str) -> bool:
    """Whether the newest verdict on the run says that this job does not come back."""
    last = next(iter(attempts(run)[-1:]), {})
    return last.get("event") == "end" and last["attempt"].startswith(f"{job}-") and not last.get("requeue")
