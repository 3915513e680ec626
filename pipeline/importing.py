"""Weights of other programs as a run: all that evaluates, draws and exports runs takes them then as any other's."""

import argparse
import hashlib
import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import torch
from torch import Tensor

from pipeline import checkpoint
from pipeline.config import Config, UserError
from pipeline.costs import MODELS
from pipeline.methods import build_method
from pipeline.methods.mae import MAE, PUBLIC_DECODER, load_public
from pipeline.runlog import LOG, add_line
from pipeline.runs import open_run

PROGRAM: Final = "facebookresearch/mae"
SAME: Final = 1e-5  # positions that differ by less are ours: sines rounded elsewhere


@dataclass(frozen=True)
class ImportReport:
    """The run that was made, of which file, and what to know about it."""

    run: Path
    file: Path
    sha256: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Lines for people."""
        return "\n".join(
            [f"{self.run}: a run of the weights in {self.file} (sha256 {self.sha256[:12]}...)", *self.notes]
        )


def _read(file: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint. Raises UserError for what is missing, damaged, holds code, or is no such checkpoint."""
    if not file.is_file():
        raise UserError(f"{file}: there is no such file")
    damaged = UserError(f"{file}: is damaged, or no checkpoint of PyTorch (nothing in it was run); get it again")
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if archive.testzip():  # torch.load takes tensors whose checksum is wrong
                    raise damaged
        # Their training keeps its arguments beside the weights: a plain object, of which no code is run.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of other formats of pickles
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged file may raise anything
        code = re.search(r"nsupported (?:global: )?GLOBAL ([\w.]+)", str(error))
        if code:
            raise UserError(f"{file}: refused, nothing was run: it holds more than tensors ({code[1]}); where you trust it, save "
                            "its entry 'model' alone") from None  # fmt: skip
        raise damaged from None
    weights = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{file}: no checkpoint of {PROGRAM}: it has no weights in an entry 'model'")
    for name, value in weights.items():
        dense = value.layout == torch.strided and not value.is_meta and not value.is_quantized
        if not isinstance(name, str) or not dense or not value.is_floating_point() or not value.isfinite().all():
            raise UserError(f"{file}: no checkpoint of {PROGRAM}: {name} is no tensor of finite floats")
    return weights


def _looks_like(weights: Mapping[str, Tensor]) -> str:
    """The encoder's size as its tensors tell it."""
    patch, positions = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    if patch is None or positions is None or patch.dim() != 4 or positions.dim() != 3:
        return "another kind of model"
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    width, side = len(patch), patch.shape[-1]
    known = [name for name, shape in MODELS.items() if (shape.width, shape.depth) == (width, depth)]
    name = known[0] if known else f"an encoder of {depth} blocks, {width} wide"
    return f"{name}, patches of {side} px, images of {math.isqrt(max(0, positions.shape[1] - 1)) * side} px"


def _positions(method: MAE, ours: Mapping[str, Tensor]) -> list[str]:
    """Notes on positions in the file that are not the sines and cosines that this program would have taken."""
    parameters = dict(method.named_parameters())
    off = {name: float((parameters[name] - value).abs().max()) for name, value in ours.items()}
    return [f"{name}: differs from fixed sines and cosines by up to {by:.2g}; taken as it is in the file"
            for name, by in off.items() if not by <= SAME]  # fmt: skip


def _filled(file: Path, cfg: Config) -> tuple[MAE, list[str]]:
    """The method with the file's weights, and notes. Raises UserError for a file that does not fit the configuration."""
    weights = _read(file)
    label = next((name for name in weights if name.startswith(("head.", "fc_norm."))), None)
    if label:
        raise UserError(
            f"{file}: is a classifier that was fine-tuned or probed (it has {label}); give the pretraining checkpoint"
        )
    method = cast(MAE, build_method(cfg))
    ours = {name: value.clone() for name, value in method.named_parameters() if name.endswith("pos_embed")}
    decoder = any(name.partition(".")[0] in PUBLIC_DECODER for name in weights)
    try:
        load_public(method, weights, encoder_only=not decoder)
    except ValueError as error:
        first, *others = str(error).split("; ")
        more = f" (and {len(others)} more)" if others else ""
        own = f"{cfg.model.name}, patches of {cfg.shape.patch_size} px, images of {cfg.data.image_size} px"
        raise UserError(f"{file}: does not fit the configuration: {first}{more}; the file: {_looks_like(weights)}; the "
                        f"configuration: {own}; change model.*, data.image_size or method.decoder_*") from None  # fmt: skip
    notes = _positions(method, ours)
    if not decoder:
        notes.append(
            "the file has no decoder: it stays at its first weights, and what `visualize` shows of it means nothing"
        )
    return method, notes


def import_mae(file: Path, cfg: Config) -> ImportReport:
    """Make the run ``cfg.run.dir`` of a pretraining checkpoint of facebookresearch/mae, as if saved at step 0.

    Nothing in the file is run. Raises UserError when the file is missing, damaged, holds code, is no such checkpoint or
    does not fit the configuration, and when the folder holds a run.
    """
    folder = Path(cfg.run.dir)
    if cfg.method.name != "mae":
        raise UserError(
            f"method.name = {cfg.method.name}: weights of {PROGRAM} are mae's; start from imagenet/mae_vit_b or its like"
        )
    if checkpoint.candidates(folder / "checkpoints") or (folder / LOG).exists():
        rest = "" if (folder / LOG).exists() else ", without a log: an import that was cut off? Then remove the folder"
        raise UserError(f"run.dir = {folder}: holds a run already{rest}; import into another folder")
    method, notes = _filled(file, cfg)
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    imported = {"program": PROGRAM, "file": file.name, "sha256": sha256, "notes": notes}
    tensors = {f"model.{name}": parameter.detach() for name, parameter in method.named_parameters()}
    with open_run(cfg):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
                checkpoint.save(folder / "checkpoints", 0, tensors,
                                {"imported": imported, "config": cfg.model_dump(mode="json")})  # fmt: skip
        except checkpoint.CheckpointError as error:
            raise UserError(str(error)) from None
        add_line(folder / LOG, "import", step=0, **imported)
    return ImportReport(folder, file, sha256, tuple(notes))
