"""What the engines cost: time and memory of a whole training step of one process, beside a bare PyTorch loop.

The bare loop is what one writes without a trainer: the plain module, autocast in bf16 (nothing in fp32), the norm of the
gradient, fused AdamW, and the teacher's average where there is one. Another contestant is the same loop around torch's
DistributedDataParallel. Images and draw are always the same and lie on the device: no loader, no log.

All contestants stay on the device from the first round to the last, so that no round pays for building, and a round of each
meets the same clock and temperature. They are built and warmed up one after the other, and only one computes at a time:
what a contestant's first steps add at most to the memory that is allocated before it is built is its own peak. At rest
each holds its state: all of them on ViT-L with PCAE about 43 GiB, and the step at work needs activations and gradients
on top. When that is more than the device has, the run ends before any time is taken, and says so.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from time import process_time
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pipeline import metrics
from pipeline.bench.interleaved import Contestant, Figures, Progress, measure
from pipeline.bench.methods import random_images
from pipeline.config import Config, UserError, load_config
from pipeline.engine import build_engine
from pipeline.engine.torch import join_alone
from pipeline.keys import sample_key
from pipeline.methods import build_method
from pipeline.methods.common import Draw
from pipeline.optim import build_optimizer

BARE: Final = "bare"
TORCH_DDP: Final = "torch's DDP"
COMPILED: Final = "single, compiled"
# Contestants that are ours, by name: their settings of ``engine``.
ENGINES: Final[dict[str, dict[str, Any]]] = {
    "single": {"name": "single"},
    "ddp": {"name": "ddp"},
    "fsdp2": {"name": "fsdp2"},
    COMPILED: {"name": "single", "compile": True},
    "single, selective": {"name": "single", "checkpoint_layers": "selective"},
    "single, full": {"name": "single", "checkpoint_layers": "full"},
}
ZERO: Final[dict[str, dict[str, Any]]] = {
    "single": {"name": "single"},
    **{f"zero{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)},
}
GOALS: Final = dict.fromkeys(("single", "ddp", "fsdp2"), 1.02) | dict.fromkeys(("zero1", "zero2", "zero3"), 1.05)
IMAGENET: Final = ("vit_b", "vit_l", "vit_h")  # encoders with a recipe for every method
WARM_UP: Final = 4  # steps: compilation is in the first
STEPS: Final = 5  # of a contestant's turn
LR, MOMENTUM = 1e-4, 0.999
PROFILED: Final = 3  # steps
DEAREST: Final = 10  # kernels
GIB: Final = 2**30

Step = Callable[[], Tensor]  # a whole training step; its loss


@dataclass(frozen=True)
class Row:
    """A contestant: milliseconds a step (the fastest round's mean, and the median of all steps), A/A ratio, ratio to bare.

    Device time on a GPU, else CPU time. ``goal``: what ``to_bare`` should be at most; None where none is set.
    ``peak_gib``: memory at its most, state included; None on a CPU. ``recompiles`` after the first steps, of what compiles.
    """

    name: str
    ms_per_step: float
    median_ms: float
    a_over_a: float
    to_bare: float
    goal: float | None = None
    peak_gib: float | None = None
    recompiles: int | None = None

    def __str__(self) -> str:
        """One line of a table."""
        goal = "" if self.goal is None else f" (goal <= {self.goal:.2f})"
        peak = "" if self.peak_gib is None else f"   peak {self.peak_gib:.2f} GiB"
        recompiles = "" if self.recompiles is None else f"   {self.recompiles} recompiles"
        return (f"{self.name:<20}{self.ms_per_step:9.2f} ms a step, median {self.median_ms:9.2f}   A/A {self.a_over_a:.3f}   "
                f"to bare {self.to_bare:.3f}{goal}{peak}{recompiles}")  # fmt: skip


@dataclass(frozen=True)
class KernelRow:
    """A kernel of the single engine's step (an operator on a CPU): milliseconds a step and share of all kernels' time."""

    name: str
    ms_per_step: float
    share: float
    calls_per_step: float

    def __str__(self) -> str:
        """One line of a table; a long name is cut."""
        return (
            f"{self.ms_per_step:9.3f} ms a step  {self.share:6.1%}  {self.calls_per_step:7.1f} calls  {self.name[:90]}"
        )


class Meter:
    """A clock for ``interleave`` that counts the seconds of steps: by CUDA events, or this process's CPU time."""

    def __init__(self, device: torch.device) -> None:
        """Stands at 0; ``samples``: seconds of each step by name, of the rounds that count."""
        self.device, self.samples, self._total = device, dict[str, list[float]](), 0.0

    def __call__(self) -> float:
        """The seconds so far."""
        return self._total

    def run(self, name: str, step: Step, number: int) -> int:
        """A contestant's turn in round ``number``; the steps that were timed."""
        seconds = self._on_device(step) if self.device.type == "cuda" else self._on_cpu(step)
        self._total += sum(seconds)
        if number:
            self.samples.setdefault(name, []).extend(seconds)
        return STEPS

    def _on_device(self, step: Step) -> list[float]:
        step()  # the host is then ahead of the device, as it is in training
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]

    def _on_cpu(self, step: Step) -> list[float]:
        marks = [process_time()]
        for _ in range(STEPS):
            step()
            marks.append(process_time())
        return [after - before for before, after in pairwise(marks)]


