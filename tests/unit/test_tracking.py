"""MLflow behind the log: every point once, whatever dies when; training waits for nothing."""

import logging
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow_stores import assert_once, history, open_sink, runs_in, state_of, the_run, train, wait_until

from pipeline import mlflow_run, tracking
from pipeline.runlog import LOG
from pipeline.tracking import RunLog, discard_after, resolve_uri, sync


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FLUSH_S", 0.02)
    monkeypatch.setattr(tracking, "MAX_RETRY_S", 0.05)


def test_a_run_arrives_whole(
    run_dir: Path, write_config: Callable[..., object], uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    write_config()
    (run_dir / "data_seal.json").write_text("{}")
    params = {"train.seed": 3, "long": "x" * 7000, "none": None, "k" * 300: 1, **{f"p{i}": i for i in range(150)}}
    sink = open_sink(run_dir, uri, params=params)
    with RunLog(run_dir / LOG) as run_log:
        for record in [
            run_log.write("start", step=0, total_steps=2),
            run_log.write("train", step=1, loss=0.5, note="text", ok=True, time=12.3456),
            run_log.write("train", step=2, loss=float("nan"), grad_norm=float("inf")),
            run_log.write("skip", step=2, loss=1.0),
            run_log.write("eval", step=2, knn_top1=41.0),
        ]:
            sink.log(2, record)
    (run_dir / "figures").mkdir()
    (run_dir / "figures" / "one.png").write_bytes(b"png")
    sink.log_figure(run_dir / "figures" / "one.png")
    sink.close("FINISHED", 60)

    run, client = the_run(uri), MlflowClient(uri)
    assert (run.info.status, run.info.run_name, run.data.tags["method"]) == ("FINISHED", "a run", "mae")
    assert set(run.data.metrics) == {"loss", "grad_norm", "eval/knn_top1"}
    first, second = history(uri, "loss")
    assert (first.step, first.value, first.timestamp) == (1, 0.5, 12345)
    assert second.step == 2 and second.value != second.value
    assert run.data.params["train.seed"] == "3" and run.data.params["long"] == "x" * 6000
    assert run.data.params["k" * 250] == "1" and run.data.params["p149"] == "149" and run.data.params["none"] == "None"
    files = {item.path for folder in (None, "figures") for item in client.list_artifacts(run.info.run_id, folder)}
    assert files == {"config.yaml", "data_seal.json", "figures", "figures/one.png"}
    assert run.info.artifact_uri.startswith(f"file://{run_dir.parent}")
    state = state_of(run_dir)
    assert (state["run_id"], state["experiment"], state["uri"]) == (run.info.run_id, "test", uri)
    assert state["sent_step"] == 2


def test_constructing_imports_no_mlflow_and_waits_for_nothing(run_dir: Path, silent_server: str) -> None:
    script = f"""
        import sys
        from pathlib import Path
        from pipeline.tracking import MlflowSink, RunLog
        assert "mlflow" not in sys.modules
        sink = MlflowSink(Path({str(run_dir)!r}), {silent_server!r}, "test", "a", {{}}, {{}})
        with RunLog(Path({str(run_dir)!r}) / "log.jsonl") as log:
            for step in range(20_000):
                sink.log(step, log.write("train", step=step, loss=1.0))
        sink.close("FINISHED", 0.2)
        print("through")
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "through\n"), result.stderr
    assert len((run_dir / LOG).read_bytes().splitlines()) == 20_000
    assert f"patchmill sync {run_dir}" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_closed_port_is_said_once_and_sync_sends_all_later(
    run_dir: Path, uri: str, closed_port: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    attempts = []
    real = mlflow_run.Remote.__init__
    monkeypatch.setattr(tracking.Remote, "__init__", lambda *args: (attempts.append(1), real(*args))[1])
    with caplog.at_level(logging.WARNING, "patchmill"):
        sink = open_sink(run_dir, closed_port)
        train(run_dir, sink, 1, 30)
        wait_until(lambda: len(attempts) > 2)
        sink.close("FINISHED", 60)
    ours = [record.message for record in caplog.records if record.name == "patchmill"]
    assert len(ours) == 2 and closed_port in ours[0] and "nothing of this run" in ours[1]
    report = sync(run_dir, uri)
    assert (report.sent, report.present) == (90, 0)
    assert_once(uri, ["loss", "lr", "epoch"], range(1, 31))
    assert (the_run(uri).info.run_name, the_run(uri).data.tags["method"]) == ("a run", "mae")


def test_resuming_continues_the_run_and_sends_no_step_twice(run_dir: Path, uri: str) -> None:
    sink = open_sink(run_dir, uri)
    train(run_dir, sink, 1, 20)
    sink.close("KILLED", 60)
    first = the_run(uri)
    assert first.info.status == "KILLED"
    discard_after(run_dir, 10)
    sink = open_sink(run_dir, uri, params={"train.seed": 4, "new": 1}, tags={"restarts": "1"}, experiment="elsewhere")
    wait_until(lambda: the_run(uri).info.status == "RUNNING")
    train(run_dir, sink, 11, 30, loss=9.0)
    sink.close("FINISHED", 60)
    run = the_run(uri)
    assert (run.info.run_id, run.info.status, run.data.tags["restarts"]) == (first.info.run_id, "FINISHED", "1")
    assert (run.data.params["train.seed"], run.data.params["new"]) == ("3", "1")
    assert_once(uri, ["loss", "lr"], range(1, 31))
    values = {metric.step: metric.value for metric in history(uri, "loss")}
    assert values[20] == 1 / 20 and values[21] == 9.0
    assert sync(run_dir).sent == 0


def test_a_new_process_first_sends_what_the_last_one_left(run_dir: Path, uri: str) -> None:
    sink = open_sink(run_dir, uri)
    train(run_dir, sink, 1, 5)
    sink.close("KILLED", 60)
    train(run_dir, None, 6, 9)
    sink = open_sink(run_dir, uri)
    train(run_dir, sink, 10, 12)
    sink.close("FINISHED", 60)
    assert_once(uri, ["loss"], range(1, 13))


def test_a_full_queue_loses_nothing(run_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "QUEUE_RECORDS", 3)
    sink = open_sink(run_dir, uri)
    train(run_dir, sink, 1, 200)
    wait_until(lambda: state_of(run_dir)["sent_step"] == 200)
    train(run_dir, sink, 201, 400)
    sink.close("FINISHED", 60)
    assert_once(uri, ["loss", "lr"], range(1, 401))


@pytest.mark.parametrize("arrives", [False, True], ids=["lost before", "answer lost"])
def test_an_outage_ends_with_every_point_once(
    run_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, arrives: bool
) -> None:
    real, down, failures = MlflowClient.log_batch, False, 0

    def log_batch(self: MlflowClient, *args: Any, **options: Any) -> None:
        nonlocal failures
        if not down or arrives:
            real(self, *args, **options)
        if down and options.get("metrics"):
            failures += 1
            raise ConnectionError("the server is away")

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    sink = open_sink(run_dir, uri)
    train(run_dir, sink, 1, 20)
    wait_until(lambda: state_of(run_dir)["sent_step"] == 20)
    down = True
    train(run_dir, sink, 21, 40)
    wait_until(lambda: failures > (0 if arrives else 2))
    down = False
    train(run_dir, sink, 41, 60)
    sink.close("FINISHED", 60)
    assert_once(uri, ["loss", "lr", "epoch"], range(1, 61))
    assert sum("the server is away" in record.message for record in caplog.records) == 1
    assert the_run(uri).info.status == "FINISHED"


def test_artifacts_that_are_refused_stop_no_metric(
    run_dir: Path,
    write_config: Callable[..., object],
    uri: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_config()

    def refuse(*args: object) -> None:
        raise PermissionError("no credentials for the bucket")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_text", refuse)
        sink = open_sink(run_dir, uri)
        train(run_dir, sink, 1, 4)
        sink.close("FINISHED", 60)
    assert_once(uri, ["loss"], range(1, 5))
    assert caplog.text.count("no credentials for the bucket") == 1 and "sync" in caplog.text
    assert sync(run_dir).files == 1


def test_system_metrics_go_on_after_a_restart(run_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    key = "system/cpu_utilization_percentage"
    for attempt in range(2):
        sink = open_sink(run_dir, uri)
        train(run_dir, sink, 1 + attempt, 1 + attempt)
        before = len(history(uri, key)) if attempt else 0
        wait_until(lambda: bool(runs_in(uri)) and len(history(uri, key)) > before + 1)  # noqa: B023  awaited here
        sink.close("KILLED", 60)
    steps = [metric.step for metric in history(uri, key)]
    assert sorted(steps) == list(range(len(steps)))
    assert_once(uri, ["loss"], range(1, 3))


def test_no_uri_starts_nothing(run_dir: Path) -> None:
    sink = open_sink(run_dir, None)
    train(run_dir, sink, 1, 2)
    sink.log_figure(run_dir / "figure.png")
    sink.close()
    assert sink._thread is None
    assert sorted(path.name for path in run_dir.iterdir()) == [LOG, "mlflow.json"]


def test_resolve_uri(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(run_dir)
    assert resolve_uri("none", run_dir) is None
    assert resolve_uri("auto", run_dir) == f"sqlite:///{run_dir.parent / 'mlflow.db'}"
    assert resolve_uri("sqlite:///here.db", run_dir) == f"sqlite:///{run_dir / 'here.db'}"
    assert resolve_uri("http://host:5000", run_dir) == "http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other")
    assert resolve_uri("auto", run_dir) == "http://other"
    assert resolve_uri("none", run_dir) is None


def test_a_store_whose_making_was_cut_off_does_not_stay(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, dies = tmp_path / "new" / "mlflow.db", True

    class Client:
        def __init__(self, uri: str) -> None:
            self.path = Path(uri.removeprefix("sqlite:///"))
            self.path.write_text("half")

        def search_experiments(self, max_results: int) -> None:
            if dies:
                raise KeyboardInterrupt
            shutil.copy(empty_store, self.path)

    monkeypatch.setattr(mlflow, "MlflowClient", Client)
    with pytest.raises(KeyboardInterrupt):
        mlflow_run._make_sqlite(path)
    assert not path.exists()
    dies = False
    mlflow_run._make_sqlite(path)
    assert path.read_bytes() == empty_store.read_bytes()
    assert not list(path.parent.glob(".*.partial*"))
    mlflow_run._make_sqlite(path)  # leaves one that is there alone


def test_mlflow_itself_stays_quiet(run_dir: Path, tmp_path: Path) -> None:
    script = f"""
        from pathlib import Path
        from pipeline.tracking import MlflowSink
        sink = MlflowSink(Path({str(run_dir)!r}), "sqlite:///{tmp_path}/fresh.db", "test", "a", {{"a": 1}}, {{}})
        sink.close("FINISHED", 60)
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, env=env
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert the_run(f"sqlite:///{tmp_path}/fresh.db").info.status == "FINISHED"
