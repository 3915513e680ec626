"""What the probes see: feature vectors of each image, of a frozen encoder or raw pixels, and a file to keep them in."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.config import UserError
from pipeline.tensors import save_tensors
from pipeline.vit import VisionTransformer, normalise

log = logging.getLogger("patchmill")

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
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every submodule is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _collect(
    loader: Any, rows_of: Callable[[Tensor], dict[str, Tensor]], batch_size: int, device: torch.device | str
) -> Features:
    """``rows_of`` on every batch of images, uint8 [B, 3, H, W] on ``device``; the last batch may be smaller.

    Its rows named ``features`` become those, all else ``others``.
    """
    ids = np.arange(loader.num_samples)
    order = ((0, ids[start : start + batch_size]) for start in range(0, len(ids), batch_size))
    rows: dict[str, list[Tensor]] = {}
    labels = []
    with loader.batches(order) as batches:
        for batch in batches:
            with torch.inference_mode():
                for name, values in rows_of(batch.images.to(device)).items():
                    rows.setdefault(name, []).append(values.float())
            labels.append(batch.labels)
    # Joined outside of inference mode: the linear probe's gradient cannot pass an inference tensor.
    joined = {name: torch.cat(rows.pop(name)) for name in list(rows)}
    return Features(joined.pop("features"), torch.cat(labels).to(device), joined)


def extract(encoder: VisionTransformer, loader: Any, *, batch_size: int, device: torch.device | str) -> Features:
    """The mean of a VisionTransformer's patch tokens after its final norm, D = its width, in one pass over the images.

    ``others``: ``last4``, such a mean of each of the last four blocks (all of fewer) through the final norm, side by side,
    the last block's last; ``cls``, the class token after the final norm, of an encoder that has one. ``loader`` is one of
    ``pipeline.data`` without augmentation. The encoder is on ``device``; its mode is restored.
    """

    def pooled(images: Tensor) -> dict[str, Tensor]:
        found = encoder.forward_intermediates(
            normalise(images), min(LAST_BLOCKS, len(encoder.blocks)), norm=True, output_fmt="NLC",
            return_prefix_tokens=True, intermediates_only=True, output_dict=True,
        )  # fmt: skip
        means = [tokens.mean(1) for tokens in found["image_intermediates"]]
        rows = {"features": means[-1], "last4": torch.cat(means, 1)}
        if encoder.has_class_token:
            rows["cls"] = found["image_intermediates_prefix"][-1][:, 0]
        return rows

    with _evaluating(encoder):
        return _collect(loader, pooled, batch_size, device)


def pixels(loader: Any, *, batch_size: int, device: torch.device | str, size: int = 32) -> Features:
    """Raw pixels in [0, 1] as features, D = 3 side^2; images with a side above ``size`` are averaged down to it."""

    def flat(images: Tensor) -> dict[str, Tensor]:
        side = min(size, images.shape[-1])
        return {"features": F.adaptive_avg_pool2d(images.float() / 255, side).flatten(1)}

    return _collect(loader, flat, batch_size, device)


def _read(path: Path, key: Mapping[str, str], device: torch.device | str) -> Features | None:
    """The features of a file, or None unless it is whole and was written under this very key."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            if file.metadata() != dict(key):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping: it has no __iter__)
            return Features(tensors.pop("features"), tensors.pop("labels"), tensors)
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        log.warning("%s is damaged (%s): computing its features again", path, error)
        return None


def cached(
    path: Path, key: Mapping[str, str], compute: Callable[[], Features], *, device: torch.device | str = "cpu"
) -> Features:
    """The features in the safetensors file ``path``; computed and written when it is absent, stale or damaged.

    ``key`` is all that the features depend on: the checkpoint's hash, the image set, the crop. A file of a version that
    kept other poolings is stale.
    """
    key = {**key, "content": CONTENT}
    found = _read(path, key, device)
    if found is not None:
        return found
    made = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    tensors = {"features": made.features, "labels": made.labels, **made.others}
    save_tensors({name: tensor.cpu() for name, tensor in tensors.items()}, partial, key)
    partial.replace(path)
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
