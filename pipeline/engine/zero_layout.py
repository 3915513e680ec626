"""Where DeepSpeed's optimizer keeps a parameter: one map from names to this process's parts of flat buffers, for all ZeRO stages.

The attributes that the map rests on are private: they are looked for at the start, and the version is pinned.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

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


class Layout:
    """The flat fp32 buffers of DeepSpeed's optimizer, a list with one a group: ``masters`` (weights) and each of ``moments``.

    ``shapes``: the whole parameters'; ``counts``: Adam's steps, one a group. With ``engine.offload`` they are on the host, or
    in files but for the group that is ``resident``.
    """

    def __init__(
        self, zero: Any, stage: int, groups: Sequence[Mapping[str, nn.Parameter]], shapes: Mapping[str, torch.Size],
        mesh: DeviceMesh,
    ) -> None:  # fmt: skip
        """Makes the moments: left to the first step, they would be linked to the parameters of the first group only."""
        self.zero, self.stage, self.shapes, self.mesh = zero, stage, shapes, mesh
        self._host = init_device_mesh("cpu", (mesh.size(),))
        self.masters: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if stage == 3
            else [group["params"][0] for group in zero.optimizer.param_groups]
        )  # fmt: skip
        self.moments: dict[str, list[Tensor]] = {kind: [] for kind in MOMENTS}
        self.counts = [torch.zeros((), device=flat.device) for flat in self.masters]
        for group, (flat, count) in enumerate(zip(self.masters, self.counts, strict=True)):
            with self.resident(group, write=True):
                for values in self.moments.values():
                    values.append(torch.zeros_like(flat, requires_grad=False))
                zero.optimizer.state[flat] = {"step": count, **{kind: self.moments[kind][group] for kind in MOMENTS}}
        if stage != 3:
            zero._lazy_init_hp_params_optimizer_state()
        self.fragments = {
            name: self._fragment(parameter, group)
            for group, some in enumerate(groups)
            for name, parameter in some.items()
        }

    def _fragment(self, parameter: nn.Parameter, group: int) -> Fragment:
        if self.stage == 3:
            group, start, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
            begin = min(self.mesh.get_rank() * length, parameter.ds_numel)
            return Fragment(group, start, begin, min(length, parameter.ds_numel - begin))
        place = parameter._hp_mapping
        if place is None:
            return Fragment(group, 0, 0, 0)
        there = place.hp_fragment_address
        return Fragment(group, there.start, place.lp_fragment_address.start, there.numel)

    def keep_gradients(self) -> None:
        """In memory, where the parts that they are summed up in lie anyway.

        DeepSpeed (0.19.8) would take those of a MiB and more through files, and with parts that do not begin at a multiple of
        a disk's blocks the optimizer would get others than were computed.
        """
        swapper = self.zero.optimizer_swapper
        swap_out = swapper.swap_out_gradients

        def keep(parameter: Tensor, gradient_offsets: list[int], gradient_tensors: list[Tensor]) -> None:
            for gradient in gradient_tensors:
                gradient.swappable = False  # type: ignore[attr-defined]
            swap_out(parameter=parameter, gradient_offsets=gradient_offsets, gradient_tensors=gradient_tensors)

        swapper.swap_out_gradients = keep

    @contextmanager
    def resident(self, group: int, *, write: bool = False) -> Iterator[None]:
        """Inside, a group's buffers are in memory; if they come from files, ``write`` takes them back there."""
        if self.stage != 3 or not self.zero._swappable_optimizer_subgroup(group):
            yield
            return
        self.zero._optimizer_states_and_gradient_swap_in(group)
        try:
            yield
        except BaseException:
            self.zero._release_swap_buffers(group)
            raise
        if write:
            self.zero._optimizer_states_and_gradient_swap_out(group)
        else:
            self.zero._release_swap_buffers(group)

    def names(self, *, write: bool = False) -> Iterator[str]:
        """The parameters' names, each while its group is ``resident``; the same order on every process."""
        for group in range(len(self.masters)):
            with self.resident(group, write=write):
                yield from (name for name, part in self.fragments.items() if part.group == group)

    @torch.no_grad()
    def read(self, name: str, sources: Sequence[Sequence[Tensor]]) -> list[DTensor]:
        """A parameter's values in each of ``sources``, lists of flat buffers: copies on the host, every process its rows.

        All processes must call it.
        """
        shape, part, device = self.shapes[name], self.fragments[name], self.mesh.device_type
        if (rows := self._rows(name)) is not None:
            return [self._on_host(part.of(flats).view(rows), shape) for flats in sources]
        whole = torch.zeros(len(sources), shape.numel(), device=device)
        for row, flats in zip(whole, sources, strict=True):
            row[part.begin : part.begin + part.numel] = part.of(flats)
        dist.all_reduce(whole)
        parts = (distribute_tensor(row.view(shape), self.mesh, [Shard(0)], src_data_rank=None) for row in whole)
        return [self.to_host(own) for own in parts]

    def _rows(self, name: str) -> tuple[int, ...] | None:
        """The shape of this process's rows of a parameter where they are its part of it: then there is nothing to gather."""
        shape, size = self.shapes[name], self.mesh.size()
        return (shape[0] // size, *shape[1:]) if self.stage == 3 and shape[0] % size == 0 else None

    def to_host(self, value: DTensor) -> DTensor:
        """A copy on the host, laid out alike."""
        return self._on_host(value.to_local(), value.shape)

    def _on_host(self, rows: Tensor, shape: torch.Size) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            rows.to("cpu", copy=True), self._host, [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    @torch.no_grad()
    def write(self, name: str, values: Sequence[DTensor], targets: Sequence[Sequence[Tensor]]) -> None:
        """The opposite of ``read``."""
        part, ready = self.fragments[name], self._rows(name) is not None
        for value, flats in zip(values, targets, strict=True):
            own = value.to_local() if ready else value.full_tensor().flatten()[part.begin : part.begin + part.numel]
            part.of(flats).copy_(own.flatten())
