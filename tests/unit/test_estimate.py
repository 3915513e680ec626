"""What `patchmill estimate` counts against torch, and what it advises in known cases."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from image_files import plain_set
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree

from data_prep.scan import scan
from data_prep.write import write
from pipeline.check import dataset_size
from pipeline.config import CONFIG_DIR, Config, UserError, load_config
from pipeline.costs import MODELS
from pipeline.engine.layers import checkpoint_layers
from pipeline.engine.torch import TorchEngine
from pipeline.estimate import flops_per_image
from pipeline.forecast import IMAGENET, count_parameters, forecast
from pipeline.memory import activations, averaged, parameters, part, state
from pipeline.methods import build_method
from pipeline.planner import Layout, Machine, advise, find_gpu, largest_batch, micro_batch, predict_step, warnings

METHODS = ("randsac", "pcae", "mae")
RECIPES = sorted(
    str(path.relative_to(CONFIG_DIR).with_suffix(""))
    for path in CONFIG_DIR.glob("*/*.yaml")
    if "name: " in path.read_text()
)
H100 = Machine(find_gpu("H100"), gpus=8)


def recipe(name: str, *overrides: str) -> Config:
    return load_config([name], ["run.dir=runs/x", "data.train=train.beton", *overrides])


def named(method: nn.Module) -> dict[str, tuple[tuple[int, ...], bool]]:
    return {name: (tuple(p.shape), p.requires_grad) for name, p in method.named_parameters()}


def predicted(cfg: Config) -> dict[str, tuple[tuple[int, ...], bool]]:
    return {p.name: (p.shape, p.trained) for p in parameters(cfg)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_torch_s(tiny_config: Callable[..., Config], method: str, model: str) -> None:
    size = {"data__image_size": 4 * MODELS[model].patch_size}
    cfg = tiny_config(method, model__name=model, method__decoder_depth=2, **size)
    built = build_method(cfg, "meta")
    assert predicted(cfg) == named(built)
    count = count_parameters(cfg)
    assert count.total == sum(p.numel() for p in built.parameters())
    assert count.encoder == sum(p.numel() for p in built.encoder.parameters())
    assert count.trained == sum(p.numel() for p in built.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith(("engine/", "decoder/"))])
def test_parameters_of_a_shipped_recipe_are_torch_s(name: str) -> None:
    cfg = recipe(name)
    assert predicted(cfg) == named(build_method(cfg, "meta"))


@pytest.mark.parametrize(
    "options",
    [
        {"method__skip": "none"},
        {"method__predict_first": True, "method__query_token": False},
        {"method__skip": "none", "method__predict_first": True, "method__decoder_self_attention": False},
    ],
    ids=str,
)
def test_parameters_follow_randsac_s_switches(tiny_config: Callable[..., Config], options: dict[str, object]) -> None:
    cfg = tiny_config("randsac", **options)
    assert predicted(cfg) == named(build_method(cfg, "meta"))


def kept_bytes(cfg: Config, batch: int) -> float:
    """Bytes an image that autograd and selective checkpointing keep: different storages, parameters left out."""
    method = build_method(cfg, "meta").to_empty(device="cpu")
    method.to(torch.bfloat16 if cfg.engine.precision == "bf16" else torch.float32)
    for parameter in method.parameters():
        nn.init.constant_(parameter, 0.01)
    checkpoint_layers(method.layers(), cfg.engine.checkpoint_layers)
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
    stored: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    caches = []

    class Caching(torch.utils.checkpoint._CachingTorchDispatchMode):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            caches.append(self.storage)

    size = cfg.data.image_size
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.checkpoint, "_CachingTorchDispatchMode", Caching)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            method(images, method.draw(torch.arange(batch)))
    for leaf in _pytree.tree_leaves([list(cache.values()) for cache in caches]):
        value = getattr(leaf, "val", leaf)
        if isinstance(value, Tensor):
            keep(value)
    return sum(t.untyped_storage().nbytes() for place, t in stored.items() if place not in weights) / batch


SEVENS = ("method.segment_size=7", "method.partition_size=1")


@pytest.mark.parametrize(("precision", "checkpointing"), [("fp32", "none"), ("fp32", "full"), ("fp32", "selective"),
                                                          ("fp32", 3), ("bf16", "none")])  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_activations_are_what_autograd_keeps(method: str, precision: str, checkpointing: str | int) -> None:
    cfg = recipe(f"imagenet/{method}_vit_b", "model.name=vit_s", "data.image_size=224", f"engine.precision={precision}",
                 f"engine.checkpoint_layers={checkpointing}", "method.decoder_depth=2",
                 *(SEVENS if method == "randsac" else ()))  # fmt: skip
    # RandSAC's masks, which all images share, are left out: with one image they weigh most.
    masks = method == "randsac" and checkpointing != "selective"
    assert activations(cfg, checkpointing).kept == pytest.approx(kept_bytes(cfg, 1), rel=0.03 if masks else 0.005)


@pytest.mark.parametrize("checkpointing", ["none", "full", 2])
@pytest.mark.parametrize(
    "options",
    [
        {"method__skip": "none"},
        {"method__skip": "none", "method__predict_first": True},
        {"method__predict_first": True, "method__decoder_self_attention": False},
        {"method__segments": "blob", "method__num_segments": 8},
    ],
    ids=str,
)
def test_activations_follow_randsac_s_switches(
    tiny_config: Callable[..., Config], options: dict[str, object], checkpointing: str | int
) -> None:
    cfg = tiny_config("randsac", method__decoder_depth=3, engine__checkpoint_layers=checkpointing, **options)
    if options.get("method__segments") == "blob":
        cfg = recipe("cifar10/randsac", "method.segments=blob", "method.num_segments=8", "method.segment_size=3",
                     f"engine.checkpoint_layers={checkpointing}")  # fmt: skip
    assert activations(cfg, checkpointing).kept == pytest.approx(kept_bytes(cfg, 4), rel=0.06)


def held(tensor: Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_state_is_what_the_engine_holds(tiny_config: Callable[..., Config], method: str, precision: str) -> None:
    cfg = tiny_config(method, engine__precision=precision)
    engine = TorchEngine(cfg, torch.device("cpu"))
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    engine.micro_step(images, engine.method.draw(torch.arange(8)), 1, True)
    found = state(cfg)
    assert found.weights == sum(map(held, engine.named.values()))
    assert found.gradients == sum(held(p.grad) for p in engine.trained)
    moments = [value for entry in engine.optimizer.state.values() for key, value in entry.items() if key != "step"]
    assert found.moments == sum(map(held, moments))
    assert found.average == sum(map(held, engine.ema.values()))
    assert found.teacher == (sum(map(held, engine.teacher.parameters())) if engine.teacher is not None else 0)


def test_a_shared_state_rounds_up_each_parameter() -> None:
    cfg = recipe("imagenet/pcae_vit_l")
    own = parameters(cfg)
    whole = sum(p.size for p in own)
    for shards in (2, 8, 512):
        chunks = [torch.empty(p.shape, device="meta").chunk(shards)[0].numel() for p in own]
        assert part(own, shards) == sum(chunks) >= whole / shards
    assert state(cfg, 8).total == pytest.approx(state(cfg).total / 8, rel=0.01)
    assert part(own, 512) > 1.3 * whole / 512
    assert (
        state(cfg).average == 4 * sum(p.size for p in averaged(cfg))
        and state(recipe("imagenet/mae_vit_l")).teacher == 0
    )


def test_vit_l_on_one_host_is_copied() -> None:
    for name in METHODS:
        advice = advise(recipe(f"imagenet/{name}_vit_l"), H100)
        assert advice.layout == Layout("ddp") and "nothing needs to be shared" in advice.reason
        assert advice.step is not None and advice.step.efficiency > 0.9


def test_one_process_is_single() -> None:
    assert advise(recipe("imagenet/mae_vit_b"), replace(H100, gpus=1)).layout == Layout("single")


def test_too_many_gpus_for_the_batch_are_told_and_the_count_is_right() -> None:
    cfg, machine = recipe("imagenet/pcae_vit_l"), replace(H100, gpus=512)
    advice = advise(cfg, machine)
    assert advice.step is not None and advice.step.efficiency < 0.7
    found = warnings(cfg, machine, advice)
    told = next(line for line in found if "predicted efficiency" in line)
    count = int(told.split(" would reach")[0].split()[-1])
    for gpus, enough in ((count, True), (2 * count, False)):
        step = advise(cfg, replace(machine, gpus=gpus)).step
        assert step is not None and (step.efficiency >= 0.7) == enough
    assert any("local batch of 8" in line for line in found)
    assert not warnings(cfg, H100, advise(cfg, H100))


def test_a_thin_network_never_gathers_across_hosts() -> None:
    cfg, wide = recipe("imagenet/pcae_vit_l"), replace(H100, gpus=64)
    thin = replace(wide, network=50)
    assert advise(cfg, wide).layout.engine == "fsdp2" and advise(cfg, thin).layout.engine == "hsdp"
    assert any("thin network" in line for line in warnings(cfg, thin, advise(cfg, thin)))
    assert predict_step(cfg, thin, Layout("fsdp2", reshard=True)).total > predict_step(cfg, thin, Layout("hsdp")).total


def test_what_does_not_fit_is_shared_then_computed_again() -> None:
    cfg = recipe("imagenet/randsac_vit_h", "train.micro_batch=auto")
    chosen = []
    for gib in (79, 18, 14, 11, 8, 5, 0.1):
        machine = replace(H100, gpu=H100.gpu.model_copy(update={"memory_gib": gib}))
        advice = advise(cfg, machine)
        chosen.append(advice.layout)
        assert (advice.step is None) == (gib == 0.1)
        if advice.step is not None:
            assert 512 % advice.step.micro_batch == 0
    engines = [layout.engine for layout in chosen]
    assert engines[0] == "ddp" and set(engines[2:]) == {"fsdp2"} and chosen[-2].reshard
    assert {"none", "full"} <= {layout.checkpointing for layout in chosen}


def test_checkpointing_that_is_not_needed_is_told() -> None:
    cfg = recipe("imagenet/pcae_vit_l", "engine.checkpoint_layers=full")
    assert any("not needed" in line for line in warnings(cfg, H100, advise(cfg, H100)))
    small = replace(H100, gpu=H100.gpu.model_copy(update={"memory_gib": 16}))
    assert not any("not needed" in line for line in warnings(cfg, small, advise(cfg, small)))
    asked = recipe("imagenet/pcae_vit_l")
    assert any("predicted not to fit" in line for line in warnings(asked, small, advise(asked, small)))


def test_checkpointing_fits_more_and_costs_time() -> None:
    cfg = recipe("imagenet/mae_vit_l")
    none, every_second, full = (Layout("ddp", which) for which in ("none", 2, "full"))
    sizes = [largest_batch(cfg, H100, layout) for layout in (none, every_second, full)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]
    steps = [predict_step(cfg, H100, layout) for layout in (none, every_second, full)]
    assert steps[0].total < steps[1].total < steps[2].total and steps[0].compute == steps[2].compute
    assert largest_batch(cfg, H100, none, accumulates=True) < sizes[0]
    assert micro_batch(cfg, H100, none) == 512


def test_the_report_labels_predictions_and_says_what_is_assumed() -> None:
    cfg = recipe("imagenet/pcae_vit_l")
    found = forecast(cfg, H100, "H100", None)
    text = str(found)
    assert found.samples == IMAGENET and found.assumed and "ImageNet's number is assumed" in text
    assert found.flops == flops_per_image(cfg) and found.steps == 300 * (IMAGENET // 4096)
    for line in text.splitlines():
        if any(
            word in line
            for word in ("hours", "images/s", "ms a step", "efficiency", "largest micro-batch", "engine.name")
        ):
            assert "predicted" in line, line
    assert "assumed" not in str(forecast(cfg, H100, "H100", 10_000))
    half = forecast(cfg, replace(H100, mfu=0.2), "H100", None)
    assert half.advice.step is not None and found.advice.step is not None
    assert half.advice.step.compute == pytest.approx(2 * found.advice.step.compute)


def test_processes_share_the_batch_evenly() -> None:
    with pytest.raises(UserError, match="--gpus 3: train.global_batch = 4096"):
        forecast(recipe("imagenet/mae_vit_b"), replace(H100, gpus=3), "H100", None)


def test_hosts_are_full_and_groups_are_hosts() -> None:
    with pytest.raises(UserError, match="--gpus 12: .*--gpus-per-node 8"):
        replace(H100, gpus=12)
    thin = replace(H100, gpus=64, network=50)
    for setting in (
        f"{layout.settings(thin)}" for layout in (Layout("hsdp"), Layout("fsdp2", "full"), Layout("ddp", 2))
    ):
        cfg = recipe("imagenet/pcae_vit_l", *setting.split())
        assert cfg.engine.name in setting and (cfg.engine.shard_size == 8) == (cfg.engine.name == "hsdp")


def test_gpus_are_known_by_name_or_from_a_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--gpu H1: .*H200, H100, A100, V100, L40S"):
        find_gpu("H1")
    table = tmp_path / "mine.yaml"
    row = "memory_gib: 24, half_tflops: 100, fp32_tflops: 50, memory_gb_s: 700, link_gb_s: 30"
    table.write_text(f"Mine: {{{row}}}\nBad: {{memory_gib: 24}}\nWrong: {{{row.replace('24', '-1')}}}\n")
    assert find_gpu("Mine", table).memory_gib == 24 and find_gpu("H200", table) == find_gpu("H200")
    for name, problem in (("Bad", "Bad.half_tflops"), ("Wrong", "Wrong.memory_gib")):
        with pytest.raises(UserError, match=problem):
            find_gpu(name, table)


def test_the_number_of_samples_is_read_where_there_is_a_file(tmp_path: Path) -> None:
    at = partial(recipe, "imagenet/mae_vit_b")
    assert dataset_size(at("data.loader=synthetic", "data.num_samples=77")) == 77
    assert dataset_size(at(f"data.train={tmp_path / 'none.beton'}")) is None
    manifest, beton = tmp_path / "m.jsonl", tmp_path / "x.beton"
    scan(plain_set(tmp_path / "images", 6), manifest, workers=0)
    write(manifest, beton, workers=0)
    assert dataset_size(at(f"data.train={beton}")) == 6
    assert dataset_size(at("data.loader=folder", f"data.train={manifest}")) == 6
    broken = tmp_path / "broken.beton"
    broken.write_bytes(b"")
    with pytest.raises(UserError, match="no seal"):
        dataset_size(at(f"data.train={broken}"))
