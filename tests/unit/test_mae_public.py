"""Weights of facebookresearch/mae, by hand under their names: which are taken, which are refused, and what they compute."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipeline.config import Config
from pipeline.methods import build_method
from pipeline.methods.mae import MAE, load_public, public_names
from pipeline.vit import normalise

WIDTH, DECODER_WIDTH, PATCHES = 96, 48, 64
Weights = dict[str, Tensor]


def block_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (out, into) in {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}.items():
        shapes |= {f"{name}.{layer}.weight": (out * width, into * width), f"{name}.{layer}.bias": (out * width,)}
    for norm in ("norm1", "norm2"):
        shapes |= {f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)}
    return shapes


def public_shapes() -> dict[str, tuple[int, ...]]:
    """Their names for the smallest encoder at 32 px with a decoder of two blocks."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, PATCHES + 1, WIDTH), "mask_token": (1, 1, DECODER_WIDTH),
        "decoder_pos_embed": (1, PATCHES + 1, DECODER_WIDTH), "patch_embed.proj.weight": (WIDTH, 3, 4, 4),
        "patch_embed.proj.bias": (WIDTH,), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
        "decoder_embed.weight": (DECODER_WIDTH, WIDTH), "decoder_embed.bias": (DECODER_WIDTH,),
        "decoder_norm.weight": (DECODER_WIDTH,), "decoder_norm.bias": (DECODER_WIDTH,),
        "decoder_pred.weight": (48, DECODER_WIDTH), "decoder_pred.bias": (48,),
    }  # fmt: skip
    for index in range(4):
        shapes |= block_shapes(f"blocks.{index}", WIDTH)
    for index in range(2):
        shapes |= block_shapes(f"decoder_blocks.{index}", DECODER_WIDTH)
    return shapes


@pytest.fixture(scope="module")
def public() -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in public_shapes().items()}


@pytest.fixture
def method(tiny_config: Callable[..., Config]) -> MAE:
    return build_method(tiny_config("mae", method__decoder_depth=2, method__decoder_width=DECODER_WIDTH))


def encoder_of(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if not name.startswith(("decoder", "mask"))}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def block(w: Weights, name: str, x: Tensor) -> Tensor:
    q, k, v = linear(w, f"{name}.attn.qkv", norm(w, f"{name}.norm1", x)).unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    x = x + linear(w, f"{name}.attn.proj", mixed.transpose(1, 2).flatten(2))
    return x + linear(w, f"{name}.mlp.fc2", F.gelu(linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x))))


def public_loss(w: Weights, images: Tensor, visible: Tensor) -> Tensor:
    """Masked autoencoding of normalised images with their names: the whole sequence is decoded in raster order."""
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4).flatten(2).mT
    x = (x + w["pos_embed"][:, 1:])[torch.arange(len(x))[:, None], visible]
    x = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(len(x), -1, -1), x], dim=1)
    for index in range(4):
        x = block(w, f"blocks.{index}", x)
    x = linear(w, "decoder_embed", norm(w, "norm", x))
    rows = w["mask_token"].repeat(len(x), PATCHES, 1)
    rows[torch.arange(len(x))[:, None], visible] = x[:, 1:]
    x = torch.cat([x[:, :1], rows], dim=1) + w["decoder_pos_embed"]
    for index in range(2):
        x = block(w, f"decoder_blocks.{index}", x)
    pred = linear(w, "decoder_pred", norm(w, "decoder_norm", x))[:, 1:]
    target = images.reshape(len(x), 3, 8, 4, 8, 4).permute(0, 2, 4, 3, 5, 1).reshape(len(x), PATCHES, 48)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    mask = torch.ones(len(x), PATCHES).scatter(1, visible, 0.0)
    return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()


def test_public_weights_give_the_public_loss(method: MAE, public: Weights, images: Tensor) -> None:
    load_public(method, public)
    draw = method.draw(torch.arange(4))
    with torch.no_grad():
        expected = public_loss({n: v.double() for n, v in public.items()}, normalise(images).double(), draw.visible_ids)
        assert float(method(images, draw)[0]) == pytest.approx(float(expected), rel=1e-5)


def test_names_map_one_to_one(method: MAE, public: Weights) -> None:
    renamed = public_names(public)
    assert renamed.keys() == dict(method.named_parameters()).keys() and len(renamed) == len(public)
    assert renamed["decoder.head.bias"] is public["decoder_pred.bias"]
    assert renamed["encoder.blocks.3.norm1.weight"] is public["blocks.3.norm1.weight"]


def test_an_encoder_alone_loads_when_asked_for(method: MAE, public: Weights) -> None:
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with pytest.raises(ValueError, match="^missing: decoder.mask_token; .*missing: decoder.head.bias$"):
        load_public(method, encoder_of(public))
    for weights in (encoder_of(public), public):
        method.load_state_dict(before)
        load_public(method, weights, encoder_only=True)
        for name, value in method.state_dict().items():
            expected = before[name] if name.startswith("decoder.") else public[name.removeprefix("encoder.")]
            assert torch.equal(value, expected), name


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(method: MAE, public: Weights) -> None:
    before = {name: value.clone() for name, value in method.state_dict().items()}
    wrong = {name: value for name, value in public.items() if name != "norm.bias"}
    wrong |= {"head.weight": torch.zeros(10, WIDTH), "pos_embed": torch.zeros(1, 197, WIDTH)}
    with pytest.raises(ValueError) as caught:
        load_public(method, wrong)
    assert str(caught.value).split("; ") == [
        "encoder.pos_embed is [1, 197, 96], not [1, 65, 96]",
        "missing: encoder.norm.bias",
        "unknown: encoder.head.weight",
    ]
    with pytest.raises(ValueError, match="unknown: encoder.head.weight"):
        load_public(method, encoder_of(public) | {"head.weight": torch.zeros(10, WIDTH)}, encoder_only=True)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
