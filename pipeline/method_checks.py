"""What no setting of a method can see alone; for `pipeline.config`."""

from collections.abc import Iterable

from pipeline.costs import finetune_tokens, num_visible, teacher_schedule
from pipeline.eval_settings import FinetuneConfig
from pipeline.settings import Config, MAEConfig, PCAEConfig, RandSACConfig


def check_method(cfg: Config) -> Iterable[str]:
    """Every problem of the method's settings, each a line that names the key."""
    method, grid, shape = cfg.method, cfg.grid, cfg.shape
    if isinstance(method, FinetuneConfig):
        yield from _check_finetune(cfg, method)
        return
    if method.decoder_width % (2 * method.decoder_heads):
        yield (f"method.decoder_width = {method.decoder_width}: should be a multiple of 2 x method.decoder_heads "
               f"({method.decoder_heads})")  # fmt: skip
    if method.decoder_width % 4:
        yield f"method.decoder_width = {method.decoder_width}: should be a multiple of 4 for the 2-D positions"
    if isinstance(method, RandSACConfig):
        yield from _check_segments(cfg, method)
    if not isinstance(method, PCAEConfig | MAEConfig):
        return
    visible = num_visible(grid**2, method.mask_ratio)
    if not 0 < visible < grid**2:
        yield f"method.mask_ratio = {method.mask_ratio}: leaves {visible} of {grid**2} patches visible"
    elif isinstance(method, PCAEConfig):
        if method.stages > shape.depth:
            yield f"method.stages = {method.stages}: should be at most {shape.depth}, the blocks of {cfg.model.name}"
        elif not teacher_schedule(grid**2 - visible, shape.depth, method.stages, method.keep_ratio)[1]:
            yield (f"method.keep_ratio = {method.keep_ratio}: keeps none of {grid**2 - visible} masked patches "
                   f"after {method.stages} stages; raise it or lower method.stages")  # fmt: skip
        yield from _check_average(cfg)


def _check_finetune(cfg: Config, method: FinetuneConfig) -> Iterable[str]:
    depth, drops = cfg.shape.depth, method.drops(cfg.shape.depth)
    if drops and drops[-1] >= depth:
        yield f"method.drop_after = {list(drops)}: should be below {depth}, the blocks of {cfg.model.name}, counted from 0"
    elif not all(finetune_tokens(cfg.grid**2, depth, drops, method.drop_ratio)):
        yield f"method.drop_ratio = {method.drop_ratio}: leaves no patch after {len(drops)} drops; lower it"
    if cfg.eval.label_fraction < 1 and cfg.data.shuffle == "windowed":
        yield f"eval.label_fraction = {cfg.eval.label_fraction}: its images lie all over the file; set data.shuffle=full"
    if cfg.optim.ema is not None:
        yield from _check_average(cfg)


def _check_segments(cfg: Config, method: RandSACConfig) -> Iterable[str]:
    grid, size, part = cfg.grid, method.segment_size, method.partition_size
    if method.segments == "blob":
        if method.order == "raster":
            yield "method.order = raster: blobs have no raster order; use random or hierarchical, or method.segments=square"
        if method.num_segments > grid**2:
            yield f"method.num_segments = {method.num_segments}: should be at most {grid**2}, the patches of an image"
        if not 0.01 <= method.blob_std[0] <= method.blob_std[1] <= 10:
            yield f"method.blob_std = {list(method.blob_std)}: should be two shares of the grid, 0.01 <= low <= high <= 10"
        if method.order == "hierarchical" and method.num_partitions > method.num_segments:
            yield (f"method.num_partitions = {method.num_partitions}: should be at most method.num_segments "
                   f"({method.num_segments})")  # fmt: skip
        return
    for key in ("num_segments", "num_partitions", "blob_std"):
        if getattr(method, key) != RandSACConfig.model_fields[key].default:
            yield f"method.{key} = {getattr(method, key)}: is for blobs; set method.segments=blob or leave it out"
    if method.share_segments:
        yield "method.share_segments = True: is for method.segments=blob; squares are the same in all images"
    if grid % size:
        sides = [n for n in range(1, grid) if grid % n == 0]
        yield (f"method.segment_size = {size}: should divide the grid of {grid} patches "
               f"({cfg.data.image_size} px / {cfg.shape.patch_size}): one of {sides}")  # fmt: skip
    elif grid == size:
        yield f"method.segment_size = {size}: makes one segment of the whole image (K = 1): nothing is left to predict"
    elif method.order == "hierarchical" and (grid // size) % part:
        yield (f"method.partition_size = {part}: should divide the {grid // size} segments along a side "
               "(or set method.order=random)")  # fmt: skip


def _check_average(cfg: Config) -> Iterable[str]:
    optim = cfg.optim
    if optim.ema is None:
        yield "optim.ema: is required and not set: PCAE's teacher is an average of the encoder, such as 0.9999"
    for key, value in zip(("ema", "ema_end"), cfg.momentum, strict=True):
        if not 0 <= value <= 1:
            yield (f"optim.ema_batch = {optim.ema_batch}: makes optim.{key} {value:.4g} at a batch of "
                   f"{cfg.train.global_batch}; raise optim.ema_batch or optim.{key}")  # fmt: skip
