"""Configuration: precedence, what is refused and how it is said, resuming, and that every setting has a reader."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from test_rules import parse

from pipeline import config
from pipeline.config import Config, ConfigError, UserError, binding_differences, find_config, flatten, load_config
from pipeline.settings import MAEConfig, PCAEConfig, RandSACConfig

ROOT = Path(__file__).resolve().parents[2]
SOME = settings(max_examples=100, deadline=None)
BASE = """
run: {dir: runs/a}
method: {name: randsac, segment_size: 2, partition_size: 2, decoder_width: 96, decoder_heads: 3}
model: {name: vit_p}
data: {loader: synthetic, image_size: 32}
train: {global_batch: 8, steps: 10}
"""
PCAE = ["method={name: pcae, decoder_width: 96, decoder_heads: 3}", "optim.ema=0.99"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def replacing_method(base: Path, *overrides: str) -> list[str]:
    """The problems of ``base`` without its method section, with ``overrides``."""
    lines = [line for line in BASE.splitlines() if not line.startswith("method")]
    base.write_text("\n".join(lines))
    return problems(base, *overrides)


def problems(base: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config([base], overrides)
    assert str(error.value) == "\n".join(error.value.problems)
    return error.value.problems


# Precedence


def test_defaults_then_files_left_to_right_then_overrides(base: Path, tmp_path: Path) -> None:
    second, third = tmp_path / "second.yaml", tmp_path / "third.yaml"
    second.write_text("train: {seed: 2, global_batch: 16}\noptim: {weight_decay: 0.2, betas: [0.8, 0.9]}\n")
    third.write_text("train: {seed: 3}\n")
    cfg = load_config([base])
    assert (cfg.train.seed, cfg.train.global_batch, cfg.optim.weight_decay, cfg.optim.betas) == (
        0,
        8,
        0.05,
        (0.9, 0.95),
    )
    cfg = load_config([base, second])
    assert (cfg.train.seed, cfg.train.global_batch, cfg.optim.weight_decay, cfg.optim.betas) == (2, 16, 0.2, (0.8, 0.9))
    assert cfg.train.steps == 10 and cfg.optim.base_lr == 1.5e-4  # what the later file does not name stays
    assert load_config([base, second, third]).train.seed == 3
    assert load_config([base, third, second]).train.seed == 2
    cfg = load_config([base, second, third], ["train.seed=4", "optim.clip=1", "train.seed=5"])
    assert (cfg.train.seed, cfg.train.global_batch, cfg.optim.clip) == (5, 16, 1.0)
    assert load_config([base], ["optim.clip=3", "optim.clip=null"]).optim.clip is None


def test_no_file_and_only_overrides(tiny_config: Callable[..., Config]) -> None:
    assert tiny_config("mae", train__seed=7).train.seed == 7


def test_an_empty_file_changes_nothing(base: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("# only a comment\n")
    assert load_config([base, empty]) == load_config([base])


def test_derived_settings(base: Path) -> None:
    cfg = load_config([base], ["optim.base_lr=1e-3", "train.global_batch=512"])
    assert cfg.lr == pytest.approx(2e-3)
    assert cfg.grid == 8 and cfg.shape.patch_size == 4 and cfg.shape.depth == 4
    assert cfg.micro_batch == 512
    assert load_config([base], ["train.micro_batch=2"]).micro_batch == 2
    other = load_config([base], ["model.patch_size=8", "method.segment_size=1"])
    assert other.grid == 4 and other.shape.patch_size == 8 and other.shape.width == 96


def test_paths_become_absolute(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cfg = load_config([base], ["data.train=images/../train.beton", "data.val=~/val.beton"])
    assert cfg.run.dir == str(tmp_path / "runs/a")
    assert cfg.data.train == str(tmp_path / "train.beton")
    assert cfg.data.val == str(tmp_path / "home/val.beton")
    engine = "engine={name: deepspeed, zero_stage: 3, offload: nvme, offload_dir: ~/swap}"
    local = load_config([base], ["data.loader=ffcv", "data.train=t.beton", "data.stage_in=~/disk", engine])
    assert local.data.stage_in == str(tmp_path / "home/disk")
    assert local.engine.offload_dir == str(tmp_path / "home/swap")


# Values as YAML 1.2 reads them


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", ".1e-2", "0.001", "10e-4", "+1e-3"])
def test_numbers_with_exponents_are_numbers(base: Path, tmp_path: Path, text: str) -> None:
    assert load_config([base], [f"optim.base_lr={text}"]).optim.base_lr == pytest.approx(1e-3)
    path = tmp_path / "lr.yaml"
    path.write_text(f"optim:\n  base_lr: {text}\n")
    assert load_config([base, path]).optim.base_lr == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("text", "value"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("true", "on"), ("'off'", "off")]
)
def test_on_and_off_are_words_where_words_are_meant(base: Path, tmp_path: Path, text: str, value: str) -> None:
    assert load_config([base], [f"data.jit={text}"]).data.jit == value
    path = tmp_path / "jit.yaml"
    path.write_text(f"data: {{jit: {text}}}\n")
    assert load_config([base, path]).data.jit == value


# What is refused, and how it is said


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("train.sed=1", ["train.sed", "did you mean train.seed?"]),
        ("trian.seed=1", ["trian", "did you mean train?"]),
        ("method.segmnt_size=2", ["method.segmnt_size", "did you mean method.segment_size?"]),
        ("method.mask_ratio=0.5", ["method.mask_ratio", "no such setting"]),  # another method's
        (
            "engine={name: deepspeed, zero_stage: 3, deepspeed: {prefetch_buckt_size: 1}}",
            ["engine.deepspeed.prefetch_buckt_size", "did you mean engine.deepspeed.prefetch_bucket_size?"],
        ),
        ("engine.deepspeed.backend=1", ["engine.deepspeed.backend", "known here: reduce_bucket_size, overlap_comm"]),
        ("optim.zzz=1", ["optim.zzz", "known here", "base_lr"]),
        ("train.seed=abc", ["train.seed = 'abc'", "integer"]),
        ("train.seed=1.5", ["train.seed = 1.5", "integer"]),
        ("train.seed=true", ["train.seed = True", "integer"]),
        ("train.seed=99999999999999999999", ["train.seed = 99999999999999999999"]),
        ("train.deterministic=1", ["train.deterministic = 1", "boolean"]),
        ("run.dir=5", ["run.dir = 5", "string"]),
        ("optim=3", ["optim = 3"]),
        ("method.name=simclr", ["method.name = 'simclr'", "one of randsac, pcae, mae"]),
        ("method=null", ["method"]),
        ("model.patch_size=32", ["model.patch_size = 32", "one patch of the whole image"]),
        ("model.name=vit_x", ["model.name = 'vit_x'", "vit_b"]),
        ("data.jit=maybe", ["data.jit = 'maybe'", "'auto'"]),
        ("run.resume=perhaps", ["run.resume = 'perhaps'", "'must'"]),
        ("train.global_batch=0", ["train.global_batch = 0", "greater than 0"]),
        ("train.global_batch=-8", ["train.global_batch = -8", "greater than 0"]),
        ("optim.base_lr=-1e-3", ["optim.base_lr = -0.001", "greater than 0"]),
        ("optim.base_lr=.nan", ["optim.base_lr = nan"]),
        ("optim.base_lr=.inf", ["optim.base_lr = inf"]),
        ("optim.betas=[0.9,1.0]", ["optim.betas = [0.9, 1.0]", "[0, 1)"]),
        ("data.crop_scale=[0.9,0.2]", ["data.crop_scale = [0.9, 0.2]", "low <= high"]),
        ("data.crop_scale=[0,1]", ["data.crop_scale", "0 < low"]),
        ("data.image_size=30", ["data.image_size = 30", "patch size 4", "28"]),
        ("data.image_size=2", ["data.image_size = 2", "patch size 4", "such as 4"]),
        ("model.patch_size=5", ["data.image_size = 32", "patch size 5", "30"]),
        ("method.segment_size=3", ["method.segment_size = 3", "grid of 8", "[1, 2, 4]"]),
        ("method.segment_size=8", ["method.segment_size = 8", "K = 1"]),
        ("method.segment_size=16", ["method.segment_size = 16", "grid of 8"]),
        ("method.partition_size=3", ["method.partition_size = 3", "4 segments"]),
        ("method.decoder_width=100", ["method.decoder_width = 100", "method.decoder_heads"]),
        ("train.micro_batch=3", ["train.global_batch = 8", "train.micro_batch (3)", "to 2", "of 9"]),
        ("train.micro_batch=16", ["train.global_batch = 8", "train.micro_batch (16)", "16"]),
        ("train.epochs=3", ["train.epochs, train.steps", "exactly one", "train.epochs=null"]),
        ("profile.start_step=11", ["profile.start_step = 11", "train.steps = 10"]),
        ("engine.checkpoint_layers=every", ["engine.checkpoint_layers = 'every'", "none, full, selective"]),
        ("engine.name=deepspeed", ["engine.zero_stage = None", "1, 2 or 3"]),
        ("engine={name: deepspeed, zero_stage: 0}", ["engine.zero_stage = 0", "engine.name=ddp"]),
        (
            "engine={name: deepspeed, zero_stage: 2, deepspeed: {prefetch_bucket_size: 1}}",
            ["engine.deepspeed.prefetch_bucket_size = 1", "zero_stage=3 (not 2)"],
        ),
        (
            "engine={name: deepspeed, zero_stage: 1, deepspeed: {max_live_parameters: 1, overlap_comm: false}}",
            ["engine.deepspeed.max_live_parameters = 1", "zero_stage=3 (not 1)"],
        ),
        (
            "engine={name: deepspeed, deepspeed: {max_live_parameters: 1}}",
            ["engine.zero_stage = None", "1, 2 or 3"],
        ),
        (
            "engine={name: deepspeed, zero_stage: 1, offload: cpu}",
            ["engine.offload = cpu", "zero_stage=2 or 3 (not 1)"],
        ),
        (
            "engine={name: deepspeed, zero_stage: 2, offload: nvme, offload_dir: /d}",
            ["engine.offload = nvme", "zero_stage=3 (not 2)"],
        ),
        (
            "engine={name: deepspeed, zero_stage: 3, offload: nvme}",
            ["engine.offload_dir: is required", "a folder on a fast disk"],
        ),
        (
            "engine={name: deepspeed, zero_stage: 3, offload: nvme, offload_dir: ''}",
            ["engine.offload_dir: is required", "a folder on a fast disk"],
        ),
        (
            "engine={name: deepspeed, zero_stage: 3, offload: cpu, offload_dir: /d}",
            ["engine.offload_dir = /d", "(not cpu)"],
        ),
        (
            "engine={name: deepspeed, zero_stage: 3, offload_params: true}",
            ["engine.offload_params", "(not 3 with none)"],
        ),
        (
            "engine={name: deepspeed, zero_stage: 2, offload: cpu, offload_params: true}",
            ["engine.offload_params", "(not 2 with cpu)"],
        ),
        ("engine.offload=cpu", ["engine.offload:", "engine.name=deepspeed (not single)"]),
        ("engine.zero_stage=2", ["engine.zero_stage", "engine.name=deepspeed (not single)"]),
        ("engine.deepspeed.overlap_comm=false", ["engine.deepspeed", "engine.name=deepspeed (not single)"]),
        ("engine.checkpoint_layers=0", ["engine.checkpoint_layers = 0", "at least 1"]),
        ("train.steps=null", ["train.epochs, train.steps", "exactly one"]),
        ("data.loader=ffcv", ["data.train", "required", "beton"]),
        ("data.loader=folder", ["data.train", "required", "manifest"]),
        ("optim.ema=0.99", ["optim.ema = 0.99", "pcae"]),
        ("method.segment_size=0", ["method.segment_size = 0", "greater than 0"]),
    ],
)
def test_one_mistake_is_one_line_that_names_key_value_and_remedy(
    base: Path, override: str, fragments: list[str]
) -> None:
    found = problems(base, override)
    assert len(found) == 1 and "\n" not in found[0]
    for fragment in fragments:
        assert fragment in found[0]


def test_settings_of_stage_3_alone_are_taken_there_and_as_they_are_by_default(base: Path) -> None:
    for stage, value in ((3, 1), (2, 30_000_000)):
        engine = f"engine={{name: deepspeed, zero_stage: {stage}, deepspeed: {{prefetch_bucket_size: {value}}}}}"
        assert load_config([base], [engine]).engine.deepspeed.prefetch_bucket_size == value


def test_a_held_out_loss_wants_images_to_take_it_of(base: Path) -> None:
    (line,) = problems(base, "eval.loss_every=5", "data.loader=folder", "data.train=x.jsonl")
    assert line.startswith("data.val: is required and not set: eval.loss_every = 5")


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["method={name: pcae, keep_ratio: 0.1, decoder_width: 96, decoder_heads: 3}", "optim.ema=0.9"],
         ["method.keep_ratio = 0.1", "48 masked patches", "3 stages"]),
        (["method={name: pcae, stages: 5, decoder_width: 96, decoder_heads: 3}", "optim.ema=0.9"],
         ["method.stages = 5", "at most 4", "vit_p"]),
        (["method={name: mae, mask_ratio: 0.99, decoder_width: 96, decoder_heads: 3}"],
         ["method.mask_ratio = 0.99", "0 of 64 patches visible"]),
        (["method={name: pcae, decoder_width: 96, decoder_heads: 3}"], ["optim.ema", "required", "pcae"]),
        (["method={decoder_width: 96}"], ["method.name", "required", "one of randsac, pcae, mae"]),
        ([], ["method", "required"]),
    ],
)  # fmt: skip
def test_mistakes_of_other_methods(base: Path, overrides: list[str], fragments: list[str]) -> None:
    (found,) = replacing_method(base, *overrides)
    for fragment in fragments:
        assert fragment.lower() in found.lower()


def test_all_problems_are_reported_at_once(base: Path) -> None:
    found = problems(
        base, "train.sed=1", "optim.clip=fast", "method.segment_size=3", "data.crop_scale=[2,3]", "train.epochs=4"
    )
    assert len(found) == 5
    for key in ("train.sed", "optim.clip", "method.segment_size", "data.crop_scale", "train.epochs"):
        assert any(text.startswith(key) for text in found), key


@pytest.mark.parametrize("missing", ["run", "train"])
def test_a_missing_setting_does_not_hide_other_problems(base: Path, missing: str) -> None:
    base.write_text("\n".join(line for line in BASE.splitlines() if not line.startswith(missing)))
    found = problems(base, "method.segment_size=8")
    assert any(text.startswith(missing) and "required" in text for text in found)
    assert any("K = 1" in text for text in found)
    assert len(found) == 2


def test_a_bad_value_is_not_followed_by_problems_that_it_alone_makes(base: Path) -> None:
    assert len(problems(base, "train.steps=abc")) == 1
    assert len(problems(base, "train.global_batch=abc", "train.micro_batch=4")) == 1
    assert len(problems(base, "train.epochs=abc")) == 1
    assert len(replacing_method(base, "method={name: pcae, decoder_width: 96, decoder_heads: 3}", "optim.ema=x")) == 1


@pytest.mark.parametrize("text", ["train.seed", "=3", "", "--verbose"])
def test_what_is_no_override_says_how_to_write_one(base: Path, text: str) -> None:
    with pytest.raises(UserError, match="section.key=value"):
        load_config([base], [text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {seed: 1, seed: 2}", "'seed' is given twice"),
        ("train:\n  seed: 1\noptim: {}\ntrain:\n  steps: 3\n", "'train' is given twice"),
        ("train: [", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("- 1\n- 2\n", "mapping of sections"),
        ("just words", "mapping of sections"),
    ],
)
def test_a_bad_file_is_named(base: Path, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config([base, path])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "image.yaml"
    path.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF")
    with pytest.raises(UserError, match=r"image.yaml: not valid YAML"):
        load_config([path])


def test_configurations_are_found_by_path_or_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "shipped"
    (shipped / "imagenet").mkdir(parents=True)
    for name in ("pcae_vit_l", "mae_vit_l"):
        (shipped / "imagenet" / f"{name}.yaml").write_text(BASE)
    monkeypatch.setattr(config, "CONFIG_DIR", shipped)
    monkeypatch.chdir(tmp_path)
    expected = shipped / "imagenet" / "pcae_vit_l.yaml"
    assert find_config("imagenet/pcae_vit_l") == find_config(str(expected)) == expected
    (tmp_path / "mine").write_text(BASE)
    assert find_config("mine").resolve() == tmp_path / "mine"
    with pytest.raises(UserError, match="'imagenet/pcae_vit_xl'.*imagenet/pcae_vit_l"):
        find_config("imagenet/pcae_vit_xl")
    with pytest.raises(UserError, match=r"'nothing.yaml'.*neither a file nor one of the shipped"):
        load_config(["nothing.yaml"])
    with pytest.raises(UserError):
        find_config(str(shipped / "imagenet"))  # a directory


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=3))
def test_no_override_makes_anything_but_a_users_error(texts: list[str]) -> None:
    with pytest.raises(UserError):
        load_config([], texts)


KEYS = [
    "train.seed",
    "train",
    "method.name",
    "method",
    "data.crop_scale",
    "optim.ema",
    "run.dir",
    "data.train.x",
    "model",
]
yaml_values = st.one_of(
    st.sampled_from(["", "~", "[]", "{}", "[1]", "{1: 2}", "{a: {b: 1}}", "2020-01-01", ".nan", "-.inf", "1e400", "no",
                     "&a [*a]", "'", "{? [1]: 2}", "0x1F", "1_000", "=", "<<", "{<<: 3}", "!!set {a}", "1:30"]),
    st.text(max_size=8),
)  # fmt: skip


@SOME
@given(st.lists(st.tuples(st.sampled_from(KEYS), yaml_values), min_size=1, max_size=3))
def test_no_value_makes_anything_but_a_config_or_a_users_error(pairs: list[tuple[str, str]]) -> None:
    overrides = ["run.dir=a", "method={name: mae}", "model.name=vit_p", "data.loader=synthetic", "data.image_size=32",
                 "train={global_batch: 8, steps: 3}"]  # fmt: skip
    try:
        load_config([], [*overrides, *(f"{key}={value}" for key, value in pairs)])
    except UserError as error:
        assert str(error).strip()


# Written and read back, and resuming


@SOME
@given(
    experiment=st.one_of(
        st.text(max_size=20), st.sampled_from(["1e-3", "on", "null", "1", "0x10", "~", "2020-01-01", "1:30"])
    ),
    base_lr=st.floats(1e-12, 1e3),
    seed=st.integers(-(2**63), 2**63 - 1),
    jit=st.sampled_from(["auto", "on", "off"]),
    low=st.floats(0.01, 1),
    clip=st.none() | st.floats(1e-6, 1e6),
)
@example(experiment="1e-3", base_lr=1e-4, seed=-(2**63), jit="off", low=0.2, clip=None)
def test_the_resolved_yaml_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    experiment: str,
    base_lr: float,
    seed: int,
    jit: str,
    low: float,
    clip: float | None,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "base.yaml").write_text(BASE)
    tree = load_config([folder / "base.yaml"]).model_dump()
    tree["tracking"]["experiment"] = experiment
    tree["optim"] |= {"base_lr": base_lr, "clip": clip}
    tree["train"]["seed"], tree["data"]["jit"], tree["data"]["crop_scale"] = seed, jit, (low, 1.0)
    cfg = Config.model_validate(tree)
    (folder / "resolved.yaml").write_text(cfg.to_yaml(), encoding="utf-8")
    assert load_config([folder / "resolved.yaml"]) == cfg


@pytest.mark.parametrize("method", ["randsac", "pcae", "mae"])
def test_the_resolved_yaml_of_each_method_reads_back_equal(
    tiny_config: Callable[..., Config], tmp_path: Path, method: str
) -> None:
    cfg = tiny_config(method)
    (tmp_path / "c.yaml").write_text(cfg.to_yaml())
    assert load_config([tmp_path / "c.yaml"]) == cfg
    assert flatten(cfg.model_dump())["optim.base_lr"] == 1.5e-4


def test_settings_cannot_be_changed(base: Path) -> None:
    cfg = load_config([base])
    with pytest.raises(ValueError, match="frozen"):
        cfg.train.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "override",
    ["run.dir=elsewhere", "run.resume=must", "tracking.uri=none", "log.every_steps=1", "checkpoint.every_steps=5",
     "data.train=/moved/train.beton", "data.val=/moved/val.beton", "data.threads=3", "data.jit=off",
     "train.micro_batch=4", "guard.max_nonfinite=3", "eval.knn_k=5"],
)  # fmt: skip
def test_what_may_change_on_resume(base: Path, override: str) -> None:
    assert binding_differences(load_config([base]), load_config([base], [override])) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.global_batch=16", "train.global_batch = 8 (not 16)"),
        ("train.seed=1", "train.seed = 0 (not 1)"),
        ("train.steps=20", "train.steps = 10 (not 20)"),
        ("optim.base_lr=1e-3", "optim.base_lr = 0.00015 (not 0.001)"),
        ("method.segment_size=1", "method.segment_size = 2 (not 1)"),
        ("data.crop_scale=[0.4,1]", "data.crop_scale = [0.2, 1.0] (not [0.4, 1.0])"),
        ("data.flip=false", "data.flip = True (not False)"),
        ("data.image_size=64", "data.image_size = 32 (not 64)"),
        ("engine.precision=bf16", "engine.precision = fp32 (not bf16)"),
        ("model.drop_path=0.1", "model.drop_path = 0.0 (not 0.1)"),
    ],
)
def test_what_may_not_change_on_resume(base: Path, override: str, line: str) -> None:
    assert binding_differences(load_config([base]), load_config([base], [override])) == [line]


def test_another_method_differs_in_all_its_settings(tiny_config: Callable[..., Config]) -> None:
    found = binding_differences(tiny_config("randsac"), tiny_config("mae"))
    assert "method.name = randsac (not mae)" in found and "method.segment_size = 2 (not None)" in found
    assert "method.mask_ratio = None (not 0.75)" in found and found == sorted(found)


# Cheap to import, and no setting without a reader


@pytest.mark.parametrize("module", ["pipeline.config", "pipeline.estimate", "pipeline.order", "pipeline.keys"])
def test_torch_is_not_imported(module: str) -> None:
    heavy = {"torch", "ffcv", "mlflow", "timm", "matplotlib"}
    code = f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def sections() -> Iterator[tuple[str, str, type[BaseModel]]]:
    """(section, field, model of the section) of every setting."""
    for name, field in Config.model_fields.items():
        models = (RandSACConfig, PCAEConfig, MAEConfig) if name == "method" else (field.annotation,)
        for model in models:
            assert isinstance(model, type) and not get_args(model)
            for entry in model.model_fields:
                yield name, entry, model


def allowed(section: str, field: str) -> int:
    """How many values a setting may take when they are listed; else 2, for more than one."""
    kinds = [
        model.model_fields[field].annotation for name, entry, model in sections() if (name, entry) == (section, field)
    ]
    return max(len(get_args(kind)) if get_origin(kind) is Literal else 2 for kind in kinds)


class Reads(ast.NodeVisitor):
    """(section, field) of every ``<...>.section.field`` in a file, also through a name that a section was given."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()
        self.aliases: dict[str, str] = {name: name for name in Config.model_fields}
        self.types = {model.__name__: name for name, _, model in sections()}

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                if (
                    isinstance(name, ast.Name)
                    and isinstance(value, ast.Attribute)
                    and value.attr in Config.model_fields
                ):
                    self.aliases[name.id] = value.attr
        self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        for part in ast.walk(node.annotation) if node.annotation else ():
            if isinstance(part, ast.Name) and part.id in self.types:
                self.aliases[node.arg] = self.types[part.id]

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = node.value
        section = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
        self.found.add((self.aliases.get(section, section), node.attr))
        self.generic_visit(node)


def test_every_setting_is_read_somewhere() -> None:
    read: set[tuple[str, str]] = set()
    for folder in ("pipeline", "data_prep", "slurm"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name == "config.py":  # it checks values; that is not using them
                continue
            visitor = Reads()
            visitor.visit(parse(path.read_text()))
            read |= visitor.found
    meant = {(section, field) for section, field, _ in sections() if allowed(section, field) > 1}
    assert {f"{section}.{field}" for section, field in meant - read} == set()
