"""Segments, serialisations, ranks, masks and token selection: pure functions of tensors and per-sample keys.

Everything random here comes from ``stream``, the torch twin of ``pipeline.keys.stream``, so a draw depends on
nothing but its sample's key. Shapes: B images, N patch tokens in raster order, K segments.
"""

from collections.abc import Sequence
from functools import lru_cache

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


def permutation(keys: Tensor, tag: str, size: int, first_counter: int = 0) -> Tensor:
    """A permutation of 0..size-1 for each key: int64 [B, size], the stable argsort of hashed integers."""
    counters = torch.arange(first_counter, first_counter + size)
    return stream(keys[:, None], tag, counters).sort(dim=1, stable=True).indices


def split_tokens(keys: Tensor, num_tokens: int, num_visible: int) -> tuple[Tensor, Tensor]:
    """Random visible and masked token ids, [B, num_visible] and [B, N - num_visible]."""
    order = permutation(keys, "mask", num_tokens)
    return order[:, :num_visible].contiguous(), order[:, num_visible:].contiguous()


def drop_path_keep(keys: Tensor, rates: Sequence[float]) -> Tensor | None:
    """Which residual branches each sample keeps: bool [L, 2, B] for L blocks of (attention, MLP); None when no rate is > 0."""
    if not any(rates):
        return None
    counters = torch.arange(2 * len(rates)).view(len(rates), 2, 1)
    uniform = _shift(stream(keys, "drop_path", counters), 11).double() * 2.0**-53
    return uniform >= torch.tensor(rates, dtype=torch.float64)[:, None, None]


@lru_cache(maxsize=32)
def square_segments(grid: int, size: int) -> Tensor:
    """Segment of each token when a grid x grid image is cut in squares of size x size tokens: int64 [N], ids in raster order.

    Raises ValueError when ``size`` does not divide ``grid``.
    """
    if grid % size:
        raise ValueError(f"segments of {size} x {size} tokens do not tile a grid of {grid} x {grid}")
    band = torch.arange(grid, device="cpu") // size  # also while a model is built on the meta device
    return (band[:, None] * (grid // size) + band[None, :]).flatten()


def hierarchical_ranks(keys: Tensor, segments: Tensor, partition: Tensor) -> Tensor:
    """Rank of each token: int64 [B, N], 0..K-1 in the order of prediction, another order for each key.

    Partitions are visited in random order; inside one, all its segments in random order before the next
    (RandSAC, hierarchical serialisation). ``segments``: int64 [N], ids 0..K-1; ``partition``: int64 [K].
    """
    num_segments, num_parts = len(partition), int(partition.max()) + 1
    part_place = permutation(keys, "segment", num_parts).argsort(dim=1)
    within = permutation(keys, "order", num_segments).argsort(dim=1)
    place = part_place[:, partition] * num_segments + within
    rank_of_segment = place.argsort(dim=1).argsort(dim=1)
    return rank_of_segment[:, segments]


def segment_sizes(ranks: Tensor) -> tuple[int, ...]:
    """Tokens of each rank, the same for all images. ``ranks``: int64 [B, N].

    Raises ValueError when there is one segment only (nothing to predict), when ranks are not consecutive from 0,
    or when the images of the batch disagree.
    """
    num_segments = int(ranks.max()) + 1
    counts = F.one_hot(ranks, num_segments).sum(dim=1)
    if num_segments < 2:
        raise ValueError("RandSAC needs at least two segments (K >= 2): with one there is nothing to predict")
    if not bool((counts > 0).all()) or int(ranks.min()) < 0:
        raise ValueError("ranks must be consecutive from 0: every segment needs a token")
    if not bool((counts == counts[:1]).all()):
        raise ValueError("all images of a batch must have the same number of tokens at each rank")
    return tuple(counts[0].tolist())


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
def block_masks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(source, target, memory) masks of rank-sorted tokens with these segment sizes; shared by all images.

    Source [n_s, n_s]: encoder tokens, ranks 0..K-2. Target [n_t, n_t]: decoder positions, ranks 1..K-1. Memory
    [n_t, n_s]: strictly earlier segments only.
    """
    ranks = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    source, target = ranks[: len(ranks) - sizes[-1]], ranks[sizes[0] :]
    masks = rank_mask(source, source), rank_mask(target, target), rank_mask(target, source, strict=True)
    return masks[0].to(device), masks[1].to(device), masks[2].to(device)


def redundancy(tokens: Tensor) -> Tensor:
    """How like all others each token is: the inner product with the mean of the unit tokens, fp32 [B, n].

    Equal to the row means of the cosine matrix. In fp32 whatever the precision of ``tokens`` [B, n, D]: in bf16
    near-ties would be decided by rounding.
    """
    unit = F.normalize(tokens.float(), dim=-1, eps=1e-12)
    return (unit * unit.mean(dim=1, keepdim=True)).sum(dim=-1)


def keep_least_redundant(tokens: Tensor, num_keep: int) -> Tensor:
    """Indices of the ``num_keep`` tokens least like the mean: int64 [B, num_keep], ascending redundancy, ties by index.

    Raises ValueError unless 1 <= num_keep <= n. No gradient flows through the choice.
    """
    if not 1 <= num_keep <= tokens.shape[1]:
        raise ValueError(f"cannot keep {num_keep} of {tokens.shape[1]} tokens")
    with torch.no_grad():
        return redundancy(tokens).sort(dim=1, stable=True).indices[:, :num_keep]


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Rows ``ids`` [B, n] of ``tokens`` [B, N, ...]."""
    index = ids.view(*ids.shape, *([1] * (tokens.dim() - 2))).expand(*ids.shape, *tokens.shape[2:])
    return tokens.gather(1, index)
