"""``slurm.executor=local``: a job on this host, without Slurm, by the same rules.

Four kinds of processes, each of which dies with the one before it. The keeper, in a session of its own, judges each attempt
and starts the next. An attempt is the job's script, which after ``slurm.setup`` becomes what srun is for Slurm: it starts a
supervisor for each rank, and ends all when one fails. Each supervisor has its trainer.

Where not all jobs of a sweep or a scaling may run at once, the keepers of the others wait (``slurm.turn``). That of a chain also
runs what comes before and after the training.
"""

import fcntl
import json
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from data_prep.workers import adopt_orphans, die_with
from pipeline.config import Config, UserError
from slurm.checks import visible_gpus
from slurm.job import CANCELLED, FORWARDED, SETTLE_S, STOPPED, Verdict, conclude, read_json, supervise
from slurm.queue import LIVE, LOCAL, local_job, outside, slurm_state
from slurm.submit import FOLDER, JOB, LOCK, Plan, code_path, commands, environment, note_job
from slurm.turn import GPUS

TURN: Final = "slurm/turn"  # held by a job that waits
STAGES: Final = "slurm/stages.json"  # of the newest chain here: its stages, and the exit codes of those that have ended
NEEDED: Final = ("prep", "train")  # where one fails nothing comes after it


class Line:
    """Jobs of which ``at_once`` run at a time, in the order in which they are launched."""

    def __init__(self, folder: Path, at_once: int) -> None:
        """``folder``: of all of them; it may have had other lines, and their jobs still have their places."""
        (folder / FOLDER).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._places, self._at_once, self._last = folder.resolve() / FOLDER / "place", at_once, ""

    def words(self, cfg: Config, run: Path, turn: int) -> list[str]:
        """What comes before the command of the next job, which holds its run's ``TURN``."""
        before, self._last = self._last, str(run / TURN)
        gpus = " ".join(places(cfg, self._at_once))
        return [sys.executable, "-m", "slurm.turn", str(turn), before, str(self._places), gpus]


def places(cfg: Config, wanted: int | None) -> list[str]:
    """The GPUs of each of ``wanted`` jobs at a time, as CUDA names them; fewer or, by default, all that there are GPUs for."""
    count = cfg.slurm.gpus_per_node
    if not count:
        return [""] * (wanted or 1)
    gpus = visible_gpus()
    return [",".join(gpus[first : first + count]) for first in range(0, len(gpus) - count + 1, count)][:wanted]


