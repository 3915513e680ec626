"""A rank's file of a checkpoint: what DCP's own writer writes, without a copy of it in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from pipeline.shards import ShardWriter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

MIB = 256
SAVES = """
import resource, sys
import torch
from pipeline import checkpoint

tensors = {f"model.{i}": torch.full((2**18, 16), float(i)) for i in range(int(sys.argv[2]) // 16)}
checkpoint.save(checkpoint.Path(sys.argv[1]) / "first", 1, {"model.0": torch.zeros(4)}, {})  # what is imported and made once
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
checkpoint.save(checkpoint.Path(sys.argv[1]), 1, tensors, {})
print((peak() - before) / 1024)
"""


def mixed() -> dict[str, Tensor]:
    """Of several types and shapes; one is a part of something larger, one is empty."""
    return {
        "model.a": torch.arange(12.0).view(3, 4),
        "model.part": torch.arange(40.0)[7:19],
        "ema.half": torch.arange(5).to(torch.bfloat16),
        "step.a": torch.tensor(3.0),
        "model.none": torch.zeros(0, 4),
        "ids": torch.arange(3),
    }


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file. The header's text is not compared: its notes come in any order."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def test_the_file_is_dcps_own_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    dcp_save(mixed(), storage_writer=HuggingFaceStorageWriter(str(tmp_path / "dcp"), save_distributed=True))
    dcp_save(mixed(), storage_writer=ShardWriter(str(tmp_path / "own")))
    names = sorted(os.listdir(tmp_path / "dcp"))
    assert names == sorted(os.listdir(tmp_path / "own")) == ["shard-00001-model-00001-of-00001.safetensors"]
    assert parts(tmp_path / "own" / names[0]) == parts(tmp_path / "dcp" / names[0])


def test_a_save_takes_no_memory_for_the_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SAVES, tmp_path, str(MIB)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < MIB / 4
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) > MIB * 2**20


def test_what_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseException, match="note: a checkpoint holds tensors"):
        dcp_save({"note": "text"}, storage_writer=ShardWriter(str(tmp_path)))
    assert os.listdir(tmp_path) == []
