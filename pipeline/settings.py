"""Every setting of a run, typed: frozen pydantic models that refuse unknown keys. ``pipeline.config`` loads and checks them."""

import re
from typing import Annotated, Literal

import yaml
from pydantic import Field, Strict

from pipeline.chain_settings import ChainConfig
from pipeline.costs import MODELS, ModelShape
from pipeline.eval_settings import EvalConfig, FinetuneConfig
from pipeline.section import (
    Fraction01,
    Interval,
    NonNegative,
    OpenFraction,
    Positive,
    Rate,
    Ratio,
    Section,
)

# (tag, pattern, first characters) of numbers with an exponent, as YAML 1.2 reads them: loading and dumping must agree.
EXPONENT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """safe_dump that quotes a text which would be read back as a number."""


_Dumper.add_implicit_resolver(*EXPONENT)


class RunConfig(Section):
    """Where a run lives. ``dir`` is its folder; ``resume``: auto continues it, never refuses one that exists, must needs one."""

    dir: str
    resume: Literal["auto", "never", "must"] = "auto"


class RandSACConfig(Section):
    """RandSAC. ``segments``: squares of ``segment_size`` tokens a side, or ``num_segments`` blobs, the cells of random Gaussians.

    ``blob_std`` is the range of the Gaussians' deviation as a share of the grid; ``share_segments`` gives all images of
    a batch the same blobs and order; ``shuffled`` deals the tokens of an image to its segments at random (a control).
    ``order`` of the segments: raster, random, or hierarchical: one partition after another, of ``partition_size``
    squares a side or of ``num_partitions`` groups of blobs. ``prefix`` makes a random number of first segments one.
    ``predict_first``: the first segment is predicted too, from a null token. ``token_keep``: the share of each segment's
    tokens that is kept, rounded down, one at least; the others are neither encoded nor predicted. ``skip``: first value
    of the decoder's weights over encoder layers, or none for the last layer only. ``query_token`` adds a learned token to
    the queries' positions.
    """

    name: Literal["randsac"]
    segments: Literal["square", "blob"] = "square"
    segment_size: Positive = 3
    num_segments: Annotated[int, Field(ge=2)] = 11
    blob_std: Interval = (0.15, 0.25)
    share_segments: bool = False
    shuffled: bool = False
    order: Literal["raster", "random", "hierarchical"] = "hierarchical"
    partition_size: Positive = 2
    num_partitions: Positive = 5
    prefix: bool = False
    predict_first: bool = False
    token_keep: Ratio = 1.0
    skip: Literal["last", "uniform", "normal", "none"] = "last"
    query_token: bool = True
    normalise_target: bool = True
    decoder_self_attention: bool = True
    decoder_depth: Positive = 8
    decoder_width: Positive = 512
    decoder_heads: Positive = 16

    @property
    def ragged(self) -> bool:
        """Whether segment sizes differ between images."""
        return self.segments == "blob" or self.prefix


class PCAEConfig(Section):
    """PCAE: the teacher sees the masked tokens and keeps ``keep_ratio`` of them at each of ``stages`` drops.

    ``drop_case`` places the drops in a depth of L blocks, per = L // stages: 0 after blocks per x i, 1 after per x (i + 1) - 1,
    2 evenly from the first to the last block, 3 after the first ones. ``criterion``: a token's likeness to the mean of
    unit or of raw tokens. ``selection``: which tokens are kept (the two others are controls).
    """

    name: Literal["pcae"]
    mask_ratio: OpenFraction = 0.75
    stages: Positive = 3
    keep_ratio: Ratio = 0.5
    drop_case: Annotated[int, Field(ge=0, le=3)] = 0
    criterion: Literal["unit_mean", "raw_mean"] = "unit_mean"
    selection: Literal["least_similar", "most_similar", "random"] = "least_similar"
    normalise_target: bool = True
    decoder_depth: Positive = 8
    decoder_width: Positive = 512
    decoder_heads: Positive = 16


class MAEConfig(Section):
    """MAE; ``normalise_target``: each patch's pixels with mean 0 and variance 1 (norm_pix_loss)."""

    name: Literal["mae"]
    mask_ratio: OpenFraction = 0.75
    normalise_target: bool = True
    decoder_depth: Positive = 8
    decoder_width: Positive = 512
    decoder_heads: Positive = 16


# A method's settings by its name: one line here and one in the union of ``Config.method``.
METHOD_CONFIGS: dict[str, type[Section]] = {"randsac": RandSACConfig, "pcae": PCAEConfig, "mae": MAEConfig,
                                            "finetune": FinetuneConfig}  # fmt: skip


class ModelConfig(Section):
    """The encoder. ``patch_size`` overrides the preset's; ``drop_path`` is the last block's rate, linear from 0."""

    name: Literal["vit_p", "vit_t", "vit_s", "vit_b", "vit_l", "vit_h"]
    patch_size: Positive | None = None
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0


