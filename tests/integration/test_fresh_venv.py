"""An exported encoder in a new virtual environment that has timm and nothing of this project."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from pipeline import checkpoint
from pipeline.config import Config
from pipeline.export import export
from pipeline.methods import build_method
from pipeline.vit import normalise

# What a reader of the card does: its second block where torchvision does not load, its first, and the call for the file.
SCRIPT = r"""
import importlib.util, re, subprocess, sys
from pathlib import Path
import safetensors.torch, torch
from PIL import Image

torch.set_num_threads(1)
assert importlib.util.find_spec("pipeline") is None
folder, load_file = Path(sys.argv[1]), sys.argv[2]
use, declare = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
names = {"image": Image.open(folder.parent / "image.png")}
loads = subprocess.run([sys.executable, "-I", "-c", "import torchvision"], capture_output=True).returncode == 0
if not loads:
    exec(declare, names)
exec(use.replace("/path/to/this/folder", str(folder)), names)
config = names["timm"].data.resolve_model_data_config(names["model"])
mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
images = (safetensors.torch.load_file(folder.parent / "images.safetensors")["images"].float() / 255 - mean) / std
with torch.no_grad():
    tokens = names["model"].forward_features(images)
    exec(load_file, names | {"safetensors": safetensors}, names)
    from_file = names["model"].eval().forward_features(images)
safetensors.torch.save_file({"folder": tokens, "file": from_file, "card": names["tokens"].clone()},
                            folder.parent / "features.safetensors")
print("torch", torch.__version__, "torchvision loads" if loads else "torchvision needs the two operators")
"""


@pytest.mark.slow  # pip installs torch
@pytest.mark.timeout(1800)
def test_timm_alone_gives_the_same_features_bit_for_bit(
    tiny_config: Callable[..., Config], images: Tensor, tmp_path: Path
) -> None:
    cfg = tiny_config("mae", model__drop_path=0.1, data__eval_crop=1.0)
    method = build_method(cfg).eval()
    with torch.no_grad():
        for number, parameter in enumerate(method.encoder.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        expected = method.encoder.forward_features(normalise(images))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(cfg.to_yaml())
    checkpoint.save(run / "checkpoints", 2, {f"model.{n}": p.detach() for n, p in method.named_parameters()}, {})
    export(run, tmp_path / "folder")
    call = str(export(run, tmp_path / "encoder.safetensors")).partition("\n")[2]
    safetensors.torch.save_file({"images": images}, tmp_path / "images.safetensors")
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(tmp_path / "image.png")

    python = tmp_path / "venv" / "bin" / "python"
    wanted = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision", "timm")]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted, "safetensors"], check=True)
    load_file = "\n".join(line.strip() for line in call.splitlines())
    command = [python, "-I", "-c", SCRIPT, tmp_path / "folder", load_file]
    found = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    print(found.stdout)  # noqa: T201
    got = safetensors.torch.load_file(tmp_path / "features.safetensors")
    assert torch.equal(got["folder"], expected) and torch.equal(got["file"], expected)
    torch.testing.assert_close(got["card"], expected[:1], atol=1e-5, rtol=0)
