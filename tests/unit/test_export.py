"""The exported encoder is one that timm loads as printed and that computes what ours computes."""

import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import as_printed, own_features
from safetensors import safe_open
from torch import Tensor

from pipeline import checkpoint
from pipeline.config import Config, UserError
from pipeline.engine.torch import TorchEngine
from pipeline.export import export, require_whole
from pipeline.methods import build_method
from pipeline.runs import restore
from pipeline.vit import encoder_kwargs, normalise

METHODS = ("randsac", "pcae", "mae")


def write_run(folder: Path, cfg: Config, tensors: dict[str, Tensor], step: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(cfg.to_yaml())
    checkpoint.save(folder / "checkpoints", step, tensors, {})
    return folder


@pytest.fixture(scope="module")
def trained(tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each method a run folder and the engine that wrote it, two steps old."""
    runs = {}
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for name in METHODS:
        cfg = tiny_config(name, model__drop_path=0.1)
        engine = TorchEngine(cfg, torch.device("cpu"))
        for _ in range(2):
            engine.micro_step(images, engine.method.draw(torch.arange(2)), 1, True)
            engine.step(1e-2, None, 0.5)
        runs[name] = (write_run(tmp_path_factory.mktemp(name), cfg, engine.state()), engine)
    return runs


@pytest.mark.parametrize("name", METHODS)
def test_timm_loads_it_as_printed_and_computes_the_same(
    name: str, trained: dict[str, Any], images: Tensor, tmp_path: Path
) -> None:
    folder, engine = trained[name]
    report = export(folder, tmp_path / "deep" / "encoder.safetensors")
    model = as_printed(report, report.path)
    with torch.no_grad():
        got = model.forward_features(normalise(images))
        encoder = restore(folder).method.encoder.eval()
        expected = [encoder.forward_features(normalise(images)), own_features(encoder, images, 4)]
    for features in expected:
        torch.testing.assert_close(got, features, atol=1e-5, rtol=0)
    assert got.shape == (4, 64 + (name != "randsac"), 96)
    weights, first = engine.full_params(), build_method(restore(folder).cfg)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[f"encoder.{key}"]), key
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, first.encoder.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("name", METHODS)
def test_the_file_says_what_it_is_and_holds_nothing_else(name: str, trained: dict[str, Any], tmp_path: Path) -> None:
    folder, engine = trained[name]
    report = export(folder, tmp_path / "e.safetensors")
    with safe_open(report.path, "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == {n.removeprefix("encoder.") for n in engine.named if n.startswith("encoder.")}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118
    assert metadata == {"method": name, "step": "2", "weights": "model", "timm_model": report.name}
    assert stat.S_ISREG(report.path.stat().st_mode)


def test_the_average_can_be_exported(trained: dict[str, Any], tmp_path: Path) -> None:
    folder, engine = trained["pcae"]
    report = export(folder, tmp_path / "ema.safetensors", "ema")
    model = as_printed(report, report.path)
    for key, value in model.state_dict().items():
        if key != "pos_embed":
            assert torch.equal(value, engine.ema[key]), key
    assert torch.equal(model.pos_embed, engine.full_params()["encoder.pos_embed"])
    weight = "blocks.1.attn.qkv.weight"
    assert not torch.equal(model.state_dict()[weight], engine.full_params()[f"encoder.{weight}"])
    with safe_open(tmp_path / "ema.safetensors", "pt") as file:
        assert file.metadata()["weights"] == "ema"


@pytest.mark.parametrize("name", METHODS)
def test_restore_gives_method_teacher_and_step(name: str, trained: dict[str, Any], images: Tensor) -> None:
    folder, engine = trained[name]
    restored = restore(folder)
    assert restored.step == 2 and restored.cfg.method.name == name and (restored.teacher is None) == (name != "pcae")
    draw = restored.method.draw(torch.arange(4))
    with torch.no_grad():
        prediction = restored.method.eval().predict(images, draw, restored.teacher)
    expected = engine.call("predict", images, draw)
    assert torch.equal(prediction.pred, expected.pred) and torch.equal(prediction.target, expected.target)


def test_untrained_is_step_zero(trained: dict[str, Any]) -> None:
    restored = restore(trained["mae"][0], "untrained")
    assert restored.step == 0 and restored.teacher is None
    expected = dict(build_method(restored.cfg).named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in restored.method.named_parameters())


def test_identity_names_the_weights(trained: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained["pcae"][0], tmp_path / "run"))
    seen = [restore(folder, weights).identity for weights in ("model", "ema", "untrained")]
    assert restore(folder).identity == seen[0]
    checkpoint.save(folder / "checkpoints", 9, trained["pcae"][1].state(), {})
    seen.append(restore(folder).identity)
    assert len(set(seen)) == 4


def test_a_method_without_an_average_has_none_to_export(trained: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mae keeps no average"):
        export(trained["mae"][0], tmp_path / "x.safetensors", "ema")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_folder_that_is_no_run_or_has_no_checkpoint(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"not a run folder.*config.yaml"):
        export(tmp_path, tmp_path / "x.safetensors")
    (tmp_path / "config.yaml").write_text(tiny_config("mae").to_yaml())
    with pytest.raises(UserError, match="no checkpoint yet.*patchmill train"):
        export(tmp_path, tmp_path / "x.safetensors")


def test_a_damaged_newest_checkpoint_gives_the_one_before(trained: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained["mae"][0], tmp_path / "run"))
    newest = checkpoint.save(folder / "checkpoints", 9, trained["mae"][1].state(), {})
    assert restore(folder).step == 9
    next(newest.glob("*.safetensors")).unlink()
    assert restore(folder).step == 2


WEIGHT = "blocks.1.mlp.fc1.weight"
BROKEN: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "no rows": lambda value: {WEIGHT: value[:0]},
    "an empty stand-in": lambda value: {WEIGHT: value.new_zeros(0)},
    "the rows of one rank": lambda value: {WEIGHT: value[:192]},
    "turned": lambda value: {WEIGHT: value.T.contiguous()},
    "missing": lambda value: {},
}


@pytest.mark.parametrize("how", BROKEN)
def test_weights_that_are_not_whole_are_refused_by_name(
    how: str, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    cfg, out = tiny_config("mae"), tmp_path / "x.safetensors"
    method = build_method(cfg)
    encoder = {name: value for name, value in method.encoder.state_dict().items() if name != WEIGHT}
    encoder |= BROKEN[how](method.encoder.blocks[1].mlp.fc1.weight.detach())
    named = {name: value.detach() for name, value in method.named_parameters() if not name.startswith("encoder.")}
    named |= {f"encoder.{name}": value for name, value in encoder.items()}
    run = write_run(tmp_path / "run", cfg, {f"model.{name}": value for name, value in named.items()})
    with pytest.raises(UserError, match=f"does not fit this model.*{WEIGHT}"):  # as it comes from the checkpoint
        export(run, out)
    assert not out.exists()
    kwargs = encoder_kwargs(cfg.shape, cfg.data.image_size, class_token=True)
    with pytest.raises(UserError, match=rf"^{WEIGHT}: (is missing|has the shape .* instead of \[384, 96\])"):
        require_whole(encoder, cfg.shape.timm_name, kwargs)  # and as it would be written


def test_a_model_with_more_parameters_than_timms_is_refused(tiny_config: Callable[..., Config]) -> None:
    cfg = tiny_config("mae")
    kwargs = encoder_kwargs(cfg.shape, cfg.data.image_size, class_token=True)
    encoder = build_method(cfg).encoder.state_dict()
    require_whole(encoder, cfg.shape.timm_name, kwargs)
    with pytest.raises(UserError, match=r"^blocks.4.norm.bias: is no tensor of vit_"):
        require_whole(encoder | {"blocks.4.norm.bias": torch.zeros(96)}, cfg.shape.timm_name, kwargs)


@pytest.mark.parametrize(("name", "size"), [("randsac", 192), ("mae", 224)])
def test_vit_b_at_full_size(name: str, size: int, tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    segments = {"method__segment_size": 3} if name == "randsac" else {}
    cfg = tiny_config(name, model__name="vit_b", data__image_size=size, **segments)
    method = build_method(cfg).eval()
    tensors = {f"model.{key}": value.detach() for key, value in method.named_parameters()}
    report = export(write_run(tmp_path / "run", cfg, tensors), tmp_path / "b.safetensors")
    assert report.name == "vit_base_patch16_224"
    shutil.rmtree(tmp_path / "run")
    images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        got = as_printed(report, report.path).forward_features(normalise(images))
        torch.testing.assert_close(got, own_features(method.encoder, images, 16), atol=1e-5, rtol=0)
    report.path.unlink()
