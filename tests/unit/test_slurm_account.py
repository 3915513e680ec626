"""What a run has cost, counted from its folder, and what MLflow is told of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow_stores import open_sink, the_run, train

from pipeline.tracking import sync, tag
from slurm import account, status
from slurm.account import OUTSIDE, Account


def write(path: Path, *lines: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def attempt(number: int, event: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"time": time, "attempt": f"7-{number}", "event": event, "step": 0, **fields}


def step(number: int, time: float) -> dict[str, Any]:
    return {"kind": "train", "time": time, "step": number, "loss": 1.0, "images_per_s": 8.0}


@pytest.fixture
def restarted(tmp_path: Path) -> Path:
    """A run that was started four times: killed twice by the same, and once by its host, of which nobody left word."""
    run = tmp_path / "runs" / "one"
    killed = {"reason": "rank 2 on n2 was killed by SIGKILL", "crash": True, "requeue": True}
    write(run / "slurm" / "attempts.jsonl", attempt(0, "begin", 100), attempt(0, "end", 110, **killed), attempt(1, "begin", 120),
          attempt(1, "end", 130, **killed), attempt(2, "begin", 140), attempt(3, "begin", 160))  # fmt: skip
    write(run / "log.jsonl", {"kind": "start", "time": 101, "step": 0}, *(step(n, 160 + 2 * n) for n in range(1, 11)))
    # What goes with lost steps, such as the line of a checkpoint after them, is no step.
    write(run / "log.discarded.jsonl", step(5, 109), step(6, 110), {"kind": "stop", "step": 6, "time": 111})
    write(run / "slurm" / "job.json", {"job": "7"})
    return run


def test_restarts_their_reasons_lost_steps_and_goodput(restarted: Path) -> None:
    reasons = {"rank 2 on n2 was killed by SIGKILL": 2, OUTSIDE: 1}
    assert account.account(restarted) == Account(3, reasons, 2, pytest.approx(20 / 80))


def test_a_run_that_has_not_begun_has_cost_nothing(tmp_path: Path) -> None:
    assert account.account(tmp_path) == Account(0, {}, 0, None)


@pytest.mark.parametrize("waits", [True, False])
def test_mlflow_has_it_in_tags_whoever_sends_the_run(restarted: Path, uri: str, waits: bool, monkeypatch) -> None:
    """The job itself sends to a server while it runs; no point is sent twice for that, and its own tags stay."""
    monkeypatch.setattr(status, "slurm_state", lambda job: ("RUNNING", ""))
    record = {"job": "7", "tracking": uri, "tracking_waits": waits}
    write(restarted / "slurm" / "job.json", record)
    if not waits:
        assert status.replay(status.look(restarted)) is None  # nothing is there yet that could be tagged
        sink = open_sink(restarted, uri)
        train(restarted, sink, 11, 12)
        sink.close()
        state = (restarted / "mlflow.json").read_text()
    for _ in range(2):
        assert status.replay(status.look(restarted)) is None
    run = the_run(uri)
    tags = {name: value for name, value in run.data.tags.items() if name.startswith("slurm.")}
    why = "rank 2 on n2 was killed by SIGKILL"
    assert tags == {
        "slurm.job": "7", "slurm.state": "RUNNING", "slurm.why": why, "slurm.restarts": "3", "slurm.lost_steps": "2",
        "slurm.reasons": f"{why} (2); {OUTSIDE} (1)", "slurm.goodput": tags["slurm.goodput"],
    }  # fmt: skip
    assert 0 < float(tags["slurm.goodput"]) <= 1
    steps = [point.step for point in MlflowClient(uri).get_metric_history(run.info.run_id, "loss")]
    assert sorted(steps) == list(range(1, 11 if waits else 13))
    if not waits:
        assert run.data.tags["method"] == "mae" and (restarted / "mlflow.json").read_text() == state


def test_a_store_that_is_away_is_said(restarted: Path) -> None:
    sync(restarted, f"sqlite:///{restarted}/m.db")
    write(restarted / "slurm" / "job.json", {"job": "7", "tracking": "http://127.0.0.1:9", "tracking_waits": False})
    found = status.Status(restarted, "7", "RUNNING", "", 1, 1, 1.0, 1.0, 1.0, account.account(restarted), "", [])
    assert "one: not sent to MLflow: MLflow (http://127.0.0.1:9) cannot be reached" in (status.replay(found) or "")
    tag(restarted.parent, "http://127.0.0.1:9", {})  # no run is known: nothing is asked
