"""A real MLflow server that dies in the middle of a run and comes back."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import tracking
from pipeline.runlog import LOG, RunLog
from pipeline.tracking import MlflowSink, sync, tag


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


class Server:
    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def answers(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
                   "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}",
                   "--artifacts-destination", str(self.folder / "artifacts")]  # fmt: skip
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        wait_until(self.answers)

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def train(folder: Path, sink: MlflowSink, first: int, last: int) -> None:
    with RunLog(folder / LOG) as run_log:
        for step in range(first, last + 1):
            loss = float("nan") if step % 7 == 0 else 1 / step
            sink.log(step, run_log.write("train", step=step, loss=loss, grad_norm=float("inf")))


def test_the_server_dies_in_the_middle_and_comes_back(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_S", 0.05)
    monkeypatch.setattr(tracking, "MAX_RETRY_S", 0.2)
    folder = tmp_path / "run"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "one.png").write_bytes(b"png")

    sink = MlflowSink(folder, server.uri, "test", "a run", {"a": 1}, {})
    train(folder, sink, 1, 40)
    wait_until(lambda: sink._state["sent_step"] == 40)
    server.kill()
    train(folder, sink, 41, 80)
    wait_until(lambda: bool(sink._said))
    with caplog.at_level(logging.WARNING, "patchmill"):
        sink.close("FINISHED")
    assert f"up to step 40 of 80; the log has the rest: patchmill sync {folder} sends it" in caplog.text

    server.start()
    assert sync(folder).sent == 80
    assert sync(folder).sent == 0
    tag(folder, server.uri, {"slurm.restarts": "2"})
    client = MlflowClient(server.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'test'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags["slurm.restarts"] == "2"
    for key in ("loss", "grad_norm"):
        steps = Counter(metric.step for metric in client.get_metric_history(run.info.run_id, key))
        assert steps == Counter(range(1, 81)), key
    assert [item.path for item in client.list_artifacts(run.info.run_id, "figures")] == ["figures/one.png"]
