"""One process of an evaluation: what is evaluated, on which images, with which other processes."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from pipeline.check import require_same_classes
from pipeline.config import Config, UserError, flatten, load_config
from pipeline.data import Loader
from pipeline.engine.torch import build_mesh
from pipeline.evaluate.features import Features, cached, extract, pixels
from pipeline.evaluate.subset import label_subset
from pipeline.keys import Int64
from pipeline.launch import World, connect
from pipeline.runs import Restored, open_images, read_config, restore
from pipeline.vit import VisionTransformer

Which = Literal["train", "val"]
SPEED = ("eval.batch_size", "data.threads", "data.jit", "data.stage_in")  # how fast an evaluation is, not what it finds
FREE = ("eval.", "data.", "engine.")  # what an evaluation may set; the rest is what was trained


def evaluation_config(run_dir: Path, settings: Sequence[str] = ()) -> Config:
    """A run's configuration as ``settings`` (files, shipped names, key=value) change it for an evaluation.

    Each process has the whole encoder, whatever engine the run was trained with, unless ``settings`` name one. Raises
    UserError for a folder that is not a run and for a setting of what was trained.
    """
    own = read_config(run_dir)
    overrides = [text for text in settings if "=" in text]
    files = [text for text in settings if "=" not in text]
    plain = {"name": "ddp", "precision": "fp32", "zero_stage": None, "shard_size": None, "offload": "none",
             "offload_params": False, "offload_dir": None, "backend": "auto"}  # fmt: skip
    base = own.model_copy(update={"engine": own.engine.model_copy(update=plain)})
    cfg = load_config([*files], overrides, base.model_dump(mode="json"))
    before, after = flatten(own.model_dump(mode="json")), flatten(cfg.model_dump(mode="json"))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and (key == "data.image_size" or not key.startswith(FREE)):
            raise UserError(f"{key} = {after.get(key)}: was {before.get(key)} when {run_dir} was trained; an evaluation may set "
                            "eval.*, data.* but for data.image_size, and engine.*")  # fmt: skip
    return cfg


def place(encoder: VisionTransformer, cfg: Config, world: World, device: torch.device) -> VisionTransformer:
    """The frozen encoder on a process's device: all of it, or under fsdp2 and hsdp its part of each block."""
    encoder.requires_grad_(False)
    if world.size == 1 or cfg.engine.name not in ("fsdp2", "hsdp"):
        return encoder.to(device)
    mesh = build_mesh(cfg, device)
    for block in encoder.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(encoder, mesh=mesh)
    register_fsdp_forward_method(encoder, "forward_intermediates")
    return encoder


@dataclass(frozen=True)
class Session:
    """A run's ``weights`` (model, ema, untrained, or pixels: no encoder) in this process, under an evaluation's ``cfg``."""

    run_dir: Path
    cfg: Config
    world: World
    device: torch.device
    weights: str
    restored: Restored | None

    @property
    def encoder(self) -> VisionTransformer:
        """The encoder where ``place`` has put it. Raises UserError for pixels."""
        if self.restored is None:
            raise UserError(f"weights = {self.weights}: this probe needs an encoder; take kNN or linear heads")
        return self.restored.method.encoder

    @property
    def step(self) -> int:
        """The checkpoint's, 0 for untrained weights and pixels."""
        return self.restored.step if self.restored else 0

    def changed(self) -> dict[str, Any]:
        """The settings in which this evaluation differs from the run and that its result may depend on."""
        own, here = (flatten(cfg.model_dump(mode="json")) for cfg in (read_config(self.run_dir), self.cfg))
        return {key: value for key, value in here.items()
                if key.startswith(("eval.", "data.")) and key not in SPEED and value != own[key]}  # fmt: skip

    @contextmanager
    def images(self, which: Which, *, augment: bool = False) -> Iterator[Loader]:
        """Images as an evaluation cuts them: the centre, or crops of ``eval.crop_scale``. Raises UserError for an empty set."""
        cfg = self.cfg.model_copy(
            update={"data": self.cfg.data.model_copy(update={"crop_scale": self.cfg.eval.crop_scale})}
        )
        with self.world.together():
            loader = open_images(cfg, which, augment=augment)
            if not loader.num_samples:
                raise UserError(f"data.{which}: holds no image; a probe needs some")
        with contextlib.closing(loader):
            yield loader

    def ids(self, which: Which, loader: Loader) -> Int64:
        """The images that are used: all of val, ``eval.label_fraction`` of train."""
        if which == "val":
            return np.arange(loader.num_samples)
        return label_subset(loader.labels(), self.cfg.eval.label_fraction, self.cfg.eval.label_seed)

    def key(self, which: Which, loader: Loader) -> dict[str, str]:
        """What the features of a set depend on."""
        data, evaluation = self.cfg.data, self.cfg.eval
        labels = f"{evaluation.label_fraction} {evaluation.label_seed}" if self.takes_part(which) else "all"
        return {"weights": self.restored.identity if self.restored else "pixels", "image_set": loader.image_set,
                "pixels": f"{data.eval_crop} {data.loader} {data.decode} {data.resample}",
                "precision": evaluation.precision, "labels": labels}  # fmt: skip

    def takes_part(self, which: Which) -> bool:
        """Whether only a part of a set is used."""
        return which == "train" and self.cfg.eval.label_fraction < 1

    def features(self, which: Which) -> Features:
        """The features of a set on the main process, kept in the run folder; all ranks call it."""
        size, device, world = self.cfg.eval.batch_size, self.device, self.world
        with self.images(which) as loader:
            with world.together():
                ids = self.ids(which, loader)
            if self.restored is None:
                return pixels(loader, batch_size=size, device=device, world=world, ids=ids)
            part = f"-{self.cfg.eval.label_fraction:g}" if self.takes_part(which) else ""
            path = self.run_dir / "features" / f"{self.weights}-{which}{part}.safetensors"
            return cached(path, self.key(which, loader), lambda: extract(
                self.encoder, loader, batch_size=size, device=device, world=world, ids=ids,
                precision=self.cfg.eval.precision, title=f"features of data.{which}"), world=world)  # fmt: skip


@contextmanager
def open_session(run_dir: Path, settings: Sequence[str] = (), weights: str = "model") -> Iterator[Session]:
    """This process's session, connected to the others of torchrun, srun or --nproc. Raises UserError."""
    run_dir = Path(run_dir).resolve()
    cfg = evaluation_config(run_dir, settings)
    with connect(cfg, trains=False) as (world, device):
        with world.together():
            require_same_classes(cfg)
            session = start(run_dir, cfg, world, device, weights)
        yield session


def start(run_dir: Path, cfg: Config, world: World, device: torch.device, weights: str) -> Session:
    """A session among processes that are connected."""
    restored = None if weights == "pixels" else restore(run_dir, weights)
    if restored is not None:
        place(restored.method.encoder, cfg, world, device)
    return Session(run_dir, cfg, world, device, weights, restored)
