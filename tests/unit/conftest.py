"""A run folder and MLflow stores; making a sqlite store takes seconds, so one is made and copied."""

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import mlflow_run
from pipeline.config import Config


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


@pytest.fixture
def write_config(run_dir: Path, tiny_config: Callable[..., Config]) -> Callable[..., object]:
    return lambda **overrides: (run_dir / "config.yaml").write_text(tiny_config("mae", **overrides).to_yaml())
