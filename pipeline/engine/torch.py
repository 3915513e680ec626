"""The torch engines: one mechanism, ``fully_shard`` over a device mesh, and four meshes for W processes.

single (1,); ddp (W, 1), every process holds everything; fsdp2 (W,), each holds a part; hsdp (R, S), R copies in S parts.

Weights, moments and the teacher's average are fp32; with ``engine.precision`` bf16 or fp16 the parameters are cast for the
matrix products and gradients are reduced in fp32, without autocast.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_

from pipeline.config import Config, UserError
from pipeline.engine import COMPUTE, StepReport
from pipeline.engine.layers import checkpoint_layers, compile_layers
from pipeline.methods import build_method
from pipeline.methods.common import Draw
from pipeline.optim import LossScale, build_optimizer


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradient_norms(parts: list[Tensor], shards: dist.ProcessGroup | None) -> Tensor:
    """The norm of each whole gradient, [P], on every process: one reduction over ``shards``, None where parts are whole."""
    norms = torch.stack(torch._foreach_norm(parts))
    if shards is None:
        return norms
    squares = norms.square()
    dist.all_reduce(squares, group=shards)
    return squares.sqrt()


def _like(local: Tensor, parameter: Tensor) -> Tensor:
    """``local``, this process's part of something that lies as ``parameter`` does, as the whole of it."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False,
                              shape=parameter.shape, stride=parameter.stride())  # fmt: skip


