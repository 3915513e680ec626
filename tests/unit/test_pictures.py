"""What the pictures show, beside plain references: attention, generation step by step, kept tokens, loss by rank."""

from collections.abc import Callable
from fractions import Fraction

import plain
import pytest
import torch
from torch import Tensor

from pipeline import pictures
from pipeline.config import Config
from pipeline.methods import build_method
from pipeline.methods.common import Draw, panels, rows_to_image
from pipeline.methods.pcae import PCAE
from pipeline.methods.randsac import RandSAC
from pipeline.vit import normalise, patchify, pixel_rows

N = 64


def make(tiny_config: Callable[..., Config], name: str, **settings: object) -> torch.nn.Module:
    method = build_method(tiny_config(name, **settings))
    plain.shake(method)
    return method.eval()


@pytest.fixture(scope="module")
def randsac(tiny_config: Callable[..., Config]) -> RandSAC:
    return make(tiny_config, "randsac")


def rows_of(images: Tensor) -> Tensor:
    return pixel_rows(patchify(normalise(images), 4))


def painted(steps: list[Tensor]) -> list[Tensor]:
    """Which patches of each step are not blank, [B, N]."""
    return [(step != pictures.BLANK).any(-1) for step in steps]


@pytest.mark.parametrize("name", ["mae", "randsac"])
@pytest.mark.parametrize("block", [0, 2])
def test_attention_is_the_softmax_of_a_plain_reference(
    tiny_config: Callable[..., Config], images: Tensor, name: str, block: int
) -> None:
    encoder = make(tiny_config, name).encoder
    prefix = encoder.num_prefix_tokens
    with torch.no_grad():
        maps = pictures.attention_maps(encoder, images, block)
        for image, found in zip(images, maps, strict=True):
            rows = plain.embedded(encoder, image, 4)
            if prefix:
                rows = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1])[0], rows])
            for module in encoder.blocks[:block]:
                rows = plain.block(module, rows)
            module = encoder.blocks[block]
            q, k, _ = plain.linear(module.attn.qkv, plain.layer_norm(module.norm1, rows)).chunk(3, -1)
            for head, (one_q, one_k) in enumerate(zip(plain.heads_of(q, 3), plain.heads_of(k, 3), strict=True)):
                scores = torch.exp(one_q @ one_k.T / 32**0.5)
                shares = scores / scores.sum(1, keepdim=True)
                expected = shares[0, 1:] if prefix else shares.mean(0)
                torch.testing.assert_close(found[head], expected.float(), rtol=1e-4, atol=1e-6)


