"""Checkpoints of facebookresearch/mae as runs: what evaluates and exports them, and what is refused before anything is made."""

import argparse
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from exported import as_printed
from torch import Tensor

from pipeline import checkpoint
from pipeline.config import Config, UserError
from pipeline.evaluate import probe
from pipeline.export import export
from pipeline.importing import import_mae
from pipeline.methods import build_method
from pipeline.methods.mae import PUBLIC_DECODER
from pipeline.runlog import read_log
from pipeline.runs import restore
from pipeline.stop import StopRequest
from pipeline.train import train
from pipeline.visualize import visualize
from pipeline.vit import normalise

THEIRS = {ours: theirs for theirs, ours in PUBLIC_DECODER.items()}


@pytest.fixture
def cfg(tiny_config: Callable[..., Config], tmp_path: Path) -> Config:
    return tiny_config("mae", run__dir=tmp_path / "run", data__num_samples=40, eval__knn_k=3, tracking__uri="none")


def their_name(name: str) -> str:
    part, _, rest = name.partition(".")
    if part == "encoder":
        return rest
    inner, dot, rest = rest.partition(".")
    return THEIRS[inner] + dot + rest


def weights_of(cfg: Config) -> dict[str, Tensor]:
    """Random weights under their names, positions as both programs have them."""
    weights = {}
    for number, (name, value) in enumerate(build_method(cfg).named_parameters()):
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
        weights[their_name(name)] = value.detach() + (0 if "pos_embed" in name else 0.02 * noise)
    return weights


def encoder_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name.partition(".")[0] not in PUBLIC_DECODER}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def save(weights: Any, **others: Any) -> Path:
        torch.save({"model": weights, **others}, tmp_path / "public.pth")
        return tmp_path / "public.pth"

    return save


def test_a_whole_checkpoint_becomes_a_run_with_its_weights(cfg: Config, save: Callable[..., Path]) -> None:
    weights = weights_of(cfg)
    moments = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    arguments = argparse.Namespace(lr=1e-3, output_dir="./out", distributed=True)
    file = save(weights, optimizer=moments, epoch=7, scaler={"scale": 65536.0}, args=arguments)
    report = import_mae(file, cfg)
    assert report.notes == () and str(report).startswith(f"{cfg.run.dir}: a run of the weights in {file} (sha256 ")
    restored = restore(Path(cfg.run.dir))
    named = dict(restored.method.named_parameters())
    assert {their_name(name) for name in named} == weights.keys() and restored.step == 0
    assert all(torch.equal(value, weights[their_name(name)]) for name, value in named.items())
    (line,) = read_log(Path(cfg.run.dir) / "log.jsonl")
    assert (line["kind"], line["step"], line["file"], line["sha256"]) == ("import", 0, "public.pth", report.sha256)
    assert restored.state["imported"]["sha256"] == checkpoint._sha256(file) == report.sha256


def test_an_encoder_alone_leaves_the_decoder_and_says_so(cfg: Config, save: Callable[..., Path]) -> None:
    weights = weights_of(cfg)
    report = import_mae(save(encoder_of(weights)), cfg)
    assert "no decoder: it stays at its first weights" in str(report)
    first = dict(build_method(cfg).named_parameters())
    for name, value in restore(Path(cfg.run.dir)).method.named_parameters():
        assert torch.equal(value, first[name] if name.startswith("decoder.") else weights[their_name(name)]), name


def test_what_evaluates_draws_and_exports_takes_it_and_training_refuses(
    cfg: Config, save: Callable[..., Path], images: Tensor, tmp_path: Path
) -> None:
    run = import_mae(save(encoder_of(weights_of(cfg))), cfg).run
    assert {probe(run, "knn").step, probe(run, "linear").step} == {0}
    assert all(path.is_file() for path in visualize(run, 2))
    model = as_printed(export(run, tmp_path / "folder"), tmp_path / "folder")
    with torch.no_grad():
        expected = restore(run).method.encoder.eval().forward_features(normalise(images))
        assert torch.equal(model.forward_features(normalise(images)), expected)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert card.count("Trained elsewhere, and not known here: imported from `public.pth` of facebookresearch/mae") == 2
    assert "- the file has no decoder" in card and "knn_model" in card
    with StopRequest() as stop, pytest.raises(UserError, match="holds imported weights.*train in another folder"):
        train(cfg, stop)
    with pytest.raises(UserError, match="holds a run already; import into another folder"):
        import_mae(tmp_path / "public.pth", cfg)


