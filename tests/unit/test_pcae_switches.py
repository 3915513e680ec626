"""PCAE's switches (placement, criterion, selection, target, average), its cost, and what needs training steps to see."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path

import plain
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain import as_teacher, entering_tokens, fixed_teacher, plain_scores, plain_teacher, random_tokens
from test_costs import counted
from torch import Tensor, nn

from pipeline.config import Config, ConfigError
from pipeline.costs import num_visible, teacher_schedule
from pipeline.drawn import draw_image
from pipeline.engine.torch import TorchEngine
from pipeline.estimate import flops_per_image
from pipeline.keys import sample_key
from pipeline.methods import build_method
from pipeline.methods.common import MaskDraw
from pipeline.methods.pcae import PCAE, compress
from pipeline.optim import momentum_at
from pipeline.segments import gather_tokens, keep_lowest, redundancy
from pipeline.stop import StopRequest
from pipeline.train import train
from pipeline.vit import normalise, patchify, sincos_2d

Tiny = Callable[..., Config]
KEYS = torch.arange(4)
BIG = {"data__image_size": 224, "method__decoder_depth": 8, "method__decoder_width": 512, "method__decoder_heads": 16}


def shaken(cfg: Config) -> PCAE:
    """Every weight off its first value."""
    method = build_method(cfg)
    plain.shake(method)
    return method


def sets(ids: Tensor) -> list[set[int]]:
    return [set(row) for row in ids.tolist()]


def choice(method: PCAE, images: Tensor, draw: MaskDraw) -> list[Tensor]:
    """The ids that the teacher keeps at each stage."""
    patches = patchify(normalise(images), method.patch_size)
    return method.targets(patches, draw.masked_ids, None, draw.priority)[1]


# 14: the random control


@pytest.fixture(scope="module")
def random_method(tiny_config: Tiny) -> PCAE:
    return shaken(tiny_config("pcae", method__selection="random"))


def test_property_14_counts_and_ids_of_the_random_choice(random_method: PCAE, images: Tensor) -> None:
    draw = random_method.draw(KEYS)
    stages = choice(random_method, images, draw)
    assert [ids.shape for ids in stages] == [(4, 24), (4, 12), (4, 6)]
    for outer, inner in pairwise([draw.masked_ids, *stages]):
        for before, after, row in zip(sets(outer), sets(inner), inner, strict=True):
            assert after < before and len(after) == len(row)
    found = random_method.predict(images, draw)
    assert torch.equal(found.token_ids, stages[-1]) and found.pred.shape == found.target.shape == (4, 6, 96)


def test_property_14_the_random_choice_sees_no_features(tiny_config: Tiny, images: Tensor) -> None:
    def kept(selection: str, pixels: Tensor, seed: int = 0, keys: Tensor = KEYS) -> list[set[int]]:
        method = build_method(tiny_config("pcae", method__selection=selection, train__seed=seed))
        return sets(torch.cat(choice(method, pixels, method.draw(keys)), dim=1))

    first = kept("random", images)
    assert kept("random", images.flip(0)) == first
    assert kept("random", images, seed=1) == first
    others = kept("random", images, keys=KEYS + 100)
    assert not any(a == b for a, b in zip(first, others, strict=True))
    control = kept("least_similar", images)
    assert kept("least_similar", images.flip(0)) != control
    assert kept("least_similar", images, seed=1) != control


def test_property_14_the_random_choice_is_a_function_of_the_key(random_method: PCAE, tiny_config: Tiny) -> None:
    whole = random_method.draw(torch.arange(50))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    part = random_method.draw(torch.arange(30, 50))
    assert torch.equal(state, torch.get_rng_state())
    assert (
        torch.equal(part.priority, whole.priority[30:]) and len({tuple(row) for row in whole.priority.tolist()}) == 50
    )
    plain_draw = build_method(tiny_config("pcae")).draw(torch.arange(50))
    assert plain_draw.priority is None and torch.equal(plain_draw.masked_ids, whole.masked_ids)


def test_property_14_every_place_is_kept_equally_often(tiny_config: Tiny) -> None:
    method = build_method(tiny_config("pcae", data__image_size=16, method__selection="random"))
    count = 4000
    draw = method.draw(torch.arange(count))
    stages = choice(method, torch.zeros(count, 3, 16, 16, dtype=torch.uint8), draw)
    assert [ids.shape[1] for ids in stages] == [6, 3, 1]
    for ids in stages:
        share = ids.shape[1] / 16
        places = ids.flatten().bincount(minlength=16)
        assert (places - count * share).abs().max() < 4.5 * math.sqrt(count * share * (1 - share))
        # Nor does it follow the mask's order: each rank among the masked is kept equally often.
        share = ids.shape[1] / 12
        ranks = (draw.masked_ids[:, :, None] == ids[:, None]).any(dim=2).sum(dim=0)
        assert (ranks - count * share).abs().max() < 4.5 * math.sqrt(count * share * (1 - share))


# The other selections and the criterion


def test_most_similar_is_the_complement_of_least_similar(tiny_config: Tiny, images: Tensor) -> None:
    options = {"method__stages": 1, "method__keep_ratio": 0.5}
    methods = {name: shaken(tiny_config("pcae", method__selection=name, **options))
               for name in ("least_similar", "most_similar", "random")}  # fmt: skip
    kept = {name: sets(choice(method, images, method.draw(KEYS))[0]) for name, method in methods.items()}
    masked = sets(methods["random"].draw(KEYS).masked_ids)
    for all_ids, least, most, other in zip(masked, *kept.values(), strict=True):
        assert least | most == all_ids and not least & most and len(least) == len(most) == 24
        assert least & other and most & other  # control: a random half is no complement of either


def plain_raw_scores(rows: Tensor, ids: Sequence[int] = ()) -> Tensor:
    """The cosine of each row with the mean of the rows as they are; float64."""
    rows = rows.detach().double()
    mean = sum(rows) / len(rows)
    return torch.tensor([float(row @ mean / row.norm() / mean.norm()) for row in rows], dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 12), st.integers(0, 10**6))
def test_raw_mean_is_the_cosine_with_the_mean(n: int, width: int, seed: int) -> None:
    tokens = random_tokens(2, n, width, seed=seed) * random_tokens(2, n, 1, seed=seed + 1).exp() + 1
    expected = torch.stack([plain_raw_scores(row) for row in tokens])
    scores = redundancy(tokens, raw_mean=True)
    torch.testing.assert_close(scores.double(), expected, atol=2e-6, rtol=0)
    kept = keep_lowest(scores, n // 2)
    for row, indices in zip(expected, kept, strict=True):
        lowest = sorted(row.tolist())[: n // 2]
        assert sorted(row[indices].tolist()) == pytest.approx(lowest, abs=4e-6)


def test_raw_mean_differs_where_norms_do(tiny_config: Tiny) -> None:
    unit, raw = (build_method(tiny_config("pcae", method__criterion=name), "meta").compression(None).score
                 for name in ("unit_mean", "raw_mean"))  # fmt: skip
    ids = torch.arange(147).expand(8, -1)
    tokens = random_tokens(8, 147, 768) + random_tokens(8, 1, 768, seed=1)
    unequal = tokens * (0.5 * random_tokens(8, 147, 1, seed=2)).exp()
    equal = tokens / tokens.norm(dim=-1, keepdim=True) * 3
    assert torch.equal(keep_lowest(unit(equal, ids), 73), keep_lowest(raw(equal, ids), 73))
    common = [len(a & b) for a, b in zip(sets(keep_lowest(unit(unequal, ids), 73)),
                                         sets(keep_lowest(raw(unequal, ids), 73)), strict=True)]  # fmt: skip
    assert all(60 <= number < 73 for number in common)


# Where tokens are dropped


@pytest.mark.parametrize(
    ("model", "case", "runs"),
    [  # (blocks, tokens that enter each), and the tokens that survive
        ("vit_b", 0, [(1, 147), (4, 73), (4, 36), (3, 18)]),  # drops after 0, 4, 8
        ("vit_b", 1, [(4, 147), (4, 73), (4, 36)]),  # 3, 7, 11
        ("vit_b", 2, [(1, 147), (5, 73), (6, 36)]),  # 0, 5, 11
        ("vit_b", 3, [(1, 147), (1, 73), (1, 36), (9, 18)]),  # 0, 1, 2
        ("vit_l", 0, [(1, 147), (8, 73), (8, 36), (7, 18)]),  # 0, 8, 16
        ("vit_l", 1, [(8, 147), (8, 73), (8, 36)]),  # 7, 15, 23
        ("vit_l", 2, [(1, 147), (11, 73), (12, 36)]),  # 0, 11, 23
        ("vit_l", 3, [(1, 147), (1, 73), (1, 36), (21, 18)]),  # 0, 1, 2
        ("vit_p", 0, [(1, 48), (1, 24), (1, 12), (1, 6)]),
        ("vit_p", 1, [(1, 48), (1, 24), (1, 12), (1, 6)]),
        ("vit_p", 2, [(1, 48), (1, 24), (2, 12)]),  # 0, 1, 3
        ("vit_p", 3, [(1, 48), (1, 24), (1, 12), (1, 6)]),
    ],
)
def test_property_06_tokens_of_each_drop_case(
    tiny_config: Tiny, model: str, case: int, runs: list[tuple[int, int]]
) -> None:
    kept = 6 if model == "vit_p" else 18
    expected = [tokens for blocks, tokens in runs for _ in range(blocks)]
    size = 32 if model == "vit_p" else 224
    method = build_method(tiny_config("pcae", model__name=model, data__image_size=size, method__drop_case=case), "meta")
    assert entering_tokens(method) == [*expected, kept, kept]
    assert teacher_schedule(runs[0][1], len(expected), 3, 0.5, case) == (expected, kept)


CASES: list[tuple[dict[str, object], tuple[int, ...]]] = [
    ({"method__drop_case": 0, "method__stages": 2}, (0, 2)),
    ({"method__drop_case": 1, "method__stages": 2}, (1, 3)),
    ({"method__drop_case": 2, "method__stages": 3}, (0, 1, 3)),
    ({"method__drop_case": 3, "method__stages": 2, "method__keep_ratio": 0.7}, (0, 1)),
    ({"method__criterion": "raw_mean", "method__drop_case": 1, "method__stages": 2}, (1, 3)),
    ({"method__criterion": "raw_mean", "method__selection": "most_similar"}, (0, 1, 2)),
    ({"method__selection": "most_similar", "method__drop_case": 2, "method__stages": 2}, (0, 3)),
    ({"method__selection": "random", "method__drop_case": 2, "method__keep_ratio": 0.7}, (0, 1, 3)),
]


@pytest.mark.parametrize(("options", "drops"), CASES, ids=str)
def test_property_15_switched_teachers_equal_a_reference_that_carries_all_tokens(
    tiny_config: Tiny, images: Tensor, options: dict[str, object], drops: tuple[int, ...]
) -> None:
    method = shaken(tiny_config("pcae", **options))
    draw = method.draw(KEYS[:2])
    patches = patchify(normalise(images[:2]), 4)
    found, stages = method.targets(patches, draw.masked_ids, as_teacher(method), draw.priority)
    base = plain_raw_scores if options.get("method__criterion") == "raw_mean" else plain_scores
    sign = -1 if options.get("method__selection") == "most_similar" else 1
    for i in range(2):

        def score(rows: Tensor, ids: list[int], i: int = i) -> Tensor:
            return sign * base(rows) if draw.priority is None else draw.priority[i, ids]

        keep = Fraction(str(options.get("method__keep_ratio", 0.5)))
        expected, kept = plain_teacher(method.encoder, images[i], draw.masked_ids[i].tolist(), keep, drops, score)
        assert [set(ids[i].tolist()) for ids in stages] == kept
        for row, token in zip(found[i], stages[-1][i].tolist(), strict=True):
            torch.testing.assert_close(row, plain.standardised(expected[token]).float(), atol=5e-5, rtol=1e-5)


# 27, 28: positions


def test_property_27_decoder_position_rows(tiny_config: Tiny, images: Tensor) -> None:
    method = build_method(tiny_config("pcae"))
    seen: list[Tensor] = []
    with torch.no_grad():  # the first block's input is then the positions alone, and a position tells its row
        for parameter in (method.decoder.embed.weight, method.decoder.embed.bias, method.decoder.mask_token):
            parameter.zero_()
        method.decoder.pos_embed.copy_(torch.arange(65.0)[None, :, None].expand(1, 65, 96))
        method.decoder.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        draw = method.draw(KEYS)
        found = method.predict(images, draw)
    rows = [[0] + [i + 1 for i in visible] + [i + 1 for i in kept]
            for visible, kept in zip(draw.visible_ids.tolist(), found.token_ids.tolist(), strict=True)]  # fmt: skip
    assert torch.equal(seen[0], torch.tensor(rows).float()[..., None].expand(-1, -1, 96))
    assert len({tuple(row) for row in rows}) == 4


def test_property_28_positions_never_move(tiny_config: Tiny, images: Tensor) -> None:
    cfg = tiny_config("pcae", optim__weight_decay=0.5, method__decoder_width=48)
    engine = TorchEngine(cfg, torch.device("cpu"))
    tables = {f"{part}.pos_embed": sincos_2d(8, width, class_token=True)
              for part, width in (("encoder", 96), ("decoder", 48))}  # fmt: skip
    before = engine.full_params()
    for step in range(3):
        engine.micro_step(images, engine.method.draw(KEYS + step), 1, True)
        assert {name for name, p in engine.named.items() if p.grad is None} == tables.keys()
        engine.step(1e-2, 1.0, 0.5)
    after = engine.full_params()
    assert all(torch.equal(after[name], table) for name, table in tables.items())
    assert {name for name in after if torch.equal(after[name], before[name])} == tables.keys()
    assert torch.equal(engine.teacher.pos_embed, tables["encoder.pos_embed"]) and "pos_embed" not in engine.ema


# 34: gradients through the walk


@pytest.mark.parametrize("selection", ["least_similar", "random"])
def test_property_34_gradients_reach_survivors_only(tiny_config: Tiny, images: Tensor, selection: str) -> None:
    method = shaken(tiny_config("pcae", method__selection=selection))
    draw = method.draw(KEYS)
    how = method.compression(draw.priority)
    scored: list[tuple[bool, Tensor]] = []

    def run(scale: float) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        def score(tokens: Tensor, ids: Tensor) -> Tensor:
            scored.append((tokens.requires_grad, how.score(tokens, ids)))
            return scale * scored[-1][1]

        states: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _, args, out: states.append(out)) for block in method.encoder.blocks
        ]
        patches = gather_tokens(patchify(normalise(images), 4), draw.masked_ids).requires_grad_()
        features, stages = compress(method.encoder, patches, draw.masked_ids, how._replace(score=score))
        for hook in hooks:
            hook.remove()
        inputs = [patches, *states, *(p for p in method.encoder.parameters() if p.requires_grad)]
        loss = (features * random_tokens(4, 6, 96)).sum()
        return features, stages, states, list(torch.autograd.grad(loss, inputs, allow_unused=True))

    features, stages, states, grads = run(1.0)
    assert grads[0].flatten(2).any(dim=-1).all()  # before the first drop all count
    entering = draw.masked_ids
    for index, (state, grad) in enumerate(zip(states, grads[1:5], strict=True)):
        survives = torch.ones(state.shape[:2], dtype=torch.bool)
        if index in method.drops:
            survives = (entering[:, :, None] == stages[index][:, None]).any(dim=-1)
            assert survives.float().mean() == 0.5
            entering = stages[index]
        assert torch.equal(grad.ne(0).any(dim=-1), survives)
    assert all(tracked and value.grad_fn is None and not value.requires_grad for tracked, value in scored)
    again = run(7.0)
    assert torch.equal(again[0], features) and all(map(torch.equal, again[1], stages))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(again[3], grads, strict=True))


# 43, 44: cost

DECODERS = [(8, 512, 16), (2, 768, 16), (2, 512, 16)]


def with_decoder(decoder: tuple[int, int, int], **options: object) -> dict[str, object]:
    names = ("method__decoder_depth", "method__decoder_width", "method__decoder_heads")
    return dict(zip(names, decoder, strict=True)) | options


def assert_flops_are_counted(cfg: Config) -> None:
    found = flops_per_image(cfg)
    assert (found.forward, found.step) == pytest.approx(counted(cfg), rel=0.01)


@pytest.mark.parametrize(
    "options",
    [
        with_decoder(DECODERS[0], method__drop_case=1, method__mask_ratio=0.85),
        with_decoder(DECODERS[1], method__drop_case=2, method__mask_ratio=0.9, method__selection="random"),
        with_decoder(DECODERS[2], method__drop_case=3, method__criterion="raw_mean"),
        with_decoder(DECODERS[1], method__stages=2, method__keep_ratio=0.7, method__selection="most_similar"),
    ],
    ids=str,
)
def test_property_43_flops_at_vit_b(tiny_config: Tiny, options: dict[str, object]) -> None:
    assert_flops_are_counted(tiny_config("pcae", **(BIG | {"model__name": "vit_b"} | options)))


@pytest.mark.parametrize("case", range(4))
def test_property_43_flops_of_every_switch(tiny_config: Tiny, case: int) -> None:
    for mask_ratio, decoder in product((0.75, 0.85, 0.9), DECODERS):
        options = with_decoder(decoder, method__mask_ratio=mask_ratio, method__drop_case=case)
        assert_flops_are_counted(tiny_config("pcae", **options))
    for selection, criterion, stages, keep in [
        ("random", "unit_mean", 1, 0.5),
        ("most_similar", "raw_mean", 2, 0.7),
        ("least_similar", "raw_mean", 4, 1.0),
    ]:
        assert_flops_are_counted(
            tiny_config("pcae", method__selection=selection, method__criterion=criterion, method__stages=stages,
                        method__keep_ratio=keep, method__drop_case=case))  # fmt: skip


def speed_ups(tiny_config: Tiny, **options: object) -> list[float]:
    """How many times cheaper a step at ViT-B gets when the mask ratio goes from 0.75 to 0.85 and 0.9."""
    first, *others = (
        flops_per_image(tiny_config("pcae", **(BIG | {"model__name": "vit_b", "method__mask_ratio": ratio} | options)))
        for ratio in (0.75, 0.85, 0.9)
    )
    return [first.step / other.step for other in others]


def test_property_44_a_higher_mask_ratio_is_cheaper_as_published(tiny_config: Tiny) -> None:
    found = speed_ups(tiny_config)
    assert found == pytest.approx([1.344, 1.591], rel=0.03)  # the paper's throughputs
    assert found == pytest.approx([1.347, 1.615], rel=0.015)  # the public code's FLOPs
    for options, published in [
        (with_decoder(DECODERS[1]), [1.345, 1.613]),
        ({"method__keep_ratio": 1.0}, [1.09, 1.14]),
        ({"method__drop_case": 1}, [1.27, 1.46]),
        ({"method__drop_case": 3}, [1.40, 1.74]),
    ]:
        assert speed_ups(tiny_config, **options) == pytest.approx(published, rel=0.015)


# 45: learning and collapse


def monitored(method: PCAE, images: Tensor, features: Tensor) -> dict[str, float]:
    """The logs when the teacher's features are these."""
    draw = method.draw(torch.arange(len(features)))
    teacher = fixed_teacher(features, draw.masked_ids[:, : features.shape[1]])
    with torch.no_grad():
        logs = method(images[: len(features)], draw, teacher)[1]
    return {name: float(value) for name, value in logs.items()}