def config(method: str, model: str, batch: int, precision: str) -> Config:
    """The method's ImageNet recipe for this encoder; CIFAR-10's with 4-pixel patches for an encoder that has none.

    Raises UserError for what no recipe knows.
    """
    changes = ["data.loader=synthetic", f"engine.precision={precision}", f"train.global_batch={batch}",
               "train.micro_batch=auto", f"data.num_samples={1000 * batch}", "run.dir=."]  # fmt: skip
    if model in IMAGENET:
        return load_config([f"imagenet/{method}_{model}"], changes)
    return load_config([f"cifar10/{method}"], [*changes, f"model.name={model}", "model.patch_size=4"])


def bare_step(cfg: Config, images: Tensor, draw: Draw, wrap: Callable[[nn.Module], nn.Module]) -> Step:
    """A step of the loop that one writes without a trainer, around ``wrap`` of the plain module."""
    device = images.device
    method = build_method(cfg, device)
    module, trained = wrap(method), [p for p in method.parameters() if p.requires_grad]
    optimizer, teacher = build_optimizer(method.named_parameters(), cfg.optim, cfg.shape.depth), method.build_teacher()
    average: list[Tensor] = []
    followed: list[Tensor] = []
    if teacher is not None:
        teacher = teacher.to_empty(device=device)
        encoder = dict(method.encoder.named_parameters())
        with torch.no_grad():
            for name, twin in teacher.named_parameters():
                twin.copy_(encoder[name])
        average, followed = zip(*((twin, encoder[name].detach()) for name, twin in teacher.named_parameters()
                                  if encoder[name].requires_grad), strict=True)  # fmt: skip

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.engine.precision == "bf16"):
            loss, logs = module(images, draw, teacher)
        loss.backward()
        norm = get_total_norm([parameter.grad for parameter in trained])
        if cfg.optim.clip is not None:
            clip_grads_with_norm_(trained, cfg.optim.clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = LR
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average:
            torch._foreach_lerp_(average, followed, 1 - MOMENTUM)
        return logs["loss"]

    return step


def engine_step(cfg: Config, images: Tensor, draw: Draw) -> Step:
    """A step of our engine, as the trainer makes it."""
    engine = build_engine(cfg, images.device)

    def step() -> Tensor:
        logs = engine.micro_step(images, draw, 1, True)
        engine.step(LR, cfg.optim.clip, MOMENTUM)
        return logs["loss"]

    return step


def builders(cfg: Config, device: torch.device, *, deepspeed: bool = False) -> dict[str, Callable[[], Step]]:
    """Every contestant by name, not yet built: torch's engines, or with ``deepspeed`` the stages of ZeRO."""
    batch = cfg.train.global_batch
    images = random_images(batch, cfg.data.image_size).to(device)
    # Made on the CPU, as in training: what is computed of it there goes with it.
    draw = build_method(cfg, "meta").draw(torch.from_numpy(sample_key(0, 0, np.arange(batch)))).to(device)

    def ours(settings: dict[str, Any]) -> Step:
        engine = cfg.engine.model_copy(update=settings)
        return engine_step(cfg.model_copy(update={"engine": engine}), images, draw)

    found: dict[str, Callable[[], Step]] = {
        BARE: lambda: bare_step(cfg, images, draw, lambda module: module),
        TORCH_DDP: lambda: bare_step(cfg, images, draw, DistributedDataParallel),
    }
    own = ZERO if deepspeed else ENGINES
    return found | {name: lambda settings=settings: ours(settings) for name, settings in own.items()}


@dataclass
class Held:
    """The contestants that are on the device: their steps, and their memory at its most in GiB (None on a CPU)."""

    device: torch.device
    steps: dict[str, Step] = field(default_factory=dict)
    peaks: dict[str, float | None] = field(default_factory=dict)
    graphs: int = 0  # compiled when all have had their first steps

    def take(self, name: str, build: Callable[[], Step]) -> None:
        """Build a contestant and make its first steps. Raises UserError when the device's memory runs out."""
        cuda = self.device.type == "cuda"
        gc.collect()
        before = torch.cuda.memory_allocated(self.device) if cuda else 0
        try:
            step = build()
            for number in range(WARM_UP):
                if cuda and number == 1:  # what compiling takes is not the step's
                    torch.cuda.reset_peak_memory_stats(self.device)
                step()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the device's memory ran out with {name}: it should hold all contestants together, and these and their step "
                f"take {before / GIB:.1f} GiB so far: {', '.join(self.steps) or 'none'}; take a smaller --model or --batch"
            ) from error
        self.peaks[name] = (torch.cuda.max_memory_allocated(self.device) - before) / GIB if cuda else None
        self.steps[name], self.graphs = step, compiled_graphs()


