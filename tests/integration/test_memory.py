"""What each of several processes really holds of a ViT-B, beside what the memory model says."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor

from pipeline.config import Config, load_config
from pipeline.engine.torch import TorchEngine
from pipeline.memory import state

PARTS = ("weights", "gradients", "moments", "average", "teacher")


def held(tensor: Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def config(engine: str, *more: str) -> Config:
    settings = ["run.dir=runs/x", "data.train=train.beton", f"engine.name={engine}", *more]
    return load_config(["imagenet/pcae_vit_b"], settings)


def _work(rank: int, size: int, folder: str, settings: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    engine = TorchEngine(config(*settings), torch.device("cpu"))
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    engine.micro_step(images, engine.method.draw(torch.arange(1)), 1, True)
    moments = [v for entry in engine.optimizer.state.values() for name, v in entry.items() if name != "step"]
    gradients = [parameter.grad for parameter in engine.trained]
    tensors = engine.named.values(), gradients, moments, engine.ema.values(), engine.teacher.parameters()
    amounts = {part: sum(map(held, some)) for part, some in zip(PARTS, tensors, strict=True)}
    Path(f"{folder}/{rank}.json").write_text(json.dumps(amounts))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "size, shards, settings",
    [
        (2, 1, ("ddp",)),
        (2, 2, ("fsdp2",)),
        (4, 4, ("fsdp2",)),
        (4, 4, ("fsdp2", "engine.precision=fp32")),
        (4, 2, ("hsdp", "engine.shard_size=2")),
    ],
)
def test_each_process_holds_its_part_within_two_percent(size, shards, settings, tmp_path):
    mp.start_processes(_work, (size, str(tmp_path), settings), size, start_method="spawn")
    expected = state(config(*settings), shards)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    for amounts in found:
        for part in PARTS:
            assert amounts[part] == pytest.approx(getattr(expected, part), rel=0.02), part
