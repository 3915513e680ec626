"""What pictures show: attention maps, generation step by step, kept tokens, loss by rank. B images, N patches in raster order."""

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from pipeline.methods.common import MaskDraw, RankDraw, restore_pixels, rows_to_image
from pipeline.methods.pcae import PCAE
from pipeline.methods.randsac import RandSAC
from pipeline.vit import IMAGE_MEAN, IMAGE_STD, Attention, VisionTransformer, enter, normalise, patchify, pixel_rows

BLANK = -10.0  # black once it is shown, in units of normalised pixels


def attention_weights(attention: Attention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of timm's attention on its input [B, n, D], nothing masked: [B, heads, n, n]."""
    q, k, _ = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    return (q @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1)


@torch.no_grad()
def attention_maps(encoder: VisionTransformer, images: Tensor, block: int) -> Tensor:
    """What each head of ``block`` (0 is the first) looks at in whole images uint8 [B, 3, H, W]: shares [B, heads, N].

    Those that the class token gives to the patches, or, in an encoder without one, the mean of what all patches give.
    """
    patches = patchify(normalise(images), encoder.patch_embed.patch_size[0])
    x = enter(encoder, patches, torch.arange(patches.shape[1]).expand(len(images), -1))
    for earlier in encoder.blocks[:block]:
        x = earlier(x)
    weights = attention_weights(encoder.blocks[block].attn, encoder.blocks[block].norm1(x))
    return weights[:, :, 0, 1:] if encoder.has_class_token else weights.mean(dim=2)


def uint8_images(rows: Tensor) -> Tensor:
    """Normalised pixel rows [B, N, p*p*C] of whole images as uint8 [B, 3, H, W], values out of range cut."""
    return torch.from_numpy(rows_to_image(rows)).mul(255).round().to(torch.uint8).permute(0, 3, 1, 2).contiguous()


def place(rows: Tensor, ids: Tensor, onto: Tensor, chosen: Tensor) -> Tensor:
    """``onto`` [B, N, C] with ``rows`` [B, T, C] at ``ids`` [B, T] where ``chosen`` bool [B, T]."""
    index = ids[..., None].expand_as(rows)
    return onto.scatter(1, index, torch.where(chosen[..., None], rows, onto.gather(1, index)))


@torch.no_grad()
def teacher_forced(method: RandSAC, images: Tensor, draw: RankDraw) -> list[Tensor]:
    """For each rank k of RandSAC: true pixels of ranks before k, the prediction of rank k, the rest blank; K x [B, N, C].

    Each prediction is made from the true pixels before it; where the target is standardised it has the true patch's mean and
    deviation. Rank 0 is as given, unless it is predicted.
    """
    rows = pixel_rows(patchify(normalise(images), method.patch_size))
    prediction = method.predict(images, draw)
    pred = prediction.pred
    if method.method.normalise_target:
        pred = restore_pixels(pred, rows.gather(1, prediction.token_ids[..., None].expand_as(pred)))
    ranks, blank, counted = draw.ranks, torch.full_like(rows, BLANK), prediction.weight > 0
    of = ranks.gather(1, prediction.token_ids)
    steps = []
    for rank in range(int(ranks.max()) + 1):
        seen = torch.where(((ranks >= 0) & (ranks < max(rank, first_predicted(method))))[..., None], rows, blank)
        steps.append(place(pred, prediction.token_ids, seen, counted & (of == rank)))
    return steps


def first_predicted(method: RandSAC) -> int:
    """The first rank that is predicted."""
    return 0 if method.method.predict_first else 1


@torch.no_grad()
def generate(method: RandSAC, images: Tensor, draw: RankDraw) -> list[Tensor]:
    """For each rank k: the image that RandSAC has made when it has predicted k, fed with its own predictions; K x [B, N, C].

    Of the true image it has the first segment alone, or nothing where that is predicted too. A standardised target says
    nothing of a patch's mean and deviation: all patches get the means of those of the first segment's, or 0 and 1 without one.
    Pixels are cut to their range and rounded to 8 bits before they are fed back.
    """
    rows = pixel_rows(patchify(normalise(images), method.patch_size))
    first = first_predicted(method)
    given = (draw.ranks >= 0) & (draw.ranks < first)
    painted = torch.where(given[..., None], rows, torch.full_like(rows, BLANK))
    share = given / given.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (rows.mean(-1) * share).sum(dim=1)[:, None, None]
    deviation = ((rows.var(-1) + 1e-6).sqrt() * share).sum(dim=1)[:, None, None]
    deviation = torch.where(given.any(dim=1)[:, None, None], deviation, 1.0)
    steps = [painted] * first
    for rank in range(first, int(draw.ranks.max()) + 1):
        prediction = method.predict(uint8_images(painted), draw)
        pred = prediction.pred * deviation + mean if method.method.normalise_target else prediction.pred
        chosen = (prediction.weight > 0) & (draw.ranks.gather(1, prediction.token_ids) == rank)
        painted = place(pred, prediction.token_ids, painted, chosen)
        steps.append(painted)
    return steps


@torch.no_grad()
def kept_tokens(method: PCAE, images: Tensor, draw: MaskDraw, teacher: nn.Module | None) -> list[Tensor]:
    """Which patches of the whole image PCAE's teacher still has after each stage: bool [B, N] a stage.

    In training it sees the masked patches alone; the paper's pictures show whole images, as these.
    """
    patches = patchify(normalise(images), method.patch_size)
    everything = torch.arange(patches.shape[1]).expand(len(images), -1)
    _, stages = method.targets(patches, everything, teacher, draw.priority)
    return [torch.zeros_like(everything, dtype=torch.bool).scatter(1, ids, True) for ids in stages]


def dimmed(rows: Tensor, kept: Tensor) -> Tensor:
    """Pixel rows [B, N, p*p*C] whose patches that are not ``kept`` bool [B, N] are faded to a fifth on white."""
    white = ((1 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)).repeat(rows.shape[-1] // 3)
    return torch.where(kept[..., None], rows, 0.2 * rows + 0.8 * white)


@torch.no_grad()
def losses_by_rank(method: RandSAC, images: Tensor, draw: RankDraw) -> Tensor:
    """Each image's mean loss over the tokens of each rank: fp32 [B, K]; NaN for a rank without any, such as the first."""
    prediction = method.predict(images, draw)
    losses = method.token_loss(prediction) * prediction.weight
    ranks, number = draw.ranks.gather(1, prediction.token_ids).clamp(min=0), int(draw.ranks.max()) + 1
    total, count = losses.new_zeros(2, len(images), number).unbind(0)
    return total.scatter_add(1, ranks, losses) / count.scatter_add(1, ranks, prediction.weight)


def draw_losses(losses: Tensor, title: str, label: str) -> Figure:
    """The mean over images of losses [B, K] by rank, and what two thirds of the images have about it."""
    means = torch.nanmean(losses, 0)
    spread = (torch.nanmean((losses - means).square(), 0)).sqrt()
    ranks = [rank for rank in range(losses.shape[1]) if means[rank].isfinite()]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    middle, width = means[ranks].numpy(), spread[ranks].numpy()
    axes.fill_between(
        ranks, middle - width, middle + width, alpha=0.2, lw=0, label="± one standard deviation of images"
    )
    axes.plot(ranks, middle, marker="o", ms=4, label="mean over images")
    axes.set_xlabel("rank of the segment: its place in the order of prediction")
    axes.set_ylabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=9)
    return figure