def plain_monitor(targets: Tensor) -> tuple[float, float]:
    """Deviation of the unit targets by channel, x sqrt(D), and mean cosine over pairs of tokens of different images."""
    unit = [[row / row.norm() for row in image] for image in targets.double()]
    flat = [row.tolist() for image in unit for row in image]
    deviations = []
    for channel in zip(*flat, strict=True):
        mean = sum(channel) / len(channel)
        deviations.append(math.sqrt(sum((value - mean) ** 2 for value in channel) / len(channel)))
    cosines = [float(a @ b) for i, one in enumerate(unit) for j, other in enumerate(unit) if i != j
               for a in one for b in other]  # fmt: skip
    return sum(deviations) / len(deviations) * math.sqrt(len(deviations)), sum(cosines) / len(cosines)


@pytest.mark.parametrize("normalised", [True, False])
def test_property_45_the_monitor_against_a_double_loop(tiny_config: Tiny, images: Tensor, normalised: bool) -> None:
    method = build_method(tiny_config("pcae", method__normalise_target=normalised))
    for offset in (0.0, 1.0):
        features = random_tokens(4, 6, 96) + offset * random_tokens(1, 1, 96, seed=1) + 0.3
        targets = torch.stack([plain.standardised(row) for row in features.flatten(0, 1)]) if normalised else features
        logs = monitored(method, images, features)
        assert (logs["target_std"], logs["target_cosine"]) == pytest.approx(
            plain_monitor(targets.view(4, 6, 96)), abs=1e-5
        )