@pytest.mark.parametrize("name", ["pos_embed", "decoder_pos_embed"])
def test_other_positions_are_taken_and_named(name: str, cfg: Config, save: Callable[..., Path]) -> None:
    weights = weights_of(cfg)
    report = import_mae(save(weights | {name: weights[name] + 0.25}), cfg)
    ours = {"pos_embed": "encoder.pos_embed", "decoder_pos_embed": "decoder.pos_embed"}[name]
    assert report.notes == (f"{ours}: differs from fixed sines and cosines by up to 0.25; taken as it is in the file",)
    found = dict(restore(Path(cfg.run.dir)).method.named_parameters())[ours]
    assert torch.equal(found, weights[name] + 0.25)


class Code:
    """Pickled, it is a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def refused(file: Path, cfg: Config, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        import_mae(file, cfg)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)
    assert not Path(cfg.run.dir).exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["model", "args"])
def test_code_is_refused_and_not_run(place: str, zipped: bool, cfg: Config, tmp_path: Path) -> None:
    file, trace = tmp_path / "code.pth", tmp_path / "was_run"
    content = {"model": encoder_of(weights_of(cfg))} | {place: Code(trace)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    refused(file, cfg, r"refused, nothing was run: it holds more than tensors \(\w+.system\)")
    file.write_bytes(pickle.dumps(content))
    refused(file, cfg, r"damaged, or no checkpoint of PyTorch \(nothing in it was run\)")
    assert not trace.exists()
    pickle.loads(file.read_bytes())  # the trap is one
    assert trace.exists()


@pytest.mark.parametrize("how", ["cut", "altered", "empty", "noise", "a web page"])
def test_a_damaged_file_is_refused(how: str, cfg: Config, save: Callable[..., Path], tmp_path: Path) -> None:
    file = save(weights_of(cfg))
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    altered = data[:middle] + bytes(byte ^ 1 for byte in data[middle : middle + 8]) + data[middle + 8 :]
    contents = {
        "cut": data[:middle],
        "altered": altered,
        "empty": b"",
        "noise": bytes(range(256)),
        "a web page": b"<html>",
    }
    file.write_bytes(contents[how])
    refused(file, cfg, "is damaged, or no checkpoint of PyTorch")


def test_a_file_that_cannot_be_read_is_not_called_damaged(
    cfg: Config, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save(weights_of(cfg))
    monkeypatch.setattr(torch, "load", Mock(side_effect=PermissionError(13, "Permission denied", str(file))))
    refused(file, cfg, r"cannot be read \(Permission denied\)")


def test_a_missing_file_and_one_without_weights(cfg: Config, save: Callable[..., Path], tmp_path: Path) -> None:
    refused(tmp_path / "none.pth", cfg, "there is no such file")
    for content in ({"a": 1}, {}, [1], torch.zeros(2)):
        refused(save(content), cfg, "no checkpoint of facebookresearch/mae: it has no weights in an entry 'model'")
    torch.save(encoder_of(weights_of(cfg)), tmp_path / "bare.pth")
    refused(tmp_path / "bare.pth", cfg, "no weights in an entry 'model'")


@pytest.mark.parametrize("name", ["head.weight", "head.1.weight", "fc_norm.weight"])
def test_a_classifier_is_refused(name: str, cfg: Config, save: Callable[..., Path]) -> None:
    file = save(encoder_of(weights_of(cfg)) | {name: torch.zeros(10)})
    refused(
        file, cfg, rf"is a classifier that was fine-tuned or probed \(it has {name}\); give the pretraining checkpoint"
    )


def test_another_size_names_the_first_tensor_and_the_likely_model(
    cfg: Config, save: Callable[..., Path], tiny_config: Callable[..., Config]
) -> None:
    other = save(encoder_of(weights_of(tiny_config("mae", model__name="vit_t", data__image_size=64))))
    refused(other, cfg, r"encoder.cls_token is \[1, 1, 192\], not \[1, 1, 96\] \(and \d+ more\); the file: vit_t, patches of 4 px, "
            "images of 64 px; the configuration: vit_p, patches of 4 px, images of 32 px")  # fmt: skip
    weights = weights_of(cfg)
    fewer = save({name: value for name, value in weights.items() if not name.startswith("blocks.3.")})
    refused(fewer, cfg, r"missing: encoder.blocks.3.norm1.weight .*the file: an encoder of 3 blocks, 96 wide, patches")
    refused(save({"a": torch.zeros(1)}), cfg, "missing: encoder.cls_token .*the file: another kind of model")
    deeper = save(weights_of(tiny_config("mae", method__decoder_depth=2)))
    refused(deeper, cfg, r"unknown: decoder.blocks.1.norm1.weight \(and 11 more\).*change model.*method.decoder_")


def test_a_run_that_has_begun_is_left_alone(cfg: Config, save: Callable[..., Path]) -> None:
    log = Path(cfg.run.dir) / "log.jsonl"
    log.parent.mkdir()
    log.write_text("{}\n")  # no checkpoint yet
    with pytest.raises(UserError, match="holds a run already"):
        import_mae(save(weights_of(cfg)), cfg)
    assert [path.name for path in log.parent.iterdir()] == ["log.jsonl"]


def test_another_method_is_refused(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method.name = pcae: weights of facebookresearch/mae are mae's"):
        import_mae(tmp_path / "any.pth", tiny_config("pcae", run__dir=tmp_path / "run"))


def test_a_full_disk_is_one_line_and_the_import_can_be_tried_again(
    cfg: Config, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save(weights_of(cfg))

    def full(*_: Any, **__: Any) -> None:
        raise checkpoint.CheckpointError("step-00000000 could not be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(UserError, match="No space left"):
            import_mae(file, cfg)
    import_mae(file, cfg)
    assert json.loads((Path(cfg.run.dir) / "log.jsonl").read_text())["kind"] == "import"


FOUR = torch.zeros(4)
ODD = {"NaN": FOUR / 0, "int8": FOUR.to(torch.int8), "complex": FOUR.to(torch.complex64), "sparse": FOUR.to_sparse(),
       "quantised": torch.quantize_per_tensor(FOUR, 1.0, 0, torch.qint8)}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_dense_tensor_of_finite_floats_is_refused(kind: str, cfg: Config, save: Callable[..., Path]) -> None:
    refused(save(weights_of(cfg) | {"norm.bias": ODD[kind]}), cfg, "norm.bias is no tensor of finite floats")


def test_a_name_that_is_no_text_is_refused_and_an_import_cut_off_says_what_to_do(
    cfg: Config, save: Callable[..., Path]
) -> None:
    refused(save({0: torch.zeros(2)}), cfg, "0 is no tensor of finite floats")
    file = save(weights_of(cfg))
    import_mae(file, cfg)
    (Path(cfg.run.dir) / "log.jsonl").unlink()
    with pytest.raises(UserError, match="without a log: an import that was cut off"):
        import_mae(file, cfg)


def test_a_checkpoint_that_goes_away_while_it_is_read_gives_way_to_the_next(
    cfg: Config, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that trains meanwhile removes its old ones."""
    import_mae(save(weights_of(cfg)), cfg)
    folder = Path(cfg.run.dir) / "checkpoints"
    (old,) = checkpoint.candidates(folder)
    load = checkpoint.load

    def removed(path: Path, tensors: dict[str, Tensor]) -> None:
        if path == old:
            shutil.copytree(old, folder / "step-00000001")
            shutil.rmtree(old)
        load(path, tensors)

    monkeypatch.setattr(checkpoint, "load", removed)
    assert restore(Path(cfg.run.dir)).step == 0 and not old.exists()
    monkeypatch.setattr(checkpoint, "load", Mock(side_effect=checkpoint.CheckpointError("does not fit")))
    with pytest.raises(UserError, match="^does not fit$"):
        restore(Path(cfg.run.dir))


def test_ctrl_c_while_a_checkpoint_is_read_is_no_fault_of_it(
    cfg: Config, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import_mae(save(weights_of(cfg)), cfg)
    reader = "torch.distributed.checkpoint.hf_storage.HuggingFaceStorageReader.read_data"
    monkeypatch.setattr(reader, Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        restore(Path(cfg.run.dir))
