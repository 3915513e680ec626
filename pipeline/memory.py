"""What a configuration holds in memory, from shapes alone: parameters, the engines' state, activations. No torch.

Of fp32 weights, gradients and AdamW's moments an engine holds 16 bytes a trained parameter, in bf16 and fp16 too. Activations are
what the modules of ``pipeline.vit`` keep for the backward pass, uncompiled, with attention that keeps no scores.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Final, Literal, NamedTuple

from pipeline.config import Config
from pipeline.costs import num_visible, teacher_schedule
from pipeline.estimate import classifier_tokens, randsac_tokens
from pipeline.eval_settings import FinetuneConfig
from pipeline.settings import MAEConfig, OptimConfig, PCAEConfig, RandSACConfig

EngineName = Literal["single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"]
Checkpointing = Literal["none", "full", "selective"] | int

FP32: Final = 4


class Parameter(NamedTuple):
    """A parameter of a method under torch's name; ``trained``: it has a gradient."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True

    @property
    def size(self) -> int:
        """Numbers in it."""
        return prod(self.shape)


def takes_decay(name: str, shape: tuple[int, ...], optim: OptimConfig) -> bool:
    """Weight decay is for matrices and tokens: not for biases, norms (MAE's rule) or RandSAC's skip weights.

    With ``layer_decay`` it is not for the encoder's token and positions either (BEiT's rule for fine-tuning).
    """
    apart = (".bias", ".skip") if optim.layer_decay is None else (".bias", ".skip", ".cls_token", ".pos_embed")
    return len(shape) > 1 and not name.endswith(apart)


def rate_scale(name: str, depth: int, optim: OptimConfig) -> float:
    """What a parameter's learning rate is multiplied by: 1, or layer_decay^(depth + 1 - l).

    l is 0 for what comes before the blocks, i + 1 in block i, depth + 1 behind them (BEiT, Bao et al., ICLR 2022).
    """
    if optim.layer_decay is None:
        return 1.0
    parts = name.removeprefix("encoder.").split(".")
    before = parts[0] in ("cls_token", "pos_embed", "patch_embed")
    layer = int(parts[1]) + 1 if parts[0] == "blocks" else 0 if before else depth + 1
    return float(optim.layer_decay ** (depth + 1 - layer))


def _norm(name: str, width: int) -> list[Parameter]:
    return [Parameter(f"{name}.{part}", (width,)) for part in ("weight", "bias")]


def _linear(name: str, width_in: int, width_out: int) -> list[Parameter]:
    return [Parameter(f"{name}.weight", (width_out, width_in)), Parameter(f"{name}.bias", (width_out,))]


def _attention(name: str, width: int) -> list[Parameter]:
    return [*_linear(f"{name}.qkv", width, 3 * width), *_linear(f"{name}.proj", width, width)]


def _mlp(name: str, width: int) -> list[Parameter]:
    return [*_linear(f"{name}.fc1", width, 4 * width), *_linear(f"{name}.fc2", 4 * width, width)]


def _block(name: str, width: int) -> list[Parameter]:
    attention, mlp = _attention(f"{name}.attn", width), _mlp(f"{name}.mlp", width)
    return [*_norm(f"{name}.norm1", width), *attention, *_norm(f"{name}.norm2", width), *mlp]


def _cross_block(name: str, width: int, memory: int, *, self_attention: bool, norm_memory: bool) -> Iterator[Parameter]:
    if self_attention:
        yield from [*_norm(f"{name}.norm1", width), *_attention(f"{name}.attn", width)]
    yield from _norm(f"{name}.norm2", width)
    if norm_memory:
        yield from _norm(f"{name}.norm_memory", memory)
    yield from _linear(f"{name}.cross.q", width, width)
    yield from _linear(f"{name}.cross.kv", memory, 2 * width)
    yield from _linear(f"{name}.cross.proj", width, width)
    yield from [*_norm(f"{name}.norm3", width), *_mlp(f"{name}.mlp", width)]


def _encoder(cfg: Config) -> Iterator[Parameter]:
    method, shape = cfg.method, cfg.shape
    tuned = method if isinstance(method, FinetuneConfig) else None
    class_token = tuned.class_token if tuned else not isinstance(method, RandSACConfig)
    if class_token:
        yield Parameter("encoder.cls_token", (1, 1, shape.width))
    yield Parameter("encoder.pos_embed", (1, cfg.grid**2 + class_token, shape.width), trained=tuned is not None)
    yield Parameter("encoder.patch_embed.proj.weight", (shape.width, 3, shape.patch_size, shape.patch_size))
    yield Parameter("encoder.patch_embed.proj.bias", (shape.width,))
    for index in range(shape.depth):
        yield from _block(f"encoder.blocks.{index}", shape.width)
    if tuned:
        yield from [*_norm("encoder.fc_norm", shape.width), *_linear("encoder.head", shape.width, tuned.num_classes)]
        return
    unused = isinstance(method, RandSACConfig) and method.skip != "none"  # the decoder reads the blocks' raw outputs
    yield from (p._replace(trained=not unused) for p in _norm("encoder.norm", shape.width))


