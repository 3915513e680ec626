"""What is asked and told about jobs: Slurm, or for a job on this host (``slurm.executor=local``) its process."""

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

LOCAL: Final = "local-"  # a job without Slurm, by its name
LIVE: Final = (
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "COMPLETING",
    "CONFIGURING",
    "REQUEUED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
)


def outside() -> dict[str, str]:
    """The environment without what a job or a launcher around this process has set, which is not for another job."""
    theirs = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in theirs and (not name.startswith("SLURM_") or name == "SLURM_CONF")
    }


def ask(*command: str) -> tuple[int, str]:
    """(exit code, output) of a command of Slurm's, errors included; a controller that does not answer is given a minute."""
    done = subprocess.run(
        ["timeout", "60", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=outside(),
    )
    return done.returncode, done.stdout or f"no answer to {command[0]} in a minute"


def was_cancelled(job: str) -> bool:
    """Whether somebody has ended this job, whose script still runs: Slurm would let it come back all the same.

    squeue calls it completing, as after a time limit or a requeue; what the job ended by only the accounting tells, a moment
    later. Without accounting the answer is no.
    """
    state = ""
    for _ in range(10):
        if ask("squeue", "-h", "-j", job, "-o", "%T")[1].strip() == "RUNNING":
            return False
        code, state = ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State")
        if code or state.split()[-1:] not in (["RUNNING"], ["PENDING"]):
            break
        time.sleep(0.5)
    return state.startswith("CANCELLED")


def slurm_state(job: str) -> tuple[str, str]:
    """(state, reason) of a job: squeue's, and sacct's once it is gone there; UNKNOWN where neither knows it.

    A job without Slurm is RUNNING, ENDED, PENDING before its turn, or UNKNOWN on a host that is not its own.
    """
    if job.startswith(LOCAL):
        return _local_state(job)
    code, said = ask("squeue", "-h", "-j", job, "-o", "%T|%r")
    if code == 0 and "|" in said:
        state, _, reason = said.splitlines()[0].partition("|")
        return state, "" if reason == "None" else reason
    state = _first(*ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State"))
    if not state and "_" in job:  # what never began of an array is one row, such as CANCELLED|7_[2-5]
        code, said = ask("sacct", "-X", "-n", "-P", "-j", job.split("_")[0], "-o", "State,JobID")
        state = _first(code, next((line for line in said.splitlines() if "_[" in line), "").replace("|", " "))
    return state or "UNKNOWN", ""


def _first(code: int, said: str) -> str:
    """The first word of an answer when it is a state."""
    words = said.split()
    return words[0] if code == 0 and words and words[0].isupper() else ""


def tell(job: str, *, save: bool) -> tuple[int, str]:
    """Ask a job to save and end, or end it as it is; (exit code, what was said), 0 also where it has ended already."""
    if not job.startswith(LOCAL):
        # Slurm 22.05 passes a signal to an element of an array on but denies it, and scancel repeats it for minutes; its
        # step gets it at once.
        return ask("scancel", "--signal=USR2", f"{job}.0" if "_" in job else job) if save else ask("scancel", job)
    try:
        pid = _parts(job)[1]
        process = os.pidfd_open(pid)
        try:
            if _local_state(job)[0] in LIVE:  # it is the process that was opened, not one that came after it
                groups = [] if save else _children(pid)
                signal.pidfd_send_signal(process, signal.SIGUSR2 if save else signal.SIGKILL)
                for group in groups:  # what slurm.setup has started does not end with it
                    with suppress(ProcessLookupError, PermissionError):
                        os.killpg(group, signal.SIGKILL)
        finally:
            os.close(process)
    except ProcessLookupError:
        return 0, ""
    except OSError as error:
        return 1, str(error.strerror)
    return 0, ""


def local_job(pid: int) -> str:
    """The name of the job that a process of this host keeps; its start tells it from a later one of the same number."""
    return f"{LOCAL}{socket.gethostname()}-{pid}-{_stat(pid)[1]}"


def _parts(job: str) -> tuple[str, int, str]:
    """(host, process, its start) of a job without Slurm."""
    host, pid, start = job.removeprefix(LOCAL).rsplit("-", 2)
    return host, int(pid), start


def _children(pid: int) -> list[int]:
    """Of a keeper: its attempt, which leads a group of its own."""
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _stat(pid: int) -> tuple[str, str]:
    """(state, start in clock ticks since boot) of a process, as /proc has them; empty where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _local_state(job: str) -> tuple[str, str]:
    host, pid, start = _parts(job)
    if host != socket.gethostname():
        return "UNKNOWN", f"ask on {host}"
    state, begun = _stat(pid)
    if begun != start or state in ("Z", "X"):
        return "ENDED", ""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:  # just now
        return "ENDED", ""
    return ("PENDING" if b" -m slurm.turn " in command else "RUNNING"), ""
