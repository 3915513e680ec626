"""Runs on the cluster: submitted once, they come back from whatever is done to them, and compute what they would have."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.config import load_config
from pipeline.order import batch_ids, sample_keys
from slurm.job import SUMMARY, attempts
from tests.slurm.cluster import Cluster, wait_for

pytestmark = pytest.mark.timeout(600)

STEPS, EARLY = 100, 25
TIMES = ("time", "images_per_s", "data_wait")
LONG, LONGER = "train.epochs=20", "train.epochs=40"  # for what takes a while: 400 and 800 steps
SEED = 22  # of the ten disturbances: each kind comes, and five come before it trains
SETTINGS = ["cifar10/mae", "data.loader=synthetic", "data.num_samples=320", "train.global_batch=16", "train.epochs=5",
            "data.threads=1", "log.every_steps=1", "checkpoint.every_steps=20", "guard.hang_s=20",
            "slurm.nodes=2", "slurm.tasks_per_node=2", "slurm.cpus_per_task=1", "slurm.mem=3G", "slurm.time=60",
            "slurm.environment={OMP_NUM_THREADS: '1'}"]  # fmt: skip


def patchmill(*words: str, code: int = 0) -> str:
    """What the command prints."""
    # MLflow's client leaves its address in the environment of a process that used it, as other tests do.
    own = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, check=False, timeout=300,
                          env=own)  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def lines(run: Path, kind: str, name: str = "log.jsonl") -> list[dict[str, Any]]:
    found = []
    for line in (run / name).read_text().splitlines() if (run / name).exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if line["kind"] == kind]


def log_of(run: Path) -> list[dict[str, Any]]:
    """The line of each step but its times; there is exactly one, and it has seen the samples that the order gives it."""
    cfg, train = load_config([run / "config.yaml"]), lines(run, "train")
    assert [line["step"] for line in train] == list(range(1, lines(run, "start")[0]["total_steps"] + 1))
    for line in train:
        epoch, ids = batch_ids(cfg.train.seed, line["step"] - 1, cfg.data.num_samples, cfg.train.global_batch)
        keys = sample_keys(cfg.train.seed, epoch, ids)
        assert (line["epoch"], line["samples"]) == (epoch, f"{int(keys.sum()) % 2**64:016x}")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in train]


def curve(run: Path) -> dict[int, tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in log_of(run)}


def recovery_s(run: Path, since: float) -> float:
    """Seconds from a disturbance to the first training line after it, and after a new start if one followed, of a new step."""
    train = sorted(lines(run, "train") + lines(run, "train", "log.discarded.jsonl"), key=lambda line: line["time"])
    starts = [line["time"] for line in lines(run, "start") + lines(run, "resume")]
    again = min((time for time in starts if time > since), default=since)
    last = max((line["step"] for line in train if line["time"] <= again), default=0)
    return next(line["time"] for line in train if line["time"] > again and line["step"] > last) - since


def same(run: Path, undisturbed: Path, record: Callable[[str, object], None], name: str, *since: float) -> None:
    """It computed what it would have, bit for bit, and MLflow has it as one run; a row of the table at the end."""
    assert log_of(run) == log_of(undisturbed)
    patchmill("status", str(run))
    with sqlite3.connect(run.parent / "mlflow.db") as found:
        assert found.execute("select status from runs").fetchall() == [("FINISHED",)]
        points = found.execute("select step, value from metrics where key = 'loss' order by step").fetchall()
        tags = dict(found.execute("select key, value from tags where key like 'slurm.%'").fetchall())
    assert points == [(line["step"], line["loss"]) for line in lines(run, "train")]
    seconds = [recovery_s(run, one) for one in since]
    lost = len(lines(run, "train", "log.discarded.jsonl"))
    assert int(tags["slurm.lost_steps"]) == lost and json.loads((run / SUMMARY).read_text())["lost_steps"] == lost
    record(
        "disturbed", (name, lost, tags["slurm.restarts"], f"{sum(seconds) / len(seconds):.0f}", f"{max(seconds):.0f}")
    )


def job_of(run: Path) -> str:
    return str(json.loads((run / "slurm" / "job.json").read_text())["job"])


def events(run: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in attempts(run) if line["event"] == event]


def ended(run: Path) -> list[dict[str, Any]]:
    return events(run, "end")


def start(run: Path, *settings: str, engine: str = "engine/ddp") -> str:
    patchmill("submit", *SETTINGS, engine, f"run.dir={run}", *settings)
    return job_of(run)


def trains(run: Path, step: int = EARLY) -> None:
    wait_for(f"step {step} of {run.name}", 120, lambda: any(line["step"] >= step for line in lines(run, "train")))


def done(run: Path) -> bool:
    why = run / "why_stopped.json"
    return why.exists() and bool(json.loads(why.read_text())["done"])


def trained_since(run: Path) -> list[dict[str, Any]]:
    """Training lines since the newest start of the job."""
    since = max((line["time"] for line in events(run, "begin")), default=float("inf"))
    return [line for line in lines(run, "train") if line["time"] > since]


def finish(cluster: Cluster, run: Path, timeout: float = 240) -> None:
    """Requeued jobs are let go at once, until this one has ended for good."""
    with cluster.releasing():
        wait_for(
            f"the end of {run.name}",
            timeout,
            lambda: job_of(run) not in cluster.run("squeue", "-h", "-o", "%i").split(),
        )
    assert json.loads((run / "why_stopped.json").read_text())["done"], patchmill("status", str(run))


def trainer(job: str, rank: int) -> psutil.Process:
    """The trainer's process of a rank."""
    for process in psutil.process_iter():
        try:
            if "pipeline" in (words := process.cmdline()) and "train" in words:
                env = process.environ()
                if (env.get("SLURM_JOB_ID"), env.get("SLURM_PROCID")) == (job, str(rank)):
                    return process
        except psutil.Error:
            continue
    raise AssertionError(f"rank {rank} of job {job} is not there")


