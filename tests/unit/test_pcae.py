"""PCAE: masks, the choice of tokens, teacher and student, loss and gradients; with controls that must fail."""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

import plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import as_teacher, entering_tokens, fixed_teacher, plain_scores, plain_teacher, random_tokens
from torch import Tensor, nn

from pipeline import segments
from pipeline.config import Config, ConfigError
from pipeline.costs import drop_blocks, num_visible, teacher_schedule
from pipeline.methods import build_method
from pipeline.methods.common import Prediction, cosine_loss, token_mean
from pipeline.methods.pcae import PCAE, compress
from pipeline.optim import build_optimizer
from pipeline.segments import gather_tokens, keep_least_redundant, redundancy
from pipeline.vit import embed, encode_visible, normalise, patchify

SOME = settings(max_examples=50, deadline=None)
N, V, M = 64, 16, 48


@pytest.fixture(scope="module")
def method(tiny_config: Callable[..., Config]) -> PCAE:
    """8 x 8 tokens, 16 visible; the teacher keeps 24, 12 and 6 of 48. Every weight off its first value."""
    method = build_method(tiny_config("pcae"))
    plain.shake(method)
    return method


@pytest.fixture(scope="module")
def fresh(tiny_config: Callable[..., Config]) -> PCAE:
    """As initialised."""
    return build_method(tiny_config("pcae"))


def pixels_of(ids: Tensor) -> Tensor:
    """The pixels of tokens [B, n] as a bool [B, 1, H, W]."""
    tokens = torch.zeros(len(ids), N, dtype=torch.bool).scatter(1, ids, True)
    return tokens.view(-1, 1, 8, 8).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


# 1 to 5: masks


def test_property_01_visible_and_masked_are_a_permutation(method: PCAE) -> None:
    draw = method.draw(torch.arange(50))
    assert draw.visible_ids.shape == (50, V) and draw.masked_ids.shape == (50, M)
    both = torch.cat([draw.visible_ids, draw.masked_ids], dim=1)
    assert torch.equal(both.sort(dim=1).values, torch.arange(N).expand(50, -1))


def test_property_02_masks_are_a_function_of_the_key(method: PCAE) -> None:
    draw = method.draw(torch.arange(50))
    assert len({tuple(sorted(row)) for row in draw.visible_ids.tolist()}) == 50
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert torch.equal(method.draw(torch.arange(30, 50)).visible_ids, draw.visible_ids[30:])
    assert torch.equal(state, torch.get_rng_state())


def test_property_03_kept_ids_are_masked_ids_without_repeats(method: PCAE, images: Tensor) -> None:
    draw = method.draw(torch.arange(4))
    prediction = method.predict(images, draw)
    assert prediction.token_ids.shape == (4, 6)
    for kept, masked, visible in zip(prediction.token_ids, draw.masked_ids, draw.visible_ids, strict=True):
        kept_set = set(kept.tolist())
        assert len(kept_set) == 6
        assert kept_set <= set(masked.tolist()) and not kept_set & set(visible.tolist())
    assert prediction.weight.eq(1).all()


def test_property_04_every_place_is_visible_equally_often() -> None:
    visible, _ = segments.split_tokens(torch.arange(4000), 196, 49)
    counts = visible.flatten().bincount(minlength=196).double()
    assert (counts - 1000).abs().max() < 5.5 * math.sqrt(4000 * 0.25 * 0.75)
    pairs = torch.zeros(4000, 196).scatter(1, visible, 1.0)
    together = (pairs[:, :-1] * pairs[:, 1:]).mean()  # neighbours are no more often visible together than any two
    assert float(together) == pytest.approx(49 * 48 / (196 * 195), abs=2e-3)


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 49), (0.85, 29), (0.9, 19), (0.8, 39), (0.7, 58), (0.6, 78)])
def test_property_05_visible_count_is_exact(ratio: float, visible: int) -> None:
    assert num_visible(196, ratio) == visible