def test_property_45_the_monitor_at_its_ends(tiny_config: Tiny, images: Tensor) -> None:
    method = build_method(tiny_config("pcae"))
    same = monitored(method, images, random_tokens(1, 1, 96).expand(4, 6, 96))
    assert (same["target_std"], same["target_cosine"]) == pytest.approx((0, 1), abs=1e-5)
    spread = monitored(method, images, random_tokens(4, 48, 96))
    assert (spread["target_std"], spread["target_cosine"]) == pytest.approx((1, 0), abs=0.02)
    # Alike within an image and not between images: no cosine between images sees it.
    inside = monitored(method, images, random_tokens(4, 1, 96).expand(4, 6, 96))
    assert abs(inside["target_cosine"]) < 0.2
    one = monitored(method, images, random_tokens(1, 6, 96))
    assert one.keys() == {"loss", "target_std"} and math.isfinite(one["target_std"])


def test_property_45_a_short_run_learns_and_does_not_collapse(tiny_config: Tiny) -> None:
    pixels = [torch.from_numpy(draw_image(0, 0, i)[:32, :32]).permute(2, 0, 1) for i in range(8)]
    images, engine = torch.stack(pixels), TorchEngine(tiny_config("pcae"), torch.device("cpu"))
    logs: list[dict[str, float]] = []
    for step in range(100):
        draw = engine.method.draw(torch.from_numpy(sample_key(0, step, range(8))))
        logs.append({name: float(value) for name, value in engine.micro_step(images, draw, 1, True).items()})
        engine.step(1e-3, None, momentum_at(step, 100, 0.99, 1.0))
    losses = [line["loss"] for line in logs]
    assert 0.8 < losses[0] < 1.3 and max(losses[-10:]) < 0.2 * losses[0]
    assert all(line["target_std"] > 0.5 and line["target_cosine"] < 0.6 for line in logs)


