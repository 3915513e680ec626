"""What `patchmill estimate` predicts of DeepSpeed's ZeRO, by hand; what its processes really hold is measured in test_memory."""

from dataclasses import replace

import pytest

from pipeline.config import Config, load_config
from pipeline.forecast import forecast
from pipeline.memory import Parameter, State, activations, averaged, parameters, state, takes_decay
from pipeline.planner import (
    ZERO,
    Layout,
    Machine,
    advise,
    communication_s,
    exposed_s,
    find_gpu,
    largest_batch,
    predict_step,
    update_s,
)
from pipeline.zero_memory import Zero, flat, groups, offload_bytes, padding, zero_passing, zero_state, zero_traffic

H100 = Machine(find_gpu("H100"), gpus=8)


def recipe(name: str, *overrides: str) -> Config:
    return load_config([name], ["run.dir=runs/x", "data.train=train.beton", *overrides])


def test_padding_of_flat_groups_and_of_each_parameter_by_hand() -> None:
    items = [Parameter("a", (3, 5)), Parameter("b", (7,))]
    # Stages 1 and 2: 22 to the next multiple of 2 x 5, stage 3: 15 and 7 to multiples of 5, a part each.
    assert flat(items, Zero(1, 5)) == flat(items, Zero(2, 5)) == 30 // 5
    assert flat(items, Zero(3, 5)) == 3 + 2
    assert flat(items, Zero(1, 1)) == flat(items, Zero(3, 1)) == 22


@pytest.mark.parametrize("processes", [1, 2, 7, 64])
@pytest.mark.parametrize("name", ["imagenet/pcae_vit_b", "imagenet/randsac_vit_b", "imagenet/mae_vit_b"])
def test_the_parts_of_all_processes_are_the_whole_and_the_padding(name: str, processes: int) -> None:
    cfg = recipe(name)
    own = parameters(cfg)
    trained, followed = sum(p.size for p in own if p.trained), sum(p.size for p in averaged(cfg))
    found = groups(cfg)
    assert sorted(p.name for group in found for p in group) == sorted(p.name for p in own if p.trained)
    assert all(len({takes_decay(p.name, p.shape, cfg.optim) for p in group}) == 1 for group in found)
    assert sum(p.size for group in found for p in group if p in averaged(cfg)) == followed
    for stage in (1, 2, 3):
        zero = Zero(stage, processes)
        held, padded = zero_state(cfg, zero)[0], padding(cfg, zero)
        assert processes * held.moments == 8 * (trained + padded)
        assert 4 * followed <= processes * held.average <= 4 * (followed + padded)
        most = 2 * processes * len(found) if stage < 3 else (processes - 1) * len(own)
        assert 0 <= padded <= most and (processes > 1 or padded <= len(found))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_3_of_one_process_is_single_with_a_copy_of_the_weights(precision: str) -> None:
    cfg = recipe("imagenet/pcae_vit_b", f"engine.precision={precision}")
    alone, found = state(cfg), zero_state(cfg, Zero(3, 1))[0]
    copy = (4 if precision == "fp32" else 2) * sum(p.size for p in parameters(cfg))
    assert found == replace(alone, weights=alone.weights + copy)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_higher_stage_and_more_processes_hold_less(precision: str) -> None:
    cfg = recipe("imagenet/pcae_vit_l", f"engine.precision={precision}")
    for processes in (2, 8, 64):
        amounts = [zero_state(cfg, Zero(stage, processes))[0].total for stage in (1, 2, 3)]
        assert amounts == sorted(amounts, reverse=True) and amounts[1] > amounts[2]
        assert all(
            zero_state(cfg, Zero(stage, 2 * processes))[0].total < amount
            for stage, amount in zip((1, 2, 3), amounts, strict=True)
        )


def test_bytes_a_parameter_of_each_stage_by_hand() -> None:
    cfg = recipe("imagenet/mae_vit_l")
    trained, frozen = (sum(p.size for p in parameters(cfg) if p.trained is kind) for kind in (True, False))
    expected = {  # of a trained parameter on 8 processes: weights in bf16 and in fp32, gradients, moments
        1: (2 + 4 / 8, 4, 8 / 8),
        2: (2 + 4 / 8, 4 / 8, 8 / 8),
        3: (2 / 8 + 4 / 8, 4 / 8, 8 / 8),
    }
    for stage, (weights, gradients, moments) in expected.items():
        held = zero_state(cfg, Zero(stage, 8))[0]
        still = (4 + 2 / (8 if stage == 3 else 1)) * frozen  # positions have one row: a process holds all of it in fp32
        amounts = held.weights - still, held.gradients, held.moments
        assert amounts == pytest.approx([n * trained for n in (weights, gradients, moments)], rel=1e-4)
        assert held.average == held.teacher == 0
    pcae = recipe("imagenet/pcae_vit_l")
    looking = [p for p in parameters(pcae) if p.name.startswith("encoder.")]
    for stage, shared in ((1, 1), (2, 1), (3, 8)):
        held = zero_state(pcae, Zero(stage, 8))[0]
        assert held.average == pytest.approx(4 / 8 * sum(p.size for p in averaged(pcae)), rel=1e-4)
        assert held.teacher == pytest.approx(2 / shared * sum(p.size for p in looking), rel=1e-4)


