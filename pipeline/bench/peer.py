"""Another MAE: the authors' ``MaskedAutoencoderViT`` from a checkout of facebookresearch/mae that the user got himself."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import Config, UserError
from pipeline.methods.common import MaskDraw
from pipeline.methods.mae import public_names
from pipeline.vit import normalise

REPOSITORY: Final = "https://github.com/facebookresearch/mae"
MODULES: Final = ("models_mae", "util")
MAX_LOSS_DIFFERENCE: Final = 1e-5


@contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside, and what it was, or not there, afterwards."""
    before = {name: vars(owner)[name]} if name in vars(owner) else {}
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        vars(owner).update(before)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Their top-level modules can be imported inside; afterwards ``sys`` knows nothing of them."""

    def take() -> dict[str, Any]:
        names = [name for name in sys.modules if name.split(".")[0] in MODULES]
        return {name: sys.modules.pop(name) for name in names}

    before = take()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        take()
        sys.modules.update(before)


@contextmanager
def _old_libraries() -> Iterator[None]:
    """Their code, unmodified, runs on today's timm and numpy.

    It was written for timm 0.3.2, whose Block still had ``qk_scale`` (they pass None, which meant the scale that timm
    now always takes), and for a numpy that still had ``np.float``, an alias of float.
    """
    from timm.models import vision_transformer

    block = vision_transformer.Block

    def old_block(*args: Any, qk_scale: None = None, **kwargs: Any) -> nn.Module:
        return block(*args, **kwargs)

    with _swapped(vision_transformer, "Block", old_block), _swapped(np, "float", float):
        yield


def build_peer(folder: Path, cfg: Config) -> nn.Module:
    """Their model in the shape of an MAE's configuration, with norm_pix_loss. Raises UserError for another folder."""
    hint = f"should be a checkout of {REPOSITORY}"
    missing = [name for name in ("models_mae.py", "util/pos_embed.py") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"--peer {folder}: has no {missing[0]}; {hint}")
    shape, method = cfg.shape, cfg.method
    with _importable(folder.absolute()), _old_libraries():
        try:
            return importlib.import_module("models_mae").MaskedAutoencoderViT(
                img_size=cfg.data.image_size, patch_size=shape.patch_size,
                embed_dim=shape.width, depth=shape.depth, num_heads=shape.heads,
                decoder_embed_dim=method.decoder_width, decoder_depth=method.decoder_depth,
                decoder_num_heads=method.decoder_heads, norm_pix_loss=True,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),  # as in all their presets
            )  # fmt: skip
        except (ImportError, AttributeError, TypeError) as error:
            raise UserError(f"--peer {folder}: {' '.join(str(error).split())}; {hint}") from None


@torch.no_grad()
def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Give their model the weights of our MAE; raises RuntimeError when the two are not the same parameters."""
    own, twins = dict(ours.named_parameters()), public_names(theirs.state_dict())
    if own.keys() != twins.keys():
        raise RuntimeError(f"other parameters: {sorted(own.keys() ^ twins.keys())}")
    for name, value in twins.items():
        value.copy_(own[name])


def _noise(draw: MaskDraw) -> Tensor:
    """What they should draw, [B, N], for its argsort to be our order: the visible tokens, then the masked ones."""
    order = torch.cat([draw.visible_ids, draw.masked_ids], dim=1)
    places = torch.linspace(0, 1, order.shape[1]).expand(order.shape)
    return torch.empty(order.shape).scatter(1, order, places)


def peer_loss(theirs: nn.Module, images: Tensor, draw: MaskDraw) -> Callable[[], Tensor]:
    """A function that gives their loss on our images (uint8 [B, 3, H, W]) and mask. They normalise in the loader: done here."""
    inputs, noise = normalise(images), _noise(draw)
    mask_ratio = draw.masked_ids.shape[1] / noise.shape[1]

    def loss() -> Tensor:
        with _swapped(torch, "rand", lambda *size, device: noise):  # the one random call of a forward pass
            return theirs(inputs, mask_ratio)[0]

    return loss


def load_peer(
    folder: Path, cfg: Config, ours: nn.Module, images: Tensor, draw: MaskDraw
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Their model, and a function that gives its loss on our weights, images and mask, which is shown to be ours.

    Raises UserError when the folder is not their checkout or the losses differ by more than 1e-5.
    """
    theirs = build_peer(folder, cfg)
    try:
        copy_weights(ours, theirs)
    except RuntimeError:
        raise UserError(
            f"--peer {folder}: its parameters are not an MAE's; should be a checkout of {REPOSITORY}"
        ) from None
    loss = peer_loss(theirs, images, draw)
    with torch.no_grad():
        here, there = float(ours(images, draw)[0]), float(loss())
    if not abs(here - there) <= MAX_LOSS_DIFFERENCE:
        raise UserError(f"--peer {folder}: its loss is {there:.6f} where ours is {here:.6f} on the same weights, images and "
                        f"mask: they do not compute the same; should be a checkout of {REPOSITORY}")  # fmt: skip
    return theirs, loss