@pytest.mark.parametrize(("ratio", "entering", "kept"), [(0.85, 167, 20), (0.9, 177, 22)])
def test_property_05_other_mask_ratios(
    tiny_config: Callable[..., Config], ratio: float, entering: int, kept: int
) -> None:
    cfg = tiny_config("pcae", model__name="vit_b", data__image_size=224, method__mask_ratio=ratio)
    method = build_method(cfg, "meta")
    assert method.num_visible == 196 - entering
    assert teacher_schedule(entering, 12, 3, 0.5)[1] == kept


# 6 to 12, 19: how many and which tokens are kept


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [147] + [73] * 4 + [36] * 4 + [18] * 3 + [18, 18]),
        ({"method__keep_ratio": 0.7}, [147] + [102] * 4 + [71] * 4 + [49] * 3 + [49, 49]),  # one-shot would give 50
        ({"method__keep_ratio": 0.6}, [147] + [88] * 4 + [52] * 4 + [31] * 3 + [31, 31]),
        ({"method__keep_ratio": 0.4}, [147] + [58] * 4 + [23] * 4 + [9] * 3 + [9, 9]),
        ({"method__keep_ratio": 0.3}, [147] + [44] * 4 + [13] * 4 + [3] * 3 + [3, 3]),
        ({"method__stages": 2}, [147] + [73] * 6 + [36] * 5 + [36, 36]),
        ({"method__stages": 1}, [147] + [73] * 11 + [73, 73]),
        ({"method__keep_ratio": 0.6, "method__mask_ratio": 0.9}, [177] + [106] * 4 + [63] * 4 + [37] * 3 + [37, 37]),
        ({"model__name": "vit_l"}, [147] + [73] * 8 + [36] * 8 + [18] * 7 + [18, 18]),
    ],
    ids=str,
)
def test_property_06_tokens_that_enter_each_block(
    tiny_config: Callable[..., Config], options: dict[str, object], expected: list[int]
) -> None:
    shape = {"model__name": "vit_b", "data__image_size": 224}
    method = build_method(tiny_config("pcae", **(shape | options)), "meta")
    assert entering_tokens(method) == expected
    entering, kept = teacher_schedule(
        expected[0], len(method.encoder.blocks), len(method.drops), method.cfg.method.keep_ratio
    )
    assert [*entering, kept, kept] == expected


def test_property_06_drops_follow_the_default_placement() -> None:
    assert drop_blocks(12, 3) == (0, 4, 8)
    assert drop_blocks(24, 3) == (0, 8, 16)
    assert drop_blocks(4, 3) == (0, 1, 2)
    assert drop_blocks(12, 12) == tuple(range(12))


shapes = st.tuples(st.integers(1, 3), st.integers(1, 24), st.integers(1, 8), st.integers(0, 10**6))


@SOME
@given(shapes, st.data())
def test_property_07_the_kept_are_the_least_redundant(shape: tuple[int, int, int, int], data: st.DataObject) -> None:
    batch, n, width, seed = shape
    num_keep = data.draw(st.integers(1, n))
    tokens = random_tokens(batch, n, width, seed=seed)
    kept = keep_least_redundant(tokens, num_keep)
    assert kept.dtype == torch.int64 and kept.shape == (batch, num_keep)
    for row, ids in zip(tokens, kept.tolist(), strict=True):
        assert len(set(ids)) == num_keep and set(ids) <= set(range(n))
        scores = plain_scores(row)
        dropped = [i for i in range(n) if i not in ids]
        in_order = [float(scores[i]) for i in ids]
        assert all(a <= b + 1e-6 for a, b in zip(in_order, in_order[1:], strict=False))
        if dropped:
            assert max(in_order) <= min(float(scores[i]) for i in dropped) + 1e-6
            assert float(scores.max()) <= max(float(scores[i]) for i in dropped) + 1e-6  # the most similar one goes


def test_property_07_control_keeping_the_most_redundant_is_another_choice() -> None:
    tokens = random_tokens(1, 20, 8)
    most = (-redundancy(tokens)).argsort(dim=1)[0, :10]
    assert not set(most.tolist()) & set(keep_least_redundant(tokens, 10)[0].tolist())


@SOME
@given(shapes)
def test_property_08_score_is_the_row_mean_of_the_cosine_matrix(shape: tuple[int, int, int, int]) -> None:
    batch, n, width, seed = shape
    tokens = random_tokens(batch, n, width, seed=seed)
    expected = torch.stack([plain_scores(row) for row in tokens]).float()
    torch.testing.assert_close(redundancy(tokens), expected, atol=1e-6, rtol=0)


