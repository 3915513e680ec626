"""RandSAC: no leak, coverage, masks, skip connections, targets, segments and orders; with controls that must fail."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_paths import N, by_token, leak, loop_path, pixels_of, plain_predict
from torch import Tensor

from pipeline import segments
from pipeline.config import Config, ConfigError
from pipeline.methods import build_method
from pipeline.methods.common import Prediction, RankDraw, restore_pixels
from pipeline.methods.randsac import RandSAC
from pipeline.optim import takes_decay
from pipeline.order import sample_keys
from pipeline.settings import OptimConfig
from pipeline.vit import embed, normalise, patchify, pixel_rows, standardise, unpatchify

SIZES = {
    "raster": (1,) * N,
    "two": (20, 44),
    "unequal": (5, 1, 17, 9, 2, 30),
    "equal": (4,) * 16,
    "lonely ends": (1, 62, 1),
}


@pytest.fixture(scope="module")
def method(tiny_config: Callable[..., Config]) -> RandSAC:
    """Two decoder blocks, every weight (the skip weights too) off its first value."""
    method = build_method(tiny_config("randsac", method__decoder_depth=2))
    plain.shake(method)
    return method


@pytest.fixture(scope="module")
def fresh(tiny_config: Callable[..., Config]) -> RandSAC:
    """As initialised: the skip weights are one-hot on the last layer."""
    return build_method(tiny_config("randsac", method__decoder_depth=2))


def rank_draw(sizes: tuple[int, ...], batch: int = 1, seed: int = 0, *, shuffle: bool = True) -> RankDraw:
    """Ranks with these segment sizes, tokens assigned at random for each image, or in raster order."""
    ranks = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(seed)
    rows = [ranks[torch.randperm(N, generator=generator)] if shuffle else ranks for _ in range(batch)]
    return RankDraw(None, torch.stack(rows))


def mask_path(method: RandSAC, images: Tensor, draw: RankDraw, *, rank_0: str = "own memory, unseen") -> Prediction:
    """All tokens in raster order in encoder and decoder, with masks made from ranks; nothing is sorted or left out.

    Rank-0 queries carry no loss but need something to attend to: their own segment's memory, or everything. Unseen:
    no other query attends to them.
    """
    patches = patchify(normalise(images), 4)
    ids = torch.arange(N).expand(len(images), -1)
    query, key = draw.ranks[:, None, :, None], draw.ranks[:, None, None, :]
    layers = method.encode(patches, ids, key <= query, None)
    first = query == 0
    memory_mask = (key < query) | (first if rank_0.startswith("everything") else first & (key == 0))
    self_mask = key <= query
    if rank_0.endswith("unseen"):
        self_mask = self_mask & ((key > 0) | first)
    pred = method.decoder(layers, ids, self_mask, memory_mask)
    target = standardise(pixel_rows(patches))
    return Prediction(pred.float(), target, ids, (draw.ranks > 0).float())


# 1, 2, 3: nothing of a segment or of a later one reaches its prediction


@pytest.mark.parametrize("weights", ["fresh", "method"])
@pytest.mark.parametrize("partition", [2, 4, 1])  # hierarchical; one partition and sixteen: flat
def test_property_01_no_leak_forward(
    request: pytest.FixtureRequest, images: Tensor, weights: str, partition: int
) -> None:
    parts = segments.square_segments(4, partition)
    segment = segments.square_segments(8, 2)[None]
    ranks = segments.segment_ranks(torch.tensor([partition]), segment, len(parts), partition=parts[None])
    assert leak(plain_predict, request.getfixturevalue(weights), images[:1], RankDraw(None, ranks)) == 0


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_property_01_no_leak_with_other_ranks(method: RandSAC, images: Tensor, sizes: tuple[int, ...]) -> None:
    draw = dataclasses.replace(method.draw(torch.tensor([3])), ranks=rank_draw(sizes).ranks)
    assert leak(plain_predict, method, images[:1], draw, most=16) == 0


def test_property_01_no_leak_for_fifty_random_segmentations(method: RandSAC, images: Tensor) -> None:
    generator = torch.Generator().manual_seed(5)
    for seed in range(50):
        number = int(torch.randint(2, N + 1, (), generator=generator))
        cuts = (torch.randperm(N - 1, generator=generator)[: number - 1] + 1).sort().values.tolist()
        sizes = tuple(b - a for a, b in itertools.pairwise([0, *cuts, N]))
        assert leak(plain_predict, method, images[:1], rank_draw(sizes, seed=seed), most=4) == 0, sizes


@pytest.mark.parametrize("sizes", [SIZES["equal"], SIZES["unequal"]], ids=["equal", "unequal"])
def test_property_02_no_leak_in_the_gradient(method: RandSAC, images: Tensor, sizes: tuple[int, ...]) -> None:
    ranks = rank_draw(sizes).ranks
    ks = torch.arange(1, len(sizes))
    batch = RankDraw(None, ranks.expand(len(ks), -1).contiguous())
    pixels = images[:1].float().repeat(len(ks), 1, 1, 1).requires_grad_()
    of_rank = batch.ranks == ks[:, None]
    by_token(method.predict(pixels, batch))[of_rank].sum().backward()
    moved = pixels.grad.abs()
    assert moved[pixels_of(batch.ranks >= ks[:, None]).expand_as(moved)].max() == 0
    previous = (moved * pixels_of(batch.ranks == ks[:, None] - 1)).sum(dim=(1, 2, 3))
    assert (previous > 0).all()


@pytest.fixture
def leaky_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    right = segments.block_masks

    def masks(sizes: tuple[int, ...], device: torch.device, predict_first: bool) -> tuple[Tensor, Tensor, Tensor]:
        source, target, _ = right(sizes, device)
        ranks = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        return source, target, segments.rank_mask(ranks[sizes[0] :], ranks[: N - sizes[-1]])  # <= instead of <

    monkeypatch.setattr(segments, "block_masks", masks)


def add_class_token(monkeypatch: pytest.MonkeyPatch, *, two_way: bool) -> None:
    """A class token that all tokens see in the encoder; it sees itself only (a sink) or, two-way, all of them."""

    def encode(self: RandSAC, patches: Tensor, source_ids: Tensor, mask: Tensor, keep: Tensor | None) -> list[Tensor]:
        x, layers = embed(self.encoder, patches, source_ids), []
        x = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
        wide = torch.ones(len(mask) + 1, len(mask) + 1, dtype=torch.bool)
        wide[1:, 1:] = mask
        wide[0, 1:] = two_way
        for block in self.encoder.blocks:
            x = block(x, attn_mask=wide)
            layers.append(x[:, 1:])
        return layers

    monkeypatch.setattr(RandSAC, "encode", encode)


def test_property_03_control_memory_of_the_same_rank_leaks(method: RandSAC, images: Tensor, leaky_memory: None) -> None:
    assert leak(plain_predict, method, images[:1], rank_draw(SIZES["equal"])) > 1e-3


def test_property_03_control_two_way_class_token_leaks(
    method: RandSAC, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_class_token(monkeypatch, two_way=False)
    assert leak(plain_predict, method, images[:1], rank_draw(SIZES["equal"])) == 0
    add_class_token(monkeypatch, two_way=True)
    assert leak(plain_predict, method, images[:1], rank_draw(SIZES["equal"])) > 1e-3


def test_property_03_control_rank_0_attending_to_everything_leaks(method: RandSAC, images: Tensor) -> None:
    def everything(method: RandSAC, images: Tensor, draw: RankDraw) -> Prediction:
        return mask_path(method, images, draw, rank_0="everything")

    def own_memory(method: RandSAC, images: Tensor, draw: RankDraw) -> Prediction:
        return mask_path(method, images, draw, rank_0="own memory")

    assert leak(everything, method, images[:1], rank_draw(SIZES["equal"])) > 1e-3
    assert leak(own_memory, method, images[:1], rank_draw(SIZES["equal"])) == 0


# 4, 6, 9, 12: what is predicted, and the same by three ways of computing it


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_property_04_every_token_but_the_first_segments_is_predicted_once(
    method: RandSAC, images: Tensor, sizes: tuple[int, ...]
) -> None:
    draw = rank_draw(sizes, batch=4)
    prediction = method.predict(images, draw)
    assert prediction.pred.shape == prediction.target.shape == (4, N - sizes[0], 48)
    assert prediction.weight.eq(1).all() and prediction.weight.sum(dim=1).eq(N - sizes[0]).all()
    for ids, ranks in zip(prediction.token_ids, draw.ranks, strict=True):
        assert sorted(ids.tolist()) == torch.nonzero(ranks > 0).flatten().tolist()


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "raster"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_property_06_gather_mask_and_loop_agree(
    method: RandSAC, images: Tensor, sizes: tuple[int, ...], shuffle: bool
) -> None:
    draw = dataclasses.replace(
        method.draw(torch.arange(2)), ranks=rank_draw(sizes, batch=2, seed=9, shuffle=shuffle).ranks
    )
    with torch.no_grad():
        gathered = by_token(method.predict(images[:2], draw))
        masked = by_token(mask_path(method, images[:2], draw))
        for image in range(2):
            predicted = draw.ranks[image] > 0
            torch.testing.assert_close(gathered[image, predicted], masked[image, predicted], atol=1e-5, rtol=1e-5)
            looped = loop_path(method, images[image], draw.ranks[image])
            assert sorted(looped) == torch.nonzero(predicted).flatten().tolist()
            expected = torch.stack([looped[token] for token in sorted(looped)]).float()
            torch.testing.assert_close(gathered[image, predicted], expected, atol=1e-5, rtol=1e-5)


def test_property_06_gather_and_mask_agree_in_bf16(tiny_config: Callable[..., Config], images: Tensor) -> None:
    method = build_method(tiny_config("randsac")).to(torch.bfloat16)
    draw = method.draw(torch.arange(4))
    with torch.no_grad():
        gathered, masked = by_token(method.predict(images, draw)), by_token(mask_path(method, images, draw))
    predicted = draw.ranks > 0
    assert (gathered - masked)[predicted].abs().max() / gathered[predicted].abs().max() < 2e-2
    assert method.predict(images, draw).pred.dtype == torch.float32


def test_property_09_encoding_the_last_segment_changes_nothing(method: RandSAC, images: Tensor) -> None:
    draw = rank_draw(SIZES["unequal"], batch=4)
    with torch.no_grad():
        dropped, kept = by_token(method.predict(images, draw)), by_token(mask_path(method, images, draw))
    predicted = draw.ranks > 0
    torch.testing.assert_close(dropped[predicted], kept[predicted], atol=1e-5, rtol=1e-5)


def test_loss_is_the_mean_square_over_predicted_pixels(method: RandSAC, images: Tensor) -> None:
    draw = method.draw(torch.arange(4))
    errors = []
    with torch.no_grad():
        loss, logs = method(images, draw)
        for image, ranks in zip(images, draw.ranks, strict=True):
            patches = plain.patches(image, 4)
            for token, row in loop_path(method, image, ranks).items():
                errors.append((row - plain.pixel_target(patches[token])).square().mean())
    assert len(errors) == 4 * 60
    assert float(loss) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    assert not logs["loss"].requires_grad and float(logs["loss"]) == float(loss)


def test_an_image_does_not_depend_on_its_batch_mates(method: RandSAC, images: Tensor) -> None:
    draw = rank_draw(SIZES["unequal"], batch=4)
    with torch.no_grad():
        together = method.predict(images, draw)
        for i in range(4):
            alone = method.predict(images[i : i + 1], RankDraw(None, draw.ranks[i : i + 1]))
            torch.testing.assert_close(alone.pred[0], together.pred[i], atol=1e-5, rtol=1e-5)


# 7, 8, 10: masks


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=9))
def test_property_07_masks_of_sorted_tokens_are_block_triangular(sizes: list[int]) -> None:
    ranks = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    whole = segments.rank_mask(ranks, ranks)
    source, target, memory = segments.block_masks(tuple(sizes), torch.device("cpu"))
    begins = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    for mask, first, last in ((whole, 0, len(sizes)), (source, 0, len(sizes) - 1), (target, 1, len(sizes))):
        begin = begins[first]
        for k in range(first, last):
            rows = mask[begins[k] - begin : begins[k + 1] - begin]
            edge = begins[k + 1] - begin
            assert rows[:, :edge].all() and not rows[:, edge:].any()
        assert int(mask.sum()) == sum(sizes[k] * sum(sizes[first : k + 1]) for k in range(first, last))
    assert memory.shape == (sum(sizes[1:]), sum(sizes[:-1]))
    for k in range(1, len(sizes)):
        rows = memory[begins[k] - begins[1] : begins[k + 1] - begins[1]]
        assert rows[:, : begins[k]].all() and not rows[:, begins[k] :].any()


@pytest.mark.parametrize("number", [2, 4, 16, 49])
def test_property_07_share_of_true_with_equal_segments(number: int) -> None:
    ranks = torch.arange(number).repeat_interleave(3)
    assert segments.rank_mask(ranks, ranks).float().mean() == pytest.approx((number + 1) / (2 * number))
    masks = segments.block_masks((3,) * number, torch.device("cpu"))
    for mask in masks:  # with equal segments all three are the same matrix
        assert torch.equal(mask, masks[0])
        assert mask.float().mean() == pytest.approx(number / (2 * (number - 1)))


def test_property_08_no_empty_row_and_no_nan_for_any_number_of_segments(method: RandSAC, images: Tensor) -> None:
    for number in (2, 3, 4, 7, 16, 31, 62, 63, 64):
        draw = rank_draw((N - number + 1, *(1,) * (number - 1)), seed=number)
        for mask in segments.block_masks(draw.sizes, torch.device("cpu")):
            assert mask.any(dim=1).all()
        with torch.no_grad():
            assert method.predict(images[:1], draw).pred.isfinite().all()


def test_property_08_a_mask_with_an_empty_row_is_refused() -> None:
    with pytest.raises(ValueError, match="no key"):
        segments.rank_mask(torch.tensor([0, 1]), torch.tensor([0, 1]), strict=True)
    with pytest.raises(ValueError, match="no key"):
        segments.rank_mask(torch.tensor([0, 1]), torch.tensor([1]))


def test_property_10_raster_tokens_have_causal_masks() -> None:
    for mask in segments.block_masks((1,) * N, torch.device("cpu")):
        assert torch.equal(mask, torch.ones(N - 1, N - 1, dtype=torch.bool).tril())


def test_property_10_two_segments_are_one_step_of_masked_modelling(method: RandSAC, images: Tensor) -> None:
    draw = rank_draw(SIZES["two"])
    masks = segments.block_masks(draw.sizes, torch.device("cpu"))
    assert [tuple(mask.shape) for mask in masks] == [(20, 20), (44, 44), (44, 20)]
    assert all(mask.all() for mask in masks)
    visible = torch.nonzero(draw.ranks[0] == 0).flatten()
    x = plain.embedded(method.encoder, images[0], 4)[visible]
    for block in method.encoder.blocks:
        x = plain.block(block, x)
    method_layers = method.encode(patchify(normalise(images[:1]), 4)[:, visible], visible[None], masks[0], None)
    torch.testing.assert_close(method_layers[-1][0], x.float(), atol=1e-5, rtol=1e-5)


def test_property_10_one_segment_is_refused(tiny_config: Callable[..., Config], method: RandSAC) -> None:
    with pytest.raises(ValueError, match="K >= 2"):
        RankDraw(None, torch.zeros(2, N, dtype=torch.int64))
    with pytest.raises(ValueError, match="K >= 2"):
        dataclasses.replace(method.draw(torch.arange(2)), ranks=torch.zeros(2, N, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"method.segment_size.*K = 1"):
        tiny_config("randsac", method__segment_size=8, method__partition_size=1)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([[0, 0, 2, 2]], "consecutive"),
        ([[1, 1, 2, 2]], "consecutive"),
        ([[0, 0, 1, 1], [0, 0, 2, 2]], "consecutive"),
        ([[0, 1, -2]], "consecutive"),
        ([[0, 1, 1], [0, 0, -1]], "K >= 2"),
    ],
)
def test_ranks_that_cannot_be_trained_on_are_refused(ranks: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankDraw(None, torch.tensor(ranks))


# 13, 14: skip connections and gradients


def test_property_13_skips_start_as_the_plain_decoder(fresh: RandSAC, images: Tensor) -> None:
    draw = fresh.draw(torch.arange(4))
    assert fresh.decoder.skip.shape == (2, 4)
    assert torch.equal(fresh.decoder.skip, torch.tensor([[0.0, 0, 0, 1]] * 2))
    by_rank = draw.ranks.sort(dim=1, stable=True).indices
    source, target = by_rank[:, :60], by_rank[:, 4:]
    masks = segments.block_masks(draw.sizes, torch.device("cpu"))
    patches = segments.gather_tokens(patchify(normalise(images), 4), source)
    with torch.no_grad():
        memory = fresh.encode(patches, source, masks[0], None)[-1]
        y = fresh.decoder.mask_token + fresh.decoder.pos_embed[0][target]
        for block in fresh.decoder.blocks:
            y = block(y, memory, masks[1], masks[2])
        vanilla = fresh.decoder.head(fresh.decoder.norm(y))
        assert torch.equal(fresh.predict(images, draw).pred, vanilla)


def test_property_13_every_skip_weight_has_a_gradient(fresh: RandSAC, method: RandSAC, images: Tensor) -> None:
    for one in (fresh, method):
        one.zero_grad()
        one(images, one.draw(torch.arange(4)))[0].backward()
    # At first each memory is the last layer alone, and its norm takes no notice of how long it is.
    assert fresh.decoder.skip.grad[:, :-1].abs().min() > 1e-5
    assert method.decoder.skip.grad.abs().min() > 1e-5
    assert not takes_decay("decoder.skip", fresh.decoder.skip.shape, OptimConfig())


def test_property_13_a_one_hot_skip_reads_only_its_layer(method: RandSAC) -> None:
    generator = torch.Generator().manual_seed(2)
    layers = [torch.randn(1, 60, 96, generator=generator) for _ in range(4)]
    _, self_mask, memory_mask = segments.block_masks((4,) * 16, torch.device("cpu"))
    ids = torch.arange(4, 64)[None]
    held = method.decoder.skip.detach().clone()
    with torch.no_grad():
        try:
            for one in range(4):
                method.decoder.skip.copy_(torch.eye(4)[one].expand(2, -1))
                before = method.decoder(layers, ids, self_mask, memory_mask)
                for other in range(4):
                    changed = [layer + 3 * (index == other) for index, layer in enumerate(layers)]
                    changed[other] = torch.randn(1, 60, 96, generator=generator)
                    after = method.decoder(changed, ids, self_mask, memory_mask)
                    assert torch.equal(before, after) == (other != one)
        finally:
            method.decoder.skip.copy_(held)


def test_property_14_all_trained_parameters_get_a_gradient_and_positions_none(fresh: RandSAC, images: Tensor) -> None:
    fresh.zero_grad()
    fresh(images, fresh.draw(torch.arange(4)))[0].backward()
    frozen = {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
    assert frozen == {"encoder.pos_embed", "decoder.pos_embed", "encoder.norm.weight", "encoder.norm.bias"}
    for name, parameter in fresh.named_parameters():
        if name in frozen:
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().max() > 0, name
    # Frozen at the identity: evaluation applies the norm that pretraining does not read.
    assert fresh.encoder.norm.weight.eq(1).all() and fresh.encoder.norm.bias.eq(0).all()


# 15, 16: targets and patches


def test_property_15_targets_are_standardised_patches(method: RandSAC, images: Tensor) -> None:
    prediction = method.predict(images, method.draw(torch.arange(4)))
    torch.testing.assert_close(prediction.target.mean(-1), torch.zeros(4, 60), atol=1e-5, rtol=0)
    torch.testing.assert_close(prediction.target.var(-1), torch.ones(4, 60), atol=1e-4, rtol=0)
    patches = plain.patches(images[1], 4)
    for row, token in zip(prediction.target[1], prediction.token_ids[1].tolist(), strict=True):
        torch.testing.assert_close(row, plain.pixel_target(patches[token]).float(), atol=1e-5, rtol=1e-5)


def test_property_15_constant_patches_give_zeros(method: RandSAC) -> None:
    flat = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    gray = (torch.tensor([0.485, 0.456, 0.406]) * 255).view(1, 3, 1, 1).expand(1, 3, 32, 32)  # zero in all channels
    assert method.predict(gray, method.draw(torch.arange(1))).target.abs().max() < 1e-3
    assert standardise(torch.full((2, 48), 7.0)).eq(0).all()
    assert method(flat, method.draw(torch.arange(1)))[0].isfinite()


@pytest.mark.parametrize("width", [48, 768])
def test_property_15_predicting_zero_costs_n_minus_1_over_n(width: int) -> None:
    rows = standardise(torch.randn(500, width, generator=torch.Generator().manual_seed(0)))
    assert float(rows.square().mean()) == pytest.approx((width - 1) / width, abs=1e-5)


def test_property_15_zero_predictor_through_the_method(tiny_config: Callable[..., Config], images: Tensor) -> None:
    method = build_method(tiny_config("randsac"))
    with torch.no_grad():
        method.decoder.head.weight.zero_()
        method.decoder.head.bias.zero_()
        loss, _ = method(images, method.draw(torch.arange(4)))
    assert float(loss) == pytest.approx(47 / 48, abs=1e-4)


def test_property_15_a_perfect_prediction_inverts_to_the_image(images: Tensor) -> None:
    rows = pixel_rows(patchify(normalise(images), 4))
    torch.testing.assert_close(restore_pixels(standardise(rows), rows), rows, atol=1e-5, rtol=1e-5)


def test_property_16_patches_round_trip_in_the_documented_order(images: Tensor) -> None:
    patches = patchify(images, 4)
    assert patches.shape == (4, N, 3, 4, 4)
    assert torch.equal(unpatchify(patches), images)
    assert torch.equal(patches[2, 8 * 3 + 5], images[2, :, 12:16, 20:24])
    rows = pixel_rows(patches)  # pixels in raster order, channels fastest
    assert torch.equal(rows[2, 29, (4 * 1 + 2) * 3 + 1], images[2, 1, 12 + 1, 20 + 2])
    for patch, row in zip(plain.patches(images[0], 4), pixel_rows(patchify(normalise(images[:1]), 4))[0], strict=True):
        torch.testing.assert_close(standardise(row), plain.pixel_target(patch).float(), atol=1e-5, rtol=1e-5)


# 17, 18, 19: segments and orders


@pytest.mark.parametrize(("grid", "size"), [(8, 1), (8, 2), (8, 4), (12, 3), (12, 6), (14, 7)])
def test_property_17_square_segments_are_contiguous_squares(grid: int, size: int) -> None:
    found = segments.square_segments(grid, size).view(grid, grid)
    side = grid // size
    for segment in range(side**2):
        rows, columns = torch.nonzero(found == segment, as_tuple=True)
        top, left = segment // side * size, segment % side * size
        cells = sorted(zip(rows.tolist(), columns.tolist(), strict=True))
        assert cells == [(top + y, left + x) for y in range(size) for x in range(size)]


def test_property_17_segments_that_do_not_tile_are_refused() -> None:
    with pytest.raises(ValueError, match="do not tile"):
        segments.square_segments(14, 4)


def segment_orders(keys: Tensor, partition: Tensor) -> Tensor:
    """Segments in the order of prediction, [B, K]."""
    each, parts = torch.arange(len(partition)).expand(len(keys), -1), partition.expand(len(keys), -1)
    return segments.segment_ranks(keys, each, len(partition), partition=parts).argsort(dim=1)


def neighbours_together(orders: Tensor, partition: Tensor) -> float:
    parts = partition[orders]
    return float((parts[:, 1:] == parts[:, :-1]).float().mean())


def test_property_18_partitions_are_visited_one_after_another() -> None:
    partition = segments.square_segments(4, 2)
    orders = segment_orders(torch.arange(2000), partition)
    blocks = partition[orders].view(2000, 4, 4)
    assert (blocks == blocks[..., :1]).all()
    assert torch.equal(orders.sort(dim=1).values, torch.arange(16).expand(2000, -1))
    assert neighbours_together(orders, partition) == pytest.approx(0.8)


def test_property_18_both_levels_are_random_and_independent() -> None:
    partition = segments.square_segments(4, 2)
    orders = segment_orders(torch.arange(4800), partition)
    parts = {tuple(row) for row in partition[orders[:, ::4]].tolist()}
    assert len(parts) == 24
    for part in range(4):
        inside = orders[partition[orders] == part].view(-1, 4)
        counts = torch.unique(inside, dim=0, return_counts=True)[1]
        assert len(counts) == 24
        assert (counts - 200.0).square().sum() / 200 < 75  # chi square, 23 degrees of freedom: p < 1e-6 beyond


def test_property_18_the_first_segment_is_uniform() -> None:
    first = segment_orders(torch.arange(16_000), segments.square_segments(4, 2))[:, 0].bincount(minlength=16)
    assert (first - 1000.0).square().sum() / 1000 < 60  # chi square, 15 degrees of freedom


@pytest.mark.parametrize("flat", [torch.zeros(16, dtype=torch.int64), torch.arange(16)], ids=["one", "all"])
def test_property_18_one_partition_or_one_a_segment_is_flat(flat: Tensor) -> None:
    orders = segment_orders(torch.arange(4000), flat)
    assert neighbours_together(orders, segments.square_segments(4, 2)) == pytest.approx(0.2, abs=0.01)
    first = orders[:, 0].bincount(minlength=16)
    assert (first - 250.0).square().sum() / 250 < 60


def test_property_18_tokens_of_a_segment_share_its_rank(method: RandSAC) -> None:
    draw = method.draw(torch.arange(5))
    segment = segments.square_segments(8, 2)
    ranks = torch.stack([draw.ranks[:, segment == s] for s in range(16)], dim=1)
    assert (ranks == ranks[..., :1]).all()
    assert draw.sizes == (4,) * 16
    assert not torch.equal(draw.ranks[0], draw.ranks[1])
    corners = segments.square_segments(8, 4)
    for row in draw.ranks:  # four consecutive ranks in each quarter of the image
        assert all(row[corners == quarter].unique().diff().eq(1).all() for quarter in range(4))
        assert all(int(row[corners == quarter].min()) % 4 == 0 for quarter in range(4))


def test_property_19_orders_are_a_function_of_the_key(method: RandSAC) -> None:
    def draws(seed: int, epoch: int, ids: list[int]) -> Tensor:
        return method.draw(torch.from_numpy(sample_keys(seed, epoch, torch.tensor(ids).numpy()))).ranks

    whole = draws(0, 0, [4, 9, 2, 7])
    assert len({tuple(row.tolist()) for row in whole}) == 4  # two images of a batch
    assert not torch.equal(whole, draws(0, 1, [4, 9, 2, 7]))  # two epochs
    assert not torch.equal(whole, draws(1, 0, [4, 9, 2, 7]))  # two seeds
    assert torch.equal(whole[2:], draws(0, 0, [2, 7]))  # any batch, any rank


def test_property_19_nothing_draws_from_a_global_generator(method: RandSAC, images: Tensor) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    draw = method.draw(torch.arange(4))
    loss, _ = method.train()(images, draw)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    again = method.draw(torch.arange(4))
    assert torch.equal(draw.ranks, again.ranks)
    assert float(method(images, again)[0].detach()) == float(loss.detach())


def test_a_draw_keeps_its_sizes_when_it_moves(method: RandSAC) -> None:
    draw: Any = method.draw(torch.arange(4)).to("meta")
    assert draw.ranks.is_meta and draw.sizes == (4,) * 16


def test_figure_is_a_picture_with_a_row_an_image(method: RandSAC, images: Tensor) -> None:
    one, four = (method.figure(images[:n], method.draw(torch.arange(n))) for n in (1, 4))
    assert one.mode == "RGB" and four.height > 2 * one.height
