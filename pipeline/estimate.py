"""What a configuration costs, before anything runs. No torch."""

from typing import assert_never

from pipeline.config import Config
from pipeline.costs import (
    Flops,
    finetune_flops,
    finetune_tokens,
    mae_flops,
    padded_tokens,
    pcae_flops,
    randsac_flops,
    segment_quota,
)
from pipeline.eval_settings import FinetuneConfig
from pipeline.settings import MAEConfig, PCAEConfig, RandSACConfig


def randsac_tokens(method: RandSACConfig, grid: int) -> tuple[int, int]:
    """(tokens in the encoder, queries of the decoder) as they are computed, padding included."""
    squares = (grid // method.segment_size) ** 2
    if method.ragged:
        segments = method.num_segments if method.segments == "blob" else squares
        padded = padded_tokens(grid**2, segments, method.token_keep)
        return padded, padded
    kept = segment_quota(method.segment_size**2, method.token_keep)
    return (squares - 1) * kept, (squares if method.predict_first else squares - 1) * kept


def classifier_tokens(cfg: Config, method: FinetuneConfig) -> list[int]:
    """Patch tokens in each block of a fine-tuned encoder and after the last, see ``finetune_tokens``."""
    depth = cfg.shape.depth
    return finetune_tokens(cfg.grid**2, depth, method.drops(depth), method.drop_ratio)


def flops_per_image(cfg: Config) -> Flops:
    """FLOPs of one image, forward and as a training step, with the tokens and the decoder that the configuration runs."""
    method, tokens = cfg.method, cfg.grid**2
    if isinstance(method, FinetuneConfig):
        return finetune_flops(
            cfg.shape, classifier_tokens(cfg, method), method.num_classes, class_token=method.class_token
        )
    decoder = method.decoder_depth, method.decoder_width
    if isinstance(method, RandSACConfig):
        return randsac_flops(cfg.shape, *randsac_tokens(method, cfg.grid), *decoder, null_token=method.predict_first,
                             self_attention=method.decoder_self_attention,
                             mixed_layers=0 if method.skip == "none" else cfg.shape.depth)  # fmt: skip
    if isinstance(method, PCAEConfig):
        return pcae_flops(
            cfg.shape, tokens, method.mask_ratio, method.stages, method.keep_ratio, *decoder, method.drop_case
        )
    if isinstance(method, MAEConfig):
        return mae_flops(cfg.shape, tokens, method.mask_ratio, *decoder)
    assert_never(method)
