"""Fine-tuning: the classifier is timm's, its tokens leave by PCAE's rule, labels and images are mixed as the papers say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from pipeline.augment import _rand_augment
from pipeline.config import ConfigError, UserError, load_config
from pipeline.costs import finetune_tokens
from pipeline.engine.torch import TorchEngine
from pipeline.estimate import flops_per_image
from pipeline.launch import Portion, World
from pipeline.memory import activations, parameters, rate_scale, state
from pipeline.methods import build_method
from pipeline.methods.finetune import LabelDraw, classify, mix_weight, neighbours
from pipeline.optim import build_optimizer
from pipeline.vit import encoder_kwargs, normalise, sincos_2d, timm

LABELS = torch.tensor([3, 0, 9, 3])
KEYS = torch.arange(4)


def shaken(method):
    """Weights at which the head has an opinion."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return method


@pytest.fixture
def classifier(tiny_config):
    return lambda **options: shaken(build_method(tiny_config("finetune", **options)))


@pytest.mark.parametrize("class_token", [True, False])
def test_without_a_drop_it_is_timms_classifier_bit_for_bit(classifier, images, class_token):
    method = classifier(method__class_token=class_token).eval()
    cfg = method.cfg
    stock = timm.create_model(
        cfg.shape.timm_name, **encoder_kwargs(cfg.shape, 32, class_token=class_token, num_classes=10)
    ).eval()
    stock.load_state_dict(method.encoder.state_dict(), strict=True)
    with torch.no_grad():
        logits, average = method.classes(images, method.draw(KEYS))
        assert torch.equal(logits, stock(normalise(images)))
    assert average is None and logits.shape == (4, 10)


def plainly(encoder, pixels: Tensor, drops: tuple[int, ...], ratio: float) -> tuple[Tensor, list[list[int]]]:
    """One image after the other, the cosine matrix written out, no gather."""
    logits, kept_ids = [], []
    for image in pixels:
        x = encoder._pos_embed(encoder.patch_embed(image[None]))
        ids = list(range(x.shape[1] - 1))
        for index, block in enumerate(encoder.blocks):
            x = block(x)
            if index in drops:
                unit = F.normalize(x[0, 1:], dim=-1)
                scores = (unit @ unit.T).mean(1)
                count = int(np.floor(round(len(ids) * (1 - ratio), 6)))
                kept = sorted(range(len(ids)), key=lambda token: float(scores[token]))[:count]
                x = torch.cat([x[:, :1], x[:, [token + 1 for token in kept]]], 1)
                ids = [ids[token] for token in kept]
        logits.append(encoder.head(encoder.fc_norm(x[:, 1:].mean(1)))[0])
        kept_ids.append(ids)
    return torch.stack(logits), kept_ids


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_tokens_leave_by_the_plain_rule_and_the_class_token_never(classifier, images, ratio):
    method = classifier(method__drop_ratio=ratio, method__drop_after="[1, 2]").eval()
    with torch.no_grad():
        logits, stages = classify(method.encoder, normalise(images), None, (1, 2), ratio)
        expected, ids = plainly(method.encoder, normalise(images), (1, 2), ratio)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert [sorted(row) for row in stages[-1].tolist()] == [sorted(row) for row in ids]
    assert [stage.shape[1] for stage in stages] == finetune_tokens(64, 4, (1, 2), ratio)[2:4]
    assert all(set(last) < set(first) for first, last in zip(*(stage.tolist() for stage in stages), strict=True))


def test_who_leaves_gets_no_gradient_afterwards_and_survivors_do(classifier, images):
    method = classifier(method__drop_ratio=0.5, method__drop_after="[1]")
    entered: list[Tensor] = []

    def watch(block, given):
        entered.append(given[0].requires_grad_() if given[0].is_leaf else given[0])
        entered[-1].retain_grad()

    def left(block, given, output):
        output.retain_grad()
        entered.append(output)

    method.encoder.blocks[1].register_forward_hook(left)
    loss, _ = method(images, method.draw(KEYS, labels=LABELS))
    _, stages = classify(method.encoder, normalise(images), None, (1,), 0.5)
    loss.backward()
    gradient = entered[0].grad[:, 1:].abs().sum(-1)
    survives = torch.zeros(4, 64, dtype=torch.bool).scatter(1, stages[0], True)
    assert bool((gradient[survives] > 0).all()) and bool((gradient[~survives] == 0).all())