@SOME
@given(st.integers(0, 10**6))
def test_property_09_invariances(seed: int) -> None:
    tokens = random_tokens(2, 15, 6, seed=seed)
    scores = redundancy(tokens)
    scale = random_tokens(2, 15, 1, seed=seed + 1).exp()
    torch.testing.assert_close(redundancy(tokens * scale), scores, atol=1e-5, rtol=0)
    rotation = torch.linalg.qr(random_tokens(6, 6, seed=seed + 2)).Q
    torch.testing.assert_close(redundancy(tokens @ rotation), scores, atol=1e-5, rtol=0)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(redundancy(tokens[:, order]), scores[:, order], atol=1e-5, rtol=0)
    assert (redundancy(tokens + 5) - scores).abs().max() > 1e-2  # not to a common shift
    # With tokens of unequal norms the mean of unit tokens is not the raw mean.
    raw = nn.functional.cosine_similarity(tokens * scale, (tokens * scale).mean(dim=1, keepdim=True), dim=-1)
    assert (raw - scores).abs().max() > 1e-3


@pytest.mark.parametrize("odd", [0, 3, 9])
def test_property_10_the_odd_one_out_is_kept_first(odd: int) -> None:
    tokens = torch.tensor([1.0, 2.0, 0.0]).expand(1, 10, 3).clone()
    tokens[0, odd] = torch.tensor([-2.0, 1.0, 3.0])
    assert int(redundancy(tokens)[0].argmin()) == odd
    assert keep_least_redundant(tokens, 4)[0, 0] == odd


def test_property_11_ties_go_by_index_and_zeros_give_no_nan() -> None:
    same = torch.tensor([0.3, -0.7]).expand(2, 9, 2)
    assert redundancy(same).unique().numel() == 1
    assert torch.equal(keep_least_redundant(same, 4), torch.arange(4).expand(2, -1))
    zeros = torch.zeros(1, 6, 3)
    assert redundancy(zeros).eq(0).all()
    assert torch.equal(keep_least_redundant(zeros, 2), torch.tensor([[0, 1]]))
    one_zero = random_tokens(1, 6, 3).index_fill(1, torch.tensor([2]), 0.0)
    assert redundancy(one_zero).isfinite().all() and redundancy(one_zero)[0, 2] == 0
    pairs = random_tokens(1, 5, 8).repeat(1, 2, 1)
    scores = redundancy(pairs)
    assert torch.equal(scores[:, :5], scores[:, 5:])
    kept = keep_least_redundant(pairs, 10)[0].tolist()
    assert all(kept.index(i) + 1 == kept.index(i + 5) for i in range(5))


@SOME
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_property_12_images_are_judged_alone(seed: int, num_keep: int) -> None:
    tokens = random_tokens(4, 12, 5, seed=seed)
    together = keep_least_redundant(tokens, num_keep)
    for i in range(4):
        assert torch.equal(keep_least_redundant(tokens[i : i + 1], num_keep)[0], together[i])


def test_property_12_targets_do_not_depend_on_batch_mates(method: PCAE, images: Tensor) -> None:
    draw = method.draw(torch.arange(4))
    patches = patchify(normalise(images), 4)
    together, stages = method.targets(patches, draw.masked_ids, None)
    for i in range(4):
        alone, ids = method.targets(patches[i : i + 1], draw.masked_ids[i : i + 1], None)
        assert torch.equal(ids[-1][0], stages[-1][i])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_keep", [0, -1, 6])
def test_property_19_keeping_none_or_too_many_is_refused(num_keep: int) -> None:
    with pytest.raises(ValueError, match="cannot keep"):
        keep_least_redundant(random_tokens(1, 5, 3), num_keep)


