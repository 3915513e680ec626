"""What a configuration costs, before anything runs. No torch."""

from pipeline.config import Config
from pipeline.costs import Flops, mae_flops, pcae_flops, randsac_flops
from pipeline.settings import PCAEConfig, RandSACConfig


def flops_per_image(cfg: Config) -> Flops:
    """FLOPs of one image, forward and as a training step, with the tokens and the decoder that the configuration runs."""
    method, tokens = cfg.method, cfg.grid**2
    decoder = method.decoder_depth, method.decoder_width
    if isinstance(method, RandSACConfig):
        return randsac_flops(cfg.shape, tokens, method.segment_size**2, *decoder)
    if isinstance(method, PCAEConfig):
        return pcae_flops(cfg.shape, tokens, method.mask_ratio, method.stages, method.keep_ratio, *decoder)
    return mae_flops(cfg.shape, tokens, method.mask_ratio, *decoder)
