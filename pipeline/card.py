"""The model card of an exported encoder: what it is, what made it, what is known of it and what is not."""

import inspect
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from pipeline.compare import describe
from pipeline.config import Config, UserError
from pipeline.eval_settings import FinetuneConfig
from pipeline.history import HELDOUT, History, read_folder
from pipeline.mlflow_run import redact
from pipeline.runlog import LOG, Record, read_log

if TYPE_CHECKING:
    from pipeline.runs import Restored

SEAL: Final = "data_seal.json"
# The settings that make the weights and the results; the others say where a run lived, and may hold what is nobody's business.
SECTIONS: Final = ("method", "model", "data", "train", "optim", "engine", "eval")
WEIGHTS: Final = {
    "model": "the trained encoder's",
    "ema": "an average of the trained encoder's over the steps",
    "untrained": "the first ones, drawn from the seed: nothing was learned",
}
# What is told of the run's cost; its other facts name places.
COST: Final = ("step", "images seen", "FLOPs so far", "engine", "processes", "precision", "hours trained", "process-hours",
               "images/s (median)", "restarts", "roll-backs", "skipped steps", "ended")  # fmt: skip
USE: Final = """\
```python
import timm
import torch

model = timm.create_model("local-dir:/path/to/this/folder", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.inference_mode():
    images = transform(image)[None]  # of a PIL image in RGB
    tokens = model.forward_features(images)  # [1, {tokens}, {width}]
    {result}
```

Beside a torch without CUDA, PyPI's torchvision does not load ("operator torchvision::nms does not exist") and so neither does
timm. Take torchvision from https://download.pytorch.org/whl/cpu, or first declare two operators that are not used here:

```python
import torch

library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
```
"""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _names_only(value: Any) -> Any:
    """Settings without the folders of files: those are of the machine that trained."""
    if isinstance(value, Mapping):
        return {key: _names_only(item) for key, item in value.items()}
    return Path(value).name if isinstance(value, str) and "/" in value else value


