"""What runs inside a job: a supervisor for each task, and once they have ended the verdict whether the job comes back.

Nothing here needs torch. submitit starts ``supervise`` in every task; the batch script calls ``python -m slurm.job`` on the
job's first node when all tasks have ended, whatever ended them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from data_prep.workers import die_with
from pipeline.config import load_config
from slurm.queue import was_cancelled

CONFIG: Final = "slurm/config.yaml"  # as it was submitted
ATTEMPTS: Final = "slurm/attempts.jsonl"
EXITS: Final = "slurm/exits"
SUMMARY: Final = "slurm/summary.json"
CANCELLED: Final = "slurm/cancelled"
FORWARDED: Final = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
STOPPED: Final = 75
SETTLE_S: Final = 10.0  # for the other tasks to say what they saw, before Slurm ends them for this one's failure


def attempt() -> str:
    """This job and how often it was requeued, such as 4711-0, or 4711_3-0 for an element of an array."""
    return f"{own_job()}-{os.environ.get('SLURM_RESTART_COUNT', 0)}"


def own_job() -> str:
    """This job as people, job.json and the logs' names have it, such as 4711 or 4711_3."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    # Of the last element Slurm's own number is that of the whole array.
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def element(folder: Path, points: list[str]) -> Path:
    """The run of this job: the folder itself, or of an array the point that this element of it trains."""
    if not points:
        return folder
    # An array of one is a plain job, to which the index of a job around it may have leaked.
    return folder / points[int(os.environ["SLURM_ARRAY_TASK_ID"]) if len(points) > 1 else 0]


def append(run: Path, **fields: Any) -> None:
    """A line of the run's attempts; on a full disk it goes to the job's log only."""
    line = json.dumps({"time": time.time(), "attempt": attempt(), **fields}) + "\n"
    try:
        with (run / ATTEMPTS).open("a") as file:
            file.write(line)
    except OSError as error:
        sys.stderr.write(f"patchmill: {run / ATTEMPTS}: {error.strerror}: {line}")


def attempts(run: Path) -> list[dict[str, Any]]:
    """All whole lines."""
    found = []
    for line in (run / ATTEMPTS).read_text().splitlines() if (run / ATTEMPTS).exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"event", "attempt", "time"} <= record.keys():
            found.append(record)
    return found