def test_perturbing_a_dropped_token_afterwards_changes_nothing(classifier, images):
    """What a block is given behind the drop holds survivors alone, in the order of their ids' list."""
    method, seen = classifier(method__drop_ratio=0.5, method__drop_after="[1]").eval(), []
    method.encoder.blocks[2].register_forward_pre_hook(lambda block, given: seen.append(given[0]))
    whole = []
    method.encoder.blocks[1].register_forward_hook(lambda block, given, output: whole.append(output))
    with torch.no_grad():
        _, stages = classify(method.encoder, normalise(images), None, (1,), 0.5)
    rows = whole[0][:, 1:].gather(1, stages[0][..., None].expand(-1, -1, 96))
    assert torch.equal(seen[0], torch.cat([whole[0][:, :1], rows], 1))


PUBLISHED = {0.0: 17.57, 0.1: 15.34, 0.2: 13.19, 0.3: 11.29, 0.4: 9.53}


@pytest.mark.parametrize("ratio", PUBLISHED)
def test_multiply_adds_are_what_torch_counts_and_near_the_published(ratio):
    base = ["run.dir=x", "data.train=x", f"method.drop_ratio={ratio}"]
    cfg = load_config(["eval/finetune_vit_b"], base)
    method = build_method(cfg, "meta")
    with FlopCounterMode(display=False) as counter:
        method.classes(
            torch.empty(1, 3, 224, 224, dtype=torch.uint8, device="meta"), method.draw(torch.arange(1)).to("meta")
        )
    told = flops_per_image(cfg).forward
    assert told == pytest.approx(counter.get_total_flops(), rel=0.001)
    assert told / 2e9 == pytest.approx(PUBLISHED[ratio], rel=0.01)


