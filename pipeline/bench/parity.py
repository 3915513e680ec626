"""Whether every engine computes the same: loss, gradient norm, average and first weights beside a single process's.

All cases of a world size run in one group of processes. The settings are such that a fault shows: accumulation, an
average that moves a tenth of the way each step, a constant rate, a clip that bites, a loss that moves.
"""

import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import Config, UserError, load_config

METHODS: Final = ("mae", "pcae", "randsac", "finetune")
# name: (processes, settings)
ENGINES: Final[dict[str, tuple[int, dict[str, Any]]]] = {
    "single": (1, {"engine.name": "single"}),
    "ddp2": (2, {"engine.name": "ddp"}),
    "ddp4": (4, {"engine.name": "ddp"}),
    "fsdp2-2": (2, {"engine.name": "fsdp2"}),
    "fsdp2-2-ckpt": (2, {"engine.name": "fsdp2", "engine.checkpoint_layers": "full"}),
    "fsdp2-4": (4, {"engine.name": "fsdp2"}),
    "hsdp2x2": (4, {"engine.name": "hsdp", "engine.shard_size": 2}),
    **{
        f"zero{stage}-{world}": (world, {"engine.name": "deepspeed", "engine.zero_stage": stage})
        for stage, world in ((1, 2), (2, 2), (3, 2), (2, 3), (1, 4), (3, 4))
    },
    "zero2-2-cpu": (2, {"engine.name": "deepspeed", "engine.zero_stage": 2, "engine.offload": "cpu"}),
    "zero3-2-cpu": (
        2,
        {"engine.name": "deepspeed", "engine.zero_stage": 3, "engine.offload": "cpu", "engine.offload_params": True},
    ),
}
SETTINGS: Final = {
    "run.dir": "parity", "model.name": "vit_p", "data.loader": "synthetic", "data.image_size": 32, "data.threads": 1,
    "model.drop_path": 0.1,
}  # fmt: skip
DECODER: Final = {"method.decoder_depth": 1, "method.decoder_width": 96, "method.decoder_heads": 3}
OF_METHOD: Final[dict[str, dict[str, Any]]] = {
    "mae": DECODER, "pcae": {"optim.ema": 0.9, **DECODER},
    "randsac": {"method.segment_size": 2, "method.partition_size": 2, **DECODER},
    "finetune": {"method.num_classes": 10, "method.smoothing": 0.1, "method.drop_ratio": 0.3, "method.erase": 0.25,
                 "optim.layer_decay": 0.75, "optim.ema": 0.9},
}  # fmt: skip
LR, CLIP, MOMENTUM, NUM_MICRO, BATCH = 1e-3, 0.5, 0.9, 2, 8
PRECISIONS: Final = ("fp32", "bf16")


class Bars(NamedTuple):
    """Relative: loss and gradient norm of any step, the average's way of any tensor, the prediction after all steps."""

    loss: float
    norm: float
    ema: float
    pred: float


EXACT: Final = Bars(1e-5, 1e-4, 1e-3, 1e-3)
ROUNDED: Final = Bars(2e-2, 2e-2, 0.2, 0.2)
# Steps in which bf16 engines are equal too; later weights that differ by 1e-7 round apart and that grows. ZeRO sums the
# gradients of micro-batches in another order: its first weights that were updated differ by as much.
EARLY: Final = 2
EARLY_ZERO: Final = 1
# How much it grows is the method's own affair: PCAE's teacher chooses tokens, and chooses others. So copies of a bf16
# reference whose first weights are moved by the least that fp32 knows say how far apart equal engines may come. (Of 32 of
# PCAE's on two processes 6 were past 2e-2 in the loss after 20 steps.) The next one is farther than four others with a
# chance of one in five, hence the factor: with it none of these 32 was too far in loss or norm, whichever the four were.
SHAKES: Final = 4
FACTOR: Final = 2.0
# A reference that moves by more is none: twice of it would let a fault pass (a gradient divided twice halves the norm).
STEADY: Final = Bars(0.1, 0.1, 0.4, 0.4)