def test_in_fp32_gradients_of_parameters_on_a_border_are_whole() -> None:
    cfg = recipe("imagenet/mae_vit_b", "engine.precision=fp32")
    largest = max(p.size for p in parameters(cfg))
    trained = sum(p.size for p in parameters(cfg) if p.trained)
    assert zero_state(cfg, Zero(2, 1))[0].gradients == 4 * trained
    for processes in (2, 8, 64):
        held = zero_state(cfg, Zero(2, processes))[0]
        assert held == zero_state(cfg, Zero(1, processes))[0]
        assert 4 * trained / processes < held.gradients <= 4 * (trained / processes + 2 * 2 * largest)


def test_what_lies_on_the_host_leaves_the_gpu() -> None:
    cfg = recipe("imagenet/pcae_vit_b")
    nothing = State(0, 0, 0, 0, 0)
    for stage in (2, 3):
        near, none = zero_state(cfg, Zero(stage, 4))
        gpu, host = zero_state(cfg, Zero(stage, 4, offload=True))
        part = near.moments // 8
        assert none == nothing and gpu.moments == gpu.average == host.teacher == 0 and gpu.teacher == near.teacher
        assert gpu.weights == near.weights - 4 * part and (host.moments, host.average) == (near.moments, near.average)
        assert (gpu.gradients, host.gradients) == ((4 * part, 4 * part) if stage == 2 else (0, 8 * part))
        assert host.weights == (4 + 2 * (stage == 2)) * part
    gpu, host = zero_state(cfg, Zero(3, 4, offload=True, offload_params=True))
    assert gpu == State(4 * sum(p.size for p in parameters(cfg) if not p.trained), 0, 0, 0, 0)
    assert gpu.weights + host.weights == near.weights and host.teacher == near.teacher


def zero_recipe(name: str, stage: int, *more: str) -> Config:
    return recipe(name, "engine.name=deepspeed", f"engine.zero_stage={stage}", *more)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_comes_and_goes_follows_the_buckets(stage: int) -> None:
    bucket = 10_000_000
    cfg = zero_recipe("imagenet/mae_vit_b", stage, f"engine.deepspeed.reduce_bucket_size={bucket}")
    trained, whole = (sum(p.size for p in parameters(cfg) if p.trained or every) for every in (False, True))
    found = zero_passing(cfg, Zero(stage, 4), accumulates=False)
    expected = {
        1: (2 * trained, (2 + 4) * trained),  # gradients as they are computed, then a copy of all that are reduced
        2: (2 * 2 * bucket + (2 + 4) * bucket, 0),  # two buckets in bf16, one flattened and one cast
        3: (2 * 4 * bucket + 2 * whole, 0),  # the bucket and its copy in order of rank, and the gathered weights
    }[stage]
    assert found == pytest.approx(expected, rel=1e-4)
    assert zero_passing(cfg, Zero(stage, 4), accumulates=True) == found
    alone = cfg.model_copy(update={"engine": cfg.engine.model_copy(
        update={"deepspeed": cfg.engine.deepspeed.model_copy(update={"overlap_comm": False})})})  # fmt: skip
    less = zero_passing(alone, Zero(stage, 4), accumulates=False)[0]
    assert found[0] - less == (2 * bucket if stage == 2 else 0)


def test_what_comes_and_goes_in_fp32_waits_for_the_last_micro_batch() -> None:
    for stage in (1, 2):
        cfg = zero_recipe(
            "imagenet/mae_vit_b", stage, "engine.precision=fp32", "engine.deepspeed.reduce_bucket_size=10000000"
        )
        trained = sum(p.size for p in parameters(cfg) if p.trained)
        once, more = (zero_passing(cfg, Zero(stage, 8), accumulates=kind) for kind in (False, True))
        assert once == (3 * 4 * 10_000_000, 0)
        waiting = 4 * trained if stage == 1 else zero_state(cfg, Zero(2, 8))[0].gradients
        assert more == (once[0] + waiting, 0)


