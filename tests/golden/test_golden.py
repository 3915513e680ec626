"""Golden losses: every shipped preset, at test size, trains to the same bits as when its file was written.

A ``.txt`` beside this file holds one loss a step. Bits depend on the processor and on torch's build, so a worker process
computes them under settings that many machines share, and each file names the fingerprint of the arithmetic it was
made with. On a machine of another fingerprint the first losses are compared to 1e-4.

After an intended change: ``python tests/golden/test_golden.py --write`` (or with the names of some presets).
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs"
STEPS, FIRST_STEPS, TOLERANCE = 30, 10, 1e-4
COMMAND = "python tests/golden/test_golden.py --write"
# MKL's branch for all processors costs about half more time; AVX2 is what all of today's have. One thread, everywhere.
SETTINGS = {
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(HERE.parents[1]),  # this checkout, whichever is installed
}
TEST_SIZE = {
    "run.dir": "runs/golden", "model.name": "vit_p", "data.loader": "synthetic", "engine.precision": "fp32",
    "train.global_batch": 4, "train.micro_batch": 4, "train.steps": STEPS, "train.epochs": "null",
    "optim.warmup_steps": 3, "optim.warmup_epochs": "null",
}  # fmt: skip
# Half the batch: 224 px and eight decoder blocks take long.
TEST_SIZE_IMAGENET = {
    "model.patch_size": 16, "method.decoder_width": 96, "method.decoder_heads": 3,
    "train.global_batch": 2, "train.micro_batch": 2,
}  # fmt: skip


def presets() -> list[str]:
    """Every shipped recipe; those of ViT-L and ViT-H are ViT-B's with another encoder, and here all have the same."""
    paths = [
        path for folder in ("quickstart", "cifar10", "imagenet") for path in sorted((CONFIGS / folder).glob("*.yaml"))
    ]
    names = [str(path.relative_to(CONFIGS).with_suffix("")) for path in paths]
    return [name for name in names if not name.endswith(("_vit_l", "_vit_h"))]


def golden_path(preset: str, folder: Path = HERE) -> Path:
    return folder / f"{preset.replace('/', '-')}.txt"


@dataclass(frozen=True)
class Golden:
    """What a file holds: the fingerprint and a loss a step."""

    fingerprint: str
    losses: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> "Golden":
        lines = path.read_text().splitlines()
        (fingerprint,) = [line.removeprefix("# fingerprint: ") for line in lines if line.startswith("# fingerprint: ")]
        return cls(fingerprint, tuple(float.fromhex(line) for line in lines if not line.startswith("#")))

    def write(self, path: Path, preset: str) -> None:
        header = [f"# Losses of configs/{preset}.yaml at test size: {STEPS} optimizer steps on synthetic images, fp32, one thread.",
                  f"# One step a line, as float.hex(). After an intended change: {COMMAND}",
                  f"# fingerprint: {self.fingerprint}"]  # fmt: skip
        path.write_text("\n".join([*header, *(loss.hex() for loss in self.losses)]) + "\n")


def compare(golden: Golden, now: Golden, preset: str) -> None:
    """Equal bits under the same fingerprint, else the first losses to 1e-4. Raises AssertionError that names the step."""
    assert len(golden.losses) == len(now.losses) == STEPS, f"{preset}: {len(golden.losses)} losses for {STEPS} steps"
    same = golden.fingerprint == now.fingerprint
    if not same:
        warnings.warn(f"{preset}: compared to {TOLERANCE} over {FIRST_STEPS} steps only: the arithmetic here is "
                      f"{now.fingerprint}, the file's is {golden.fingerprint}", stacklevel=2)  # fmt: skip
    for step, (old, new) in enumerate(zip(golden.losses, now.losses, strict=True)):
        equal = old == new if same else step >= FIRST_STEPS or math.isclose(old, new, rel_tol=TOLERANCE)
        assert equal, f"{preset}: the loss of step {step} is {new!r}, it was {old!r}; if that is intended: {COMMAND}"


