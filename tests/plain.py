"""Slow, plain versions of the network's parts, one image at a time in float64: the references of several tests.

Only the weights are taken from the modules; no mask, no batch, no fused kernel.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.vit import normalise, patchify


def linear(module: nn.Linear, rows: Tensor) -> Tensor:
    return rows @ module.weight.double().T + module.bias.double()


def layer_norm(module: nn.LayerNorm, rows: Tensor) -> Tensor:
    centred = rows - rows.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * module.weight.double() + module.bias.double()


def mlp(module: nn.Module, rows: Tensor) -> Tensor:
    hidden = linear(module.fc1, rows)
    return linear(module.fc2, hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


def heads_of(rows: Tensor, heads: int) -> list[Tensor]:
    return list(rows.split(rows.shape[-1] // heads, dim=-1))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Every query row attends to every key row."""
    mixed = []
    for one_q, one_k, one_v in zip(*(heads_of(x, heads) for x in (q, k, v)), strict=True):
        mixed.append((one_q @ one_k.T / math.sqrt(one_q.shape[-1])).softmax(-1) @ one_v)
    return torch.cat(mixed, dim=-1)


def self_attention(module: nn.Module, queries: Tensor, context: Tensor) -> Tensor:
    """Normed rows: ``queries`` attend to ``context``, which the caller has made to hold whatever they may see."""
    q = linear(module.qkv, queries).chunk(3, -1)[0]
    k, v = linear(module.qkv, context).chunk(3, -1)[1:]
    return linear(module.proj, attend(q, k, v, module.num_heads))


def block(module: nn.Module, rows: Tensor, context: Tensor | None = None) -> Tensor:
    """A pre-norm encoder block on ``rows`` that may see ``context`` (block inputs, themselves included)."""
    context = rows if context is None else context
    rows = rows + self_attention(module.attn, layer_norm(module.norm1, rows), layer_norm(module.norm1, context))
    return rows + mlp(module.mlp, layer_norm(module.norm2, rows))


def cross_block(module: nn.Module, rows: Tensor, context: Tensor, memory: Tensor) -> Tensor:
    """RandSAC's decoder block: ``rows`` see ``context`` in self-attention, if it has one, and ``memory`` in cross-attention."""
    if module.attn is not None:
        normed = layer_norm(module.norm1, rows), layer_norm(module.norm1, context)
        rows = rows + self_attention(module.attn, *normed)
    if isinstance(module.norm_memory, nn.LayerNorm):
        memory = layer_norm(module.norm_memory, memory)
    k, v = linear(module.cross.kv, memory).chunk(2, -1)
    q = linear(module.cross.q, layer_norm(module.norm2, rows))
    rows = rows + linear(module.cross.proj, attend(q, k, v, module.cross.heads))
    return rows + mlp(module.mlp, layer_norm(module.norm3, rows))


def patches(image: Tensor, size: int) -> list[Tensor]:
    """Normalised [C, p, p] patches of an image [3, H, W] with values 0..255, in raster order."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    image = (image.double() / 255 - mean[:, None, None]) / std[:, None, None]
    places = range(0, image.shape[-1], size)
    return [image[:, top : top + size, left : left + size] for top in places for left in places]


def embedded(encoder: nn.Module, image: Tensor, size: int) -> Tensor:
    """Patch embedding plus position of every token, [N, D]."""
    prefix = encoder.pos_embed.shape[1] - (image.shape[-1] // size) ** 2
    weight, bias = encoder.patch_embed.proj.weight.double(), encoder.patch_embed.proj.bias.double()
    rows = [(weight * patch).sum(dim=(1, 2, 3)) + bias for patch in patches(image, size)]
    return torch.stack(rows) + encoder.pos_embed[0, prefix:].double()


def standardised(values: Tensor) -> Tensor:
    """(x - mean) / sqrt(unbiased variance + 1e-6) of one vector."""
    mean = values.sum() / len(values)
    variance = (values - mean).square().sum() / (len(values) - 1)
    return (values - mean) / (variance + 1e-6).sqrt()


def pixel_target(patch: Tensor) -> Tensor:
    """The target of one [C, p, p] patch: pixels in raster order, channels fastest, standardised."""
    _, height, width = patch.shape
    return standardised(torch.stack([patch[:, y, x] for y in range(height) for x in range(width)]).flatten())


def mask_decoder(decoder: nn.Module, encoded: Tensor, visible: list[int], queries: list[int]) -> Tensor:
    """MAE's decoder on one image: predictions [K, out] at ``queries``."""
    positions = decoder.pos_embed[0].double()
    rows = [linear(decoder.embed, encoded[0]) + positions[0]]
    rows += [linear(decoder.embed, encoded[1 + i]) + positions[1 + patch] for i, patch in enumerate(visible)]
    rows += [decoder.mask_token[0, 0].double() + positions[1 + patch] for patch in queries]
    x = torch.stack(rows)
    for module in decoder.blocks:
        x = block(module, x)
    return linear(decoder.head, layer_norm(decoder.norm, x))[1 + len(visible) :]


