"""`patchmill check`: what can be known before training starts, without torch."""

import os
import shutil
from pathlib import Path

from pipeline.config import Config, ConfigError, UserError, binding_differences, load_config
from pipeline.estimate import flops_per_image
from pipeline.order import steps_per_epoch


def _data(cfg: Config, which: str, path: str) -> tuple[str, int]:
    """(a line that describes a data file, its number of samples). Raises UserError when it is broken."""
    if cfg.data.loader == "ffcv":
        from data_prep.verify import check_seal

        seal = check_seal(Path(path))
        return f"data.{which}: {seal.num_samples} images, {len(seal.classes)} classes, sealed, {path}", seal.num_samples
    from data_prep.scan import load_manifest

    manifest = load_manifest(Path(path))
    return f"data.{which}: {manifest.num_samples} images, {len(manifest.classes)} classes, {path}", manifest.num_samples


def check(cfg: Config) -> str:
    """A summary of a configuration whose data and folders are in order. Raises ConfigError with every problem."""
    lines, problems = [], []
    samples = cfg.data.num_samples
    if cfg.data.loader != "synthetic":
        for which, path in (("train", cfg.data.train), ("val", cfg.data.val)):
            try:
                if path is not None:
                    line, count = _data(cfg, which, path)
                    lines.append(line)
                    samples = count if which == "train" else samples
            except UserError as error:
                problems.append(f"data.{which}: {error}")
    if not problems:
        try:
            per_epoch = steps_per_epoch(samples, cfg.train.global_batch)
            steps = cfg.train.steps or per_epoch * (cfg.train.epochs or 0)
            lines.append(f"train: {steps} steps of {cfg.train.global_batch} images, {per_epoch} an epoch, "
                         f"{flops_per_image(cfg).step * steps * cfg.train.global_batch:.3g} FLOP")  # fmt: skip
        except ValueError as error:
            problems.append(f"train.global_batch = {cfg.train.global_batch}: {error}")
    parent = next(folder for folder in [Path(cfg.run.dir), *Path(cfg.run.dir).parents] if folder.exists())
    if not os.access(parent, os.W_OK):
        problems.append(f"run.dir = {cfg.run.dir}: {parent} cannot be written")
    former = Path(cfg.run.dir) / "config.yaml"
    if (Path(cfg.run.dir) / "log.jsonl").is_file() and former.is_file():
        differences = binding_differences(load_config([former]), cfg)
        problems += [f"run.dir = {cfg.run.dir}: holds a run of another configuration: {line}" for line in differences]
    if problems:
        raise ConfigError(problems)
    lines.append(f"optim: lr {cfg.lr:.3g} = base_lr {cfg.optim.base_lr:.3g} x {cfg.train.global_batch} / 256")
    lines.append(f"run: {cfg.run.dir}, {shutil.disk_usage(parent).free / 2**30:.0f} GiB free")
    return "\n".join([*lines, "in order"])
