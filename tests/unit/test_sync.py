"""patchmill sync: what a run folder has and its store has not, once, with one clear line when it cannot."""

import errno
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow_stores import assert_once, history, open_sink, runs_in, state_of, the_run, train, wait_until

from pipeline import mlflow_run, tracking
from pipeline.config import UserError
from pipeline.mlflow_run import redact
from pipeline.runlog import LOG
from pipeline.tracking import RunLog, nest, resolve_uri, sync


def test_sync_makes_the_run_and_a_second_one_sends_nothing(
    run_dir: Path, write_config: Callable[..., object], uri: str
) -> None:
    write_config(train__seed=11)
    (run_dir / "figures").mkdir()
    (run_dir / "figures" / "a.png").write_bytes(b"png")
    train(run_dir, open_sink(run_dir, None), 1, 1200)
    report = sync(run_dir, uri)
    assert (report.sent, report.present, report.files, report.uri) == (3600, 0, 2, uri)
    assert report.run_id in str(report) and "\n" not in str(report)
    report = sync(run_dir)
    assert (report.sent, report.present, report.files) == (0, 3600, 1)
    run = the_run(uri)
    assert (run.data.params["train.seed"], run.data.params["method.name"]) == ("11", "mae")
    assert run.data.tags["method"] == "mae"
    assert state_of(run_dir)["sent_step"] == 1200
    assert_once(uri, ["loss", "lr", "epoch"], range(1, 1201))


def test_sync_fills_gaps_and_takes_the_first_of_two_evaluations_once(run_dir: Path, uri: str) -> None:
    train(run_dir, None, 1, 10)
    sync(run_dir, uri)
    with RunLog(run_dir / LOG) as run_log:
        run_log.write("train", step=20, loss=1.0)
    sync(run_dir)
    with RunLog(run_dir / LOG) as run_log:
        for step in (12, 13):
            run_log.write("train", step=step, loss=float("nan"))
        for value in (1.0, 2.0):
            run_log.write("eval", step=12, knn_top1=value)
    assert sync(run_dir).sent == 3
    assert sync(run_dir).sent == 0
    assert sorted(metric.step for metric in history(uri, "loss")) == [*range(1, 11), 12, 13, 20]
    assert [metric.value for metric in history(uri, "eval/knn_top1")] == [1.0]


def test_sync_to_another_store_makes_one_run_there(run_dir: Path, uri: str, empty_store: Path) -> None:
    sink = open_sink(run_dir, uri)
    train(run_dir, sink, 1, 5)
    sink.close("FINISHED", 60)
    other = f"sqlite:///{shutil.copy(empty_store, run_dir.parent / 'other.db')}"
    assert sync(run_dir, other).sent == 15
    assert sync(run_dir, uri).sent == 0
    assert sync(run_dir, other).sent == 0
    assert the_run(other).data.tags["method"] == "mae"
    assert_once(other, ["loss"], range(1, 6))


