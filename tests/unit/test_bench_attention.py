"""The benchmark of RandSAC's mask: which masks, where they go, and its arithmetic."""

import json

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from typer.testing import CliRunner

from pipeline.bench import attention, interleaved
from pipeline.cli import app
from pipeline.config import RunFailed, UserError

NAMES = [f"{part}, {mask}" for part in attention.PARTS for mask in attention.MASKS]


@pytest.fixture
def tiny(monkeypatch, tiny_config):
    cfg = tiny_config("randsac")  # 64 tokens, 4 blocks
    monkeypatch.setattr(attention, "config", lambda: cfg)
    monkeypatch.setattr(interleaved, "TOLERANCE", float("inf"))
    return cfg


def test_the_shape_is_vit_b_at_196_tokens():
    cfg = attention.config()
    assert (cfg.grid**2, cfg.shape.width, cfg.shape.depth, cfg.shape.heads) == (196, 768, 12, 12)
    assert cfg.engine.precision == "fp32"


def test_masks_are_of_equal_segments_shared_in_rank_order_or_one_an_image():
    none, shared, per_image = attention.masks(196, 3).values()
    assert none is None
    rank = torch.arange(196) // 4
    assert torch.equal(shared, rank[None, :] <= rank[:, None])
    assert per_image.shape == (3, 1, 196, 196)
    for mask in per_image[:, 0]:  # the same mask, with its tokens in another order
        assert torch.equal(mask.sum(dim=1).sort().values, shared.sum(dim=1))
        order = mask.sum(dim=1).sort(stable=True).indices
        assert torch.equal(mask[order][:, order], shared)
    assert not torch.equal(per_image[0], per_image[1])


def test_each_contestant_attends_under_its_mask_in_every_block(tiny, monkeypatch):
    seen, real = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        seen.append((tuple(q.shape), None if attn_mask is None else tuple(attn_mask.shape)))
        return real(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    contestants = attention._contestants(tiny, 2)
    assert list(contestants) == NAMES
    shapes = dict(zip(attention.MASKS, (None, (64, 64), (2, 1, 64, 64)), strict=True))
    for name, contestant in contestants.items():
        seen.clear()
        assert contestant(0) == 2
        assert seen == [((2, 3, 64, 32), shapes[name.split(", ")[1]])] * 4


def test_every_contestant_has_a_figure(tiny):
    calls = []
    rows = attention.run(batch=2, progress=lambda done, total: calls.append((done, total)))
    assert [row.name for row in rows] == NAMES
    assert all(row.cpu_s_per_image > 0 for row in rows)
    assert calls[-1] == (108, 108)


def test_ratios_are_to_the_same_part_without_a_mask():
    figures = {name: (seconds, 1.0) for name, seconds in zip(NAMES, (2.0, 2.1, 3.0, 0.5, 0.6, 0.5), strict=True)}
    rows = attention.compare(figures)
    assert [row.to_no_mask for row in rows] == pytest.approx([1, 1.05, 1.5, 1, 1.2, 1])
    assert [row.goal for row in rows] == [None, 1.05, 1.05, None, None, None]
    assert "to no mask 1.050 (goal <= 1.05)" in str(rows[1])


def test_a_restless_machine_and_fewer_than_eight_rounds_get_no_figure(tiny, monkeypatch):
    with pytest.raises(UserError, match="rounds = 7"):
        attention.run(rounds=7)
    monkeypatch.setattr(interleaved, "TOLERANCE", 0.03)
    monkeypatch.setattr(interleaved, "interleave", lambda contestants, *_: {name: (1.0, 1.04) for name in contestants})
    with pytest.raises(RunFailed, match=r"restless.*encoder, shared mask 1\.040"):
        attention.run(batch=1)


def test_the_verb_prints_and_writes_its_rows(monkeypatch, tmp_path):
    rows = [attention.Row("encoder, no mask", 2.0, 1.01, 1.0, None)]
    monkeypatch.setattr(attention, "run", lambda **options: rows)
    result = CliRunner().invoke(app, ["bench", "attention", "--out", str(tmp_path / "out.json")])
    assert result.exit_code == 0 and "encoder, no mask" in result.output
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["to_no_mask"] == 1.0
