"""DeepSpeed's configuration, made from ours. No torch."""

from typing import Any

from pipeline.config import Config


def deepspeed_config(cfg: Config, processes: int) -> dict[str, Any]:
    """DeepSpeed's configuration of ours; there is no other."""
    stage, settings = cfg.engine.zero_stage, cfg.engine.deepspeed
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": settings.reduce_bucket_size,
        "allgather_bucket_size": settings.reduce_bucket_size,
        "overlap_comm": settings.overlap_comm,
        # By default stage 3 replaces torch's linear function for the whole process, and never puts it back.
        "memory_efficient_linear": False,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": settings.prefetch_bucket_size,
            "stage3_max_live_parameters": settings.max_live_parameters,
            # Small parameters that stay whole would miss what is written into their parts.
            "stage3_param_persistence_threshold": 0,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,  # of no use but to its own arithmetic of batches
        "gradient_accumulation_steps": max(1, cfg.train.global_batch // processes // cfg.micro_batch),
        "zero_optimization": zero,
        "bf16": {"enabled": cfg.engine.precision == "bf16"},
        # Gradients are summed and reduced in fp32, as by the other engines.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
