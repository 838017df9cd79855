"""Parity matrix: differences between the executors of the preprocessing on the same files, in grey levels and scores.

    python -m bench.evidence.parity      synthetic and real photos, a model trained on real ones; needs FASTFUNDUS_DATA

The reference decodes everything and samples in float64. "CPU" and "DALI CPU" are `prepare` with these backends,
including their own field search, rounded to grey levels. The kernels get the fully decoded pixels and the reference's
window, and are not rounded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench import RESULTS
from bench.harness.machine import environment
from bench.harness.real_photos import DATA, need
from fastfundus.dali.decode import DaliDecoder
from fastfundus.dali.prepare import DaliPreparer
from fastfundus.kernels import reference
from fastfundus.kernels import sample as triton_sample
from fastfundus.kernels.ops import packed, sample_ragged
from fastfundus.photo.prepare import decode_at, prepare_photo
from fastfundus.spec import PreprocessSpec
from fastfundus.training.augment import normalisation

PACKAGES = ("torch", "triton", "nvidia-dali-cuda130", "opencv-python-headless", "simplejpeg", "numpy")
HAS_GPU = torch.cuda.is_available()
TRITON = "Triton, GPU" if HAS_GPU else "Triton, interpreted"
KERNELS = ("C++", TRITON, *(["CUDA"] if HAS_GPU else []))
"""Executors that only run `sample`."""


def arguments(path: Path, spec: PreprocessSpec) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Return arguments of `sample_ragged`: the whole photo, and the matrices of the crop that `prepare` makes."""
    full = torch.from_numpy(decode_at(path.read_bytes(), 0))
    found = prepare_photo(path, spec)
    assert found.window is not None, f"{path}: {found.reason}"
    left, top, side = found.window
    scale = side / spec.size
    geometry = torch.tensor([[[scale, 0, left], [0, scale, top]]], dtype=torch.float32)
    sizes = torch.tensor([full.shape[:2]], dtype=torch.int32)
    return full.reshape(-1), torch.tensor([0]), sizes, geometry, torch.eye(3, 4)[None], spec.size


def by_triton(pixels: Tensor, *rest: Any) -> Tensor:
    """Sample with Triton's kernel, on the GPU or interpreted."""
    jobs, mode = packed(pixels, *rest)
    pixels = pixels.cuda() if HAS_GPU else pixels
    return triton_sample.launch(pixels, jobs, rest[-1], torch.float32, mode).permute(0, 3, 1, 2).cpu()


def by_cuda(pixels: Tensor, *rest: Any) -> Tensor:
    """Sample with csrc's kernel on the GPU."""
    from bench.gpu.cuda_twin import CudaTwin

    with tempfile.TemporaryDirectory() as folder:
        return CudaTwin.build(Path(folder)).sample(pixels.cuda(), *rest, torch.float32).cpu()


def crops(paths: Sequence[Path], spec: PreprocessSpec) -> dict[str, NDArray[np.float32]]:
    """Return crops by executor, float32 [N, S, S, 3] in grey levels."""
    # Masked pixels outside the field would make the executors look more similar.
    spec = replace(spec, mask_outside=False)
    samplers: dict[str, Callable[..., Tensor]] = {
        "reference": lambda *given: reference.sample(*given, torch.float32),
        "C++": sample_ragged,
        TRITON: by_triton,
        "CUDA": by_cuda,
    }
    found: dict[str, NDArray[np.float32]] = {}
    given = [arguments(path, spec) for path in paths]
    for name in ("reference", *KERNELS):
        found[name] = torch.cat([samplers[name](*one) for one in given]).permute(0, 2, 3, 1).numpy()
    images = [prepare_photo(path, spec).image for path in paths]
    found["CPU"] = np.stack([image for image in images if image is not None]).astype(np.float32)
    decoder = DaliDecoder(device_id=0 if HAS_GPU else None, batch_size=8)
    prepared = [DaliPreparer(spec, decoder)(paths[start : start + 8]) for start in range(0, len(paths), 8)]
    images = [result.image for group in prepared for result in group]
    found["DALI, GPU" if HAS_GPU else "DALI CPU"] = np.stack(images).astype(np.float32)  # type: ignore[arg-type]
    return found


@torch.inference_mode()
def probabilities(model: nn.Module, images: NDArray[np.float32], spec: PreprocessSpec) -> NDArray[np.float64]:
    """Return the model's probabilities for crops in grey levels, float32 [N, S, S, 3]."""
    matrix = torch.from_numpy(normalisation(spec)).float()
    inputs = torch.from_numpy(images) @ matrix[:3, :3].T + matrix[:3, 3]
    return torch.sigmoid(model.eval()(inputs.permute(0, 3, 1, 2)).double()).numpy()


def matrix(paths: Sequence[Path], spec: PreprocessSpec, model: nn.Module) -> dict[str, dict[str, float]]:
    """Compare each executor with the reference."""
    made = crops(paths, spec)
    want = made.pop("reference")
    expected = probabilities(model, want, spec)
    rows = {}
    for name, got in made.items():
        difference = np.abs(got - want)
        rows[name] = {
            "grey_levels_mean": float(difference.mean()),
            "grey_levels_worst_photo": float(difference.mean(axis=(1, 2, 3)).max()),
            "grey_levels_most": float(difference.max()),
            "probability_most": float(np.abs(probabilities(model, got, spec) - expected).max()),
        }
    return rows


def main() -> None:
    """Train a model, compare the executors, and write the JSON."""
    from fastfundus.synthetic import write_dataset
    from fastfundus.training.run import Run

    need(DATA / "odir" / "labels.csv")
    size = 224
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for command in (
            ("prepare", DATA / "odir", "--labels", DATA / "odir" / "labels.csv", "--output", work / "cache"),
            ("train", work / "cache", "--output", work / "run", "--label", "normal", "--backbone", "resnet18"),
        ):
            rest = ("--size", size) if command[0] == "prepare" else ("--epochs", 4, "--amp")
            subprocess.run([sys.executable, "-m", "fastfundus", *map(str, (*command, *rest))], check=True)
        model = Run.open(work / "run").load_model()
        write_dataset(work / "drawn", 8, seed=3, poor_share=0.0, long_sides=(1400,), workers=2)
        folders = ("fullres_dr", "hrf/images", "idrid/images", "eyepacs")
        # Interpreted Triton takes most of a minute per camera file, so only every third file is used.
        photos = {
            "synthetic, 1400 px wide": sorted((work / "drawn" / "images").glob("*.jpg"))[:12],
            "camera files": [path for folder in folders for path in sorted((DATA / folder).glob("*.jp*g"))][::3],
        }
        spec = PreprocessSpec(size=size)
        result = {
            **environment(PACKAGES),
            "size": size,
            "model": "ResNet-18 trained for 4 epochs on ODIR, normal vs. abnormal",
        }
        result["parts"] = {
            part: {"photos": len(paths), "rows": matrix(paths, spec, model)} for part, paths in photos.items()
        }
    chip = torch.cuda.get_device_name().split()[-1].lower() if HAS_GPU else "cpu"
    target = RESULTS / f"parity_{chip}_{date.today():%Y%m}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["parts"], indent=1))


if __name__ == "__main__":
    main()
