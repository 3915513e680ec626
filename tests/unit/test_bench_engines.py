"""The engines' benchmark on a CPU: every contestant trains the same, and the arithmetic of what only a GPU measures."""

import json
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from typer.testing import CliRunner

from pipeline.bench import engines, interleaved, report
from pipeline.bench.cli import bench
from pipeline.config import UserError
from pipeline.engine import layers
from pipeline.engine.torch import join_alone

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = [engines.BARE, engines.TORCH_DDP, *engines.ENGINES]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(interleaved, "TOLERANCE", float("inf"))
    monkeypatch.setattr(interleaved, "MIN_ROUNDS", 1)
    monkeypatch.setattr(engines, "STEPS", 2)
    monkeypatch.setattr(layers, "COMPILER", "aot_eager")
    torch._dynamo.reset()


def test_every_contestant_has_a_figure_and_the_group_is_as_it_was():
    before, calls = dist.is_initialized(), []
    rows = engines.run(model="vit_p", batch=4, precision="fp32", rounds=1, kernels=True,
                       progress=lambda done, total: calls.append((done, total)))  # fmt: skip
    assert dist.is_initialized() == before
    found, kernels = rows[: len(NAMES)], rows[len(NAMES) :]
    assert [row.name for row in found] == NAMES
    assert calls[-1] == (4 * len(NAMES), 4 * len(NAMES))
    assert all(row.ms_per_step > 0 and row.median_ms > 0 for row in found)
    assert found[0].to_bare == 1 and {(row.goal, row.peak_gib) for row in found} == {(None, None)}
    assert {row.name: row.recompiles for row in found if row.recompiles is not None} == {engines.COMPILED: 0}
    assert len(kernels) == engines.DEAREST
    assert kernels == sorted(kernels, key=lambda row: -row.ms_per_step)
    assert "aten::mm" in {row.name for row in kernels} and sum(row.share for row in kernels) <= 1


@pytest.mark.parametrize(
    ("method", "precision"), [("mae", "fp32"), ("pcae", "fp32"), ("randsac", "fp32"), ("pcae", "bf16")]
)  # what compilation and checkpointing compute is the affair of test_layers.py
def test_every_contestant_trains_the_same(method, precision, monkeypatch):
    monkeypatch.setattr(engines, "LR", 3e-3)
    monkeypatch.setattr(engines, "MOMENTUM", 0.5)
    cfg = engines.config(method, "vit_p", 4, precision)
    losses = {}
    join_alone()  # DeepSpeed keeps the first group that it sees
    with engines.group_of_one():
        build = engines.builders(cfg, CPU)
        build |= engines.builders(cfg, CPU, deepspeed=True)
        for name in (engines.BARE, engines.TORCH_DDP, *engines.GOALS):
            step = build[name]()
            losses[name] = [float(step()) for _ in range(4)]
    bare = losses[engines.BARE]
    assert abs(bare[-1] / bare[0] - 1) > 0.1, "steps that change nothing tell nothing"
    for name, found in losses.items():
        # Autocast rounds elsewhere than parameters in bf16 do.
        assert found == pytest.approx(bare, rel=1e-5 if precision == "fp32" else 5e-2), name


def test_the_recipe_is_that_of_the_encoder():
    large, small = engines.config("pcae", "vit_l", 32, "bf16"), engines.config("mae", "vit_s", 8, "fp32")
    assert (large.data.image_size, large.model.drop_path, large.method.decoder_width) == (224, 0.25, 512)
    assert (large.engine.precision, large.micro_batch) == ("bf16", 32)
    assert (small.grid, small.shape.width, small.method.decoder_width) == (8, 384, 96)
    for wrong in (("pcae", "vit_x", 8, "fp32"), ("moco", "vit_l", 8, "fp32"), ("pcae", "vit_l", 8, "fp8")):
        with pytest.raises(UserError, match=r"vit_x|moco|fp8"):
            engines.config(*wrong)


def test_on_a_gpu_events_time_the_steps_after_one_that_fills_the_queue(monkeypatch):
    made, clock = [], iter([1.0, 1.5, 3.5])  # ms

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at, self.steps = next(clock), len(made)

        def elapsed_time(self, other):
            assert waited and self.steps + 1 == other.steps
            return other.at - self.at

    waited = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    meter = engines.Meter(CUDA)
    assert meter.run("single", lambda: made.append(None), 1) == 2
    assert len(made) == 3 and meter() == pytest.approx(2.5e-3)
    assert meter.samples["single"] == pytest.approx([5e-4, 2e-3])


