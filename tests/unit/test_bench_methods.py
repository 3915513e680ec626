"""The methods' benchmark: its arithmetic, its report, and a peer that is shown to compute the same and leaves no trace."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from pipeline.bench import interleaved, methods, peer
from pipeline.cli import app
from pipeline.config import RunFailed, UserError
from pipeline.estimate import flops_per_image
from pipeline.methods import build_method
from pipeline.vit import IMAGE_MEAN, timm

# A stand-in for the peer's checkout: the same names, the same calls of old libraries, an MAE of its own.
STAND_IN = """
import torch
from timm.models.vision_transformer import Block, PatchEmbed
from torch import nn
from util.pos_embed import KIND


class MaskedAutoencoderViT(nn.Module):
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, decoder_embed_dim, decoder_depth,
                 decoder_num_heads, norm_layer, norm_pix_loss):
        super().__init__()
        assert KIND is float and norm_pix_loss
        blocks = lambda width, heads, count: nn.ModuleList(
            Block(width, heads, 4.0, qkv_bias=True, qk_scale=None, norm_layer=norm_layer) for _ in range(count))
        table = lambda *shape: nn.Parameter(torch.randn(1, *shape))
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim)
        tokens = self.patch_embed.num_patches + 1
        self.cls_token, self.pos_embed = table(1, embed_dim), table(tokens, embed_dim)
        self.blocks, self.norm = blocks(embed_dim, num_heads, depth), norm_layer(embed_dim)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token, self.decoder_pos_embed = table(1, decoder_embed_dim), table(tokens, decoder_embed_dim)
        self.decoder_blocks = blocks(decoder_embed_dim, decoder_num_heads, decoder_depth)
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, 3 * patch_size**2)

    def forward(self, imgs, mask_ratio):
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]
        count, tokens, _ = x.shape
        order = torch.rand(count, tokens, device=x.device).argsort(dim=1)
        take = lambda values, ids: values.gather(1, ids[..., None].expand(-1, -1, values.shape[-1]))
        kept = int(tokens * (1 - mask_ratio))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(count, -1, -1), take(x, order[:, :kept])], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        rest = self.mask_token.expand(count, tokens - kept, -1)
        y = take(torch.cat([x[:, 1:], rest], dim=1), order.argsort(dim=1))
        y = torch.cat([x[:, :1], y], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            y = block(y)
        pred = self.decoder_pred(self.decoder_norm(y))[:, 1:]
        side = self.patch_embed.patch_size[0]
        target = imgs.unflatten(2, (-1, side)).unflatten(4, (-1, side)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        losses = take(((pred - target) ** 2).mean(-1, keepdim=True), order[:, kept:])
        return losses.mean(), pred, None
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "mae/util").mkdir(parents=True)
    (tmp_path / "mae/models_mae.py").write_text(STAND_IN)
    (tmp_path / "mae/util/pos_embed.py").write_text("import numpy as np\n\nKIND = np.float\n")
    return tmp_path / "mae"


@pytest.fixture
def tiny(monkeypatch, tiny_config):
    cfgs = {name: tiny_config(name) for name in methods.METHODS}
    monkeypatch.setattr(methods, "configs", lambda model: cfgs)
    monkeypatch.setattr(methods, "SGEMM_SIDE", 64)
    monkeypatch.setattr(interleaved, "TOLERANCE", float("inf"))
    return cfgs


@pytest.fixture
def mae(tiny_config, images):
    """(configuration, MAE, images, draw)."""
    cfg = tiny_config("mae")
    method = build_method(cfg)
    return cfg, method, images, method.draw(torch.arange(len(images)))


def assert_no_trace() -> None:
    assert timm.models.vision_transformer.Block.__module__ == "timm.models.vision_transformer"
    assert not hasattr(np, "float")
    assert torch.rand(2, 3).shape == (2, 3)
    assert "models_mae" not in sys.modules and "util.pos_embed" not in sys.modules


def test_every_contestant_has_a_figure(tiny, checkout):
    calls = []
    rows = methods.run(batch=2, peer=checkout, progress=lambda done, total: calls.append((done, total)))
    assert [row.name for row in rows] == ["mae", "facebookresearch/mae", "pcae", "randsac", "sgemm"]
    assert all(row.cpu_s_per_image > 0 for row in rows)
    flops = {name: flops_per_image(cfg).step for name, cfg in tiny.items()}
    assert [row.flops_per_image for row in rows] == [
        flops["mae"],
        flops["mae"],
        flops["pcae"],
        flops["randsac"],
        2 * 64**3,
    ]
    assert [row.versus for row in rows] == ["facebookresearch/mae", None, "mae", "mae", None]
    assert calls == [(k + 1, 90) for k in range(90)]  # 5 contestants, twice, 8 rounds and one that is not counted


def test_ratios():
    figures = {
        "mae": (2.0, 1.01),
        methods.PEER: (2.5, 0.99),
        "pcae": (3.0, 1.0),
        "randsac": (8.0, 1.0),
        "sgemm": (0.5, 1.0),
    }
    flops = {"mae": 100.0, methods.PEER: 100.0, "pcae": 120.0, "randsac": 500.0, "sgemm": 50.0}
    rows = {row.name: row for row in methods.compare(figures, flops)}
    assert rows["pcae"] == methods.Row("pcae", 3.0, 1.0, 120.0, 0.4, "mae", 1.5, 1.2, 1.25, 1.05)
    assert rows["randsac"].ratio == pytest.approx(4 / 5)
    assert rows["mae"] == methods.Row("mae", 2.0, 1.01, 100.0, 0.5, methods.PEER, 0.8, 1.0, 0.8, 1.0)
    assert rows["sgemm"].cpu_mfu == 1 and rows["sgemm"].ratio is None
    assert "to mae: time 1.500 / FLOPs 1.200 = 1.250 (goal <= 1.05)" in str(rows["pcae"])
    assert "to" not in str(rows[methods.PEER]).removeprefix(methods.PEER)
    without = methods.compare({name: figures[name] for name in figures if name != methods.PEER}, flops)
    assert without[0].ratio is None


def test_the_recipes_are_the_shipped_ones_in_fp32():
    cfgs = methods.configs("vit_s")
    assert [cfg.method.name for cfg in cfgs.values()] == list(methods.METHODS)
    assert {cfg.model.name for cfg in cfgs.values()} == {"vit_s"}
    assert {cfg.engine.precision for cfg in cfgs.values()} == {"fp32"}
    assert [cfg.data.image_size for cfg in cfgs.values()] == [224, 224, 192]
    with pytest.raises(UserError, match="model.name = 'vit_x'"):
        methods.configs("vit_x")


def test_a_step_is_forward_and_backward_of_a_batch_and_leaves_no_gradient():
    layer, seen = nn.Linear(3, 1), []
    layer.weight.register_hook(seen.append)
    assert methods._step(layer, lambda: layer(torch.ones(2, 3)).sum(), 2)(0) == 2
    assert len(seen) == 1 and layer.weight.grad is None


def test_a_restless_machine_gets_no_figure(tiny, monkeypatch):
    monkeypatch.setattr(interleaved, "TOLERANCE", 0.03)
    monkeypatch.setattr(interleaved, "interleave", lambda contestants, *_: {name: (1.0, 0.96) for name in contestants})
    with pytest.raises(RunFailed, match=r"restless.*pcae 0\.960"):
        methods.run(batch=1)


def test_fewer_than_eight_rounds_are_refused():
    with pytest.raises(UserError, match="rounds = 7"):
        methods.run(rounds=7)


def test_the_peer_has_our_loss_and_leaves_no_trace(mae, checkout, monkeypatch):
    cfg, ours, images, draw = mae
    another = ModuleType("util")
    monkeypatch.setitem(sys.modules, "util", another)
    path = list(sys.path)
    theirs, loss = peer.load_peer(checkout, cfg, ours, images, draw)
    assert_no_trace()
    assert sys.path == path and sys.modules["util"] is another
    assert abs(loss().item() - ours(images, draw)[0].item()) <= 1e-5
    assert_no_trace()
    other_draw = ours.draw(torch.arange(10, 10 + len(images)))
    assert abs(loss().item() - ours(images, other_draw)[0].item()) > 1e-4  # the mask matters
    loss().backward()
    assert theirs.decoder_pred.weight.grad is not None
    assert next(theirs.parameters()).data_ptr() not in {p.data_ptr() for p in ours.parameters()}


def test_a_peer_with_another_loss_is_refused(mae, checkout):
    source = STAND_IN.replace("losses.mean()", "losses.mean() + 3e-5")
    (checkout / "models_mae.py").write_text(source)
    with pytest.raises(UserError, match="do not compute the same.*github.com/facebookresearch/mae"):
        peer.load_peer(checkout, *mae)


@pytest.mark.parametrize("files", [
    {},
    {"models_mae.py": STAND_IN},
    {"models_mae.py": "import no_such_library", "util/pos_embed.py": ""},
    {"models_mae.py": "from util.pos_embed import x", "util/pos_embed.py": "x = 1"},
    {"models_mae.py": STAND_IN.replace("norm_pix_loss)", "another)"), "util/pos_embed.py": "KIND = float"},
    {"models_mae.py": STAND_IN.replace("self.decoder_pred", "self.head"), "util/pos_embed.py": "KIND = float"},
], ids=["empty", "no util", "import", "no class", "signature", "weights"])  # fmt: skip
def test_another_folder_is_refused_by_the_repository_s_name(mae, tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="should be a checkout of https://github.com/facebookresearch/mae") as refusal:
        peer.load_peer(tmp_path, *mae)
    assert len(str(refusal.value).splitlines()) == 1
    assert_no_trace()


def test_the_peer_is_given_normalised_images(mae):
    cfg, _, _, draw = mae
    seen = []

    def theirs(inputs, mask_ratio):
        seen.append((inputs, int(cfg.grid**2 * (1 - mask_ratio)), torch.rand(4, 64, device="cpu").argsort(dim=1)))
        return [torch.zeros(())]

    peer.peer_loss(theirs, torch.zeros(4, 3, 32, 32, dtype=torch.uint8), draw)()
    inputs, visible, order = seen[0]
    torch.testing.assert_close(inputs[0, 0, 0, 0], torch.tensor(-IMAGE_MEAN[0] / 0.229))
    assert visible == draw.visible_ids.shape[1]
    assert torch.equal(order, torch.cat([draw.visible_ids, draw.masked_ids], dim=1))


def test_the_report_says_what_and_where(monkeypatch, tmp_path):
    rows = [
        methods.Row("mae", 2.0, 1.01, 1e9, 0.5),
        methods.Row("pcae", 3.0, 1.0, 1e9, 0.4, "mae", 1.5, 1.2, 1.25, 1.05),
    ]
    asked = []
    monkeypatch.setattr(methods, "run", lambda *args, **options: asked.append((args, options)) or rows)
    words = [
        "bench",
        "methods",
        "--model",
        "vit_s",
        "--batch",
        "2",
        "--rounds",
        "9",
        "--out",
        str(tmp_path / "out file.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["/bin/patchmill", *words])
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and "CPU MFU  50%" in result.output
    assert asked[0][0] == ("vit_s",) and asked[0][1]["batch"] == 2 and asked[0][1]["rounds"] == 9
    report = json.loads((tmp_path / "out file.json").read_text())
    assert (
        report["command"]
        == f"patchmill bench methods --model vit_s --batch 2 --rounds 9 --out '{tmp_path}/out file.json'"
    )
    assert report["rows"][1] == {"name": "pcae", "cpu_s_per_image": 3.0, "a_over_a": 1.0, "flops_per_image": 1e9, "cpu_mfu": 0.4,
                                 "versus": "mae", "time_ratio": 1.5, "flop_ratio": 1.2, "ratio": 1.25, "goal": 1.05}  # fmt: skip
    assert report["versions"]["torch"] == torch.__version__ and set(report["versions"]) >= {
        "python",
        "torch",
        "timm",
        "ffcv",
    }
    assert report["hardware"]["cpu"] and report["hardware"]["cpus"] == os.cpu_count()
    assert len(report["load_average"]) == 3 and report["date"].endswith("+00:00")


def test_a_report_that_cannot_be_written_is_refused_before_measuring(monkeypatch, tmp_path):
    monkeypatch.setattr(methods, "run", lambda *args, **options: pytest.fail("measured"))
    for out in (tmp_path / "no/such.json", tmp_path):
        result = CliRunner().invoke(app, ["bench", "methods", "--out", str(out)])
        assert isinstance(result.exception, UserError) and "--out" in str(result.exception)