def test_normed_queries_and_keys_are_used(images: Tensor) -> None:
    attention = pictures.Attention(8, 2, qkv_bias=True, qk_norm=True, norm_layer=torch.nn.LayerNorm)
    plain.shake(attention, 0.5)
    x = plain.random_tokens(2, 5, 8)
    weights = pictures.attention_weights(attention, x)
    v = attention.qkv(x)[..., 16:].unflatten(2, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(attention.proj((weights @ v).transpose(1, 2).flatten(2)), attention(x))


@pytest.mark.parametrize("settings", [
    {}, {"method__predict_first": True}, {"method__normalise_target": False}, {"method__token_keep": 0.5},
    {"method__segments": "blob", "method__num_segments": 5, "method__num_partitions": 2},
], ids=str)  # fmt: skip
def test_a_teacher_forced_step_is_the_truth_before_a_segment_and_its_prediction(
    tiny_config: Callable[..., Config], images: Tensor, settings: dict[str, object]
) -> None:
    method = make(tiny_config, "randsac", **settings)
    draw, first = method.draw(torch.arange(4)), int(not settings.get("method__predict_first"))
    steps, rows = pictures.teacher_forced(method, images, draw), rows_of(images)
    assert len(steps) == int(draw.ranks.max()) + 1
    with torch.no_grad():
        prediction = method.predict(images, draw)
    for image in range(4):
        where = {int(token): place for place, token in enumerate(prediction.token_ids[image])
                 if prediction.weight[image, place]}  # fmt: skip
        for step, picture in enumerate(steps):
            for token in range(N):
                rank, true = int(draw.ranks[image, token]), rows[image, token]
                if rank < 0 or rank > step:
                    expected = torch.full_like(true, pictures.BLANK)
                elif rank < step or rank < first:
                    expected = true
                else:
                    expected = prediction.pred[image, where[token]]
                    if method.method.normalise_target:
                        expected = expected * (true.var() + 1e-6).sqrt() + true.mean()
                torch.testing.assert_close(picture[image, token], expected, rtol=1e-4, atol=1e-5)


def test_free_generation_knows_nothing_but_the_first_segment(randsac: RandSAC, images: Tensor) -> None:
    draw = randsac.draw(torch.arange(4))
    hidden = (draw.ranks > 0).view(4, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    steps, other = (
        pictures.generate(randsac, some, draw) for some in (images, torch.where(hidden, 255 - images, images))
    )
    assert len(steps) == 16 and all(torch.equal(a, b) for a, b in zip(steps, other, strict=True))
    changed = pictures.generate(randsac, torch.where(hidden, images, 255 - images), draw)
    assert not torch.equal(steps[-1], changed[-1])
    assert torch.equal(steps[0], torch.where((draw.ranks == 0)[..., None], rows_of(images), pictures.BLANK))
    for rank, seen in enumerate(painted(steps)):
        assert torch.equal(seen, draw.ranks <= rank)


def test_free_generation_feeds_each_prediction_back(randsac: RandSAC, images: Tensor) -> None:
    draw, true = randsac.draw(torch.arange(4)), rows_of(images)
    steps, given = pictures.generate(randsac, images, draw), (draw.ranks == 0)
    for rank in (1, 2, 15):
        before = torch.from_numpy(rows_to_image(steps[rank - 1])).permute(0, 3, 1, 2)
        with torch.no_grad():
            prediction = randsac.predict((255 * before).round().to(torch.uint8), draw)
        for image in range(4):
            first = true[image, given[image]]
            chosen = draw.ranks[image, prediction.token_ids[image]] == rank
            expected = prediction.pred[image, chosen] * (first.var(1) + 1e-6).sqrt().mean() + first.mean()
            found = steps[rank][image, prediction.token_ids[image, chosen]]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_free_generation_of_the_first_segment_too_uses_no_pixel(
    tiny_config: Callable[..., Config], images: Tensor
) -> None:
    for normalised in (True, False):
        method = make(tiny_config, "randsac", method__predict_first=True, method__normalise_target=normalised)
        draw = method.draw(torch.arange(4))
        steps, other = (pictures.generate(method, some, draw) for some in (images, 255 - images))
        assert len(steps) == 16 and torch.equal(steps[-1], other[-1]) and bool(painted(steps)[-1].all())
        prediction = method.predict(images, draw)  # nothing is before rank 0: the same from any image
        chosen = draw.ranks.gather(1, prediction.token_ids) == 0
        found = steps[0].gather(1, prediction.token_ids[..., None].expand_as(prediction.pred))
        torch.testing.assert_close(found[chosen], prediction.pred[chosen], rtol=1e-4, atol=1e-5)


def test_kept_tokens_are_those_of_a_plain_teacher_on_the_whole_image(
    tiny_config: Callable[..., Config], images: Tensor
) -> None:
    method: PCAE = make(tiny_config, "pcae")  # type: ignore[assignment]
    stages = pictures.kept_tokens(method, images, method.draw(torch.arange(4)), plain.as_teacher(method))
    assert [stage.sum(1).tolist() for stage in stages] == [[32] * 4, [16] * 4, [8] * 4]
    with torch.no_grad():
        for image in range(4):
            _, expected = plain.plain_teacher(
                method.encoder, images[image], list(range(N)), Fraction(1, 2), method.drops
            )
            assert [set(stage[image].nonzero()[:, 0].tolist()) for stage in stages] == expected


def test_kept_tokens_come_from_the_teacher_and_from_the_random_control(
    tiny_config: Callable[..., Config], images: Tensor
) -> None:
    method: PCAE = make(tiny_config, "pcae")  # type: ignore[assignment]
    teacher = plain.as_teacher(method)
    plain.shake(teacher.requires_grad_(True), 0.3)
    draw = method.draw(torch.arange(4))
    ours, theirs = (pictures.kept_tokens(method, images, draw, one)[-1] for one in (None, teacher))
    assert not torch.equal(ours, theirs)
    control: PCAE = make(tiny_config, "pcae", method__selection="random")  # type: ignore[assignment]
    draw = control.draw(torch.arange(4))
    for stage, number in zip(pictures.kept_tokens(control, images, draw, None), (32, 16, 8), strict=True):
        assert torch.equal(stage, draw.priority < number)


def test_what_is_dropped_is_faded(images: Tensor) -> None:
    kept = torch.arange(N).expand(4, -1) % 3 == 0
    before, after = (
        torch.from_numpy(rows_to_image(rows)) for rows in (rows_of(images), pictures.dimmed(rows_of(images), kept))
    )
    mask = kept.view(4, 8, 8, 1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(after, torch.where(mask, before, 0.2 * before + 0.8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"method__predict_first": True}, {"method__token_keep": 0.5},
                                      {"method__segments": "blob", "method__num_segments": 5, "method__num_partitions": 2}],
                         ids=str)  # fmt: skip
def test_losses_by_rank_are_means_over_an_images_tokens(
    tiny_config: Callable[..., Config], images: Tensor, settings: dict[str, object]
) -> None:
    method = make(tiny_config, "randsac", **settings)
    draw = method.draw(torch.arange(4))
    found = pictures.losses_by_rank(method, images, draw)
    with torch.no_grad():
        prediction = method.predict(images, draw)
    assert found.shape == (4, int(draw.ranks.max()) + 1)
    for image in range(4):
        for rank in range(found.shape[1]):
            errors = [float((prediction.pred[image, place] - prediction.target[image, place]).square().mean())
                      for place, token in enumerate(prediction.token_ids[image])
                      if draw.ranks[image, token] == rank and prediction.weight[image, place]]  # fmt: skip
            expected = sum(errors) / len(errors) if errors else float("nan")
            assert float(found[image, rank]) == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert bool(found[:, 0].isnan().all()) is not settings.get("method__predict_first", False)


def test_the_plot_of_losses_has_mean_and_spread_of_the_ranks_that_there_are() -> None:
    nan = float("nan")
    figure = pictures.draw_losses(torch.tensor([[nan, 1.0, 3.0], [nan, 3.0, nan]]), "title", "loss")
    (axes,) = figure.axes
    (line,) = axes.lines
    assert line.get_xdata().tolist() == [1, 2] and line.get_ydata().tolist() == [2, 3]
    heights = {(float(x), float(y)) for x, y in axes.collections[0].get_paths()[0].vertices}
    assert heights == {(1, 1), (1, 3), (2, 3)}
    assert "rank" in axes.get_xlabel() and axes.get_ylabel() == "loss" and axes.get_title() == "title"


def test_a_title_makes_room_for_itself_and_none_changes_nothing(images: Tensor) -> None:
    columns = [("image", list(rows_to_image(rows_of(images))))] * 2
    plain_size, titled, longer = (panels(columns, title).size for title in ("", "short", "a longer title " * 9))
    assert plain_size[0] == titled[0] == longer[0] and plain_size[1] < titled[1] < longer[1]


@pytest.mark.parametrize("name", ["mae", "pcae", "randsac"])
def test_features_are_those_that_the_probes_see(tiny_config: Callable[..., Config], images: Tensor, name: str) -> None:
    method = make(tiny_config, name)
    with torch.no_grad():
        tokens = method.encoder.forward_features(normalise(images))[:, method.encoder.num_prefix_tokens :]
        torch.testing.assert_close(method.features(images, Draw(None)), tokens.mean(1), rtol=1e-4, atol=1e-5)
