"""Allowed imports between the parts of the package, and modules that must stay unloaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FOUNDATION = {"config", "errors", "files", "identifiers", "machine", "records", "spec"}
# Dependencies point down only. Each part may import itself and the parts listed here.
ALLOWED: dict[str, set[str]] = {
    "errors": {"records"},
    "files": {"errors"},
    "identifiers": set(),
    "machine": set(),
    "records": set(),
    "spec": {"errors"},
    "config": {"errors"},
    "synthetic": FOUNDATION,
    "kernels": set(),
    "photo": FOUNDATION,
    "data": {*FOUNDATION, "pages", "photo"},
    "models": FOUNDATION,
    "training": {*FOUNDATION, "data", "kernels", "models", "photo"},
    # The torch-free runtime packs jobs in the kernels' format and compiles csrc.
    "engines": {*FOUNDATION, "models", "kernels", "synthetic"},
    "dali": {*FOUNDATION, "photo", "data", "kernels", "training", "engines", "screening"},
    "pictures": set(),
    "csv_cells": set(),
    "pages": {"files"},
    "cluster": FOUNDATION,
    "recipes": set(),
    "evaluation": {*FOUNDATION, "csv_cells", "photo", "data", "models", "training", "pages", "pictures"},
    "study": {*FOUNDATION, "photo", "data", "models", "training", "evaluation", "pages", "pictures", "cluster"},
    "screening": {*FOUNDATION, "csv_cells", "data", "photo", "engines", "pages", "pictures", "cluster"},
    "serving": {*FOUNDATION, "photo", "engines", "pictures", "screening"},
    "sizing": {*FOUNDATION, "photo", "engines", "screening"},
    "workflow": {
        *FOUNDATION,
        "recipes",
        "photo",
        "data",
        "models",
        "training",
        "evaluation",
        "engines",
        "screening",
        "dali",
        "kernels",
        "sizing",
        "synthetic",
    },
}
STANDARD_LIBRARY_ONLY = FOUNDATION
# These parts run without torch. Building an engine needs torch; running one does not.
NO_TORCH = {"synthetic", "photo", "data", "screening", "serving", "sizing", *FOUNDATION}
NO_TORCH_MODULES = {"engines.bundle", "engines.runtime", "engines.openvino_backend", "engines.parity", "engines"}
NO_TORCH_MODULES |= {
    "engines.onnxruntime_backend",
    "engines.archive",
    "engines.cuda_graph",
    "engines.cuda_sample",
    "engines.heatmap",
    "engines.openvino_core",
    "engines.tensorrt_backend",
    "engines.tensorrt_build",
    "engines.tensorrt_runtime",
    "engines.tensorrt_context",
    "engines.tensorrt_rtx_backend",
    "engines.proof",
    "kernels",
    "kernels.building",
    "kernels.host",
    "kernels.jobs",
}
TORCH = {"torch", "torchvision", "timm", "triton", "onnx", "safetensors"}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted((ROOT / "fastfundus").glob("**/*.py")):
        found.append((".".join(path.relative_to(ROOT / "fastfundus").with_suffix("").parts), path))
    for folder in ("kernels", "engines"):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            found.append((".".join(path.relative_to(ROOT).with_suffix("").parts), path))
    unique = {path.resolve(): (name.removesuffix(".__init__"), path) for name, path in found}
    return list(unique.values())


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.add(node.module)
            # `from fastfundus import kernels` imports a module, too.
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "fastfundus"}
    return names


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_down(name: str, path: Path) -> None:
    part = name.split(".")[0]
    names = imported(path)
    ours = {other.split(".")[1] for other in names if other.startswith("fastfundus.")}
    ours -= {"__version__", "PreprocessSpec", "Status", "FastFundusError"}
    if part not in ("cli", "__main__", "__init__"):
        assert part in ALLOWED, f"{part} is new: list the parts that it may import in ALLOWED"
        assert ours <= ALLOWED[part] | {part}
    assert "bench" not in {other.split(".")[0] for other in names}
    outside = {other.split(".")[0] for other in names} - {"fastfundus"}
    if part in STANDARD_LIBRARY_ONLY:
        assert outside <= set(sys.stdlib_module_names)
    if part in NO_TORCH or name in NO_TORCH_MODULES:
        assert not outside & TORCH
    if part == "cli":
        # Commands import their dependencies when they run, so that `--help` answers at once.
        top = {node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)}
        heavy = {getattr(node, "module", None) or node.names[0].name for node in top}
        if name != "cli.training_progress":
            assert {module.split(".")[0] for module in heavy} <= {*sys.stdlib_module_names, "click", "fastfundus"}


def runtime_imports(path: Path) -> set[str]:
    """Return the modules that a file imports when it runs, also those imported inside functions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # The name may be a module of the package, or something defined in the module.
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("fastfundus.") for name in found if name.startswith("fastfundus.")}


def test_no_import_circle_even_inside_functions() -> None:
    paths = dict(modules())
    graph = {name: {other for other in runtime_imports(path) if other in paths} for name, path in paths.items()}
    graph = {name: others - {name} for name, others in graph.items()}
    # Remove modules without remaining imports until none is left; what stays is on a circle, or depends on one.
    while leaves := {name for name, others in graph.items() if not others}:
        graph = {name: others - leaves for name, others in graph.items() if name not in leaves}
    assert not graph, f"these modules import each other in a circle: {graph}"


@pytest.mark.parametrize("command", [["-c", "import fastfundus"], ["-m", "fastfundus", "--help"]])
def test_nothing_heavy_is_loaded(command: list[str]) -> None:
    listing = "import atexit, sys; atexit.register(lambda: print('LOADED', *sorted(sys.modules)))\n"
    if command[0] == "-c":
        code = listing + command[1]
    else:
        code = (
            listing
            + "import runpy; sys.argv = ['fastfundus', '--help']; runpy.run_module('fastfundus', None, '__main__')"
        )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.rsplit("LOADED", 1)[1].split())
    assert not loaded & {"torch", "timm", "numpy", "cv2", "polars", "openvino", "matplotlib", "rich", "onnx"}


def test_screening_loads_no_torch(tmp_path: Path) -> None:
    code = "import sys, fastfundus; fastfundus.screen, fastfundus.prepare, fastfundus.Bundle, fastfundus.PhotoCache\n"
    code += "import fastfundus.screening.run, fastfundus.engines.openvino_backend as b; b.precisions()\n"
    code += "assert not {'torch', 'timm', 'onnx'} & set(sys.modules), 'torch was loaded'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=60)


@pytest.mark.parametrize("folder", ["kernels", "engines"])
def test_top_level_folders_refuse_to_be_a_second_copy(folder: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode != 0
    assert f"import fastfundus.{folder}, not {folder}" in done.stderr


@pytest.mark.parametrize("folder", ["kernels", "engines", "csrc"])
def test_links_are_links(folder: str) -> None:
    link = ROOT / "fastfundus" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder
