"""DeepSpeed's ZeRO behind the engines' face: stage 1 shares the optimizer's state, 2 the gradients too, 3 the weights too.

DeepSpeed keeps its fp32 weights and moments in flat buffers, a part of each on every process. One map from a parameter's
name to its place there serves first weights, checkpoints, average and teacher alike, in the format of the other engines:
none of DeepSpeed's own checkpoints, none of its conversions. The attributes that the map rests on are private: they are
looked for at the start, and the version is pinned.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pipeline.config import Config
from pipeline.engine import COMPUTE, StepReport
from pipeline.engine.layers import checkpoint_layers, compile_layers
from pipeline.engine.torch import join_alone
from pipeline.memory import takes_decay
from pipeline.methods import METHODS, build_method
from pipeline.methods.common import Draw
from pipeline.zero_config import deepspeed_config

MOMENTS: Final = ("exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """This process's part of a parameter: ``numel`` numbers from ``begin`` of it on, which lie at ``start`` of a flat ``group``."""

    group: int
    start: int
    begin: int
    numel: int

    def of(self, flats: Sequence[Tensor]) -> Tensor:
        """The part, sharing memory with the flat buffers."""
        return flats[self.group][self.start : self.start + self.numel]


def import_deepspeed() -> Any:
    """DeepSpeed without its greeting, and without the C++ extension that it would compile for a minute at the first start."""
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # it calls functions by their older names
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    for name in ("deepspeed_shm_comm", "deepspeed_shm_comm_op"):
        deepspeed.ops.__compatible_ops__[name] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # a step that is skipped is reported by us
    return deepspeed


