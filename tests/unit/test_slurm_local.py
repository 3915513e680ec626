"""Jobs without Slurm, ``slurm.executor=local``: real ones, which come back from what is done to them, and how they are known."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.config import Config, ConfigError, UserError, load_config
from slurm import checks, queue, status
from slurm.job import attempts, read_json
from slurm.local import introduce, log_of, reserved
from slurm.queue import local_job, slurm_state, tell
from slurm.submit import plan

pytestmark = pytest.mark.timeout(300)

STEPS = 60
SETTINGS = ["data.loader=synthetic", "data.num_samples=320", "train.global_batch=16", "train.epochs=3", "data.threads=1",
            "checkpoint.every_steps=10", "tracking.uri=none", "slurm.executor=local",
            "slurm.environment={OMP_NUM_THREADS: '1'}"]  # fmt: skip


@pytest.fixture
def cfg(tmp_path: Path) -> Callable[..., Config]:
    return lambda *settings: load_config(
        ["cifar10/mae", "engine/ddp"], [*SETTINGS, f"run.dir={tmp_path / 'run'}", *settings]
    )


def command(run: Path, *settings: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pipeline",
        "submit",
        "cifar10/mae",
        "engine/ddp",
        *SETTINGS,
        f"run.dir={run}",
        *settings,
    ]


def submit(run: Path, *settings: str) -> str:
    """Submits as a user does, from a process that then is gone; the job."""
    done = subprocess.run(command(run, *settings), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    job = str(read_json(run / "slurm" / "job.json")["job"])
    assert done.stdout.splitlines()[-1] == f"started: job {job}; patchmill status {run}"
    return job


def wait(what: str, condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)


def finish(run: Path) -> status.Status:
    wait(f"the end of {run.name}", lambda: slurm_state(read_json(run / "slurm" / "job.json")["job"])[0] == "ENDED")
    assert processes(run) == []
    return status.look(run)


def lines(run: Path) -> list[dict[str, Any]]:
    text = (run / "log.jsonl").read_text() if (run / "log.jsonl").exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [line for line in map(json.loads, whole) if line["kind"] == "train"]


def trains(run: Path, step: int) -> None:
    wait(f"step {step} of {run.name}", lambda: any(line["step"] >= step for line in lines(run)))


def curve(run: Path) -> list[tuple[int, float, float]]:
    found = [(line["step"], line["loss"], line["grad_norm"]) for line in lines(run)]
    assert [step for step, *_ in found] == list(range(1, STEPS + 1))
    return found


def ended(run: Path) -> list[dict[str, Any]]:
    return [line for line in attempts(run) if line["event"] == "end"]


def processes(run: Path, *words: str) -> list[psutil.Process]:
    """Those of a run, whatever they are; with these words in their command."""
    found = []
    for process in psutil.process_iter():
        try:
            there = process.cmdline()
        except psutil.Error:
            continue
        if str(run) in " ".join(there) and set(words) <= set(there):
            found.append(process)
    return found


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    yield
    for process in processes(tmp_path):
        process.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("local") / "undisturbed"
    submit(run, "slurm.tasks_per_node=2")
    finish(run)
    return run


def test_a_run_goes_to_its_end_and_is_told_of_like_any_other(undisturbed: Path) -> None:
    found = status.look(undisturbed)
    assert (found.state, found.step, found.total, found.why) == ("ENDED", STEPS, STEPS, "done")
    assert [line["reason"] for line in ended(undisturbed)] == ["done"] and len(curve(undisturbed)) == STEPS
    first, second = (list(status.follow(undisturbed, rank, forever=True)) for rank in (0, 1))
    assert any(f"done at step {STEPS}" in line for line in first) and first[-1] == "patchmill: done"
    assert not any("done" in line for line in second)
    with pytest.raises(UserError, match=r"has no job that could be cancelled \(ended\)"):
        status.cancel(undisturbed, 1)
    again = subprocess.run(command(undisturbed, "slurm.tasks_per_node=2"), capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "that run is done" in again.stderr


def test_a_rank_that_is_killed_brings_the_job_back(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    submit(run, "slurm.tasks_per_node=2")
    trains(run, 15)
    trainers = {process.environ()["RANK"]: process for process in processes(run, "train")}
    assert trainers.keys() == {"0", "1"}
    trainers["0"].suspend()  # it does not end by itself, and has the run's lock
    trainers["1"].kill()
    assert finish(run).why == "done" and curve(run) == curve(undisturbed)
    first, last = ended(run)
    assert f"rank 1 on {socket.gethostname()} was killed by SIGKILL" in first["reason"]
    assert first["crash"] and first["requeue"] and first["step"] >= 10 and not last["crash"]


def test_what_is_cancelled_or_killed_goes_on_with_the_next_submit(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(run)
    trains(run, 10)
    said = status.cancel(run, 100)
    assert said == f"job {job} has ended; the newest checkpoint is of step {lines(run)[-1]['step']}"
    assert [(line["reason"], line["requeue"]) for line in ended(run)] == [("cancelled", False)]
    assert finish(run).why == "cancelled"

    job = submit(run)
    trains(run, 30)
    os.kill(int(job.split("-")[-2]), signal.SIGKILL)
    wait("all to die with the keeper", lambda: processes(run) == [], 10)
    assert "ended from outside (ended) and does not come back; submit the run again" in status.look(run).why

    submit(run)
    assert finish(run).why == "done"
    for found, expected in zip(curve(run), curve(undisturbed), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_two_submits_at_once_make_one_job(tmp_path: Path) -> None:
    run = tmp_path / "run"
    both = [subprocess.Popen(command(run, "slurm.setup=[sleep 600]"), stderr=subprocess.PIPE) for _ in range(2)]
    said = {process.wait(120): process.communicate()[1].decode() for process in both}
    assert said.keys() == {0, 2} and ("is running; patchmill cancel" in said[2] or "is being submitted" in said[2])
    wait("one keeper", lambda: len(processes(run, "keep")) == 1, 10)  # its child looks like it until it is bash
    with pytest.raises(UserError, match="is running; patchmill cancel"), reserved(run):
        pass
    job = (run / "slurm" / "job.json").read_text()
    (run / "slurm" / "job.json").unlink()  # as a submit that was killed leaves it
    with pytest.raises(UserError, match="is being submitted"), reserved(run):
        pass
    (run / "slurm" / "job.json").write_text(job)
    assert "has ended; the newest checkpoint is of step 0" in status.cancel(run, 60)
    assert finish(run).why == "cancelled"


def test_a_job_without_progress_is_given_up_by_the_same_rule(tmp_path: Path) -> None:
    run, left = tmp_path / "run", f"600.{time.time_ns()}"
    job = submit(run, f"slurm.setup=['sleep {left} & exit 3']", "slurm.max_crashes=2")
    why = finish(run).why
    assert "slurm.setup failed" in why and "2 crashes in a row without a newer checkpoint (slurm.max_crashes)" in why
    assert [(line["attempt"], line["requeue"]) for line in ended(run)] == [(f"{job}-0", True), (f"{job}-1", False)]
    assert processes(Path(left)) == [], "what it left behind is ended with it"


@pytest.mark.parametrize("early", [True, False])
def test_a_signal_to_the_job_ends_it_for_good(early: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(run, "slurm.setup=[sleep 600 & wait]")
    if not early:  # else the keeper is still starting
        wait("the set-up", lambda: len(processes(run)) == 2)
    os.kill(int(job.split("-")[-2]), signal.SIGTERM)
    assert finish(run).why.endswith("the job was sent SIGTERM: submit the run again")
    assert len(ended(run)) == 1


def test_the_plan_says_what_would_run_and_what_is_not_used(cfg, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checks, "visible_gpus", lambda: ["3", "GPU-a", "5"])
    monkeypatch.setattr("slurm.local.visible_gpus", lambda: ["3", "GPU-a", "5"])
    ready = plan(cfg("slurm.gpus_per_node=2", "slurm.time=3", "slurm.partition=x", "slurm.setup=[module load cuda]",
                     "slurm.cpus_per_task=6", "slurm.directives={nodes: 4}", "tracking.uri=auto"), queue=True)  # fmt: skip
    script = ready.script.splitlines()
    assert (
        "export CUDA_VISIBLE_DEVICES=${PATCHMILL_GPUS-3,GPU-a}" in script
        and "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-6}" in script
    )
    assert script[-1] == f"exec {sys.executable} -m slurm.local start {tmp_path / 'run'}"
    assert script.index("module load cuda") > script.index("export OMP_NUM_THREADS=1")
    assert "not used without Slurm: slurm.partition, slurm.time, slurm.directives" in ready.lines
    assert ready.lines[-1].startswith("job: 2 processes on this host with 2 GPUs")
    assert not any("status" in line or "nodes" in line for line in ready.lines), ready.lines
    assert not (tmp_path / "run").exists(), "a plan leaves nothing"
    assert checks.tracking_waits(cfg("tracking.uri=auto", "slurm.executor=slurm")), (
        "a cluster's jobs leave it to status"
    )
    assert not checks.tracking_waits(cfg("tracking.uri=auto")), "this host's do not"


def test_what_this_host_has_not_is_refused_at_once(cfg, monkeypatch) -> None:
    monkeypatch.setattr(checks, "visible_gpus", lambda: ["0"])
    with pytest.raises(ConfigError) as found:
        plan(cfg("slurm.gpus_per_node=2", "slurm.nodes=2", "slurm.environment={B C: x}"), queue=True)
    assert [line.split(":")[0] for line in found.value.problems] == ["slurm.nodes = 2", "slurm.gpus_per_node = 2",
                                                                    "slurm.environment.B C"]  # fmt: skip
    assert "this host shows 1" in found.value.problems[1]


@pytest.mark.parametrize(
    ("said", "chosen", "expected"),
    [("GPU 0: H100 (UUID: GPU-a)\n  MIG 1g.10gb Device 0: (UUID: MIG-b)\nGPU 1: H100 (UUID: GPU-c)\n", None, ["0", "1"]),
     ("GPU 0: a\nGPU 1: b\nGPU 2: c\n", "2,0,7,1", ["2", "0"]), ("GPU 0: a\n", "", []), ("GPU 0: a\n", "-1", []),
     ("GPU 0: a\n", "MIG-b,GPU-a", ["MIG-b", "GPU-a"]), ("No devices were found\n", None, [])],
)  # fmt: skip
def test_gpus_are_those_that_a_process_may_use(said, chosen, expected, monkeypatch) -> None:
    monkeypatch.setattr(checks, "ask", lambda *_: (0, said))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert checks.visible_gpus() == expected


def test_the_log_of_the_rank_that_failed_first_is_found_by_the_jobs_name(tmp_path: Path) -> None:
    (tmp_path / "slurm" / "exits").mkdir(parents=True)
    record = {"rank": 1, "host": "a-b", "code": 1, "time": 1}
    (tmp_path / "slurm" / "exits" / "local-a-b-7-99-0-1.json").write_text(json.dumps(record))
    log_of(tmp_path, "local-a-b-7-99", 1).write_text("why\n")
    assert status.first_failure(tmp_path, "local-a-b-7-99-0") == ["rank 1: why"]


def test_a_job_is_not_taken_for_a_later_process_or_one_elsewhere() -> None:
    heeds = lambda: signal.signal(signal.SIGUSR2, signal.SIG_DFL)  # noqa: E731  # other tests may have left it ignored
    with subprocess.Popen(["sleep", "20"], preexec_fn=heeds) as process:
        job = local_job(process.pid)
        host, pid, start = queue._parts(job)
        assert slurm_state(job) == ("RUNNING", "") and (host, pid) == (socket.gethostname(), process.pid)
        reused = f"local-{host}-{pid}-{int(start) - 1}"  # its number is that of another process now
        assert slurm_state(reused) == ("ENDED", "") and tell(reused, save=False) == (0, "")
        assert slurm_state(f"local-other-host-{pid}-{start}") == ("UNKNOWN", "ask on other-host")
        assert process.poll() is None
        assert tell(job, save=True) == (0, "")
        wait("the signal", lambda: slurm_state(job)[0] == "ENDED", 10)  # not waited for yet, a zombie
        assert process.wait() == -signal.SIGUSR2
    assert slurm_state(job) == ("ENDED", "") and tell(job, save=False) == (0, "")


def test_a_job_of_slurms_keeps_its_run(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "job.json").write_text(json.dumps({"job": "7"}))
    monkeypatch.setattr("slurm.local.slurm_state", lambda job: ("PENDING", "Priority"))
    with pytest.raises(UserError, match="its job 7 is pending; patchmill cancel"), reserved(tmp_path):
        pass


def test_a_keeper_whose_submit_was_killed_says_who_it_is(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "job.json").write_text('{"world": 2}')
    (tmp_path / "slurm" / "starting.out").write_text("early\n")
    job = introduce(tmp_path)
    assert json.loads((tmp_path / "slurm" / "job.json").read_text()) == {"world": 2, "job": job} and job == local_job(
        os.getpid()
    )
    assert log_of(tmp_path, job, 0).read_text() == "early\n" and introduce(tmp_path) == job


def test_what_a_job_has_started_ends_with_it_when_it_is_not_waited_for_any_more(tmp_path: Path) -> None:
    code = ("import subprocess, sys, time\n"
            "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
            f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\ntime.sleep(60)")  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code]) as keeper:
        wait("its child", lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text() != "", 20)
        child = local_job(int((tmp_path / "child").read_text()))
        assert slurm_state(child)[0] == "RUNNING" and tell(local_job(keeper.pid), save=False) == (0, "")
        wait("the end of both", lambda: slurm_state(child)[0] == "ENDED" and keeper.poll() is not None, 10)
