"""MAE: masked autoencoder with pixels normalised by patch (He et al., CVPR 2022, arXiv 2111.06377)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.costs import num_visible
from pipeline.methods.common import (
    MaskDraw,
    Method,
    Prediction,
    drop_path_rates,
    mask_draw,
    panels,
    restore_pixels,
    rows_to_image,
)
from pipeline.segments import drop_path_keep, gather_tokens
from pipeline.vit import (
    Decoder,
    build_encoder,
    encode_visible,
    initialise,
    normalise,
    patchify,
    pixel_rows,
    sincos_2d,
    standardise,
)

if TYPE_CHECKING:
    from pipeline.config import Config

# The decoder's parts as facebookresearch/mae names them; its other names are the encoder's, which are timm's.
PUBLIC_DECODER = {"decoder_embed": "embed", "mask_token": "mask_token", "decoder_pos_embed": "pos_embed",
                  "decoder_blocks": "blocks", "decoder_norm": "norm", "decoder_pred": "head"}  # fmt: skip


class MAE(Method):
    """Encode the visible patches, decode all, predict the pixels of the masked ones."""

    def __init__(self, cfg: "Config") -> None:
        """Empty weights."""
        super().__init__()
        method, shape = cfg.method, cfg.shape
        self.seed, self.grid, self.patch_size = cfg.train.seed, cfg.grid, shape.patch_size
        self.num_visible, self.normalise_target = num_visible(cfg.grid**2, method.mask_ratio), method.normalise_target
        self.encoder = build_encoder(shape, cfg.data.image_size, class_token=True, drop_path=cfg.model.drop_path)
        self.decoder = Decoder(cfg.grid, shape.width, method.decoder_width, method.decoder_depth, method.decoder_heads,
                               3 * shape.patch_size**2)  # fmt: skip

    def reset_parameters(self) -> None:
        """Fill all weights from the seed."""
        initialise(self, self.seed, {
            "encoder.pos_embed": sincos_2d(self.grid, self.encoder.embed_dim, class_token=True),
            "decoder.pos_embed": sincos_2d(self.grid, self.decoder.pos_embed.shape[-1], class_token=True),
        })  # fmt: skip

    def draw(self, keys: Tensor, batch_key: Tensor | None = None, labels: Tensor | None = None) -> MaskDraw:
        """Visible and masked token ids for each key (int64 [B], CPU)."""
        keep = drop_path_keep(keys, drop_path_rates(self.encoder))
        return mask_draw(keys, self.grid**2, self.num_visible, keep)

    def predict(self, images: Tensor, draw: MaskDraw, teacher: nn.Module | None = None) -> Prediction:
        """Pixels of the masked patches, standardised with ``normalise_target``. Images uint8 [B, 3, H, W]."""
        patches = patchify(normalise(images), self.patch_size)
        visible = gather_tokens(patches, draw.visible_ids)
        encoded = encode_visible(self.encoder, visible, draw.visible_ids, draw.drop_path)
        pred = self.decoder(encoded, draw.visible_ids, draw.masked_ids)
        rows = pixel_rows(gather_tokens(patches, draw.masked_ids))
        target = standardise(rows) if self.normalise_target else rows
        return Prediction(pred.float(), target, draw.masked_ids, torch.ones(draw.masked_ids.shape, device=pred.device))

    @torch.no_grad()
    def figure(self, images: Tensor, draw: MaskDraw, teacher: nn.Module | None = None) -> Image.Image:
        """Image, what is visible of it, and the reconstruction with the visible patches in place."""
        rows = pixel_rows(patchify(normalise(images), self.patch_size))
        prediction = self.predict(images, draw)
        index = draw.masked_ids[..., None].expand(-1, -1, rows.shape[-1])
        restored = prediction.pred
        if self.normalise_target:
            restored = restore_pixels(restored, rows.gather(1, index))
        return panels([
            ("image", list(rows_to_image(rows))),
            ("visible", list(rows_to_image(rows.scatter(1, index, -10.0)))),
            ("reconstructed", list(rows_to_image(rows.scatter(1, index, restored)))),
        ])  # fmt: skip


def public_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under facebookresearch/mae's names as ours: ``decoder_pred.bias`` becomes ``decoder.head.bias``."""
    renamed = {}
    for name, value in state.items():
        part, dot, rest = name.partition(".")
        own = f"decoder.{PUBLIC_DECODER[part]}" if part in PUBLIC_DECODER else f"encoder.{part}"
        renamed[own + dot + rest] = value
    return renamed


@torch.no_grad()
def load_public(method: MAE, public: Mapping[str, Tensor], *, encoder_only: bool = False) -> None:
    """Fill a method that is not sharded with weights under facebookresearch/mae's names; with ``encoder_only`` its encoder.

    Raises ValueError that lists what has another shape, what is missing and what the method does not know; the method is
    then as it was.
    """
    state, own = public_names(public), dict(method.named_parameters())
    if encoder_only:
        state, own = ({n: v for n, v in part.items() if n.startswith("encoder.")} for part in (state, own))
    problems = [f"{name} is {list(state[name].shape)}, not {list(own[name].shape)}"
                for name in own if name in state and state[name].shape != own[name].shape]  # fmt: skip
    problems += [f"missing: {name}" for name in own if name not in state]
    problems += [f"unknown: {name}" for name in state if name not in own]
    if problems:
        raise ValueError("; ".join(problems))
    for name, parameter in own.items():
        parameter.copy_(state[name])