class DataConfig(Section):
    """Where images come from: a sealed beton (ffcv), a manifest of `patchmill prep scan` (folder) or generated ones (synthetic).

    ``crop_scale`` is RandomResizedCrop's area range; ``eval_crop`` the share of the short side that evaluation keeps.
    ``decode``: full, or scaled: JPEGs at the smallest of 1/8, 1/4, 1/2 that still covers the crop's output, for large images.
    ``resample``: area (FFCV's), or bicubic with antialiasing. ``shuffle``: full, or windowed for sets larger than memory:
    shuffled pages of the beton, samples mixed within ``window_pages`` of them. ``stage_in``: a folder on this host's disk that
    the betons are copied to first. ``threads`` defaults to the CPUs this process may use. ``num_samples``,
    ``num_classes``: the synthetic set only.
    """

    train: str | None = None
    val: str | None = None
    loader: Literal["ffcv", "folder", "synthetic"] = "ffcv"
    image_size: Positive = 224
    crop_scale: Interval = (0.2, 1.0)
    flip: bool = True
    eval_crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    decode: Literal["full", "scaled"] = "full"
    resample: Literal["area", "bicubic"] = "area"
    jit: Literal["auto", "on", "off"] = "auto"
    shuffle: Literal["full", "windowed"] = "full"
    window_pages: Positive = 64
    stage_in: str | None = None
    threads: Positive | None = None
    num_samples: Positive = 1024
    num_classes: Positive = 10


class TrainConfig(Section):
    """How long and in which portions. The length is ``epochs`` or ``steps``; the micro-batch never changes the run's meaning."""

    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    global_batch: Positive
    epochs: Positive | None = None
    steps: Positive | None = None
    micro_batch: Positive | Literal["auto"] = "auto"
    deterministic: bool = False


class OptimConfig(Section):
    """AdamW: lr = base_lr x global_batch / 256, linear warm-up, half-cosine to 0.

    ``layer_decay``, for fine-tuning: the rate of the head's, that of each block below is so many times the one above; class
    token and positions then have no weight decay (BEiT's rule, Bao et al. 2022). The average's momentum goes from ``ema`` to
    ``ema_end``. With ``ema_batch``, the batch they are meant for, 1 - momentum is
    scaled by global_batch / ema_batch: the average then spans the same number of images at any batch.
    """

    base_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.5e-4
    betas: Interval = (0.9, 0.95)
    weight_decay: Rate = 0.05
    warmup_epochs: NonNegative | None = None
    warmup_steps: NonNegative | None = None
    clip: Annotated[float, Field(gt=0)] | None = None
    layer_decay: Ratio | None = None
    ema: Fraction01 | None = None
    ema_end: Fraction01 = 1.0
    ema_batch: Positive | None = None


class DeepSpeedConfig(Section):
    """What DeepSpeed moves at once, in numbers (not bytes); the defaults suit ViT-L."""

    reduce_bucket_size: Positive = (
        50_000_000  # 4 of ViT-L's blocks: few collectives that still start early, 200 MB in fp32
    )
    overlap_comm: bool = True  # a second bucket fills while the first is reduced
    prefetch_bucket_size: Positive = 30_000_000  # stage 3: 2 blocks ahead of the one that computes
    max_live_parameters: Positive = (
        300_000_000  # stage 3: with as many gathered, the encoder of a ViT-L, nothing is fetched ahead
    )


class EngineConfig(Section):
    """How the steps are computed: in fp32, or with bf16 or fp16 parameters under an fp32 master (fp16: CUDA, with a loss scale).

    ``name``: single (one process), ddp (each process holds everything), fsdp2 (each holds a part of weights, moments and
    average), hsdp (groups of ``shard_size`` processes hold a part each, the groups are copies), deepspeed (ZeRO: by ``zero_stage``
    each holds a part of 1 moments and average, 2 gradients too, 3 weights too). ``offload``: ZeRO 2 and 3 keep the fp32 weights,
    moments and average in the host's memory and update them there, or (nvme, 3 only) weights and moments in files under
    ``offload_dir``; ``offload_params``: 3 keeps the weights that compute in the host's memory too. ``reshard_after_forward``:
    fsdp2 and hsdp free a layer's gathered weights after its forward pass and gather them again for the backward pass.
    ``checkpoint_layers``: activations that are computed again in the backward pass to save memory: none, of all layers (full), of
    all but matrix products and attention (selective), or of every n-th layer. ``compile``: torch.compile, layer by layer.
    ``backend``: what gradients and weights travel by; auto is nccl between GPUs, else gloo. ``interface``: its network device,
    such as eth0. ``timeout_s``: how long a process waits for the others.
    """

    name: Literal["single", "ddp", "fsdp2", "hsdp", "deepspeed"] = "single"
    zero_stage: Literal[0, 1, 2, 3] | None = None
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    offload: Literal["none", "cpu", "nvme"] = "none"
    offload_params: bool = False
    offload_dir: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    shard_size: Positive | None = None
    reshard_after_forward: bool = True
    checkpoint_layers: Literal["none", "full", "selective"] | Positive = "none"
    compile: bool = False
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    interface: str | None = None
    timeout_s: Positive = 600


