"""An encoder as a model in MLflow: timm's weights, the call that builds them and a signature; nothing pickled.

MLflow loads it anywhere with torch, timm and safetensors (``mlflow.pyfunc.load_model("models:/ID")``): uint8 images
[B, 3, S, S] in, float32 features [B, D] out, the mean of the patch tokens after the final norm, as the probes see them.
It takes what the weights take (1.2 GB for ViT-L, three times that in TMPDIR on the way), so it is sent when it is asked
for, and once.
"""

import json
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from pipeline.mlflow_run import Remote, points_of
from pipeline.runlog import LOG, read_log

CONTENT_TAG: Final = "patchmill.weights"  # what names the weights of a checkpoint: the same are there once
CODE: Final = '''\
"""Features of images by a timm encoder; the weights and the call that builds it lie beside this file."""

import json

import mlflow
import timm
import torch
from safetensors.torch import load_file

MEAN, STD = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class Encoder(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        with open(context.artifacts["config"]) as file:
            config = json.load(file)
        self.model = timm.create_model(config["name"], **config["kwargs"]).eval()
        self.model.load_state_dict(load_file(context.artifacts["weights"]), strict=True)

    def predict(self, context, model_input, params=None):
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        with torch.inference_mode():
            tokens = self.model.forward_features((torch.tensor(model_input).float() / 255 - mean) / std)
            return tokens[:, self.model.num_prefix_tokens :].mean(1).numpy()


mlflow.models.set_model(Encoder())
'''


def send_model(remote: Remote, run_dir: Path, weights: str) -> str:
    """Log the encoder of the run's newest checkpoint under its run, unless it is there; its id.

    ``weights`` as for ``pipeline.runs.restore``, whose errors it raises, and what MLflow raises.
    """
    from pipeline.export import export
    from pipeline.runs import restore

    restored = restore(run_dir, weights)
    step, identity = restored.step, restored.identity
    del restored  # the export reads it again
    there = remote.model_with(CONTENT_TAG, identity)
    if there is not None:
        return there
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = export(run_dir, folder / "encoder.safetensors", weights)
        facts = {"weights": weights, "step": step, "timm.name": report.name,
                 **{f"timm.{key}": value for key, value in report.kwargs.items()}}  # fmt: skip
        model_id = remote.make_model(f"encoder-{weights}-step{step}", {CONTENT_TAG: identity}, facts)
        # MLflow would like an example and type hints beside the signature; kept, as what it imports resets what is ignored.
        with warnings.catch_warnings(record=True):
            _write(folder, report, model_id)
        points = [point for record in read_log(run_dir / LOG) if record["kind"] == "eval" for point in points_of(record)
                  if point.step == step and point.key.endswith(f"_{weights}")]  # fmt: skip
        remote.fill_model(model_id, folder / "model", step, points)
        return model_id


def _write(folder: Path, report: Any, model_id: str) -> None:
    """MLflow's layout of the model in ``folder / "model"``. The code is a file: what MLflow is given as an object it pickles."""
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import Schema, TensorSpec

    size, width = report.kwargs["img_size"], report.kwargs["embed_dim"]
    images, features = (
        TensorSpec(np.dtype(np.uint8), (-1, 3, size, size)),
        TensorSpec(np.dtype(np.float32), (-1, width)),
    )
    code, config = folder / "encoder.py", folder / "config.json"
    code.write_text(CODE)
    config.write_text(json.dumps({"name": report.name, "kwargs": report.kwargs}))
    needed = [f"{name}=={version(name).split('+')[0]}" for name in ("mlflow", "torch", "timm", "safetensors")]
    save_model(folder / "model", python_model=str(code), artifacts={"weights": str(report.path), "config": str(config)},
               signature=ModelSignature(Schema([images]), Schema([features])), pip_requirements=needed,
               mlflow_model=Model(model_id=model_id))  # fmt: skip
