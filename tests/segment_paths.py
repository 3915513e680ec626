"""RandSAC seen from outside: predictions at their places, how far a leak reaches, and segment-by-segment references."""

from collections.abc import Callable

import plain
import torch
from torch import Tensor, nn

from pipeline.methods.common import Prediction, RankDraw
from pipeline.methods.randsac import RandSAC

N = 64  # tokens of the 32 x 32 test images at patch size 4
Predict = Callable[[RandSAC, Tensor, RankDraw], Prediction]


def by_token(prediction: Prediction, rows: Tensor | None = None) -> Tensor:
    """Predictions (or other rows) at their raster places, [B, N, C]; NaN where nothing is predicted."""
    rows = prediction.pred if rows is None else rows
    out = torch.full((len(rows), N, rows.shape[-1]), float("nan"), dtype=rows.dtype)
    return out.scatter(1, prediction.token_ids[..., None].expand_as(rows), rows)


def pixels_of(tokens: Tensor) -> Tensor:
    """A bool [B, N] of tokens as a bool [B, 1, H, W] of pixels."""
    return tokens.view(-1, 1, 8, 8).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def plain_predict(method: RandSAC, images: Tensor, draw: RankDraw) -> Prediction:
    return method.predict(images, draw)


def leak(
    predict: Predict, method: RandSAC, image: Tensor, draw: RankDraw, most: int = N, *, dropped: bool = False
) -> float:
    """How far predictions of rank k move, over (at most ``most``) k, when all pixels of ranks >= k become loud noise.

    Image k of the batch has its ranks >= k replaced (and its dropped tokens when asked for); rows are compared in
    place, so that equal means bitwise equal.
    """
    ranks = draw.ranks[0]
    ks = torch.arange(0 if method.method.predict_first else 1, int(ranks.max()) + 1)
    ks = ks[torch.linspace(0, len(ks) - 1, min(most, len(ks))).round().long()]
    batch = RankDraw(None, ranks.expand(len(ks), -1).contiguous())
    clean = image.float().expand(len(ks), -1, -1, -1)
    noise = 2550 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    replaced = (batch.ranks >= ks[:, None]) | ((batch.ranks < 0) & dropped)
    noisy = torch.where(pixels_of(replaced), noise, clean)
    with torch.no_grad():
        before, after = (by_token(predict(method, pixels, batch)) for pixels in (clean, noisy))
    of_rank = batch.ranks == ks[:, None]
    return float((before - after)[of_rank].abs().max())


def encode_loop(method: RandSAC, tokens: Tensor, members: list[list[int]]) -> list[list[Tensor]]:
    """What the decoder may read of each encoder layer, segment by segment (the last segment is not encoded)."""
    blocks = method.encoder.blocks
    inputs: list[list[Tensor]] = [[] for _ in blocks]
    outputs: list[list[Tensor]] = [[] for _ in blocks]
    for tokens_of_rank in members[:-1]:
        x = tokens[tokens_of_rank]
        for index, module in enumerate(blocks):
            inputs[index].append(x)
            x = plain.block(module, x, torch.cat(inputs[index]))
            outputs[index].append(x)
    return outputs


def loop_path(method: RandSAC, image: Tensor, ranks: Tensor) -> dict[int, Tensor]:
    """Segment after segment, one image, float64, no mask: each sees what exists by then. Token -> prediction."""
    members = [torch.nonzero(ranks == k).flatten().tolist() for k in range(int(ranks.max()) + 1)]
    outputs = encode_loop(method, plain.embedded(method.encoder, image, 4), members)
    decoder = method.decoder
    seen: list[list[Tensor]] = [[] for _ in decoder.blocks]
    found = {}
    for k in range(0 if method.method.predict_first else 1, len(members)):
        y = decoder.pos_embed[0, members[k]].double()
        if decoder.mask_token is not None:
            y = y + decoder.mask_token[0].double()
        for index, module in enumerate(decoder.blocks):
            seen[index].append(y)
            if k == 0:
                memory = decoder.null_token[0].double()
            elif decoder.skip is None:
                memory = plain.layer_norm(method.encoder.norm, torch.cat(outputs[-1][:k]))
            else:
                memory = sum(decoder.skip[index, e].double() * torch.cat(outputs[e][:k]) for e in range(len(outputs)))
            y = plain.cross_block(module, y, torch.cat(seen[index]), memory)
        rows = plain.linear(decoder.head, plain.layer_norm(decoder.norm, y))
        found |= dict(zip(members[k], rows, strict=True))
    return found


def trained_without_gradient(method: nn.Module) -> list[str]:
    """Trained parameters that the last backward pass did not reach."""
    return [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
