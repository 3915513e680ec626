"""RandSAC's switches: every segmentation, order, decoder and option, in random combinations and one by one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import plain
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from segment_paths import N, by_token, leak, loop_path, plain_predict, trained_without_gradient
from test_costs import counted
from torch import Tensor
from torch.nn import functional as F

from pipeline import segments
from pipeline.config import Config, ConfigError
from pipeline.costs import keep_count, padded_tokens, segment_quota
from pipeline.estimate import flops_per_image
from pipeline.methods import build_method
from pipeline.methods.common import Prediction, RankDraw
from pipeline.methods.randsac import RandSAC
from pipeline.vit import VisionTransformer, embed, encoder_kwargs, normalise, patchify, pixel_rows

Build = Callable[..., RandSAC]


@pytest.fixture(scope="module")
def build(tiny_config: Callable[..., Config]) -> Build:
    """A method with these settings of ``method``, every weight off its first value."""

    def build(**options: Any) -> RandSAC:
        made = build_method(tiny_config("randsac", **{f"method__{name}": value for name, value in options.items()}))
        plain.shake(made)
        return made

    return build


@st.composite
def random_settings(draw: st.DrawFn) -> dict[str, Any]:
    square = draw(st.booleans())
    found: dict[str, Any] = {
        "segments": "square" if square else "blob",
        "order": draw(st.sampled_from(["random", "hierarchical", *(["raster"] if square else [])])),
        "shuffled": draw(st.booleans()),
        "prefix": draw(st.booleans()),
        "predict_first": draw(st.booleans()),
        "token_keep": draw(st.sampled_from([1.0, 0.6, 0.3])),
        "skip": draw(st.sampled_from(["last", "uniform", "normal", "none"])),
        "query_token": draw(st.booleans()),
        "normalise_target": draw(st.booleans()),
        "decoder_self_attention": draw(st.booleans()),
        "decoder_depth": draw(st.integers(1, 2)),
    }
    if square:
        found["segment_size"] = draw(st.sampled_from([1, 2, 4]))
    else:
        number = draw(st.integers(2, 9))
        found |= {"num_segments": number, "num_partitions": draw(st.integers(1, number)),
                  "share_segments": draw(st.booleans())}  # fmt: skip
    return found


SOME = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


DEFAULTS = {"order": "random", "shuffled": False, "prefix": False, "predict_first": False, "token_keep": 1.0, "skip": "last",
            "query_token": True, "normalise_target": True, "decoder_self_attention": True, "decoder_depth": 1}  # fmt: skip


@SOME
@given(random_settings(), st.integers(0, 10**6))
@example({**DEFAULTS, "segments": "square", "segment_size": 4, "token_keep": 0.3, "decoder_depth": 2}, 0)
@example({**DEFAULTS, "segments": "square", "segment_size": 4, "token_keep": 0.6, "predict_first": True}, 1)
@example({**DEFAULTS, "segments": "blob", "num_segments": 5, "token_keep": 0.3, "predict_first": True}, 2)
@example(
    {**DEFAULTS, "segments": "blob", "num_segments": 7, "prefix": True, "skip": "none", "order": "hierarchical"}, 3
)
def test_any_configuration_has_all_properties(
    tiny_config: Callable[..., Config], build: Build, images: Tensor, options: dict[str, Any], key: int
) -> None:
    """No leak (1), coverage (4), the loop over segments (6), gradients (14), costs (22), batch mates (23)."""
    method = build(**options)
    keys = torch.arange(key, key + 3)
    draw = method.draw(keys)
    alone = method.draw(keys[:1])
    assert torch.equal(alone.ranks, draw.ranks[:1])
    assert leak(plain_predict, method, images[:1], alone, most=5, dropped=True) == 0
    first = 0 if options["predict_first"] else 1
    with torch.no_grad():
        together = method.predict(images[:3], draw)
        for image in range(2):
            ranks = draw.ranks[image]
            used = together.weight[image] > 0
            assert sorted(together.token_ids[image, used].tolist()) == torch.nonzero(ranks >= first).flatten().tolist()
            looped = loop_path(method, images[image], ranks)
            expected = torch.stack([looped[token] for token in together.token_ids[image, used].tolist()]).float()
            torch.testing.assert_close(together.pred[image, used], expected, atol=1e-5, rtol=1e-5)
    loss, logs = method(images[:3], draw)
    loss.backward()
    assert trained_without_gradient(method) == []
    assert loss.isfinite() and torch.equal(logs["loss"], loss.detach())
    cfg = tiny_config("randsac", **{f"method__{name}": value for name, value in options.items()})
    estimate, (forward, step) = flops_per_image(cfg), counted(cfg)
    assert estimate.forward == pytest.approx(forward, rel=1e-6) and estimate.step == pytest.approx(step, rel=1e-6)


# 5, 25: what does not matter


def reordered(method: RandSAC, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a segment in another order before the gather: any order within equal ranks sorts as well."""
    right = method.layout

    def layout(draw: RankDraw) -> segments.Layout:
        found = right(draw)
        moved = []
        for ids in (found.source_ids, found.target_ids):
            ranks = draw.ranks.gather(1, ids)
            noise = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3))
            moved.append(ids.gather(1, (ranks + noise).argsort(dim=1)))
        assert not torch.equal(moved[0], found.source_ids)
        return found._replace(source_ids=moved[0], target_ids=moved[1])

    monkeypatch.setattr(method, "layout", layout)


