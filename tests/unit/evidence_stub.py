"""Stands in for `patchmill` in the tests of the queue: trains a line a hundredth of a second, and has a score for every probe."""

import json
import signal
import sys
import time
from pathlib import Path

from pipeline.config import load_config


def lines(folder: Path) -> list[dict]:
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(folder: Path, **record: object) -> None:
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({"kind": record.pop("kind"), "time": time.time(), **record}) + "\n")


def train(words: list[str]) -> int:
    cfg = load_config([words[0]], words[1:])
    folder, stopped = Path(cfg.run.dir), []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    if (folder / "fail").exists():
        sys.stderr.write("patchmill: out of luck\n")
        return 1
    (folder / "config.yaml").write_text(cfg.to_yaml())
    first = max((line["step"] for line in lines(folder)), default=0)
    write(folder, kind="resume" if first else "start", step=first)
    for step in range(first + 1, cfg.train.steps + 1):
        write(folder, kind="train", step=step)
        time.sleep(0.01)
        if stopped:
            return 75
    (folder / "why_stopped.json").write_text('{"done": true}\n')
    return 0


def probe(verb: str, words: list[str]) -> int:
    kind = "knn" if verb == "knn" else "linear" if "--exact" in words else "linear_heads"
    folder, weights = Path(words[-3]), words[-1]
    step = lines(folder)[-1]["step"] if weights == "model" else 0
    write(folder, kind="eval", step=step, **{f"{kind}_{weights}": 30.0 + len(folder.name) + (weights == "model")})
    return 0


def finetune(folder: Path) -> int:
    (folder / "finetune").mkdir()
    (folder / "finetune" / "why_stopped.json").write_text('{"done": true}')
    return 0


def compression(folder: Path) -> int:
    found = [
        {"ratio": ratio, "gmacs": 0.03 - 0.02 * ratio, "top1": 60 - 10 * ratio, "images_per_s": 900}
        for ratio in (0, 0.4)
    ]
    write(folder, kind="eval", step=1, compression=found)
    return 0


if __name__ == "__main__":
    verb, words = sys.argv[1], sys.argv[2:]
    done = {"finetune": finetune, "compression": compression}
    if verb == "train":
        sys.exit(train(words))
    sys.exit(done[words[0]](Path(words[1])) if words[0] in done else probe(words[0], words[1:]))
