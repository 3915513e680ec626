"""MAE, and what all methods share: positions, first weights, stochastic depth, the shape of timm's encoder."""

import dataclasses
from collections.abc import Callable

import plain
import pytest
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.methods import build_method
from pipeline.methods.common import Prediction, token_mean
from pipeline.methods.mae import MAE
from pipeline.vit import encode_visible, encoder_kwargs, normalise, sincos_2d, timm

METHODS = ("randsac", "pcae", "mae")
N, V, M = 64, 16, 48


@pytest.fixture(scope="module")
def method(tiny_config: Callable[..., Config]) -> MAE:
    """Every weight off its first value."""
    method = build_method(tiny_config("mae"))
    plain.shake(method)
    return method


def pixels_of(ids: Tensor) -> Tensor:
    tokens = torch.zeros(len(ids), N, dtype=torch.bool).scatter(1, ids, True)
    return tokens.view(-1, 1, 8, 8).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def test_visible_and_masked_are_a_permutation_of_the_key(method: MAE) -> None:
    draw = method.draw(torch.arange(20))
    assert draw.visible_ids.shape == (20, V) and draw.masked_ids.shape == (20, M)
    both = torch.cat([draw.visible_ids, draw.masked_ids], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(N).expand(20, -1))
    assert torch.equal(method.draw(torch.arange(15, 20)).masked_ids, draw.masked_ids[15:])


def test_prediction_and_loss_equal_the_plain_ones(method: MAE, images: Tensor) -> None:
    draw = method.draw(torch.arange(2))
    errors = []
    with torch.no_grad():
        prediction = method.predict(images[:2], draw)
        loss, logs = method(images[:2], draw)
        for i in range(2):
            visible, masked = draw.visible_ids[i].tolist(), draw.masked_ids[i].tolist()
            assert prediction.token_ids[i].tolist() == masked
            encoded = plain.encode_visible(method.encoder, images[i], 4, visible)
            rows = plain.mask_decoder(method.decoder, encoded, visible, masked)
            patches = plain.patches(images[i], 4)
            targets = torch.stack([plain.pixel_target(patches[token]) for token in masked])
            torch.testing.assert_close(prediction.pred[i], rows.float(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(prediction.target[i], targets.float(), atol=1e-5, rtol=1e-5)
            errors.append((rows - targets).square().mean())
    assert float(loss) == pytest.approx(float(sum(errors)) / 2, rel=1e-5)
    assert prediction.weight.eq(1).all() and float(logs["loss"]) == float(loss)


def test_masked_pixels_do_not_reach_the_prediction(method: MAE, images: Tensor) -> None:
    draw = method.draw(torch.arange(4))
    noise = 2550 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    masked = torch.where(pixels_of(draw.masked_ids), noise, images.float())
    visible = torch.where(pixels_of(draw.visible_ids), noise, images.float())
    with torch.no_grad():
        before = method.predict(images.float(), draw)
        assert torch.equal(before.pred, method.predict(masked, draw).pred)
        assert not torch.equal(before.target, method.predict(masked, draw).target)
        assert not torch.equal(before.pred, method.predict(visible, draw).pred)
        assert torch.equal(before.target, method.predict(visible, draw).target)


def test_all_trained_parameters_get_a_gradient(tiny_config: Callable[..., Config], images: Tensor) -> None:
    method = build_method(tiny_config("mae"))
    method(images, method.draw(torch.arange(4)))[0].backward()
    frozen = {name for name, parameter in method.named_parameters() if not parameter.requires_grad}
    assert frozen == {"encoder.pos_embed", "decoder.pos_embed"}
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) if name in frozen else (parameter.grad.abs().max() > 0), name


def test_loss_is_the_mean_over_images_of_their_weighted_means() -> None:
    losses = torch.tensor([[1.0, 3.0, 100.0], [10.0, 20.0, 30.0]])
    weight = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert float(token_mean(losses, weight)) == (2 + 10) / 2
    assert not token_mean(losses, weight * 0).isfinite()


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_means_the_same_however_it_is_split(
    tiny_config: Callable[..., Config], images: Tensor, name: str
) -> None:
    method = build_method(tiny_config(name))
    with torch.no_grad():
        whole = float(method(images, method.draw(torch.arange(4)))[0])
        parts = [float(method(images[i : i + 2], method.draw(torch.arange(i, i + 2)))[0]) for i in (0, 2)]
    assert whole == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_normalise_is_imagenets_in_fp32() -> None:
    black, white = (torch.full((1, 3, 2, 2), value, dtype=torch.uint8) for value in (0, 255))
    torch.testing.assert_close(
        normalise(black)[0, :, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    )
    torch.testing.assert_close(
        normalise(white)[0, :, 1, 1], torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])
    )
    assert normalise(white).dtype == torch.float32


