"""The configuration that fine-tunes a run's encoder. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pipeline.check import dataset_size, num_classes
from pipeline.config import Config, UserError, find_config, load_config, read_yaml
from pipeline.eval_settings import FinetuneConfig

PRESETS: Final = {"vit_l": "eval/finetune_vit_l", "vit_h": "eval/finetune_vit_h"} | dict.fromkeys(
    ("vit_s", "vit_b"), "eval/finetune_vit_b") | dict.fromkeys(("vit_p", "vit_t"), "eval/finetune_small")  # fmt: skip


def finetune_config(source: Config, run_dir: Path, settings: Sequence[str], weights: str = "model") -> Config:
    """What fine-tunes the encoder of ``run_dir``, a run of ``source``, on its images: a preset by its size, then ``settings``.

    ``settings`` are files, shipped names or key=value; with a file that names the method the preset is left out. The run's own
    folder is ``finetune`` in that of the pretraining. Where the images are not packed yet the classes are 2, for a first check.
    Raises UserError for what is no pretraining, and ConfigError.
    """
    if isinstance(source.method, FinetuneConfig):
        raise UserError(f"{run_dir}: is a fine-tuned classifier; give the run of the pretraining, {source.method.init}")
    defaults: dict[str, Any] = {
        "run": {"dir": str(run_dir / "finetune")},
        "method": {"init": str(run_dir), "init_weights": weights, "position_grid": source.grid,
                   "class_token": source.method.name != "randsac",
                   "num_classes": 2},
        "data": source.data.model_dump(mode="json") | {"crop_scale": [0.08, 1]}, "optim": {"betas": [0.9, 0.999]},
        "tracking": source.tracking.model_dump(mode="json"),
        "train": {"seed": source.train.seed},
    }  # fmt: skip
    # What no recipe can know; what the user says goes before it.
    own = [f"model.name={source.model.name}", f"model.patch_size={source.shape.patch_size}",
           f"data.image_size={source.data.image_size}"]  # fmt: skip
    files, changes = [s for s in settings if "=" not in s], [s for s in settings if "=" in s]
    if not any("method" in read_yaml(find_config(name)) for name in files):
        files = [PRESETS[source.model.name], *files]
    cfg = load_config(files, [*own, *changes], defaults)
    images = dataset_size(cfg)
    if images is not None:
        own.append(f"method.num_classes={num_classes(cfg)}")
        cfg = load_config(files, [*own, *changes], defaults)
        steps = cfg.labelled(images) // cfg.train.global_batch
        if cfg.eval.loss_every is None and steps:
            own.append(f"eval.loss_every={steps}")  # once an epoch
    return load_config(files, [*own, *changes], defaults)
