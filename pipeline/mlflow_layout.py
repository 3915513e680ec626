"""How runs look in MLflow, in one place: what its table is filtered, grouped and compared by. No torch, no MLflow.

experiment  ``tracking.experiment``, of the kind "model training"; the runs of an experiment are one table
run         a run folder each, named as the folder (``sweep/000`` within a sweep's run), found again by ``patchmill.key``
tags        ``kind`` (run, sweep, scale), ``method``, ``model``, ``data``, and of the latest start ``engine``, ``world_size``,
            ``precision``, ``device``, ``host``, ``run_dir``, ``patchmill.version``, ``torch.version``; ``mlflow.source.*`` with
            the code's commit, ``code.changed`` where it was not committed, ``mlflow.user``; of a job ``slurm.*``
            (``slurm.status.tags``); ``mlflow.parentRunId`` in a sweep
parameters  every setting, flat, with dotted keys, as it first was: MLflow's are final, what may change is a tag
datasets    ``training`` and ``validation``: name of the file, digest of the image set, classes and number of images, where it is
metrics     training lines as they are in the log, by step; MLflow's charts take ``samples_seen`` and ``flops`` as the x axis;
            ``eval/NAME_WEIGHTS`` of probes and ``eval/heldout_loss``; ``system/*`` by MLflow's own monitor
artifacts   ``config.yaml``, ``data_seal.json``, ``figures/``
models      with ``patchmill sync --encoder``: an encoder with its signature (``pipeline.mlflow_model``)

All of it is in the run folder first (``mlflow.json`` has tags and datasets), so that ``sync`` gives any store the same.
"""

import contextlib
import getpass
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pipeline.config import Config, UserError

TRAINING: Final = "training"
DIGEST: Final = 16  # characters of an image set's name; MLflow takes 36 at most
GIT_S: Final = 10.0
# What a sample of a beton holds, in MLflow's words.
SCHEMA: Final = json.dumps({"mlflow_colspec": [{"name": "image", "type": "binary", "required": True},
                                               {"name": "label", "type": "long", "required": True}]})  # fmt: skip

Input = dict[str, str]


def engine_name(cfg: Config) -> str:
    """The engine with ZeRO's stage, such as ``fsdp2`` or ``zero3``."""
    return f"zero{cfg.engine.zero_stage}" if cfg.engine.name == "deepspeed" else cfg.engine.name


def tags(cfg: Config, folder: Path, *, world_size: int, device: str, versions: Mapping[str, str]) -> dict[str, str]:
    """A run's tags at a start, for ``folder`` as its run folder."""
    data = Path(cfg.data.train).stem if cfg.data.train else cfg.data.loader
    found = {
        "kind": "run", "method": cfg.method.name, "model": cfg.model.name, "data": data, "engine": engine_name(cfg),
        "world_size": str(world_size), "precision": cfg.engine.precision, "device": device, "host": platform.node(),
        "run_dir": str(folder.resolve()), "patchmill.version": versions["patchmill"], "torch.version": versions["torch"],
        "mlflow.source.name": "patchmill train", "mlflow.source.type": "JOB" if "SLURM_JOB_ID" in os.environ else "LOCAL",
    }  # fmt: skip
    with contextlib.suppress(OSError, KeyError):  # a user without a name
        found["mlflow.user"] = getpass.getuser()
    return found | code_tags(Path(__file__).resolve().parents[1])


def code_tags(root: Path) -> dict[str, str]:
    """The commit of the code in ``root``, a git tree or a job's copy of one, and whether it was changed; {} without one."""
    if (root / "COMMIT").is_file():
        commit, changed = (root / "COMMIT").read_text(), bool((root / "UNCOMMITTED.diff").read_bytes())
    elif (root / ".git").exists():
        try:
            commit, status = (
                _git(root, *words) for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
            )
        except (OSError, subprocess.SubprocessError):  # no git, another's tree, a disk that does not answer
            return {}
        changed = bool(status)
    else:
        return {}
    return {"mlflow.source.git.commit": commit.strip(), "code.changed": str(changed).lower()}


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, check=True, text=True, timeout=GIT_S).stdout


def inputs(cfg: Config, image_set: str, num_images: int, num_classes: int) -> list[Input]:
    """The run's datasets: the training images as they were opened, and data.val where it is there and whole."""
    found = [_input(TRAINING, cfg.data.train, cfg.data.loader, image_set, num_images, num_classes)]
    if cfg.data.val and cfg.data.loader != "synthetic":
        with contextlib.suppress(UserError):  # what is not opened need not be there
            facts = _header(Path(cfg.data.val), cfg.data.loader)
            found.append(_input("validation", cfg.data.val, cfg.data.loader, facts["image_set"], facts["num_samples"],
                                len(facts["classes"])))  # fmt: skip
    return found


def _header(path: Path, loader: str) -> Mapping[str, Any]:
    if loader == "ffcv":
        from data_prep.verify import load_seal

        return load_seal(path)
    from data_prep.manifest import load_header

    return load_header(path)


def _input(context: str, path: str | None, loader: str, image_set: str, num_images: int, num_classes: int) -> Input:
    """Plain text under the names of MLflow's dataset entity, and the context that it is used in."""
    profile = {"num_rows": num_images, "num_classes": num_classes, "image_set": image_set}
    where = str(Path(path).resolve()) if path else loader
    return {"context": context, "name": Path(path).stem if path else image_set, "digest": image_set[:DIGEST],
            "source_type": "local", "source": json.dumps({"uri": where}), "schema": SCHEMA,
            "profile": json.dumps(profile)}  # fmt: skip
