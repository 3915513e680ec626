"""DeepSpeed's ZeRO behind the engines' face: stage 1 shares the optimizer's state, 2 the gradients too, 3 the weights too.

DeepSpeed keeps its fp32 weights and moments in flat buffers, a part of each on every process. One map from a parameter's
name to its place there serves first weights, checkpoints, average and teacher alike, in the format of the other engines:
none of DeepSpeed's own checkpoints, none of its conversions (``zero_layout``).
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pipeline.config import Config
from pipeline.engine import COMPUTE, StepReport
from pipeline.engine.layers import checkpoint_layers, compile_layers
from pipeline.engine.nvme import prepare_nvme
from pipeline.engine.torch import join_alone
from pipeline.engine.zero_layout import Layout
from pipeline.memory import rate_scale, takes_decay
from pipeline.methods import METHODS, build_method
from pipeline.methods.common import Draw
from pipeline.optim import LossScale
from pipeline.zero_config import deepspeed_config


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed for a kind of device, without its greeting, and without the C++ extension that it would compile for a minute.

    The kind is for good: it is that of the first engine of this process.
    """
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # it calls functions by their older names
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    for name in ("deepspeed_shm_comm", "deepspeed_shm_comm_op"):
        deepspeed.ops.__compatible_ops__[name] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # a step that is skipped is reported by us
    return deepspeed


def _to_host(value: Tensor) -> Tensor:
    return value.to("cpu", copy=True)