class CheckpointConfig(Section):
    """Save every ``every_steps`` and at the end; the newest ``keep`` stay."""

    every_steps: Positive = 1000
    keep: Positive = 2


class LogConfig(Section):
    """A line of progress every ``every_steps``; ``log.jsonl`` holds every step."""

    every_steps: Positive = 20


class TrackingConfig(Section):
    """MLflow. ``uri``: auto is MLFLOW_TRACKING_URI, else a sqlite file beside the run folder; none switches it off."""

    uri: str = "auto"
    experiment: str = "patchmill"


class GuardConfig(Section):
    """What ends or saves a run in trouble.

    After ``max_nonfinite`` steps in a row whose gradient is not finite the run goes back to its newest checkpoint and
    leaves their batches out; after ``max_rollbacks`` of that without a checkpoint that is newer than the trouble it stops.
    A process that makes no progress for ``hang_s`` seconds ends with a line that says which one hangs, and where; the first
    steps have ``engine.timeout_s``.
    """

    max_nonfinite: Positive = 10
    max_rollbacks: NonNegative = 3
    hang_s: Positive = 300


class ProfileConfig(Section):
    """A profile of ``num_steps`` steps from ``start_step`` on, by every process, in the run's ``profile`` folder.

    ``memory`` records CUDA's allocations from the start on: a snapshot at the profile's end and when memory runs out.
    """

    start_step: Positive | None = None
    num_steps: Positive = 3
    memory: bool = False


class SlurmConfig(Section):
    """The job of ``patchmill submit``: sbatch's options by their names, and what brings a run back.

    ``gpus_per_node``: one process each; without GPUs ``tasks_per_node`` processes. ``gpu`` is the GPU's name in
    ``configs/gpus.yaml``: with it, memory is checked before anything is queued. ``time`` as sbatch has it, a number being
    minutes. ``setup`` are commands before the start, ``environment`` variables, ``directives`` any other option of sbatch.
    Slurm asks a job to save ``signal_lead_s`` before its time is up: by default three times the longest save of the run so
    far and two minutes more. After ``max_crashes`` crashes in a row with no newer checkpoint it is not requeued any more.
    ``executor=local``: no Slurm; the job runs on this host, at once and in the background, and starts anew by itself.
    """

    executor: Literal["slurm", "local"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: Positive = 1
    gpus_per_node: NonNegative = 0
    tasks_per_node: Positive = 1
    cpus_per_task: Positive | None = None
    mem: str | None = None
    time: str | Positive = "1-00:00:00"
    gpu: str | None = None
    setup: Annotated[tuple[str, ...], Strict(False)] = ()
    environment: dict[str, str] = {}
    directives: dict[str, str | int | bool] = {}
    signal_lead_s: Positive | None = None
    max_crashes: Positive = 3

    @property
    def tasks(self) -> int:
        """Processes of a node."""
        return self.gpus_per_node or self.tasks_per_node

    @property
    def world(self) -> int:
        """Processes of the job."""
        return self.nodes * self.tasks


class Config(Section):
    """A whole run's settings; build it with ``load_config``."""

    run: RunConfig
    method: Annotated[RandSACConfig | PCAEConfig | MAEConfig | FinetuneConfig, Field(discriminator="name")]
    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    tracking: TrackingConfig = TrackingConfig()
    eval: EvalConfig = EvalConfig()
    guard: GuardConfig = GuardConfig()
    profile: ProfileConfig = ProfileConfig()
    slurm: SlurmConfig = SlurmConfig()
    chain: ChainConfig = ChainConfig()

    @property
    def shape(self) -> ModelShape:
        """The encoder's shape with the patch size that is in force."""
        preset = MODELS[self.model.name]
        patch = self.model.patch_size or preset.patch_size
        return ModelShape(preset.width, preset.depth, preset.heads, patch, preset.timm_name)

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.data.image_size // self.shape.patch_size

    def labelled(self, num_samples: int) -> int:
        """How many of the training images are trained on. A label fraction: as if all classes had as many images."""
        if not isinstance(self.method, FinetuneConfig) or self.eval.label_fraction == 1:
            return num_samples
        classes = self.method.num_classes
        return classes * max(1, int(self.eval.label_fraction * num_samples / classes + 0.5))

    @property
    def lr(self) -> float:
        """The peak learning rate, base_lr x global_batch / 256."""
        return self.optim.base_lr * self.train.global_batch / 256

    @property
    def momentum(self) -> tuple[float, float]:
        """The teacher's first and last momentum at this batch; 1, an average that stays, without a teacher."""
        first, last = 1.0 if self.optim.ema is None else self.optim.ema, self.optim.ema_end
        if self.optim.ema_batch is None:
            return first, last
        scale = self.train.global_batch / self.optim.ema_batch
        return 1 - (1 - first) * scale, 1 - (1 - last) * scale

    @property
    def micro_batch(self) -> int:
        """The micro-batch in force; auto is the whole global batch."""
        return self.train.global_batch if self.train.micro_batch == "auto" else self.train.micro_batch

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that ``load_config`` reads back to an equal one."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)