def has_trainers(job: str) -> bool:
    """Whether all its processes are there."""
    with contextlib.suppress(AssertionError):
        return all(trainer(job, rank) for rank in range(4))
    return False


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("jobs") / "undisturbed"
    start(run)
    finish(cluster, run)
    return run


@pytest.fixture(scope="module")
def long(request: pytest.FixtureRequest, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    start(run := tmp_path_factory.mktemp("long") / "undisturbed", request.param)
    finish(cluster, run, timeout=400)
    return run


def test_two_hosts_of_two_compute_what_one_host_of_four_does(undisturbed: Path, tmp_path: Path) -> None:
    local = [word for word in SETTINGS if not word.startswith("slurm.")]
    patchmill("train", *local, "engine/ddp", "--nproc", "4", f"run.dir={tmp_path / 'local'}", "tracking.uri=none")
    found, expected = curve(undisturbed), curve(tmp_path / "local")
    assert all(found[step] == pytest.approx(expected[step], rel=1e-5) for step in expected)
    hosts = {json.loads(path.read_text())["host"] for path in (undisturbed / "slurm" / "exits").iterdir()}
    assert hosts == {"n1", "n2"} and [line["reason"] for line in ended(undisturbed)] == ["done"]


def test_status_tells_and_sends_the_run_to_mlflow_once(undisturbed: Path) -> None:
    database = undisturbed.parent / "mlflow.db"
    assert not database.exists(), "a job writes no file of MLflow's"
    for _ in range(2):
        said = patchmill("status", str(undisturbed.parent))
    assert f"{STEPS}/{STEPS}" in said and "COMPLETED" in said
    with sqlite3.connect(database) as found:
        runs = found.execute("select count(*), min(status) from runs").fetchone()
        points = found.execute("select count(*), count(distinct step) from metrics where key like '%loss'").fetchone()
    assert runs == (1, "FINISHED") and points[0] == points[1] >= STEPS


@pytest.mark.parametrize("engine", ["engine/fsdp2", "engine/zero2"])
def test_other_engines_run_on_several_hosts(engine: str, cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, engine=engine)
    finish(cluster, run)
    found, expected = curve(run), curve(undisturbed)
    assert all(found[step] == pytest.approx(expected[step], rel=1e-4) for step in expected)


Disturb = Callable[[Cluster, str], object]


def usr2(cluster: Cluster, job: str) -> None:
    cluster.run("scancel", "--signal=USR2", job)


def requeue(cluster: Cluster, job: str) -> None:
    cluster.run("scontrol", "requeue", job)


def kill_a_rank(_: Cluster, job: str) -> None:
    trainer(job, 2).send_signal(signal.SIGKILL)


def kill_a_supervisor(_: Cluster, job: str) -> None:
    supervisor = trainer(job, 0).parent()
    assert supervisor is not None and "submitit" in " ".join(supervisor.cmdline())
    supervisor.kill()


def stop_a_rank(_: Cluster, job: str) -> None:
    trainer(job, 2).send_signal(signal.SIGSTOP)


def crash_a_node(cluster: Cluster, _: str) -> None:
    cluster.crash("n2")
    cluster.boot("n2")


def cut_a_link(cluster: Cluster, _: str) -> None:
    cluster.link_down("n2")
    time.sleep(35)  # longer than Slurm waits for a node
    cluster.link_up("n2")


def kill_slurmd(cluster: Cluster, _: str) -> None:
    cluster.kill_slurmd("n2")
    cluster.start_slurmd("n2")


def preempt(cluster: Cluster, _: str) -> None:
    cluster.run("sbatch", "-p", "high", "-N2", "--exclusive", "--wrap", "sleep 5", "-o", "/dev/null")


def disturbed(disturb: Disturb, cluster: Cluster, run: Path) -> float:
    """Trains a run that is disturbed in the middle; when that was."""
    job = start(run, *(["slurm.partition=low", "slurm.directives={exclusive: true}"] if disturb is preempt else []))
    trains(run)
    since = time.time()
    disturb(cluster, job)
    with cluster.releasing():
        patchmill("status", str(run))  # it sends what there is, also of steps that will be computed again
        finish(cluster, run, timeout=400)
    return since


SIGNALLED = {usr2: "stopped by SIGUSR2", requeue: "requeued by Slurm", preempt: ""}
CRASHED = {
    kill_a_rank: "rank 2 on n2 was killed by SIGKILL",
    kill_a_supervisor: "",
    stop_a_rank: "rank 2 on n2 does not answer",
}
HOSTS = {crash_a_node: "", kill_slurmd: "", cut_a_link: ""}


def slow(some: dict[Disturb, str], *quick: Disturb) -> Iterator[Any]:
    for disturb, reason in some.items():
        yield pytest.param(disturb, reason, id=disturb.__name__, marks=() if disturb in quick else pytest.mark.slow)


@pytest.mark.parametrize(("disturb", "reason"), [*slow(SIGNALLED, usr2, requeue)])
def test_a_run_that_is_asked_to_stop_loses_no_step(disturb, reason, cluster, undisturbed, tmp_path, record_property):
    run = tmp_path / "run"
    same(run, undisturbed, record_property, disturb.__name__, disturbed(disturb, cluster, run))
    assert not (run / "log.discarded.jsonl").exists()
    first, last = ended(run)
    assert reason in first["reason"] and not first["crash"] and last["reason"] == "done"


@pytest.mark.parametrize(("disturb", "reason"), [*slow(CRASHED, kill_a_rank)])
def test_a_run_that_crashes_goes_on_from_its_checkpoint(
    disturb, reason, cluster, undisturbed, tmp_path, record_property
):
    run = tmp_path / "run"
    same(run, undisturbed, record_property, disturb.__name__, disturbed(disturb, cluster, run))
    first, last = ended(run)
    assert reason in first["reason"] and first["crash"] and last["reason"] == "done"
    assert [line["step"] for line in lines(run, "resume")] == [first["step"]]


@pytest.mark.parametrize(("disturb", "_"), [*slow(HOSTS, crash_a_node)])
def test_a_host_that_fails_costs_no_more_than_a_crash(disturb, _, cluster, undisturbed, tmp_path, record_property):
    run = tmp_path / "run"
    same(run, undisturbed, record_property, disturb.__name__, disturbed(disturb, cluster, run))
    assert len(events(run, "begin")) == (1 if disturb is kill_slurmd else 2)


@pytest.mark.slow
def test_a_run_without_progress_is_given_up(cluster, tmp_path) -> None:
    run = tmp_path / "run"
    job = start(run, "checkpoint.every_steps=1000", "slurm.max_crashes=2")
    with cluster.releasing():
        for number in (1, 2):
            wait_for(
                "steps", 120, lambda number=number: len(lines(run, "start")) >= number and len(lines(run, "train")) > 5
            )
            kill_a_rank(cluster, job)
            wait_for("the verdict", 120, lambda number=number: len(ended(run)) == number)
    assert "2 crashes in a row without a newer checkpoint" in ended(run)[-1]["reason"]
    assert "2 crashes in a row" in patchmill("status", str(run))


@pytest.mark.slow
@pytest.mark.timeout(600, func_only=True)
@pytest.mark.parametrize("long", [LONGER], indirect=True)
def test_a_time_limit_costs_no_step(cluster, long, tmp_path, record_property) -> None:
    start(run := tmp_path / "run", LONGER, "slurm.time=2", "slurm.signal_lead_s=60")
    finish(cluster, run, timeout=500)
    told = [line["time"] for line in lines(run, "stop")][:-1]  # a step and a save later
    same(run, long, record_property, "time limit", *told)
    assert not (run / "log.discarded.jsonl").exists()
    reasons = [line["reason"] for line in ended(run)]
    assert len(reasons) > 1 and set(reasons[:-1]) == {"stopped by SIGUSR2"}


@pytest.mark.slow
@pytest.mark.timeout(600, func_only=True)
@pytest.mark.parametrize("long", [LONG], indirect=True)
def test_ten_disturbances_at_random_change_no_bit(cluster, long, tmp_path, record_property) -> None:
    """Half of them while it trains, half from the start of its processes on; in ten minutes."""
    run, chance, since = tmp_path / "run", random.Random(SEED), []
    job = start(run, LONG, "checkpoint.every_steps=10", "slurm.max_crashes=20")
    with cluster.releasing():
        for number in range(10):
            anywhere = chance.random() < 0.5
            some = [usr2, requeue, kill_a_rank, kill_a_supervisor, crash_a_node]
            disturb = chance.choice(some if anywhere else [*some, stop_a_rank])  # a hang is seen once it trains
            if anywhere:
                wait_for(f"processes after {number}", 150, lambda: has_trainers(job))
            else:
                wait_for(f"training after {number}", 150, lambda: len(trained_since(run)) > 0)
            time.sleep(chance.uniform(0, 2 if anywhere else 6))
            since.append(time.time())
            begun = len(events(run, "begin"))
            disturb(cluster, job)
            wait_for(f"what {disturb.__name__} does", 150, lambda begun=begun: len(events(run, "begin")) > begun)
    finish(cluster, run, timeout=300)
    assert len(since) == 10 and len(events(run, "begin")) >= 11
    same(run, long, record_property, f"ten at random, seed {SEED}", *since)


def test_cancel_saves_and_the_next_submit_goes_on(cluster, undisturbed, tmp_path) -> None:
    run = tmp_path / "run"
    start(run)
    trains(run)
    assert "is running; patchmill cancel" in patchmill("submit", *SETTINGS, "engine/ddp", f"run.dir={run}", code=2)
    assert "has ended; the newest checkpoint is of step" in patchmill("cancel", str(run))
    assert [(line["reason"], line["requeue"]) for line in ended(run)] == [("cancelled", False)]
    start(run)
    finish(cluster, run)
    assert curve(run) == curve(undisturbed) and not (run / "log.discarded.jsonl").exists()
    assert f"done at step {STEPS}" in patchmill("logs", str(run))


@pytest.mark.slow
def test_scancel_is_taken_at_its_word(cluster, tmp_path) -> None:
    """Slurm itself would let the job come back: the verdict runs while it is being cancelled."""
    job = start(run := tmp_path / "run")
    trains(run)
    cluster.run("scancel", job)
    wait_for("the verdict", 60, lambda: ended(run))
    cluster.wait_for_job(job, "CANCELLED")
    assert ended(run)[-1]["reason"].startswith("cancelled by scancel") and not ended(run)[-1]["requeue"]


def test_a_set_up_that_fails_is_said(cluster, tmp_path) -> None:
    start(run := tmp_path / "run", "slurm.setup=[exit 3]", "slurm.max_crashes=1")
    wait_for("the verdict", 60, lambda: (run / "slurm" / "attempts.jsonl").exists() and ended(run))
    assert "before training began: slurm.setup failed" in patchmill("status", str(run))


@pytest.mark.parametrize(
    ("settings", "said"),
    [(["slurm.time=9-00:00:00"], "time limit"), (["slurm.partition=nope"], "invalid partition"),
     (["slurm.nodes=9", "train.global_batch=18"], "slurm: "),
     (["slurm.gpus_per_node=7", "slurm.tasks_per_node=1", "train.global_batch=14"], "slurm: "),
     (["slurm.gpus=2"], "slurm.gpus: there is no such setting"), (["data.loader=ffcv", "data.train=/no.beton"], "no.beton"),
     (["tracking.uri=sqlite:////m.db"], "a file is not for several hosts"),
     (["slurm.gpu=V100", "slurm.gpus_per_node=2", "slurm.tasks_per_node=1", "model.name=vit_h", "data.image_size=224",
       "model.patch_size=14", "train.global_batch=8192", "train.epochs=800"], "are predicted to fit a V100")],
)  # fmt: skip
def test_what_cannot_run_is_not_queued(settings, said, cluster, tmp_path) -> None:
    assert said in patchmill("submit", *SETTINGS, "engine/ddp", f"run.dir={tmp_path / 'run'}", *settings, code=2)
    assert not (tmp_path / "run").exists() and cluster.run("squeue", "-h").strip() == ""
