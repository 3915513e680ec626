"""The engines, activation checkpointing, compilation, saving and profiling on CUDA devices; skipped where there is none."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pipeline import checkpoint
from pipeline.bench import engines, interleaved
from pipeline.config import Config, RunFailed
from pipeline.engine.deepspeed import DeepSpeedEngine
from pipeline.engine.torch import TorchEngine
from pipeline.launch import World
from pipeline.profiling import Profiler
from pipeline.saver import Saver

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KIND = "cuda"
DEVICE = torch.device(KIND)
BATCH = 8
METHODS = ("mae", "pcae", "randsac")
methods = pytest.mark.parametrize("method", METHODS)


def images() -> Tensor:
    return torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def train(engine: TorchEngine, num_steps: int = 5, part: slice = slice(None), first: int = 0) -> list[float]:
    """The loss of each step from ``first`` on; ``part`` of the batch is this process's."""
    losses = []
    for step in range(first, first + num_steps):
        keys = torch.arange(BATCH) + BATCH * step
        logs = engine.micro_step(images()[part], engine.method.draw(keys[part]), 1, True)
        engine.step(1e-3, 1.0, 0.9)
        losses.append(logs["loss"])
    return torch.stack(losses).tolist()


def local(value: Tensor) -> Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


# One process


@pytest.mark.parametrize(("precision", "bar"), [("fp32", 1e-5), ("bf16", 1e-3)])
@methods
def test_all_engines_give_one_loss(method, precision, bar, tiny_config, deterministic):
    found = {}
    for name in ("single", "ddp", "fsdp2"):
        cfg = tiny_config(method, engine__name=name, engine__precision=precision, model__drop_path=0.2)
        found[name] = train(TorchEngine(cfg, DEVICE))
    assert dist.get_world_size() == 1 and f"{KIND}:nccl" in dist.get_backend_config()
    assert abs(found["single"][-1] / found["single"][0] - 1) > 0.01
    assert found["ddp"] == pytest.approx(found["single"], rel=bar)
    assert found["fsdp2"] == pytest.approx(found["single"], rel=bar)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@methods
def test_checkpointing_changes_no_bit(method, precision, tiny_config, deterministic):
    found = {}
    for which in ("none", "full", "selective", 2):
        cfg = tiny_config(method, engine__checkpoint_layers=which, engine__precision=precision, model__drop_path=0.2)
        found[which] = train(TorchEngine(cfg, DEVICE))
    assert found["full"] == found["selective"] == found[2] == found["none"]


@methods
def test_compiled_layers_agree_and_are_compiled_in_the_first_steps_only(method, tiny_config):
    torch._dynamo.reset()
    eager = train(TorchEngine(tiny_config(method, model__drop_path=0.2), DEVICE), 6)
    engine = TorchEngine(tiny_config(method, model__drop_path=0.2, engine__compile=True), DEVICE)
    compiled = train(engine, 3)
    graphs = engines.compiled_graphs()
    compiled += train(engine, 3, first=3)
    assert compiled == pytest.approx(eager, rel=1e-3)
    assert graphs > 0 and engines.compiled_graphs() == graphs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
