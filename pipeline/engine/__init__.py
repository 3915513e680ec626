"""Engines compute steps; nothing outside asks which one it is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.methods.common import Draw, Method
    from pipeline.optim import LossScale

COMPUTE: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepReport:
    """Device scalars: the global gradient norm before clipping, and 1.0 if the step was skipped as not finite.

    ``culprit``: the place in ``Engine.trained_names`` of the last tensor whose gradient is not finite, -1 when all are. A
    backward pass goes from the last to the first: there it began.
    """

    grad_norm: Tensor
    skipped: Tensor
    culprit: Tensor


class Engine(Protocol):
    """The face of every engine. ``ema`` holds the teacher's fp32 weights by name, empty without a teacher.

    ``state_is_copy``: what ``state()`` returns does not change with the next step.
    """

    method: "Method"
    trained_names: list[str]
    ema: dict[str, Tensor]
    state_is_copy: bool
    loss_scale: "LossScale | None"

    def micro_step(self, images: Tensor, draw: "Draw", num_micro: int, last: bool) -> dict[str, Tensor]:
        """Forward and backward of one of ``num_micro`` micro-batches; the loss is divided by ``num_micro`` here, once."""

    def step(self, lr: float, clip: float | None, momentum: float) -> StepReport:
        """Clip by the global norm, update the weights unless the gradient is not finite, move the teacher."""

    def call(self, name: str, *args: Any) -> Any:
        """A read-only method (predict, figure, features) with all parameters at hand."""

    def state(self) -> dict[str, Tensor]:
        """Weights, teacher, moments and Adam's counts under the plain module's names, for a checkpoint to be read into too."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a state that ``state()`` had the shape of."""

    def close(self) -> None:
        """Let go of what would keep the memory when the engine is dropped."""

    def full_params(self) -> dict[str, Tensor]:
        """All parameters in fp32 on the CPU."""


def build_engine(cfg: "Config", device: torch.device) -> Engine:
    """The engine of ``engine.name`` with its first weights. Raises UserError when the processes cannot be laid out so."""
    if cfg.engine.name == "deepspeed":
        from pipeline.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(cfg, device)
    from pipeline.engine.torch import TorchEngine

    return TorchEngine(cfg, device)