@pytest.mark.parametrize("stages", [0, 13])
def test_property_19_more_stages_than_blocks_is_refused(stages: int) -> None:
    with pytest.raises(ValueError, match="do not fit 12 blocks"):
        drop_blocks(12, stages)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"method__stages": 5}, "method.stages"),
        ({"method__stages": 0}, "method.stages"),
        ({"method__mask_ratio": 0}, "method.mask_ratio"),
        ({"method__mask_ratio": 1}, "method.mask_ratio"),
        ({"method__mask_ratio": 0.99}, "method.mask_ratio"),  # 0.64 of a patch stays visible
        ({"method__keep_ratio": 0.1}, "method.keep_ratio"),
        ({"method__keep_ratio": 0}, "method.keep_ratio"),
        ({"method__keep_ratio": 1.1}, "method.keep_ratio"),
    ],
    ids=str,
)
def test_property_19_empty_sets_are_refused(
    tiny_config: Callable[..., Config], options: dict[str, object], key: str
) -> None:
    with pytest.raises(ConfigError, match=key):
        tiny_config("pcae", **options)


# 13, 15 to 18: the teacher's walk


@pytest.mark.parametrize("ratio", ["0.5", "0.7", "1.0"])
def test_property_15_teacher_equals_a_reference_that_carries_all_tokens(
    tiny_config: Callable[..., Config], images: Tensor, ratio: str
) -> None:
    method = build_method(tiny_config("pcae", method__keep_ratio=float(ratio)))
    plain.shake(method)
    draw = method.draw(torch.arange(2))
    masked = gather_tokens(patchify(normalise(images[:2]), 4), draw.masked_ids)
    with torch.no_grad():
        features, stages = compress(method.encoder, masked, draw.masked_ids, method.compression(None))
    for i in range(2):
        expected, kept = plain_teacher(
            method.encoder, images[i], draw.masked_ids[i].tolist(), Fraction(ratio), (0, 1, 2)
        )
        assert [set(ids[i].tolist()) for ids in stages] == kept
        for row, token in zip(features[i], stages[-1][i].tolist(), strict=True):
            torch.testing.assert_close(row, expected[token].float(), atol=2e-5, rtol=1e-5)


def test_property_13_keeping_all_is_the_plain_encoder(tiny_config: Callable[..., Config], images: Tensor) -> None:
    method = build_method(tiny_config("pcae", method__keep_ratio=1.0))
    draw = method.draw(torch.arange(4))
    prediction = method.predict(images, draw)
    assert torch.equal(prediction.token_ids.sort(dim=1).values, draw.masked_ids.sort(dim=1).values)
    x = plain.embedded(method.encoder, images[0], 4)[prediction.token_ids[0]]
    for block in method.encoder.blocks:
        x = plain.block(block, x)
    rows = torch.stack([plain.standardised(row) for row in plain.layer_norm(method.encoder.norm, x)])
    torch.testing.assert_close(prediction.target[0], rows.detach().float(), atol=1e-4, rtol=1e-4)