def _first_product(device: torch.device) -> None:
    """With it cuBLAS takes memory to work in, once for forward and backward passes: no contestant should have it in its peak."""
    some = torch.ones(8, 8, device=device, requires_grad=True)
    (some @ some).sum().backward()


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def dearest_kernels(step: Step, device: torch.device) -> list[KernelRow]:
    """The kernels on which three steps spend the most device time; on a CPU the operators with the most time of their own."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        for _ in range(PROFILED):
            step()
        if cuda:
            torch.cuda.synchronize(device)
    spent: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        # A range that someone named, such as FSDP's, spans kernels that are counted already.
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU) and not event.is_user_annotation:
            time_us = event.self_device_time_total if cuda else event.self_cpu_time_total
            before = spent.get(event.key, (0.0, 0))
            spent[event.key] = before[0] + time_us, before[1] + event.count
    whole = sum(time_us for time_us, _ in spent.values())
    dearest = sorted(spent.items(), key=lambda entry: -entry[1][0])[:DEAREST]
    return [KernelRow(name, us / (1e3 * PROFILED), us / whole, count / PROFILED) for name, (us, count) in dearest]


def compare(figures: Figures, meter: Meter, held: Held) -> list[Row]:
    """Rows of measured figures, each to the bare loop; the goals are for a GPU."""
    bare, recompiles = figures[BARE][0], compiled_graphs() - held.graphs
    cuda = held.device.type == "cuda"
    return [
        Row(name, 1e3 * seconds, 1e3 * median(meter.samples[name]), a_over_a, seconds / bare,
            GOALS.get(name) if cuda else None, held.peaks[name], recompiles if name == COMPILED else None)
        for name, (seconds, a_over_a) in figures.items()
    ]  # fmt: skip


@contextmanager
def group_of_one() -> Iterator[None]:
    """Inside, this process is in a process group; one that was made for it is taken down afterwards."""
    own = not dist.is_initialized()
    join_alone()
    try:
        yield
    finally:
        if own:
            dist.destroy_process_group()


def this_device() -> torch.device:
    """The current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_name() -> str:
    """What the steps run on, for the report."""
    return metrics.device_name(this_device())


def run(
    method: str = "pcae", model: str = "vit_l", *, batch: int = 32, precision: str = "bf16", rounds: int = 8,
    kernels: bool = False, deepspeed: bool = False, progress: Progress | None = None,
) -> list[Any]:  # fmt: skip
    """A ``Row`` for every contestant; with ``kernels`` also a ``KernelRow`` for the dearest ones of the single engine.

    ``rounds`` is at least 8; ``deepspeed``: see ``builders``. Raises UserError when no recipe has these settings, when the
    device's memory does not hold all contestants, or when the machine is too restless to tell.
    """
    device = this_device()
    cfg = config(method, model, batch, precision)
    with group_of_one():
        _first_product(device)
        held, meter = Held(device), Meter(device)

        def build() -> dict[str, Contestant]:
            for name, builder in builders(cfg, device, deepspeed=deepspeed).items():
                held.take(name, builder)
            return {name: lambda number, name=name: meter.run(name, held.steps[name], number) for name in held.steps}

        rows: list[Any] = compare(measure(build, rounds, progress, meter), meter, held)
        return [*rows, *(dearest_kernels(held.steps["single"], device) if kernels else [])]