def test_killed_between_log_and_send(run_dir: Path, uri: str) -> None:
    script = f"""
        import os, signal, time
        from pathlib import Path
        from pipeline import tracking
        tracking.FLUSH_S = 0.02
        run_dir = Path({str(run_dir)!r})
        sink = tracking.MlflowSink(run_dir, {uri!r}, "test", "a", {{}}, {{}})
        log = tracking.RunLog(run_dir / "log.jsonl")
        for step in range(1, 51):
            sink.log(step, log.write("train", step=step, loss=1.0))
        while sink._state["sent_step"] < 50:
            time.sleep(0.02)
        for step in range(51, 101):
            sink.log(step, log.write("train", step=step, loss=1.0))
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    report = sync(run_dir)
    assert report.sent > 0 and report.sent + report.present == 100
    assert report.status == the_run(uri).info.status == "KILLED"
    assert_once(uri, ["loss"], range(1, 101))


def test_mistakes_are_one_clear_line(
    run_dir: Path, closed_port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="is not a run folder: it has no log.jsonl") as no_log:
        sync(run_dir)
    train(run_dir, None, 1, 1)
    with pytest.raises(UserError, match="was never sent to MLflow: name a store with --uri") as no_store:
        sync(run_dir)
    with pytest.raises(UserError, match="cannot be reached or refuses") as away:
        sync(run_dir, closed_port.replace("//", "//user:hunter2@"))
    with pytest.raises(UserError, match="cannot be reached or refuses") as refused:
        sync(run_dir, "mlruns")
    broken, folder = run_dir / "broken.db", run_dir / "file"
    broken.write_text("not a database" * 100)
    folder.write_text("")
    with pytest.raises(UserError, match="cannot be reached or refuses.*file is not a database") as garbage:
        sync(run_dir, f"sqlite:///{broken}")
    with pytest.raises(UserError, match="cannot be reached or refuses") as nowhere:
        sync(run_dir, f"sqlite:///{folder / 'mlflow.db'}")
    for error in (no_log, no_store, away, refused, garbage, nowhere):
        assert "\n" not in str(error.value) and "hunter2" not in str(error.value)
    assert capsys.readouterr() == ("", "")
    assert closed_port in str(away.value)


@pytest.mark.parametrize(
    ("kinds", "why", "alive", "status"),
    [
        (["start"], None, True, "RUNNING"),
        (["start", "stop"], {"done": False, "reason": "stopped by SIGTERM"}, True, "RUNNING"),
        (["start"], None, False, "KILLED"),
        ([], None, False, "KILLED"),
        (["import"], None, False, "FINISHED"),
        (["start", "stop"], {"done": True, "reason": "done"}, False, "FINISHED"),
        (["start", "stop"], {"done": False, "reason": "stopped by SIGTERM"}, False, "KILLED"),
        (["start", "stop"], {"done": False, "reason": "NonFinite: the gradient"}, False, "FAILED"),
        (["start", "stop", "resume"], {"done": False, "reason": "NonFinite: the gradient"}, False, "KILLED"),
        (["start", "stop"], None, False, "KILLED"),
    ],
)
def test_the_status_that_sync_sets(
    run_dir: Path, kinds: list[str], why: dict[str, Any] | None, alive: bool, status: str
) -> None:
    if why:
        (run_dir / "why_stopped.json").write_text(json.dumps(why))
    with (run_dir / ".lock").open("w") as lock:
        if alive:
            fcntl.flock(lock, fcntl.LOCK_EX)
        records = [{"kind": kind} for kind in ["train", *kinds, "eval"]]
        assert tracking._status_of(run_dir, records) == status


def test_secrets_stay_out(
    run_dir: Path,
    write_config: Callable[..., object],
    uri: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    closed_port: str,
) -> None:
    secrets = {"MLFLOW_TRACKING_PASSWORD": "s3cret-password", "AWS_SECRET_ACCESS_KEY": "s3cret-key"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    store = closed_port.replace("//", "//me:s3cret-in-url@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    write_config(tracking__uri=store)
    found = resolve_uri("auto", run_dir)
    assert found == store
    sink = open_sink(run_dir, found, params={"tracking.uri": store}, tags={"from": store})
    train(run_dir, sink, 1, 3)
    wait_until(lambda: bool(sink._said))
    sink.close("FINISHED", 60)
    (run_dir / "config.yaml").rename(run_dir.parent / "config.yaml")  # the user's own file may say it
    said = "".join(path.read_text() for path in run_dir.iterdir()) + caplog.text
    assert "127.0.0.1" in said and "s3cret" not in said
    (run_dir.parent / "config.yaml").rename(run_dir / "config.yaml")
    sync(run_dir, uri)
    run = the_run(uri)
    sent = MlflowClient(uri).download_artifacts(run.info.run_id, "config.yaml")
    text = f"{run.data.params} {run.data.tags} {Path(sent).read_text()} {(run_dir / 'mlflow.json').read_text()}"
    assert "127.0.0.1" in text and "s3cret" not in text


def test_a_run_that_was_sent_is_sent_again_with_the_password_of_the_settings(
    run_dir: Path, write_config: Callable[..., object], closed_port: str
) -> None:
    store = closed_port.replace("//", "//me:s3cret@")
    write_config(tracking__uri=store)
    state = {"uri": redact(store), "run_id": "1"}
    assert "s3cret" not in state["uri"] and tracking._known_store(run_dir, state) == store
    assert tracking._known_store(run_dir, {"uri": "http://elsewhere:5000", "run_id": "1"}) == "http://elsewhere:5000"
    assert tracking._known_store(run_dir, {"uri": None, "run_id": None}) == store
    write_config(tracking__uri="none")
    assert tracking._known_store(run_dir, {"uri": None, "run_id": None}) is None
    assert tracking._known_store(run_dir, state) == state["uri"]


def test_a_full_disk_is_not_said_to_be_mlflows(run_dir: Path) -> None:
    with (
        pytest.raises(UserError, match="^/x/mlflow.json: No space left on device$"),
        tracking._reachable("http://x", "wait"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "/x/mlflow.json")
    with pytest.raises(UserError, match="cannot be reached"), tracking._reachable("http://x", "wait"):
        raise ConnectionError("refused")


def test_no_uri_leaves_what_sync_noted(run_dir: Path, uri: str) -> None:
    train(run_dir, None, 1, 2)
    sync(run_dir, uri)
    before = state_of(run_dir)
    open_sink(run_dir, None).close()
    # What it would tag the run with is noted for the next sync.
    assert state_of(run_dir) == before | {"tags": {"method": "mae"}} and before["uri"] == uri


def test_one_writer(run_dir: Path, uri: str) -> None:
    train(run_dir, None, 1, 3)
    with mlflow_run.only_writer(run_dir):
        with pytest.raises(UserError, match="another process sends this run"):
            sync(run_dir, uri)
        sink = open_sink(run_dir, uri)
        wait_until(lambda: bool(sink._said))
        assert runs_in(uri) == []
    sink.close("FINISHED", 60)
    assert_once(uri, ["loss"], range(1, 4))


@pytest.mark.parametrize("by_the_job", [True, False])
def test_runs_are_nested_in_their_folder_s_whoever_sends_them(by_the_job: bool, tmp_path: Path, uri: str) -> None:
    folder, run_dir = tmp_path / "sweep", tmp_path / "sweep" / "000"
    run_dir.mkdir(parents=True)
    parent = nest(folder, uri, "test", {"grid.a": "[1]"}, {"patchmill.points": "1"}, [run_dir])
    assert nest(folder, uri, "test", {"grid.a": "[1]"}, {"patchmill.points": "1"}, [run_dir]) == parent
    sink = open_sink(run_dir, uri if by_the_job else None)
    train(run_dir, sink, 1, 3)
    sink.close()
    assert sync(run_dir, uri).sent == (0 if by_the_job else 9)
    above, child = sorted(runs_in(uri), key=lambda run: run.info.run_id != parent)
    assert (above.info.run_name, above.info.status, above.data.params) == ("sweep", "FINISHED", {"grid.a": "[1]"})
    assert child.data.tags["mlflow.parentRunId"] == parent and child.data.tags["method"] == "mae"
    assert child.info.run_name == "sweep/000"


def test_a_store_that_does_not_answer_keeps_a_folder_from_being_queued(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be reached or refuses: .*; start it, or set tracking.uri"):
        nest(tmp_path, "http://127.0.0.1:9", "test", {}, {}, [])


def test_a_store_that_went_away_is_not_made_anew_and_one_beside_the_run_is_taken(
    run_dir: Path, write_config: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # mlflow's own client sets it in this process
    write_config(tracking__uri="auto")
    state = {"uri": f"sqlite:///{tmp_path}/gone/mlflow.db", "run_id": "1"}
    with pytest.raises(UserError, match="gone/mlflow.db: is not there any more, to which .* name a store with --uri"):
        tracking._known_store(run_dir, state)
    (tmp_path / "mlflow.db").write_text("")
    assert tracking._known_store(run_dir, state) == f"sqlite:///{tmp_path}/mlflow.db"
    (run_dir / "finetune").mkdir()
    assert resolve_uri("auto", run_dir / "finetune") == f"sqlite:///{tmp_path}/mlflow.db", (
        "beside the run that it is of"
    )


@pytest.mark.parametrize("name", ["mlflow.json", "why_stopped.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_note_is_named(name: str, text: str, run_dir: Path, uri: str) -> None:
    train(run_dir, None, 1, 1)
    with RunLog(run_dir / LOG) as log:
        log.write("start", step=0)
        log.write("stop", step=1)
    (run_dir / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}: is damaged"):
        sync(run_dir, uri)
