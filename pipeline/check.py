"""`patchmill check`: what can be known before training starts, without torch."""

import json
import os
import shutil
import subprocess
from collections.abc import Collection, Iterator
from itertools import zip_longest
from pathlib import Path

from pipeline.config import Config, ConfigError, UserError, binding_differences, load_config
from pipeline.estimate import flops_per_image
from pipeline.eval_settings import FinetuneConfig
from pipeline.order import Plan
from pipeline.zero_config import deepspeed_config, swap_folder
from pipeline.zero_memory import swap_bytes


def _data(cfg: Config, which: str, path: str) -> tuple[str, int]:
    """(a line that describes a data file, its number of samples). Raises UserError when it is broken."""
    if cfg.data.loader == "ffcv":
        from data_prep.verify import check_seal

        seal = check_seal(Path(path))
        return f"data.{which}: {seal.num_samples} images, {len(seal.classes)} classes, sealed, {path}", seal.num_samples
    from data_prep.manifest import load_manifest

    manifest = load_manifest(Path(path))
    return f"data.{which}: {manifest.num_samples} images, {len(manifest.classes)} classes, {path}", manifest.num_samples


def dataset_size(cfg: Config) -> int | None:
    """The number of training samples as the seal or the manifest states it; None where there is no file yet.

    Raises UserError for a file that is there and damaged.
    """
    if cfg.data.loader == "synthetic":
        return cfg.data.num_samples
    if cfg.data.train is None or not Path(cfg.data.train).exists():
        return None
    if cfg.data.loader == "ffcv":
        from data_prep.verify import load_seal

        return int(load_seal(Path(cfg.data.train))["num_samples"])
    from data_prep.manifest import load_header

    return int(load_header(Path(cfg.data.train))["num_samples"])


def _classes(cfg: Config, path: str) -> list[str]:
    if cfg.data.loader == "ffcv":
        from data_prep.verify import load_seal

        return list(load_seal(Path(path))["classes"])
    from data_prep.manifest import load_header

    return list(load_header(Path(path))["classes"])


def num_classes(cfg: Config) -> int:
    """How many classes the training images have. Raises UserError when there are no such images."""
    if cfg.data.loader == "synthetic":
        return cfg.data.num_classes
    if cfg.data.train is None:
        raise UserError("data.train: is required here and not set; add data.train=PATH")
    return len(_classes(cfg, cfg.data.train))


