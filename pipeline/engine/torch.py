"""The torch engine: one mechanism, ``fully_shard`` over a device mesh; a single process is the mesh (1,).

Weights, moments and the teacher's average are fp32; with ``engine.precision=bf16`` the parameters are cast for the
matrix products and gradients are reduced in fp32, without autocast.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pipeline.config import Config
from pipeline.engine import StepReport
from pipeline.methods import build_method
from pipeline.methods.common import Draw
from pipeline.optim import build_optimizer


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class TorchEngine:
    """One process on a CPU or a GPU. See ``pipeline.engine.Engine``."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        """Builds the method with its first weights and shards it."""
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.device = device
        self.method = build_method(cfg, device)
        teacher = self.method.build_teacher()
        self.teacher = teacher.to_empty(device=device) if teacher is not None else None
        compute = torch.bfloat16 if cfg.engine.precision == "bf16" else torch.float32
        # Images arrive as integers and tokens take the weights' type where they are made: no input is cast.
        policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(device.type, (1,))
        # One process has nothing to gather layer by layer: one unit for the whole method has the least hooks.
        fully_shard(self.method, mesh=mesh, mp_policy=policy)
        # One wrapped entry for all of them: wrapping predict itself would also wrap the call that forward makes to it.
        self.method.read_only = lambda name, *args: getattr(self.method, name)(*args)
        register_fsdp_forward_method(self.method, "read_only")
        self.method.train()
        self.named = dict(self.method.named_parameters())
        self.trained = [parameter for parameter in self.named.values() if parameter.requires_grad]
        self.optimizer = build_optimizer(self.named.items(), cfg.optim)
        self._start_teacher(compute)

    def _start_teacher(self, compute: torch.dtype) -> None:
        """The average starts as the encoder; positions never move, so only trained parameters are averaged."""
        self.ema: dict[str, Tensor] = {}
        if self.teacher is None:
            return
        self.teacher.to(compute)
        source = {name: _local(self.named[f"encoder.{name}"]).detach() for name, _ in self.teacher.named_parameters()}
        self.ema = {
            name: value.clone() for name, value in source.items() if self.named[f"encoder.{name}"].requires_grad
        }
        self._masters = [source[name] for name in self.ema]
        with torch.no_grad():
            for name, parameter in self.teacher.named_parameters():
                parameter.copy_(source[name])
        twins = dict(self.teacher.named_parameters())
        self._twins = [twins[name] for name in self.ema]

    def _refresh_teacher(self) -> None:
        if self.teacher is not None:
            torch._foreach_copy_(self._twins, list(self.ema.values()))

    def micro_step(self, images: Tensor, draw: Draw, num_micro: int, last: bool) -> dict[str, Tensor]:
        """See ``Engine.micro_step``."""
        self.method.set_requires_gradient_sync(last)
        images = images.to(self.device, non_blocking=True)
        loss, logs = self.method(images, draw.to(self.device), self.teacher)
        (loss / num_micro).backward()
        return logs

    def step(self, lr: float, clip: float | None, momentum: float) -> StepReport:
        """See ``Engine.step``. Nothing here waits for the device: skipping goes through the optimizer's ``found_inf``."""
        norm = _full(get_total_norm([p.grad for p in self.trained if p.grad is not None]))
        skipped = (~norm.isfinite()).float()
        if clip is not None:
            clip_grads_with_norm_(self.trained, clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.found_inf = skipped
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.teacher is not None:
            # A skipped step must not pull the teacher towards weights that did not move.
            weight = (1 - momentum) * (1 - skipped)
            torch._foreach_lerp_(list(self.ema.values()), self._masters, [weight] * len(self.ema))
            self._refresh_teacher()
        return StepReport(norm, skipped)

    @torch.no_grad()
    def call(self, name: str, *args: Any) -> Any:
        """See ``Engine.call``; ``args`` are images and a draw."""
        images, draw = args
        training = self.method.training
        self.method.eval()
        try:
            return self.method.read_only(name, images.to(self.device), draw.to(self.device), self.teacher)
        finally:
            self.method.reshard()  # the root stays gathered after a forward pass, and would miss the next update or load
            self.method.train(training)

    def state(self) -> dict[str, Tensor]:
        """See ``Engine.state``."""
        state = {f"model.{name}": parameter.detach() for name, parameter in self.named.items()}
        state |= {f"ema.encoder.{name}": value for name, value in self.ema.items()}
        for name, parameter in self.named.items():
            state |= {f"{kind}.{name}": value for kind, value in self.optimizer.state.get(parameter, {}).items()}
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """See ``Engine.load``. Raises KeyError for a state of another method or model."""
        own = self.state()
        if own.keys() != state.keys():
            raise KeyError(f"the state names other tensors: {sorted(own.keys() ^ state.keys())[:4]} ...")
        with torch.no_grad():
            for name, value in state.items():
                _local(own[name]).copy_(_local(value))
        self._refresh_teacher()

    def full_params(self) -> dict[str, Tensor]:
        """See ``Engine.full_params``."""
        return {n: _full(p.detach()).to("cpu", torch.float32, copy=True) for n, p in self.named.items()}
