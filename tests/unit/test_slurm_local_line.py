"""Sweeps and scalings without Slurm: jobs of this host that wait for their turn."""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_slurm_local import processes, trains, wait

from pipeline.config import Config, load_config
from slurm import status
from slurm.chain import cancel_all
from slurm.job import attempts, read_json
from slurm.local import TURN, Line, places, script
from slurm.queue import local_job, slurm_state
from slurm.status import find_runs
from slurm.submit import JOB
from slurm.sweep import sweep

pytestmark = pytest.mark.timeout(300)

SETTINGS = ["data.loader=synthetic", "data.num_samples=64", "train.global_batch=16", "train.epochs=3", "optim.warmup_epochs=1",
            "data.threads=1", "tracking.uri=none", "slurm.executor=local", "slurm.environment={OMP_NUM_THREADS: '1'}",
            "slurm.max_crashes=1"]  # fmt: skip
LONG = ["train.epochs=2000", "log.every_steps=1"]


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text("grid: {train.seed: [1, 2, 3]}\nparallel: 2\n")
    return path


@pytest.fixture
def cfg(tmp_path: Path) -> Callable[..., Config]:
    return lambda *settings: load_config(["cifar10/mae", "engine/ddp"],
                                         [*SETTINGS, f"run.dir={tmp_path / 'run'}", *settings])  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    yield
    for process in processes(tmp_path):
        process.kill()


def start(space: Path, folder: Path, *settings: str) -> str:
    return sweep(str(space), ["cifar10/mae", "engine/ddp"], [*SETTINGS, f"run.dir={folder}", *settings],
                 parallel=None, queue=True)  # fmt: skip


def job(run: Path) -> str:
    return str(read_json(run / JOB)["job"])


def states(folder: Path) -> list[str]:
    return [slurm_state(job(run))[0] for run in find_runs([folder])]


def test_a_sweep_runs_a_few_at_a_time_and_the_second_call_what_failed(space: Path, tmp_path: Path) -> None:
    folder, mended = tmp_path / "sweep", tmp_path / "mended"
    fails = f"slurm.setup=['case $0 in */001/*) test -e {mended} || exit 3;; esac']"
    said = start(space, folder, fails)
    assert said.splitlines()[-1] == f"started: 3 jobs, 2 at a time; patchmill status {folder}"
    assert "sweep: 3 of 3 points, 2 at a time" in said
    assert states(folder)[2] == "PENDING" and not attempts(folder / "002")
    again = start(space, folder, fails).splitlines()
    assert again[-1] == "nothing to queue: every point is done or has a job"
    assert again[2] == f"002  seed=3  job {job(folder / '002')} is pending"
    wait("the end of all", lambda: set(states(folder)) == {"ENDED"})
    found = {run.name: status.look(run).why for run in find_runs([folder])}
    assert "slurm.setup failed" in found.pop("001") and found == dict.fromkeys(("000", "002"), "done")
    ends = [attempts(folder / number)[-1] for number in ("000", "001")]
    assert attempts(folder / "002")[0]["time"] >= min(line["time"] for line in ends)
    assert processes(folder) == []

    mended.touch()
    before = [job(folder / number) for number in ("000", "002")]
    assert start(space, folder, fails).splitlines()[-1].startswith("started: 1 jobs, 1 at a time")
    wait("the one that failed", lambda: states(folder)[1] == "ENDED")
    assert status.look(folder / "001").why == "done"
    assert before == [job(folder / number) for number in ("000", "002")]
    assert "nothing to queue" in start(space, folder, fails)


def test_what_is_killed_gives_its_place_away_and_a_folder_is_cancelled_with_what_waits(
    space: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    space.write_text("grid: {train.seed: [1, 2, 3, 4, 5]}\nparallel: 2\n")
    start(space, folder, *LONG)
    trains(folder / "000", 1)
    assert states(folder) == ["RUNNING", "RUNNING", "PENDING", "PENDING", "PENDING"]
    os.kill(int(job(folder / "002").split("-")[-2]), signal.SIGTERM)
    os.kill(int(job(folder / "000").split("-")[-2]), signal.SIGKILL)
    wait("all to die with the keeper", lambda: processes(folder / "000") == [], 10)
    trains(folder / "003", 1)
    assert states(folder) == ["ENDED", "RUNNING", "ENDED", "RUNNING", "PENDING"]
    assert processes(folder / "002") == []
    assert "ended from outside (ended) and does not come back" in status.look(folder / "000").why
    assert status.look(folder / "002").why == "its job never began (ended)"

    said = list(cancel_all(find_runs([folder]), 60))
    assert said[0].endswith("is cancelled; it was pending") and len(said) == 3
    assert all("has ended; the newest checkpoint is of step" in line for line in said[1:])
    assert states(folder) == ["ENDED"] * 5 and processes(folder) == []
    assert [len(attempts(run)) for run in find_runs([folder])] == [1, 2, 0, 2, 0]


def test_a_place_has_gpus_of_its_own_and_turns_come_in_order(
    cfg: Callable[..., Config], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("slurm.local.visible_gpus", lambda: ["0", "1", "GPU-a", "3", "4"])
    monkeypatch.setenv("PATCHMILL_GPUS", "of a job around this one")
    two = cfg("slurm.gpus_per_node=2")
    line, jobs, said = Line(tmp_path, 2), list[subprocess.Popen[bytes]](), tmp_path / "said"
    for number in range(4):
        (tmp_path / str(number) / "slurm").mkdir(parents=True)
        with (tmp_path / str(number) / TURN).open("a") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            then = ["/bin/sh", "-c", f"echo {number} $PATCHMILL_GPUS >> {said}; exec sleep 600"]
            words = [*line.words(two, tmp_path / str(number), turn.fileno()), *then]
            jobs.append(subprocess.Popen(words, pass_fds=(turn.fileno(),)))
    text = lambda: said.read_text().splitlines() if said.exists() else []  # noqa: E731
    wait("two of them", lambda: len(text()) == 2)
    assert sorted(text()) == ["0 0,1", "1 GPU-a,3"]
    assert [slurm_state(local_job(job.pid))[0] for job in jobs] == ["RUNNING", "RUNNING", "PENDING", "PENDING"]
    jobs[2].send_signal(signal.SIGSTOP)
    jobs[1].kill()
    time.sleep(1)
    assert len(text()) == 2, "nobody goes before another"
    jobs[2].send_signal(signal.SIGCONT)
    wait("the next one", lambda: len(text()) == 3)
    jobs[0].kill()
    wait("the last one", lambda: len(text()) == 4)
    assert text()[2:] == ["2 GPU-a,3", "3 0,1"]
    for job in jobs:
        job.kill()
        job.wait()


def test_as_many_run_at_a_time_as_there_are_gpus_for(cfg: Callable[..., Config], monkeypatch) -> None:
    monkeypatch.setattr("slurm.local.visible_gpus", lambda: ["0", "1", "2", "3", "4"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    two = cfg("slurm.gpus_per_node=2")
    assert places(two, None) == places(two, 3) == ["0,1", "2,3"] and places(two, 1) == ["0,1"]
    assert places(cfg("slurm.gpus_per_node=8"), None) == [], "the checks say so"
    assert places(cfg(), None) == [""] and places(cfg(), 3) == [""] * 3
    assert "export CUDA_VISIBLE_DEVICES=${PATCHMILL_GPUS-0,1}" in script(two)
    for at_once, threads in ((1, 6), (3, 2)):
        assert f"OMP_NUM_THREADS:-{threads}}}" in script(cfg("slurm.tasks_per_node=2"), at_once)
