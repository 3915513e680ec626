"""Probes that are trained on augmented images: one loop for all of them, on any number of processes, that can be killed.

The encoder is frozen, so nothing flows back through the normalisation of its tokens: its statistics are plain sums over the
global batch, and any number of processes trains the same heads.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.config import RunFailed, UserError
from pipeline.data import Loader
from pipeline.eval_settings import AttentiveConfig, MAELinearConfig
from pipeline.evaluate.features import computing, evaluating, rounds
from pipeline.evaluate.session import Session
from pipeline.guard import Agreement
from pipeline.keys import Int64, hash_integers, text_key
from pipeline.launch import World
from pipeline.metrics import Progress
from pipeline.optim import lr_at
from pipeline.order import run_order, steps_per_epoch
from pipeline.stop import StopRequest
from pipeline.tensors import read_tensors, replace_tensors
from pipeline.vit import normalise

log = logging.getLogger("patchmill")

EPS: Final = 1e-6
MOMENTUM: Final = 0.1


class Stopped(Exception):  # noqa: N818  it says what happened
    """A signal has stopped a probe whose state is saved: the same command goes on."""


class TokenNorm(nn.Module):
    """BatchNorm without affine of frozen tokens [B, L, N, D]: statistics of each of L blocks and D channels, eps 1e-6.

    Those of a global batch in training, and running ones (momentum 0.1, unbiased variance) for evaluation, as torch's have it.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, num_blocks: int, width: int) -> None:
        """Running mean 0 and variance 1."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_blocks, width))
        self.register_buffer("var", torch.ones(num_blocks, width))

    def observe(self, parts: Sequence[Tensor], world: World) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [L, D] of this rank's ``parts`` and all other ranks'; moves the running ones.

        Raises UserError for tokens that are not finite, SystemExit on other ranks than the main one.
        """
        sums = torch.stack([torch.stack([part.double().sum((0, 2)) for part in parts]).sum(0),
                            torch.stack([part.double().square().sum((0, 2)) for part in parts]).sum(0)])  # fmt: skip
        if world.size > 1:
            dist.all_reduce(sums)
        count = world.size * sum(part.shape[0] * part.shape[2] for part in parts)
        mean = sums[0] / count
        var = (sums[1] / count - mean.square()).clamp(min=0)
        if not bool(sums.isfinite().all()):
            if not world.is_main:  # all know it
                raise SystemExit(2)
            raise UserError("the features of training images are not finite: the encoder's weights diverged; evaluate an earlier "
                            "checkpoint")  # fmt: skip
        self.mean.lerp_(mean.float(), MOMENTUM)
        self.var.lerp_((var * (count / max(1, count - 1))).float(), MOMENTUM)
        return mean.float(), var.float()

    @staticmethod
    def apply_to(tokens: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Normalised tokens [B, L, N, D]."""
        return (tokens - mean[:, None]) * (var[:, None] + EPS).rsqrt()


@dataclass(frozen=True)
class Schedule:
    """How long a probe is trained, in global batches of ``batch`` images, and its seed."""

    epochs: int
    warmup_epochs: int
    batch: int
    seed: int


@dataclass(frozen=True)
class Probe:
    """Heads that are trained at once, each on one of the L blocks that ``tokens`` gives, and their optimizer.

    ``tokens`` turns images into frozen tokens [B, L, N, D]; a head turns normalised ones [B, N, D] into logits [B, C]. The
    optimizer's groups have their peak rate in ``peak``. ``path`` and ``key``: where its state lies, and what it depends on.
    """

    tokens: Callable[[Tensor], Tensor]
    norm: TokenNorm
    heads: nn.ModuleDict
    block_of: Mapping[str, int]
    optimizer: torch.optim.Optimizer
    path: Path
    key: Mapping[str, object]

    def logits(self, tokens: Tensor, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
        """Each head's logits [B, C] for tokens [B, L, N, D]."""
        x = self.norm.apply_to(tokens, mean, var)
        return {name: head(x[:, self.block_of[name]]) for name, head in self.heads.items()}

    def named(self) -> dict[str, nn.Parameter]:
        """The parameters by name."""
        return dict(self.heads.named_parameters())

    def state(self) -> dict[str, Tensor]:
        """Weights, what the optimizer keeps of each, and the running statistics."""
        named = self.named()
        kept = {f"{kind} {name}": value for name, parameter in named.items()
                for kind, value in self.optimizer.state[parameter].items()}  # fmt: skip
        return {**named, **kept, "mean": self.norm.mean, "var": self.norm.var}

    def save(self, step: int) -> None:
        """Write the state whole or not at all. Raises RunFailed."""
        state = {name: value.detach() for name, value in self.state().items()}
        try:
            replace_tensors(state, self.path, {"key": json.dumps(self.key, sort_keys=True), "step": str(step)})
        except (OSError, SafetensorError) as error:
            raise RunFailed(f"{self.path}: cannot be written ({error}); the last one stays") from None

    def load(self, world: World) -> int:
        """Take up what the main process finds saved under this very key; the step it was saved at, 0 for nothing."""
        found = read_tensors(self.path) if world.is_main else None
        if found is not None and found[1].get("key") != json.dumps(self.key, sort_keys=True):
            log.warning("%s: is a probe of other weights, images or settings; it begins anew", self.path)
            found = None
        tensors, about = world.from_main(found) or ({}, {})
        with torch.no_grad():
            for name, parameter in self.named().items():
                if tensors:
                    parameter.copy_(tensors.pop(name))
            for name in [name for name in tensors if " " in name]:
                kind, owner = name.split(" ", 1)
                parameter = self.named()[owner]
                value = tensors.pop(name)
                self.optimizer.state[parameter][kind] = value if kind == "step" else value.to(parameter.device)
            for name, value in tensors.items():
                getattr(self.norm, name).copy_(value)
        return int(about.get("step", 0))


def _add_up(parameters: Sequence[nn.Parameter], world: World) -> None:
    """The sum of all ranks' gradients, in place: one reduction."""
    if world.size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _update(
    probe: Probe, images: Tensor, labels: Tensor, session: Session, batch: int, rates: Mapping[int, float]
) -> None:
    """One step on this rank's part of a global batch of ``batch`` images."""
    size, device = session.cfg.eval.batch_size, session.device
    with torch.no_grad():
        parts = [probe.tokens(some.to(device)) for some in images.split(size)]
    mean, var = probe.norm.observe(parts, session.world)
    for part, truth in zip(parts, labels.to(device).split(size), strict=True):
        losses = [F.cross_entropy(logits, truth, reduction="sum") for logits in probe.logits(part, mean, var).values()]
        (torch.stack(losses).sum() / batch).backward()
    _add_up(list(probe.heads.parameters()), session.world)
    for index, group in enumerate(probe.optimizer.param_groups):
        group["lr"] = rates[index]
    probe.optimizer.step()
    probe.optimizer.zero_grad()


def fit(probe: Probe, session: Session, schedule: Schedule, loader: Loader, ids: Int64) -> None:
    """Train a probe on the images ``ids`` of an augmenting loader, from where it was saved; saved once an epoch and on a signal.

    Raises Stopped on all ranks after a signal.
    """
    world, total_batch = session.world, schedule.batch
    per_epoch = steps_per_epoch(len(ids), total_batch)
    total, warmup = per_epoch * schedule.epochs, per_epoch * schedule.warmup_epochs
    share = total_batch // world.size
    step = probe.load(world)
    order = ((epoch, ids[places]) for epoch, places in run_order(schedule.seed, step, total, len(ids), total_batch))
    agreement, part = Agreement(world), slice(world.rank * share, (world.rank + 1) * share)
    peaks = [group["peak"] for group in probe.optimizer.param_groups]
    with Progress(f"train {probe.path.stem}", total, "step", shown=world.is_main) as progress, StopRequest() as stop, \
            loader.batches(order, session.device, part) as batches:  # fmt: skip
        progress.update(step)
        for batch in batches:
            rates = {index: lr_at(step, total, warmup, peak) for index, peak in enumerate(peaks)}
            _update(probe, batch.images, batch.labels, session, total_batch, rates)
            step += 1
            progress.update(step)
            stops = agreement(stop.requested is not None) and step < total
            if world.is_main and (stops or step % per_epoch == 0):
                probe.save(step)
            if stops:
                said = f"stopped at step {step} of {total} of the probe; the same command goes on"
                raise Stopped(said if world.is_main else "")  # all know it


def correct(probe: Probe, session: Session, loader: Loader, ids: Int64, title: str) -> dict[str, float]:
    """Top-1 accuracy in percent of each head on the images ``ids``, each seen once, by the running statistics; on all ranks."""
    world, device = session.world, session.device
    own, counted = rounds(ids, session.cfg.eval.batch_size, world)
    hits = torch.zeros(len(probe.heads), dtype=torch.int64, device=device)
    with Progress(title, len(ids), "image", shown=world.is_main) as progress, torch.no_grad(), \
            loader.batches(((0, some) for some in own), device) as batches:  # fmt: skip
        for number, batch in enumerate(batches):
            logits = probe.logits(probe.tokens(batch.images.to(device)), probe.norm.mean, probe.norm.var)
            if number < counted:
                truth = batch.labels.to(device)
                hits += torch.stack([(values.argmax(1) == truth).sum() for values in logits.values()])
            progress.update(min(len(ids), (number + 1) * world.size * session.cfg.eval.batch_size))
    if world.size > 1:
        dist.all_reduce(hits)
    return {name: 100 * count / len(ids) for name, count in zip(probe.heads, hits.tolist(), strict=True)}


def block_tokens(session: Session, blocks: Sequence[int], pooling: str = "none") -> Callable[[Tensor], Tensor]:
    """Of images uint8 [B, 3, H, W] the patch tokens after ``blocks`` (from 1), through the final norm: [B, L, N, D] in fp32.

    ``pooling``: their mean, or the class token in their place, [B, L, 1, D]. Raises UserError where there is no class token.
    """
    encoder = session.encoder
    if pooling == "cls" and not encoder.has_class_token:
        raise UserError(f"eval.pooling = cls: the encoder of {session.cfg.method.name} has no class token; take mean")

    def tokens(images: Tensor) -> Tensor:
        with evaluating(encoder), computing(session.device, session.cfg.eval.precision):
            found: Any = encoder.forward_intermediates(
                normalise(images), [block - 1 for block in blocks], norm=True, output_fmt="NLC",
                return_prefix_tokens=True, intermediates_only=True, output_dict=True,
            )  # fmt: skip
        if pooling == "cls":
            return torch.stack([prefix[:, :1] for prefix in found["image_intermediates_prefix"]], 1).float()
        each = torch.stack([tokens.float() for tokens in found["image_intermediates"]], 1)
        return each.mean(2, keepdim=True) if pooling == "mean" else each

    return tokens


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator of first values: a function of the run's seed and a name."""
    return torch.Generator().manual_seed(int(hash_integers(seed, text_key(name))[0]) & (2**63 - 1))


def plan(
    session: Session, loader: Loader, tested: Loader, ids: Int64, recipe: MAELinearConfig | AttentiveConfig, key: str
) -> tuple[int, Schedule]:
    """The number of classes and the schedule of a probe of the settings ``key`` on the training images ``ids``.

    A batch that the images do not fill becomes the largest power of 2 that they do, with a word. Raises UserError for labels
    that no probe can be fitted to and for a batch that the processes cannot share.
    """
    labels, world = loader.labels(), session.world
    if int(labels[ids].min()) == int(labels[ids].max()):
        raise UserError(f"all training images of the probe have the label {int(labels[ids[0]])}: "
                        "a probe needs images of at least two classes in data.train")  # fmt: skip
    num_classes, last = int(labels.max()) + 1, int(tested.labels().max())
    if last >= num_classes:
        raise UserError(f"the test labels go to {last}, but data.train has {num_classes} classes: give data.train and data.val "
                        "the same ones")  # fmt: skip
    batch = recipe.batch if recipe.batch <= len(ids) else 2 ** int(math.log2(len(ids)))
    if batch != recipe.batch and world.is_main:
        log.warning(
            "%s.batch = %d: there are %d training images, so a batch has %d", key, recipe.batch, len(ids), batch
        )
    if batch % world.size:
        raise UserError(f"{key}.batch = {recipe.batch}: a batch of {batch} should be a multiple of the {world.size} processes of "
                        "this evaluation")  # fmt: skip
    if recipe.warmup_epochs >= recipe.epochs:
        raise UserError(
            f"{key}.warmup_epochs = {recipe.warmup_epochs}: should be less than {key}.epochs = {recipe.epochs}"
        )
    return num_classes, Schedule(recipe.epochs, recipe.warmup_epochs, batch, session.cfg.train.seed)


def state_path(session: Session, name: str) -> Path:
    """Where a probe's state lies in the run folder."""
    return session.run_dir / "probes" / f"{name}.safetensors"


def depends_on(session: Session, loader: Loader, schedule: Schedule, **more: object) -> dict[str, object]:
    """What a trained probe depends on; not on the number of processes, nor on how many images each computes at a time."""
    data = session.cfg.data
    return {**session.key("train", loader), **vars(schedule), "crop": [*session.cfg.eval.crop_scale], "flip": data.flip,
            **more}  # fmt: skip
