"""What Slurm is asked about jobs."""

import subprocess
from typing import Final

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


def ask(*command: str) -> tuple[int, str]:
    """(exit code, output) of a command of Slurm's, errors included; a controller that does not answer is given a minute."""
    done = subprocess.run(
        ["timeout", "60", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout or f"no answer to {command[0]} in a minute"


def slurm_state(job: str) -> tuple[str, str]:
    """(state, reason) of a job: squeue's, and sacct's once it is gone there; UNKNOWN where neither knows it."""
    code, said = ask("squeue", "-h", "-j", job, "-o", "%T|%r")
    if code == 0 and "|" in said:
        state, _, reason = said.splitlines()[0].partition("|")
        return state, "" if reason == "None" else reason
    code, said = ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State")
    return (said.split()[0] if code == 0 and said.split() and said.split()[0].isupper() else "UNKNOWN"), ""
