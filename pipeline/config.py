"""Configuration: the only place that reads YAML; imports no torch. The settings themselves: ``pipeline.settings``.

Precedence: defaults < YAML files left to right < ``dotted.key=value``. A problem names its key, its value, what
would be right and, for a key that does not exist, the nearest one that does; all problems are reported at once.
"""

import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from pipeline.eval_settings import FinetuneConfig
from pipeline.method_checks import check_method
from pipeline.section import Section
from pipeline.settings import (
    EXPONENT,
    METHOD_CONFIGS,
    Config,
    OptimConfig,
    PCAEConfig,
)
from pipeline.zero_config import zero_problems

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"

__all__ = [
    "Config",
    "ConfigError",
    "RankLost",
    "RunFailed",
    "UserError",
    "binding_differences",
    "find_config",
    "flatten",
    "load_config",
    "read_yaml",
]


class UserError(Exception):
    """A mistake of the user (configuration, missing or broken input): one clear line, exit code 2."""


class RunFailed(Exception):  # noqa: N818  it says what happened
    """A run that cannot go on, for a reason that is known and not a mistake in the command: one clear line, exit code 1."""


class RankLost(RunFailed):
    """Another process of the run has ended or does not answer."""


class ConfigError(UserError):
    """All problems of a configuration, one a line, in ``problems``."""

    def __init__(self, problems: Sequence[str]) -> None:
        """Keep the list; the message joins it."""
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


# Settings that may change when a run is resumed: where things lie, how often something is said, how fast it runs.
FREE_ON_RESUME = ("run.", "tracking.", "log.", "checkpoint.", "eval.", "guard.", "profile.", "slurm.", "chain.", "data.train",
                  "data.val", "data.jit",
                  "data.threads", "data.stage_in", "data.eval_crop", "method.init", "train.micro_batch",
                  "engine.name", "engine.zero_stage",
                  "engine.deepspeed.", "engine.offload", "engine.shard_size", "engine.reshard_after_forward",
                  "engine.checkpoint_layers", "engine.compile", "engine.backend", "engine.interface",
                  "engine.timeout_s")  # fmt: skip

PATHS = {"run": ("dir",), "method": ("init",), "data": ("train", "val", "stage_in"), "engine": ("offload_dir",),
         "chain": ("train_images", "val_images")}  # fmt: skip


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def binding_differences(old: Config, new: Config) -> list[str]:
    """The settings that differ and may not on resume, each as ``key = old (not new)``."""
    a, b = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    labels = ("eval.label_fraction", "eval.label_seed") if isinstance(new.method, FinetuneConfig) else ()
    keys = sorted(key for key in a.keys() | b.keys() if key in labels or not key.startswith(FREE_ON_RESUME))
    return [f"{key} = {a.get(key)} (not {b.get(key)})" for key in keys if a.get(key) != b.get(key)]