def build_mesh(cfg: Config, device: torch.device) -> DeviceMesh:
    """The mesh of ``engine.name`` over all processes. Raises UserError when they cannot be laid out so."""
    world, shard = dist.get_world_size(), cfg.engine.shard_size
    if cfg.engine.name == "hsdp":
        if shard is None or world % shard:
            raise UserError(f"engine.shard_size = {shard}: should divide the {world} processes of this run")
        shape: tuple[int, ...] = (world // shard, shard)
    else:
        shape = (world, 1) if cfg.engine.name == "ddp" else (world,)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def join_alone() -> None:
    """Make a process group of this process alone, unless it is in one: gloo, and NCCL for what lies on a CUDA device."""
    if not dist.is_initialized():
        # Whatever this engine's device: the group stays, and gloo would make the next one wait for a CUDA device.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


class TorchEngine:
    """One of W processes, on a CPU or a GPU. See ``pipeline.engine.Engine``."""

    state_is_copy = False

    def __init__(self, cfg: Config, device: torch.device) -> None:
        """Builds the method with its first weights, each process its part. Without a process group it makes one of 1.

        Raises UserError when the processes cannot be laid out as ``engine`` says.
        """
        join_alone()
        self.device, self.cfg = device, cfg
        self.compute = COMPUTE[cfg.engine.precision]
        self.loss_scale = LossScale(device) if self.compute == torch.float16 else None
        mesh = build_mesh(cfg, device)
        self.method = build_method(cfg, "meta")
        checkpoint_layers(self.method.layers(), cfg.engine.checkpoint_layers)
        if cfg.engine.compile:
            compile_layers(self.method.layers())
        self._shard_method(mesh)
        self.named = self._start_weights()
        self.trained_names = [name for name, parameter in self.named.items() if parameter.requires_grad]
        self.trained = [self.named[name] for name in self.trained_names]
        self._places = torch.arange(len(self.trained), dtype=torch.float32, device=device)
        self._shards = mesh.get_group("shard") if mesh["shard"].size() > 1 else None
        # The optimizer gets this process's parts: AdamW is elementwise, and a DTensor's way to a kernel is long on the host.
        self._parts = {name: _local(self.named[name]).detach().requires_grad_() for name in self.trained_names}
        self.optimizer = build_optimizer(self._parts.items(), cfg.optim, cfg.shape.depth)
        self._start_teacher(mesh)

    def _shard_method(self, mesh: DeviceMesh) -> None:
        # Images arrive as integers and tokens take the weights' type where they are made: no input is cast.
        policy = MixedPrecisionPolicy(self.compute, torch.float32, cast_forward_inputs=False)
        name, reshard = self.cfg.engine.name, self.cfg.engine.reshard_after_forward
        # One process has nothing to gather layer by layer: one unit for the whole method has the least hooks.
        if name != "single":
            for layer in self.method.layers():
                # Where every process holds everything there is nothing to free.
                fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard and name != "ddp")
        fully_shard(self.method, mesh=mesh, mp_policy=policy)
        # One wrapped entry for all of them: wrapping predict itself would also wrap the call that forward makes to it.
        self.method.read_only = lambda name, *args: getattr(self.method, name)(*args)
        register_fsdp_forward_method(self.method, "read_only")

    def _start_weights(self) -> dict[str, nn.Parameter]:
        self.method.to_empty(device=self.device).train()
        named = dict(self.method.named_parameters())
        with torch.no_grad():
            for parameter in named.values():
                _local(parameter).fill_(math.nan)
        self.method.reset_parameters()
        empty = [name for name, parameter in named.items() if not bool(_local(parameter).isfinite().all())]
        if empty:
            raise RuntimeError(f"reset_parameters left {', '.join(empty)} without a value")
        return named

    def _start_teacher(self, mesh: DeviceMesh) -> None:
        """The average starts as the encoder; positions never move, so only trained parameters are averaged.

        It is fp32 and lies as the weights do; the module that is handed to the method is a copy in compute precision.
        """
        self.ema: dict[str, Tensor] = {}
        with torch.device("meta"):
            self.teacher = self.method.build_teacher()
        if self.teacher is None:
            return
        self.teacher.to(self.compute)
        if self.cfg.engine.name in ("fsdp2", "hsdp"):
            for block in self.teacher.blocks:
                fully_shard(block, mesh=mesh)
            # By default the root would stay whole after a forward pass, and refreshing its parts would change nothing.
            fully_shard(self.teacher, mesh=mesh, reshard_after_forward=True)
        self.teacher.to_empty(device=self.device)
        source = {name: _local(self.named[f"encoder.{name}"]).detach() for name, _ in self.teacher.named_parameters()}
        self.ema = {
            name: value.clone() for name, value in source.items() if self.named[f"encoder.{name}"].requires_grad
        }
        self._masters = [source[name] for name in self.ema]
        twins = {name: _local(parameter).detach() for name, parameter in self.teacher.named_parameters()}
        for name, twin in twins.items():
            twin.copy_(source[name])
        self._twins = [twins[name] for name in self.ema]

    def _refresh_teacher(self) -> None:
        if self.teacher is not None:
            torch._foreach_copy_(self._twins, list(self.ema.values()))

    def micro_step(self, images: Tensor, draw: Draw, num_micro: int, last: bool) -> dict[str, Tensor]:
        """See ``Engine.micro_step``."""
        self.method.set_requires_gradient_sync(last)
        images = images.to(self.device, non_blocking=True)
        loss, logs = self.method(images, draw.to(self.device), self.teacher)
        loss = loss / num_micro
        if self.loss_scale is not None:
            logs = {**logs, "loss_scale": self.loss_scale.scale.clone()}
            loss = loss * self.loss_scale.scale
        loss.backward()
        return logs

    def step(self, lr: float, clip: float | None, momentum: float) -> StepReport:
        """See ``Engine.step``. Nothing here waits for the device: skipping goes through the optimizer's ``found_inf``."""
        gradients = [_local(parameter.grad) for parameter in self.trained]  # all have one
        if self.loss_scale is not None:
            torch._foreach_div_(gradients, self.loss_scale.scale)
        norms = gradient_norms(gradients, self._shards)
        norm = torch.linalg.vector_norm(norms)
        skipped = (~norm.isfinite()).float()
        culprit = torch.where(norms.isfinite(), -1.0, self._places).max()
        for part, gradient in zip(self._parts.values(), gradients, strict=True):
            part.grad = gradient
        if clip is not None:
            clip_grads_with_norm_(self._parts.values(), clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.found_inf = skipped
        self.optimizer.step()
        for tensor in (*self.trained, *self._parts.values()):
            tensor.grad = None
        if self.loss_scale is not None:
            self.loss_scale.update(skipped)
        if self.teacher is not None:
            # A skipped step must not pull the teacher towards weights that did not move.
            weight = (1 - momentum) * (1 - skipped)
            torch._foreach_lerp_(list(self.ema.values()), self._masters, [weight] * len(self.ema))
            self._refresh_teacher()
        return StepReport(norm, skipped, culprit)

    @torch.no_grad()
    def call(self, name: str, *args: Any) -> Any:
        """See ``Engine.call``; ``args`` are images and a draw."""
        images, draw = args
        training = self.method.training
        self.method.eval()
        try:
            return self.method.read_only(name, images.to(self.device), draw.to(self.device), self.teacher)
        finally:
            # What stays gathered after a forward pass would miss the next update or load.
            for module in self.method.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            self.method.train(training)

    def state(self) -> dict[str, Tensor]:
        """See ``Engine.state``."""
        state = {f"model.{name}": parameter.detach() for name, parameter in self.named.items()}
        state |= {
            f"ema.encoder.{name}": _like(value, self.named[f"encoder.{name}"]) for name, value in self.ema.items()
        }
        for name, part in self._parts.items():
            state |= {f"{kind}.{name}": value if kind == "step" else _like(value, self.named[name])
                      for kind, value in self.optimizer.state[part].items()}  # fmt: skip
        if self.loss_scale is not None:
            state |= {"loss_scale": self.loss_scale.scale, "loss_scale.good_steps": self.loss_scale.good_steps}
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

    def close(self) -> None:
        """See ``Engine.close``; nothing does."""

    def full_params(self) -> dict[str, Tensor]:
        """See ``Engine.full_params``."""
        return {n: _full(p.detach()).to("cpu", torch.float32, copy=True) for n, p in self.named.items()}
