"""Who may import whom, read from the source; and the size of functions and files."""

import ast
import gc
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("pipeline", "data_prep", "slurm")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}
NO_TORCH = ("config", "settings", "section", "chain_settings", "eval_settings", "method_checks", "keys", "order", "costs",
            "estimate", "memory", "planner", "forecast", "zero_config", "zero_memory")  # fmt: skip
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "ffcv",
    "mlflow",
    "deepspeed",
    "submitit",
    "cv2",
    "PIL",
    "matplotlib",
    "sklearn",
}
MAX_FUNCTION, MAX_FILE = 50, 400


def parse(source: str) -> ast.Module:
    """The syntax tree. Without the garbage collector: CPython 3.11 takes a collection in between for too deep a recursion."""
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        gc.enable()


def only_types(node: ast.AST) -> bool:
    """``if TYPE_CHECKING:``"""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(body: Iterable[ast.AST], *, inside_functions: bool) -> Iterator[ast.AST]:
    for node in body:
        if only_types(node):
            yield from statements(node.orelse, inside_functions=inside_functions)
            continue
        yield node
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from statements(ast.iter_child_nodes(node), inside_functions=inside_functions)


def imports(source: str, module: str, *, inside_functions: bool = True, package: bool = False) -> set[str]:
    """Full names of what a module imports; ``from pipeline import keys`` is pipeline.keys where that is a module."""
    found = set()
    parts = module.split(".")
    for node in statements(parse(source).body, inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + package] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{name}.{alias.name}" for alias in node.names}
            modules = inner & FILES.keys()
            found |= modules
            if not modules or modules != inner:
                found.add(name)
    return found


def imported_by(module: str, *, inside_functions: bool = True) -> set[str]:
    path = FILES[module]
    return imports(path.read_text(), module, inside_functions=inside_functions, package=path.name == "__init__.py")


def tops(names: Iterable[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def own(names: Iterable[str]) -> set[str]:
    """Imports from this project."""
    return {name for name in names if name.split(".")[0] in FOLDERS} - {"pipeline"}


def test_the_reader_of_imports_sees_what_it_should() -> None:
    source = """
from typing import TYPE_CHECKING
import torch.nn as nn
from pipeline import keys, __version__
if TYPE_CHECKING:
    import mlflow
else:
    import json
try:
    import ffcv
except ImportError:
    pass
class A:
    from . import order
    def f(self):
        import cv2
        from ..methods import mae
"""
    whole = imports(source, "pipeline.train")
    assert whole >= {"typing", "torch.nn", "pipeline.keys", "pipeline", "json", "ffcv", "pipeline.order", "cv2"}
    assert "mlflow" not in whole
    assert "cv2" not in imports(source, "pipeline.train", inside_functions=False)
    assert imports("from . import order", "pipeline", package=True) == {"pipeline.order"}
    assert imports("from ..keys import stream", "pipeline.methods.mae") == {"pipeline.keys"}
    assert imports("from .common import x", "pipeline.methods", package=True) == {"pipeline.methods.common"}


@pytest.mark.parametrize("name", NO_TORCH)
def test_no_torch_in_what_must_load_fast(name: str) -> None:
    found = imported_by(f"pipeline.{name}")
    assert not tops(found) & HEAVY
    assert own(found) <= {f"pipeline.{other}" for other in NO_TORCH}


@pytest.mark.parametrize("name", ["segments", "vit"])
def test_segments_and_vit_stand_on_torch_timm_and_keys(name: str) -> None:
    found = imported_by(f"pipeline.{name}")
    assert own(found) <= {"pipeline.keys"}
    allowed = {"torch", "torchvision", "timm", "numpy", "pipeline"} if name == "vit" else {"torch", "numpy", "pipeline"}
    assert tops(found) - sys.stdlib_module_names <= allowed


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("pipeline.methods")])
def test_methods_stand_on_segments_vit_keys_and_costs(module: str) -> None:
    allowed = {f"pipeline.{name}" for name in ("segments", "vit", "keys", "costs")}
    others = {name for name in own(imported_by(module)) if not name.startswith("pipeline.methods")}
    assert others <= allowed


@pytest.mark.parametrize("module", [name for name in FILES if not name.startswith("pipeline")])
def test_data_preparation_and_cluster_see_little_of_the_pipeline(module: str) -> None:
    allowed = {f"pipeline.{name}" for name in ("config", "settings", "chain_settings", "keys", "costs")}
    found = {name for name in own(imported_by(module, inside_functions=False)) if name.startswith("pipeline")}
    assert found <= allowed
    assert not tops(imported_by(module, inside_functions=False)) & {"torch", "ffcv", "mlflow", "submitit"}


@pytest.mark.parametrize("module", FILES)
def test_nobody_imports_the_command_line(module: str) -> None:
    if module != "pipeline.__main__":
        assert "pipeline.cli" not in imported_by(module)


@pytest.mark.parametrize("module", FILES)
def test_heavy_optional_packages_wait_for_their_function(module: str) -> None:
    assert not tops(imported_by(module, inside_functions=False)) & {"ffcv", "mlflow", "deepspeed", "submitit"}


@pytest.mark.parametrize("module", FILES)
def test_functions_and_files_fit_on_a_few_screens(module: str) -> None:
    source = FILES[module].read_text()
    assert len(source.splitlines()) <= MAX_FILE
    too_long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= MAX_FUNCTION
    }
    assert too_long == {}