def _decoder(cfg: Config) -> Iterator[Parameter]:
    method, encoder, tokens = cfg.method, cfg.shape.width, cfg.grid**2
    if isinstance(method, FinetuneConfig):
        return
    width, pixels = method.decoder_width, 3 * cfg.shape.patch_size**2
    if isinstance(method, RandSACConfig):
        if method.query_token:
            yield Parameter("decoder.mask_token", (1, 1, width))
        if method.predict_first:
            yield Parameter("decoder.null_token", (1, 1, encoder))
        if method.skip != "none":
            yield Parameter("decoder.skip", (method.decoder_depth, cfg.shape.depth))
        for index in range(method.decoder_depth):
            yield from _cross_block(f"decoder.blocks.{index}", width, encoder, norm_memory=method.skip != "none",
                                    self_attention=method.decoder_self_attention)  # fmt: skip
    else:
        tokens += 1
        yield from _linear("decoder.embed", encoder, width)
        yield Parameter("decoder.mask_token", (1, 1, width))
        for index in range(method.decoder_depth):
            yield from _block(f"decoder.blocks.{index}", width)
    yield Parameter("decoder.pos_embed", (1, tokens, width), trained=False)
    yield from _norm("decoder.norm", width)
    yield from _linear("decoder.head", width, encoder if isinstance(method, PCAEConfig) else pixels)


def parameters(cfg: Config) -> list[Parameter]:
    """Every parameter of the method: torch's names and shapes."""
    return [*_encoder(cfg), *_decoder(cfg)]


def averaged(cfg: Config) -> list[Parameter]:
    """The parameters that an average follows: the encoder's trained ones where there is one (``optim.ema``), else none."""
    return [p for p in _encoder(cfg) if p.trained] if cfg.optim.ema is not None else []


def compute_bytes(cfg: Config) -> int:
    """Bytes of a number in the matrix products."""
    return FP32 if cfg.engine.precision == "fp32" else 2


def part(items: list[Parameter], shards: int) -> int:
    """Numbers on the process that holds most when dimension 0 of each parameter is cut in ``shards``, rounded up as FSDP2 does."""
    return sum(ceil(item.shape[0] / shards) * prod(item.shape[1:]) for item in items)


@dataclass(frozen=True)
class State:
    """Bytes that a process holds from step to step; ``average`` fp32, ``teacher`` its copy that computes."""

    weights: int
    gradients: int
    moments: int
    average: int
    teacher: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.moments + self.average + self.teacher


def state(cfg: Config, shards: int = 1) -> State:
    """The state of the process that holds most, of ``shards`` that share it: 1 for single and ddp, N for fsdp2, S for hsdp."""
    own = parameters(cfg)
    trained = part([p for p in own if p.trained], shards)
    average = averaged(cfg)
    teacher = part(list(_encoder(cfg)), shards) * compute_bytes(cfg) if average else 0
    return State(FP32 * part(own, shards), FP32 * trained, 2 * FP32 * trained, FP32 * part(average, shards), teacher)


class Layer(NamedTuple):
    """Bytes that a layer keeps of one image: without checkpointing, its inputs, and its matrix products and attention."""

    kept: int
    inputs: int
    products: int


def _self_layer(tokens: int, width: int, heads: int, size: int, mask: int = 0) -> Layer:
    """A block on [n, D], numbers of ``size`` bytes; ``mask``: bytes of the mask that each attention keeps of an image.

    Kept are, in D: both norms' inputs and outputs 4, qkv 3, attention 1, the MLP's two halves 4 + 4; the log-sum of each
    head and the norms' mean and deviation are fp32.
    """
    row, sums = tokens * width * size, FP32 * heads * tokens
    return Layer(16 * row + sums + 16 * tokens + mask, row, 10 * row + sums)


def _cross_layer(cfg: Config, method: RandSACConfig, queries: int, memory: int, mask: int) -> Layer:
    """RandSAC's decoder block on [q, w] that reads [s, D], with the parts of ``_self_layer`` and those of the memory."""
    size = compute_bytes(cfg)
    row, sums = queries * method.decoder_width * size, FP32 * method.decoder_heads * queries
    pairs, read = 2 * memory * method.decoder_width * size, memory * cfg.shape.width * size
    kept, products = 14 * row + sums + 16 * queries + mask + pairs, 8 * row + sums + pairs
    if method.decoder_self_attention:
        kept, products = kept + 6 * row + sums + 8 * queries + mask, products + 5 * row + sums
    normed = method.skip != "none"
    # Without skips all blocks read the encoder's output itself, unless a null token is put before it for each of them.
    own = read if normed or method.predict_first else 0
    return Layer(kept + own + normed * (read + 8 * memory), row + own, products)


