"""A run's folder: who may write to it, what it holds, and how its trained method comes back."""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipeline import checkpoint
from pipeline.config import Config, UserError, binding_differences, load_config
from pipeline.data import Loader, decode_threads, open_loader
from pipeline.eval_settings import FinetuneConfig
from pipeline.methods import build_method
from pipeline.methods.common import Method
from pipeline.metrics import Progress
from pipeline.runlog import LOG

log = logging.getLogger("patchmill")

CONFIG = "config.yaml"
WHY = "why_stopped.json"
LOOKS = 5  # for a checkpoint that stays while we read it


def read_config(run_dir: Path) -> Config:
    """The resolved configuration of a run. Raises UserError when the folder is not a run."""
    if not (run_dir / CONFIG).is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no {CONFIG}; give the run.dir of `patchmill train`")
    return load_config([run_dir / CONFIG])


@contextmanager
def open_run(cfg: Config) -> Iterator[Path]:
    """The run folder (mode 0700), locked for this process, holding the resolved configuration.

    Raises UserError when another process trains here, when the folder holds a run of another configuration (the
    difference is printed), or when ``run.resume`` forbids what would happen.
    """
    folder = Path(cfg.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"run.dir = {folder}: cannot be written ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"run.dir = {folder}: another process is training there") from None
        try:
            _admit(cfg, folder)
        except OSError as error:
            raise UserError(f"run.dir = {folder}: cannot be written ({error.strerror})") from None
        yield folder


def _admit(cfg: Config, folder: Path) -> None:
    # A start that was refused (no data, say) leaves a configuration but no log: nothing that could be lost.
    begun = (folder / LOG).is_file() or checkpoint.candidates(folder / "checkpoints")
    exists = (folder / CONFIG).is_file() and bool(begun)
    if exists and cfg.run.resume == "never":
        raise UserError(f"run.dir = {folder}: holds a run already and run.resume = never; choose another folder")
    if cfg.run.resume == "must" and not checkpoint.candidates(folder / "checkpoints"):
        raise UserError(f"run.dir = {folder}: holds no checkpoint and run.resume = must")
    if exists:
        differences = binding_differences(read_config(folder), cfg)
        if differences:
            raise UserError(f"run.dir = {folder}: holds a run of another configuration; choose another folder or put back "
                            + "; ".join(differences))  # fmt: skip
    temporary = folder / f".{CONFIG}.partial"
    temporary.write_text(cfg.to_yaml())
    temporary.rename(folder / CONFIG)


def is_training(folder: Path) -> bool:
    """Whether a process trains in a run folder now."""
    try:
        with (folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def write_why(folder: Path, *, done: bool, reason: str, step: int, restarts: int) -> None:
    """Record why the process ended, atomically: what dependents look at."""
    temporary = folder / f".{WHY}.partial"
    temporary.write_text(json.dumps({"done": done, "reason": reason, "step": step, "restarts": restarts}) + "\n")
    os.replace(temporary, folder / WHY)


def _staged(path: str | None, folder: str | None) -> str | Path | None:
    """The beton's copy on this host's disk where ``data.stage_in`` asks for one."""
    if folder is None or path is None:
        return path
    from data_prep.stage import stage_in

    with Progress("stage in", None, "MiB") as progress:
        return stage_in(Path(path), Path(folder), progress.update)


def open_images(cfg: Config, which: Literal["train", "val"], *, augment: bool) -> Loader:
    """The loader of a run's training or validation images. Raises UserError when they are not set or broken.

    The synthetic loader has one set: its validation images are the training ones, cut from the centre.
    """
    data = cfg.data
    path = data.train if which == "train" else data.val
    if path is None and data.loader != "synthetic":
        raise UserError(f"data.{which}: is required here and not set; add data.{which}=PATH")
    steps = cfg.train.steps
    return open_loader(
        data.loader, _staged(path, data.stage_in), image_size=data.image_size, seed=cfg.train.seed, augment=augment,
        crop_scale=data.crop_scale, flip=data.flip, eval_crop=data.eval_crop, decode=data.decode, resample=data.resample,
        threads=decode_threads(data.threads)[0], jit=data.jit if augment or data.jit != "auto" else "off",
        num_samples=data.num_samples, num_classes=data.num_classes,
        expected_images=steps * cfg.train.global_batch if steps else None,
    )  # fmt: skip


def open_training(cfg: Config) -> Loader:
    """What is trained on: the training images in random crops; for fine-tuning augmented further, and a share of them."""
    loader, method, evaluation = open_images(cfg, "train", augment=True), cfg.method, cfg.eval
    if not isinstance(method, FinetuneConfig):
        return loader
    from pipeline.augment import build_policy
    from pipeline.evaluate.subset import label_subset

    loader.policy = build_policy(method, cfg.data.image_size)
    if evaluation.label_fraction < 1:
        ids = label_subset(loader.labels(), evaluation.label_fraction, evaluation.label_seed)
        loader.keep_only(ids, f"label_fraction {evaluation.label_fraction} label_seed {evaluation.label_seed}")
    return loader


def spread(num_samples: int, number: int) -> npt.NDArray[np.int64]:
    """Ids of at most ``number`` of a set's images, evenly over it: files lie class by class, so they show several classes."""
    return np.linspace(0, num_samples - 1, min(number, num_samples)).round().astype(np.int64)


@dataclass(frozen=True)
class Restored:
    """A run's method on the CPU in fp32, its teacher if it has one, the step, and a hash that names these weights.

    ``state``: what the checkpoint says besides; empty where there is none.
    """

    cfg: Config
    method: Method
    teacher: nn.Module | None
    step: int
    identity: str
    state: Mapping[str, Any] = field(default_factory=dict)


def restore(run_dir: Path, weights: str = "model") -> Restored:
    """The method of a run's newest whole checkpoint, under the run's own configuration.

    ``weights``: model (the trained encoder), ema (the teacher's average in its place) or untrained (step 0).
    Raises UserError when there is no checkpoint, none that holds all of its tensors in their shapes, or no average.
    """
    cfg = read_config(run_dir)
    method = build_method(cfg)
    if weights == "untrained":
        return Restored(cfg, method, None, 0, f"seed {cfg.train.seed}")
    tensors = {f"model.{name}": parameter.detach() for name, parameter in method.named_parameters()}
    own, twin = dict(method.encoder.named_parameters()), method.build_teacher()
    teacher = twin.to_empty(device="cpu") if twin is not None else None
    if teacher is not None:
        tensors |= {f"ema.encoder.{n}": p.detach() for n, p in teacher.named_parameters() if own[n].requires_grad}
    elif weights == "ema":
        raise UserError(f"{run_dir}: {cfg.method.name} keeps no average of its weights; use the model's")
    identity, state = _filled(run_dir, tensors)
    if teacher is not None:
        with torch.no_grad():
            for name, parameter in teacher.named_parameters():
                if not own[name].requires_grad:
                    parameter.copy_(own[name])
                elif weights == "ema":
                    own[name].copy_(parameter)
    return Restored(cfg, method, teacher, int(state["step"]), f"{weights} {identity}", state)


def _filled(run_dir: Path, tensors: dict[str, torch.Tensor]) -> tuple[str, Mapping[str, Any]]:
    """Fill ``tensors`` from the newest whole checkpoint; its seal's hash and its state. Raises UserError.

    A run that trains meanwhile removes old checkpoints: one that went away under us is none, and we look again.
    """
    folder, looks = run_dir / "checkpoints", LOOKS
    while True:
        there = checkpoint.candidates(folder)
        try:
            path = checkpoint.choose(folder)
            if path is None:
                raise UserError(
                    f"{run_dir} holds no checkpoint yet; train it first: patchmill train {run_dir / CONFIG}"
                )
            checkpoint.load(path, tensors)
            return hashlib.sha256((path / checkpoint.SEAL).read_bytes()).hexdigest(), checkpoint.read_state(path)
        except (checkpoint.CheckpointError, UserError, OSError) as error:
            looks -= 1
            if not looks or checkpoint.candidates(folder) == there:
                raise UserError(str(error)) from None
