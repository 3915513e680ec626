"""timm's VisionTransformer as the encoder, the decoders, sin-cos positions and initial weights.

The encoder keeps timm's parameter names, so its weights load into ``timm.create_model`` as they are. Shapes:
B images, N patches, n tokens, D width.
"""

import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.keys import hash_integers, text_key


def _import_timm() -> Any:
    """timm needs torchvision, whose PyPI wheel does not load beside a CPU-only torch: its C++ part finds no CUDA.

    Only then two operators that its Python part looks up are declared; nothing here calls them.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if torch.version.cuda is not None or "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.modules[__name__].__dict__["_torchvision_operators"] = library  # declared for as long as this lives
    import timm

    return timm


timm = _import_timm()
from timm.layers import Attention, LayerNorm, Mlp  # noqa: E402
from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@lru_cache(maxsize=8)
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept on the device: copying them there at each step would make the host wait."""
    with torch.inference_mode(False):  # else, first asked for by an evaluation, no gradient could pass by them
        return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to fp32 with ImageNet's channel mean 0 and standard deviation 1, on the images' device."""
    mean, std = _statistics(images.device)
    return (images.float() / 255 - mean) / std


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] to patches [B, N, C, p, p], raster order; channels first, as a convolution's weight."""
    return (
        images.unfold(2, patch_size, patch_size)
        .unfold(3, patch_size, patch_size)
        .permute(0, 2, 3, 1, 4, 5)
        .flatten(1, 2)
    )


def unpatchify(patches: Tensor) -> Tensor:
    """The inverse of ``patchify`` for a square image."""
    batch, num, channels, size, _ = patches.shape
    grid = round(num**0.5)
    rows = patches.reshape(batch, grid, grid, channels, size, size).permute(0, 3, 1, 4, 2, 5)
    return rows.reshape(batch, channels, grid * size, grid * size)


def pixel_rows(patches: Tensor) -> Tensor:
    """Patches [B, n, C, p, p] as prediction targets [B, n, p*p*C]: pixels in raster order, channels fastest, as MAE's."""
    return patches.permute(0, 1, 3, 4, 2).flatten(2)


def standardise(rows: Tensor) -> Tensor:
    """Each row of the last axis with mean 0 and unbiased variance 1: (x - mean) / sqrt(var + 1e-6) (MAE's norm_pix_loss)."""
    rows = rows.float()
    return (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True) + 1e-6).sqrt()


def sincos_2d(grid: int, width: int, *, class_token: bool, stretched_from: int | None = None) -> Tensor:
    """Fixed positions fp32 [1, N (+1), width]: half the channels encode the column, half the row; base 10000 (as MAE).

    The class token's row, first when asked for, is zeros. ``stretched_from``: those of a grid of so many patches a side,
    read between its points, as if they were interpolated for images of another size. Raises
    ValueError unless ``width`` is a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"2-D sin-cos positions need a width that is a multiple of 4, not {width}")
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    step = 1 if stretched_from is None else stretched_from / grid
    place = (torch.arange(grid, dtype=torch.float64) + 0.5) * step - 0.5
    row, column = place.repeat_interleave(grid), place.repeat(grid)
    angles = [axis[:, None] * frequency for axis in (column, row)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    if class_token:
        table = torch.cat([torch.zeros(1, width, dtype=torch.float64), table])
    return table.float()[None]


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


class KeyedBlock(Block):
    """timm's block whose stochastic depth is an argument: nothing in a forward pass draws a random number."""

    def __init__(self, *args: Any, drop_path: float = 0.0, **kwargs: Any) -> None:
        """As timm's Block; ``drop_path`` is the share of samples whose branch is dropped."""
        super().__init__(*args, **kwargs)
        self.drop_rate = drop_path

    def factors(self, keep: Tensor | None) -> Tensor | None:
        """What attention and MLP are multiplied by, fp32 [2, B], when ``keep`` bool [2, B] of them stay; None for all.

        Not in ``forward``: each block has a rate of its own, and would be compiled on its own with it.
        """
        return None if keep is None else keep / (1 - self.drop_rate)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
        """Tokens [B, n, D]; ``attn_mask`` bool, True may attend; ``factors`` [2, B] of attention and MLP, or None for 1."""
        attention, mlp = (None, None) if factors is None else factors.to(x.dtype)[..., None, None]
        x = x + _times(self.attn(self.norm1(x), attn_mask=attn_mask), attention)
        return x + _times(self.mlp(self.norm2(x)), mlp)


def encoder_kwargs(shape: Any, image_size: int, *, class_token: bool, num_classes: int = 0) -> dict[str, Any]:
    """The keyword arguments of ``timm.create_model(shape.timm_name, ...)`` that give this encoder, or a classifier with it."""
    return {"img_size": image_size, "patch_size": shape.patch_size, "embed_dim": shape.width, "depth": shape.depth,
            "num_heads": shape.heads, "class_token": class_token, "global_pool": "avg" if num_classes else "",
            "num_classes": num_classes}  # fmt: skip


def build_encoder(
    shape: Any,
    image_size: int,
    *,
    class_token: bool,
    drop_path: float,
    kind: type[VisionTransformer] = VisionTransformer,
    num_classes: int = 0,
) -> VisionTransformer:
    """An encoder with empty weights and frozen positions; see ``initialise``. With ``num_classes`` it is a classifier."""
    options = encoder_kwargs(shape, image_size, class_token=class_token, num_classes=num_classes)
    encoder = kind(block_fn=KeyedBlock, drop_path_rate=drop_path, norm_layer=LayerNorm, weight_init="skip", **options)
    encoder.pos_embed.requires_grad_(False)
    return encoder