@methods
def test_a_step_never_waits_for_the_device(method, name, precision, tiny_config):
    engine = TorchEngine(tiny_config(method, engine__name=name, engine__precision=precision), DEVICE)
    train(engine)
    there, draw = images().to(DEVICE), engine.method.draw(torch.arange(BATCH)).to(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.micro_step(there, draw, 2, False)
        engine.micro_step(there, draw, 2, True)
        engine.step(1e-3, 1.0, 0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# DeepSpeed


def zero(method: str, tiny_config, stage: int, precision: str = "fp32", **settings) -> DeepSpeedEngine:
    engine = {"name": "deepspeed", "zero_stage": stage, "precision": precision, **settings}
    return DeepSpeedEngine(tiny_config(method, **{f"engine__{key}": value for key, value in engine.items()}), DEVICE)


@pytest.mark.parametrize(
    ("precision", "bar", "late"), [("fp32", 1e-5, 1e-5), ("bf16", 1e-3, 2e-2), ("fp16", 1e-3, 2e-2)]
)
@pytest.mark.parametrize("stage", [1, 2, 3])
@methods
def test_every_stage_of_zero_gives_the_loss_of_single(method, stage, precision, bar, late, tiny_config, deterministic):
    expected = train(TorchEngine(tiny_config(method, engine__precision=precision), DEVICE))
    found = train(zero(method, tiny_config, stage, precision))
    # Roundings grow apart: PCAE's teacher may then choose other tokens.
    assert found[:2] == pytest.approx(expected[:2], rel=bar) and found == pytest.approx(expected, rel=late)


@pytest.mark.parametrize(("stage", "params"), [(2, False), (3, False), (3, True)])
@pytest.mark.parametrize(("precision", "bar"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_offload_gives_the_loss_of_what_is_not(stage, params, precision, bar, tiny_config, deterministic):
    engine = zero("pcae", tiny_config, stage, precision, offload="cpu", offload_params=params)
    assert {flat.device.type for flat in [*engine.layout.masters, *engine.averages]} == {"cpu"}
    assert train(engine) == pytest.approx(train(zero("pcae", tiny_config, stage, precision)), rel=bar)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("stage", "offload"), [(1, "none"), (2, "none"), (3, "none"), (2, "cpu"), (3, "cpu")])
def test_a_step_of_zero_that_is_not_finite_changes_no_weight(stage, offload, precision, tiny_config):
    engine = zero("pcae", tiny_config, stage, precision, offload=offload)
    train(engine, 1)
    before = {name: local(value) for name, value in engine.state().items() if "loss_scale" not in name}
    spoil = lambda _, gradients, __: tuple(None if g is None else g * float("nan") for g in gradients)  # noqa: E731
    hook = engine.method.decoder.blocks[0].mlp.fc2.register_full_backward_hook(spoil)
    engine.micro_step(images(), engine.method.draw(torch.arange(BATCH)), 1, True)
    report = engine.step(1e-3, 1.0, 0.9)
    hook.remove()
    assert float(report.skipped) == 1 and engine.trained_names[int(report.culprit)].startswith("decoder.blocks.0.mlp")
    after = engine.state()
    assert [name for name, value in before.items() if not torch.equal(value, local(after[name]))] == []
    assert all(torch.isfinite(torch.tensor(train(engine, 2, first=1))))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_state_of_zero_is_on_the_host_and_moves_to_single(stage, tmp_path, tiny_config):
    engine = zero("pcae", tiny_config, stage)
    train(engine, 2)
    state = engine.state()
    assert {local(value).device.type for value in state.values()} == {"cpu"}
    path = checkpoint.save(tmp_path, 1, state, {})
    single = TorchEngine(tiny_config("pcae"), DEVICE)
    there = single.state()
    checkpoint.load(path, there)
    single.load(there)
    again = zero("pcae", tiny_config, stage)
    again.load(single.state())
    assert [name for name, value in again.state().items() if not torch.equal(local(value), local(state[name]))] == []
    assert train(single, 2, first=2) == pytest.approx(train(engine, 2, first=2), rel=1e-5)


# Saving


@pytest.mark.parametrize("name", ["single", "fsdp2"])
def test_what_is_saved_is_the_state_at_the_start(name, tmp_path, tiny_config):
    """With steps still queued at ``start``, and weights that change right after ``ready``; twice, as buffers are kept."""
    cfg = tiny_config("pcae", engine__name=name)
    engine = TorchEngine(cfg, DEVICE)
    train(engine, 2)
    saver = Saver(tmp_path, 2, World(), DEVICE)
    busy = torch.randn(4096, 4096, device=DEVICE)
    for number in (1, 2):
        for _ in range(30):
            busy = (busy @ busy).clamp(-1, 1)
        waits_for_it = 0 * busy.sum()
        for value in engine.state().values():
            local(value).copy_(number + waits_for_it)
            if value.dim():
                local(value).flatten()[-1].mul_(-1)
        expected = {key: local(value).clone() for key, value in engine.state().items()}
        saver.start(number, engine.state(), {})
        saver.ready()
        for value in engine.state().values():
            local(value).fill_(7.0)
        saved = saver.wait()
        assert saved.reason is None and saved.step == number
        state = TorchEngine(cfg, torch.device("cpu")).state()
        checkpoint.load(saved.path, state)
        assert [key for key, value in state.items() if not torch.equal(local(value), expected[key].cpu())] == []
    saver.close()


# Profiling


def test_a_profile_has_kernels_and_a_snapshot_of_memory(tmp_path, tiny_config):
    cfg = tiny_config("mae", profile__memory=True, profile__start_step=1, profile__num_steps=1)
    try:
        profiler = Profiler(cfg, tmp_path, World())
        engine = TorchEngine(cfg, DEVICE)
        profiler.before(1)
        train(engine, 1)
        profiler.after(1)
        with pytest.raises(torch.OutOfMemoryError) as full:
            torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)
        told = profiler.explain(full.value, 2, BATCH)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    files = {path.name: path for path in (tmp_path / "profile").iterdir()}
    span = "steps-00000001-00000001-rank-00000"
    last = "memory-step-00000002-rank-00000.pickle"
    assert files.keys() == {f"{span}.json.gz", f"{span}.txt", f"memory-{span}.pickle", last}
    assert "Self CUDA time total" in files[f"{span}.txt"].read_text()
    assert all(path.stat().st_size > 10_000 for name, path in files.items() if name.endswith(".pickle"))
    assert isinstance(told, RunFailed) and f"allocations are in {files[last]}" in str(told)
    assert "set train.micro_batch below 8, engine.checkpoint_layers=full, engine.precision=bf16" in str(told)


# The benchmark


def test_the_benchmark_has_a_figure_for_everything(monkeypatch):
    monkeypatch.setattr(interleaved, "TOLERANCE", float("inf"))
    monkeypatch.setattr(interleaved, "MIN_ROUNDS", 1)
    torch._dynamo.reset()
    rows = engines.run(model="vit_p", batch=64, precision="bf16", rounds=1, kernels=True)
    kernels = [row for row in rows if isinstance(row, engines.KernelRow)]
    found = {row.name: row for row in rows if isinstance(row, engines.Row)}
    assert len(found) == 8 and len(kernels) == engines.DEAREST
    assert all(row.ms_per_step > 0 and row.median_ms > 0 and row.peak_gib > 0 for row in found.values())
    assert found["single, full"].peak_gib < found["single"].peak_gib
    assert found[engines.COMPILED].recompiles == 0
    assert not any(row.name.startswith(("aten::", "FSDP::")) for row in kernels)


# Two processes


def _work(rank: int, folder: str, cfg: Config) -> None:
    device = torch.device(KIND, rank)
    if KIND == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("cpu:gloo,cuda:nccl" if KIND == "cuda" else "gloo", store=store, rank=rank, world_size=2)
    half = BATCH // 2
    losses = torch.tensor(train(TorchEngine(cfg, device), part=slice(rank * half, (rank + 1) * half)))
    dist.all_reduce(losses)
    if rank == 0:
        with open(f"{folder}/losses.json", "w") as file:
            json.dump((losses / 2).tolist(), file)
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
@methods
def test_two_devices_are_one(method, name, tmp_path, tiny_config):
    expected = train(TorchEngine(tiny_config(method), DEVICE))
    mp.start_processes(_work, (str(tmp_path), tiny_config(method, engine__name=name)), 2, start_method="spawn")
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(expected, rel=1e-5)
