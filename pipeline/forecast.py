"""`patchmill estimate`: what a run will take, in words. Counts are exact; fits, times and the advice are predictions. No torch."""

from dataclasses import dataclass
from typing import Final

from pipeline.config import Config
from pipeline.costs import Flops
from pipeline.estimate import flops_per_image
from pipeline.memory import Activations, Checkpointing, EngineName, State, activations, averaged, parameters, state
from pipeline.order import Plan
from pipeline.planner import (
    GIB,
    HOST_GB_S,
    PCIE_GB_S,
    USED,
    ZERO,
    Advice,
    Layout,
    Machine,
    advise,
    configured,
    largest_batch,
    local_batch,
    micro_batch,
    planned,
    predict_step,
    warnings,
)
from pipeline.zero_memory import Zero, offload_bytes, padding, zero_state

IMAGENET: Final = 1_281_167
IMAGE_BYTES: Final = 50_000  # a JPEG of 512 px in quality 90
CORE_IMAGES_S: Final = 860  # what a core decodes, as FFCV's authors publish it
MEGA: Final = 1e6
WHEN: Final[dict[EngineName, str]] = {
    "single": "one GPU and its memory suffice",
    "ddp": "all of it fits every GPU",
    "fsdp2": "ddp does not fit, or its optimizer's step takes long on several hosts",
    "hsdp": "as fsdp2, between hosts with a thin network",
    "zero1": "as ddp, if its optimizer's step takes longer than traffic that in bf16 no computing hides",
    "zero2": "weights fit, gradients and moments do not; every micro-batch reduces all gradients",
    "zero3": "as fsdp2 without resharding: up to half a billion weights stay gathered until the backward pass",
}


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
    """Activations an image under a checkpointing, and the largest micro-batch in one step beside the state of ``plan``'s engine."""

    checkpointing: Checkpointing
    activations: Activations
    micro_batch: int


def _state_line(name: str, held: State) -> str:
    amounts = (held.weights, held.gradients, held.moments, held.average, held.teacher, held.total)
    return f"  {name:<12}" + "".join(f"{amount / GIB:>11.3f}" for amount in amounts)


def _engine_lines(cfg: Config, machine: Machine) -> list[str]:
    """For each engine what it would do with this configuration, and when it is the right one."""
    names: tuple[EngineName, ...] = ("single",) if machine.gpus == 1 else ("ddp", "fsdp2", "hsdp")
    lines = []
    for name in names + ZERO:
        layout = configured(cfg, name)
        fits = micro_batch(cfg, machine, layout)
        time = f"{1e3 * predict_step(cfg, machine, layout).total:,.1f} ms" if fits else "does not fit"
        lines.append(f"  {name:<12}{fits or '-':>11}{time:>14}   {WHEN[name]}")
    return lines


@dataclass(frozen=True)
class Forecast:
    """What a configuration takes on a machine; ``str()`` is the report. ``assumed``: the number of samples is not known.

    ``plan`` is what fits and times are predicted for: ``advice``, or DeepSpeed's stage where the configuration asks for one.
    """

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
    plan: Advice
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
        pads = (f"zero{n} {padding(self.cfg, Zero(n, self.machine.gpus)):,}" for n in (1, 2, 3))
        lines.append(
            f"  padding      numbers of all processes together, of each kind that is held in parts: {', '.join(pads)}"
        )
        lines.append(f"activations  MiB an image kept for the backward pass; predicted largest micro-batch with "
                     f"{self.plan.layout.engine} in {USED:.0%} of {self.machine.gpu.memory_gib:g} GiB")  # fmt: skip
        lines.append(f"  {'checkpoint_layers':<20}{'MiB':>11}{'images':>11}")
        for fit in self.fits:
            lines.append(f"  {fit.checkpointing!s:<20}{fit.activations.kept / 2**20:>11.2f}{fit.micro_batch:>11,}")
        return lines

    def _time(self) -> list[str]:
        machine, step = self.machine, self.plan.step
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
        asked, own = self.cfg.engine.name, self.plan.layout
        if own != self.advice.layout:
            files = ", its files as if they were in memory" if self.cfg.engine.offload == "nvme" else ""
            advice.append(
                f"             but fits and times here are predicted for the configuration's {own.settings(machine)}{files}"
            )
        elif asked != own.engine and not own.zero(machine):
            advice.append(f"             predicted for it, not for the configuration's engine.name={asked}")
        advice.append(
            f"  {'':<12}{'images':>11}{'a step':>14}   predicted with this configuration's settings; right when"
        )
        advice += _engine_lines(self.cfg, machine)
        found = [f"warning      {line}" for line in self.warnings]
        return "\n".join([*self._counts(), *self._memory(), *advice, *self._time(), *self._offload(), *found])

    def _offload(self) -> list[str]:
        """What goes between a GPU and its host, where the configuration's stage of ZeRO keeps something there."""
        layout, step = self.plan.layout, self.plan.step
        zero = layout.zero(self.machine)
        if zero is None or not zero.offload:
            return []
        held, num_micro = zero_state(self.cfg, zero)[1].total, 1
        if step:
            num_micro = local_batch(self.cfg, self.machine) // step.micro_batch
        sent = offload_bytes(self.cfg, zero, num_micro)
        where = (
            "on the host, or of it weights and moments in files (whose time is not predicted)"
            if self.cfg.engine.offload == "nvme"
            else "on the host"
        )
        return [
            f"offload      predicted {held / GIB:.3f} GiB a process {where}; {sent / 1e9:.3f} GB a step there and back,",
            f"             predicted {sent / (PCIE_GB_S * 1e6):.1f} ms at a stated {PCIE_GB_S:g} GB/s, and the optimizer at "
            f"{HOST_GB_S:g} GB/s of the host's memory",
        ]


def forecast(cfg: Config, machine: Machine, gpu_name: str, samples: int | None) -> Forecast:
    """What a run takes; ``samples`` None: their number is unknown, and ImageNet's is assumed.

    Raises UserError when the processes do not share the global batch evenly or the samples do not fill one.
    """
    local_batch(cfg, machine)
    number = cfg.labelled(IMAGENET if samples is None else samples)
    advice, plan = advise(cfg, machine), planned(cfg, machine)
    hosts = min(machine.per_host, machine.gpus)
    kinds: dict[str, int] = {"single, ddp": 1, "fsdp2": machine.gpus, f"hsdp of {hosts}": hosts}
    states = {name: state(cfg, shards) for name, shards in kinds.items()}
    layouts: dict[str, Layout] = {name: configured(cfg, name) for name in ZERO}
    states |= {name: zero_state(cfg, zero)[0] for name, one in layouts.items() if (zero := one.zero(machine))}
    which: list[Checkpointing] = ["none", "selective", "full"]
    if isinstance(cfg.engine.checkpoint_layers, int):
        which.append(cfg.engine.checkpoint_layers)
    fits = [
        Fit(one, activations(cfg, one), largest_batch(cfg, machine, plan.layout._replace(checkpointing=one)))
        for one in which
    ]
    return Forecast(
        cfg, machine, gpu_name, number, samples is None, Plan.of(cfg, number).total_steps, count_parameters(cfg),
        flops_per_image(cfg), states, fits, advice, plan, warnings(cfg, machine, plan),
    )  # fmt: skip
