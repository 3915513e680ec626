"""DeepSpeed's configuration, made from ours. No torch."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.settings import Config, DeepSpeedConfig, EngineConfig

ONLY_DEEPSPEED = ("zero_stage", "deepspeed", "offload", "offload_params", "offload_dir")
ONLY_STAGE_3 = ("prefetch_bucket_size", "max_live_parameters")  # of engine.deepspeed


def zero_problems(engine: EngineConfig) -> Iterator[str]:
    """What is wrong with ``engine.zero_stage``, ``engine.deepspeed`` and ``engine.offload*``, a sentence each."""
    if engine.name != "deepspeed":
        for key in ONLY_DEEPSPEED:
            default = EngineConfig.model_fields[key].get_default()
            if getattr(engine, key) != default:
                cure = "leave it out"
                if not isinstance(default, DeepSpeedConfig):  # it may come from a file
                    cure += f", or set engine.{key}={'null' if default is None else str(default).lower()}"
                yield f"engine.{key}: is for engine.name=deepspeed (not {engine.name}); {cure}"
        return
    stage, offload = engine.zero_stage, engine.offload
    if not stage:
        yield f"engine.zero_stage = {stage}: should be 1, 2 or 3; stage 0 shares nothing: for that set engine.name=ddp"
    for key in ONLY_STAGE_3 if stage in (1, 2) else ():
        value = getattr(engine.deepspeed, key)
        if value != DeepSpeedConfig.model_fields[key].get_default():
            yield f"engine.deepspeed.{key} = {value}: is for engine.zero_stage=3 (not {stage}); leave it out"
    if offload != "none" and stage == 1:
        yield f"engine.offload = {offload}: is for engine.zero_stage=2 or 3 (not 1); leave it out"
    if offload == "nvme" and stage == 2:
        yield "engine.offload = nvme: is for engine.zero_stage=3 (not 2); set engine.offload=cpu"
    if offload == "nvme" and not engine.offload_dir:
        yield "engine.offload_dir: is required and not set: a folder on a fast disk of each host, for engine.offload=nvme"
    if offload != "nvme" and engine.offload_dir is not None:
        yield f"engine.offload_dir = {engine.offload_dir}: is for engine.offload=nvme (not {offload}); leave it out"
    if engine.offload_params and (stage != 3 or offload == "none"):
        yield ("engine.offload_params = True: is for engine.zero_stage=3 with engine.offload=cpu or nvme "
               f"(not {stage} with {offload}); leave it out")  # fmt: skip


def swap_folder(cfg: Config) -> Path:
    """Where the files of ``engine.offload=nvme`` lie: a folder of this run alone, the same when it is resumed."""
    name = hashlib.sha256(str(Path(cfg.run.dir).resolve()).encode()).hexdigest()[:12]
    return Path(cfg.engine.offload_dir or "") / f"patchmill-{name}"


def _offload(cfg: Config) -> dict[str, Any]:
    offload = cfg.engine.offload
    if offload == "none":
        return {}
    optimizer: dict[str, Any] = {"device": offload}
    if offload == "nvme":
        optimizer["nvme_path"] = str(swap_folder(cfg))
    return {"offload_optimizer": optimizer} | (
        {"offload_param": {"device": "cpu"}} if cfg.engine.offload_params else {}
    )


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
        **_offload(cfg),
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
        # A constant: the loss scale of the other engines is put in its place, which is in checkpoints.
        "fp16": {"enabled": cfg.engine.precision == "fp16", "loss_scale": 1.0},
        # Gradients are summed and reduced in fp32, as by the other engines.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        # Torch's AdamW updates what lies on the host too: DeepSpeed's would be compiled for two minutes first.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at each micro-batch
    }
