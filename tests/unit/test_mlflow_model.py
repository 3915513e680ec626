"""The encoder as a model in MLflow: what it computes is what the probes see; once, whole, and without a pickle."""

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow_stores import history, the_run

from pipeline import checkpoint
from pipeline.config import Config, UserError
from pipeline.methods import build_method
from pipeline.mlflow_run import Remote
from pipeline.runlog import LOG
from pipeline.runs import restore
from pipeline.tracking import RunLog, sync
from pipeline.vit import normalise


@pytest.fixture
def trained(run_dir: Path, tiny_config: Callable[..., Config]) -> Path:
    """A run with a checkpoint of its second step and a probe of it."""
    cfg = tiny_config("mae", tracking__experiment="test")
    (run_dir / "config.yaml").write_text(cfg.to_yaml())
    tensors = {f"model.{name}": value.detach() for name, value in build_method(cfg).named_parameters()}
    checkpoint.save(run_dir / "checkpoints", 2, tensors, {})
    with RunLog(run_dir / LOG) as log:
        for step in (1, 2):
            log.write("train", step=step, loss=1.0)
        for step, name in (
            (1, "knn_model"),
            (1, "attentive_model"),
            (2, "knn_model"),
            (2, "linear_model"),
            (0, "knn_untrained"),
        ):
            log.write("eval", step=step, **{name: 10.0 * step})
    return run_dir


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_model_arrives_once_and_computes_the_probes_features(
    trained: Path, uri: str, empty_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    assert sync(trained, uri).model is None
    report = sync(trained, uri, weights="model")
    assert capsys.readouterr() == ("", "") and not any("type hints" in str(found.message) for found in recwarn)
    assert report.model and f"models:/{report.model}" in str(report)
    assert sync(trained, uri, weights="model").model == report.model
    client = MlflowClient(uri)
    model = client.get_logged_model(report.model)
    assert (model.name, model.status, model.source_run_id) == ("encoder-model-step2", "READY", the_run(uri).info.run_id)
    assert model.params["step"] == "2" and model.params["timm.embed_dim"] == "96"
    assert {metric.key: metric.value for metric in model.metrics} == {"eval/knn_model": 20, "eval/linear_model": 20}
    assert [(point.step, point.value) for point in history(uri, "eval/knn_model")] == [(1, 10), (2, 20)]  # not twice
    (output,) = the_run(uri).outputs.model_outputs
    assert (output.model_id, output.step) == (report.model, 2)

    folder = Path(model.artifact_location.removeprefix("file://"))
    assert {"MLmodel", "encoder.py", "artifacts/encoder.safetensors", "artifacts/config.json"} <= files_of(folder)
    assert not any(name.endswith((".pkl", ".pickle", ".pt", ".pth")) for name in files_of(folder))
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    script = f"""
        import pipeline.vit  # for timm alone, beside a torch without CUDA
        import mlflow, numpy as np
        model = mlflow.pyfunc.load_model({str(folder)!r})
        (given,), (got,) = model.metadata.signature.inputs.inputs, model.metadata.signature.outputs.inputs
        print(given.type, given.shape, got.type, got.shape)
        np.save({str(tmp_path / "features.npy")!r}, model.predict(np.load({str(tmp_path / "images.npy")!r})))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True,
                          text=True, cwd=tmp_path, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "uint8 (-1, 3, 32, 32) float32 (-1, 96)"
    encoder = restore(trained).method.encoder.eval()
    with torch.no_grad():
        tokens = encoder.forward_features(normalise(torch.from_numpy(images)))[:, encoder.num_prefix_tokens :]
    assert np.abs(np.load(tmp_path / "features.npy") - tokens.mean(1).numpy()).max() < 1e-5

    other = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'other.db')}"
    again = MlflowClient(other).get_logged_model(str(sync(trained, other, weights="model").model))
    assert (again.name, again.params, again.tags["patchmill.weights"]) == (
        model.name, model.params, model.tags["patchmill.weights"])  # fmt: skip


def test_a_model_that_was_cut_off_is_made_again(trained: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Remote, "fill_model", lambda *_: (_ for _ in ()).throw(ConnectionError("cut off")))
        with pytest.raises(UserError, match="cut off"):
            sync(trained, uri, weights="model")
    report = sync(trained, uri, weights="model")
    client = MlflowClient(uri)
    models = client.search_logged_models([the_run(uri).info.experiment_id])
    assert [(model.model_id, model.status) for model in models] == [(report.model, "READY")]


def test_weights_that_are_not_there(trained: Path, uri: str) -> None:
    with pytest.raises(UserError, match="keeps no average of its weights"):
        sync(trained, uri, weights="ema")
    shutil.rmtree(trained / "checkpoints")
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        sync(trained, uri, weights="model")
    assert json.loads((trained / "mlflow.json").read_text())["run_id"]  # the log is there all the same


def test_equal_weights_of_two_runs_are_a_model_each(trained: Path, uri: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.yaml", LOG):
        shutil.copy(trained / name, other / name)
    one, two = sync(trained, uri, weights="untrained"), sync(other, uri, weights="untrained")
    assert one.run_id != two.run_id and one.model != two.model
