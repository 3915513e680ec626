"""ZeRO on two processes: the map of its flat buffers beside DeepSpeed's own accessors, skipped steps, offload, and fp16."""

import gc
import json
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pipeline.bench.parity import Case, whole
from pipeline.config import Config
from pipeline.engine.deepspeed import DeepSpeedEngine, import_deepspeed
from pipeline.optim import FIRST_SCALE

pytestmark = pytest.mark.timeout(900)  # starting processes on a busy machine takes minutes

CPU = torch.device("cpu")


class Kind(NamedTuple):
    """An engine: its stage, precision and what it keeps on the host or a disk."""

    stage: int
    precision: str = "fp32"
    offload: str = "none"
    params: bool = False
    model: str = "vit_p"

    def __str__(self) -> str:
        """A file name."""
        return f"{self.model}-zero{self.stage}-{self.precision}-{self.offload}{'-params' * self.params}"


KINDS = [Kind(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16", "fp16")]
ON_HOST = [Kind(2, "fp32", "cpu"), Kind(2, "bf16", "cpu"), Kind(3, "fp32", "cpu"), Kind(3, "bf16", "cpu", True)]
# Of a smaller model all parts stay in memory; of this one some of more than a MiB begin at no multiple of a disk's blocks.
LARGER = [Kind(3, "fp32", model="vit_t"), Kind(3, "bf16", model="vit_t")]
ON_DISK = [LARGER[0]._replace(offload="nvme"), LARGER[1]._replace(offload="nvme", params=True)]


def make(kind: Kind, disk: str) -> DeepSpeedEngine:
    settings = Case("pcae", f"zero{kind.stage}-2", kind.precision).config().model_dump(mode="json")
    settings["engine"] |= {"offload": kind.offload, "offload_params": kind.params}
    settings["model"]["name"] = kind.model
    if kind.model != "vit_p":
        settings["method"] |= {"decoder_width": 576, "decoder_heads": 9}
    if kind.offload == "nvme":
        settings["engine"]["offload_dir"] = disk
    return DeepSpeedEngine(Config.model_validate(settings), CPU)


def step(engine: DeepSpeedEngine, number: int, *, poison: bool = False) -> Any:
    """One step on images of this rank's own; with ``poison`` the backward pass of a layer gives NaN."""
    images = torch.randint(
        0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(dist.get_rank())
    )
    layer = engine.method.decoder.blocks[0].mlp.fc2
    spoil = lambda _, gradients, __: tuple(None if g is None else g * float("nan") for g in gradients)  # noqa: E731
    hook = layer.register_full_backward_hook(spoil) if poison else None
    engine.micro_step(images, engine.method.draw(torch.arange(4) + 8 * number + 4 * dist.get_rank()), 1, True)
    assert engine.loss_scale is None or engine.zero.loss_scale == float(engine.loss_scale.scale)
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


def examine(kind: Kind, disk: str) -> dict[str, Any]:
    """What a rank saw, as JSON."""
    linear, engine, seen = torch.nn.functional.linear, make(kind, f"{disk}/a"), dict[str, Any]()
    seen["on_disk"] = [flat.numel() for flat in engine.layout.masters].count(0)
    first = step(engine, 0, poison=dist.get_rank() == 1)  # before there is any moment
    start = make(kind, f"{disk}/b").state()
    seen["first"] = [
        float(first.skipped),
        engine.trained_names[int(first.culprit)],
        differing(whole(engine.state()), whole(start)),
    ]
    good = step(engine, 1)
    seen["good"] = [float(good.skipped), float(good.culprit)]
    kept = engine.state()
    before = whole(kept)
    bad = step(engine, 2, poison=dist.get_rank() == 1)
    seen["bad"] = [float(bad.skipped), engine.trained_names[int(bad.culprit)], differing(whole(engine.state()), before)]
    held = oracle(engine)
    seen["oracle"] = [name for name, value in held.items() if not torch.equal(value, before[name])]
    seen["trained"] = len(engine.trained_names)
    seen["teacher"] = teacher_differs(engine, before)
    twin = make(kind, f"{disk}/c")
    twin.load({name: value.clone() for name, value in engine.state().items()})
    seen["loaded"] = differing(whole(twin.state()), whole(engine.state()))
    seen["norms"] = [
        (float(step(engine, number).grad_norm), float(step(twin, number).grad_norm)) for number in range(3, 12)
    ]
    end = whole(engine.state())
    seen["kept"] = [engine.state_is_copy, differing(whole(kept), before)]
    seen["goes_on"] = differing(whole(twin.state()), end)
    seen["scale"] = [float(state["loss_scale"]) for state in (before, end) if "loss_scale" in state]
    seen["freed"] = freed(engine, twin)
    seen["linear"] = torch.nn.functional.linear is linear
    return seen


def freed(*engines: DeepSpeedEngine) -> list[bool]:
    """Whether an engine's buffers go with it, seen from outside: its caller still holds the engine itself."""
    found = []
    for engine in engines:
        tensors = *engine.layout.masters, *engine.averages, *engine.named.values(), *engine.twins.values()
        buffers = [weakref.ref(tensor) for tensor in tensors]
        del tensors
        engine.close()
        engine.__dict__.clear()
        gc.collect()
        left = [tensor for buffer in buffers if (tensor := buffer()) is not None]
        found.append(sum(tensor.numel() for tensor in left) == 0)  # empty shells may stay
    return found


def teacher_differs(engine: DeepSpeedEngine, state: dict[str, Tensor]) -> list[str]:
    """The teacher's parameters that are not the average in compute precision."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(engine.twins.values()), enabled=engine.stage == 3):
        return [name for name in engine.followed
                if not torch.equal(engine.twins[name].data, state[f"ema.{name}"].to(engine.compute))]  # fmt: skip


def _work(rank: int, folder: str, kinds: Sequence[Kind]) -> None:
    torch.set_num_threads(1)
    import_deepspeed(torch.device("cpu"))
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # a CPU does compute in it, only slowly
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    for kind in kinds:
        Path(f"{folder}/{kind}_{rank}.json").write_text(json.dumps(examine(kind, f"{folder}/{kind}")))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[KINDS + ON_HOST, pytest.param(LARGER + ON_DISK, marks=pytest.mark.slow)],
                ids=["memory", "disk"])  # fmt: skip
def seen(request, tmp_path_factory) -> Iterator[dict[Kind, list[dict[str, Any]]]]:
    """By engine what each rank saw."""
    on_disk = any(kind.offload == "nvme" for kind in request.param)
    if on_disk and not import_deepspeed(CPU).ops.op_builder.AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed's extension for disks needs g++ and libaio with its headers (apt: g++ libaio-dev)")
    folder = tmp_path_factory.mktemp("zero")
    mp.start_processes(_work, (str(folder), request.param), 2, start_method="spawn")
    yield {
        kind: [json.loads((folder / f"{kind}_{rank}.json").read_text()) for rank in (0, 1)] for kind in request.param
    }


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(seen):
    for kind, ranks in seen.items():
        scale = ["loss_scale"] if kind.precision == "fp16" else []
        for rank in ranks:
            assert rank["first"] == [1.0, "decoder.blocks.0.mlp.fc1.bias", scale], kind
            assert rank["bad"] == [
                1.0,
                "decoder.blocks.0.mlp.fc1.bias",
                [*scale, *("loss_scale.good_steps" for _ in scale)],
            ]
            assert rank["good"] == [0.0, -1.0], kind


def test_the_loss_scale_is_halved_by_each_skipped_step(seen):
    for kind, ranks in seen.items():
        expected = [FIRST_SCALE / 2, FIRST_SCALE / 4] if kind.precision == "fp16" else []
        assert all(rank["scale"] == expected for rank in ranks), kind


def test_the_state_is_what_deepspeed_says_it_is(seen):
    for kind, ranks in seen.items():
        assert all(rank["oracle"] == [] and rank["trained"] > 50 for rank in ranks), kind


def test_the_teacher_that_computes_is_the_average(seen):
    for kind, ranks in seen.items():
        assert all(rank["teacher"] == [] for rank in ranks), kind


def test_another_engine_takes_the_state_over_and_goes_on_bit_for_bit(seen):
    for kind, ranks in seen.items():
        for rank in ranks:
            assert rank["loaded"] == [] == rank["goes_on"], kind
            assert all(a == b for a, b in rank["norms"]), kind


def test_a_state_stays_as_it_was_when_training_goes_on(seen):
    for kind, ranks in seen.items():
        assert all(rank["kept"] == [True, []] for rank in ranks), kind


def test_a_closed_engine_keeps_no_memory(seen):
    for kind, ranks in seen.items():
        assert all(rank["freed"] == [True, True] for rank in ranks), kind


def test_torchs_linear_function_stays_torchs(seen):
    assert all(rank["linear"] for ranks in seen.values() for rank in ranks)


def test_ten_steps_with_the_optimizer_on_the_host_are_those_without(seen):
    for kind, ranks in seen.items():
        if kind.offload != "none":
            expected = seen[kind._replace(offload="none", params=False)][0]["norms"]
            tolerance = 1e-6 if kind.precision == "fp32" else 1e-2  # later roundings grow apart
            assert len(expected) == 9
            assert ranks[0]["norms"][0] == pytest.approx(expected[0], rel=1e-6), kind
            assert np.array(ranks[0]["norms"]) == pytest.approx(np.array(expected), rel=tolerance), kind


def test_what_is_said_to_lie_on_a_disk_does(seen):
    for kind, ranks in seen.items():
        assert all((rank["on_disk"] > 0) == (kind.offload == "nvme") for rank in ranks), kind
