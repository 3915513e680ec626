"""Which engine for a configuration on given GPUs, and how long a step takes: predictions from shapes and datasheets. No torch.

Nothing here is measured. The share of the peak that the matrix products reach (MFU) is the caller's statement; what the
network, the optimizer and the starting of kernels add to it is modelled.
"""

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Annotated, Final, NamedTuple

from pydantic import Field, ValidationError

from pipeline.config import CONFIG_DIR, Config, UserError, read_yaml
from pipeline.costs import Flops
from pipeline.estimate import flops_per_image
from pipeline.memory import (
    FP32,
    Checkpointing,
    EngineName,
    activations,
    averaged,
    compute_bytes,
    parameters,
    passing,
    state,
)
from pipeline.section import Section
from pipeline.zero_memory import Zero, offload_bytes, zero_passing, zero_state, zero_traffic

USED: Final = 0.9  # of a GPU's memory; the allocator and CUDA want the rest
USABLE: Final = 0.88  # of a link's stated bandwidth, as collective operations reach it
USEFUL_BATCH: Final = 32  # images; with fewer a GPU waits for its kernels to be started
LAUNCH_S: Final = 75e-6  # to start the kernels of a block's forward pass, or of half its backward pass
PCIE_GB_S: Final = 25.0  # between a GPU and its host, one way at a time
HOST_GB_S: Final = 200.0  # of a host's memory, which its processes share
GIB: Final = 2**30
ZERO: Final[tuple[EngineName, ...]] = ("zero1", "zero2", "zero3")

AmountOf = Annotated[float, Field(gt=1e-3, lt=1e9)]


class Gpu(Section):
    """A row of a GPU table: GiB, dense TFLOP/s, GB/s of its memory and to the host's other GPUs, each way."""

    memory_gib: AmountOf
    half_tflops: AmountOf
    fp32_tflops: AmountOf
    memory_gb_s: AmountOf
    link_gb_s: AmountOf
    note: str = ""


def find_gpu(name: str, table: Path | None = None) -> Gpu:
    """A GPU of the shipped table or of ``table``. Raises UserError, naming the known ones, and for a wrong table."""
    rows = read_yaml(CONFIG_DIR / "gpus.yaml") | {
        str(key): row for key, row in (read_yaml(table) if table else {}).items()
    }
    if name not in rows:
        raise UserError(
            f"--gpu {name}: is in no table; known are {', '.join(map(str, rows))}; --gpu-table FILE.yaml adds others"
        )
    try:
        return Gpu.model_validate(rows[name])
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, [name, *problem["loc"]]))
        raise UserError(f"{table}: {key}: {problem['msg']}; a row has {', '.join(Gpu.model_fields)}") from None


@dataclass(frozen=True)
class Machine:
    """``gpus`` processes, ``per_host`` of them a host; ``network`` GB/s that a host sends; the stated ``mfu``.

    Raises UserError unless the hosts are full.
    """

    gpu: Gpu
    gpus: int = 1
    per_host: int = 8
    network: float = 400.0
    mfu: float = 0.4

    def __post_init__(self) -> None:
        """Groups of hsdp are whole hosts."""
        if self.gpus > self.per_host and self.gpus % self.per_host:
            raise UserError(
                f"--gpus {self.gpus}: on several hosts it should be a multiple of --gpus-per-node {self.per_host}"
            )

    @property
    def hosts(self) -> int:
        """How many hosts."""
        return ceil(self.gpus / self.per_host)

    @property
    def thin(self) -> bool:
        """Whether hosts are joined by much less than the GPUs in them: by less than a quarter."""
        return self.hosts > 1 and self.network < self.gpu.link_gb_s / 4

    @property
    def bytes(self) -> float:
        """Of a GPU's memory, those that may be used."""
        return USED * self.gpu.memory_gib * GIB

    def peak(self, cfg: Config) -> float:
        """FLOP/s of a GPU by its datasheet in the configuration's precision."""
        return 1e12 * (self.gpu.fp32_tflops if cfg.engine.precision == "fp32" else self.gpu.half_tflops)


