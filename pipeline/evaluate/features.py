"""What the probes see: feature vectors of each image, of a frozen encoder or raw pixels, and a file to keep them in."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.config import UserError
from pipeline.keys import Int64
from pipeline.launch import World
from pipeline.metrics import Progress
from pipeline.tensors import read_tensors, replace_tensors
from pipeline.vit import VisionTransformer, normalise

log = logging.getLogger("patchmill")
ALONE = World()
LAST_BLOCKS = 4
CONTENT = "mean cls last4"  # what ``extract`` makes: a cache file that says otherwise, or nothing, is another version's


@dataclass(frozen=True)
class Features:
    """``features`` float32 [N, D] and ``labels`` int64 [N] of N images, in the order of their ids, on one device.

    ``others``: float32 [N, D'] of the same images by name, see ``extract``; none for raw pixels.
    """

    features: Tensor
    labels: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every submodule is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def rounds(ids: Int64, batch_size: int, world: World) -> tuple[list[Int64], int]:
    """This rank's batches of ``ids``, as many as every other rank's, and how many in front are its own to count.

    Batch j of all goes to rank j modulo the ranks, whatever their number: a batch's values depend in their last bits on what is
    computed beside it. A rank that has one less does the first of all again: a sharded encoder needs every rank.
    """
    batches = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    own = batches[world.rank :: world.size]
    missing = -(-len(batches) // world.size) - len(own)
    return own + batches[:1] * missing, len(own)


def _on_main(values: Tensor, lengths: Sequence[int], world: World) -> list[Tensor]:
    """Rows [n, D] of each rank on the main process, by rank and cut to ``lengths``; nothing on the others."""
    if world.size == 1:
        return [values[: lengths[0]]]
    padded = values.new_zeros(max(lengths), values.shape[1])
    padded[: len(values)] = values[: max(lengths)]
    received = [torch.empty_like(padded) for _ in lengths] if world.is_main else None
    dist.gather(padded, received, dst=0, group=world.control)
    return [rows[:length] for rows, length in zip(received or [], lengths, strict=False)]


def _collect(
    loader: Any, rows_of: Callable[[Tensor], dict[str, Tensor]], batch_size: int, device: torch.device | str,
    world: World, ids: Int64 | None, title: str,
) -> Features:  # fmt: skip
    """``rows_of`` on every batch of images ``ids``, uint8 [B, 3, H, W] on ``device``; the last batch may be smaller.

    Its rows named ``features`` become those, all else ``others``; on the main process, the other ranks keep nothing.
    """
    ids = np.arange(loader.num_samples) if ids is None else ids
    own, _ = rounds(ids, batch_size, world)
    rows: dict[str, list[Tensor]] = {}
    with Progress(title, len(ids), "image", shown=world.is_main and bool(title)) as progress, torch.no_grad(), \
            loader.batches(((0, some) for some in own), torch.device(device)) as batches:  # fmt: skip
        for number, batch in enumerate(batches):
            made = {name: values.float().cpu() for name, values in rows_of(batch.images.to(device)).items()}
            starts = [(number * world.size + rank) * batch_size for rank in range(world.size)]
            lengths = [max(0, min(batch_size, len(ids) - start)) for start in starts]
            widths = [values.shape[1] for values in made.values()]
            for part in _on_main(torch.cat(list(made.values()), 1), lengths, world):
                for name, values in zip(made, part.split(widths, 1), strict=True):
                    rows.setdefault(name, []).append(values)
            progress.update(min(len(ids), starts[-1] + batch_size))
    joined = {name: torch.cat(rows.pop(name)) for name in list(rows)}
    labels = torch.from_numpy(loader.labels()[ids])
    return Features(joined.pop("features", torch.empty(0)), labels, joined)


def computing(device: torch.device | str, precision: str) -> torch.autocast:
    """In here an encoder computes in ``eval.precision``."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def extract(
    encoder: VisionTransformer, loader: Any, *, batch_size: int, device: torch.device | str, world: World = ALONE,
    ids: Int64 | None = None, precision: str = "fp32", title: str = "",
) -> Features:  # fmt: skip
    """The mean of a VisionTransformer's patch tokens after its final norm, D = its width, in one pass over the images.

    ``others``: ``last4``, such a mean of each of the last four blocks (all of fewer) through the final norm, side by side,
    the last block's last; ``cls``, the class token after the final norm, of an encoder that has one. ``loader`` is one of
    ``pipeline.data`` without augmentation, ``ids`` of its images are taken (default: all). The encoder is on ``device``; its
    mode is restored. All ranks of ``world`` call it, each computes a part, and the main one has the features, on the CPU.
    """

    def pooled(images: Tensor) -> dict[str, Tensor]:
        with computing(device, precision):
            found = encoder.forward_intermediates(
                normalise(images), min(LAST_BLOCKS, len(encoder.blocks)), norm=True, output_fmt="NLC",
                return_prefix_tokens=True, intermediates_only=True, output_dict=True,
            )  # fmt: skip
        means = [tokens.float().mean(1) for tokens in found["image_intermediates"]]
        rows = {"features": means[-1], "last4": torch.cat(means, 1)}
        if encoder.has_class_token:
            rows["cls"] = found["image_intermediates_prefix"][-1][:, 0]
        return rows

    with evaluating(encoder):
        return _collect(loader, pooled, batch_size, device, world, ids, title)