def test_property_16_dropped_tokens_have_no_influence_afterwards(method: PCAE, images: Tensor) -> None:
    draw = method.draw(torch.arange(1))
    masked = gather_tokens(patchify(normalise(images[:1]), 4), draw.masked_ids)

    def run(ids: Tensor = draw.masked_ids, patches: Tensor = masked) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            return compress(method.encoder, patches, ids, method.compression(None))

    features, stages = run()
    gone = ~(draw.masked_ids[0, :, None] == stages[0][0]).any(dim=1)
    assert int(gone.sum()) == M - 24

    def double(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return torch.where(gone[:, None], output * 2, output)  # the score does not see a token's norm

    hook = method.encoder.blocks[0].register_forward_hook(double)
    after, after_stages = run()
    hook.remove()
    assert torch.equal(after, features) and all(map(torch.equal, stages, after_stages))
    louder = torch.where(gone[:, None, None, None], masked * 2, masked)
    assert not torch.equal(run(patches=louder)[0], features)  # before the drop it counts


def test_property_17_scores_are_fp32_whatever_the_tokens_are() -> None:
    tokens = random_tokens(4, 147, 64)
    low = tokens.bfloat16()
    assert redundancy(low).dtype == torch.float32
    assert torch.equal(keep_least_redundant(low, 73), keep_least_redundant(low.float(), 73))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(keep_least_redundant(tokens, 73), keep_least_redundant(tokens.clone(), 73))
        inside = redundancy(tokens)
    assert torch.equal(inside, redundancy(tokens))


def test_property_17_control_scoring_in_bf16_changes_the_choice(tiny_config: Callable[..., Config]) -> None:
    """Real features at the start of training, where all tokens are much alike."""
    method = build_method(tiny_config("pcae"))
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    draw = method.draw(torch.arange(16))
    masked = gather_tokens(patchify(normalise(pixels), 4), draw.masked_ids)
    with torch.no_grad():
        tokens = method.encoder.blocks[0](embed(method.encoder, masked, draw.masked_ids))
    first = keep_least_redundant(tokens, 24)
    unit = nn.functional.normalize(tokens.bfloat16(), dim=-1)
    scores = (unit @ unit.mean(dim=1)[..., None]).squeeze(-1)
    rounded = scores.sort(dim=1, stable=True).indices[:, :24]
    assert scores[0].unique().numel() < M  # rounding makes ties
    changed = sum(set(a) != set(b) for a, b in zip(rounded.tolist(), first.tolist(), strict=True))
    assert changed > 0


def test_property_18_the_order_of_masked_tokens_does_not_matter(method: PCAE, images: Tensor) -> None:
    draw = method.draw(torch.arange(4))
    order = torch.randperm(M, generator=torch.Generator().manual_seed(4))
    patches = patchify(normalise(images), 4)
    features, stages = method.targets(patches, draw.masked_ids, None)
    other_features, other_stages = method.targets(patches, draw.masked_ids[:, order], None)
    assert torch.equal(stages[-1].sort(dim=1).values, other_stages[-1].sort(dim=1).values)
    for rows, by in ((features, stages), (other_features, other_stages)):
        rows.copy_(gather_tokens(rows.clone(), by[-1].argsort(dim=1)))
    torch.testing.assert_close(features, other_features, atol=1e-4, rtol=1e-4)


# 20 to 28: who sees what


def test_property_20_masked_pixels_reach_the_prediction_only_through_ids(method: PCAE, images: Tensor) -> None:
    draw = method.draw(torch.arange(4))
    teacher = fixed_teacher(random_tokens(4, 6, 96), draw.masked_ids[:, :6])
    noise = 2550 * random_tokens(4, 3, 32, 32)
    changed = torch.where(pixels_of(draw.masked_ids), noise, images.float())
    with torch.no_grad():
        before = method.predict(images.float(), draw, teacher).pred
        assert torch.equal(before, method.predict(changed, draw, teacher).pred)
        visible = torch.where(pixels_of(draw.visible_ids), noise, images.float())
        assert not torch.equal(before, method.predict(visible, draw, teacher).pred)


def test_property_21_visible_pixels_do_not_reach_the_targets(method: PCAE, images: Tensor) -> None:
    draw = method.draw(torch.arange(4))
    changed = torch.where(pixels_of(draw.visible_ids), 2550 * random_tokens(4, 3, 32, 32), images.float())
    before, after = method.predict(images.float(), draw), method.predict(changed, draw)
    assert torch.equal(before.target, after.target) and torch.equal(before.token_ids, after.token_ids)
    assert not torch.equal(before.pred, after.pred)


def test_student_equals_the_plain_one(method: PCAE, images: Tensor) -> None:
    draw = method.draw(torch.arange(2))
    with torch.no_grad():
        prediction = method.predict(images[:2], draw)
        for i in range(2):
            visible = draw.visible_ids[i].tolist()
            encoded = plain.encode_visible(method.encoder, images[i], 4, visible)
            rows = plain.mask_decoder(method.decoder, encoded, visible, prediction.token_ids[i].tolist())
            torch.testing.assert_close(prediction.pred[i], rows.float(), atol=1e-5, rtol=1e-5)


def decode(method: PCAE, images: Tensor, visible_ids: Tensor, query_ids: Tensor) -> Tensor:
    patches = gather_tokens(patchify(normalise(images), 4), visible_ids)
    with torch.no_grad():
        return method.decoder(encode_visible(method.encoder, patches, visible_ids, None), visible_ids, query_ids)


def test_property_22_23_24_order_of_ids(method: PCAE, images: Tensor) -> None:
    draw = method.draw(torch.arange(4))
    queries = draw.masked_ids[:, :10]
    before = decode(method, images, draw.visible_ids, queries)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    after = decode(method, images, draw.visible_ids, queries[:, order])
    torch.testing.assert_close(after, before[:, order], atol=1e-5, rtol=1e-5)
    shuffled = draw.visible_ids[:, torch.randperm(V, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(decode(method, images, shuffled, queries), before, atol=1e-5, rtol=1e-5)
    half = decode(method, images, draw.visible_ids, queries[:, :5])
    assert (half - before[:, :5]).abs().max() > 1e-3  # queries attend to one another


@pytest.mark.parametrize(("model", "width"), [("vit_s", 384), ("vit_b", 768), ("vit_l", 1024)])
def test_property_25_predictions_are_as_wide_as_the_encoder(
    tiny_config: Callable[..., Config], model: str, width: int
) -> None:
    method = build_method(tiny_config("pcae", model__name=model, data__image_size=224), "meta")
    images = torch.empty(1, 3, 224, 224, dtype=torch.uint8, device="meta")
    prediction = method.predict(images, method.draw(torch.arange(1)).to("meta"))
    assert prediction.pred.shape == prediction.target.shape == (1, 18, width)


def test_property_26_class_token_in_the_student_only(method: PCAE, images: Tensor) -> None:
    seen: dict[str, int] = {}
    block = method.encoder.blocks[0]
    teacher = as_teacher(method)
    hooks = [module.register_forward_pre_hook(lambda _, args, who=who: seen.update({who: args[0].shape[1]}))
             for who, module in (("student", block), ("teacher", teacher.blocks[0]))]  # fmt: skip
    method.predict(images, method.draw(torch.arange(4)), teacher)
    for hook in hooks:
        hook.remove()
    assert seen == {"student": V + 1, "teacher": M}


# 29 to 33: loss and gradients


def prediction_of(pred: Tensor, target: Tensor) -> Prediction:
    batch, tokens, _ = pred.shape
    return Prediction(pred, target, torch.zeros(batch, tokens, dtype=torch.int64), torch.ones(batch, tokens))


def mean_loss(prediction: Prediction) -> float:
    return float(token_mean(cosine_loss(prediction), prediction.weight))


@SOME
@given(st.integers(0, 10**6))
def test_property_29_loss_is_one_minus_the_mean_cosine(seed: int) -> None:
    pred, target = random_tokens(3, 5, 7, seed=seed), random_tokens(3, 5, 7, seed=seed + 1)
    expected = sum(1 - float(p @ t / p.norm() / t.norm()) for p, t in zip(pred.view(15, 7), target.view(15, 7),
                                                                       strict=True)) / 15  # fmt: skip
    loss = mean_loss(prediction_of(pred, target))
    assert loss == pytest.approx(expected, abs=1e-5) and 0 <= loss <= 2
    scale = random_tokens(3, 5, 1, seed=seed).exp()
    assert mean_loss(prediction_of(target * scale, target)) == pytest.approx(0, abs=1e-6)
    assert mean_loss(prediction_of(-target * scale, target)) == pytest.approx(2, abs=1e-6)


def test_property_29_loss_is_about_one_at_first_and_the_mean_over_images(fresh: PCAE, images: Tensor) -> None:
    draw = fresh.draw(torch.arange(4))
    with torch.no_grad():
        loss, logs = fresh(images, draw)
        alone = [float(fresh(images[i : i + 1], fresh.draw(torch.arange(i, i + 1)))[0]) for i in range(4)]
    assert 0.8 < float(loss) < 1.2
    assert float(loss) == pytest.approx(sum(alone) / 4, rel=1e-5)
    assert not logs["loss"].requires_grad and float(logs["loss"]) == float(loss)


def test_property_29_predicting_the_target_costs_nothing(method: PCAE, images: Tensor) -> None:
    found = method.predict(images, method.draw(torch.arange(4)))
    perfect = dataclasses.replace(found, pred=3 * found.target)
    assert mean_loss(perfect) == pytest.approx(0, abs=1e-6)


def test_property_30_scale_and_shift(method: PCAE, images: Tensor) -> None:
    draw = method.draw(torch.arange(4))
    ids = draw.masked_ids[:, :6]
    features = random_tokens(4, 6, 96)

    def loss(features: Tensor) -> float:
        with torch.no_grad():
            return float(method(images, draw, fixed_teacher(features, ids))[0])

    assert loss(3 * features) == pytest.approx(loss(features), abs=1e-5)
    assert loss(features + 0.7) == pytest.approx(loss(features), abs=1e-5)
    with torch.no_grad():
        found = method.predict(images, draw, fixed_teacher(features, ids))
    base = mean_loss(found)
    assert mean_loss(dataclasses.replace(found, pred=5 * found.pred)) == pytest.approx(base, abs=1e-6)
    # Targets have no mean, so a shift of the prediction changes only its length, and thereby the cosine.
    assert abs(mean_loss(dataclasses.replace(found, pred=found.pred + 3)) - base) > 1e-3


def test_property_31_targets_are_standardised_features(method: PCAE, images: Tensor) -> None:
    found = method.predict(images, method.draw(torch.arange(4)))
    torch.testing.assert_close(found.target.mean(-1), torch.zeros(4, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.target.var(-1), torch.ones(4, 6), atol=1e-5, rtol=0)
    assert found.target.dtype == torch.float32


def test_property_32_the_teacher_has_no_gradient_and_no_place_in_the_method(method: PCAE, images: Tensor) -> None:
    teacher = as_teacher(method)
    draw = method.draw(torch.arange(4))
    method.zero_grad()
    loss, _ = method(images, draw, teacher)
    loss.backward()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert not method.predict(images, draw, teacher).target.requires_grad
    assert not any("teacher" in name for name, _ in method.named_modules())
    own = {id(parameter) for parameter in teacher.parameters()}
    optimizer = build_optimizer(method.named_parameters(), method.cfg.optim, 4)
    assert not own & {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {name for name, _ in teacher.named_parameters()} == {name for name, _ in method.encoder.named_parameters()}


def test_no_teacher_means_the_encoders_own_weights(method: PCAE, images: Tensor) -> None:
    draw = method.draw(torch.arange(4))
    teacher = as_teacher(method)
    own, given = method.predict(images, draw), method.predict(images, draw, teacher)
    assert torch.equal(own.target, given.target) and torch.equal(own.token_ids, given.token_ids)
    plain_weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        teacher.blocks[0].mlp.fc2.bias += random_tokens(96)
    assert not torch.equal(method.predict(images, draw, teacher).target, own.target)
    assert all(torch.equal(method.encoder.state_dict()[name], value) for name, value in plain_weights.items())


def test_the_teacher_has_no_stochastic_depth(tiny_config: Callable[..., Config], images: Tensor) -> None:
    method = build_method(tiny_config("pcae", model__drop_path=0.9))
    draw = method.draw(torch.arange(4))
    assert draw.drop_path is not None and not draw.drop_path.all()
    kept = dataclasses.replace(draw, drop_path=None)
    dropped, whole = method.predict(images, draw), method.predict(images, kept)
    assert torch.equal(dropped.target, whole.target)
    assert not torch.equal(dropped.pred, whole.pred)
    assert torch.equal(method.predict(images, draw, as_teacher(method)).target, whole.target)


def test_property_33_all_trained_parameters_get_a_gradient(fresh: PCAE, images: Tensor) -> None:
    fresh.zero_grad()
    draw = fresh.draw(torch.arange(4))
    pixels = images.float().requires_grad_()
    fresh(pixels, draw)[0].backward()
    frozen = {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
    assert frozen == {"encoder.pos_embed", "decoder.pos_embed"}
    for name, parameter in fresh.named_parameters():
        assert (parameter.grad is None) if name in frozen else (parameter.grad.abs().max() > 0), name
    masked = pixels_of(draw.masked_ids).expand_as(pixels)
    assert pixels.grad[masked].eq(0).all() and pixels.grad[~masked].ne(0).any()


def test_figure_is_a_picture_with_a_row_an_image(method: PCAE, images: Tensor) -> None:
    one, four = (method.figure(images[:n], method.draw(torch.arange(n))) for n in (1, 4))
    assert one.mode == "RGB" and four.height > 2 * one.height