def script(cfg: Config, at_once: int = 1) -> str:
    """What an attempt runs, for bash; ``at_once``: so many jobs share this host."""
    asked, run = cfg.slurm, Path(cfg.run.dir).resolve()
    # As --nproc has it: as many processes as there are CPUs must not each start as many threads.
    cpus = asked.cpus_per_task or max(1, len(os.sched_getaffinity(0)) // (asked.world * at_once))
    start = [sys.executable, "-m", "slurm.local", "start", str(run)]
    return stage_script(cfg, cpus, f"exec {shlex.join(start)}")


def stage_script(cfg: Config, cpus: int, command: str) -> str:
    """What a stage of a chain runs, for bash, after what the configuration sets up."""
    gpus = visible_gpus()[: cfg.slurm.gpus_per_node] if cfg.slurm.gpus_per_node else []
    devices = f"export CUDA_VISIBLE_DEVICES=${{{GPUS}-{','.join(gpus)}}}"
    return "\n".join(["#!/bin/bash", *environment(cpus), devices, *commands(cfg), command, ""])


def describe(cfg: Config) -> str:
    """The job, as a line of the plan."""
    gpus = f"{cfg.slurm.gpus_per_node or 'no'} GPUs (slurm.gpus_per_node)"
    return f"job: {cfg.slurm.world} processes on this host with {gpus}, in the background, again after each crash"


@contextmanager
def reserved(run: Path) -> Iterator[int]:
    """Makes a run's folder for one who submits; yields the lock. Raises UserError while another does, or it has a job."""
    (run / FOLDER).mkdir(parents=True, exist_ok=True, mode=0o700)
    with (run / LOCK).open("a") as lock:
        taken = False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        job = str(read_json(run / JOB).get("job", ""))
        state = slurm_state(job)[0].lower() if job else "unknown"
        if state.upper() in LIVE:
            raise UserError(f"run.dir = {run}: its job {job} is {state}; patchmill cancel {run} ends it")
        if taken:
            raise UserError(f"run.dir = {run}: is being submitted, or its job has another host; patchmill status {run}")
        yield lock.fileno()


def launch(cfg: Config, ready: Plan, lock: int, line: Line | None = None, part: str = "keep") -> str:
    """Start a run's keeper, or a chain's, which takes over the lock, in a session of its own; the job's name."""
    run = ready.run
    (run / FOLDER / "job.sh").write_text(ready.script)
    note_job(cfg, run)
    keep = [sys.executable, "-m", "slurm.local", part, str(run)]
    env = {name: value for name, value in outside().items() if name != GPUS}
    early = run / FOLDER / "starting.out"
    with early.open("ab") as log, (run / TURN).open("a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        command = shlex.join([*(line.words(cfg, run, turn.fileno()) if line else ()), *keep])
        # A signal that comes before the keeper can take it waits.
        keeper = subprocess.Popen(
            ["/bin/bash", "-c", "\n".join([*code_path(ready.code), f"exec {command}"])], stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, env=env, start_new_session=True, pass_fds=(lock, turn.fileno()) if line else (lock,),
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED),
        )  # fmt: skip
    job = local_job(keeper.pid)
    with suppress(FileNotFoundError):  # the keeper was first
        early.rename(log_of(run, job, 0))
    note_job(cfg, run, job=job)
    return job


def log_of(run: Path, job: str, rank: int) -> Path:
    """A rank's log; that of rank 0 has the keeper's lines too."""
    return run / FOLDER / f"{job}_{rank}_log.out"


def keep(run: Path) -> int:
    """Run a job's attempts until its end, and return the exit code. A signal is passed on, and what it ends does not come back."""
    os.environ |= {"SLURM_JOB_ID": introduce(run), "SLURM_JOB_NODELIST": socket.gethostname()}
    adopt_orphans()
    keeper, asked, running = os.getpid(), list[int](), list[subprocess.Popen[bytes]]()

    def receive(number: int, _: object) -> None:
        asked.append(number)
        for attempt in running:
            attempt.send_signal(number)

    def requeue(verdict: Verdict) -> Verdict:
        if not asked:
            return verdict
        said = f"the job was sent {signal.Signals(asked[0]).name}: submit the run again"
        return replace(verdict, requeue=False, reason=f"{verdict.reason}; {said}")

    for number in FORWARDED:
        signal.signal(number, receive)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    restart = 0
    while True:
        os.environ["SLURM_RESTART_COUNT"] = str(restart)
        running[:] = [subprocess.Popen(["/bin/bash", run / FOLDER / "job.sh"], start_new_session=True,
                                       preexec_fn=lambda: die_with(keeper))]  # fmt: skip
        if asked:  # before there was what it could be passed to
            running[0].send_signal(signal.SIGUSR2)
        while running[0].poll() is None:
            time.sleep(0.1)
        _end_group(running[0].pid)
        verdict = conclude(run, requeue)
        if not verdict.requeue:
            return verdict.code
        restart += 1


def introduce(run: Path) -> str:
    """Note this job's name, which the process that started it does too, unless it was killed before; the name."""
    from pipeline.runlog import replace_file

    job = local_job(os.getpid())
    with suppress(FileNotFoundError):
        (run / FOLDER / "starting.out").rename(log_of(run, job, 0))
    replace_file(run / JOB, json.dumps(read_json(run / JOB) | {"job": job}).encode())
    return job


def chain(run: Path) -> int:
    """Run the stages of a chain until one fails that is needed, and return its exit code. A signal ends the chain.

    The training is kept as that of any job; the others are run once.
    """
    from pipeline.runlog import replace_file

    todo, keeper = read_json(run / STAGES), os.getpid()
    asked, running, codes = list[int](), list[subprocess.Popen[bytes]](), dict[str, int]()

    def receive(number: int, _: object) -> None:
        asked.append(number)
        for stage in running:
            stage.kill()

    introduce(run)
    adopt_orphans()
    for name in todo["names"]:
        if name == "train":
            codes[name] = keep(run)
        else:
            for number in FORWARDED:
                signal.signal(number, receive)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
            with (run / FOLDER / f"{name}-{local_job(keeper)}.out").open("ab") as log:
                running[:] = [subprocess.Popen(["/bin/bash", run / FOLDER / f"{name}.sh"], stdout=log, stderr=log,
                                               start_new_session=True, preexec_fn=lambda: die_with(keeper))]  # fmt: skip
            if asked:  # before there was what it could end
                running[0].kill()
            codes[name] = running[0].wait()
            _end_group(running[0].pid)
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # for what comes next
        if asked or (run / CANCELLED).exists():  # the training may have been told of it too late
            return STOPPED
        replace_file(run / STAGES, json.dumps(todo | {"codes": codes}).encode())
        if codes[name] and name in NEEDED:
            return codes[name]
    return 0


def bound(shell: int, words: Sequence[str]) -> int:
    """Become ``patchmill`` with these words, as a process that dies with the shell that started it."""
    die_with(shell)
    os.execv(sys.executable, [sys.executable, "-m", "pipeline", *words])


def stage_states(run: Path, jobs: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """(state, reason) of the stages of the newest chain here, as Slurm would have them. ``jobs``: the newest of each stage."""
    record = read_json(run / STAGES)
    names, codes = record.get("names", []), record.get("codes", {})
    job, found, waits = jobs.get(names[0], "") if names else "", dict[str, tuple[str, str]](), False
    if not job.startswith(LOCAL):
        return {}
    state = slurm_state(job)[0]
    for name in names:
        if name in codes:
            found[name] = ("FAILED" if codes[name] else "COMPLETED", "")
        elif waits:
            found[name] = ("CANCELLED", "") if state == "ENDED" else ("PENDING", "Dependency")
        else:
            broken = any(codes.get(one) for one in NEEDED) or (run / CANCELLED).exists()
            found[name], waits = ("CANCELLED" if state == "ENDED" and broken else state, ""), True
    return {name: told for name, told in found.items() if jobs[name] == job}


def _end_group(group: int) -> None:
    """Kill what is left of an attempt, and wait: the next one needs the run's lock and the memory of its GPUs."""
    with suppress(ProcessLookupError, PermissionError):
        while True:
            os.killpg(group, signal.SIGKILL)
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.05)


def start(run: Path) -> int:
    """The processes of an attempt; 1 when one failed. The others then have some seconds to say what they saw."""
    world = read_json(run / JOB)["world"]
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "TORCHELASTIC_USE_AGENT_STORE": "False"}  # fmt: skip
    fork = multiprocessing.get_context("fork")
    tasks = [fork.Process(target=_task, args=(run, rank, os.getpid())) for rank in range(world)]
    for task in tasks:
        task.start()

    def forward(number: int, _: object) -> None:
        for task in tasks:
            if task.pid is not None and task.exitcode is None:
                os.kill(task.pid, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    end = float("inf")
    while any(task.exitcode is None for task in tasks):
        if any(task.exitcode for task in tasks):
            end = min(end, time.monotonic() + SETTLE_S)
        if time.monotonic() > end:
            for task in tasks:
                task.kill()
        time.sleep(0.1)
    return int(any(task.exitcode for task in tasks))


def _task(run: Path, rank: int, parent: int) -> None:
    die_with(parent)
    os.environ |= {"SLURM_PROCID": str(rank), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    if rank:  # rank 0 has the keeper's
        log = os.open(log_of(run, os.environ["SLURM_JOB_ID"], rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
    supervise(str(run), settle_s=0)


PARTS: Final[dict[str, Callable[[Path], int]]] = {"keep": keep, "start": start, "chain": chain}

if __name__ == "__main__":
    sys.exit(bound(int(sys.argv[2]), sys.argv[3:]) if sys.argv[1] == "bound" else PARTS[sys.argv[1]](Path(sys.argv[2])))
