"""MLflow behind the log: every point once, whatever dies when; training waits for nothing."""

import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from pipeline import mlflow_run, tracking
from pipeline.config import Config, UserError
from pipeline.runlog import LOG
from pipeline.tracking import MlflowSink, RunLog, discard_after, resolve_uri, sync

mlflow_run.prepare_mlflow()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow_run._make_sqlite(path)
    return path


@pytest.fixture
def uri(tmp_path: Path, empty_store: Path) -> str:
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FLUSH_S", 0.02)
    monkeypatch.setattr(tracking, "MAX_RETRY_S", 0.05)


@pytest.fixture
def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def open_sink(folder: Path, uri: str | None, **overrides: Any) -> MlflowSink:
    options = {"experiment": "test", "run_name": "a run", "params": {"train.seed": 3}, "tags": {"method": "mae"}}
    return MlflowSink(folder, uri, **(options | overrides))


def train(folder: Path, sink: MlflowSink | None, first: int, last: int, **fields: Any) -> None:
    with RunLog(folder / LOG) as run_log:
        for step in range(first, last + 1):
            record = run_log.write("train", step=step, **({"loss": 1 / step, "lr": 0.1, "epoch": 0} | fields))
            if sink:
                sink.log(step, record)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def runs_in(uri: str) -> list[Run]:
    client = MlflowClient(uri)
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def the_run(uri: str) -> Run:
    (run,) = runs_in(uri)
    return run


def history(uri: str, key: str) -> list[Metric]:
    return MlflowClient(uri).get_metric_history(the_run(uri).info.run_id, key)


def assert_once(uri: str, keys: list[str], steps: range) -> None:
    for key in keys:
        assert Counter(metric.step for metric in history(uri, key)) == Counter(steps), key


def state_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "mlflow.json").read_text()))


@pytest.fixture
def write_config(run_dir: Path, tiny_config: Callable[..., Config]) -> Callable[..., object]:
    return lambda **overrides: (run_dir / "config.yaml").write_text(tiny_config("mae", **overrides).to_yaml())


def test_a_run_arrives_whole(
    run_dir: Path, write_config: Callable[..., object], uri: str
) -> None:
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
    assert result.stdout == "through\n", result.stderr
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
    assert len(ours) == 2 and closed_port in ours[0] and "up to step -1 of 30" in ours[1]
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
    run_dir: Path, write_config: Callable[..., object], uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
    assert len(history(uri, "eval/knn_top1")) == 1


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


def test_mistakes_are_one_clear_line(run_dir: Path, closed_port: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    for error in (no_log, no_store, away, refused):
        assert "\n" not in str(error.value) and "hunter2" not in str(error.value)
    assert closed_port in str(away.value)


@pytest.mark.parametrize(
    ("kinds", "why", "alive", "status"),
    [
        (["start"], None, True, "RUNNING"),
        (["start", "stop"], {"done": False, "reason": "stopped by SIGTERM"}, True, "RUNNING"),
        (["start"], None, False, "KILLED"),
        ([], None, False, "KILLED"),
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
    run_dir: Path, write_config: Callable[..., object], uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, closed_port: str
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


def test_no_uri_leaves_what_sync_noted(run_dir: Path, uri: str) -> None:
    train(run_dir, None, 1, 2)
    sync(run_dir, uri)
    before = state_of(run_dir)
    open_sink(run_dir, None).close()
    assert state_of(run_dir) == before and before["uri"] == uri


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


def test_a_store_whose_making_was_cut_off_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying:
        def __init__(self, uri: str) -> None:
            Path(uri.removeprefix("sqlite:///")).write_bytes(b"half")

        def search_experiments(self, max_results: int) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "MlflowClient", Dying)
        with pytest.raises(KeyboardInterrupt):
            mlflow_run._make_sqlite(tmp_path / "new" / "mlflow.db")
    assert not (tmp_path / "new" / "mlflow.db").exists()
    mlflow_run._make_sqlite(tmp_path / "new" / "mlflow.db")
    assert runs_in(f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}") == []


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