class _Loader(yaml.SafeLoader):
    """safe_load that refuses a key given twice and reads 1e-3 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {key!r} is given twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(*EXPONENT)
# 1:30:00 is a text, as in YAML 1.2, and not 5400.
for _first in "-+0123456789":
    _Loader.yaml_implicit_resolvers[_first].insert(0, ("tag:yaml.org,2002:str", re.compile(r"^[-+]?\d+(:\d\d?)+$")))


def find_config(name: str) -> Path:
    """The file of a configuration: a path, or a shipped one by name (``quickstart/randsac``). Raises UserError."""
    shipped = CONFIG_DIR / f"{name}.yaml"
    for path in (Path(name), shipped):
        if path.is_file():
            return path
    known = [str(path.relative_to(CONFIG_DIR).with_suffix("")) for path in sorted(CONFIG_DIR.glob("*/*.yaml"))]
    near = difflib.get_close_matches(name, known, 3, 0.4) or known
    raise UserError(
        f"no configuration {name!r}: it is neither a file nor one of the shipped ones, such as {', '.join(near)}"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, empty for an empty one. Raises UserError for what is no mapping or no YAML."""
    try:
        tree = yaml.load(path.read_text(), _Loader)  # noqa: S506  a SafeLoader
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a configuration is a mapping of sections, not {type(tree).__name__}")
    return tree


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{text!r} is not an override; write section.key=value, such as train.global_batch=256")
    try:
        tree: Any = yaml.load(value, _Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError:
        tree = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return cast(dict[str, Any], tree)


def _known_keys(location: Sequence[str], method: str | None) -> list[str]:
    if location and location[0] == "method":
        return list(METHOD_CONFIGS[method].model_fields) if method in METHOD_CONFIGS else ["name"]
    section: type[Section] = Config
    for name in location:
        section = cast(type[Section], section.model_fields[name].annotation)
    return list(section.model_fields)


def _explain(error: Any, tree: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """(location, sentence) of one pydantic error."""
    method = tree["method"].get("name") if isinstance(tree.get("method"), Mapping) else None
    location = tuple(str(part) for part in error["loc"])
    if len(location) > 1 and location[0] == "method" and location[1] == method:
        location = (location[0], *location[2:])  # pydantic puts the union's tag between
    if location[:2] == ("engine", "checkpoint_layers"):
        location = location[:2]  # what follows names a member of the union
    key, kind = ".".join(location), error["type"]
    if kind == "extra_forbidden":
        known = _known_keys(location[:-1], method)
        near = difflib.get_close_matches(location[-1], known, 1, 0.5)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"known here: {', '.join(known)}"
        return location, f"{key}: there is no such setting; {hint}"
    if kind == "missing":
        return location, f"{key}: is required and not set"
    if kind == "union_tag_invalid":
        return location, f"method.name = {method!r}: should be one of {', '.join(METHOD_CONFIGS)}"
    if kind == "union_tag_not_found":
        return ("method", "name"), f"method.name: is required and not set: one of {', '.join(METHOD_CONFIGS)}"
    if location == ("engine", "checkpoint_layers"):
        return (
            location,
            f"{key} = {error['input']!r}: should be none, full, selective, or n of at least 1 for every n-th layer",
        )
    message = error["msg"][0].lower() + error["msg"][1:]
    return location, f"{key} = {error['input']!r}: {message.replace('input should', 'should')}"


def _without(tree: Mapping[str, Any], location: Sequence[str]) -> dict[str, Any]:
    copy = dict(tree)
    head = location[0] if location else ""
    if head in copy:
        if len(location) == 1 or not isinstance(copy[head], Mapping):
            del copy[head]
        else:
            copy[head] = _without(copy[head], location[1:])
    return copy


def _check_engine(cfg: Config) -> Iterable[str]:
    engine = cfg.engine
    if engine.name == "hsdp" and engine.shard_size is None:
        yield "engine.shard_size: is required and not set: how many processes share one copy, such as the GPUs of a host"
    if engine.name != "hsdp" and engine.shard_size is not None:
        yield f"engine.shard_size = {engine.shard_size}: is for engine.name=hsdp (not {engine.name}); leave it out"
    yield from zero_problems(engine)
    if engine.name not in ("fsdp2", "hsdp") and not engine.reshard_after_forward:
        yield (f"engine.reshard_after_forward = False: is for engine.name=fsdp2 or hsdp (not {engine.name}), which alone "
               "share out the weights; leave it out")  # fmt: skip


def _divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` that is not above ``most``."""
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)


def _check(cfg: Config) -> Iterable[str]:
    """What no field can see alone."""
    data, train, optim = cfg.data, cfg.train, cfg.optim
    if data.image_size % cfg.shape.patch_size:
        lower = data.image_size // cfg.shape.patch_size * cfg.shape.patch_size
        yield (f"data.image_size = {data.image_size}: should be a multiple of the patch size {cfg.shape.patch_size}, "
               f"such as {lower or cfg.shape.patch_size}")  # fmt: skip
    elif cfg.grid == 1:
        yield (f"model.patch_size = {cfg.shape.patch_size}: makes one patch of the whole image; it should divide "
               f"data.image_size ({data.image_size}) twice or more")  # fmt: skip
    else:
        yield from check_method(cfg)
    if data.loader != "synthetic" and data.train is None:
        yield f"data.train: is required and not set: the {'beton' if data.loader == 'ffcv' else 'manifest'} to train on"
    if cfg.eval.loss_every and data.loader != "synthetic" and data.val is None:
        yield f"data.val: is required and not set: eval.loss_every = {cfg.eval.loss_every} tests on its images"
    if cfg.eval.online_every and data.loader != "synthetic" and data.val is None:
        yield f"data.val: is required and not set: eval.online_every = {cfg.eval.online_every} probes its images"
    if cfg.eval.online_every and cfg.eval.online_images < cfg.eval.knn_k:
        yield f"eval.online_images = {cfg.eval.online_images}: should be eval.knn_k ({cfg.eval.knn_k}) or more"
    if cfg.profile.start_step and train.steps and cfg.profile.start_step > train.steps:
        yield f"profile.start_step = {cfg.profile.start_step}: comes never, the run has train.steps = {train.steps}"
    if data.stage_in is not None and data.loader != "ffcv":
        yield f"data.stage_in = {data.stage_in}: copies betons; set data.loader=ffcv (not {data.loader}) or leave it out"
    if data.shuffle == "windowed" and data.loader != "ffcv":
        yield f"data.shuffle = windowed: mixes the pages of a beton; set data.loader=ffcv (not {data.loader}) or data.shuffle=full"
    for section, (low, high) in (("data", data.crop_scale), ("eval", cfg.eval.crop_scale)):
        if not 0 < low <= high <= 1:
            yield f"{section}.crop_scale = {[low, high]}: should be two shares of the area, 0 < low <= high <= 1"
    if not all(0 <= beta < 1 for beta in optim.betas):
        yield f"optim.betas = {list(optim.betas)}: should lie in [0, 1)"
    if (train.epochs is None) == (train.steps is None):
        yield "train.epochs, train.steps: set exactly one of the two; null takes back what a file sets (train.epochs=null)"
    if optim.warmup_epochs is not None and optim.warmup_steps is not None:
        yield "optim.warmup_epochs, optim.warmup_steps: set at most one of the two; null takes back what a file sets"
    if train.global_batch % cfg.micro_batch:
        yield (f"train.global_batch = {train.global_batch}: should be a multiple of train.micro_batch ({cfg.micro_batch}): "
               f"lower train.micro_batch to {_divisor(train.global_batch, cfg.micro_batch)}, or take a global batch of "
               f"{math.ceil(train.global_batch / cfg.micro_batch) * cfg.micro_batch}")  # fmt: skip
    yield from _check_engine(cfg)
    for key in ("ema", "ema_end", "ema_batch"):
        value = getattr(optim, key)
        if value != OptimConfig.model_fields[key].default and not isinstance(cfg.method, PCAEConfig | FinetuneConfig):
            yield f"optim.{key} = {value}: only method.name=pcae has a teacher, and finetune may have an average; leave it unset"


def _resolve_paths(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Paths become absolute, so that a run goes on from any working directory."""
    absolute = {}
    for section, keys in PATHS.items():
        part = tree.get(section)
        found = (
            {k: part[k] for k in keys if part.get(k) and isinstance(part[k], str)} if isinstance(part, Mapping) else {}
        )
        absolute[section] = {key: os.path.abspath(os.path.expanduser(value)) for key, value in found.items()}
    return _merge(dict(tree), {key: value for key, value in absolute.items() if value})


def _onoff(tree: dict[str, Any]) -> dict[str, Any]:
    """YAML reads a bare on or off as a boolean; data.jit means the words."""
    data = tree.get("data")
    if isinstance(data, Mapping) and isinstance(data.get("jit"), bool):
        return _merge(tree, {"data": {"jit": "on" if data["jit"] else "off"}})
    return tree


def load_config(
    paths: Sequence[str | Path], overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> Config:
    """Read YAML files (paths or names of shipped ones) and overrides into a checked ``Config``.

    ``defaults``: sections of settings that hold where neither says something.

    Raises ConfigError with every problem at once, UserError for a file that is missing or not YAML.
    """
    tree = dict(defaults or {})
    for path in paths:
        tree = _merge(tree, read_yaml(find_config(str(path))))
    for text in overrides:
        tree = _merge(tree, _override(text))
    tree = _onoff(_resolve_paths(tree))
    cfg: Config | None
    problems: list[str] = []
    reduced: tuple[tuple[str, ...], ...] = ()
    try:
        cfg = Config.model_validate(tree)
    except ValidationError as error:
        found = dict(_explain(item, tree) for item in error.errors())
        problems, reduced = list(found.values()), tuple(found)
        cfg = _repaired(tree, reduced)
    if cfg is not None:
        # A bad key was set aside to look further: what mentions it again is not repeated.
        problems += [text for text in _check(cfg) if not any(_mentions(text, ".".join(key)) for key in reduced)]
    if problems or cfg is None:
        raise ConfigError(problems)
    return cfg


def _mentions(problem: str, key: str) -> bool:
    """Whether a problem is about ``key``, or about a setting in it."""
    names = [part.split(" ")[0] for part in problem.split(":")[0].split(", ")]
    return any(f"{name}.".startswith(f"{key}.") for name in names)


def _repaired(tree: Mapping[str, Any], bad: Iterable[Sequence[str]]) -> Config | None:
    """The configuration with its bad keys set aside, when that much is enough to look for further problems."""
    for location in bad:
        tree = _without(tree, location)
    try:
        return Config.model_validate(_merge({"run": {"dir": "."}, "train": {"global_batch": 1}}, tree))
    except ValidationError:
        return None