class DeepSpeedEngine:
    """One of W processes under ZeRO. See ``pipeline.engine.Engine``."""

    state_is_copy = True

    def __init__(self, cfg: Config, device: torch.device) -> None:
        """Builds the method with its first weights, each process its part. Without a process group it makes one of 1."""
        self.deepspeed = import_deepspeed(device)
        join_alone()
        # It insists, and takes it for the device, which it is not where a process sees its own GPU only.
        os.environ["LOCAL_RANK"] = str(device.index or 0)
        self.deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        self.cfg, self.device, self.stage = cfg, device, cfg.engine.zero_stage
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.compute = COMPUTE[cfg.engine.precision]
        self.loss_scale = LossScale(device) if self.compute == torch.float16 else None
        if cfg.engine.offload == "nvme":
            prepare_nvme(cfg, self.deepspeed.ops.op_builder.AsyncIOBuilder())
        self.mesh = init_device_mesh(device.type, (self.size,))
        self.config = deepspeed_config(cfg, self.size)
        first = self._first_weights()
        self.shapes = {name: value.shape for name, value in first.items()}
        with self._building():
            self.method = METHODS[cfg.method.name](cfg)
        self.method.train()
        checkpoint_layers(self.method.layers(), cfg.engine.checkpoint_layers)
        if cfg.engine.compile:
            compile_layers(self.method.layers())
        self.named = dict(self.method.named_parameters())
        self.trained_names = [name for name, parameter in self.named.items() if parameter.requires_grad]
        self.frozen = {name: value for name, value in first.items() if name not in self.trained_names}
        with torch.device("meta"):
            twin = self.method.build_teacher()
        shared = {} if twin is None else dict(twin.named_parameters())
        self.followed = [f"encoder.{name}" for name in shared if f"encoder.{name}" in self.trained_names]
        self._share_out(self.method, self.method.layers())
        self._start_optimizer()
        for name in self.layout.names(write=True):
            self.layout.write(name, [first[name]], [self.layout.masters])
        self._refresh_weights()
        self.averages, self.teacher, self.twins = list[Tensor](), None, dict[str, nn.Parameter]()
        if twin is not None:
            self._start_teacher()

    def _first_weights(self) -> dict[str, DTensor]:
        """Every parameter's first values in fp32, each process its rows."""
        twin = build_method(self.cfg, "meta")
        for module in twin.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                part = distribute_tensor(parameter, self.mesh, [Shard(0)], src_data_rank=None)
                module.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        twin.to_empty(device=self.device).reset_parameters()
        return {name: parameter.detach() for name, parameter in twin.named_parameters()}

    @contextlib.contextmanager
    def _building(self) -> Iterator[None]:
        """Inside, a module's parameters are made where and as they will lie, with whatever is in that memory."""
        if self.stage == 3:
            with self.deepspeed.zero.Init(config_dict_or_path=self.config, mem_efficient_linear=False):
                yield
        else:
            with self.device:
                yield

    def _share_out(self, module: nn.Module, layers: Sequence[nn.Module]) -> None:
        """Stage 3 gathers a layer as a whole, and what is in no layer for the whole of a forward or backward pass."""
        if self.stage != 3:
            return
        self.deepspeed.utils.set_z3_leaf_modules(module, list({type(layer) for layer in layers}))
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        for parameter in module.parameters():
            if id(parameter) not in inside:
                self.deepspeed.zero.register_external_parameter(module, parameter)

    def _start_optimizer(self) -> None:
        """Groups are apart by rate, weight decay and by whether the teacher follows them: its average is whole flat buffers."""
        optim, depth = self.cfg.optim, self.cfg.shape.depth
        groups: dict[tuple[bool, bool, float], list[str]] = {}
        for name in self.trained_names:
            kind = (
                name not in self.followed,
                not takes_decay(name, self.shapes[name], optim),
                rate_scale(name, depth, optim),
            )
            groups.setdefault(kind, []).append(name)
        settings = [{"params": [self.named[name] for name in groups[kind]], "scale": kind[2],
                     "weight_decay": 0.0 if kind[1] else optim.weight_decay} for kind in sorted(groups)]  # fmt: skip
        optimizer = torch.optim.AdamW(settings, lr=0.0, betas=optim.betas, fused=True)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how much memory is in use
            self.wrapped, self.zero, *_ = self.deepspeed.initialize(
                model=self.method, optimizer=optimizer, config=self.config
            )
        parts = [{name: self.named[name] for name in groups[kind]} for kind in sorted(groups)]
        self.layout = Layout(self.zero, self.stage, parts, self.shapes, self.mesh)
        if self.cfg.engine.offload == "nvme":
            self.layout.keep_gradients()

    @torch.no_grad()
    def _refresh_weights(self) -> None:
        """The weights that compute, made from the fp32 ones."""
        for name, value in self.frozen.items():
            self._set_frozen(self.named[name], value.full_tensor())
        if self.stage == 3:
            for group in range(len(self.layout.masters)):
                with self.layout.resident(group):
                    self.zero._reassign_or_swap_out_partitioned_parameters(group)
        else:
            self.zero.update_lp_params()

    def _set_frozen(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self.stage == 3:
            own = parameter.ds_tensor
            rest = value.flatten()[self.rank * own.ds_numel :][: own.ds_numel]
            own[: rest.numel()].copy_(rest)
        else:
            parameter.data.copy_(value)

    # ---- the teacher

    def _start_teacher(self) -> None:
        """The average starts as the encoder, in the layout of the fp32 weights; the module that computes is a copy of it.

        Of the copy each process holds the whole, gathered anew every step, or in stage 3 its part, as of the weights.
        """
        for group in range(1 + max(self.layout.fragments[name].group for name in self.followed)):
            with self.layout.resident(group):
                self.averages.append(self.layout.masters[group].detach().clone())
        with self._building():
            teacher = self.method.build_teacher()
        self.twins = {f"encoder.{name}": parameter for name, parameter in teacher.named_parameters()}
        if self.stage == 3:
            self._share_out(teacher, teacher.blocks)
            self.teacher = self.deepspeed.initialize(model=teacher, config=self.config)[0]
        else:
            self.teacher = teacher.to(self.compute)
            self._view_gathered()
        for name, twin in self.twins.items():
            if name in self.frozen:
                self._set_frozen(twin, self.frozen[name].full_tensor())
        self._refresh_teacher()

    def _places(self) -> Tensor:
        """Where each followed parameter begins in its group's parts in order of rank: int64 [F]."""
        places = torch.full((len(self.followed),), -1, device=self.device)
        for row, name in zip(places, self.followed, strict=True):
            part = self.layout.fragments[name]
            if part.numel:
                row.fill_(self.rank * self.averages[part.group].numel() + part.start - part.begin)
        dist.all_reduce(places, dist.ReduceOp.MAX)
        return places

    def _view_gathered(self) -> None:
        """One buffer a group, in compute precision: the teacher's parameters are views into it."""
        self._gathered = [
            torch.empty(self.size * f.numel(), dtype=self.compute, device=self.device) for f in self.averages
        ]
        for name, start in zip(self.followed, self._places().tolist(), strict=True):
            shape, group = self.shapes[name], self.layout.fragments[name].group
            self.twins[name].data = self._gathered[group][start : start + shape.numel()].view(shape)

    @torch.no_grad()
    def _refresh_teacher(self) -> None:
        if self.teacher is None:
            return
        if self.stage == 3:
            for name in self.followed:
                part = self.layout.fragments[name]
                self.twins[name].ds_tensor[: part.numel].copy_(part.of(self.averages))
            return
        for average, whole in zip(self.averages, self._gathered, strict=True):
            dist.all_gather_into_tensor(whole, average.to(self.compute).to(self.device))

    @property
    def ema(self) -> dict[str, Tensor]:
        """See ``Engine``; gathered when it is asked for, by all processes."""
        return {name.removeprefix("encoder."): self.layout.read(name, [self.averages])[0] for name in self.followed}

    # ---- steps

    def micro_step(self, images: Tensor, draw: Draw, num_micro: int, last: bool) -> dict[str, Tensor]:
        """See ``Engine.micro_step``."""
        self.wrapped.set_gradient_accumulation_boundary(last)
        if self.loss_scale is not None:
            self.zero.override_loss_scale(float(self.loss_scale.scale))
        loss, logs = self.wrapped(images.to(self.device, non_blocking=True), draw.to(self.device), self.teacher)
        self.wrapped.backward(loss / num_micro, scale_wrt_gas=False)
        return logs if self.loss_scale is None else {**logs, "loss_scale": self.loss_scale.scale.clone()}

    def step(self, lr: float, clip: float | None, momentum: float) -> StepReport:
        """See ``Engine.step``. DeepSpeed waits for the device to know whether a gradient is finite."""
        culprit = self._culprit()
        for group in self.zero.param_groups:
            group["lr"] = lr * group["scale"]
        self.zero.clip_grad = clip or 0.0
        self.wrapped.step()
        applied = self.wrapped.was_step_applied()
        skipped = torch.tensor(float(not applied), device=self.device)
        if self.loss_scale is not None:
            self.loss_scale.update(skipped)
        if applied and self.averages:
            self._move_averages(1 - momentum)
        if not applied and self.stage == 2 and self.cfg.engine.offload != "none":
            # DeepSpeed (0.19.8) forgets to: what is not finite would be summed up with every later step's gradients.
            self.zero.averaged_gradients = dict.fromkeys(self.zero.averaged_gradients)
        self._settle()
        norm = torch.as_tensor(self.wrapped.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        return StepReport(norm.reshape(()), skipped, culprit)

    @torch.no_grad()
    def _move_averages(self, weight: float) -> None:
        for group, average in enumerate(self.averages):
            with self.layout.resident(group):
                average.lerp_(self.layout.masters[group], weight)
        self._refresh_teacher()

    def _culprit(self) -> Tensor:
        """The last parameter with a gradient that is not finite on any process, as ``StepReport.culprit``."""
        if self.cfg.engine.offload == "none":
            found = {place: gradient for place, name in enumerate(self.trained_names)
                     if (gradient := self._gradient(name)) is not None}  # fmt: skip
            norms = torch.stack(torch._foreach_norm(list(found.values())))
        else:  # the gradients are on their way to the host or a disk, but their norms have been taken
            taken = self.zero.norm_for_param_grads
            found = {place: taken[key] for place, name in enumerate(self.trained_names)
                     if (key := self.zero.get_param_id(self.named[name])) in taken}  # fmt: skip
            norms = torch.stack([torch.as_tensor(norm) for norm in found.values()])
        places = torch.tensor(list(found), dtype=torch.float32, device=norms.device)
        worst = torch.where(norms.isfinite(), -1.0, places).max().to(self.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return worst

    def _gradient(self, name: str) -> Tensor | None:
        """This process's part of a parameter's reduced gradient, None where it holds none."""
        parameter = self.named[name]
        if self.stage == 3:
            gradient: Tensor = self.zero.get_local_fp32_grad_for_param(parameter)
            return gradient
        place = parameter._hp_mapping
        return None if place is None else place.get_lp_grad_fragment(parameter._index_in_param_group)

    @torch.no_grad()
    def call(self, name: str, *args: Any) -> Any:
        """See ``Engine.call``; ``args`` are images and a draw."""
        images, draw = args
        training, forward, found = self.method.training, self.method.forward, []
        self.method.eval()
        # The hooks that gather weights are those of forward; what it returns they search for tensors, in types they know.
        self.method.forward = lambda *inputs: found.append(getattr(self.method, name)(*inputs))
        try:
            self.wrapped(images.to(self.device), draw.to(self.device), self.teacher)
        finally:
            self.method.forward = forward
            self.method.train(training)
        return found[0]

    # ---- the state

    def _kinds(self, name: str) -> dict[str, Sequence[Tensor]]:
        """The flat buffers in which a parameter's values of each kind lie."""
        kinds = {"model": self.layout.masters, **self.layout.moments}
        return kinds | {"ema": self.averages} if name in self.followed else kinds

    def state(self) -> dict[str, Tensor]:
        """See ``Engine.state``; on the host, one parameter gathered at a time. All processes must call it."""
        state: dict[str, Tensor] = {f"model.{name}": self.layout.to_host(value) for name, value in self.frozen.items()}
        if self.loss_scale is not None:
            scale = self.loss_scale
            state |= {"loss_scale": _to_host(scale.scale), "loss_scale.good_steps": _to_host(scale.good_steps)}
        for name in self.layout.names():
            kinds = self._kinds(name)
            values = self.layout.read(name, list(kinds.values()))
            state |= {f"{kind}.{name}": value for kind, value in zip(kinds, values, strict=True)}
            state[f"step.{name}"] = _to_host(self.layout.counts[0])
        return state

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """See ``Engine.load``. Raises KeyError for a state of another method or model."""
        own = {f"{kind}.{name}" for name in self.trained_names for kind in (*self._kinds(name), "step")}
        own |= {f"model.{name}" for name in self.frozen}
        own |= {"loss_scale", "loss_scale.good_steps"} if self.loss_scale is not None else set()
        if own != state.keys():
            raise KeyError(f"the state names other tensors: {sorted(own ^ state.keys())[:4]} ...")
        for name in self.layout.names(write=True):
            kinds = self._kinds(name)
            self.layout.write(name, [state[f"{kind}.{name}"] for kind in kinds], list(kinds.values()))
            for count in self.layout.counts:
                count.copy_(state[f"step.{name}"])
        for name, value in self.frozen.items():
            value.to_local().copy_(state[f"model.{name}"].to_local())
        if self.loss_scale is not None:
            self.loss_scale.scale.copy_(state["loss_scale"])
            self.loss_scale.good_steps.copy_(state["loss_scale.good_steps"])
        self._refresh_weights()
        self._refresh_teacher()
        self._settle()

    def _settle(self) -> None:
        """Stage 3 gathers on a stream of its own, which does not wait for what has been written into the parts."""
        if self.stage == 3 and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def close(self) -> None:
        """See ``Engine.close``. DeepSpeed's caches keep modules, and parameters hold methods of their own: all are emptied."""
        wrapped = [self.wrapped] + ([self.teacher] if self.stage == 3 and self.teacher is not None else [])
        modules = [module for one in wrapped for module in one.modules()]
        for one in wrapped:
            one.destroy()
        for thing in (*self.named.values(), *self.twins.values(), *modules):
            vars(thing).clear()

    def full_params(self) -> dict[str, Tensor]:
        """See ``Engine.full_params``."""
        values = {name: self.layout.read(name, [self.layout.masters])[0] for name in self.layout.names()} | self.frozen
        return {name: values[name].full_tensor().to("cpu", copy=True) for name in self.named}