def test_a_ratio_may_change_afterwards_and_nothing_else_with_it(classifier, images):
    method, other = classifier(), classifier(method__drop_ratio=0.4)
    assert {n: p.shape for n, p in method.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    assert method.drops == () and other.drops == (0, 2)
    counts = [
        classify(other.encoder, normalise(images), None, (0, 2), ratio)[1][-1].shape[1] for ratio in (0.1, 0.2, 0.4)
    ]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 3


def test_smoothing_and_mixing_are_the_papers(classifier, images):
    method = classifier(method__smoothing=0.1).eval()
    draw = method.draw(KEYS, labels=LABELS)
    prediction = method.predict(images, draw)
    loss, _ = method(images, draw)
    assert loss.item() == pytest.approx(
        F.cross_entropy(prediction.pred[:, 0], LABELS, label_smoothing=0.1).item(), rel=1e-6
    )
    weight = torch.full((32, 32), 0.3)
    weight[:8] = 0
    mixed = replace(draw, weight=weight, share=weight.mean())
    partner = torch.tensor([1, 0, 3, 2])
    pixels = weight * normalise(images) + (1 - weight) * normalise(images)[partner]
    logits, _ = classify(method.encoder, pixels, None, (), 0.0)
    share = float(weight.mean())
    expected = share * F.cross_entropy(logits, LABELS, label_smoothing=0.1)
    expected += (1 - share) * F.cross_entropy(logits, LABELS[partner], label_smoothing=0.1)
    assert float(method(images, mixed)[0]) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(neighbours(LABELS), LABELS[partner])


def test_a_batch_is_mixed_the_same_however_it_is_split(classifier, images):
    method = classifier(method__mixup=0.8, method__cutmix=1.0)
    whole = method.draw(KEYS, labels=LABELS)
    parts = [method.draw(KEYS[part], KEYS[:1], LABELS[part]) for part in (slice(2), slice(2, 4))]
    assert all(torch.equal(part.weight, whole.weight) for part in parts)
    losses = [float(method(images[part], draw)[0]) for part, draw in zip((slice(2), slice(2, 4)), parts, strict=True)]
    assert float(method(images, whole)[0]) == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert not torch.equal(method.draw(KEYS + 1, labels=LABELS).weight, whole.weight)


def test_mixup_and_cutmix_come_by_even_chance_with_the_shares_of_their_beta():
    weights = [mix_weight(key, 32, 0.8, 1.0) for key in range(600)]
    boxed = [weight for weight in weights if bool((weight == 0).any())]
    assert 230 < len(boxed) < 370
    assert all(bool(((weight == 0) | (weight == 1)).all()) for weight in boxed)
    rows = [(weight == 0).any(1).nonzero().flatten() for weight in boxed]
    assert all(int(row[-1] - row[0]) == len(row) - 1 for row in rows), "a box has no holes"
    rng = np.random.default_rng(
        0
    )  # cutmix's share is uniform: its box has the root of the rest as side, cut at the edges
    side, centre = 32 * (1 - rng.random(20_000)) ** 0.5, rng.integers(32, size=20_000)
    height = np.minimum(32, centre + side / 2) - np.maximum(0, centre - side / 2)
    assert np.mean([len(row) for row in rows]) == pytest.approx(height.mean(), rel=0.06)
    even = [float(weight[0, 0]) for weight in weights if float(weight.min()) == float(weight.max())]
    assert np.mean(even) == pytest.approx(0.5, abs=0.06)
    assert np.var(even) == pytest.approx(0.25 / (2 * 0.8 + 1), rel=0.2)  # of Beta(a, a): 1 / (4 (2 a + 1))
    assert mix_weight(5, 32, 0, 0) is None
    assert all(float((w := mix_weight(key, 32, 0.8, 0)).max()) == float(w.min()) for key in range(20))
    assert all(bool(((w := mix_weight(key, 32, 0, 1.0)) == 0).any() or (w == 1).all()) for key in range(20))


def test_an_odd_micro_batch_cannot_be_mixed(tiny_config):
    cfg = tiny_config("finetune", method__mixup=0.8, train__micro_batch=1)
    with pytest.raises(UserError, match=r"train.micro_batch = 1: should be even"):
        Portion.of(cfg, World())
    assert Portion.of(tiny_config("finetune", train__micro_batch=1), World()).micro == 1


def test_rates_and_decay_are_timms_by_layer(tiny_config):
    from timm.optim import param_groups_layer_decay  # beside a CPU-only torch timm loads after pipeline.vit only

    cfg = tiny_config("finetune", optim__layer_decay=0.65, optim__weight_decay=0.05)
    method = build_method(cfg)
    optimizer = build_optimizer(method.named_parameters(), cfg.optim, cfg.shape.depth)
    ours = {id(p): (g["scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    groups = param_groups_layer_decay(method.encoder, weight_decay=0.05, layer_decay=0.65,
                                                 no_weight_decay_list=("pos_embed", "cls_token"))  # fmt: skip
    theirs = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert ours.keys() == theirs.keys()
    top = max(scale for scale, _ in theirs.values())
    assert top == 1.0
    for name, parameter in method.named_parameters():
        if "fc_norm" not in name:  # MAE's code gives it the head's rate; timm has it with the last block
            assert ours[id(parameter)] == pytest.approx(theirs[id(parameter)]), name
    assert rate_scale("encoder.fc_norm.weight", 4, cfg.optim) == 1.0
    assert rate_scale("encoder.blocks.0.norm1.weight", 4, cfg.optim) == pytest.approx(0.65**4)


def test_the_engine_gives_each_group_its_rate(tiny_config, images):
    cfg = tiny_config("finetune", optim__layer_decay=0.5, optim__weight_decay=0.0)
    engine = TorchEngine(cfg, torch.device("cpu"))
    before = engine.full_params()
    engine.micro_step(images, engine.method.draw(KEYS, labels=LABELS), 1, True)
    engine.step(1e-2, None, 1.0)
    moved = {name: float((value - before[name]).abs().max()) for name, value in engine.full_params().items()}
    assert moved["encoder.head.bias"] == pytest.approx(1e-2, rel=0.01)  # Adam's first step is the rate itself
    assert moved["encoder.blocks.1.mlp.fc2.bias"] == pytest.approx(1e-2 * 0.5**3, rel=0.02)
    assert moved["encoder.pos_embed"] == pytest.approx(1e-2 * 0.5**5, rel=0.02)


@pytest.mark.parametrize("options", [{}, {"method__class_token": False}, {"optim__ema": 0.9}], ids=str)
def test_parameters_and_state_are_torchs(tiny_config, images, options):
    cfg = tiny_config("finetune", **options)
    named = {name: (tuple(p.shape), p.requires_grad) for name, p in build_method(cfg, "meta").named_parameters()}
    assert {p.name: (p.shape, p.trained) for p in parameters(cfg)} == named
    engine = TorchEngine(cfg, torch.device("cpu"))
    engine.micro_step(images, engine.method.draw(KEYS, labels=LABELS), 1, True)
    held, told = sum(value.nbytes for value in engine.ema.values()), state(cfg)
    assert told.average == held and (held > 0) == ("optim__ema" in options)
    assert told.weights == sum(p.to_local().nbytes for p in engine.named.values())
    assert all(parameter.grad is not None for parameter in engine.trained)


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_activations_are_what_autograd_keeps(tiny_config, ratio):
    cfg = tiny_config("finetune", model__name="vit_s", data__image_size=224, method__drop_ratio=ratio)
    method, kept = build_method(cfg), {}
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        method(torch.zeros(1, 3, 224, 224, dtype=torch.uint8), method.draw(torch.arange(1), labels=LABELS[:1]))
    found = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    assert activations(cfg, "none").kept == pytest.approx(found, rel=0.02)


def test_positions_of_another_size_lie_between_those_of_pretraining():
    table = sincos_2d(8, 96, class_token=False, stretched_from=4)[0].view(8, 8, 96)
    coarse = sincos_2d(4, 96, class_token=False)[0].view(4, 4, 96)
    assert torch.equal(sincos_2d(8, 96, class_token=True, stretched_from=8), sincos_2d(8, 96, class_token=True))
    # Patches 0 and 1 of the finer grid lie a quarter of a coarse patch before and behind the centre of coarse patch 0.
    angle = torch.atan2(table[0, :2, 0], table[0, :2, 24])
    torch.testing.assert_close(angle, torch.tensor([-0.25, 0.25]), atol=1e-6, rtol=0)
    assert float((table[0, 0] - coarse[0, 0]).norm()) < float((table[0, 0] - coarse[1, 1]).norm())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method__drop_ratio": 0.3, "method__drop_after": "[4]"}, r"method.drop_after = \[4\]: should be below 4"),
        (
            {"method__drop_ratio": 0.99, "method__drop_after": "[0, 1]"},
            "method.drop_ratio = 0.99: leaves no patch after 2 drops",
        ),
        ({"method__num_classes": 1}, "method.num_classes = 1"),
        ({"optim__layer_decay": 1.5}, "optim.layer_decay = 1.5"),
        ({"optim__ema_batch": 1}, "optim.ema_batch = 1: makes optim.ema_end|optim.ema_batch"),
    ],
)
def test_what_cannot_be_is_told_with_its_key(tiny_config, options, told):
    with pytest.raises(ConfigError, match=told):
        tiny_config("finetune", **({"optim__ema": 0.5} if "optim__ema_batch" in options else {}), **options)


def test_its_features_are_those_of_the_probes(classifier, images):
    from pipeline.evaluate.features import extract
    from pipeline.runs import open_images

    method = classifier().eval()
    loader = open_images(method.cfg, "train", augment=False)
    with loader.batches(iter([(0, np.arange(8))])) as batches:
        batch = next(batches)
    with torch.no_grad():
        own = method.features(batch.images, method.draw(batch.keys))
    found = extract(method.encoder, loader, batch_size=8, device="cpu").features[:8]
    torch.testing.assert_close(own, found, atol=1e-5, rtol=1e-5)


def test_a_draw_without_labels_is_for_looking_only(classifier, images):
    method = classifier(method__drop_ratio=0.3)
    draw = method.draw(KEYS)
    assert isinstance(draw, LabelDraw) and method.figure(images, draw).size[0] > 100
    with pytest.raises(RuntimeError):
        method(images, draw)


def test_rand_augment_interpolates_as_maes_fine_tuning_does():
    policy = _rand_augment("rand-m9-mstd0.5-inc1", 32)
    drawn = {operation.kwargs["resample"] for operation in policy.ops}
    assert drawn == {Image.Resampling.BICUBIC}