class Layout(NamedTuple):
    """What of ``engine`` is to be chosen; ``zeroN`` is deepspeed's stage N, and only there may parts lie on the host."""

    engine: EngineName
    checkpointing: Checkpointing = "none"
    reshard: bool = False
    offload: bool = False
    offload_params: bool = False

    def settings(self, machine: Machine) -> str:
        """As overrides of a configuration."""
        stage = self.zero(machine)
        words = [f"engine.name=deepspeed engine.zero_stage={stage.stage}" if stage else f"engine.name={self.engine}"]
        words += ["engine.offload=cpu"] * self.offload + ["engine.offload_params=true"] * self.offload_params
        if self.engine == "hsdp":
            words.append(f"engine.shard_size={self.shards(machine)}")
        if self.engine in ("fsdp2", "hsdp") and not self.reshard:
            words.append("engine.reshard_after_forward=false")
        return " ".join(words + [f"engine.checkpoint_layers={self.checkpointing}"] * (self.checkpointing != "none"))

    def zero(self, machine: Machine) -> Zero | None:
        """DeepSpeed's stage, over all processes; None for the other engines."""
        if not self.engine.startswith("zero"):
            return None
        return Zero(int(self.engine[-1]), machine.gpus, self.offload, self.offload_params)

    def shards(self, machine: Machine) -> int:
        """How many processes share a state."""
        if self.engine == "hsdp":
            return min(machine.per_host, machine.gpus)
        return 1 if self.engine in ("single", "ddp") else machine.gpus


def _standing(cfg: Config, machine: Machine, layout: Layout, *, accumulates: bool) -> tuple[int, int, int]:
    """Bytes a process (held all the time, that come and go beside the activations, and after them)."""
    zero = layout.zero(machine)
    if zero:
        return zero_state(cfg, zero)[0].total, *zero_passing(cfg, zero, accumulates=accumulates)
    shards = layout.shards(machine)
    return state(cfg, shards).total, passing(cfg, shards, reshard=layout.reshard, accumulates=accumulates), 0