class DeepSpeedEngine:
    """One of W processes under ZeRO. See ``pipeline.engine.Engine``."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        """Builds the method with its first weights, each process its part. Without a process group it makes one of 1."""
        self.deepspeed = import_deepspeed()
        join_alone()
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # it insists, and asks nobody else
        self.deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        self.cfg, self.device, self.stage = cfg, device, cfg.engine.zero_stage
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.compute = COMPUTE[cfg.engine.precision]
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
        for name in self.trained_names:
            self._write(name, [first[name]], [self.masters])
        self._refresh_weights()
        self.averages, self.teacher = list[Tensor](), None
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
        """Groups are apart by weight decay and by whether the teacher follows them: its average is then whole flat buffers."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name in self.trained_names:
            kind = name not in self.followed, not takes_decay(name, self.shapes[name])
            groups.setdefault(kind, []).append(self.named[name])
        decay = self.cfg.optim.weight_decay
        settings = [{"params": groups[kind], "weight_decay": 0.0 if kind[1] else decay} for kind in sorted(groups)]
        optimizer = torch.optim.AdamW(settings, lr=0.0, betas=self.cfg.optim.betas, fused=True)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how much memory is in use
            self.wrapped, self.zero, *_ = self.deepspeed.initialize(
                model=self.method, optimizer=optimizer, config=self.config
            )
        flats: list[Tensor] = (
            self.zero.fp32_partitioned_groups_flat if self.stage == 3
            else [group["params"][0] for group in self.zero.optimizer.param_groups]
        )  # fmt: skip
        self.masters = [flat.detach() for flat in flats]
        self.moments: dict[str, list[Tensor]] = {
            kind: [torch.zeros_like(flat) for flat in self.masters] for kind in MOMENTS
        }
        self.counts = [torch.zeros((), device=flat.device) for flat in self.masters]
        # Left to the first step, they would be linked to the parameters of the first group only.
        for index, flat in enumerate(flats):
            kept = {"step": self.counts[index], **{kind: values[index] for kind, values in self.moments.items()}}
            self.zero.optimizer.state[flat] = kept
        if self.stage != 3:
            self.zero._lazy_init_hp_params_optimizer_state()
        self.fragments = {name: self._fragment(self.named[name]) for name in self.trained_names}

    def _fragment(self, parameter: nn.Parameter) -> Fragment:
        if self.stage == 3:
            group, start, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
            begin = min(self.rank * length, parameter.ds_numel)
            return Fragment(group, start, begin, min(length, parameter.ds_numel - begin))
        place = parameter._hp_mapping
        if place is None:
            return Fragment(0, 0, 0, 0)
        there = place.hp_fragment_address
        return Fragment(place.param_group_index, there.start, place.lp_fragment_address.start, there.numel)

    def _read(self, name: str, sources: Sequence[Sequence[Tensor]]) -> list[DTensor]:
        """A parameter's values in each of ``sources``, lists of flat buffers; every process its rows. All must call it."""
        shape, part = self.shapes[name], self.fragments[name]
        whole = torch.zeros(len(sources), shape.numel(), device=self.device)
        for row, flats in zip(whole, sources, strict=True):
            row[part.begin : part.begin + part.numel] = part.of(flats)
        dist.all_reduce(whole)
        rows = (distribute_tensor(row.view(shape), self.mesh, [Shard(0)], src_data_rank=None) for row in whole)
        return [DTensor.from_local(row.to_local().clone(), self.mesh, [Shard(0)], run_check=False, shape=shape,
                                   stride=row.stride()) for row in rows]  # fmt: skip

    def _write(self, name: str, values: Sequence[DTensor], targets: Sequence[Sequence[Tensor]]) -> None:
        """The opposite of ``_read``."""
        part = self.fragments[name]
        for value, flats in zip(values, targets, strict=True):
            part.of(flats).copy_(value.full_tensor().flatten()[part.begin : part.begin + part.numel])

    @torch.no_grad()
    def _refresh_weights(self) -> None:
        """The weights that compute, made from the fp32 ones."""
        for name, value in self.frozen.items():
            self._set_frozen(self.named[name], value.full_tensor())
        if self.stage == 3:
            for group in range(len(self.masters)):
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
        number = 1 + max(int(index) for index in self._places()[:, 0])
        self.averages = [flat.clone() for flat in self.masters[:number]]
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
        """Of each followed parameter the flat group, and where it begins in that group's parts in order of rank: int64 [F, 2]."""
        places = torch.full((len(self.followed), 2), -1, device=self.device)
        for row, name in zip(places, self.followed, strict=True):
            part = self.fragments[name]
            if part.numel:
                start = self.rank * self.masters[part.group].numel() + part.start - part.begin
                row.copy_(torch.tensor((part.group, start)))
        dist.all_reduce(places, dist.ReduceOp.MAX)
        return places

    def _view_gathered(self) -> None:
        """One buffer a group, in compute precision: the teacher's parameters are views into it."""
        self._gathered = [
            torch.empty(self.size * f.numel(), dtype=self.compute, device=self.device) for f in self.averages
        ]
        for name, (group, start) in zip(self.followed, self._places().tolist(), strict=True):
            shape = self.shapes[name]
            self.twins[name].data = self._gathered[group][start : start + shape.numel()].view(shape)

    @torch.no_grad()
    def _refresh_teacher(self) -> None:
        if self.teacher is None:
            return
        if self.stage == 3:
            for name in self.followed:
                part = self.fragments[name]
                self.twins[name].ds_tensor[: part.numel].copy_(part.of(self.averages))
            return
        for average, whole in zip(self.averages, self._gathered, strict=True):
            dist.all_gather_into_tensor(whole, average.to(self.compute))

    @property
    def ema(self) -> dict[str, Tensor]:
        """See ``Engine``; gathered when it is asked for, by all processes."""
        return {name.removeprefix("encoder."): self._read(name, [self.averages])[0] for name in self.followed}

    # ---- steps

    def micro_step(self, images: Tensor, draw: Draw, num_micro: int, last: bool) -> dict[str, Tensor]:
        """See ``Engine.micro_step``."""
        self.wrapped.set_gradient_accumulation_boundary(last)
        loss, logs = self.wrapped(images.to(self.device, non_blocking=True), draw.to(self.device), self.teacher)
        self.wrapped.backward(loss / num_micro, scale_wrt_gas=False)
        return logs

    def step(self, lr: float, clip: float | None, momentum: float) -> StepReport:
        """See ``Engine.step``. DeepSpeed waits for the device to know whether a gradient is finite."""
        culprit = self._culprit()
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.zero.clip_grad = clip or 0.0
        self.wrapped.step()
        applied = self.wrapped.was_step_applied()
        if applied and self.averages:
            torch._foreach_lerp_(self.averages, self.masters[: len(self.averages)], 1 - momentum)
            self._refresh_teacher()
        norm = torch.as_tensor(self.wrapped.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        return StepReport(norm.reshape(()), torch.tensor(float(not applied), device=self.device), culprit)

    def _culprit(self) -> Tensor:
        """The last parameter with a gradient that is not finite on any process, as ``StepReport.culprit``."""
        found = [(place, gradient) for place, name in enumerate(self.trained_names)
                 if (gradient := self._gradient(name)) is not None]  # fmt: skip
        norms = torch.stack(torch._foreach_norm([gradient for _, gradient in found]))
        places = torch.tensor([place for place, _ in found], dtype=torch.float32, device=norms.device)
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
        kinds = {"model": self.masters, **self.moments}
        return kinds | {"ema": self.averages} if name in self.followed else kinds

    def state(self) -> dict[str, Tensor]:
        """See ``Engine.state``; copies, one parameter gathered at a time. All processes must call it."""
        state = {f"model.{name}": value for name, value in self.frozen.items()}
        for name in self.trained_names:
            kinds = self._kinds(name)
            values = self._read(name, list(kinds.values()))
            state |= {f"{kind}.{name}": value for kind, value in zip(kinds, values, strict=True)}
            state[f"step.{name}"] = self.counts[0].clone()
        return state

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """See ``Engine.load``. Raises KeyError for a state of another method or model."""
        for name in self.trained_names:
            kinds = self._kinds(name)
            self._write(name, [state[f"{kind}.{name}"] for kind in kinds], list(kinds.values()))
            for count in self.counts:
                count.copy_(state[f"step.{name}"])
        for name, value in self.frozen.items():
            value.to_local().copy_(state[f"model.{name}"].to_local())
        self._refresh_weights()
        self._refresh_teacher()

    def full_params(self) -> dict[str, Tensor]:
        """See ``Engine.full_params``."""
        values = {name: self._read(name, [self.masters])[0] for name in self.trained_names} | self.frozen
        return {name: values[name].full_tensor().to("cpu", copy=True) for name in self.named}