def embed(encoder: VisionTransformer, patches: Tensor, ids: Tensor) -> Tensor:
    """Tokens [B, n, D] of patches [B, n, C, p, p] that stand at positions ``ids`` [B, n]: embedding plus position."""
    projection = encoder.patch_embed.proj
    tokens = F.linear(patches.flatten(2).to(projection.weight.dtype), projection.weight.flatten(1), projection.bias)
    return tokens + encoder.pos_embed[0, encoder.num_prefix_tokens :][ids]


def enter(encoder: VisionTransformer, patches: Tensor, ids: Tensor) -> Tensor:
    """What the first block reads of patches [B, n, C, p, p] at ``ids`` [B, n]: [B, (1 +) n, D], the class token first."""
    tokens = embed(encoder, patches, ids)
    if encoder.cls_token is None:
        return tokens
    class_token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(tokens), -1, -1)
    return torch.cat([class_token, tokens], dim=1)


def encode_visible(encoder: VisionTransformer, patches: Tensor, ids: Tensor, keep: Tensor | None) -> Tensor:
    """Class token, if there is one, and visible patches through all blocks and the final norm: [B, (1 +) n, D]."""
    x = enter(encoder, patches, ids)
    for index, block in enumerate(encoder.blocks):
        x = block(x, factors=block.factors(None if keep is None else keep[index]))
    return encoder.norm(x)


class Decoder(nn.Module):
    """MAE's decoder: embeds the encoder's tokens, adds one mask token a query, attends over all, predicts at the queries."""

    def __init__(self, grid: int, width_in: int, width: int, depth: int, heads: int, width_out: int) -> None:
        """``grid`` patches a side; predictions have ``width_out`` channels."""
        super().__init__()
        self.embed = nn.Linear(width_in, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, grid**2 + 1, width), requires_grad=False)
        self.blocks = nn.ModuleList(KeyedBlock(width, heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, width_out)

    def forward(self, encoded: Tensor, visible_ids: Tensor, query_ids: Tensor) -> Tensor:
        """Encoded [B, 1 + V, D], its patch ids [B, V] and the queries' ids [B, K] to predictions [B, K, width_out]."""
        queries = self.mask_token.expand(*query_ids.shape, -1)
        rows = torch.cat([torch.zeros_like(visible_ids[:, :1]), visible_ids + 1, query_ids + 1], dim=1)
        x = torch.cat([self.embed(encoded), queries], dim=1) + self.pos_embed[0][rows]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -query_ids.shape[1] :]))


class CrossAttention(nn.Module):
    """Attention of queries [B, q, D] to a memory [B, s, M] of another width."""

    def __init__(self, width: int, memory_width: int, heads: int) -> None:
        """``heads`` divide ``width``."""
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """``mask`` bool [q, s] or [B, 1, q, s]: True may attend."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Pre-norm decoder block: masked self-attention (unless it is left out), masked cross-attention, MLP."""

    def __init__(
        self, width: int, memory_width: int, heads: int, *, self_attention: bool = True, norm_memory: bool = True
    ) -> None:
        """``memory_width`` is the encoder's width; ``norm_memory``: once a block, as CrossMAE does."""
        super().__init__()
        self.norm1 = LayerNorm(width) if self_attention else None
        self.attn = Attention(width, heads, qkv_bias=True) if self_attention else None
        self.norm2, self.norm_memory = LayerNorm(width), LayerNorm(memory_width) if norm_memory else nn.Identity()
        self.cross = CrossAttention(width, memory_width, heads)
        self.norm3, self.mlp = LayerNorm(width), Mlp(width, 4 * width)

    def forward(self, x: Tensor, memory: Tensor, self_mask: Tensor, memory_mask: Tensor) -> Tensor:
        """Queries [B, q, D] and memory [B, s, M]; masks bool [q, q] and [q, s], or [B, 1, ...] for each image."""
        if self.attn is not None:
            x = x + self.attn(self.norm1(x), attn_mask=self_mask)
        x = x + self.cross(self.norm2(x), self.norm_memory(memory), memory_mask)
        return x + self.mlp(self.norm3(x))


def _initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    """One parameter's first value, fp32 on the CPU, from a generator of its own (same under any engine and world size)."""
    generator = torch.Generator().manual_seed(int(hash_integers(seed, text_key(name))[0]) & (2**63 - 1))
    value = torch.empty(shape)
    kind = name.rsplit(".", 1)[-1]
    if kind in ("cls_token", "mask_token", "null_token"):
        return nn.init.normal_(value, std=0.02, generator=generator)
    if kind == "skip":  # CrossMAE's: the mix of L layers has the variance of one
        return nn.init.normal_(value, std=shape[1] ** -0.5, generator=generator)
    if kind == "bias":
        return value.zero_()
    if value.dim() == 1:  # the weight of a LayerNorm
        return value.fill_(1)
    nn.init.xavier_uniform_(value.view(shape[0], -1), generator=generator)
    return value


def _fill(parameter: Tensor, value: Tensor) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(value)
        return
    whole = value.to(parameter.device).contiguous()
    # src_data_rank: every process has made the same value, so none is sent.
    part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(part.to_local())


def initialise(module: nn.Module, seed: int, fixed: Mapping[str, Tensor]) -> None:
    """Fill every parameter in place: ``fixed`` by name, else MAE's rule (Xavier-uniform matrices, N(0, 0.02) tokens).

    One whole tensor at a time is made on the CPU; of a sharded parameter each process keeps its part. Each value is a
    function of (seed, name) alone. Raises KeyError when ``fixed`` names a parameter that is not there.
    """
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name in fixed:
            _fill(parameters[name], fixed[name])
        for name, parameter in parameters.items():
            if name not in fixed:
                _fill(parameter, _initial(name, parameter.shape, seed))