def test_property_05_the_order_inside_a_segment_does_not_matter(
    build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build()
    draw = method.draw(torch.arange(4))
    with torch.no_grad():
        before = by_token(method.predict(images, draw))
        reordered(method, monkeypatch)
        after = by_token(method.predict(images, draw))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_property_05_control_order_across_segments_matters(build: Build, images: Tensor) -> None:
    method = build()
    draw = method.draw(torch.arange(4))
    swapped = draw.ranks.where(draw.ranks > 1, 1 - draw.ranks)
    with torch.no_grad():
        before, after = (method.predict(images, RankDraw(None, ranks)) for ranks in (draw.ranks, swapped))
        moved = (by_token(before) - by_token(after)).nan_to_num().abs().amax(dim=2)
    assert (moved[(draw.ranks > 1)] > 1e-5).any()


def test_property_25_names_of_segments_do_not_matter() -> None:
    keys = torch.arange(6)
    named = segments.blob_segments(keys, 8, 7, (0.15, 0.25))
    renamed = torch.tensor([2, 3, 5, 11, 12, 17, 19])[named]  # other names, with gaps, in the same order
    ranks = segments.segment_ranks(keys, named, 7, raster=True)
    assert torch.equal(segments.segment_ranks(keys, renamed, 20, raster=True), ranks)
    assert torch.equal(ranks, named)
    mixed = torch.tensor([3, 2, 5, 11, 12, 17, 19])[named]  # control: another order is another thing
    assert not torch.equal(segments.segment_ranks(keys, mixed, 20, raster=True), ranks)


# 11, 12: the encoder is timm's; orders differ in ranks alone


def test_property_11_the_unmasked_encoder_is_timms(
    build: Build, tiny_config: Callable[..., Config], images: Tensor
) -> None:
    method = build(skip="none")
    cfg = tiny_config("randsac")
    timms = VisionTransformer(**encoder_kwargs(cfg.shape, 32, class_token=False))
    timms.load_state_dict(method.encoder.state_dict(), strict=True)
    patches, ids = patchify(normalise(images), 4), torch.arange(N).expand(4, -1)
    everything = torch.ones(N, N, dtype=torch.bool)
    with torch.no_grad():
        expected = timms.eval().forward_features(normalise(images))
        found = method.encode(patches, ids, everything, None)[-1]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        permuted = method.encode(patches[:, order], ids[:, order], everything, None)[-1]
        torch.testing.assert_close(permuted, found[:, order], atol=1e-5, rtol=1e-5)
        causal = method.encode(patches, ids, everything.tril(), None)[-1]  # control: a mask is seen
        assert (causal - found).abs().max() > 1e-3


def test_property_12_an_order_is_nothing_but_ranks(build: Build, images: Tensor) -> None:
    raster, random = (build(segment_size=1, order=order) for order in ("raster", "random"))
    draws = [method.draw(torch.arange(4)) for method in (raster, random)]
    assert torch.equal(draws[0].ranks, torch.arange(N).expand(4, -1))
    assert not torch.equal(draws[0].ranks, draws[1].ranks)
    with torch.no_grad():
        for draw in draws:
            assert torch.equal(raster(images, draw)[0], random(images, draw)[0])
        assert not torch.equal(raster(images, draws[0])[0], raster(images, draws[1])[0])


# 13, 14: skip connections and the decoder's parts


@pytest.mark.parametrize(("skip", "rows"), [("last", [0, 0, 0, 1]), ("uniform", [0.25] * 4), ("normal", None)])
def test_property_13_first_values_of_the_skips(
    tiny_config: Callable[..., Config], skip: str, rows: list[float] | None
) -> None:
    method = build_method(tiny_config("randsac", method__skip=skip, method__decoder_depth=3))
    weights = method.decoder.skip
    assert weights.shape == (3, 4)
    if rows is None:
        many = build_method(tiny_config("randsac", method__skip=skip, method__decoder_depth=40)).decoder.skip.detach()
        assert float(many.std()) == pytest.approx(0.5, rel=0.2) and abs(float(many.mean())) < 0.15
    else:
        assert torch.equal(weights, torch.tensor(rows, dtype=torch.float32).expand(3, -1))


def test_property_13_without_skips_it_is_the_decoder_at_step_0(
    tiny_config: Callable[..., Config], images: Tensor
) -> None:
    with_skips, without = (
        build_method(tiny_config("randsac", method__skip=skip, method__decoder_depth=2)) for skip in ("last", "none")
    )
    assert without.decoder.skip is None and all(p.requires_grad for p in without.encoder.norm.parameters())
    draw = with_skips.draw(torch.arange(4))
    with torch.no_grad():
        assert torch.equal(with_skips.predict(images, draw).pred, without.predict(images, draw).pred)
        without.encoder.norm.bias += 1  # control: it is read
        assert not torch.equal(with_skips.predict(images, draw).pred, without.predict(images, draw).pred)


def names(module: torch.nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


def test_a_cross_only_decoder_has_no_attention_among_queries(build: Build, images: Tensor) -> None:
    whole, cross_only = build(), build(decoder_self_attention=False)
    gone = names(whole.decoder) - names(cross_only.decoder)
    parts = {name for name in names(whole.decoder) if name.startswith(("blocks.0.attn.", "blocks.0.norm1."))}
    assert gone == parts and len(parts) == 6
    draw = whole.draw(torch.arange(1))

    def moved(method: RandSAC) -> float:
        """How far a prediction moves when the position of another query of its segment does."""
        with torch.no_grad():
            before = by_token(method.predict(images[:1], draw))
            one, other = torch.nonzero(draw.ranks[0] == 5).flatten()[:2]
            method.decoder.pos_embed[0, other] += torch.linspace(-1, 1, 96)  # a constant would not survive the norm
            after = by_token(method.predict(images[:1], draw))
        return float((before - after)[0, one].abs().max())

    assert moved(whole) > 1e-4 and moved(cross_only) == 0


def test_queries_without_a_token_are_positions_alone(build: Build) -> None:
    method = build(query_token=False)
    assert method.decoder.mask_token is None
    seen: list[Tensor] = []
    hook = method.decoder.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    draw = method.draw(torch.arange(2))
    method.predict(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), draw)
    hook.remove()
    ids = method.layout(draw).target_ids
    assert torch.equal(seen[0], method.decoder.pos_embed[0][ids])


# 17, 18: blobs


def nearest_by_hand(draws: Tensor, low: float, high: float) -> list[int]:
    """The Gaussian nearest to each token, by a loop over tokens and Gaussians; draws [4, K]."""
    labels = []
    for token in range(N):
        y, x = token // 8 + 0.5, token % 8 + 0.5
        distances = []
        for my, mx, sy, sx in draws.T.tolist():
            deviations = [8 * (low + (high - low) * s) for s in (sy, sx)]
            distances.append(((y - 8 * my) / deviations[0]) ** 2 + ((x - 8 * mx) / deviations[1]) ** 2)
        labels.append(distances.index(min(distances)))
    return labels


@pytest.mark.parametrize(("number", "std"), [(2, (0.05, 0.5)), (6, (0.1, 0.3))])
def test_property_17_blobs_are_the_nearest_gaussians(number: int, std: tuple[float, float]) -> None:
    """Also of images whose first Gaussians leave one segment: the next draws are taken, and their own."""
    keys = torch.arange(3000)
    counters = torch.arange(4 * number).view(4, number)
    first = segments.nearest_gaussian(
        segments.uniform(keys[:, None, None], "blob", counters), segments.token_centres(8), 8, std
    )
    alone = (first == first[:, :1]).all(dim=1)
    chosen = torch.cat([keys[:25], keys[alone][:15]])  # in another order than they are drawn again
    assert number == 6 or alone.sum() >= 15
    found = segments.blob_segments(chosen, 8, number, std)
    for image, key in enumerate(chosen):
        for attempt in range(20):
            labels = nearest_by_hand(segments.uniform(key, "blob", counters + 4 * number * attempt), *std)
            if len(set(labels)) > 1:
                break
        assert found[image].tolist() == [sorted(set(labels)).index(label) for label in labels]


def test_property_17_blobs_have_consecutive_ids_and_two_segments_at_least() -> None:
    keys = torch.arange(3000)
    for number in (2, 3, 11):
        found = segments.blob_segments(keys, 8, number, (0.05, 0.5))
        counts = torch.zeros(3000, number, dtype=torch.int64).scatter_add_(1, found, torch.ones_like(found))
        present = counts > 0
        assert (present.sum(1) >= 2).all() and found.max() < number
        assert torch.equal(present, torch.arange(number) < present.sum(1, keepdim=True))  # 0..K_eff-1
    assert not (present.sum(1) == 11).all()  # some Gaussian wins nothing at times
    two = segments.blob_segments(keys, 8, 2, (0.05, 0.5))
    first_try = segments.nearest_gaussian(
        segments.uniform(keys[:, None, None], "blob", torch.arange(8).view(4, 2)),
        segments.token_centres(8),
        8,
        (0.05, 0.5),
    )
    alone = (first_try == first_try[:, :1]).all(dim=1)
    assert alone.any() and (two[alone].amax(dim=1) == 1).all()  # drawn again


def test_property_17_blobs_are_a_function_of_the_key(build: Build) -> None:
    method = build(segments="blob", num_segments=5)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = method.draw(torch.arange(40))
    assert torch.equal(method.draw(torch.arange(20, 40)).ranks, first.ranks[20:])
    assert len({tuple(row) for row in first.ranks.tolist()}) == 40
    assert torch.equal(state, torch.get_rng_state())
    assert first.sizes is None  # sizes differ between images


def neighbours(labels: Tensor) -> float:
    """Share of adjacent tokens with the same label."""
    grid = labels.view(-1, 8, 8)
    pairs = [grid[:, 1:] == grid[:, :-1], grid[:, :, 1:] == grid[:, :, :-1]]
    return float(torch.cat([pair.flatten() for pair in pairs]).float().mean())


@pytest.mark.parametrize("kind", ["blob", "square"])
def test_the_shuffled_control_keeps_sizes_and_loses_coherence(build: Build, kind: str) -> None:
    keys = torch.arange(200)
    number = {"num_segments": 5} if kind == "blob" else {}
    coherent, shuffled = (build(segments=kind, order="random", shuffled=on, **number) for on in (False, True))
    a, b = coherent.draw(keys).ranks, shuffled.draw(keys).ranks
    sizes = [torch.zeros(200, 16, dtype=torch.int64).scatter_add_(1, r, torch.ones_like(r)) for r in (a, b)]
    assert torch.equal(*sizes)
    assert neighbours(a) > 0.45
    chance = float((sizes[0].double().square().sum(1) - N).mean()) / (N * (N - 1))
    assert neighbours(b) == pytest.approx(chance, abs=0.02)
    assert len({tuple(row) for row in b.tolist()}) == 200
    dealt = segments.shuffled_segments(keys, segments.square_segments(8, 2).expand(200, -1))
    assert len({tuple(row) for row in dealt.tolist()}) == 200  # dealt anew for each image, whatever the order


def test_every_choice_has_random_numbers_of_its_own(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tag for two choices would tie them together."""
    method = build(segments="blob", num_segments=9, shuffled=True, prefix=True, token_keep=0.5)
    drawn: list[str] = []
    right = segments.stream

    def stream(keys: Tensor, tag: str, counter: Tensor | int = 0) -> Tensor:
        drawn.append(tag)
        return right(keys, tag, counter)

    monkeypatch.setattr(segments, "stream", stream)
    method.draw(torch.arange(3))
    assert sorted(drawn) == ["blob", "order", "partition", "prefix", "segment", "shuffle", "token_drop"]


def test_property_18_blob_partitions_are_nearest_to_centroids_and_visited_one_after_another() -> None:
    keys, std = torch.arange(300), (0.15, 0.25)
    found = segments.blob_segments(keys, 8, 11, std)
    parts = segments.blob_partition(keys, found, 8, 11, 5, std)
    draws = segments.uniform(keys[:, None, None], "partition", torch.arange(20).view(4, 5))
    ranks = segments.segment_ranks(keys, found, 11, partition=parts)
    for image in range(40):
        number = int(found[image].max()) + 1
        for segment in range(number):
            places = torch.nonzero(found[image] == segment).flatten()
            y, x = float((places // 8 + 0.5).mean()), float((places % 8 + 0.5).mean())
            my, mx, sy, sx = draws[image]
            distance = ((y - 8 * my) / (8 * (0.15 + 0.1 * sy))) ** 2 + ((x - 8 * mx) / (8 * (0.15 + 0.1 * sx))) ** 2
            assert int(parts[image, segment]) == int(distance.argmin())
        by_rank = [int(parts[image, int(found[image][ranks[image] == rank][0])]) for rank in range(number)]
        changes = sum(a != b for a, b in zip(by_rank, by_rank[1:], strict=False))
        assert changes == len(set(by_rank)) - 1  # a partition is left for good
    flat = segments.segment_ranks(keys, found, 11)
    assert not torch.equal(flat, ranks)
    assert torch.equal(flat.amax(dim=1), found.amax(dim=1)) and torch.equal(ranks.amax(dim=1), found.amax(dim=1))


def test_property_19_images_of_a_batch_share_blobs_only_on_request(build: Build) -> None:
    shared = build(segments="blob", num_segments=5, share_segments=True)
    own = build(segments="blob", num_segments=5)
    keys = torch.tensor([7, 8, 9, 10])
    ranks = shared.draw(keys).ranks
    assert (ranks == ranks[0]).all() and torch.equal(ranks[0], own.draw(keys).ranks[0])
    parts = [shared.draw(keys[part], keys[:1]).ranks for part in (slice(0, 1), slice(1, 4))]
    assert torch.equal(torch.cat(parts), ranks)  # however the batch is split
    assert not torch.equal(shared.draw(keys[1:]).ranks[0], ranks[0])
    assert shared.layout(shared.draw(keys)).source_mask.shape == (N, N)  # one mask for all
    assert own.layout(own.draw(keys)).source_mask.shape == (4, 1, N, N)


# prefix, first segment, dropped tokens


def test_a_prefix_merges_the_first_segments(build: Build) -> None:
    plain_order, prefixed = build(order="random"), build(order="random", prefix=True)
    keys = torch.arange(3000)
    before, after = plain_order.draw(keys).ranks, prefixed.draw(keys).ranks
    merged = before.amax(dim=1) - after.amax(dim=1) + 1
    assert torch.equal(after, (before - merged[:, None] + 1).clamp(min=0))
    counts = merged.bincount(minlength=16)[1:16]  # uniform over 1..15: 2 to 16 segments are left
    assert counts.sum() == 3000 and (counts - 200.0).square().sum() / 200 < 50  # chi square, 14 degrees of freedom
    assert prefixed.draw(keys[:4]).sizes is None


def test_the_first_segment_is_predicted_from_a_null_token_alone(build: Build, images: Tensor) -> None:
    method = build(predict_first=True)
    draw = method.draw(torch.arange(1))
    prediction = method.predict(images[:1], draw)
    assert prediction.pred.shape == (1, N, 48) and prediction.weight.eq(1).all()
    noise = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    first = draw.ranks[0] == 0
    with torch.no_grad():
        before, other = by_token(method.predict(images[:1], draw)), by_token(method.predict(noise, draw))
        assert torch.equal(before[0, first], other[0, first])  # no pixel is seen
        assert not torch.equal(before[0, ~first], other[0, ~first])
        method.decoder.null_token += torch.linspace(-1, 1, 96)  # a constant would not survive the norm
        after = by_token(method.predict(images[:1], draw))
    assert (before - after)[0, first].abs().max() > 1e-4
    cross_only = build(predict_first=True, decoder_self_attention=False)
    with torch.no_grad():
        before = by_token(cross_only.predict(images[:1], draw))
        cross_only.decoder.null_token += torch.linspace(-1, 1, 96)
        after = by_token(cross_only.predict(images[:1], draw))
    assert torch.equal(before[0, ~first], after[0, ~first])  # later segments do not read it


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.75])
def test_dropped_tokens_are_a_random_share_of_each_segment(build: Build, keep: float) -> None:
    whole, dropping = build(segment_size=4, order="random"), build(segment_size=4, order="random", token_keep=keep)
    keys = torch.arange(2000)
    before, after = whole.draw(keys).ranks, dropping.draw(keys).ranks
    quota = keep_count(16, keep)
    assert torch.equal(after.where(after >= 0, before), before)
    assert all(((after == rank).sum(dim=1) == quota).all() for rank in range(4))
    shares = (after >= 0).double().mean(dim=0)
    assert (shares - quota / 16).abs().max() < 5.5 * (quota / 16 * (1 - quota / 16) / 2000) ** 0.5
    prediction = dropping.predict(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), dropping.draw(keys[:2]))
    assert prediction.pred.shape[1] == 3 * quota and prediction.weight.eq(1).all()


@SOME
@given(st.integers(2, 12), st.sampled_from([0.2, 0.34, 0.5, 0.9]), st.integers(0, 10**6))
def test_blobs_with_dropped_tokens_fit_their_fixed_shape(number: int, keep: float, key: int) -> None:
    keys = torch.arange(key, key + 20)
    ranks = segments.segment_ranks(keys, segments.blob_segments(keys, 8, number, (0.05, 0.4)), number)
    quota = torch.tensor([segment_quota(size, keep) for size in range(N + 1)])
    dropped = segments.drop_in_segments(keys, ranks, quota)
    assert ((dropped >= 0).sum(dim=1) <= padded_tokens(N, number, keep)).all()
    for image in range(3):
        for rank in range(int(ranks[image].max()) + 1):
            size = int((ranks[image] == rank).sum())
            assert int((dropped[image] == rank).sum()) == max(1, keep_count(size, keep))


# 23, 24, 10: batch mates, precision, limits


def test_property_23_a_blobs_loss_does_not_depend_on_batch_mates(build: Build, images: Tensor) -> None:
    method = build(segments="blob", num_segments=7, token_keep=0.6)
    draw = method.draw(torch.arange(4))
    assert len(set((draw.ranks >= 0).sum(dim=1).tolist())) > 1  # some are padded
    with torch.no_grad():
        together = by_token(method.predict(images, draw))
        alone = [float(method(images[i : i + 1], method.draw(torch.arange(i, i + 1)))[0]) for i in range(4)]
        other = images.clone()
        other[1:] = 255 - other[1:]
        assert torch.equal(by_token(method.predict(other, draw))[0].nan_to_num(), together[0].nan_to_num())
        assert float(method(images, draw)[0]) == pytest.approx(sum(alone) / 4, rel=1e-5)


def test_property_23_control_padding_in_the_loss_would_be_seen(build: Build, images: Tensor) -> None:
    method = build(segments="blob", num_segments=7)
    draw = method.draw(torch.arange(4))
    with torch.no_grad():
        found = method.predict(images, draw)
        everything = dataclasses.replace(found, weight=torch.ones_like(found.weight))
        losses = [method.token_loss(one).mul(one.weight).sum() / one.weight.sum() for one in (found, everything)]
    assert abs(float(losses[0] - losses[1])) > 1e-4


@pytest.mark.parametrize("options", [{}, {"segments": "blob"}, {"segments": "blob", "predict_first": True}], ids=str)
def test_property_24_bf16_and_bool_masks(
    tiny_config: Callable[..., Config], images: Tensor, options: dict[str, Any]
) -> None:
    method = build_method(tiny_config("randsac", **{f"method__{name}": value for name, value in options.items()}))
    draw = method.draw(torch.arange(4))
    assert {mask.dtype for mask in method.layout(draw)[2:5]} == {torch.bool}
    with torch.no_grad():
        full = float(method(images, draw)[0])
        half = float(method.to(torch.bfloat16)(images, draw)[0])
    assert half == pytest.approx(full, rel=0.01) and half != full


def test_property_24_control_a_large_negative_constant_leaks(build: Build, images: Tensor) -> None:
    """Added to scores of its own size, a constant mask lets the future through; bool masks do not."""
    scores, constant = torch.tensor([[-3e4, 1.0]]), torch.tensor([[0.0, -3e4]])
    assert float((scores.bfloat16() + constant.bfloat16()).softmax(-1)[0, 1]) > 1e-3
    value = F.scaled_dot_product_attention(torch.tensor([[[1.0]]]), torch.tensor([[[-3e4], [1.0]]]),
                                           torch.tensor([[[0.0], [1.0]]]), attn_mask=torch.tensor([[True, False]]))  # fmt: skip
    assert float(value) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": "blob", "num_segments": 1}, "method.num_segments"),
        ({"segments": "blob", "num_segments": 65}, "at most 64"),
        ({"segments": "blob", "order": "raster"}, "blobs have no raster order"),
        ({"segments": "blob", "blob_std": [0.3, 0.1]}, "method.blob_std"),
        ({"segments": "blob", "blob_std": [0, 0.1]}, "method.blob_std"),
        ({"segments": "blob", "blob_std": [0.1, ".inf"]}, "method.blob_std"),
        ({"segments": "blob", "num_segments": 3, "num_partitions": 4}, "method.num_partitions"),
        ({"num_segments": 7}, "is for blobs"),
        ({"share_segments": True}, "method.share_segments"),
        ({"token_keep": 0}, "method.token_keep"),
        ({"segment_size": 2, "partition_size": 3}, "method.order=random"),
        ({"skip": "first"}, "method.skip"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(
    tiny_config: Callable[..., Config], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config("randsac", **{f"method__{name}": value for name, value in options.items()})


def test_partitions_are_not_asked_for_without_hierarchy(tiny_config: Callable[..., Config]) -> None:
    tiny_config("randsac", method__order="random", method__partition_size=3)


@pytest.mark.parametrize("partitions", [1, 5, 11])
def test_partitions_without_segments_leave_no_gap(partitions: int) -> None:
    keys = torch.arange(2000)
    found = segments.blob_segments(keys, 8, 11, (0.15, 0.25))
    parts = segments.blob_partition(keys, found, 8, 11, partitions, (0.15, 0.25))
    ranks = segments.segment_ranks(keys, found, 11, partition=parts)
    assert torch.equal(ranks.amax(dim=1), found.amax(dim=1))
    RankDraw(None, ranks)  # consecutive in every image


def test_a_draw_is_made_by_the_settings(build: Build) -> None:
    """Each segmentation and order against the functions it is made of."""
    keys, std = torch.arange(50), (0.1, 0.4)
    squares = segments.square_segments(8, 2).expand(50, -1)
    partition = segments.square_segments(4, 2).expand(50, -1)
    ranks = segments.segment_ranks(keys, squares, 16)
    assert torch.equal(build(order="random").draw(keys).ranks, ranks)
    hierarchical = segments.segment_ranks(keys, squares, 16, partition=partition)
    assert torch.equal(build().draw(keys).ranks, hierarchical) and not torch.equal(ranks, hierarchical)
    assert torch.equal(build(order="raster").draw(keys).ranks, squares)
    blobs = segments.blob_segments(keys, 8, 6, std)
    parts = segments.blob_partition(keys, blobs, 8, 6, 3, std)
    settings = {"segments": "blob", "num_segments": 6, "num_partitions": 3, "blob_std": list(std)}
    for order, groups in (("random", None), ("hierarchical", parts)):
        expected = segments.segment_ranks(keys, blobs, 6, partition=groups)
        assert torch.equal(build(**settings, order=order).draw(keys).ranks, expected)


def test_each_block_has_its_own_stochastic_depth(build: Build, images: Tensor) -> None:
    method = build(skip="none")
    for block in method.encoder.blocks:
        block.drop_rate = 0.0  # what is kept is not scaled
    draw = method.draw(torch.arange(4))
    keep = torch.ones(4, 2, 4, dtype=torch.bool)
    keep[2] = False  # the third block does nothing
    layout = method.layout(draw)
    patches = segments.gather_tokens(patchify(normalise(images), 4), layout.source_ids)
    with torch.no_grad():
        found = method.encode(patches, layout.source_ids, layout.source_mask, keep)[-1]
        x = embed(method.encoder, patches, layout.source_ids)
        for index in (0, 1, 3):
            x = method.encoder.blocks[index](x, attn_mask=layout.source_mask)
    torch.testing.assert_close(found, method.encoder.norm(x).detach(), atol=1e-6, rtol=1e-6)


def test_images_that_do_not_share_their_ranks_have_masks_of_their_own(build: Build, images: Tensor) -> None:
    """A draw whose ranks were replaced, under a setting that would share them: nothing leaks."""
    shared, own = (build(segments="blob", num_segments=5, order="random", share_segments=on) for on in (True, False))
    draw = dataclasses.replace(shared.draw(torch.arange(4)), ranks=own.draw(torch.arange(4)).ranks)
    with torch.no_grad():
        assert torch.equal(shared.predict(images, draw).pred, own.predict(images, draw).pred)


# logs and figure


def logged(method: RandSAC, images: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(the logs, the loss and the rank of every predicted token, [B, T])."""
    draw = method.draw(torch.arange(len(images)))
    with torch.no_grad():
        _, logs = method(images, draw)
        found = method.predict(images, draw)
    return logs, (found.pred - found.target).square().mean(dim=-1), draw.ranks.gather(1, found.token_ids)


@pytest.mark.parametrize(("options", "bins", "width"), [({}, 15, 1), ({"segment_size": 1}, 13, 5), ({"segment_size": 4}, 3, 1),
                                                        ({"predict_first": True}, 16, 1)], ids=str)  # fmt: skip
def test_loss_by_rank_in_the_logs(build: Build, images: Tensor, options: dict[str, Any], bins: int, width: int) -> None:
    logs, losses, ranks = logged(build(**options), images)
    first = int(ranks.min())
    expected = {f"loss_rank_{start:02d}": losses[(ranks >= start) & (ranks < start + width)].mean()
                for start in range(first, int(ranks.max()) + 1, width)}  # fmt: skip
    assert len(expected) == bins and set(logs) == {"loss", *expected}
    for name, value in expected.items():
        torch.testing.assert_close(logs[name], value)


def test_loss_by_rank_leaves_out_what_has_no_weight(build: Build, images: Tensor) -> None:
    logs, losses, ranks = logged(build(segments="blob", num_segments=3, order="random"), images)
    torch.testing.assert_close(logs["loss_rank_01"], losses[ranks == 1].mean())
    torch.testing.assert_close(logs["loss_rank_02"], losses[ranks == 2].mean())


def test_a_rank_that_no_image_has_is_logged_as_nan(build: Build, images: Tensor) -> None:
    method = build(segments="blob", num_segments=9)
    draw = RankDraw(None, (torch.arange(N) // 32).expand(4, -1).contiguous())
    _, logs = method(images, draw)
    assert logs["loss_rank_01"].isfinite() and logs["loss_rank_08"].isnan() and logs["loss"].isfinite()


@pytest.mark.parametrize("options", [{"segments": "blob", "token_keep": 0.5}, {"predict_first": True}, {"prefix": True},
                                     {"normalise_target": False}], ids=str)  # fmt: skip
def test_figures_of_the_switches(build: Build, images: Tensor, options: dict[str, Any]) -> None:
    method = build(**options)
    picture = method.figure(images, method.draw(torch.arange(4)))
    columns = 3 if options.get("predict_first") else 4
    assert picture.mode == "RGB" and picture.width == round(1.6 * columns * 120)


def test_raw_targets_are_the_pixels(build: Build, images: Tensor) -> None:
    method = build(normalise_target=False)
    found: Prediction = method.predict(images, method.draw(torch.arange(4)))
    rows = pixel_rows(patchify(normalise(images), 4))
    assert torch.equal(found.target, segments.gather_tokens(rows, found.token_ids))
