"""The queue of `patchmill bench evidence`: so many processes at a time, what is done left out, all stopped with their state."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from data_prep.workers import die_with
from pipeline.bench.evidence import Command, Run, command_line
from pipeline.config import UserError
from pipeline.metrics import Progress
from pipeline.runlog import LOG, RunLog
from pipeline.stop import StopRequest

COSTS: Final = "costs.jsonl"  # in the queue's folder: a line a process, with its CPU seconds
OUTPUT: Final = "output.txt"  # in a run's folder: what its processes said
POLL_S: Final = 0.5
STOPPED: Final = 75


@dataclass
class Outcome:
    """What came of the queue: sentences on the runs that failed, and whether a signal or the time limit ended it."""

    failed: list[str] = field(default_factory=list)
    stopped: bool = False

    @property
    def code(self) -> int:
        """The exit code."""
        return 1 if self.failed else STOPPED if self.stopped else 0


@dataclass
class Working:
    """A run that is being worked on: the process of its first command, and what is to follow."""

    run: Run
    todo: list[Command]
    process: subprocess.Popen[bytes]
    began: float
    cpu_s: float = 0.0

    def ended(self) -> bool:
        """Whether its process has; then ``cpu_s`` is known."""
        if self.process.returncode is None:
            number, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if number:
                self.process.returncode, self.cpu_s = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        return self.process.returncode is not None

    def share(self) -> float:
        """How much of the present command is done, of training by its log."""
        if self.todo[0].name != "train":
            return 0.0
        with contextlib.suppress(OSError, ValueError, KeyError), (self.run.folder / LOG).open("rb") as file:
            file.seek(-min(4096, os.fstat(file.fileno()).st_size), os.SEEK_END)
            for line in reversed(file.read().splitlines()[1:]):
                if line.startswith(b'{"kind": "train"'):
                    return float(json.loads(line)["step"]) / self.run.steps
        return 0.0


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Raises UserError when another queue works in ``folder``, or nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--folder {folder}: cannot be written ({error.strerror}); take another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--folder {folder}: another queue works there; wait for it, or take another folder"
            ) from None
        yield


def _start(run: Run, todo: list[Command]) -> Working:
    """The first command, single-threaded and nice; it is killed when this process dies, and starts anew from its checkpoint."""
    run.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    parent = os.getpid()

    def prepare() -> None:
        die_with(parent)
        os.nice(10)

    with (run.folder / OUTPUT).open("ab") as output:
        # A session of its own: Ctrl-C reaches this process only, which passes it on.
        process = subprocess.Popen(command_line(todo[0]), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   start_new_session=True, preexec_fn=prepare,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    return Working(run, todo, process, time.monotonic())


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")


class Queue:
    """Works on runs until all are done, a signal comes or the time is up."""

    def __init__(self, folder: Path, runs: Sequence[Run], jobs: int) -> None:
        """Finds out what is to be done; starts nothing."""
        self.waiting = [(run, todo) for run in runs if (todo := [one for one in run.commands() if not one.done()])]
        self.working: list[Working] = []
        self.outcome, self._folder, self._jobs = Outcome(), folder, jobs
        self.total = sum(command.cpu_s for run in runs for command in run.commands())
        self._finished = self.total - sum(command.cpu_s for _, todo in self.waiting for command in todo)

    def done(self) -> int:
        """Expected CPU seconds of what is done."""
        return round(self._finished + sum(one.todo[0].cpu_s * one.share() for one in self.working))

    def status(self) -> str:
        """What is being done."""
        return ", ".join(f"{one.run.name}: {one.todo[0].name} {100 * one.share():.0f} %" for one in self.working)

    def work(self, stop: StopRequest, progress: Progress, minutes: float | None) -> Outcome:
        """Until the end. On a signal or after ``minutes`` running processes save their state and end."""
        end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        told = False
        try:
            while self.working or (self.waiting and not told):
                if not told and (stop.requested or time.monotonic() > end):
                    told = True
                    for one in self.working:
                        one.process.terminate()
                while not told and self.waiting and len(self.working) < self._jobs:
                    self.working.append(_start(*self.waiting.pop(0)))
                progress.update(self.done(), round(self.total), self.status())
                time.sleep(POLL_S)
                for one in [one for one in self.working if one.ended()]:
                    self._take(one, told)
        finally:
            for one in self.working:  # interrupted again: give their states up
                one.process.kill()
                one.process.wait()
        progress.update(self.done(), round(self.total))
        self.outcome.stopped |= bool(self.waiting)
        return self.outcome

    def _take(self, one: Working, told: bool) -> None:
        """What follows a process that has ended: the run's next command, or none."""
        self.working.remove(one)
        command, code = one.todo[0], one.process.returncode
        with RunLog(self._folder / COSTS) as costs:
            costs.write("cost", run=one.run.name, command=command.name, cpu_s=one.cpu_s, code=code,
                        wall_s=time.monotonic() - one.began)  # fmt: skip
        if code == 0:
            self._finished += command.cpu_s
            if one.todo[1:]:
                self.waiting.insert(0, (one.run, one.todo[1:]))
        elif told and code in (STOPPED, -signal.SIGTERM):
            self.outcome.stopped = True
        else:
            path = one.run.folder / OUTPUT
            self.outcome.failed.append(f"{one.run.name}: {command.name} ended with {code}: {_last_line(path)} ({path})")