def test_stage_3_keeps_half_a_billion_weights_gathered() -> None:
    small, huge = zero_recipe("imagenet/mae_vit_l", 3), zero_recipe("imagenet/mae_vit_h", 3)
    buckets = 2 * 4 * 50_000_000
    weights = [sum(p.size for p in parameters(cfg)) for cfg in (small, huge)]
    gathered = [zero_passing(cfg, Zero(3, 8), accumulates=False)[0] - buckets for cfg in (small, huge)]
    assert weights[0] < 500_000_000 < weights[1]
    assert gathered[0] == 2 * weights[0] and 2 * 500_000_000 < gathered[1] < 2 * weights[1]
    shares = [zero_traffic(cfg, Zero(3, 8), 1).behind / (7 / 8) for cfg in (small, huge)]
    trained = [sum(p.size for p in parameters(cfg) if p.trained) for cfg in (small, huge)]
    assert shares[0] == pytest.approx(2 * weights[0] + 4 * trained[0])
    assert shares[1] == pytest.approx(2 * (2 * weights[1] - 500_000_000) + 4 * trained[1])
    watched = zero_recipe("imagenet/pcae_vit_l", 3)
    more = (
        zero_passing(watched, Zero(3, 8), accumulates=False)[0] - buckets - 2 * sum(p.size for p in parameters(watched))
    )
    assert 2 * 30_000_000 < more < 2 * 70_000_000  # two layers of the teacher and what is fetched ahead


def test_stages_1_and_2_reduce_whole_gradients() -> None:
    cfg = recipe("imagenet/pcae_vit_l")
    trained, followed = sum(p.size for p in parameters(cfg) if p.trained), sum(p.size for p in averaged(cfg))
    reduced, gathered = 2 * 4 * trained * 7 / 8, 2 * (trained + followed) * 7 / 8
    assert zero_traffic(cfg, Zero(1, 8), 3) == pytest.approx((0, reduced + gathered))
    assert zero_traffic(cfg, Zero(2, 8), 3) == pytest.approx((3 * reduced, gathered))
    single = recipe("imagenet/pcae_vit_l", "engine.precision=fp32")
    assert zero_traffic(single, Zero(1, 8), 3) == pytest.approx((reduced, 2 * gathered))
    assert zero_traffic(cfg, Zero(1, 1), 3) == zero_traffic(cfg, Zero(3, 1), 3) == (0, 0)