def encode_visible(encoder: nn.Module, image: Tensor, size: int, visible: list[int]) -> Tensor:
    """Class token and visible tokens through all blocks and the final norm, [1 + V, D]."""
    x = torch.cat([encoder.cls_token[0].double(), embedded(encoder, image, size)[visible]])
    for module in encoder.blocks:
        x = block(module, x)
    return layer_norm(encoder.norm, x)


def sincos(grid: int, width: int) -> np.ndarray:
    """2-D sin-cos positions [N, width]: the column's half first, each half sines then cosines; base 10000."""
    quarter = width // 4
    table = np.zeros((grid * grid, width))
    for row in range(grid):
        for column in range(grid):
            for half, place in enumerate((column, row)):
                for i in range(quarter):
                    angle = place / 10000 ** (i / quarter)
                    table[row * grid + column, 2 * half * quarter + i] = math.sin(angle)
                    table[row * grid + column, (2 * half + 1) * quarter + i] = math.cos(angle)
    return table


def shake(module: nn.Module, scale: float = 0.1) -> None:
    """Move every trained parameter off its first value, so that no bias is zero and no norm the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


# PCAE's teacher


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_scores(rows: Tensor, ids: Sequence[int] = ()) -> Tensor:
    """Mean cosine of each row with all rows, itself included; float64."""
    unit = [row / max(float(row.norm()), 1e-12) for row in rows.detach().double()]
    return torch.tensor([sum(float(u @ w) for w in unit) / len(unit) for u in unit], dtype=torch.float64)


def plain_teacher(
    encoder: nn.Module, image: Tensor, masked: list[int], keep: Fraction, drops: tuple[int, ...],
    score: Callable[[Tensor, list[int]], Tensor] = plain_scores,
) -> tuple[dict[int, Tensor], list[set[int]]]:  # fmt: skip
    """Carries every masked token to the end; from its drop on, a dropped one is a key for nobody. Token -> feature.

    After the blocks ``drops`` those with the lowest ``score`` (of their rows and raster ids) stay.
    """
    alive = list(range(len(masked)))
    x, stages = embedded(encoder, image, 4)[masked], []
    for index, module in enumerate(encoder.blocks):
        x = block(module, x, x[alive])
        if index in drops:
            scores = score(x[alive], [masked[i] for i in alive])
            order = sorted(range(len(alive)), key=lambda i: float(scores[i]))  # noqa: B023
            alive = [alive[i] for i in order[: math.floor(len(alive) * keep)]]
            stages.append({masked[i] for i in alive})
    rows = layer_norm(encoder.norm, x)
    return {masked[i]: rows[i] for i in alive}, stages


def as_teacher(method: nn.Module) -> nn.Module:
    """A teacher with the student's weights, as an engine makes it."""
    teacher = method.build_teacher().to_empty(device="cpu")
    teacher.load_state_dict(method.encoder.state_dict())
    return teacher


def fixed_teacher(features: Tensor, ids: Tensor) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    """Stands in for a teacher whose answer is known."""
    return lambda patches, masked_ids, how: (features, [ids])


def entering_tokens(method: nn.Module) -> list[int]:
    """Tokens that really enter each block of the teacher on the meta device, its last ids and its features."""
    seen: list[int] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
             for block in method.encoder.blocks]  # fmt: skip
    side = method.grid * method.patch_size
    images = torch.empty(1, 3, side, side, dtype=torch.uint8, device="meta")
    patches = patchify(normalise(images), method.patch_size)
    masked = torch.empty(1, method.grid**2 - method.num_visible, dtype=torch.int64, device="meta")
    features, stages = method.targets(patches, masked, None)
    for hook in hooks:
        hook.remove()
    return [*seen, stages[-1].shape[1], features.shape[1]]
