"""What an export is held against: the model that its own words load, and the features by pretraining's path."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.vit import embed, encode_visible, normalise, patchify, timm


def as_printed(report: object, path: Path) -> nn.Module:
    """Run the Python that an export to ``path`` prints, to the letter."""
    first, _, code = str(report).partition("\n")
    assert first == f"wrote {path}; load it with"
    names: dict[str, Any] = {"timm": timm, "safetensors": safetensors, "torch": torch}
    exec("\n".join(line.strip() for line in code.splitlines()), names)  # noqa: S102
    return names["model"].eval()


def own_features(encoder: nn.Module, images: Tensor, patch_size: int) -> Tensor:
    """The features of all patches by the path that pretraining takes."""
    patches = patchify(normalise(images), patch_size)
    ids = torch.arange(patches.shape[1]).expand(len(images), -1)
    if encoder.has_class_token:
        return encode_visible(encoder, patches, ids, None)
    x = embed(encoder, patches, ids)
    for block in encoder.blocks:
        x = block(x)
    return encoder.norm(x)
