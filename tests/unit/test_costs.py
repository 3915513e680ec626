"""The cost model against torch's FLOP counter, against published tables, and its exact token counts."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Config
from pipeline.costs import MODELS, keep_count, num_visible, teacher_schedule
from pipeline.estimate import flops_per_image
from pipeline.methods import build_method

SOME = settings(max_examples=200, deadline=None)
GIGA = 1e9


@pytest.fixture
def big(tiny_config: Callable[..., Config]) -> Callable[..., Config]:
    """A configuration at the papers' scale: decoder 8 x 512, 192 px for RandSAC, 224 px for the others."""

    def build(method: str, model: str, **overrides: object) -> Config:
        options: dict[str, object] = {
            "model__name": model,
            "data__image_size": 192 if method == "randsac" else 224,
            "method__decoder_depth": 8,
            "method__decoder_width": 512,
            "method__decoder_heads": 16,
        }
        if method == "randsac":
            options["method__segment_size"] = 3
        return tiny_config(method, **(options | overrides))

    return build


def counted(cfg: Config) -> tuple[float, float]:
    """FLOPs of an image as torch counts them on the meta device: forward, forward and backward."""
    method, size = build_method(cfg, "meta"), cfg.data.image_size
    number = 2 if cfg.method.name == "finetune" else 1  # which mixes pairs
    images = torch.empty(number, 3, size, size, dtype=torch.uint8, device="meta")
    draw = method.draw(torch.arange(number), labels=torch.zeros(number, dtype=torch.int64)).to("meta")
    with FlopCounterMode(display=False) as counter:
        loss, _ = method(images, draw)
        forward = counter.get_total_flops()
        loss.backward()
        return forward / number, counter.get_total_flops() / number


@pytest.mark.parametrize("model", ["vit_s", "vit_b", "vit_l"])
@pytest.mark.parametrize("method", ["randsac", "pcae", "mae"])
def test_flops_are_what_torch_counts(big: Callable[..., Config], method: str, model: str) -> None:
    cfg = big(method, model)
    forward, step = counted(cfg)
    estimate = flops_per_image(cfg)
    assert estimate.forward == pytest.approx(forward, rel=0.01)
    assert estimate.step == pytest.approx(step, rel=0.01)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("randsac", {"data__image_size": 48, "method__segment_size": 3, "method__decoder_depth": 3}),
        ("randsac", {"model__patch_size": 2, "method__segment_size": 4, "method__decoder_width": 192}),
        ("pcae", {"method__mask_ratio": 0.9, "method__keep_ratio": 0.7, "method__stages": 2}),
        ("pcae", {"data__image_size": 64, "method__decoder_depth": 2, "method__decoder_width": 192}),
        ("mae", {"method__mask_ratio": 0.6, "method__decoder_depth": 3, "method__decoder_width": 192}),
    ],
    ids=str,
)
def test_flops_follow_every_setting(
    tiny_config: Callable[..., Config], method: str, options: dict[str, object]
) -> None:
    cfg = tiny_config(method, **options)
    forward, step = counted(cfg)
    assert flops_per_image(cfg).forward == pytest.approx(forward, rel=0.01)
    assert flops_per_image(cfg).step == pytest.approx(step, rel=0.01)


@pytest.mark.parametrize(
    ("model", "options", "gflop"),
    [
        ("vit_b", {}, 34.1),
        ("vit_b", {"method__decoder_width": 768}, 45.2),
        ("vit_b", {"data__image_size": 224, "method__segment_size": 2, "method__partition_size": 1}, 49.3),
        ("vit_b", {"data__image_size": 224, "method__segment_size": 7, "method__partition_size": 1}, 37.3),
        ("vit_l", {}, 94.5),
        ("vit_l", {"data__image_size": 224, "method__segment_size": 2, "method__partition_size": 1}, 135.8),
    ],
    ids=str,
)
def test_property_22_randsac_costs_what_the_table_says(
    big: Callable[..., Config], model: str, options: dict[str, object], gflop: float
) -> None:
    assert flops_per_image(big("randsac", model, **options)).forward / GIGA == pytest.approx(gflop, rel=0.02)


@pytest.mark.parametrize(("model", "width", "heads", "gflop"), [("vit_t", 192, 3, 0.98), ("vit_s", 384, 6, 3.8),
                                                                 ("vit_b", 512, 16, 12.5)])  # fmt: skip
