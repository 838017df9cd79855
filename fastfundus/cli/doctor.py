"""The ``fastfundus doctor`` command."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Any

import click

_PARTS = {
    "screening": (["numpy", "opencv-python-headless", "simplejpeg", "polars", "openvino"], "pip install fastfundus"),
    "training": (["torch", "torchvision", "timm", "scikit-learn"], "pip install 'fastfundus[train]'"),
    "building engines": (["onnx", "onnxruntime", "nncf"], "pip install 'fastfundus[train]'"),
    "Triton kernels": (["triton"], "pip install 'fastfundus[train]' on Linux x86-64"),
    "DALI": (["nvidia-dali-cuda130"], "pip install 'fastfundus[dali]'"),
    "TensorRT": (["tensorrt", "pycuda"], "pip install 'fastfundus[tensorrt]'"),
    "fleet": (["ray"], "pip install 'fastfundus[fleet]'"),
}


_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""Vector and matrix instructions that matter for speed."""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def examine() -> dict[str, Any]:
    """Examine what this machine and installation can do."""
    from fastfundus.machine import cpu_features, usable_cores

    parts = {
        name: {
            "versions": {package: _version(package) for package in packages},
            "ready": all(_version(package) for package in packages),
            "install": how,
        }
        for name, (packages, how) in _PARTS.items()
    }
    engine: dict[str, Any] = {"precision": None}
    if parts["screening"]["ready"]:
        from fastfundus.engines.openvino_backend import precisions

        engine["precision"] = precisions()[0]
    gpu = sampling = precision = None
    if parts["training"]["ready"]:
        try:
            import torch

            from fastfundus.config import LoopConfig
            from fastfundus.kernels import host
            from fastfundus.training.distributed import World
            from fastfundus.training.precision import resolve_precision

            loaded = host.load()
            sampling = "compiled C++" if loaded.library else f"plain PyTorch, thirty times slower ({loaded.reason})"
            gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
            precision = resolve_precision(LoopConfig(), World().device())[1]
        except (ImportError, OSError, RuntimeError) as error:
            # Installed but broken, for example by a missing system library or driver.
            parts["training"] |= {"ready": False, "install": f"torch is installed but fails: {error}"}
    return {
        "fastfundus": _version("fastfundus"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": usable_cores(),
        "cpu_features": [name for name in _FEATURES if name in cpu_features()],
        "gpu": gpu,
        "engine": engine,
        "training_precision": precision,
        "sampling_on_cpu": sampling,
        "parts": parts,
    }


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, for a bug report.")
def doctor(as_json: bool) -> None:
    r"""Report what this machine and installation can do, and how to install what is missing.

    \b
    Example:
      fastfundus doctor
    """
    found = examine()
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(f"fastfundus {found['fastfundus']}, Python {found['python']}, {found['platform']}")
    features = ", ".join(found["cpu_features"]) or "no known vector instructions"
    click.echo(f"{found['cores']} cores ({features}), GPU: {found['gpu'] or 'none'}")
    if found["engine"]["precision"]:
        click.echo(f"engines run in {found['engine']['precision']} here")
    if found["training_precision"]:
        click.echo(f"training runs in {found['training_precision']} here")
    if found["sampling_on_cpu"]:
        click.echo(f"sampling of photos on the CPU: {found['sampling_on_cpu']}")
    for name, part in found["parts"].items():
        versions = ", ".join(f"{package} {version or 'missing'}" for package, version in part["versions"].items())
        click.echo(f"{'ok     ' if part['ready'] else 'missing'}  {name}: {versions}")
        if not part["ready"]:
            click.echo(f"         {part['install']}")