def _front(restored: "Restored") -> str:
    encoder, method = restored.method.encoder, restored.cfg.method.name
    task = "image-classification" if encoder.num_classes else "image-feature-extraction"
    facts = {
        "license": "unknown",
        "library_name": "timm",
        "pipeline_tag": task,
        "tags": [task, "timm", "patchmill", method],
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---"


def _use(restored: "Restored") -> str:
    encoder = restored.method.encoder
    first = encoder.num_prefix_tokens
    features = f"features = tokens[:, {first}:].mean(1)  # what the probes of this card see"
    result = f"logits = model(images)  # [1, {encoder.num_classes}]" if encoder.num_classes else features
    patches = restored.cfg.grid**2
    tokens = f"{first} + {patches}" if first else str(patches)
    return USE.format(tokens=tokens, width=encoder.embed_dim, result=result)


def _origin(restored: "Restored", weights: str) -> str | None:
    """Where weights come from that this program did not train; None for those that it did."""
    imported = restored.state.get("imported")
    if weights == "untrained":
        return "None: these weights were not trained."
    if imported is None:
        return None
    told = [f"Trained elsewhere, and not known here: imported from `{imported['file']}` of {imported['program']}, sha256 "
            f"`{imported['sha256']}`.", *imported["notes"]]  # fmt: skip
    return "\n".join(f"- {line}" for line in told)


def _start(records: Sequence[Record]) -> str:
    """What the log says of the pretrained weights that a fine-tuning began with."""
    line = next((record for record in records if "init" in record), None)
    if line is None:
        return ""
    return (f"\n\nIt began with the `{line['init_weights']}` weights of step {line['init_step']:,} of the run "
            f"`{Path(line['init']).name}`, whose checkpoint has the seal `{line['init_seal']}`.")  # fmt: skip


def _labels(cfg: Config, num_samples: int, num_classes: int) -> Iterable[tuple[str, str]]:
    if not isinstance(cfg.method, FinetuneConfig):
        yield "classes (pretraining uses no labels)", f"{num_classes:,}"
        return
    yield "classes, whose labels were learned", f"{num_classes:,}"
    if cfg.eval.label_fraction < 1:
        yield "of them trained on", (f"about {cfg.labelled(num_samples):,} images: {100 * cfg.eval.label_fraction:g} % of each "
                                     f"class, drawn with eval.label_seed = {cfg.eval.label_seed}")  # fmt: skip


def _data(run_dir: Path, restored: "Restored") -> str:
    """The images by the seal that the run kept, else by the identity in its checkpoint."""
    path = run_dir / SEAL
    if not path.is_file():
        return _table(("", ""), [("image set", f"`{restored.state.get('image_set', '-')}`"),
                                 ("loader", restored.cfg.data.loader)])  # fmt: skip
    try:
        seal = json.loads(path.read_text())
        rows = [("image set", f"`{seal['image_set']}`"), ("images", f"{seal['num_samples']:,}"),
                *_labels(restored.cfg, seal["num_samples"], len(seal["classes"])),
                ("beton", f"{seal['size']:,} bytes"),
                *((f"sha256 of its {name}", f"`{value}`") for name, value in seal["sha256"].items()),
                ("sha256 of its seal", f"`{seal['digest']}`"),
                ("written with", ", ".join(f"{key} {value}" for key, value in seal["options"].items()))]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is damaged; remove it, or put back the .seal.json of the training images") from None
    return f"{_table(('', ''), rows)}\n\n`patchmill prep verify` proves that a beton is this one."


def _compute(history: History, records: Sequence[Record]) -> str:
    facts = describe(history)
    rows = {name: facts[name] for name in COST}
    if "/" in rows["ended"]:
        rows["ended"] = "failed"  # by an error that names files
    devices = dict.fromkeys(str(record["device"]) for record in records if "device" in record)
    return _table(("", "the run so far"), [*rows.items(), ("device", ", then ".join(devices) or "-")])


def _weights_of(name: str) -> str:
    """Whose an evaluation is, as its name ends; what the trainer measures itself is of the weights that it trains."""
    end = name.rpartition("_")[2]
    return end if end in (*WEIGHTS, "pixels") else "model"


def _results(history: History, step: int, weights: str) -> str:
    """The newest value of each evaluation in the log, of whatever weights, and which of them are of these."""
    last = {name: points[-1] for name, points in sorted(history.points.items())}
    if not last:
        return "None: the run's log has no evaluation."
    rows = [("held-out pretraining loss" if name == HELDOUT else f"`{name}`", _weights_of(name), f"{at:,}", f"{value:.4g}",
             ", ".join(f"{key}={_names_only(value)}" for key, value in history.changed.get(name, {}).items()) or "as configured")
            for name, (at, value) in last.items()]  # fmt: skip
    own = [f"`{name}`" for name, (at, _) in last.items() if _weights_of(name) == weights and at == step]
    table = _table(("evaluation", "weights", "step", "value", "settings"), rows)
    return (f"{table}\n\nAccuracies are in percent, on the run's validation images but where `data.*` was changed; weights "
            f"`pixels` are a probe of raw pixels. Of the weights in this folder: {', '.join(own) or 'none of them'}. One run: no "
            "spread is known.")  # fmt: skip


def _limits(restored: "Restored") -> Iterable[str]:
    cfg, encoder = restored.cfg, restored.method.encoder
    yield "What the table of results does not name was not evaluated: robustness, bias and fitness for any task among it."
    yield (f"Made for images of {cfg.data.image_size} px, cut to the middle {100 * cfg.data.eval_crop:g} % of their short side; "
           "for other sizes the positions have to be interpolated, which was not tried.")  # fmt: skip
    if cfg.data.resample == "area":
        yield "Images were resized by area (FFCV's); timm's nearest filter is `box`, whose pixels differ slightly."
    if not all(parameter.requires_grad for parameter in encoder.norm.parameters()):
        yield ("Pretraining read the outputs of the blocks and never the final norm: `norm` was frozen at the identity "
               "(weight 1, bias 0).")  # fmt: skip
    if getattr(cfg.method, "drop_ratio", 0):
        yield ("In the run tokens left on the way (`drop_ratio`), in training and evaluation; timm's model keeps all of them, "
               "costs more and gives other logits.")  # fmt: skip
    yield ("In fp32 on a CPU, with the same torch and number of threads, features are bit for bit those of the run's own encoder; "
           "with other versions and devices the last bits may differ.")  # fmt: skip
    yield ("The licence is left open (`unknown`): it is for whoever trained the weights to choose, and whether the licence of "
           "the training images allows it is theirs to find out.")  # fmt: skip


def model_card(run_dir: Path, restored: "Restored", weights: str) -> str:
    """The card, Markdown with YAML before it, of a restored run's encoder. Raises UserError for a damaged log or seal.

    Without user names and passwords of URLs and without the folders of files.
    """
    cfg, reference = restored.cfg, str(inspect.getdoc(inspect.getmodule(restored.method))).splitlines()[0]
    history, records, origin = read_folder(run_dir), read_log(run_dir / LOG), _origin(restored, weights)
    summary = "Resolved settings" if origin is None else "Resolved settings; nothing was trained with them"
    settings = cfg.model_dump(mode="json", include=set(SECTIONS))
    resolved = yaml.safe_dump({name: _names_only(settings[name]) for name in SECTIONS}, sort_keys=False)
    now = {"python": platform.python_version(), **{name: version(name) for name in ("patchmill", "torch", "timm")}}
    versions = [("trained with", restored.state.get("versions", {})), ("exported with", now)]
    million = sum(parameter.numel() for parameter in restored.method.encoder.parameters()) / 1e6
    sections = {
        "Use": _use(restored),
        "Method": reference + (_start(records) if weights != "untrained" else ""),
        "Training images": origin or _data(run_dir, restored),
        "Configuration": f"<details><summary>{summary}</summary>\n\n```yaml\n{resolved}```\n\n</details>",
        "Compute": origin or _compute(history, records),
        "Results": _results(history, restored.step, weights),
        "Limits": "\n".join(f"- {line}" for line in _limits(restored)),
        "Versions": _table(("", ""), [(when, ", ".join(f"{name} {value}" for name, value in known.items()) or "-")
                                      for when, known in versions]),
    }  # fmt: skip
    title = (f"# {cfg.model.name} by {cfg.method.name}, step {restored.step:,}\n\nA vision transformer of {million:.2f} M "
             f"parameters, timm's `{cfg.shape.timm_name}` in the size of `config.json`. Weights: {WEIGHTS[weights]}.")  # fmt: skip
    body = "\n\n".join(f"## {name}\n\n{text.rstrip()}" for name, text in sections.items())
    return redact(f"{_front(restored)}\n\n{title}\n\n{body}\n")
