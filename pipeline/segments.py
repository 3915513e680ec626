"""Segments, serialisations, ranks, masks and token selection: pure functions of tensors and per-sample keys.

Everything random here comes from ``stream``, the torch twin of ``pipeline.keys.stream``, so a draw depends on
nothing but its sample's key. Shapes: B images, N patch tokens in raster order, K segments.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.keys import GAMMA, MIX_1, MIX_2, TAGS


def _signed(value: int) -> int:
    """The int64 with the bits of a uint64; torch's int64 arithmetic wraps around like numpy's uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(MIX_2)
    return x ^ _shift(x, 31)


def _absorb(state: Tensor, value: Tensor | int) -> Tensor:
    return _mix(state + (value + 1) * _signed(GAMMA))


def stream(keys: Tensor, tag: str, counter: Tensor | int = 0) -> Tensor:
    """The ``counter``-th int64 of each key under ``tag``, equal to ``pipeline.keys.stream``; keys and counter broadcast."""
    tagged = _absorb(keys, torch.tensor(TAGS[tag], dtype=torch.int64))
    return _absorb(tagged, torch.as_tensor(counter, dtype=torch.int64))


def permutation(keys: Tensor, tag: str, size: int) -> Tensor:
    """A permutation of 0..size-1 for each key: int64 [B, size], the stable argsort of hashed integers."""
    return stream(keys[:, None], tag, torch.arange(size)).sort(dim=1, stable=True).indices


def split_tokens(keys: Tensor, num_tokens: int, num_visible: int) -> tuple[Tensor, Tensor]:
    """Random visible and masked token ids, [B, num_visible] and [B, N - num_visible]."""
    order = permutation(keys, "mask", num_tokens)
    return order[:, :num_visible].contiguous(), order[:, num_visible:].contiguous()


def uniform(keys: Tensor, tag: str, counter: Tensor) -> Tensor:
    """Uniform float64 in [0, 1) with 53 random bits; keys and counter broadcast as in ``stream``."""
    return _shift(stream(keys, tag, counter), 11).double() * 2.0**-53


def drop_path_keep(keys: Tensor, rates: Sequence[float]) -> Tensor | None:
    """Which residual branches each sample keeps: bool [L, 2, B] for L blocks of (attention, MLP); None when no rate is > 0."""
    if not any(rates):
        return None
    counters = torch.arange(2 * len(rates)).view(len(rates), 2, 1)
    return uniform(keys, "drop_path", counters) >= torch.tensor(rates, dtype=torch.float64)[:, None, None]