def test_property_22_randsac_costs_at_32_pixels(
    big: Callable[..., Config], model: str, width: int, heads: int, gflop: float
) -> None:
    cfg = big("randsac", model, data__image_size=32, model__patch_size=4, method__segment_size=2,
              method__decoder_depth=4, method__decoder_width=width, method__decoder_heads=heads)  # fmt: skip
    assert flops_per_image(cfg).forward / GIGA == pytest.approx(gflop, rel=0.02)


@pytest.mark.parametrize(
    ("model", "size", "gflop"), [("vit_b", 224, 19.6), ("vit_b", 192, 14.3), ("vit_l", 224, 41.5), ("vit_l", 192, 30.5)]
)
def test_mae_table(big: Callable[..., Config], model: str, size: int, gflop: float) -> None:
    assert flops_per_image(big("mae", model, data__image_size=size)).forward / GIGA == pytest.approx(gflop, rel=0.02)


@pytest.mark.parametrize(
    ("model", "forward", "steps"),
    [
        ("vit_s", 4.14, {(8, 512): 9.97, (2, 768): 7.69, (2, 512): 6.03}),
        ("vit_b", 10.90, {(8, 512): 23.31, (2, 768): 21.06, (2, 512): 19.38}),
        ("vit_l", 31.91, {(8, 512): 66.28, (2, 768): 64.06, (2, 512): 62.35}),
    ],
)
def test_pcae_table(
    big: Callable[..., Config], model: str, forward: float, steps: dict[tuple[int, int], float]
) -> None:
    """Giga multiply-adds of the public code, which embeds all patches twice and predicts at visible tokens too."""
    width, visible, kept, patches = MODELS[model].width, 49, 18, 196
    for (depth, decoder_width), step in steps.items():
        cfg = big("pcae", model, method__decoder_depth=depth, method__decoder_width=decoder_width)
        found = flops_per_image(cfg)
        student_embedding, teacher_embedding = (
            skipped * 768 * width / GIGA for skipped in (patches - visible, visible)
        )
        head = (visible + 1) * decoder_width * width / GIGA
        no_pixel_gradient = visible * 768 * width / GIGA
        lean = step - 3 * (student_embedding + head) - teacher_embedding - no_pixel_gradient
        assert found.step / 2 / GIGA == pytest.approx(lean, rel=0.01)
        assert found.step / 2 / GIGA == pytest.approx(step, rel=0.035)
        if (depth, decoder_width) == (8, 512):
            lean = forward - student_embedding - teacher_embedding - head
            assert found.forward / 2 / GIGA == pytest.approx(lean, rel=0.01)
    assert teacher_schedule(patches - visible, MODELS[model].depth, 3, 0.5)[1] == kept


def test_pcae_teacher_has_no_backward(big: Callable[..., Config]) -> None:
    cfg = big("pcae", "vit_b")
    keep_less = big("pcae", "vit_b", method__keep_ratio=0.7)
    more = [flops_per_image(c) for c in (cfg, keep_less)]
    decoder_tokens = 49 + 1 + 49, 49 + 1 + 18
    d, depth = 512, 8
    trained = [2 * (depth * (12 * n * d**2 + 2 * n**2 * d) + (n - 50) * d * 768) for n in decoder_tokens]
    teacher = more[1].forward - more[0].forward - (trained[0] - trained[1])
    assert more[1].step - more[0].step == pytest.approx(teacher + 3 * (trained[0] - trained[1]), rel=1e-6)


@SOME
@given(st.integers(0, 2000), st.integers(1, 1000))
def test_counts_are_exact_for_ratios_with_decimals(total: int, thousandths: int) -> None:
    ratio = float(f"0.{thousandths:03d}") if thousandths < 1000 else 1.0
    exact = Fraction(thousandths, 1000)
    assert keep_count(total, ratio) == math.floor(total * exact)
    assert num_visible(total, ratio) == math.floor(total * (1 - exact))


def test_counts_where_floating_point_is_off_by_one() -> None:
    assert math.floor(100 * 0.29) == 28 and keep_count(100, 0.29) == 29
    assert math.floor(100 * (1 - 0.9)) == 9 and num_visible(100, 0.9) == 10
    assert keep_count(10_000, 1e-4) == 1


@SOME
@given(st.integers(1, 300), st.integers(1, 12), st.integers(1, 100))
def test_the_schedule_floors_at_each_stage(masked: int, stages: int, percent: int) -> None:
    entering, kept = teacher_schedule(masked, 12, stages, float(f"{percent / 100:.2f}"))
    left = [masked]
    for _ in range(stages):
        left.append(left[-1] * percent // 100)
    assert kept == left[-1] and len(entering) == 12
    per = 12 // stages
    assert entering == [left[sum(per * i < block for i in range(stages))] for block in range(12)]
