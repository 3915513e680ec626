"""What is done to a method's layers before they are sharded: activation checkpointing, then compilation.

Both replace a layer's ``forward`` in place, so names of parameters and hooks of the layer stay what they are.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["none", "full", "selective"] | int

COMPILER: Final = "inductor"
_ATEN = torch.ops.aten
# What is dear to compute again: matrix products and attention. All else is elementwise.
KEPT: Final = {
    _ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default,
    _ATEN._scaled_dot_product_flash_attention.default, _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default, _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_fused_attention_overrideable.default,
}  # fmt: skip


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    # No forward pass draws a random number, so there is no generator's state to keep.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return partial(checkpoint, forward, **options)


def checkpoint_layers(layers: Sequence[nn.Module], which: Checkpointing) -> None:
    """Compute activations again in the backward pass: of no layer, of all (full), of all but for matrix products and
    attention (selective), or of every n-th layer.
    """  # noqa: D205, D415
    if which == "none":
        return
    every = which if isinstance(which, int) else 1
    for layer in layers[::every]:
        layer.forward = _checkpointed(layer.forward, which == "selective")


def compile_layers(layers: Sequence[nn.Module]) -> None:
    """Compile each layer; equal layers share the compiled code."""
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=COMPILER, fullgraph=True, dynamic=False)