@lru_cache(maxsize=32)
def square_segments(grid: int, size: int) -> Tensor:
    """Segment of each token when a grid x grid image is cut in squares of size x size tokens: int64 [N], ids in raster order.

    Raises ValueError when ``size`` does not divide ``grid``.
    """
    if grid % size:
        raise ValueError(f"segments of {size} x {size} tokens do not tile a grid of {grid} x {grid}")
    band = torch.arange(grid, device="cpu") // size  # also while a model is built on the meta device
    return (band[:, None] * (grid // size) + band[None, :]).flatten()


def token_centres(grid: int) -> Tensor:
    """Row and column of each token's centre in units of tokens: float64 [2, N]."""
    place = torch.arange(grid, dtype=torch.float64) + 0.5
    return torch.stack([place.repeat_interleave(grid), place.repeat(grid)])


def nearest_gaussian(draws: Tensor, points: Tensor, grid: int, std: tuple[float, float]) -> Tensor:
    """Which of K Gaussians is nearest to each point by Mahalanobis distance (RandSAC, blobs): int64 [B, n].

    ``draws`` uniform [B, 4, K]: the means, anywhere in the image, and the standard deviations along rows and columns,
    between ``std`` x grid. ``points`` [2, n] or [B, 2, n]. All in float64, so that every machine agrees.
    """
    mean, deviation = draws[:, :2] * grid, (std[0] + (std[1] - std[0]) * draws[:, 2:]) * grid
    offset = (points[..., None, :] - mean[..., None]) / deviation[..., None]
    return offset.square().sum(dim=1).argmin(dim=1)


def blob_segments(keys: Tensor, grid: int, number: int, std: tuple[float, float]) -> Tensor:
    """Segment of each token, the cells of ``number`` random Gaussians: int64 [B, N], ids consecutive from 0.

    A Gaussian may win no token, so an image has between 2 and ``number`` segments; with only one it is drawn again.
    """
    points, counters = token_centres(grid), torch.arange(4 * number).view(4, number)
    segments = torch.zeros(len(keys), grid**2, dtype=torch.int64)
    todo = torch.arange(len(keys))
    while len(todo):
        found = nearest_gaussian(uniform(keys[todo, None, None], "blob", counters), points, grid, std)
        present = torch.zeros(len(todo), number, dtype=torch.int64).scatter_(1, found, 1)
        segments[todo] = (present.cumsum(dim=1) - 1).gather(1, found)
        todo, counters = todo[present.sum(dim=1) < 2], counters + 4 * number
    return segments


def blob_partition(
    keys: Tensor, segments: Tensor, grid: int, num_segments: int, number: int, std: tuple[float, float]
) -> Tensor:
    """Partition of each segment, the nearest of ``number`` further Gaussians to its centroid: int64 [B, num_segments].

    A function of whole segments, so that none lies in two partitions; a partition may stay empty. ``segments`` [B, N].
    """
    shape = len(keys), num_segments
    count = torch.zeros(shape, dtype=torch.float64).scatter_add_(1, segments, torch.ones(segments.shape).double())
    total = [torch.zeros(shape, dtype=torch.float64).scatter_add_(1, segments, axis.expand(segments.shape))
             for axis in token_centres(grid)]  # fmt: skip
    centroids = torch.stack(total, dim=1) / count.clamp(min=1)[:, None]
    counters = torch.arange(4 * number).view(4, number)
    return nearest_gaussian(uniform(keys[:, None, None], "partition", counters), centroids, grid, std)


def shuffled_segments(keys: Tensor, segments: Tensor) -> Tensor:
    """The same segment sizes with the tokens dealt at random: RandSAC's control without spatial coherence. [B, N]."""
    return segments.gather(1, permutation(keys, "shuffle", segments.shape[1]))


def segment_ranks(
    keys: Tensor, segments: Tensor, num_segments: int, *, raster: bool = False, partition: Tensor | None = None
) -> Tensor:
    """Rank of each token: int64 [B, N], 0..K-1 in the order of prediction; K is what an image really has of ``num_segments``.

    In the order of ids when ``raster``, else in random order, another for each key. With ``partition`` int64
    [B, num_segments] partitions are visited in random order; inside one, all its segments in random order before the
    next (RandSAC, hierarchical serialisation). ``segments``: int64 [B, N].
    """
    if raster:
        place = torch.arange(num_segments).expand(len(keys), -1)
    else:
        place = permutation(keys, "order", num_segments).argsort(dim=1)
    if partition is not None:
        part_place = permutation(keys, "segment", int(partition.max()) + 1).argsort(dim=1)
        place = part_place.gather(1, partition) * num_segments + place
    present = torch.zeros(len(keys), num_segments, dtype=torch.bool).scatter_(1, segments, True)
    last = int(place.max()) + 1  # ids without a token stand behind all others
    return place.where(present, last).argsort(dim=1, stable=True).argsort(dim=1).gather(1, segments)


def merge_prefix(keys: Tensor, ranks: Tensor) -> Tensor:
    """Make the first m segments one, m uniform in 1..K-1 for each image (prefix attention of AIM). Ranks [B, N]; -1 stays."""
    number = ranks.amax(dim=1) + 1
    merged = (uniform(keys, "prefix", torch.tensor(0)) * (number - 1)).long() + 1
    return torch.where(ranks < 0, ranks, (ranks - merged[:, None] + 1).clamp(min=0))


def drop_in_segments(keys: Tensor, ranks: Tensor, quota: Tensor) -> Tensor:
    """Keep ``quota[n]`` random tokens of each segment of n tokens; the others get rank -1 (ARVideo). Ranks [B, N]."""
    num_tokens = ranks.shape[1]
    shuffled = permutation(keys, "token_drop", num_tokens)
    rank, within = ranks.gather(1, shuffled).sort(dim=1, stable=True)
    size = _counts(ranks)
    position = torch.arange(num_tokens) - (size.cumsum(dim=1) - size).gather(1, rank)
    return ranks.scatter(1, shuffled.gather(1, within), rank.where(position < quota[size].gather(1, rank), -1))


def _counts(ranks: Tensor) -> Tensor:
    """Tokens of each rank, [B, K]; rank -1 is not counted."""
    counts = torch.zeros(len(ranks), int(ranks.max()) + 2, dtype=torch.int64)
    return counts.scatter_add_(1, ranks + 1, torch.ones_like(ranks))[:, 1:]


def segment_sizes(ranks: Tensor) -> tuple[int, ...] | None:
    """Tokens of each rank where all images agree, else None. ``ranks``: int64 [B, N]; -1 marks a dropped token.

    Raises ValueError for an image with one segment only (nothing to predict) or whose ranks are not consecutive from 0.
    """
    if int(ranks.min()) < -1:
        raise ValueError("ranks must be consecutive from 0 (or -1 for a dropped token)")
    counts, number = _counts(ranks), ranks.amax(dim=1) + 1
    if bool((number < 2).any()):
        raise ValueError("RandSAC needs at least two segments (K >= 2): with one there is nothing to predict")
    if not bool(((counts > 0).sum(dim=1) == number).all()):
        raise ValueError("ranks must be consecutive from 0: every segment needs a token")
    return tuple(counts[0].tolist()) if bool((counts == counts[:1]).all()) else None


class Layout(NamedTuple):
    """What RandSAC's encoder and decoder see. ``weight`` [B, n_t] is 0 for a query without loss.

    Encoder tokens ``source_ids`` [B, n_s] under ``source_mask``; queries ``target_ids`` [B, n_t] under ``target_mask``
    among themselves and ``memory_mask`` [..., n_t, n_s] to the encoder's tokens. Masks are bool, True may attend, shared
    [n, n] or of each image [B, 1, n, n]. Where the first segment is predicted, column 0 of the memory is the null token.
    """

    source_ids: Tensor
    target_ids: Tensor
    source_mask: Tensor
    target_mask: Tensor
    memory_mask: Tensor
    weight: Tensor


def rank_mask(query_ranks: Tensor, key_ranks: Tensor, *, strict: bool = False) -> Tensor:
    """Which keys a query may attend to: bool [..., Q, S], key rank <= query rank, or < when ``strict``.

    Raises ValueError when a query may attend to nothing: its attention would be undefined.
    """
    query, key = query_ranks[..., :, None], key_ranks[..., None, :]
    mask = key < query if strict else key <= query
    if not bool(mask.any(dim=-1).all()):
        raise ValueError("a query has no key to attend to: rank 0 cannot be predicted")
    return mask


@lru_cache(maxsize=64)
def block_masks(
    sizes: tuple[int, ...], device: torch.device, predict_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(source, target, memory) masks of rank-sorted tokens with these segment sizes; shared by all images.

    Source [n_s, n_s]: encoder tokens, ranks 0..K-2. Target [n_t, n_t]: decoder positions, ranks 1..K-1 (from 0 with
    ``predict_first``). Memory [n_t, n_s]: strictly earlier segments only; [n_t, 1 + n_s] with the null token, which
    rank 0 alone reads.
    """
    ranks = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    source, target = ranks[: len(ranks) - sizes[-1]], ranks if predict_first else ranks[sizes[0] :]
    if predict_first:
        memory = rank_mask(target, torch.cat([torch.tensor([-1]), source]), strict=True)
        memory[target > 0, 0] = False
    else:
        memory = rank_mask(target, source, strict=True)
    return rank_mask(source, source).to(device), rank_mask(target, target).to(device), memory.to(device)


def sorted_layout(ranks: Tensor, sizes: tuple[int, ...], *, predict_first: bool) -> Layout:
    """Images that agree on ``sizes``: tokens sorted by rank, so that one mask serves all; nothing unused is computed."""
    by_rank = ranks.sort(dim=1, stable=True).indices[:, ranks.shape[1] - sum(sizes) :]  # dropped tokens come first
    source, target = by_rank[:, : sum(sizes[:-1])], by_rank[:, 0 if predict_first else sizes[0] :]
    masks = block_masks(sizes, ranks.device, predict_first)
    return Layout(source, target, *masks, torch.ones_like(target, dtype=torch.float32))


def padded_layout(ranks: Tensor, num_tokens: int, *, predict_first: bool, shared: bool) -> Layout:
    """Segments of any sizes at one fixed shape: ``num_tokens`` tokens an image in encoder and decoder, kept ones first.

    Equal to leaving out the last segment of the encoder and the first of the decoder: nobody attends to the last; a
    rank-0 query reads its own rank only, is no key for others, and has no weight. Dropped tokens (rank -1) that fill up
    the shape see one another alone. ``shared``: all images have the first one's ranks, and one mask.
    """
    ids = (ranks < 0).int().sort(dim=1, stable=True).indices[:, :num_tokens]
    ranks = ranks.gather(1, ids)
    mine = ranks[0] if shared else ranks[:, None]
    query, key = mine[..., :, None], mine[..., None, :]
    seen = (key <= query) & ((key >= 0) | (query < 0))
    earlier = torch.where(query > 0, (key >= 0) & (key < query), key == query)
    if predict_first:
        memory = torch.cat([query == 0, earlier & (query != 0)], dim=-1)
        return Layout(ids, ids, seen, seen, memory, (ranks >= 0).float())
    among = torch.where(query > 0, (key > 0) & (key <= query), key == query)
    return Layout(ids, ids, seen, among, earlier, (ranks > 0).float())


def redundancy(tokens: Tensor, *, raw_mean: bool = False) -> Tensor:
    """How like all others each token is: the inner product with the mean of the unit tokens, fp32 [B, n].

    Equal to the row means of the cosine matrix (PCAE's public code). ``raw_mean``: the cosine with the mean of the raw
    tokens (the diagram in the paper). In fp32 whatever the precision of ``tokens`` [B, n, D]: in bf16 near-ties would be
    decided by rounding.
    """
    unit = F.normalize(tokens.float(), dim=-1, eps=1e-12)
    mean = F.normalize(tokens.float().mean(dim=1), dim=-1, eps=1e-12) if raw_mean else unit.mean(dim=1)
    return (unit * mean[:, None]).sum(dim=-1)


def keep_lowest(scores: Tensor, num_keep: int) -> Tensor:
    """Indices of the ``num_keep`` lowest of scores [B, n]: int64 [B, num_keep], ascending, ties by index.

    Raises ValueError unless 1 <= num_keep <= n.
    """
    if not 1 <= num_keep <= scores.shape[1]:
        raise ValueError(f"cannot keep {num_keep} of {scores.shape[1]} tokens")
    return scores.sort(dim=1, stable=True).indices[:, :num_keep]


def keep_least_redundant(tokens: Tensor, num_keep: int) -> Tensor:
    """Indices of the ``num_keep`` tokens least like the mean: int64 [B, num_keep], ascending redundancy, ties by index.

    Raises ValueError unless 1 <= num_keep <= n. No gradient flows through the choice.
    """
    return keep_lowest(redundancy(tokens.detach()), num_keep)


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Rows ``ids`` [B, n] of ``tokens`` [B, N, ...]."""
    index = ids.view(*ids.shape, *([1] * (tokens.dim() - 2))).expand(*ids.shape, *tokens.shape[2:])
    return tokens.gather(1, index)
