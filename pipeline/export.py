"""The encoder for other programs: safetensors under timm's parameter names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.config import UserError
from pipeline.runs import restore
from pipeline.tensors import save_tensors
from pipeline.vit import encoder_kwargs, timm


@dataclass(frozen=True)
class ExportReport:
    """Where the weights are and the call of ``timm.create_model`` that takes them."""

    path: Path
    name: str
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        """Python that loads the file."""
        arguments = "".join(f", {key}={value!r}" for key, value in self.kwargs.items())
        return (f"wrote {self.path}; load it with\n"
                f"  model = timm.create_model({self.name!r}{arguments})\n"
                f"  model.load_state_dict(safetensors.torch.load_file({str(self.path)!r}), strict=True)")  # fmt: skip


def require_whole(tensors: Mapping[str, Tensor], name: str, kwargs: Mapping[str, Any]) -> None:
    """Raises UserError unless these are the tensors of the model that ``timm.create_model(name, ...)`` builds, each whole.

    Of weights that lie in parts a process may hold an empty stand-in under the right name: no such thing is ever written.
    """
    with torch.device("meta"):
        expected = timm.create_model(name, **kwargs).state_dict()
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in expected or key not in tensors:
            raise UserError(f"{key}: is {'missing' if key in expected else 'no tensor of ' + name}; nothing is written")
        found, shape = list(tensors[key].shape), list(expected[key].shape)
        if found != shape:
            raise UserError(f"{key}: has the shape {found} instead of {shape}; nothing is written")


def export(run_dir: Path, out: Path, weights: str = "model") -> ExportReport:
    """Write the encoder of a run's newest checkpoint. Raises UserError as ``pipeline.runs.restore``, or for ``out``."""
    restored = restore(Path(run_dir).resolve(), weights)
    cfg, encoder = restored.cfg, restored.method.encoder
    kwargs = encoder_kwargs(cfg.shape, cfg.data.image_size, class_token=encoder.has_class_token)
    metadata = {
        "method": cfg.method.name,
        "step": str(restored.step),
        "weights": weights,
        "timm_model": cfg.shape.timm_name,
    }
    tensors = {name: value.contiguous() for name, value in encoder.state_dict().items()}
    require_whole(tensors, cfg.shape.timm_name, kwargs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, out, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    return ExportReport(out, cfg.shape.timm_name, kwargs)