@pytest.mark.parametrize("class_token", [True, False])
def test_positions_are_two_dimensional_sines_and_cosines(class_token: bool) -> None:
    table = sincos_2d(5, 24, class_token=class_token)[0]
    if class_token:
        assert table[0].eq(0).all()
        table = table[1:]
    torch.testing.assert_close(table, torch.from_numpy(plain.sincos(5, 24)).float(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(5, 26, class_token=class_token)


@pytest.mark.parametrize("name", METHODS)
def test_first_weights_depend_on_seed_and_name_alone(tiny_config: Callable[..., Config], name: str) -> None:
    def weights(**overrides: object) -> dict[str, Tensor]:
        return build_method(tiny_config(name, **overrides)).state_dict()

    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = weights()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    again, other, deeper = weights(), weights(train__seed=1), weights(method__decoder_depth=3)
    assert all(torch.equal(value, again[key]) for key, value in one.items())
    assert all(torch.equal(value, deeper[key]) for key, value in one.items() if key != "decoder.skip")
    for key, value in one.items():
        random = key.endswith(("_token", "weight")) and value.dim() > 1
        assert torch.equal(value, other[key]) != random, key
    matrices = [value for value in one.values() if value.shape == (96, 96)]
    assert len({float(value.flatten()[0]) for value in matrices}) == len(matrices)


@pytest.mark.parametrize("name", METHODS)
def test_first_weights_follow_maes_rule(tiny_config: Callable[..., Config], name: str) -> None:
    method = build_method(tiny_config(name))
    for key, value in method.named_parameters():
        if key.endswith("token"):
            assert 0.012 < float(value.detach().std()) < 0.03, key
        elif key.endswith("bias"):
            assert value.eq(0).all(), key
        elif "norm" in key:
            assert value.eq(1).all(), key
        elif key.endswith("weight"):
            out, fan_in = value.flatten(1).shape
            bound = (6 / (out + fan_in)) ** 0.5
            assert float(value.detach().abs().max()) <= bound
            assert float(value.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    grid = torch.from_numpy(plain.sincos(8, 96)).float()
    torch.testing.assert_close(method.encoder.pos_embed[0, -N:].detach(), grid, atol=1e-6, rtol=0)
    torch.testing.assert_close(method.decoder.pos_embed[0, -N:].detach(), grid, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_encoder_loads_into_timm_and_gives_the_same_features(
    tiny_config: Callable[..., Config], images: Tensor, name: str
) -> None:
    cfg = tiny_config(name)
    method = build_method(cfg)
    plain.shake(method)
    options = encoder_kwargs(cfg.shape, 32, class_token=name != "randsac")
    stock = timm.create_model(cfg.shape.timm_name, **options).eval()
    stock.load_state_dict(method.encoder.state_dict(), strict=True)
    with torch.no_grad():
        expected = stock.forward_features(normalise(images))
        torch.testing.assert_close(method.encoder.forward_features(normalise(images)), expected, atol=1e-5, rtol=1e-5)
        if name != "randsac":
            patches = normalise(images).unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
            ours = encode_visible(method.encoder, patches, torch.arange(N).expand(4, -1), None)
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_stochastic_depth_comes_from_the_draw(tiny_config: Callable[..., Config], images: Tensor, name: str) -> None:
    method = build_method(tiny_config(name, model__drop_path=0.6))
    draw = method.draw(torch.arange(2000))
    assert draw.drop_path.shape == (4, 2, 2000) and draw.drop_path.dtype == torch.bool
    shares = 1 - draw.drop_path.double().mean(dim=(1, 2))
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.2, 0.4, 0.6]).double(), atol=0.03, rtol=0)
    assert not torch.equal(draw.drop_path[3, 0], draw.drop_path[3, 1])
    assert build_method(tiny_config(name)).draw(torch.arange(3)).drop_path is None
    small = method.draw(torch.arange(4))
    assert torch.equal(small.drop_path, draw.drop_path[..., :4])
    with torch.no_grad():
        torch.manual_seed(0)
        first = float(method.train()(images, small)[0])
        torch.manual_seed(1)
        assert float(method.eval()(images, small)[0]) == first
        assert float(method(images, dataclasses.replace(small, drop_path=None))[0]) != first


def test_a_dropped_branch_adds_nothing_and_a_kept_one_is_scaled_up(tiny_config: Callable[..., Config]) -> None:
    block = build_method(tiny_config("mae", model__drop_path=0.6)).encoder.blocks[3]
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[True, False, False], [True, True, False]])
    with torch.no_grad():
        out = block(x, factors=block.factors(keep))
        middle = x + block.attn(block.norm1(x)) / 0.4 * keep[0].float()[:, None, None]
        expected = middle + block.mlp(block.norm2(middle)) / 0.4 * keep[1].float()[:, None, None]
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(out[2], x[2])


@pytest.mark.parametrize("name", METHODS)
def test_the_face_of_a_method(tiny_config: Callable[..., Config], images: Tensor, name: str) -> None:
    cfg = tiny_config(name, method__decoder_depth=2)
    method = build_method(cfg)
    assert method.layers() == [*method.encoder.blocks, *method.decoder.blocks]
    assert (method.build_teacher() is not None) == (name == "pcae")
    prediction = method.predict(images, method.draw(torch.arange(4)))
    assert isinstance(prediction, Prediction)
    assert prediction.pred.shape == prediction.target.shape
    assert prediction.token_ids.shape == prediction.weight.shape == prediction.pred.shape[:2]
    assert prediction.pred.dtype == prediction.target.dtype == torch.float32
    draw = method.draw(torch.arange(4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        draw.drop_path = None  # type: ignore[misc]
    meta = build_method(cfg, "meta")
    assert {key: value.shape for key, value in meta.state_dict().items()} == {
        key: value.shape for key, value in method.state_dict().items()}  # fmt: skip


def test_figure_is_a_picture_with_a_row_an_image(method: MAE, images: Tensor) -> None:
    one, four = (method.figure(images[:n], method.draw(torch.arange(n))) for n in (1, 4))
    assert one.mode == "RGB" and four.height > 2 * one.height