@dataclass(frozen=True)
class Case:
    """A method under an engine; ``mutation`` breaks it on purpose (see ``mutated``), ``shake`` numbers a shaken copy."""

    method: str
    engine: str
    precision: str = "fp32"
    mutation: str | None = None
    shake: int | None = None

    @property
    def name(self) -> str:
        """A file name."""
        shaken = "" if self.shake is None else f"shaken{self.shake}"
        return "_".join(part for part in (self.method, self.engine, self.precision, self.mutation, shaken) if part)

    def config(self, global_batch: int = BATCH) -> Config:
        """Its settings; the micro-batch is such that every rank accumulates."""
        world, engine = ENGINES[self.engine]
        settings = SETTINGS | {"method.name": self.method, "train.steps": 1, "engine.precision": self.precision}
        settings |= OF_METHOD[self.method] | engine
        settings |= {"train.global_batch": global_batch, "train.micro_batch": global_batch // world // NUM_MICRO}
        return load_config([], [f"{key}={value}" for key, value in settings.items()])


@dataclass(frozen=True)
class Trace:
    """What a case did: per step loss and gradient norm; sha256 of its first weights; the average before and after.

    ``seen``: what it predicts for two images at the end [2, T, C], the pixels of its figure, and their features [2, D].
    """

    losses: list[float]
    norms: list[float]
    initial: str
    ema: dict[str, Tensor]
    first_ema: dict[str, Tensor]
    seen: dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """How far a case is from its reference, as in ``Bars``, and how far it may be."""

    case: str
    reference: str
    loss: float
    norm: float
    ema: float
    pred: float
    same_start: bool
    passed: bool
    bars: Bars

    def __str__(self) -> str:
        """A line of the table."""
        verdict = "ok" if self.passed else "DIFFERS"
        start = "same start" if self.same_start else "shaken" if "_shaken" in self.case else "ANOTHER START"
        return (f"{self.case:28s} to {self.reference:6s}  loss {self.loss:8.1e}  grad_norm {self.norm:8.1e}  ema {self.ema:8.1e}  "
                f"pred {self.pred:8.1e}  {start}  {verdict}")  # fmt: skip


@contextmanager
def mutated(mutation: str | None, engine: Any) -> Iterator[None]:
    """Inside, ``engine`` has a fault that the table must show: no_ema, divided_twice or local_norm."""
    from pipeline.engine import torch as module

    step, micro_step, norms = engine.step, engine.micro_step, module.gradient_norms
    if mutation == "no_ema":
        engine.step = lambda lr, clip, momentum: step(lr, clip, 1.0)
    elif mutation == "divided_twice":
        engine.micro_step = lambda images, draw, num, last: micro_step(images, draw, num * num, last)
    elif mutation == "local_norm":
        module.gradient_norms = lambda parts, shards: norms(parts, None)
    elif mutation is not None:
        raise ValueError(f"there is no mutation {mutation!r}")
    try:
        yield
    finally:
        engine.step, engine.micro_step, module.gradient_norms = step, micro_step, norms


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the whole tensors; all ranks must call it."""
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for name, t in tensors.items()}


@torch.no_grad()
def shake(engine: Any, number: int) -> None:
    """Move every weight, and the average with it, to the next fp32 number above or below, as coin ``number`` falls."""
    state = engine.state()
    for name in state:
        kind, _, parameter = name.partition(".")
        if kind in ("model", "ema"):
            local = state[name].to_local() if hasattr(state[name], "to_local") else state[name]
            coin = np.random.default_rng([number, *parameter.encode()]).choice([-np.inf, np.inf], local.shape)
            local.copy_(torch.nextafter(local, torch.from_numpy(coin).to(local.dtype)))
    engine.load(state)


def run_case(case: Case, steps: int) -> Trace:
    """Train a case in this process group; all its ranks return the same."""
    from pipeline import order
    from pipeline.engine import build_engine
    from pipeline.launch import Portion, World
    from pipeline.runs import open_images
    from pipeline.steps import update

    cfg, world = case.config(), World(dist.get_rank(), dist.get_world_size())
    engine, loader, portion = (
        build_engine(cfg, torch.device("cpu")),
        open_images(cfg, "train", augment=True),
        Portion.of(cfg, world),
    )
    if case.shake is not None:
        shake(engine, case.shake)
    digest = hashlib.sha256()
    for name, value in sorted(engine.full_params().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    average = lambda: whole({n: t for n, t in engine.state().items() if n.startswith("ema.")})  # noqa: E731
    first, losses, norms = average(), list[float](), list[float]()
    epochs = order.run_order(cfg.train.seed, 0, steps, loader.num_samples, cfg.train.global_batch)
    with loader.batches(epochs, None, portion.samples) as batches, mutated(case.mutation, engine):
        for batch in batches:
            scalars = update(engine, batch, portion, LR, CLIP, MOMENTUM)
            loss = scalars["loss"].clone()
            dist.all_reduce(loss)
            losses.append(float(loss) / world.size)
            norms.append(float(scalars["grad_norm"]))
    with loader.batches(iter([(0, np.arange(2))])) as batches:
        batch = next(batches)
    loader.close()
    asked = batch.images, engine.method.draw(batch.keys, labels=batch.labels)
    figure = torch.from_numpy(np.array(engine.call("figure", *asked)))
    seen = {"pred": engine.call("predict", *asked).pred.contiguous(), "figure": figure}
    seen["features"] = engine.call("features", *asked).contiguous()
    return Trace(losses, norms, digest.hexdigest(), average(), first, seen)


def _work(rank: int, size: int, folder: str, cases: list[Case], steps: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{size}", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    for case in cases:
        trace = run_case(case, steps)
        if rank == 0:
            parts = {"last": trace.ema, "first": trace.first_ema, "seen": trace.seen}
            tensors = {f"{part}.{name}": value for part, some in parts.items() for name, value in some.items()}
            save_file(tensors, f"{folder}/{case.name}.safetensors")
            record = {"losses": trace.losses, "norms": trace.norms, "initial": trace.initial}
            Path(f"{folder}/{case.name}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


def trace_cases(
    cases: Sequence[Case], steps: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[Case, Trace]:
    """Run cases, one group of processes for each world size; ``progress`` gets (cases done, all cases)."""
    size_of = lambda case: ENGINES[case.engine][0]  # noqa: E731
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for size, some in itertools.groupby(sorted(cases, key=size_of), size_of):
            args = size, folder, list(some), steps
            group = mp.start_processes(_work, args, size, join=False, start_method="spawn")
            while not group.join(timeout=1.0):
                progress(len(list(Path(folder).glob("*.json"))), len(cases))
        for case in cases:
            record = json.loads(Path(f"{folder}/{case.name}.json").read_text())
            tensors = load_file(f"{folder}/{case.name}.safetensors")
            parts = ({k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
                     for part in ("last", "first", "seen"))  # fmt: skip
            found[case] = Trace(record["losses"], record["norms"], record["initial"], *parts)
    return found


def _without_keys(name: str, value: Tensor) -> Tensor:
    """Key biases of attention have no true gradient: Adam makes steps of rounding noise there."""
    if not name.endswith(("qkv.bias", "kv.bias")):
        return value
    third = value.chunk(3) if name.endswith("qkv.bias") else value.chunk(2)
    return torch.cat([third[0], third[-1]]) if name.endswith("qkv.bias") else third[-1]


def _worst(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def reference(case: Case) -> Case:
    """What a case is held against: a single process; in bf16, which rounds otherwise on another number of them, ddp on as many."""
    size = ENGINES[case.engine][0]
    if case.shake is not None:
        return replace(case, shake=None)
    if case.precision == "bf16" and case.engine != f"ddp{size}" and size > 1:
        return Case(case.method, f"ddp{size}", case.precision)
    return Case(case.method, "single", case.precision)


def shaken(case: Case) -> list[Case]:
    """The copies of a case's reference that say how far apart equal engines come; in fp32 none."""
    return [replace(reference(case), shake=i) for i in range(SHAKES)] if case.precision == "bf16" else []


def differences(found: Trace, expected: Trace) -> Bars:
    """How far two cases are apart over all steps."""
    distance = 0.0
    for name in expected.ema:
        a, b, start = (_without_keys(name, tensors[name]) for tensors in (found.ema, expected.ema, expected.first_ema))
        distance = max(distance, float((a - b).norm() / (b - start).norm()))
    pred = float((found.seen["pred"] - expected.seen["pred"]).norm() / expected.seen["pred"].norm())
    return Bars(_worst(found.losses, expected.losses), _worst(found.norms, expected.norms), distance, pred)


def bars_of(case: Case, expected: Trace, copies: Sequence[Trace]) -> Bars:
    """How far a case may be from its reference, of which there are shaken copies."""
    if case.precision == "fp32":
        return EXACT
    moved = [differences(copy, expected) for copy in copies]
    return Bars(*(max(bar, *(FACTOR * m for m in ms)) for bar, *ms in zip(ROUNDED, *moved, strict=True)))


def compare(case: Case, traces: Mapping[Case, Trace]) -> Row:
    """A case beside its reference; ``traces`` has it, its reference and the reference's shaken copies."""
    found, expected = traces[case], traces[reference(case)]
    if case.shake is not None:
        bars = STEADY
    else:
        bars = bars_of(case, expected, [traces[copy] for copy in shaken(case)])
    figures, same = differences(found, expected), found.initial == expected.initial
    passed = same is (case.shake is None) and all(value <= bar for value, bar in zip(figures, bars, strict=True))
    if case.shake is None and reference(case).engine != "single":
        steps = EARLY_ZERO if case.engine.startswith("zero") else EARLY
        pairs = (found.losses, expected.losses), (found.norms, expected.norms)
        early = (_worst(a[:steps], b[:steps]) for a, b in pairs)
        passed = passed and all(value <= bar for value, bar in zip(early, EXACT[:2], strict=True))
    return Row(case.name, reference(case).engine, *figures, same, passed, bars)


def require_telling(case: Case, trace: Trace) -> None:
    """Raises UserError when the run of a single process would hide a fault: a loss that stays, or a clip that never bites."""
    moved = abs(trace.losses[-1] / trace.losses[0] - 1)
    clipped = sum(norm > CLIP for norm in trace.norms)
    if moved < 0.05 or 2 * clipped < len(trace.norms):
        raise UserError(f"{case.name}: tells nothing: the loss moved by {moved:.1%} (5 % at least) and {clipped} of "
                        f"{len(trace.norms)} steps were clipped (half at least)")  # fmt: skip


def choose_engines(names: str) -> list[str]:
    """Engines by their names with commas between; all for every one that shares the batch evenly. Raises UserError."""
    known = [name for name, (world, _) in ENGINES.items() if BATCH % world == 0]
    chosen = known if names == "all" else names.split(",")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise UserError(f"--engines {names}: there is no {', '.join(unknown)}; known are {', '.join(known)}")
    return chosen


def run(steps: int, engines: Sequence[str], progress: Callable[[int, int], None]) -> list[Row]:
    """The table: every method and precision under these engines. Raises UserError when it would tell nothing."""
    chosen = [Case(m, e, p) for m in METHODS for e in dict.fromkeys(("single", *engines)) for p in PRECISIONS]
    asked = dict.fromkeys([*map(reference, chosen), *chosen])  # a reference is held against its own
    copies = [copy for case in asked if case.engine != "single" for copy in shaken(case)]
    traces = trace_cases(list(dict.fromkeys([*asked, *copies])), steps, progress)
    rows = []
    for case, trace in traces.items():
        if case == reference(case):
            require_telling(case, trace)
        else:
            rows.append(compare(case, traces))
    return rows