def test_offload_sends_gradients_down_and_weights_up() -> None:
    cfg = recipe("imagenet/pcae_vit_l")
    trained, followed = sum(p.size for p in parameters(cfg) if p.trained), sum(p.size for p in averaged(cfg))
    up = 2 * (trained + followed) / 8
    assert offload_bytes(cfg, Zero(2, 8), 1) == 0
    assert offload_bytes(cfg, Zero(2, 8, True), 3) == pytest.approx(4 * trained / 8 + up, rel=1e-4)
    # Stage 3: each micro-batch down, each but the first up before, and the sum once more down for the optimizer.
    assert offload_bytes(cfg, Zero(3, 8, True), 3) == pytest.approx((3 + 2 + 1) * 4 * trained / 8 + up, rel=1e-4)
    assert offload_bytes(cfg, Zero(3, 8, True, True), 3) == pytest.approx(6 * 4 * trained / 8 + 3 * up, rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_configuration_of_deepspeed_is_predicted_as_its_stage(stage: int) -> None:
    cfg, machine = zero_recipe("imagenet/pcae_vit_l", stage, "engine.checkpoint_layers=full"), replace(H100, gpus=64)
    layout = Layout(ZERO[stage - 1], "full")
    found = forecast(cfg, machine, "H100", None)
    assert found.plan.layout == layout and found.plan.step == predict_step(cfg, machine, layout)
    assert {fit.checkpointing: fit.micro_batch for fit in found.fits}["full"] == largest_batch(cfg, machine, layout)
    settings = f"engine.name=deepspeed engine.zero_stage={stage}"
    assert layout.settings(machine) == f"{settings} engine.checkpoint_layers=full"
    text = str(found)
    assert (
        f"predicted largest micro-batch with zero{stage}" in text
        and f"predicted for the configuration's {settings}" in text
    )
    assert found.advice == advise(recipe("imagenet/pcae_vit_l"), machine)
    assert found.states[f"zero{stage}"] == zero_state(cfg, Zero(stage, 64))[0]
    held = [zero_state(cfg, Zero(stage, 64))[0].total, *zero_passing(cfg, Zero(stage, 64), accumulates=False)]
    left = machine.bytes - held[0] - held[1]
    assert largest_batch(cfg, machine, layout) == int(left // activations(cfg, "full").peak)
    small = replace(
        machine, gpu=machine.gpu.model_copy(update={"memory_gib": (held[0] + max(held[1:])) / 0.9 / 2**30 - 0.01})
    )
    assert largest_batch(cfg, small, layout) == 0 and forecast(cfg, small, "H100", None).plan.step is None


def test_the_host_is_advised_where_not_one_image_fits_beside_the_state() -> None:
    cfg = recipe("imagenet/pcae_vit_h")
    with_memory = lambda gib: replace(H100, gpus=1, gpu=H100.gpu.model_copy(update={"memory_gib": gib}))  # noqa: E731
    assert not advise(cfg, with_memory(24)).layout.offload
    found = advise(cfg, with_memory(10))
    assert found.layout == Layout("zero2", "full", offload=True) and "host's memory" in found.reason and found.step
    assert "engine.zero_stage=2 engine.offload=cpu" in found.layout.settings(with_memory(10))
    assert advise(cfg, with_memory(0.1)).step is None
    files = zero_recipe("imagenet/pcae_vit_h", 3, "engine.offload=nvme", "engine.offload_dir=/scratch")
    assert "engine.offload=cpu, its files as if they were in memory" in str(forecast(files, with_memory(24), "X", None))


def test_the_report_has_a_line_for_each_engine_that_could_be_taken() -> None:
    lines = str(forecast(recipe("imagenet/pcae_vit_l"), replace(H100, gpus=64), "H100", None)).splitlines()
    start = next(number for number, line in enumerate(lines) if "right when" in line)
    assert "predicted" in lines[start]
    assert [line.split()[0] for line in lines[start + 1 : start + 7]] == [
        "ddp",
        "fsdp2",
        "hsdp",
        "zero1",
        "zero2",
        "zero3",
    ]
    assert all(" ms " in line for line in lines[start + 1 : start + 7])
    assert any(line.split() and line.split()[0] == "padding" and "zero2 0" in line for line in lines)
    tight = replace(H100, gpu=H100.gpu.model_copy(update={"memory_gib": 3}))
    text = str(forecast(recipe("imagenet/pcae_vit_l"), tight, "H100", None))
    assert text.count("does not fit") >= 3
    away = zero_recipe("imagenet/pcae_vit_l", 3, "engine.offload=nvme", "engine.offload_dir=/fast")
    text = str(forecast(away, H100, "H100", None))
    assert "offload      predicted" in text and "in files" in text
    near = zero_recipe("imagenet/pcae_vit_l", 3, "engine.offload=cpu")
    assert "in files" not in str(forecast(near, H100, "H100", None)) and "offload" not in str(
        forecast(recipe("imagenet/pcae_vit_l"), H100, "H100", None)
    )


def test_nothing_hides_what_stage_1_sends_in_bf16() -> None:
    cfg = recipe("imagenet/mae_vit_l")
    first, second, third = (Layout(name) for name in ZERO)
    waits = [exposed_s(cfg, H100, layout, 1, 100.0) for layout in (first, second, third, Layout("ddp"))]
    traffic = zero_traffic(cfg, Zero(1, 8), 1)
    assert waits[0] == pytest.approx(communication_s(cfg, H100, first)) == pytest.approx(traffic.after / (0.88 * 450e9))
    assert waits[1] == pytest.approx(zero_traffic(cfg, Zero(2, 8), 1).after / (0.88 * 450e9))
    assert waits[2] == waits[3] == 0
    # With as good as no time to compute all of it is waited for, in stage 2 once a micro-batch.
    assert exposed_s(cfg, H100, second, 4, 1e-9) == pytest.approx(communication_s(cfg, H100, second, 4))
    assert communication_s(cfg, H100, second, 4) > 3 * communication_s(cfg, H100, second, 1)
    part = update_s(cfg, H100, first, 1)
    assert 8 * part == pytest.approx(update_s(cfg, H100, Layout("ddp"), 1))
    far = update_s(cfg, H100, second._replace(offload=True), 1)
    trained = sum(p.size for p in parameters(cfg) if p.trained)
    assert far == pytest.approx(30 * trained / 200e9 + offload_bytes(cfg, Zero(2, 8, True), 1) / 25e9)