# The target


def test_only_the_centring_of_targets_matters_to_the_loss(tiny_config: Tiny, images: Tensor) -> None:
    centred, raw = (shaken(tiny_config("pcae", method__normalise_target=on)) for on in (True, False))
    draw, teacher = raw.draw(KEYS), as_teacher(raw)
    with torch.no_grad():
        masked = gather_tokens(patchify(normalise(images), 4), draw.masked_ids)
        features, stages = compress(raw.encoder, masked, draw.masked_ids, raw.compression(None))
        found = raw.predict(images, draw, teacher)
        assert torch.equal(found.target, features) and found.target.dtype == torch.float32
        assert features.mean(dim=-1).abs().max() > 0.01
        low = raw.predict(images, draw, fixed_teacher(features.bfloat16(), stages[-1]))
        assert low.target.dtype == torch.float32

        def loss(method: PCAE, features: Tensor) -> float:
            return float(method(images, draw, fixed_teacher(features, stages[-1]))[0])

        shifted = features + 0.5
        middle = shifted.mean(dim=-1, keepdim=True)
        by_hand = loss(raw, shifted - middle)
        assert loss(centred, shifted) == pytest.approx(by_hand, abs=1e-6)  # so the deviation plays no part
        assert abs(loss(raw, shifted) - by_hand) > 1e-3