def largest_batch(cfg: Config, machine: Machine, layout: Layout, *, accumulates: bool = False) -> int:
    """The largest micro-batch in images that fits a GPU beside the state; 0 when not one does."""
    held, beside, after = _standing(cfg, machine, layout, accumulates=accumulates)
    if held + after > machine.bytes:
        return 0
    return max(0, int((machine.bytes - held - beside) // activations(cfg, layout.checkpointing).peak))


def peak_bytes(cfg: Config, machine: Machine, layout: Layout, micro: int) -> int:
    """Bytes of a GPU that a step in micro-batches of ``micro`` images takes at most."""
    held, beside, after = _standing(cfg, machine, layout, accumulates=micro < local_batch(cfg, machine))
    return held + max(after, beside + micro * activations(cfg, layout.checkpointing).peak)


def local_batch(cfg: Config, machine: Machine) -> int:
    """Images of a process in a step. Raises UserError when the processes do not share the global batch evenly."""
    if cfg.train.global_batch % machine.gpus:
        raise UserError(
            f"--gpus {machine.gpus}: train.global_batch = {cfg.train.global_batch} should be a multiple of it"
        )
    return cfg.train.global_batch // machine.gpus


def micro_batch(cfg: Config, machine: Machine, layout: Layout) -> int:
    """The largest part of the local batch that fits and divides it; 0 when not one image fits."""
    local = local_batch(cfg, machine)
    if largest_batch(cfg, machine, layout) >= local:
        return local
    fits = largest_batch(cfg, machine, layout, accumulates=True)
    return next((size for size in range(min(fits, local), 0, -1) if local % size == 0), 0)


def communication_s(cfg: Config, machine: Machine, layout: Layout, num_micro: int = 1) -> float:
    """Seconds of a process's traffic in a step: gradients reduced in fp32, weights gathered in compute precision."""
    own = parameters(cfg)
    trained = FP32 * sum(p.size for p in own if p.trained)
    within = USABLE * machine.gpu.link_gb_s * 1e9
    across = USABLE * 1e9 * (machine.network if machine.hosts > 1 else machine.gpu.link_gb_s)
    slowest, zero = min(within, across), layout.zero(machine)
    if zero:
        return sum(zero_traffic(cfg, zero, num_micro)) / slowest
    if layout.engine in ("single", "ddp"):
        return 2 * trained * (1 - 1 / machine.gpus) / slowest
    gathered = (1 + layout.reshard) * sum(p.size for p in own) + sum(p.size for p in averaged(cfg))
    share = compute_bytes(cfg) * gathered * num_micro + trained
    shards = layout.shards(machine)
    if layout.engine == "fsdp2":
        return share * (1 - 1 / shards) / slowest
    # Each GPU of a host reduces its own part with its peers on other hosts; together they have the host's network.
    return share * (1 - 1 / shards) / within + 2 * trained * (1 - shards / machine.gpus) / across


def exposed_s(cfg: Config, machine: Machine, layout: Layout, num_micro: int, busy: float) -> float:
    """Seconds of a step in which a process only waits for the network; ``busy``: those in which it computes."""
    if machine.gpus == 1:
        return 0.0
    traffic, zero = communication_s(cfg, machine, layout, num_micro), layout.zero(machine)
    # Gradients travel behind the backward pass of the last micro-batch, in stage 2 of each, gathered weights behind everything.
    window = busy if layout.engine in ("fsdp2", "hsdp", "zero3") else busy * 2 / 3
    window /= num_micro if layout.engine in ("single", "ddp", "zero1") else 1
    behind, after = zero_traffic(cfg, zero, num_micro) if zero else (1.0, 0.0)
    late = traffic * after / (behind + after)
    return max(0.0, traffic - late - window) + late


def update_s(cfg: Config, machine: Machine, layout: Layout, num_micro: int) -> float:
    """Seconds of the optimizer and the average, on the GPU or on the host, with what travels between the two."""
    numbers = 30 * sum(p.size for p in parameters(cfg) if p.trained) + 12 * sum(p.size for p in averaged(cfg))
    own, zero = numbers / layout.shards(machine), layout.zero(machine)
    if zero is None or not zero.offload:
        return own / (machine.gpu.memory_gb_s * 1e9)
    host = min(machine.per_host, machine.gpus) * own / (HOST_GB_S * 1e9)
    return host + offload_bytes(cfg, zero, num_micro) / (PCIE_GB_S * 1e9)


def recomputed_flops(cfg: Config, flops: Flops, checkpointing: Checkpointing) -> float:
    """FLOPs an image that checkpointing adds to a step: the trained layers' forward pass, or a part of it."""
    if checkpointing in ("none", "selective"):
        return 0.0
    layers = cfg.shape.depth + cfg.method.decoder_depth
    every = checkpointing if isinstance(checkpointing, int) else 1
    return (flops.step - flops.forward) / 2 * ceil(layers / every) / layers


@dataclass(frozen=True)
class Step:
    """Predicted seconds of a step: ``compute`` at the stated MFU, and what it adds up to with all else.

    ``total`` = max(compute + recomputed + ``exposed`` traffic, ``launch`` of kernels) + ``update``, optimizer and average.
    """

    micro_batch: int
    compute: float
    exposed: float
    launch: float
    update: float
    total: float

    @property
    def efficiency(self) -> float:
        """The share of the step in which the stated MFU is reached."""
        return self.compute / self.total


def predict_step(cfg: Config, machine: Machine, layout: Layout, micro: int | None = None) -> Step:
    """How long a step takes, in micro-batches of ``micro`` or the most that fit. Raises ValueError when none fits."""
    local = local_batch(cfg, machine)
    micro = micro or micro_batch(cfg, machine, layout)
    if not micro:
        raise ValueError(f"no image fits with {layout.settings(machine)}")
    num_micro, flops = local // micro, flops_per_image(cfg)
    speed = machine.mfu * machine.peak(cfg)
    compute = local * flops.step / speed
    busy = compute + local * recomputed_flops(cfg, flops, layout.checkpointing) / speed
    exposed = exposed_s(cfg, machine, layout, num_micro, busy)
    passes = 3 * (cfg.shape.depth + cfg.method.decoder_depth) + (cfg.shape.depth if averaged(cfg) else 0)
    update = update_s(cfg, machine, layout, num_micro)
    launch = passes * LAUNCH_S * num_micro
    return Step(micro, compute, exposed, launch, update, max(busy + exposed, launch) + update)


def smallest_batch(cfg: Config, machine: Machine) -> float:
    """Images of a process whose backward pass hides ddp's traffic (B_min)."""
    seconds_per_image = flops_per_image(cfg).step / (machine.mfu * machine.peak(cfg))
    return 1.5 * communication_s(cfg, machine, Layout("ddp")) / seconds_per_image if machine.gpus > 1 else 0.0


def _ladder(machine: Machine) -> list[Layout]:
    """From what costs least to what holds least."""
    steps: list[Checkpointing] = ["none", 2, "full"]
    if machine.gpus == 1:
        return [Layout("single", step) for step in steps]
    # Across a thin network the states are shared within a host only.
    sharing: EngineName = "hsdp" if machine.thin else "fsdp2"
    ladder = [Layout("ddp"), *(Layout(sharing, step) for step in steps)]
    if machine.hosts > 1:
        ladder.append(Layout("hsdp", "full", reshard=True))
    return ladder if machine.thin else [*ladder, Layout("fsdp2", "full", reshard=True)]


# Where nothing else fits: from what sends least over PCIe to what holds least.
OFFLOADED: Final = (Layout("zero2", "full", offload=True), Layout("zero3", "full", offload=True),
                    Layout("zero3", "full", offload=True, offload_params=True))  # fmt: skip


@dataclass(frozen=True)
class Advice:
    """The layout to take, why, and the predicted step; ``step`` is None when not one image fits."""

    layout: Layout
    reason: str
    step: Step | None


def advise(cfg: Config, machine: Machine) -> Advice:
    """The first layout of the ladder that fits a useful micro-batch (32 images, or the local batch).

    Where ddp's optimizer would take more than 3 % of a step on several hosts, the state is shared though it fits.
    """
    useful, ladder = min(local_batch(cfg, machine), USEFUL_BATCH), _ladder(machine)
    fitting = [layout for layout in ladder if micro_batch(cfg, machine, layout) >= useful]
    if not fitting:
        fitting = [layout for layout in [*ladder[::-1], *OFFLOADED] if micro_batch(cfg, machine, layout)][:1]
        if not fitting:
            return Advice(ladder[-1], "not one image fits; take more GPUs, or GPUs with more memory", None)
        step, held = predict_step(cfg, machine, fitting[0]), f"nothing fits a micro-batch of {useful}; this holds least"
        if fitting[0].offload:
            held = "not one image fits beside the state, so a part of it lies in the host's memory; that is slow"
        return Advice(fitting[0], held, step)
    chosen = fitting[0]
    step = predict_step(cfg, machine, chosen)
    held = (
        f"{state(cfg, chosen.shards(machine)).total / GIB:.1f} GiB of state and a micro-batch of {step.micro_batch} fit"
    )
    if chosen.engine == "single":
        return Advice(chosen, f"one process has nobody to share with; {held}", step)
    if chosen.engine == "ddp" and machine.hosts > 1 and step.update > 0.03 * step.total:
        shared = Layout("hsdp" if machine.thin else "fsdp2")
        other = predict_step(cfg, machine, shared)
        if other.total < step.total:
            reason = f"ddp fits too, but its optimizer would take {step.update / step.total:.0%} of a step; here each does a part"
            return Advice(shared, reason, other)
    if chosen.engine == "ddp":
        return Advice(chosen, f"{held}, so nothing needs to be shared", step)
    return Advice(chosen, f"ddp does not fit a micro-batch of {useful}; so {held}", step)


def configured(cfg: Config, engine: EngineName) -> Layout:
    """``engine`` with the configuration's own settings."""
    asked, zero = cfg.engine, engine.startswith("zero")
    offload = zero and engine != "zero1" and asked.offload != "none"
    params = engine == "zero3" and offload and asked.offload_params
    return Layout(engine, asked.checkpoint_layers, asked.reshard_after_forward and not zero, offload, params)


def planned(cfg: Config, machine: Machine) -> Advice:
    """What is predicted for: DeepSpeed's stage where the configuration asks for one, else the advised layout."""
    if cfg.engine.name != "deepspeed":
        return advise(cfg, machine)
    layout = configured(cfg, ZERO[(cfg.engine.zero_stage or 1) - 1])
    fits = micro_batch(cfg, machine, layout)
    return Advice(layout, "the configuration's own", predict_step(cfg, machine, layout) if fits else None)


def restoring_gpus(cfg: Config, machine: Machine, efficiency: float = 0.7) -> int | None:
    """The largest number of GPUs, halved as often as needed, that is predicted to reach ``efficiency``; None if none does."""
    count = machine.gpus // 2
    while count:
        if cfg.train.global_batch % count == 0 and (count <= machine.per_host or count % machine.per_host == 0):
            step = planned(cfg, replace(machine, gpus=count)).step
            if step is not None and step.efficiency >= efficiency:
                return count
        count //= 2
    return None


def warnings(cfg: Config, machine: Machine, advice: Advice) -> list[str]:
    """What is likely to disappoint, a sentence each; predictions too."""
    found = [machine.gpu.note] if machine.gpu.note and cfg.engine.precision == "bf16" else []
    local, least = local_batch(cfg, machine), smallest_batch(cfg, machine)
    if local < least:
        found.append(
            f"a local batch of {local} is predicted too small to hide ddp's traffic; {ceil(least)} images would"
        )
    if advice.step is not None and advice.step.efficiency < 0.7:
        count = restoring_gpus(cfg, machine)
        cure = f"{count} would reach 70%" if count else "raise the batch, or compile"
        found.append(f"predicted efficiency {advice.step.efficiency:.0%} with --gpus {machine.gpus}; {cure}")
    if machine.thin:
        link = machine.gpu.link_gb_s
        found.append(f"a thin network: {machine.network:g} GB/s between hosts, {link:g} within; no fsdp2 across hosts")
    chosen, asked = advice.layout, cfg.engine.checkpoint_layers
    wanted = local if cfg.train.micro_batch == "auto" else min(local, cfg.micro_batch)

    def fits(checkpointing: Checkpointing) -> bool:
        layout = chosen._replace(checkpointing=checkpointing)
        return largest_batch(cfg, machine, layout, accumulates=wanted < local) >= wanted

    if asked != "none" and fits("none"):
        found.append(
            f"engine.checkpoint_layers = {asked}: not needed, a micro-batch of {wanted} is predicted to fit without"
        )
    if not fits(asked):
        found.append(f"train.micro_batch = {cfg.train.micro_batch}: {wanted} images a process are predicted not to fit")
    return found