def newest_step(run: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    steps = [int(path.parent.name.split("-")[1]) for path in run.glob("checkpoints/step-*/complete.json")]
    return max(steps, default=0)


def read_json(path: Path) -> dict[str, Any]:
    """A file's object; empty when it is not there or not whole."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Signals:
    """Signals for this process, passed to ``child`` by a thread: they are not late when the main thread is in a long call."""

    def __init__(self, child: "subprocess.Popen[bytes]") -> None:
        """Takes the place of whatever handlers there are; what was held back until now is passed on."""
        self._child = child
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in FORWARDED:
            signal.signal(number, lambda *_: None)  # the byte in the pipe is what counts
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        threading.Thread(target=self._forward, args=(reader,), name="signals", daemon=True).start()

    def _forward(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number in FORWARDED and self._child.poll() is None:
                    self._child.send_signal(number)


def supervise(folder: str, settle_s: float = SETTLE_S) -> None:
    """Train in a child process until it ends; says how in the run folder. Raises SystemExit, ``settle_s`` later, when it failed."""
    run, rank = Path(folder), int(os.environ.get("SLURM_PROCID", 0))
    if rank == 0:
        append(run, event="begin", nodes=os.environ.get("SLURM_JOB_NODELIST"),
               step=newest_step(run))  # fmt: skip
    parent = os.getpid()
    # Held back, also in the child, until there is one who takes it: else a signal now ends a process that has lost nothing.
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    child = subprocess.Popen([sys.executable, "-m", "pipeline", "train", str(run / CONFIG), *overrides(run)],
                             preexec_fn=lambda: die_with(parent))  # fmt: skip
    Signals(child)
    while (code := child.poll()) is None:
        time.sleep(0.1)
    exits = run / EXITS
    record = {"rank": rank, "host": socket.gethostname(), "code": code, "time": time.time()}
    try:
        exits.mkdir(exist_ok=True)
        (exits / f"{attempt()}-{rank}.json").write_text(json.dumps(record))
    except OSError as error:
        sys.stderr.write(f"patchmill: {exits}: {error.strerror}: {record}\n")
    if code not in (0, STOPPED):
        time.sleep(settle_s)
        raise SystemExit(1)  # submitit would make a traceback of anything else


def overrides(run: Path) -> list[str]:
    """Settings of the trainer that differ in a job: without a server only one process may write to MLflow's file."""
    return ["tracking.uri=none"] if read_json(run / "slurm" / "job.json").get("tracking_waits") else []


@dataclass(frozen=True)
class Verdict:
    """Whether the job is to be requeued, why, and its exit code when it is not."""

    requeue: bool
    reason: str
    code: int


def judge(run: Path) -> Verdict:
    """What becomes of a run whose processes have all ended."""
    history = attempts(run)
    begun = next(
        (line for line in reversed(history) if line["event"] == "begin" and line["attempt"] == attempt()), None
    )
    why = read_json(run / "why_stopped.json")
    fresh = (
        begun is not None
        and (run / "why_stopped.json").exists()
        and os.stat(run / "why_stopped.json").st_mtime >= begun["time"]
    )
    exits = exits_of(run, attempt())
    failed = failures(exits)
    if fresh and why.get("done"):
        return Verdict(False, "done", 0)
    if failed and failed[0]["code"] == 2:
        return Verdict(False, "a mistake in the configuration or the input; see the log of the rank that says it", 2)
    if (run / CANCELLED).exists():
        return Verdict(False, "cancelled", STOPPED)
    if exits and not failed and fresh:
        return Verdict(True, str(why.get("reason", "a signal")), STOPPED)
    told = _told(failed[0]) if failed else "no process left word how it ended: killed, or a full disk"
    if begun is None:
        told = "the job ended before training began: slurm.setup failed, or its processes were killed"
    reason = f"{told}; {why['reason']}" if fresh and why.get("reason") else told
    limit, crashes = load_config([run / CONFIG]).slurm.max_crashes, 1 + idle_crashes(history, newest_step(run))
    if crashes >= limit:
        return Verdict(False, f"{reason}; {crashes} crashes in a row without a newer checkpoint (slurm.max_crashes)", 1)
    return Verdict(True, reason, 1)


def exits_of(run: Path, which: str) -> list[dict[str, Any]]:
    """How the processes of an attempt ended, as far as they left word, the first first."""
    found = [read_json(path) for path in (run / EXITS).glob(f"{which}-*.json")]
    return sorted((one for one in found if {"rank", "host", "code", "time"} <= one.keys()), key=lambda one: one["time"])


def failures(exits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that failed, the cause first: where one was killed, others may take its absence for whatever."""
    return sorted((one for one in exits if one["code"] not in (0, STOPPED)), key=lambda one: one["code"] > 0)


def _told(failed: dict[str, Any]) -> str:
    """How a rank ended."""
    code = failed["code"]
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"rank {failed['rank']} on {failed['host']} {how}"


def idle_crashes(history: list[dict[str, Any]], step: int) -> int:
    """Of the attempts before this one, how many last ones crashed and left the newest checkpoint at ``step``."""
    count = 0
    for line in reversed([line for line in history if line["event"] == "end"]):
        if not line["crash"] or line["step"] != step:
            break
        count += 1
    return count


def conclude(run: Path, requeue: Callable[[Verdict], Verdict]) -> Verdict:
    """Judge, and say so in the run's attempts and log. ``requeue`` brings the job back, or returns why it does not."""
    verdict = judge(run)
    if verdict.code == 1 and not _writable(run):  # crashes could not be counted
        verdict = Verdict(False, f"{verdict.reason}; nothing can be written to {run}", 1)
    if verdict.requeue:
        verdict = requeue(verdict)
    append(
        run, event="end", step=newest_step(run), reason=verdict.reason, requeue=verdict.requeue, crash=verdict.code == 1
    )
    _sum_up(run)
    sys.stderr.write(f"patchmill: {verdict.reason}{'; requeued' if verdict.requeue else ''}\n")
    return verdict


def _slurm_requeues(verdict: Verdict) -> Verdict:
    if was_cancelled(own_job()):
        # It ends the script too, often before the processes have left word.
        said = f"; {verdict.reason}" if verdict.code == STOPPED else ""
        return Verdict(False, f"cancelled by scancel{said}", STOPPED)
    asked = subprocess.run(["scontrol", "requeue", own_job()], capture_output=True, text=True, check=False)
    if "pending execution" in asked.stderr:  # the job was ended for that: the batch script ran while it was
        return Verdict(True, "requeued by Slurm: preempted, or scontrol requeue", STOPPED)
    if asked.returncode:
        refusal = f"Slurm refused the requeue ({asked.stderr.strip()}): submit the run again"
        return replace(verdict, requeue=False, reason=f"{verdict.reason}; {refusal}")
    return verdict


def end(run: Path) -> int:
    """The verdict on a job of Slurm's, which is asked to requeue it; the exit code of the batch script."""
    verdict = conclude(run, _slurm_requeues)
    return 0 if verdict.requeue else verdict.code


def _sum_up(run: Path) -> None:
    """What the run has cost until now, for those who have the folder only."""
    from pipeline.runlog import replace_file
    from slurm.account import account

    with suppress(OSError):  # it can be counted again
        replace_file(run / SUMMARY, json.dumps(asdict(account(run))).encode())


def _writable(run: Path) -> bool:
    probe = run / "slurm" / f"probe-{attempt()}"
    try:
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(end(element(Path(sys.argv[1]), sys.argv[2:])))