# The average's momentum


@given(st.floats(0.5, 1), st.floats(0.5, 1), st.sampled_from([1, 7, 256, 4096]))
@settings(max_examples=30, deadline=None)
def test_ema_batch_at_its_own_batch_changes_nothing(tiny_config: Tiny, ema: float, end: float, batch: int) -> None:
    cfg = tiny_config("pcae", optim__ema=ema, optim__ema_end=end, optim__ema_batch=batch, train__global_batch=batch)
    assert cfg.momentum == (ema, end)


def test_ema_batch_keeps_the_horizon_in_images(tiny_config: Tiny) -> None:
    def momentum(batch: int, ema_batch: int | str = 4096) -> tuple[float, float]:
        return tiny_config("pcae", optim__ema=0.9999, optim__ema_end=0.99999, train__global_batch=batch,
                           optim__ema_batch=ema_batch).momentum  # fmt: skip

    first, last = momentum(2048)
    assert (1 - first, 1 - last) == pytest.approx((0.5e-4, 0.5e-5), rel=1e-6)
    for batch in (256, 1024, 4096, 8192):
        horizons = [batch / (1 - value) for value in momentum(batch)]
        assert horizons == pytest.approx([4096 / 1e-4, 4096 / 1e-5], rel=1e-6)
        assert momentum(batch, "null") == (0.9999, 0.99999)


