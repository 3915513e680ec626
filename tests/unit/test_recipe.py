"""What `patchmill eval finetune` makes of a run and of the user's words; what may not change when it goes on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.check import check
from pipeline.config import Config, ConfigError, binding_differences, load_config
from pipeline.evaluate.recipe import finetune_config
from pipeline.evaluate.subset import label_subset
from pipeline.forecast import forecast
from pipeline.order import Plan
from pipeline.planner import Machine, find_gpu
from pipeline.watches import open_watches

SMALL = "train.global_batch=20"


@pytest.fixture
def source(tiny_config: Callable[..., Config]) -> Config:
    return tiny_config("mae", data__num_samples=200, data__num_classes=4, data__crop_scale=[0.4, 1.0])


def test_a_fragment_of_the_engine_keeps_the_preset(source: Config, tmp_path: Path) -> None:
    plain, ddp = (finetune_config(source, tmp_path, [SMALL, *more]) for more in ([], ["engine/ddp"]))
    assert ddp.engine.name == "ddp" and ddp.method == plain.method and ddp.train == plain.train


def test_a_recipe_of_ones_own_needs_no_classes_and_gets_the_usual_crops_and_betas(
    source: Config, tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("method: {name: finetune, mixup: 0.5}\ntrain: {global_batch: 20, epochs: 2}\n")
    cfg = finetune_config(source, tmp_path, [str(own)])
    assert (cfg.method.num_classes, cfg.method.mixup, cfg.method.smoothing) == (4, 0.5, 0.0)
    assert cfg.data.crop_scale == (0.08, 1.0) and cfg.optim.betas == (0.9, 0.999)
    own.write_text("method: {name: finetune}\ntrain: {global_batch: 20, epochs: 2}\ndata: {crop_scale: [0.5, 1.0]}\n")
    assert finetune_config(source, tmp_path, [str(own), "optim.betas=[0.9,0.95]"]).data.crop_scale == (0.5, 1.0)


@pytest.mark.parametrize(("model", "drop_path"), [("vit_b", 0.1), ("vit_l", 0.2), ("vit_h", 0.3)])
def test_stochastic_depth_grows_with_the_encoder_as_mae_has_it(
    model: str, drop_path: float, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    source = load_config(["imagenet/mae_vit_b"], [f"model.name={model}", "data.loader=synthetic", "run.dir=x"])
    assert finetune_config(source, tmp_path, []).model.drop_path == drop_path


def test_a_label_fraction_is_tested_once_an_epoch_and_planned_as_it_is_trained(source: Config, tmp_path: Path) -> None:
    cfg = finetune_config(source, tmp_path, ["train.global_batch=2", "eval.label_fraction=0.004", "train.epochs=3"])
    used = len(label_subset([label for label in range(4) for _ in range(50)], 0.004, 0))  # an image of each class
    assert cfg.labelled(200) == used == 4 and cfg.eval.loss_every == 2
    assert "6 steps of 2 images, 2 an epoch" in check(cfg)
    assert forecast(cfg, Machine(find_gpu("H100")), "H100", 200).steps == 6
    with pytest.raises(ConfigError, match="4 samples do not fill"):
        check(load_config([], ["train.global_batch=20"], cfg.model_dump(mode="json")))


def test_which_labels_were_learned_binds_a_classifier_and_nothing_else(source: Config, tmp_path: Path) -> None:
    cfg = finetune_config(source, tmp_path, [SMALL])
    for change in ("eval.label_fraction=0.5", "eval.label_seed=1"):
        key = change.partition("=")[0]
        (told,) = binding_differences(cfg, finetune_config(source, tmp_path, [SMALL, change]))
        assert told.startswith(f"{key} = ")
        assert not binding_differences(source, load_config([], [change], source.model_dump(mode="json")))


def test_a_classifier_is_tested_at_its_end_and_needs_images_for_it(source: Config, tmp_path: Path) -> None:
    cfg = finetune_config(source, tmp_path, [SMALL, "eval.loss_every=null"])
    assert [watch.name for watch in open_watches(cfg, Plan.of(cfg, 200))] == ["accuracy"]
    cfg = finetune_config(source, tmp_path, [SMALL, "data.loader=ffcv", "data.train=/no/train.beton"])
    with pytest.raises(ConfigError, match="data.val: is required and not set: a classifier is tested on its images"):
        check(cfg, ["train"])
