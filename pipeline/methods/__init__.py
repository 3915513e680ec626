"""The pretraining methods, and fine-tuning, which is trained the same way."""

from typing import TYPE_CHECKING

import torch

from pipeline.methods.finetune import Finetune
from pipeline.methods.mae import MAE
from pipeline.methods.pcae import PCAE
from pipeline.methods.randsac import RandSAC

if TYPE_CHECKING:
    from pipeline.config import Config

METHODS = {"randsac": RandSAC, "pcae": PCAE, "mae": MAE, "finetune": Finetune}


def build_method(cfg: "Config", device: str | torch.device = "cpu") -> RandSAC | PCAE | MAE | Finetune:
    """The configured method with its first weights, which depend on ``cfg.train.seed`` and parameter names alone.

    ``device="meta"`` gives the shapes without memory or weights.
    """
    with torch.device("meta"):
        method = METHODS[cfg.method.name](cfg)
    if str(device) == "meta":
        return method
    method.to_empty(device="cpu").reset_parameters()
    return method.to(device)