def pixels(loader: Any, *, batch_size: int, device: torch.device | str, size: int = 32, world: World = ALONE,
           ids: Int64 | None = None) -> Features:  # fmt: skip
    """Raw pixels in [0, 1] as features, D = 3 side^2; images with a side above ``size`` are averaged down to it."""

    def flat(images: Tensor) -> dict[str, Tensor]:
        side = min(size, images.shape[-1])
        return {"features": F.adaptive_avg_pool2d(images.float() / 255, side).flatten(1)}

    return _collect(loader, flat, batch_size, device, world, ids, "")


def cached(path: Path, key: Mapping[str, str], compute: Callable[[], Features], *, world: World = ALONE) -> Features:
    """The features in the safetensors file ``path``; computed and written when it is absent, stale or damaged.

    ``key`` is all that the features depend on: the checkpoint's hash, the image set, the crop. A file of a version that
    kept other poolings is stale. The main process reads and writes; all ranks compute.
    """
    key = {**key, "content": CONTENT}
    found = read_tensors(path) if world.is_main else None
    if world.from_main(found is not None and found[1] == key):
        tensors = found[0] if found is not None else {"features": torch.empty(0), "labels": torch.empty(0)}
        return Features(tensors.pop("features"), tensors.pop("labels"), tensors)
    made = compute()
    if world.is_main:
        try:
            replace_tensors({"features": made.features, "labels": made.labels, **made.others}, path, key)
        except (OSError, SafetensorError) as error:  # they are only kept to save time
            log.warning("%s cannot be written (%s): the next probe computes the features again", path, error)
    return made


def check_probe(train: Features, test: Features, num_classes: int) -> None:
    """Raises UserError, saying which set is at fault, for features or labels from which no probe can be fitted."""
    for name, part in (("training", train), ("test", test)):
        if not len(part.labels):
            raise UserError(f"the {name} set of the probe is empty: check data.train and data.val")
        if not part.features.isfinite().all():
            bad = int((~part.features.isfinite().all(1)).nonzero()[0, 0])
            raise UserError(f"the {name} features of image {bad} are not finite: the encoder's weights diverged; "
                            "evaluate an earlier checkpoint")  # fmt: skip
        if not 0 <= int(part.labels.min()) <= int(part.labels.max()) < num_classes:
            raise UserError(f"the {name} labels go from {int(part.labels.min())} to {int(part.labels.max())}, but the "
                            f"probe has {num_classes} classes: give data.train and data.val the same ones")  # fmt: skip
    if train.features.shape[1] != test.features.shape[1]:
        raise UserError(f"training features have {train.features.shape[1]} columns, test features "
                        f"{test.features.shape[1]}: both must come from one encoder at one image size")  # fmt: skip
    if int(train.labels.min()) == int(train.labels.max()):
        raise UserError(f"all training images of the probe have the label {int(train.labels[0])}: "
                        "a probe needs images of at least two classes in data.train")  # fmt: skip
    if bool((train.features == train.features[0]).all()):
        raise UserError("all training images of the probe have the same features: the encoder's output is constant; "
                        "evaluate another checkpoint")  # fmt: skip
