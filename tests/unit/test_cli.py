"""The command line: help with examples, exit codes, and nothing heavy where it is not needed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app, main
from pipeline.config import load_config

VERBS = [["train"], ["check"], ["estimate"], ["prep", "scan"], ["prep", "write"], ["prep", "verify"], ["eval", "knn"],
         ["eval", "linear"], ["eval", "attentive"], ["eval", "finetune"], ["eval", "compression"],
         ["visualize"], ["export"], ["import", "mae"], ["sync"], ["compare"], ["bench", "data"], ["bench", "methods"],
         ["bench", "attention"], ["bench", "parity"], ["bench", "engines"], ["bench", "loop"],
         ["bench", "tracking"], ["bench", "save"], ["bench", "evidence"], ["quickstart"],
         ["submit"], ["sweep"], ["chain"], ["scale"], ["status"], ["cancel"], ["logs"]]  # fmt: skip


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["patchmill", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_help_with_an_example(verb):
    result = CliRunner().invoke(app, [*verb, "--help"])
    assert result.exit_code == 0
    assert f"Example: patchmill {' '.join(verb)}" in result.output


def test_the_list_above_is_all_verbs():
    groups = {group.name: group.typer_instance for group in app.registered_groups}
    names = {(command.callback.__name__,) for command in app.registered_commands}
    names |= {
        (name, command.callback.__name__) for name, group in groups.items() for command in group.registered_commands
    }
    assert names == {tuple(verb) for verb in VERBS}


def modules_after(*arguments: str) -> set[str]:
    code = ("import sys\nfrom pipeline.cli import main\n"
            f"sys.argv = ['patchmill', *{arguments!r}]\n"
            "try:\n    main()\nexcept SystemExit as stop:\n    code = stop.code\n"
            "print('\\nMODULES', code, *{name.split('.')[0] for name in sys.modules})")  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    words = out.split("MODULES ")[1].split()
    assert words[0] in ("0", "None"), out
    return set(words[1:])


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    assert not modules_after(*arguments) & {"torch", "numpy", "ffcv", "mlflow", "timm", "yaml"}


def test_check_imports_no_torch(tmp_path):
    settings = ["data.loader=synthetic", f"run.dir={tmp_path}"]
    assert not modules_after("check", "quickstart/pcae", *settings) & {"torch", "ffcv", "mlflow", "timm", "cv2"}


@pytest.mark.parametrize("loader", ["synthetic", "ffcv", "folder"])
def test_estimate_imports_no_torch(loader):
    arguments = ("estimate", "imagenet/pcae_vit_l", f"data.loader={loader}", "data.num_samples=5000", "--gpus", "16")
    assert not modules_after(*arguments) & {"torch", "ffcv", "mlflow", "timm", "cv2"}


def write_run(folder: Path, base_lr: float) -> str:
    folder.mkdir()
    cfg = load_config(["quickstart/mae"], ["data.loader=synthetic", f"run.dir={folder}", f"optim.base_lr={base_lr}"])
    (folder / "config.yaml").write_text(cfg.to_yaml())
    lines = [{"kind": "start", "time": 0, "step": 0}, {"kind": "train", "time": 1, "step": 1, "loss": 1.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_compare_imports_no_torch_and_what_draws_only_to_draw(tmp_path):
    runs = [write_run(tmp_path / name, lr) for name, lr in (("a", 1e-3), ("b", 2e-3))]
    heavy = {"torch", "ffcv", "mlflow", "timm", "cv2", "matplotlib"}
    assert not modules_after("compare", *runs, "--json", str(tmp_path / "out.json")) & heavy
    assert modules_after("compare", *runs, "--out", str(tmp_path / "out.png")) & heavy == {"matplotlib"}


def test_check_reports_all_problems_with_exit_code_2(monkeypatch, capsys, tmp_path):
    code = run_main(monkeypatch, "check", "quickstart/mae", f"run.dir={tmp_path / 'run'}", "model.nam=vit_l", "train.epochs=many",
                    "data.image_size=33")  # fmt: skip
    error = capsys.readouterr().err
    assert code == 2
    assert "did you mean model.name?" in error and "train.epochs = 'many'" in error and "data.image_size = 33" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [
    ["train", "no/such/config"],
    ["train", "quickstart/mae", "run.dir=/tmp/x", "data.train=/no/such.beton"],
    ["eval", "knn", "/no/such/run"],
    ["eval", "attentive", "/no/such/run"],
    ["visualize", "/no/such/run"],
    ["export", "/no/such/run", "out.safetensors"],
    ["import", "mae", "/no/such.pth", "quickstart/mae", "data.train=x", "run.dir=/tmp/x"],
    ["sync", "/no/such/run"],
    ["compare", "/no/such/run", "/no/such/other"],
    ["compare"],
    ["sweep", "/no/such/space.yaml", "quickstart/mae"],
    ["prep", "scan", "/no/such/folder", "/tmp/m.jsonl"],
    ["prep", "write", "/no/such/manifest.jsonl", "/tmp/x.beton"],
    ["prep", "verify", "/no/such.beton"],
    ["bench", "data", "/no/such.beton", "/no/such/manifest.jsonl"],
    ["estimate", "imagenet/mae_vit_b", "--gpu", "H1"],
    ["estimate", "imagenet/mae_vit_b", "--gpu-table", "/no/such.yaml"],
], ids=lambda words: " ".join(words[:2]))  # fmt: skip
def test_a_missing_input_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    arguments = [word.replace("/tmp/", f"{tmp_path}/") for word in arguments]
    assert run_main(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert re.match(r"patchmill: .*no", error), error
    assert len(error.splitlines()) == 1


def test_check_says_what_only_the_number_of_samples_shows(monkeypatch, capsys, tmp_path):
    settings = ["cifar10/mae", f"run.dir={tmp_path / 'run'}", "data.loader=synthetic"]
    wrong = {
        "data.num_samples=63": "train.global_batch = 64: 63 samples do not fill one global batch of 64",
        "train.epochs=1": "optim.warmup_epochs, optim.warmup_steps: 16 steps of warm-up in a run of 16 steps; shorten it",
    }
    for setting, message in wrong.items():
        assert run_main(monkeypatch, "check", *settings, setting) == 2
        assert message in capsys.readouterr().err
    assert run_main(monkeypatch, "check", *settings) == 0
    assert "16 an epoch" in capsys.readouterr().out
