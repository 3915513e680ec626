"""Fine-tuning of a run's encoder: the configuration that it makes, and the weights that it starts from."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor

from pipeline import checkpoint
from pipeline.check import dataset_size, num_classes
from pipeline.config import Config, UserError, load_config
from pipeline.engine import Engine
from pipeline.eval_settings import FinetuneConfig
from pipeline.runs import read_config

PRESETS: Final = {"vit_l": "eval/finetune_vit_l", "vit_h": "eval/finetune_vit_l"} | dict.fromkeys(
    ("vit_s", "vit_b"), "eval/finetune_vit_b") | dict.fromkeys(("vit_p", "vit_t"), "eval/finetune_small")  # fmt: skip
NEW: Final = ("pos_embed", "fc_norm.", "head.")  # what is not taken over: positions are made for this size of image


def finetune_config(run_dir: Path, settings: Sequence[str], weights: str) -> Config:
    """The configuration that fine-tunes a run's encoder on the run's images: a preset by its size, then ``settings``.

    ``settings`` are files, shipped names or key=value; with a file or a name the preset is left out. The run's own folder is
    ``finetune`` in that of the pretraining. Raises UserError for a folder that is no run of a pretraining, and ConfigError.
    """
    source = read_config(run_dir)
    if isinstance(source.method, FinetuneConfig):
        raise UserError(f"{run_dir}: is a fine-tuned classifier; give the run of the pretraining, {source.method.init}")
    defaults: dict[str, Any] = {
        "run": {"dir": str(run_dir / "finetune")},
        "method": {"init": str(run_dir), "init_weights": weights, "position_grid": source.grid,
                   "class_token": source.method.name != "randsac"},
        "data": source.data.model_dump(mode="json"), "tracking": source.tracking.model_dump(mode="json"),
        "train": {"seed": source.train.seed},
    }  # fmt: skip
    # What no recipe can know; what the user says goes before it.
    own = [f"model.name={source.model.name}", f"model.patch_size={source.shape.patch_size}",
           f"data.image_size={source.data.image_size}"]  # fmt: skip
    files, changes = [s for s in settings if "=" not in s], [s for s in settings if "=" in s]
    files = files or [PRESETS[source.model.name]]
    cfg = load_config(files, [*own, *changes], defaults)
    own.append(f"method.num_classes={num_classes(cfg)}")
    images = dataset_size(cfg)
    if cfg.eval.loss_every is None and images and images >= cfg.train.global_batch:
        own.append(f"eval.loss_every={images // cfg.train.global_batch}")  # once an epoch
    return load_config(files, [*own, *changes], defaults)


def start_from(engine: Engine, run_dir: Path, weights: str) -> dict[str, Any]:
    """Fill the encoder, and its average, from a run's newest whole checkpoint; what the log is to say of it.

    Every process reads its own part. Raises UserError for a run without a checkpoint, without such ``weights``, or of another
    shape.
    """
    path = checkpoint.choose(run_dir / "checkpoints")
    if path is None:
        raise UserError(f"method.init = {run_dir}: holds no checkpoint; train it first, or leave method.init out")
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


def require_labels(cfg: Config, num_classes: int) -> None:
    """Raises UserError unless the images have as many classes as the classifier."""
    if cfg.method.name == "finetune" and cfg.method.num_classes != num_classes:
        raise UserError(
            f"method.num_classes = {cfg.method.num_classes}: the images of data.train have {num_classes} classes"
        )
