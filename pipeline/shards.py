"""A rank's file of a checkpoint, written from the memory in which its tensors lie.

DCP's own writer first makes one ``bytes`` of all of them: that takes their size in memory twice over, and for seconds no
other thread gets to run, the one that trains neither.
"""

import json
from pathlib import Path
from typing import cast

from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pipeline.tensors import save_tensors


class ShardWriter(HuggingFaceStorageWriter):
    """DCP's writer of safetensors, one file a rank: the same bytes, without a copy."""

    def __init__(self, folder: str) -> None:
        """Files go to ``folder``, which exists."""
        super().__init__(folder, save_distributed=True)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's file, none when it has no tensors. Raises what the disk does; the file is not synced."""
        tensors, offsets, results = dict[str, Tensor](), dict[str, dict[str, list[int]]](), list[WriteResult]()
        for item in plan.items:
            name, chunk = item.index.fqn, item.tensor_data.chunk if item.tensor_data else None
            if chunk is None or name in tensors:
                raise ValueError(f"{name}: a checkpoint holds tensors, of each one part a rank")
            tensors[name] = cast(Tensor, planner.resolve_data(item)).detach().cpu()
            offsets[name] = {"saved_offsets": list(chunk.offsets)}
            results.append(WriteResult(item.index, tensors[name].nbytes, None))
        if tensors:
            metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
            file = f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
            save_tensors(tensors, Path(self.path, file), metadata)
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written
