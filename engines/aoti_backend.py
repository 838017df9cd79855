"""AOTInductor backend: the model compiled ahead of time into one package for this CPU or GPU.

Both building and running need torch. The package contains machine code for one device and one torch version; both are
recorded in `bundle.json`, and loading it on any other combination is refused.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.runtime import Blueprint, Engine, require_needs
from fastfundus.errors import BundleError, require
from fastfundus.machine import cpu_computes_bfloat16

__all__ = ["PACKAGE", "AotiEngine", "build", "load", "needs", "precisions"]

PACKAGE = "torch"
_FILE = "engine.pt2"
MAX_BATCH = 64
"""Photos of one call of the package; larger batches are split."""


def needs() -> dict[str, str]:
    """Return what a machine needs to run engines built here: this torch, and this GPU or CPU instruction set."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": device, "torch": torch.__version__}


def precisions() -> tuple[str, ...]:
    """Return the precisions this machine computes in, fastest first."""
    import torch

    # torch's own check also returns True for processors that only emulate bfloat16.
    fast = torch.cuda.get_device_capability()[0] >= 8 if torch.cuda.is_available() else cpu_computes_bfloat16()
    return ("bf16", "fp32") if fast else ("fp32",)


def build(blueprint: Blueprint, folder: Path, precision: str) -> dict[str, Any]:
    """Compile the model for the device of this machine.

    Args:
        blueprint: source of the engine; only its model is used.
        folder: folder to write the package to.
        precision: precision of the network; preprocessing and probabilities stay float32.

    Returns:
        Entries for `bundle.json`: the engine's file, and what a machine needs to run it.
    """
    import copy

    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, size = copy.deepcopy(blueprint.model).to(device).eval(), blueprint.size
    model.compute_in(getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[precision]))
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8, device=device)
    with torch.no_grad():
        # With an upper limit torch knows that 32 bits hold all indices; without one it assumes so, unchecked.
        batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        try:
            with _cuda_home():
                torch._inductor.aoti_compile_and_package(program, package_path=str(folder / _FILE))
        except Exception as error:
            # The compilers that torch calls have no exception type in common; other precisions may still work.
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BundleError(
                f"torch cannot compile the engine in {precision} ({cause}); AOTInductor needs a C++ compiler, and on a "
                "GPU the CUDA toolkit (CUDA_HOME)"
            ) from error
    return {"engine": _FILE, "needs": needs()}


@contextmanager
def _cuda_home() -> Iterator[None]:
    """Tell torch where the CUDA toolkit is: it takes the folder above nvcc, which may be a script in another place."""
    if "CUDA_HOME" in os.environ or (root := toolkit_root()) is None:
        yield
        return
    os.environ["CUDA_HOME"] = str(root)
    try:
        yield
    finally:
        del os.environ["CUDA_HOME"]


def toolkit_root() -> Path | None:
    """Return the root of the CUDA toolkit as nvcc states it, or None if there is no nvcc or it has no headers."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        return None
    printed = subprocess.run(
        [compiler, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    stated = re.search(r"^#\$ TOP=(.+)$", printed.stderr, re.MULTILINE)
    root = Path(stated[1].strip()).resolve() if stated else Path(compiler).resolve().parent.parent
    return root if (root / "include" / "cuda.h").is_file() else None


def load(folder: Path, metadata: dict[str, Any]) -> AotiEngine:
    """Load the engine of a bundle.

    Raises:
        BundleError: if the engine was built for another device or torch version.
    """
    require("torch", extra="train")
    require_needs(folder, metadata["needs"], needs())
    return AotiEngine(folder / metadata["engine"], metadata["spec"]["size"])


class AotiEngine(Engine):
    """Engine that runs a compiled AOTInductor package.

    Args:
        file: path of the package.
        size: side of the photos in pixels.

    Raises:
        BundleError: if the package cannot be loaded.
    """

    def __init__(self, file: Path, size: int) -> None:
        import torch

        self._torch = torch
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._model: Any = torch._inductor.aoti_load_package(str(file))
        except Exception as error:
            # Damaged archive or library that does not load: torch has no dedicated exception type for these.
            raise BundleError(f"{file}: torch cannot load it ({str(error).splitlines()[0]}); rebuild it") from None
        super().__init__(size, str(file.parent))

    def run_on_device(self, photos: Any) -> Any:
        """Score a uint8 [N, S, S, 3] tensor on the engine's device, without checking it; N is at most `MAX_BATCH`.

        Returns:
            Tensor of probabilities on the same device.
        """
        with self._torch.inference_mode():
            return self._model(photos)

    def _run(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._run_on_device(self._torch.from_numpy(np.ascontiguousarray(photos)).to(self._device))

    def _run_on_device(self, photos: Any) -> NDArray[np.float32]:
        parts = [self.run_on_device(part).float() for part in photos.split(MAX_BATCH)]
        return np.asarray(self._torch.cat(parts).cpu().numpy())

    def _free(self) -> None:
        self._model = None
