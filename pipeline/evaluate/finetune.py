"""The weights that fine-tuning starts from, and the labels that it needs."""

import hashlib
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor

from pipeline import checkpoint
from pipeline.check import require_same_classes
from pipeline.config import Config, UserError
from pipeline.data import Loader
from pipeline.engine import Engine
from pipeline.eval_settings import FinetuneConfig

NEW: Final = ("pos_embed", "fc_norm.", "head.")  # what is not taken over: positions are made for this size of image


def choose_source(run_dir: Path) -> Path:
    """The newest whole checkpoint of the run that fine-tuning starts from. Raises UserError where there is none."""
    try:
        path = checkpoint.choose(run_dir / "checkpoints")
    except UserError as error:
        raise UserError(f"method.init = {run_dir}: cannot be started from: {error}") from None
    if path is None:
        raise UserError(f"method.init = {run_dir}: holds no checkpoint; train it first, or leave method.init out")
    return path


def start_from(engine: Engine, path: Path, weights: str) -> dict[str, Any]:
    """Fill the encoder, and its average, from a checkpoint that was chosen; what the log is to say of it.

    Every process reads its own part. Raises UserError for one without such ``weights``, or of another shape.
    """
    run_dir = path.parent.parent
    prefix, state = "model.encoder." if weights == "model" else "ema.encoder.", engine.state()
    own = {
        name.removeprefix("model.encoder."): tensor
        for name, tensor in state.items()
        if name.startswith("model.encoder.")
    }
    taken = {name: tensor for name, tensor in own.items() if not name.startswith(NEW)}
    try:
        checkpoint.load(path, {prefix + name: tensor for name, tensor in taken.items()})
    except checkpoint.CheckpointError as error:
        raise UserError(
            f"method.init = {run_dir}: its {weights} weights are not those of this encoder: {error}"
        ) from None
    for name, tensor in own.items():
        if (average := state.get(f"ema.encoder.{name}")) is not None:
            _own_part(average).copy_(_own_part(tensor))
    engine.load(state)
    seal = hashlib.sha256((path / checkpoint.SEAL).read_bytes()).hexdigest()
    return {
        "init": str(run_dir),
        "init_weights": weights,
        "init_step": checkpoint.read_state(path)["step"],
        "init_seal": seal,
    }


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def require_labels(cfg: Config, loader: Loader) -> None:
    """Raises UserError unless training and validation images have the classifier's classes."""
    if not isinstance(cfg.method, FinetuneConfig):
        return
    if cfg.method.num_classes != loader.num_classes:
        raise UserError(
            f"method.num_classes = {cfg.method.num_classes}: the images of data.train have {loader.num_classes} classes"
        )
    require_same_classes(cfg)