class Worker:
    """A process under ``SETTINGS``: they are read when torch loads, so this one cannot take them on any more."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.PIPE, env=os.environ | SETTINGS)  # fmt: skip

    def golden(self, preset: str) -> Golden:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(preset + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "the worker died"}')
        assert "error" not in answer, f"{preset}: {answer['error']}"
        return Golden(answer["fingerprint"], tuple(float.fromhex(loss) for loss in answer["losses"]))

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def fingerprint() -> str:
    """Which arithmetic this process has: torch's version, its vector width, and a hash of elementary results' bits."""
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torch import Tensor

    generator, results = torch.Generator().manual_seed(0), list[Tensor]()

    def numbers(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) - 0.5).requires_grad_()  # exact on every machine

    for tokens in (17, 65, 50, 197):
        x, weight, wide = numbers(4, tokens, 96), numbers(288, 96), numbers(768, 96)
        q, k, v = F.linear(x, weight).unflatten(2, (3, 3, 32)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        masked = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(tokens, tokens).tril().bool())
        hidden = F.gelu(F.linear(F.layer_norm(x + mixed, (96,)), wide))
        out = [masked, hidden, hidden @ wide, hidden.softmax(-1), F.cosine_similarity(x, mixed, dim=-1)]
        sum(part.square().sum() for part in out).backward()
        results += [*out, x.grad, weight.grad, wide.grad]
    optimizer = torch.optim.AdamW([wide], lr=1e-3, fused=True)
    optimizer.step()
    results += [wide, torch.arange(1000.0).double().sin(), torch.empty(1000).normal_(generator=generator)]
    digest = hashlib.sha256(b"".join(result.detach().numpy().tobytes() for result in results)).hexdigest()[:16]
    return f"{digest}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def losses(preset: str) -> list[float]:
    """Train as ``pipeline.train.Trainer`` does, without its folder."""
    import torch

    from pipeline import order
    from pipeline.config import load_config
    from pipeline.engine.torch import TorchEngine
    from pipeline.launch import Portion, World
    from pipeline.optim import lr_at, momentum_at
    from pipeline.order import Plan
    from pipeline.runs import open_images
    from pipeline.steps import update

    size = TEST_SIZE | (TEST_SIZE_IMAGENET if preset.startswith("imagenet/") else {})
    cfg = load_config([CONFIGS / f"{preset}.yaml"], [f"{key}={value}" for key, value in size.items()])
    loader = open_images(cfg, "train", augment=True)
    plan, portion = Plan.of(cfg, loader.num_samples), Portion.of(cfg, World())
    engine = TorchEngine(cfg, torch.device("cpu"))
    found = []
    steps = order.run_order(cfg.train.seed, 0, STEPS, loader.num_samples, cfg.train.global_batch)
    with loader.batches(steps) as batches:
        for step, batch in enumerate(batches):
            lr = lr_at(step, plan.total_steps, plan.warmup_steps, cfg.lr)
            momentum = momentum_at(step, plan.total_steps, *cfg.momentum)
            found.append(float(update(engine, batch, portion, lr, cfg.optim.clip, momentum)["loss"]))
    loader.close()
    return found


def work() -> None:
    """Answer each preset on stdin with one line of JSON."""
    import torch

    torch.set_num_threads(1)
    mark = fingerprint()
    for line in sys.stdin:
        try:
            answer = {"fingerprint": mark, "losses": [loss.hex() for loss in losses(line.strip())]}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.mark.parametrize("preset", presets())
def test_losses_are_the_golden_ones(worker: Worker, preset: str) -> None:
    assert golden_path(preset).is_file(), f"{preset} has no golden losses yet: {COMMAND} {preset}"
    compare(Golden.read(golden_path(preset)), worker.golden(preset), preset)


def test_every_file_belongs_to_a_preset() -> None:
    assert {path.name for path in HERE.glob("*.txt")} <= {golden_path(preset).name for preset in presets()}
    assert {"quickstart/mae", "cifar10/pcae", "imagenet/randsac_vit_b"} <= set(presets())


def test_one_flipped_bit_fails_under_the_same_fingerprint_only(tmp_path: Path) -> None:
    preset = "quickstart/mae"
    golden = Golden.read(golden_path(preset))
    path = golden_path(preset, tmp_path)
    golden.write(path, preset)
    assert path.read_text() == golden_path(preset).read_text()
    compare(golden, Golden.read(path), preset)
    lines = path.read_text().splitlines()
    mantissa, exponent = lines[-1].split("p")
    lines[-1] = f"{mantissa[:-1]}{int(mantissa[-1], 16) ^ 1:x}p{exponent}"
    path.write_text("\n".join(lines) + "\n")
    flipped = Golden.read(path)
    assert flipped.losses[-1] != golden.losses[-1] and flipped.losses[:-1] == golden.losses[:-1]
    with pytest.raises(AssertionError, match=f"quickstart/mae: the loss of step {STEPS - 1} is"):
        compare(flipped, golden, preset)
    with pytest.warns(UserWarning, match="the arithmetic here is another"):
        compare(flipped, Golden("another", golden.losses), preset)


@pytest.mark.parametrize(("step", "passes"), [(0, False), (FIRST_STEPS - 1, False), (FIRST_STEPS, True)])
def test_another_fingerprint_compares_the_first_steps_to_the_tolerance(step: int, passes: bool) -> None:
    golden = Golden("one", tuple(1.0 + index for index in range(STEPS)))

    def moved(share: float) -> Golden:
        return Golden("another", (*golden.losses[:step], golden.losses[step] * (1 + share), *golden.losses[step + 1 :]))

    with pytest.warns(UserWarning, match="compared to 0.0001 over 10 steps only"):
        compare(golden, moved(0.9 * TOLERANCE), "x")
        if passes:
            compare(golden, moved(2 * TOLERANCE), "x")
        else:
            with pytest.raises(AssertionError, match=f"the loss of step {step} is"):
                compare(golden, moved(2 * TOLERANCE), "x")


def write(names: list[str]) -> None:
    """Write the files of some presets, or of all; a file without a preset goes."""
    if unknown := set(names) - set(presets()):
        raise SystemExit(f"no preset {', '.join(sorted(unknown))}; there are {', '.join(presets())}")
    for path in set(HERE.glob("*.txt")) - {golden_path(preset) for preset in presets()}:
        path.unlink()
    worker = Worker()
    for preset in names or presets():
        worker.golden(preset).write(golden_path(preset), preset)
        sys.stdout.write(f"wrote {golden_path(preset).name}\n")
    worker.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        work()
    elif sys.argv[1:2] == ["--write"]:
        write(sys.argv[2:])
    else:
        raise SystemExit(f"usage: {COMMAND} [PRESET ...]")
