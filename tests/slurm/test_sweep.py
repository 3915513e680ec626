"""Sweeps on the cluster: one array, of which a part may fail, be disturbed or be cancelled without the rest."""

import json
import sqlite3
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.test_jobs import SETTINGS, STEPS, curve, done, ended, job_of, lines, patchmill, trainer, trains

pytestmark = pytest.mark.timeout(600)

SMALL = [*SETTINGS, "slurm.nodes=1", "slurm.tasks_per_node=1", "slurm.mem=1G", "slurm.max_crashes=1"]


def sweep(folder: Path, space: str, *settings: str) -> str:
    """A call; its array's number."""
    path = folder.parent / "space.yaml"
    path.write_text(space)
    said = patchmill("sweep", str(path), *SMALL, f"run.dir={folder}", *settings)
    return said.split("submitted: job ")[1].split(";")[0]


def points(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/config.yaml"))


def all_ended(cluster: Cluster, folder: Path, timeout: float = 300) -> None:
    """Requeued elements are let go at once, until none is left."""
    with cluster.releasing():
        wait_for(f"the end of {folder.name}", timeout, lambda: not cluster.run("squeue", "-h"))


def test_a_sweep_of_three_of_which_one_fails_at_first(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "lr"
    broken = "slurm.setup=['test \"$SLURM_ARRAY_TASK_ID\" != 1 || exit 3']"  # the second element's environment, that is
    array = sweep(folder, "grid: {optim.base_lr: [1e-3, 2e-3, 4e-3]}\nparallel: 2", broken)
    limits = cluster.run("squeue", "-h", "-r", "-o", "%i")
    assert set(limits.split()) <= {f"{array}_{element}" for element in range(3)}
    all_ended(cluster, folder)
    assert [done(folder / name) for name in ("000", "001", "002")] == [True, False, True]
    said = patchmill("status", str(folder))
    assert "lr/001 stopped last: the job ended before training began: slurm.setup failed" in said
    again = sweep(folder, "grid: {optim.base_lr: [1e-3, 2e-3, 4e-3]}", broken)
    all_ended(cluster, folder)
    assert [job_of(run) for run in points(folder)] == [f"{array}_0", again, f"{array}_2"]
    assert len({curve(run)[STEPS] for run in points(folder)}) == 3 and all(
        len(ended(run)) == 1 for run in points(folder)[::2]
    )
    said = patchmill("status", str(folder))
    assert said.count(f"{STEPS}/{STEPS}") == said.count("COMPLETED") == 3 and "base_lr=0.002" in said
    with sqlite3.connect(folder / "mlflow.db") as found:
        nested = found.execute(
            "select count(*), count(distinct value) from tags where key = 'mlflow.parentRunId'"
        ).fetchone()
        runs = found.execute("select count(*), count(distinct name) from runs where status = 'FINISHED'").fetchone()
    assert nested == (3, 1) and runs == (4, 4)


@pytest.mark.slow
def test_of_six_points_the_one_that_diverges_fails_alone(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "six"
    points_of_it = [
        "optim.base_lr: 1e-3",
        "optim.base_lr: 2e-3",
        "optim.base_lr: 1e+30",
        *(f"train.seed: {n}" for n in (1, 2, 3)),
    ]
    space = f"list: [{', '.join(f'{{{one}}}' for one in points_of_it)}]"
    settings = ("guard.max_nonfinite=2", "guard.max_rollbacks=0")
    array = sweep(folder, f"{space}\nparallel: 2", *settings)
    all_ended(cluster, folder)
    assert [run.name for run in points(folder) if done(run)] == ["000", "001", "003", "004", "005"]
    assert all(len(curve(run)) == STEPS for run in points(folder) if done(run))
    said = patchmill("status", str(folder))
    assert said.count("COMPLETED") == 5 and said.count("stopped last: ") == 1
    assert "six/002 stopped last: " in said and "the gradient was not finite" in said and "Lower optim.base_lr" in said
    again = sweep(folder, f"{space}\nparallel: 2", *settings)
    all_ended(cluster, folder)
    jobs = [job_of(run) for run in points(folder)]
    assert jobs == [again if element == 2 else f"{array}_{element}" for element in range(6)]


@pytest.mark.slow
def test_elements_come_back_alone_and_are_cancelled_together(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "lr"
    space = "grid: {optim.base_lr: [1e-3, 2e-3, 4e-3]}"
    array = sweep(folder, space, "train.epochs=120", "slurm.max_crashes=3")
    for name in ("000", "001", "002"):
        trains(folder / name)
    trainer(array, 0).kill()  # of the last element, whose number in Slurm is that of the whole array
    wait_for("its verdict", 60, lambda: ended(folder / "002"))
    assert ended(folder / "002")[0]["requeue"] and not ended(folder / "000") and not ended(folder / "001")
    cluster.run("scancel", "--signal=USR2", f"{array}_0.0")
    cluster.run("scontrol", "requeue", f"{array}_1")
    with cluster.releasing():
        wait_for("all back", 200, lambda: all(lines(run, "resume") for run in points(folder)))
    first = [ended(folder / name)[0] for name in ("000", "001")]
    assert first[0]["reason"] == "stopped by SIGUSR2" and "requeued by Slurm" in first[1]["reason"]
    assert [line["attempt"] for line in first] == [f"{array}_0-0", f"{array}_1-0"]
    assert "lr/001" in patchmill("status", str(folder))
    said = patchmill("cancel", str(folder))
    assert cluster.run("squeue", "-h", "-t", "PD,R") == "" and f"job {array}_1 has ended" in said
    for run in points(folder):
        steps = [line["step"] for line in lines(run, "train")]
        assert (
            steps == list(range(1, len(steps) + 1)) and not json.loads((run / "why_stopped.json").read_text())["done"]
        )
