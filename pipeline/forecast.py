"""`patchmill estimate`: what a run will take, in words. Counts are exact; fits, times and the advice are predictions. No torch."""

from dataclasses import dataclass
from typing import Final

from pipeline.config import Config
from pipeline.costs import Flops
from pipeline.estimate import flops_per_image
from pipeline.memory import Activations, Checkpointing, State, activations, averaged, parameters, state
from pipeline.order import Plan
from pipeline.planner import GIB, USED, Advice, Machine, advise, largest_batch, local_batch, warnings

IMAGENET: Final = 1_281_167
IMAGE_BYTES: Final = 50_000  # a JPEG of 512 px in quality 90
CORE_IMAGES_S: Final = 860  # what a core decodes, as FFCV's authors publish it
MEGA: Final = 1e6


@dataclass(frozen=True)
class Parameters:
    """Numbers in parameters; ``averaged`` are those that the teacher's average follows."""

    encoder: int
    decoder: int
    trained: int
    averaged: int

    @property
    def total(self) -> int:
        """Encoder and decoder."""
        return self.encoder + self.decoder


def count_parameters(cfg: Config) -> Parameters:
    """Sizes of the configured method."""
    own = parameters(cfg)
    encoder = sum(p.size for p in own if p.name.startswith("encoder."))
    total = sum(p.size for p in own)
    trained = sum(p.size for p in own if p.trained)
    return Parameters(encoder, total - encoder, trained, sum(p.size for p in averaged(cfg)))


@dataclass(frozen=True)
class Fit:
    """Activations an image under a checkpointing, and the largest micro-batch in one step beside the advised engine's state."""

    checkpointing: Checkpointing
    activations: Activations
    micro_batch: int


def _state_line(name: str, held: State) -> str:
    amounts = (held.weights, held.gradients, held.moments, held.average, held.teacher, held.total)
    return f"  {name:<12}" + "".join(f"{amount / GIB:>11.3f}" for amount in amounts)


@dataclass(frozen=True)
class Forecast:
    """What a configuration takes on a machine; ``str()`` is the report. ``assumed``: the number of samples is not known."""

    cfg: Config
    machine: Machine
    gpu_name: str
    samples: int
    assumed: bool
    steps: int
    parameters: Parameters
    flops: Flops
    states: dict[str, State]
    fits: list[Fit]
    advice: Advice
    warnings: list[str]

    def _counts(self) -> list[str]:
        cfg, own = self.cfg, self.parameters
        batch = cfg.train.global_batch
        run = self.flops.step * batch * self.steps
        unknown = " (unknown here: ImageNet's number is assumed)" if self.assumed else ""
        return [
            f"{cfg.method.name} {cfg.model.name}, {cfg.data.image_size} px, {cfg.engine.precision}",
            f"parameters   encoder {own.encoder / MEGA:.2f} M, decoder {own.decoder / MEGA:.2f} M, total {own.total / MEGA:.2f} M; "
            f"trained {own.trained / MEGA:.2f} M, averaged {own.averaged / MEGA:.2f} M",
            f"FLOPs        {self.flops.forward / 1e9:.1f} G forward and {self.flops.step / 1e9:.1f} G a step for an image, "
            f"{run:.3g} the run",
            f"run          {self.steps:,} steps of {batch} images; {self.samples:,} samples{unknown}",
        ]

    def _memory(self) -> list[str]:
        lines = [f"state        GiB a process, the largest of {self.machine.gpus}"]
        heads = ("weights", "gradients", "moments", "average", "teacher", "total")
        lines.append(f"  {'':<12}" + "".join(f"{head:>11}" for head in heads))
        lines += [_state_line(name, held) for name, held in self.states.items()]
        lines.append(f"activations  MiB an image kept for the backward pass; predicted largest micro-batch with "
                     f"{self.advice.layout.engine} in {USED:.0%} of {self.machine.gpu.memory_gib:g} GiB")  # fmt: skip
        lines.append(f"  {'checkpoint_layers':<20}{'MiB':>11}{'images':>11}")
        for fit in self.fits:
            lines.append(f"  {fit.checkpointing!s:<20}{fit.activations.kept / 2**20:>11.2f}{fit.micro_batch:>11,}")
        return lines

    def _time(self) -> list[str]:
        machine, step = self.machine, self.advice.step
        if step is None:
            return []
        hours = step.total * self.steps / 3600
        rate = self.cfg.train.global_batch / step.total
        return [
            f"time         predicted at a stated MFU of {machine.mfu:.0%}: {1e3 * step.total:.1f} ms a step, efficiency "
            f"{step.efficiency:.0%}; {1e3 * step.compute:.1f} ms at that MFU,",
            f"             {1e3 * step.exposed:.1f} waiting for the network, {1e3 * step.update:.1f} optimizer, "
            f"and not under {1e3 * step.launch:.1f} to start the kernels, uncompiled",
            f"             predicted {hours:,.1f} hours, {hours * machine.gpus:,.1f} GPU-hours",
            f"input        predicted {rate:,.0f} images/s in all, {rate * IMAGE_BYTES / MEGA:,.0f} MB/s at 50 kB an image, "
            f"{rate / CORE_IMAGES_S:,.1f} cores at {CORE_IMAGES_S} images/s (as FFCV publishes)",
        ]

    def __str__(self) -> str:
        """The report."""
        machine = self.machine
        step, words = self.advice.step, self.advice.layout.settings(machine)
        words += f" train.micro_batch={step.micro_batch}" if step else ""
        advice = [f"engine       predicted best on {machine.gpus} x {self.gpu_name}, {machine.per_host} a host: {words}",
                  f"             {self.advice.reason}"]  # fmt: skip
        asked = self.cfg.engine.name
        if asked != self.advice.layout.engine:
            advice.append(f"             predicted for it, not for the configuration's engine.name={asked}")
        found = [f"warning      {line}" for line in self.warnings]
        return "\n".join([*self._counts(), *self._memory(), *advice, *self._time(), *found])


def forecast(cfg: Config, machine: Machine, gpu_name: str, samples: int | None) -> Forecast:
    """What a run takes; ``samples`` None: their number is unknown, and ImageNet's is assumed.

    Raises UserError when the processes do not share the global batch evenly or the samples do not fill one.
    """
    local_batch(cfg, machine)
    number = IMAGENET if samples is None else samples
    advice = advise(cfg, machine)
    hosts = min(machine.per_host, machine.gpus)
    kinds: dict[str, int] = {"single, ddp": 1, "fsdp2": machine.gpus, f"hsdp of {hosts}": hosts}
    which: list[Checkpointing] = ["none", "selective", "full"]
    if isinstance(cfg.engine.checkpoint_layers, int):
        which.append(cfg.engine.checkpoint_layers)
    fits = [
        Fit(one, activations(cfg, one), largest_batch(cfg, machine, advice.layout._replace(checkpointing=one)))
        for one in which
    ]
    return Forecast(
        cfg, machine, gpu_name, number, samples is None, Plan.of(cfg, number).total_steps, count_parameters(cfg),
        flops_per_image(cfg), {name: state(cfg, shards) for name, shards in kinds.items()}, fits, advice,
        warnings(cfg, machine, advice),
    )  # fmt: skip
