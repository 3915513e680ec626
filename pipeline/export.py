"""The encoder for other programs: safetensors under timm's parameter names, alone or as a folder for timm's hub loader."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.card import model_card
from pipeline.config import Config, UserError
from pipeline.runs import restore
from pipeline.tensors import save_tensors
from pipeline.vit import IMAGE_MEAN, IMAGE_STD, encoder_kwargs, timm

SUFFIX: Final = ".safetensors"
# Pillow's name for the filter that is nearest to each of ours.
INTERPOLATION: Final = {"area": "box", "bicubic": "bicubic"}


@dataclass(frozen=True)
class ExportReport:
    """Where the weights are and the call of ``timm.create_model`` that takes them."""

    path: Path
    name: str
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        """Python that loads the file or the folder."""
        if self.path.suffix != SUFFIX:
            return (f"wrote {self.path}; load it with\n"
                    f"  model = timm.create_model({f'local-dir:{self.path}'!r}, pretrained=True)")  # fmt: skip
        arguments = "".join(f", {key}={value!r}" for key, value in self.kwargs.items())
        return (f"wrote {self.path}; load it with\n"
                f"  model = timm.create_model({self.name!r}{arguments})\n"
                f"  model.load_state_dict(safetensors.torch.load_file({str(self.path)!r}), strict=True)")  # fmt: skip


def _timms(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The model that ``timm.create_model(name, ...)`` builds, without weights, and with nothing said of timm's own ones."""
    # timm's entry for the name tells the tag and the licence of weights that these are not.
    own = {"architecture": name, "first_conv": "patch_embed.proj", "classifier": "head"}
    with torch.device("meta"):
        return timm.create_model(name, pretrained_cfg=own, **kwargs)


def require_whole(tensors: Mapping[str, Tensor], name: str, kwargs: Mapping[str, Any]) -> None:
    """Raises UserError unless these are the tensors of the model that ``timm.create_model(name, ...)`` builds, each whole.

    Of weights that lie in parts a process may hold an empty stand-in under the right name: no such thing is ever written.
    """
    expected = _timms(name, kwargs).state_dict()
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in expected or key not in tensors:
            raise UserError(f"{key}: is {'missing' if key in expected else 'no tensor of ' + name}; nothing is written")
        found, shape = list(tensors[key].shape), list(expected[key].shape)
        if found != shape:
            raise UserError(f"{key}: has the shape {found} instead of {shape}; nothing is written")


def _require_place(out: Path) -> None:
    """Raises UserError for a name of another kind of file, and for a folder that holds something."""
    if out.suffix in (".pt", ".pth", ".bin", ".onnx"):
        raise UserError(f"{out}: only safetensors are written; name a file that ends in {SUFFIX}, or a folder")
    if out.suffix == SUFFIX:
        wrong = "is a folder" if out.is_dir() else None
    elif out.exists() and not out.is_dir():
        wrong = "is a file"
    else:
        wrong = "is not empty" if out.is_dir() and any(out.iterdir()) else None
    if wrong:
        raise UserError(f"{out}: {wrong}; name a file that ends in {SUFFIX}, or a new folder")


def _write_config(path: Path, cfg: Config, name: str, kwargs: Mapping[str, Any]) -> None:
    """timm's ``config.json``: how the model is built and how images must come to it."""
    from timm.models._hub import save_config_for_hf

    size = cfg.data.image_size
    images = {"input_size": (3, size, size), "mean": IMAGE_MEAN, "std": IMAGE_STD, "crop_pct": cfg.data.eval_crop,
              "interpolation": INTERPOLATION[cfg.data.resample]}  # fmt: skip
    save_config_for_hf(_timms(name, kwargs), str(path), data_config=images)


def export(run_dir: Path, out: Path, weights: str = "model") -> ExportReport:
    """Write the encoder of a run's newest checkpoint to a .safetensors file, or to a folder as timm's hub loader takes it.

    The folder gets ``model.safetensors``, timm's ``config.json`` and a model card, ``README.md``. Raises UserError as
    ``pipeline.runs.restore``, or for ``out``.
    """
    _require_place(out)
    run_dir = Path(run_dir).resolve()
    restored = restore(run_dir, weights)
    cfg, encoder = restored.cfg, restored.method.encoder
    name = cfg.shape.timm_name
    kwargs = encoder_kwargs(cfg.shape, cfg.data.image_size, class_token=encoder.has_class_token,
                            num_classes=encoder.num_classes)  # fmt: skip
    metadata = {"method": cfg.method.name, "step": str(restored.step), "weights": weights, "timm_model": name}
    tensors = {key: value.contiguous() for key, value in encoder.state_dict().items()}
    require_whole(tensors, name, kwargs)
    card = None if out.suffix == SUFFIX else model_card(run_dir, restored, weights)
    partial = out.with_name(f".{out.name}.partial")  # what is cut off must not stand in the way of the next try
    try:
        if card is None:
            out.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, out, metadata)
        else:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_tensors(tensors, partial / "model.safetensors", metadata)
            _write_config(partial / "config.json", cfg, name, kwargs)
            (partial / "README.md").write_text(card)
            partial.rename(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{out}: cannot be written: {error}") from None
    return ExportReport(out, name, kwargs)
