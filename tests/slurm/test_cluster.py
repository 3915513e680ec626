"""The cluster itself, with plain shell scripts: it must break as a real one does, or the tests on it mean nothing."""

import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, ClusterError, wait_for

TCP = "timeout 2 bash -c '</dev/tcp/{}/16818'"  # slurmd listens there


def test_two_nodes_run_two_tasks_each(cluster: Cluster) -> None:
    told = cluster.run("srun", "-N2", "--ntasks-per-node=2", "sh", "-c", "echo $(hostname) $(hostname -i)").splitlines()
    assert sorted(told) == ["n1 10.199.0.11"] * 2 + ["n2 10.199.0.12"] * 2


def test_a_node_gives_its_two_gpus(cluster: Cluster) -> None:
    told = cluster.run("srun", "-N2", "--gpus-per-node=2", "sh", "-c", "echo $(hostname) $CUDA_VISIBLE_DEVICES")
    assert sorted(told.splitlines()) == ["n1 0,1", "n2 0,1"]
    told = cluster.run("srun", "-N1", "-n2", "--gpus-per-task=1", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert sorted(told.splitlines()) == ["0", "1"]


def test_two_tasks_of_two_gigabytes_fit_a_node(cluster: Cluster) -> None:
    assert cluster.run(
        "srun", "-N2", "--ntasks-per-node=2", "--cpus-per-task=2", "--mem=4G", "echo", "ok"
    ) == "\n".join(["ok"] * 4)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--time=121", "time limit"),
        ("--partition=nosuch", "partition"),
        ("--account=nosuch", "account"),
        ("--qos=nosuch", "qos"),
        ("--nodes=3", "[Nn]ode"),
        ("--mem=9G", "[Mm]emory|configuration"),
        ("--gpus-per-node=3", "configuration"),
    ],
)
def test_what_cannot_run_is_refused(cluster: Cluster, option: str, words: str) -> None:
    with pytest.raises(ClusterError, match=words):
        cluster.submit("true", option)
    cluster.submit("true", "--time=120")


def test_accounting_tells_how_a_job_ended(cluster: Cluster) -> None:
    ends = {"true": "COMPLETED 0:0", "exit 75": "FAILED 75:0", "kill -KILL $$": "FAILED 0:9"}
    jobs = {cluster.submit(command, "--output=/dev/null"): state for command, state in ends.items()}
    for job, state in jobs.items():
        wait_for(f"accounting of {job}", 30, lambda job=job, state=state: _accounted(cluster, job) == state)


def _accounted(cluster: Cluster, job: str) -> str:
    return cluster.run("sacct", "-j", job, "-X", "-n", "-P", "-o", "State,ExitCode").replace("|", " ")


def test_a_requeued_job_runs_again_when_it_is_released(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = 'echo run ${SLURM_RESTART_COUNT:-0}; [ -n "$SLURM_RESTART_COUNT" ] || sleep 300'
    job = cluster.submit(command, f"--output={out}", "--open-mode=append")
    wait_for("the first run", 30, lambda: out.exists() and "run 0" in out.read_text())
    cluster.run("scontrol", "requeue", job)
    wait_for("the hold", 30, lambda: cluster.job(job)["Reason"] == "BeginTime")
    wait_for("the release", 60, lambda: job in cluster.release())
    cluster.wait_for_job(job, "COMPLETED")
    assert [line for line in out.read_text().splitlines() if line.startswith("run")] == ["run 0", "run 1"]


@pytest.mark.slow
def test_a_job_of_low_is_told_and_then_gives_way_to_one_of_high(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = "trap 'echo told' USR2; echo runs; while :; do sleep 1; done"
    whole = ("--nodelist=n1", "--exclusive", "--time=60")
    low = cluster.submit(command, "--partition=low", "--signal=B:USR2@10", f"--output={out}", *whole)
    wait_for("the first run", 30, lambda: out.exists() and "runs" in out.read_text())
    high = cluster.submit("true", "--partition=high", "--output=/dev/null", *whole)
    wait_for("the signal", 30, lambda: "told" in out.read_text())
    assert cluster.job(low)["JobState"] == "RUNNING"  # for GraceTime
    assert cluster.wait_for_job(low, "PENDING")["Restarts"] == "1"
    cluster.wait_for_job(high, "COMPLETED")


def test_without_slurmd_a_job_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = cluster.submit("echo runs; sleep 8; echo ends", "--nodelist=n1", f"--output={out}")
    wait_for("the job", 30, lambda: out.exists() and "runs" in out.read_text())
    cluster.kill_slurmd("n1")
    wait_for("its end", 30, lambda: "ends" in out.read_text())
    cluster.start_slurmd("n1")
    assert cluster.wait_for_job(job, "COMPLETED")["Restarts"] == "0"


def test_a_pulled_cable_cuts_a_node_off(cluster: Cluster) -> None:
    def reach(node: str) -> None:
        cluster.run("srun", "--nodelist=n1", "bash", "-c", TCP.format(node))

    reach("n2")
    cluster.link_down("n2")
    reach("n1")
    with pytest.raises(ClusterError):
        reach("n2")
    cluster.link_up("n2")
    reach("n2")


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["power", "network"])
def test_the_job_of_a_lost_node_is_requeued_and_done_when_it_is_back(
    cluster: Cluster, tmp_path: Path, cause: str
) -> None:
    out = tmp_path / "out"
    step = (
        "srun sh -c 'echo run ${SLURM_RESTART_COUNT:-0} on $(hostname); [ -n \"$SLURM_RESTART_COUNT\" ] || sleep 300'"
    )
    job = cluster.submit(step, "-N2", f"--output={out}", "--open-mode=append")
    wait_for("the first run", 30, lambda: out.exists() and out.read_text().count("run 0") == 2)
    lose, find = (cluster.crash, cluster.boot) if cause == "power" else (cluster.link_down, cluster.link_up)
    started = time.monotonic()
    lose("n2")
    cluster.wait_for_job(job, "PENDING", timeout=90)
    assert time.monotonic() - started > 5  # by its silence only
    assert "down" in cluster.states()["n2"]
    find("n2")
    with cluster.releasing():
        assert cluster.wait_for_job(job, "COMPLETED", timeout=120)["Restarts"] == "1"
    assert {"run 1 on n1", "run 1 on n2"} <= set(out.read_text().splitlines())


def test_a_running_cluster_is_left_as_it_is_by_a_second_start(cluster: Cluster) -> None:
    conf = (cluster.folder / "etc/slurm.conf").read_text()
    job = cluster.submit("sleep 300", "--output=/dev/null")
    cluster.wait_for_job(job, "RUNNING")
    Cluster(cluster.folder).start()
    assert cluster.job(job)["JobState"] == "RUNNING"
    assert (cluster.folder / "etc/slurm.conf").read_text() == conf


def test_a_second_cluster_says_where_the_first_is(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=f"a cluster runs in {cluster.folder}"):
        Cluster(tmp_path / "second").start()


def test_a_folder_of_something_else_is_left_alone(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    Cluster(tmp_path).stop()
    assert (tmp_path / "precious").exists()
