"""The folder that export writes: timm's hub loader takes it, and its card says what is known, what is not, and no secret."""

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from exported import as_printed
from safetensors.torch import load_file
from torch import Tensor

from pipeline import checkpoint
from pipeline.config import Config, UserError, load_config
from pipeline.export import export
from pipeline.methods import build_method
from pipeline.runlog import RunLog
from pipeline.runs import restore
from pipeline.vit import IMAGE_MEAN, IMAGE_STD, normalise, timm

SEAL = {"image_set": "5e7", "num_samples": 1234567, "size": 99, "classes": ["secret_class", "b"], "digest": "d1935",
        "sha256": {"data": "da7a", "crc": "c5c"}, "options": {"mode": "jpg", "max_side": 500}}  # fmt: skip
VERSIONS = {"torch": "9.8.7", "timm": "6.5.4"}


def write_run(folder: Path, cfg: Config, **state: Any) -> Path:
    """A run at step 20 with weights of its own, its teacher's twice as large."""
    method = build_method(cfg)
    tensors = {f"model.{name}": value.detach() + 0.01 for name, value in method.named_parameters()}
    if method.build_teacher() is not None:
        encoder = {n: v.detach() for n, v in method.encoder.named_parameters() if v.requires_grad}
        tensors |= {f"ema.encoder.{name}": 2 * value for name, value in encoder.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(cfg.to_yaml())
    checkpoint.save(folder / "checkpoints", 20, tensors, {"image_set": "1d3a", "versions": VERSIONS, **state})
    return folder


@pytest.fixture(scope="module")
def runs(tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return {name: write_run(tmp_path_factory.mktemp(name), tiny_config(name)) for name in ("randsac", "pcae", "mae")}


def write_log(run: Path) -> None:
    with RunLog(run / "log.jsonl") as log:
        log.write("start", step=0, total_steps=40, processes=2, engine="ddp", precision="bf16", device="NVIDIA X100",
                  flops_per_image=1e6)  # fmt: skip
        log.write("eval", step=10, knn_model=11.5)
        log.write("train", step=20, loss=0.5, images_per_s=321.0, samples_seen=160)
        log.write("eval", step=20, heldout_loss=0.625, heldout_images=8)
        log.write("eval", step=20, knn_model=22.25, changed={"eval.knn_k": 3, "data.val": "/home/jane/other.beton"})
        log.write("eval", step=20, val_top1=31.5, val_top1_ema=32.5)
        log.write("eval", step=0, knn_untrained=9.75)
        log.write("eval", step=10, linear_heads_model=44.5)


def exported(run: Path, out: Path, weights: str = "model") -> tuple[str, dict[str, Any], dict[str, str]]:
    """The card, its YAML, and its sections."""
    export(run, out, weights)
    card = (out / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    sections = dict(part.split("\n\n", 1) for part in body.split("\n## ")[1:])
    return card, yaml.safe_load(front), sections


@pytest.mark.parametrize(("name", "weights"), [("randsac", "model"), ("mae", "model"), ("mae", "untrained"),
                                               ("pcae", "model"), ("pcae", "ema")])  # fmt: skip
def test_timms_loader_takes_the_folder_as_printed_and_computes_the_same_bits(
    name: str, weights: str, runs: Mapping[str, Path], images: Tensor, tmp_path: Path
) -> None:
    report = export(runs[name], tmp_path / "deep" / "folder", weights)
    assert f"timm.create_model('local-dir:{tmp_path / 'deep' / 'folder'}', pretrained=True)" in str(report)
    model, encoder = as_printed(report, report.path), restore(runs[name], weights).method.encoder.eval()
    with torch.no_grad():
        assert torch.equal(model.forward_features(normalise(images)), encoder.forward_features(normalise(images)))
    assert {path.name for path in report.path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    export(runs[name], tmp_path / "alone.safetensors", weights)
    alone, inside = (load_file(path) for path in (tmp_path / "alone.safetensors", report.path / "model.safetensors"))
    assert alone.keys() == inside.keys() and all(torch.equal(alone[key], inside[key]) for key in alone)


@pytest.mark.parametrize(("resample", "interpolation"), [("area", "box"), ("bicubic", "bicubic")])
def test_config_json_says_how_images_come_in_and_nothing_of_timms_weights(
    resample: str, interpolation: str, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    cfg = tiny_config("mae", data__eval_crop=0.5, data__resample=resample)
    export(write_run(tmp_path / "run", cfg), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("vit_tiny_patch16_224", 0, 96)
    assert {"tag", "license", "hf_hub_id", "url", "origin_url"}.isdisjoint(config["pretrained_cfg"])
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}")
    images = timm.data.resolve_model_data_config(model)
    assert (
        images["input_size"] == (3, 32, 32) and images["crop_pct"] == 0.5 and images["interpolation"] == interpolation
    )
    assert (tuple(images["mean"]), tuple(images["std"])) == (IMAGE_MEAN, IMAGE_STD)


def test_a_fine_tuned_classifier_goes_out_whole(
    tiny_config: Callable[..., Config], images: Tensor, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", tiny_config("finetune", method__num_classes=7, method__drop_ratio=0.25,
                                                  method__init="/home/jane/hidden/mae"))  # fmt: skip
    with RunLog(run / "log.jsonl") as log:
        log.write("start", step=0, init="/home/jane/hidden/mae", init_weights="ema", init_step=1234, init_seal="5ea1")
    card, front, sections = exported(run, tmp_path / "out")
    assert front["pipeline_tag"] == "image-classification" and "logits = model(images)  # [1, 7]" in sections["Use"]
    assert "`ema` weights of step 1,234 of the run `mae`, whose checkpoint has the seal `5ea1`" in sections["Method"]
    assert "tokens left on the way" in sections["Limits"] and "hidden" not in card
    (run / "data_seal.json").write_text(json.dumps(SEAL))
    _, _, sections = exported(run, tmp_path / "sealed")
    assert "classes, whose labels were learned" in sections["Training images"]
    assert "no labels" not in sections["Training images"] and "trained on" not in sections["Training images"]
    write_run(run, tiny_config("finetune", method__num_classes=7, eval__label_fraction=0.1, eval__label_seed=3))
    _, _, sections = exported(run, tmp_path / "tenth")
    assert "about 123,459 images: 10 % of each class, drawn with eval.label_seed = 3" in sections["Training images"]
    assert "It began with" not in exported(run, tmp_path / "untrained", "untrained")[2]["Method"]
    assert {"fc_norm.weight", "head.bias"} <= load_file(tmp_path / "out" / "model.safetensors").keys()
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(normalise(images)), restore(run).method.encoder.eval()(normalise(images)))


def test_the_card_says_what_is_known(runs: Mapping[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["mae"], tmp_path / "run"))
    write_log(run)
    (run / "data_seal.json").write_text(json.dumps(SEAL))
    card, front, sections = exported(run, tmp_path / "out")
    assert "tokens left" not in card and "It began with" not in card
    assert front == {"license": "unknown", "library_name": "timm", "pipeline_tag": "image-feature-extraction",
                     "tags": ["image-feature-extraction", "timm", "patchmill", "mae"]}  # fmt: skip
    assert "# vit_p by mae, step 20\n" in card and "Weights: the trained encoder's." in card and "0.46 M" in card
    assert "[1, 1 + 64, 96]" in sections["Use"] and "tokens[:, 1:].mean(1)" in sections["Use"]
    assert "He et al., CVPR 2022" in sections["Method"]
    for cell in ("`5e7`", "1,234,567", "`da7a`", "`c5c`", "`d1935`", "mode jpg, max_side 500"):
        assert f"| {cell} |" in sections["Training images"]
    assert "secret_class" not in card
    resolved = yaml.safe_load(sections["Configuration"].split("```yaml\n")[1].split("```")[0])
    assert load_config([], defaults={**resolved, "run": {"dir": "x"}}).method == restore(run).cfg.method
    assert resolved["eval"]["knn_k"] == 20
    rows = {"step": "20 of 40", "images seen": "160", "FLOPs so far": "1.6e+08", "engine": "ddp", "processes": "2",
            "precision": "bf16", "restarts": "0", "device": "NVIDIA X100"}  # fmt: skip
    for name, value in rows.items():
        assert f"| {name} | {value} |" in sections["Compute"]
    for row in ("held-out pretraining loss | model | 20 | 0.625 | as configured",
                "`knn_model` | model | 20 | 22.25 | eval.knn_k=3, data.val=other.beton",
                "`knn_untrained` | untrained | 0 | 9.75 | as configured",
                "`linear_heads_model` | model | 10 | 44.5 | as configured",
                "`val_top1` | model | 20 | 31.5 | as configured", "`val_top1_ema` | ema | 20 | 32.5 | as configured"):  # fmt: skip
        assert f"| {row} |" in sections["Results"]
    assert (
        "Of the weights in this folder: `heldout_loss`, `knn_model`, `val_top1`. " in sections["Results"]
        and "11.5" not in sections["Results"]
    )
    assert "torch 9.8.7, timm 6.5.4" in sections["Versions"] and f"torch {torch.__version__}" in sections["Versions"]
    assert "frozen at the identity" not in card and "`box`" in sections["Limits"]


def test_the_card_says_what_is_not(runs: Mapping[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["mae"], tmp_path / "run"))
    _, _, sections = exported(run, tmp_path / "out")
    assert (
        "| image set | `1d3a` |" in sections["Training images"]
        and "| loader | synthetic |" in sections["Training images"]
    )
    assert "nothing was trained" not in sections["Configuration"]
    assert sections["Results"].startswith("None: the run's log has no evaluation.")
    assert "| processes | - |" in sections["Compute"] and "| device | - |" in sections["Compute"]
    write_log(run)
    card, _, sections = exported(run, tmp_path / "first", "untrained")
    assert card.count("None: these weights were not trained.") == 2 and "step 0\n" in card
    assert "; nothing was trained with them" in sections["Configuration"]
    assert "Of the weights in this folder: `knn_untrained`. " in sections["Results"]


def test_weights_that_are_another_average_or_have_a_frozen_norm_say_so(
    runs: Mapping[str, Path], tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    assert (
        "Weights: an average of the trained encoder's over the steps."
        in exported(runs["pcae"], tmp_path / "ema", "ema")[0]
    )
    card, _, sections = exported(runs["randsac"], tmp_path / "skips")
    assert "`norm` was frozen at the identity" in sections["Limits"]
    assert "[1, 64, 96]" in card and "tokens[:, 0:].mean(1)" in card
    plain = write_run(tmp_path / "run", tiny_config("randsac", method__skip="none"))
    assert "frozen at the identity" not in exported(plain, tmp_path / "plain")[0]


def test_no_secret_and_no_folder_of_this_machine_reaches_the_card(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    cfg = tiny_config("mae", data__train="/home/jane/hidden/train.beton", data__val="s3://jane:pw@host/hidden/val.beton",
                      tracking__uri="postgresql://jane:pw@db.hidden/x", slurm__environment="{TOKEN: hidden}",
                      run__dir="/home/jane/hidden/run")  # fmt: skip
    run = write_run(tmp_path / "run", cfg)
    write_log(run)
    (run / "why_stopped.json").write_text(json.dumps({"reason": "/home/jane/hidden is full", "restarts": 0}))
    card, _, sections = exported(run, tmp_path / "out")
    assert "jane" not in card and "hidden" not in card and "pw" not in card and str(tmp_path) not in card
    assert "train: train.beton" in card and "val: val.beton" in card and "| ended | failed |" in sections["Compute"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"options": 1}'])
def test_a_damaged_seal_is_named_and_nothing_is_written(text: str, runs: Mapping[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["mae"], tmp_path / "run"))
    (run / "data_seal.json").write_text(text)
    with pytest.raises(UserError, match="data_seal.json: is damaged; remove it"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_nothing_may_be_written(runs: Mapping[str, Path], tmp_path: Path) -> None:
    full, file, folder = tmp_path / "full", tmp_path / "file", tmp_path / "folder.safetensors"
    full.mkdir()
    folder.mkdir()
    (full / "README.md").write_text("mine")
    file.write_text("mine")
    wrong = {full: "is not empty", file: "is a file", folder: "is a folder", file / "inside": "cannot be written: .*Not a",
             tmp_path / "x.pth": "only safetensors are written", tmp_path / "x.bin": "only safetensors"}  # fmt: skip
    for out, message in wrong.items():
        with pytest.raises(UserError, match=message):
            export(runs["mae"], out)
    assert (full / "README.md").read_text() == file.read_text() == "mine" and not list(folder.iterdir())
    (tmp_path / "empty").mkdir()
    assert export(runs["mae"], tmp_path / "empty").path == tmp_path / "empty"


def test_restored_knows_what_its_checkpoint_says(runs: Mapping[str, Path]) -> None:
    found = restore(runs["mae"])
    assert found.state["image_set"] == "1d3a" and restore(runs["mae"], "untrained").state == {}


def test_a_folder_that_was_cut_off_does_not_stand_in_the_way(
    runs: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be written"):
        patch.setattr(
            "pipeline.export._write_config", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        )
        export(runs["mae"], tmp_path / "out")
    assert not any(tmp_path.iterdir())
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_text("cut")
    export(runs["mae"], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
