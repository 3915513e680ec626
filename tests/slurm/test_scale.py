"""Points of `scale` as jobs of the cluster: one fails, and the next call queues that one only."""

import json
import sqlite3

import pytest

from tests.slurm.test_jobs import SETTINGS, patchmill

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


def test_points_are_measured_once_and_what_failed_again(cluster, tmp_path) -> None:
    runs, mended = tmp_path / "runs" / "scale", tmp_path / "mended"
    settings = [*SETTINGS, "engine/ddp", "nodes=1,2", "slurm.tasks_per_node=1", f"run.dir={runs}", "--steps", "20", "--warmup", "5",
                f"slurm.setup=['test $SLURM_JOB_NUM_NODES = 1 || test -e {mended} || exit 3']", "--wait"]  # fmt: skip
    settings.remove("slurm.tasks_per_node=2")
    settings.remove("slurm.nodes=2")
    said = patchmill("scale", *settings, code=1)
    assert "1 of 2 points have no result: nodes-2" in said and "slurm.setup failed" in said
    first = json.loads((runs / "scale.json").read_text())["rows"]
    mended.touch()
    said = patchmill("scale", *settings)
    assert "nodes-2: queued again, it had failed" in said and "nodes-1: queued" not in said
    one, two = json.loads((runs / "scale.json").read_text())["rows"]
    assert one == first[0] and (one["processes"], one["batch"], one["state"], one["efficiency"]) == (1, 16, "done", 1)
    assert (two["processes"], two["batch"], two["state"]) == (2, 32, "done")
    assert 0 < two["low"] <= two["images_per_s"] <= two["high"]
    assert two["efficiency"] == pytest.approx(two["images_per_s"] / 2 / one["images_per_s"])
    assert all(0.1 < row["memory_gib"] < 3 and row["device"] == "cpu" for row in (one, two))
    assert (runs / "scale.png").exists()
    with sqlite3.connect(runs.parent / "mlflow.db") as database:
        assert database.execute("select name, status from runs").fetchall() == [("scale", "FINISHED")]
        steps = database.execute("select step from metrics where key like 'images_per_s/%'").fetchall()
    assert sorted(steps) == [(1,), (2,)]
    assert patchmill("status", str(runs)).count("20/20") == 2
