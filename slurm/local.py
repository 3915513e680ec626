"""``slurm.executor=local``: a job on this host, without Slurm, by the same rules.

Four kinds of processes, each of which dies with the one before it. The keeper, in a session of its own, judges each attempt
and starts the next. An attempt is the job's script, which after ``slurm.setup`` becomes what srun is for Slurm: it starts a
supervisor for each rank, and ends all when one fails. Each supervisor has its trainer.
"""

import fcntl
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from data_prep.workers import adopt_orphans, die_with
from pipeline.config import Config, UserError
from slurm.checks import visible_gpus
from slurm.job import FORWARDED, SETTLE_S, Verdict, conclude, read_json, supervise
from slurm.queue import LIVE, local_job, slurm_state
from slurm.submit import FOLDER, JOB, Plan, code_path, commands, environment, note_job

LOCK: Final = "slurm/lock"  # held by a submit, and by the keeper for as long as it lives


def script(cfg: Config) -> str:
    """What an attempt runs, for bash."""
    asked, run = cfg.slurm, Path(cfg.run.dir).resolve()
    gpus = visible_gpus()[: asked.gpus_per_node] if asked.gpus_per_node else []
    # As --nproc has it: as many processes as there are CPUs must not each start as many threads.
    cpus = asked.cpus_per_task or max(1, len(os.sched_getaffinity(0)) // asked.world)
    start = [sys.executable, "-m", "slurm.local", "start", str(run)]
    devices = f"export CUDA_VISIBLE_DEVICES={','.join(gpus)}"
    return "\n".join(["#!/bin/bash", *environment(cpus), devices, *commands(cfg), f"exec {shlex.join(start)}", ""])


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


def launch(cfg: Config, ready: Plan, lock: int) -> str:
    """Start a run's keeper, which takes over the lock, in a session of its own; the job's name."""
    run = ready.run
    (run / FOLDER / "job.sh").write_text(ready.script)
    note_job(cfg, run)
    command = shlex.join([sys.executable, "-m", "slurm.local", "keep", str(run)])
    # A job of Slurm's, whose shell this may be, is not this job.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    early = run / FOLDER / "starting.out"
    with early.open("ab") as log:
        # A signal that comes before the keeper can take it waits.
        keeper = subprocess.Popen(
            ["/bin/bash", "-c", "\n".join([*code_path(ready.code), f"exec {command}"])], stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, env=env, start_new_session=True, pass_fds=(lock,),
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED),
        )  # fmt: skip
    job = local_job(keeper.pid)
    early.rename(log_of(run, job, 0))
    note_job(cfg, run, job=job)
    return job


def log_of(run: Path, job: str, rank: int) -> Path:
    """A rank's log; that of rank 0 has the keeper's lines too."""
    return run / FOLDER / f"{job}_{rank}_log.out"


def keep(run: Path) -> int:
    """Run a job's attempts until its end, and return the exit code. A signal is passed on, and what it ends does not come back."""
    os.environ |= {"SLURM_JOB_ID": local_job(os.getpid()), "SLURM_JOB_NODELIST": socket.gethostname()}
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


PARTS: Final[dict[str, Callable[[Path], int]]] = {"keep": keep, "start": start}

if __name__ == "__main__":
    sys.exit(PARTS[sys.argv[1]](Path(sys.argv[2])))
