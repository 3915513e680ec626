"""What DeepSpeed's ZeRO holds and moves as ``pipeline.engine.deepspeed`` runs it, from shapes alone. No torch.

The formulas follow what DeepSpeed 0.19.8 allocates. Of the weights that compute, in the configuration's precision, a process
holds all (stages 1 and 2) or a part (3); of the fp32 ones that the optimizer moves, their moments and the average a part.
"""

from itertools import accumulate
from math import ceil
from typing import Final, NamedTuple

from pipeline.config import Config
from pipeline.memory import (
    FP32,
    Parameter,
    State,
    averaged,
    compute_bytes,
    layer_sizes,
    parameters,
    part,
    rate_scale,
    takes_decay,
)

REDUCED_AT_ONCE: Final = 500_000_000  # numbers; the bf16 optimizer of stage 1 knows no setting for it
REUSED: Final = 1_000_000_000  # numbers; a layer that stage 3 needs again within them stays gathered


class Zero(NamedTuple):
    """ZeRO over ``processes``. ``offload``: what the optimizer needs is on the host; ``offload_params``: stage 3's weights too."""

    stage: int
    processes: int
    offload: bool = False
    offload_params: bool = False


class Traffic(NamedTuple):
    """Bytes a process sends in a step: ``behind`` the passes, and ``after`` them, while nothing computes."""

    behind: float
    after: float


def groups(cfg: Config) -> list[list[Parameter]]:
    """The trained parameters as they share flat buffers: by whether the average follows them, by weight decay and rate."""
    followed = {item.name for item in averaged(cfg)}
    found: dict[tuple[bool, bool, float], list[Parameter]] = {}
    for item in parameters(cfg):
        if item.trained:
            apart = not takes_decay(item.name, item.shape, cfg.optim)
            kind = item.name not in followed, apart, rate_scale(item.name, cfg.shape.depth, cfg.optim)
            found.setdefault(kind, []).append(item)
    return [found[kind] for kind in sorted(found)]


def flat(items: list[Parameter], zero: Zero) -> int:
    """Numbers of a group on each process, padding included.

    Stage 3 fills up each parameter to a multiple of the processes, 1 and 2 the group to one of twice as many.
    """
    if zero.stage == 3:
        return sum(ceil(item.size / zero.processes) for item in items)
    return 2 * ceil(sum(item.size for item in items) / (2 * zero.processes))


def padding(cfg: Config, zero: Zero) -> int:
    """Numbers on all processes together that belong to no parameter, of each kind that is held in parts."""
    return sum(zero.processes * flat(group, zero) - sum(item.size for item in group) for group in groups(cfg))