def test_the_first_round_is_not_in_the_median():
    meter = engines.Meter(CPU)
    meter.run("single", lambda: sum(range(100_000)), 0)
    assert meter() > 0 and not meter.samples
    meter.run("single", lambda: sum(range(100_000)), 1)
    assert len(meter.samples["single"]) == 2


def test_memory_is_what_a_contestant_adds(monkeypatch):
    """Held at 3 GiB before it: a compiling first step that is forgotten, and 8 GiB at most in those after it."""
    peak, steps = [0], []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * engines.GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 0))

    def step():
        steps.append(None)
        peak[0] = max(peak[0], (20 if len(steps) == 1 else 8) * engines.GIB)

    held = engines.Held(CUDA)
    held.take("single", lambda: step)
    assert held.peaks == {"single": 5.0} and len(steps) == engines.WARM_UP


def test_memory_that_runs_out_names_what_to_change():
    held = engines.Held(CPU)
    held.take(engines.BARE, lambda: lambda: torch.zeros(()))

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"ran out with single.*bare; take a smaller --model or --batch"):
        held.take("single", full)
    assert list(held.steps) == [engines.BARE]


def test_a_recompilation_is_counted_and_goals_are_for_a_gpu():
    meter, held = engines.Meter(CPU), engines.Held(CUDA)
    twice = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    held.peaks = dict.fromkeys(NAMES, 7.5)
    twice(torch.ones(2))
    held.graphs = engines.compiled_graphs()
    twice(torch.ones(2))
    meter.samples = {name: [0.9, 0.1, 0.2] for name in NAMES}
    figures = dict.fromkeys(NAMES, (0.1, 1.0)) | {"ddp": (0.103, 1.01)}
    rows = {row.name: row for row in engines.compare(figures, meter, held)}
    assert rows[engines.COMPILED].recompiles == 0
    twice(torch.ones(3))
    assert engines.compare(figures, meter, held)[NAMES.index(engines.COMPILED)].recompiles == 1
    assert {name for name, row in rows.items() if row.goal} == {"single", "ddp", "fsdp2"}
    text = "103.00 ms a step, median    200.00   A/A 1.010   to bare 1.030 (goal <= 1.02)   peak 7.50 GiB"
    assert text in str(rows["ddp"])
    held.device = CPU
    assert {row.goal for row in engines.compare(figures, meter, held)} == {None}


def test_kernels_are_those_of_the_device_and_no_named_range(monkeypatch):
    def event(key, us, device=DeviceType.CUDA, named=False):
        return SimpleNamespace(key=key, self_device_time_total=us, self_cpu_time_total=9e9, count=6, device_type=device,
                               is_user_annotation=named)  # fmt: skip

    class Profile:
        def __init__(self, activities):
            assert len(activities) == 2

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def key_averages(self):
            return [event("gemm", 660.0), event("aten::mm", 9e9, DeviceType.CPU), event("FSDP::forward", 9e9, named=True),
                    event("softmax", 360.0), event("gemm", 180.0)]  # fmt: skip

    steps = []
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    rows = engines.dearest_kernels(lambda: steps.append(None), CUDA)
    assert rows == [engines.KernelRow("gemm", 0.28, 0.7, 4.0), engines.KernelRow("softmax", 0.12, 0.3, 2.0)]
    assert len(steps) == 3 and "0.280 ms a step   70.0%      4.0 calls  gemm" in str(rows[0])


def test_the_verb_writes_both_kinds_of_rows_where_ffcv_is_not_installed(monkeypatch, tmp_path):
    asked, version = [], report.version
    rows = [engines.Row("single", 2.0, 2.1, 1.0, 1.01, 1.02, 7.5), engines.KernelRow("gemm", 0.3, 0.75, 4.0)]
    monkeypatch.setattr(engines, "run", lambda *args, **options: asked.append((args, options)) or rows)

    def installed(name):
        if name == "ffcv":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(report, "version", installed)
    out = tmp_path / "engines.json"
    words = ["engines", "--method", "mae", "--model", "vit_p", "--batch", "8", "--precision", "fp32", "--kernels"]
    result = CliRunner().invoke(bench, [*words, "--out", str(out)])
    assert result.exit_code == 0, result.output
    options = asked[0][1]
    assert asked[0][0] == ("mae", "vit_p") and options.pop("progress")
    assert options == {"batch": 8, "precision": "fp32", "rounds": 8, "kernels": True, "deepspeed": False}
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["rows"]] == ["single", "gemm"]
    assert found["device"] == engines.device_name() and found["statistic"] == "fastest of the rounds"
    assert "torch" in found["versions"] and "ffcv" not in found["versions"]