def _masked(cfg: Config, method: MAEConfig | PCAEConfig) -> tuple[list[Layer], int]:
    """Layers of MAE or PCAE, and the bytes that are kept of an image outside them."""
    shape, size = cfg.shape, compute_bytes(cfg)
    visible = num_visible(cfg.grid**2, method.mask_ratio)
    queries, pixels = cfg.grid**2 - visible, 3 * shape.patch_size**2
    target = FP32 * queries * pixels
    if isinstance(method, PCAEConfig):
        queries = teacher_schedule(queries, shape.depth, method.stages, method.keep_ratio, method.drop_case)[1]
        target = 2 * FP32 * queries * shape.width  # of a cosine both sides are kept
    encoded, decoded = visible + 1, visible + 1 + queries
    layers = [_self_layer(encoded, shape.width, shape.heads, size)] * shape.depth
    layers += [_self_layer(decoded, method.decoder_width, method.decoder_heads, size)] * method.decoder_depth
    ends = visible * pixels + 2 * encoded * shape.width + (decoded + queries) * method.decoder_width
    return layers, ends * size + target


def _segmented(cfg: Config, method: RandSACConfig) -> tuple[list[Layer], int]:
    """Layers of RandSAC, and the bytes that are kept of an image outside them. Masks that all images share are left out."""
    shape, size = cfg.shape, compute_bytes(cfg)
    encoded, queries = randsac_tokens(method, cfg.grid)
    mask = size * encoded**2 if method.ragged and not method.share_segments else 0
    layers = [_self_layer(encoded, shape.width, shape.heads, size, mask)] * shape.depth
    layers += [_cross_layer(cfg, method, queries, encoded + method.predict_first, mask)] * method.decoder_depth
    pixels = 3 * shape.patch_size**2
    # For the mixes of the skips all encoder layers are stacked in a copy.
    copies = 2 if method.skip == "none" else shape.depth
    ends = encoded * pixels + copies * encoded * shape.width + 2 * queries * method.decoder_width
    return layers, ends * size + FP32 * queries * pixels


def _classifier(cfg: Config, method: FinetuneConfig) -> tuple[list[Layer], int]:
    """Layers of fine-tuning, and the bytes that are kept of an image outside them."""
    shape, size, counts = cfg.shape, compute_bytes(cfg), classifier_tokens(cfg, method)
    layers = [_self_layer(count + method.class_token, shape.width, shape.heads, size) for count in counts[:-1]]
    copies = sum(
        count + method.class_token for before, count in zip(counts, counts[1:], strict=False) if before != count
    )
    ends = counts[0] * 3 * shape.patch_size**2 + copies * shape.width
    return layers, ends * size + 2 * FP32 * method.num_classes


@dataclass(frozen=True)
class Activations:
    """Bytes an image: ``kept`` from the forward to the backward pass, and ``working``, what the largest layer needs meanwhile."""

    kept: int
    working: int

    @property
    def peak(self) -> int:
        """At most at a time."""
        return self.kept + self.working


def activations(cfg: Config, checkpointing: Checkpointing) -> Activations:
    """Bytes of activations an image with these layers computed again (as ``engine.checkpoint_layers``)."""
    method = cfg.method
    if isinstance(method, FinetuneConfig):
        layers, ends = _classifier(cfg, method)
    elif isinstance(method, RandSACConfig):
        layers, ends = _segmented(cfg, method)
    else:
        layers, ends = _masked(cfg, method)
    kept = ends
    for index, layer in enumerate(layers):
        if checkpointing == "none" or (isinstance(checkpointing, int) and index % checkpointing):
            kept += layer.kept
        else:
            kept += layer.inputs + (layer.products if checkpointing == "selective" else 0)
    return Activations(kept, max(layer.kept for layer in layers))


def layer_sizes(items: list[Parameter]) -> tuple[int, list[int]]:
    """Numbers of what is in no layer, and of each layer."""
    layers: dict[str, int] = {}
    for item in items:
        name = ".".join(item.name.split(".")[:3]) if ".blocks." in item.name else ""
        layers[name] = layers.get(name, 0) + item.size
    return layers.pop(""), list(layers.values())


def passing(cfg: Config, shards: int, *, reshard: bool, accumulates: bool) -> int:
    """Bytes that come and go in a step: gathered weights in compute precision, and gradients that are not reduced yet.

    With a state that is not shared out, or not freed after the forward pass, those are of the whole method, else of two
    layers and of what is in no layer. Gradients of micro-batches before the last stay whole, in fp32, in every engine.
    """
    own = parameters(cfg)
    rest, layers = layer_sizes(own)
    whole, some = rest + sum(layers), rest + 2 * max(layers)
    gathered = some if shards > 1 and reshard else whole
    waiting = FP32 * sum(p.size for p in own if p.trained) if accumulates else 0
    unreduced = (some if shards > 1 else whole) * compute_bytes(cfg)
    return gathered * compute_bytes(cfg) + max(waiting, unreduced)