def _touched(cfg: Config, processes: int) -> int:
    """Numbers of the parameters of which a process holds any, on the one that holds most: in fp32 their gradients stay whole."""
    counts = [0] * processes
    for group in groups(cfg):
        own = flat(group, Zero(1, processes))
        for item, end in zip(group, accumulate(item.size for item in group), strict=True):
            for rank in range((end - item.size) // own, (end - 1) // own + 1):
                counts[rank] += item.size
    return max(counts)


def _own_optimizer(cfg: Config, zero: Zero) -> bool:
    """Whether DeepSpeed takes its optimizer for bf16, with whole fp32 gradients that it reduces after the backward pass."""
    return zero.stage == 1 and cfg.engine.precision == "bf16"


def _gradients(cfg: Config, zero: Zero, own: int) -> tuple[int, int]:
    """Bytes on the GPU and on the host; ``own``: numbers in a process's part."""
    if zero.stage == 3:
        # On the host the part is there twice: as it is summed up, and as the optimizer takes it.
        return (0, 2 * FP32 * own) if zero.offload else (FP32 * own, 0)
    host = FP32 * own if zero.offload else 0
    if compute_bytes(cfg) == FP32:
        return 0 if zero.offload else FP32 * _touched(cfg, zero.processes), host
    return FP32 * own * (zero.processes if _own_optimizer(cfg, zero) else 1), host


def zero_state(cfg: Config, zero: Zero) -> tuple[State, State]:
    """The state of the process that holds most, on its GPU and on the host; ``weights`` are those that compute and the fp32 ones.

    Positions and all else that is not trained are held as the weights that compute are, and once more by rows in fp32.
    """
    size, whole = compute_bytes(cfg), 1 if zero.stage == 3 else zero.processes
    frozen = [item for item in parameters(cfg) if not item.trained]
    flats = [flat(group, zero) for group in groups(cfg)]
    followed = {item.name for item in averaged(cfg)}
    shared = sum(flat(group, zero) for group in groups(cfg) if group[0].name in followed)

    def still(items: list[Parameter]) -> int:
        return flat(items, zero) if zero.stage == 3 else sum(item.size for item in items)

    computing = size * (whole * sum(flats) + still(frozen))
    looking = [item for item in frozen if item.name.startswith("encoder.")] if followed else []
    teacher = size * (whole * shared + still(looking))
    master, moments, average = FP32 * sum(flats), 2 * FP32 * sum(flats), FP32 * shared
    on_gpu, on_host = _gradients(cfg, zero, sum(flats))
    rows = FP32 * part(frozen, zero.processes)
    if not zero.offload:
        return State(rows + master + computing, on_gpu, moments, average, teacher), State(0, 0, 0, 0, 0)
    if zero.offload_params and zero.stage == 3:
        return State(rows, on_gpu, 0, 0, 0), State(master + computing, on_host, moments, average, teacher)
    # Stages 1 and 2 cast a part on the host before they send it.
    cast = 0 if zero.stage == 3 else size * sum(flats)
    return State(rows + computing, on_gpu, 0, 0, teacher), State(master + cast, on_host, moments, average, 0)


def _reduced_copy(cfg: Config, zero: Zero) -> int:
    """Numbers that stage 1's bf16 optimizer copies at most to reduce whole groups at once; a group alone needs no copy."""
    largest, bucket = 0, list[int]()
    for group in [*groups(cfg), []]:
        if not group or sum(bucket) > REDUCED_AT_ONCE:
            largest = max(largest, sum(bucket) if len(bucket) > 1 else 0)
            bucket = []
        bucket.append(zero.processes * flat(group, zero))
    return largest


def _gathered(cfg: Config) -> int:
    """Numbers that stage 3 holds gathered at most: all weights unless they are over ``REUSED`` / 2, and a part of the teacher."""
    ahead = cfg.engine.deepspeed.prefetch_bucket_size
    rest, layers = layer_sizes(parameters(cfg))
    count = min(rest + sum(layers), REUSED // 2 + rest + 2 * max(layers) + ahead)
    if averaged(cfg):
        rest, layers = layer_sizes([item for item in parameters(cfg) if item.name.startswith("encoder.")])
        count += min(rest + sum(layers), rest + 2 * max(layers) + ahead)
    return count


def zero_passing(cfg: Config, zero: Zero, *, accumulates: bool) -> tuple[int, int]:
    """Bytes that come and go in a step: beside the activations, and after the backward pass, when those are gone."""
    size, settings = compute_bytes(cfg), cfg.engine.deepspeed
    trained = sum(item.size for item in parameters(cfg) if item.trained)
    bucket, filled = settings.reduce_bucket_size, min(settings.reduce_bucket_size, trained)
    if _own_optimizer(cfg, zero):
        return size * trained, size * trained + FP32 * _reduced_copy(cfg, zero)
    if zero.stage == 3:
        # The bucket is there from the start; gradients are put in the processes' order in a copy.
        return FP32 * (bucket + filled) + size * _gathered(cfg), 0
    staged = FP32 if zero.stage == 1 else size
    # A full bucket is flattened, and cast where it is not fp32.
    reduced = staged * filled + (FP32 * filled if staged < FP32 else 0)
    waiting = 0
    if accumulates and size == FP32:
        waiting = FP32 * (trained if zero.stage == 1 else _touched(cfg, zero.processes))
    return (1 + settings.overlap_comm) * staged * bucket + reduced + waiting, 0


def zero_traffic(cfg: Config, zero: Zero, num_micro: int) -> Traffic:
    """Over the network. Stages 1 and 2 all-reduce gradients in fp32, once or each micro-batch, then gather what was updated."""
    size, share = compute_bytes(cfg), 1 - 1 / zero.processes
    own = parameters(cfg)
    trained, whole = sum(item.size for item in own if item.trained), sum(item.size for item in own)
    teacher = sum(item.size for item in averaged(cfg))
    if zero.stage == 3:
        again = max(0, whole - REUSED // 2)
        return Traffic(share * num_micro * (size * (whole + again + teacher) + FP32 * trained), 0)
    reduced, gathered = 2 * FP32 * trained * share, size * (trained + teacher) * share
    if _own_optimizer(cfg, zero):
        return Traffic(0, reduced + gathered)
    return Traffic(reduced * (num_micro if zero.stage == 2 else 1), gathered)


def offload_bytes(cfg: Config, zero: Zero, num_micro: int) -> int:
    """Bytes that a process and its host exchange in a step, both ways together; 0 without offload.

    Down go fp32 gradients, up the updated weights and the teacher's. Stage 3 sums gradients up on the host, over the GPU: each
    micro-batch but the first takes them up and down again. With ``offload_params`` parts go up whenever they are gathered.
    """
    if not zero.offload:
        return 0
    size, own = compute_bytes(cfg), sum(flat(group, zero) for group in groups(cfg))
    teacher = sum(flat([item], zero) for item in averaged(cfg))
    down = FP32 * own * (1 if zero.stage < 3 else 2 * num_micro)
    if zero.offload_params and zero.stage == 3:
        return down + size * (own + teacher) * num_micro
    return down + size * (own + teacher)


def swap_bytes(cfg: Config) -> int:
    """Bytes of the files that all processes of ``engine.offload=nvme`` keep: weights in fp32 and two moments."""
    return 3 * FP32 * sum(parameter.size for parameter in parameters(cfg) if parameter.trained)