def require_same_classes(cfg: Config) -> None:
    """Raises UserError when the training and the validation images have not the same class index: labels would not agree."""
    if cfg.data.loader == "synthetic" or cfg.data.train is None or cfg.data.val is None:
        return
    train, val = (_classes(cfg, path) for path in (cfg.data.train, cfg.data.val))
    if train != val:
        pairs = zip_longest(train, val, fillvalue="no class")
        label, (a, b) = next((label, pair) for label, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(f"data.val = {cfg.data.val}: its class index is not that of data.train ({len(val)} classes and "
                        f"{len(train)}; label {label} is {b!r} and {a!r}); scan it again with --against the training set's "
                        "manifest")  # fmt: skip


def _staging(cfg: Config) -> Iterator[str]:
    """Lines on the copies that ``data.stage_in`` will make. Raises UserError when it cannot make them."""
    from data_prep.stage import bytes_there, check_trusted, staged_path

    if cfg.data.stage_in is None:
        return
    folder = Path(cfg.data.stage_in).resolve()
    betons = [Path(path) for path in (cfg.data.train, cfg.data.val) if path is not None]
    above = next(parent for parent in [folder, *folder.parents] if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"data.stage_in = {folder}: {above} cannot be written; set it to another folder")
    free, needed = shutil.disk_usage(above).free, 0
    for copy, size in {staged_path(beton, folder): beton.stat().st_size for beton in betons}.items():
        check_trusted(copy)
        if copy.exists():
            yield f"stage in: {copy} is there"
        else:
            needed += size - bytes_there(copy)
            yield f"stage in: {size / 2**30:.2f} GiB to {copy}"
    yield f"stage in: {needed / 2**30:.2f} GiB to copy, {free / 2**30:.2f} GiB free in {folder}"
    if free < needed:
        raise UserError(f"data.stage_in = {folder}: the copies need {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free; "
                        "make room there, or leave it out")  # fmt: skip


def _offload(cfg: Config) -> Iterator[str]:
    """Lines on the files that ``engine.offload=nvme`` keeps. Raises UserError where they could not be made, or not read."""
    if cfg.engine.offload_dir is None:
        return
    folder = swap_folder(cfg)
    above = next(parent for parent in folder.resolve().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(
            f"engine.offload_dir = {cfg.engine.offload_dir}: {above} cannot be written; set it to another folder"
        )
    compiler = shutil.which("g++")
    if compiler is None or subprocess.run([compiler, "-E", "-xc++", "-"], input=b"#include <libaio.h>", capture_output=True,
                                          check=False).returncode:  # fmt: skip
        raise UserError("engine.offload = nvme: needs g++, libaio with its headers, for GPUs nvcc (apt: g++ libaio-dev; "
                        "conda: cxx-compiler libaio); install them, or set engine.offload=cpu")  # fmt: skip
    needed, free = swap_bytes(cfg), shutil.disk_usage(above).free
    yield f"offload: files in {folder}: {needed / 2**30:.2f} GiB over all hosts, {free / 2**30:.2f} GiB free here"
    if free < needed:  # it may not be here that the run will be
        yield (f"warning: engine.offload_dir = {cfg.engine.offload_dir}: one host alone would have too little room in {above}; "
               "make room there, set it to another folder, or take more hosts")  # fmt: skip


def _former(cfg: Config) -> Iterator[str]:
    """What differs from the run that is in the folder."""
    folder = Path(cfg.run.dir)
    if (folder / "log.jsonl").is_file() and (folder / "config.yaml").is_file():
        for line in binding_differences(load_config([folder / "config.yaml"]), cfg):
            yield f"run.dir = {folder}: holds a run of another configuration: {line}"


def check(cfg: Config, coming: Collection[str] = ()) -> str:
    """A summary of a configuration whose data and folders are in order. Raises ConfigError with every problem.

    ``coming``: which of train and val are still to be packed; nothing is asked of their files.
    """
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update=dict.fromkeys(coming))})
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
    if (
        isinstance(cfg.method, FinetuneConfig)
        and cfg.data.loader != "synthetic"
        and cfg.data.val is None
        and "val" not in coming
    ):
        problems.append("data.val: is required and not set: a classifier is tested on its images")
    if not problems:
        for look in (_staging, _offload, require_same_classes):
            try:
                lines += look(cfg) or []
            except UserError as error:
                problems.append(str(error))
    if not problems and "train" not in coming:
        try:
            plan, batch = Plan.of(cfg, cfg.labelled(samples)), cfg.train.global_batch
            flops = flops_per_image(cfg).step * plan.total_steps * batch
            lines.append(
                f"train: {plan.total_steps} steps of {batch} images, {plan.steps_per_epoch} an epoch, {flops:.3g} FLOP"
            )
        except UserError as error:
            problems.append(str(error))
    parent = next(folder for folder in [Path(cfg.run.dir), *Path(cfg.run.dir).parents] if folder.exists())
    if not os.access(parent, os.W_OK):
        problems.append(f"run.dir = {cfg.run.dir}: {parent} cannot be written")
    problems += _former(cfg)
    if problems:
        raise ConfigError(problems)
    lines.append(f"optim: lr {cfg.lr:.3g} = base_lr {cfg.optim.base_lr:.3g} x {cfg.train.global_batch} / 256")
    if cfg.engine.name == "deepspeed":
        lines.append(f"DeepSpeed's configuration for one process: {json.dumps(deepspeed_config(cfg, 1))}")
    lines.append(f"run: {cfg.run.dir}, {shutil.disk_usage(parent).free / 2**30:.0f} GiB free")
    return "\n".join([*lines, "in order"])