def test_ema_batch_is_refused_where_it_means_nothing(tiny_config: Tiny) -> None:
    edge = {"optim__ema": 0.75, "train__global_batch": 8}
    assert tiny_config("pcae", **edge, optim__ema_batch=2).momentum == (0.0, 1.0)
    for bad in (edge | {"optim__ema_batch": 1}, {"optim__ema_end": 0.5, "optim__ema_batch": 2}):
        with pytest.raises(ConfigError, match=r"optim\.ema_batch = .* at a batch of 8"):
            tiny_config("pcae", **bad)
    with pytest.raises(ConfigError, match="optim.ema_batch"):
        tiny_config("pcae", optim__ema_batch=0)
    for method in ("mae", "randsac"):
        with pytest.raises(ConfigError, match=r"optim\.ema_batch = 8: only method.name=pcae"):
            tiny_config(method, optim__ema_batch=8)
        with pytest.raises(ConfigError, match=r"optim\.ema_end = 0.5: only method.name=pcae"):
            tiny_config(method, optim__ema_end=0.5)
    with pytest.raises(ConfigError, match=r"makes optim\.ema_end -1 at a batch of 8"):
        tiny_config("pcae", optim__ema_end=0.5, optim__ema=0.9999, optim__ema_batch=2)


def test_ema_end_is_where_a_run_s_momentum_goes(
    tiny_config: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    step = TorchEngine.step
    monkeypatch.setattr(TorchEngine, "step", lambda self, lr, clip, momentum: (
        seen.append(momentum), step(self, lr, clip, momentum))[1])  # fmt: skip
    cfg = tiny_config("pcae", run__dir=str(tmp_path / "run"), tracking__uri="none", data__image_size=16,
                      data__num_samples=8, train__global_batch=4, train__steps=4, optim__ema=0.8, optim__ema_end=0.9,
                      optim__ema_batch=8)  # fmt: skip
    assert train(cfg, StopRequest()) == 0
    half = math.sqrt(0.5) / 2  # of the cosine at an eighth of a turn
    expected = [0.95 - 0.05 * share for share in (1, 0.5 + half, 0.5, 0.5 - half)]
    assert seen == pytest.approx(expected, abs=1e-12)
    assert momentum_at(4, 4, *cfg.momentum) == pytest.approx(0.95)


# Any configuration


decoders = st.sampled_from([(1, 96, 3), (2, 48, 3), (1, 64, 4)])


@settings(max_examples=25, deadline=None)
@given(
    mask=st.integers(20, 95), keep=st.integers(20, 100), stages=st.integers(1, 4), case=st.integers(0, 3),
    selection=st.sampled_from(["least_similar", "most_similar", "random"]), decoder=decoders,
    criterion=st.sampled_from(["unit_mean", "raw_mean"]), normalised=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_any_configuration_trains(
    tiny_config: Tiny, mask: int, keep: int, stages: int, case: int, selection: str, decoder: tuple[int, int, int],
    criterion: str, normalised: bool, seed: int,
) -> None:  # fmt: skip
    visible = num_visible(64, mask / 100)
    entering, kept = teacher_schedule(64 - visible, 4, stages, keep / 100, case)
    assume(kept)
    method = build_method(tiny_config("pcae", **with_decoder(
        decoder, method__mask_ratio=mask / 100, method__keep_ratio=keep / 100, method__stages=stages,
        method__drop_case=case, method__selection=selection, method__criterion=criterion,
        method__normalise_target=normalised, train__seed=seed)))  # fmt: skip
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    draw, seen = method.draw(torch.tensor([seed, seed + 1])), list[int]()
    teacher: nn.Module = as_teacher(method)
    for block in teacher.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    found = method.predict(images, draw, teacher)
    assert seen == entering and found.token_ids.shape == (2, kept)
    for ids, masked, shown in zip(found.token_ids, sets(draw.masked_ids), sets(draw.visible_ids), strict=True):
        assert len(set(ids.tolist())) == kept and set(ids.tolist()) <= masked and not masked & shown
        assert len(shown) == visible and len(masked) == 64 - visible
    loss, logs = method(images, draw, teacher)
    loss.backward()
    assert 0 <= float(loss.detach()) <= 2 and all(math.isfinite(value) for value in map(float, logs.values()))
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
