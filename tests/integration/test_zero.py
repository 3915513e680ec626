"""ZeRO on two processes: the map of its flat buffers beside DeepSpeed's own accessors, skipped steps, and what a process holds."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pipeline.bench.parity import Case, whole
from pipeline.engine.deepspeed import DeepSpeedEngine

pytestmark = pytest.mark.timeout(900)  # starting processes on a busy machine takes minutes

CASES = list(itertools.product((1, 2, 3), ("fp32", "bf16")))
CPU = torch.device("cpu")


def make(stage: int, precision: str) -> DeepSpeedEngine:
    return DeepSpeedEngine(Case("pcae", f"zero{stage}-2", precision).config(), CPU)


def step(engine: DeepSpeedEngine, number: int, *, poison: bool = False) -> Any:
    """One step on images of this rank's own; with ``poison`` the backward pass of a layer gives NaN."""
    images = torch.randint(
        0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(dist.get_rank())
    )
    layer = engine.method.decoder.blocks[0].mlp.fc2
    spoil = lambda _, gradients, __: tuple(None if g is None else g * float("nan") for g in gradients)  # noqa: E731
    hook = layer.register_full_backward_hook(spoil) if poison else None
    engine.micro_step(images, engine.method.draw(torch.arange(4) + 8 * number + 4 * dist.get_rank()), 1, True)
    if hook is not None:
        hook.remove()
    return engine.step(1e-3, 0.5, 0.9)


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in found if not torch.equal(found[name], expected[name])]


def oracle(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """What DeepSpeed itself says that the fp32 weights and the moments are."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for name in engine.trained_names:
        found[f"model.{name}"] = safe_get_full_fp32_param(engine.named[name]).clone()
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"{kind}.{name}"] = safe_get_full_optimizer_state(engine.named[name], kind).clone()
    return found


def examine(stage: int, precision: str) -> dict[str, Any]:
    """What a rank saw, as JSON."""
    linear, engine, seen = torch.nn.functional.linear, make(stage, precision), dict[str, Any]()
    first = step(engine, 0, poison=dist.get_rank() == 1)  # before there is any moment
    start = make(stage, precision).state()
    seen["first"] = [
        float(first.skipped),
        engine.trained_names[int(first.culprit)],
        differing(whole(engine.state()), whole(start)),
    ]
    good = step(engine, 1)
    seen["good"] = [float(good.skipped), float(good.culprit)]
    before = whole(engine.state())
    bad = step(engine, 2, poison=dist.get_rank() == 1)
    seen["bad"] = [float(bad.skipped), engine.trained_names[int(bad.culprit)], differing(whole(engine.state()), before)]
    held = oracle(engine)
    seen["oracle"] = [name for name, value in held.items() if not torch.equal(value, before[name])]
    seen["trained"] = len(engine.trained_names)
    seen["teacher"] = teacher_differs(engine, before)
    twin = make(stage, precision)
    twin.load({name: value.clone() for name, value in engine.state().items()})
    seen["loaded"] = differing(whole(twin.state()), before)
    for number in (3, 4):
        a, b = step(engine, number), step(twin, number)
        seen[f"goes_on_{number}"] = [float(a.grad_norm), float(b.grad_norm)]
    seen["goes_on"] = differing(whole(twin.state()), whole(engine.state()))
    seen["linear"] = torch.nn.functional.linear is linear
    return seen


def teacher_differs(engine: DeepSpeedEngine, state: dict[str, Tensor]) -> list[str]:
    """The teacher's parameters that are not the average in compute precision."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(engine.twins.values()), enabled=engine.stage == 3):
        return [name for name in engine.followed
                if not torch.equal(engine.twins[name].data, state[f"ema.{name}"].to(engine.compute))]  # fmt: skip


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    for stage, precision in CASES:
        seen = examine(stage, precision)
        Path(f"{folder}/{stage}_{precision}_{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("zero")
    mp.start_processes(_work, (str(path),), 2, start_method="spawn")
    yield path


@pytest.fixture(params=CASES, ids=lambda case: f"stage{case[0]}-{case[1]}")
def seen(request, folder) -> list[dict[str, Any]]:
    stage, precision = request.param
    return [json.loads((folder / f"{stage}_{precision}_{rank}.json").read_text()) for rank in (0, 1)]


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(seen):
    for rank in seen:
        for when in ("first", "bad"):
            assert rank[when] == [1.0, "decoder.blocks.0.mlp.fc1.bias", []]
        assert rank["good"] == [0.0, -1.0]


def test_the_state_is_what_deepspeed_says_it_is(seen):
    assert all(rank["oracle"] == [] and rank["trained"] > 50 for rank in seen)


def test_the_teacher_that_computes_is_the_average(seen):
    assert all(rank["teacher"] == [] for rank in seen)


def test_another_engine_takes_the_state_over_and_goes_on_bit_for_bit(seen):
    for rank in seen:
        assert rank["loaded"] == [] == rank["goes_on"]
        assert all(a == b for a, b in (rank["goes_on_3"], rank["goes_on_4"]))


def test_torchs_linear_function_stays_torchs(seen):
    assert all(rank["linear"] for rank in seen)
