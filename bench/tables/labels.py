"""Display texts for the names and settings stored in results.

Names of cases and variants are keys of the committed results, so they stay as they were measured; tables print `label`.
"""

from __future__ import annotations

__all__ = ["label"]

_LABELS = {
    # Limits.
    "copying as many bytes": "memory-copy bandwidth",
    "matrix products in fp32": "fp32 matmul throughput",
    "matrix products in bf16": "bf16 matmul throughput",
    "matrix products in int8": "int8 matmul throughput",
    # bench_prepare.
    "decode, field, crop, quality, hash": "decode, field detection, crop, quality check, hash",
    "the decoder alone, same plan": "JPEG decoder alone",
    "the limit": "upper bound, same decode plan",
    "the peers' habit": "typical PyTorch pipeline, the baseline",
    "Pillow + torchvision, memory kept": "Pillow + torchvision, tuned malloc",
    "bilinear, in our process": "bilinear, with FastFundus's malloc settings",
    "RETFound's and many others' resize": "as in RETFound and many other repositories",
    "Pillow by draft + torchvision": "Pillow draft mode + torchvision",
    "scaled in the DCT; few do": "DCT-domain scaling, rarely used",
    "OpenCV + area": "OpenCV, INTER_AREA",
    "everything decoded": "full decode",
    "OpenCV reduced + area": "OpenCV reduced decode, INTER_AREA",
    "everything decoded, antialiased resize": "full decode, antialiased resize",
    # bench_sample.
    "augment 1024 to 512 px": "augment, 1024 to 512 px",
    "augment at 512 px": "augment, 512 px",
    "3872x2592 to 512 px": "resize, 3872x2592 to 512 px",
    "3 bytes read for each pixel under the output, 12 written for each of it": (
        "3 bytes read per source pixel under the output, 12 written per output pixel"
    ),
    "3 bytes read for each pixel of the square, 12 written for each of the output": (
        "3 bytes read per pixel of the central square, 12 written per output pixel"
    ),
    "the same matrices, whole grey levels in between": "same matrices, intermediate values rounded to grey levels",
    "the same matrices, whole grey levels in between; no area: four pixels": (
        "at 1024 px bilinear, without area averaging"
    ),
    "Albumentations, photo by photo": "Albumentations, per photo",
    "one affine change, OpenCV inside": "one affine transform, implemented with OpenCV",
    "one affine change, OpenCV inside, after a crop by areas": "at 1024 px preceded by an area-averaged crop",
    "torchvision v2, photo by photo": "torchvision v2, per photo",
    "torchvision v2, one draw for the batch": "torchvision v2, one random draw per batch",
    "on uint8 until the end": "uint8 until normalisation",
    "exact areas": "exact area averages",
    "antialias, a triangle twice as wide as the box: another filter": (
        "antialiased, with a triangle filter twice as wide as the box"
    ),
    # bench_loader.
    "FastFundus, train's feed": "FastFundus, from a cache",
    "from a cache, prepared once": "as in `train`, prepared once",
    "libjpeg-turbo, the same kernel": "libjpeg-turbo, same augmentation kernel",
    "FastFundus, from files by DALI": "FastFundus, from files with DALI",
    "its CPU decoder, the same kernel": "DALI's CPU decoder, same augmentation kernel",
    "Pillow, uint8 until the end, a worker a core": "Pillow, uint8 until normalisation, one worker per core",
    "bilinear, a worker a core, no rotation: it has none": "bilinear, one worker per core, no rotation (unsupported)",
    "OpenCV, a worker a core, one thread each": "OpenCV, one single-threaded worker per core",
    "decoder with random crop, a thread a core": "fused decode and random crop, one thread per core",
    # bench_engine.
    "torch eager, float32, memory kept": "torch eager, float32, tuned malloc",
    "OpenVINO bf16, by its own queue": "OpenVINO bf16, AsyncInferQueue",
    # bench_screen.
    "64 camera JPEGs of 0.7 MB to answers": "64 camera JPEGs of 0.7 MB, from file to decision",
    "batches of 16, a worker a core": "batches of 16, one worker per core",
    "the peers' loop, photo by photo": "typical PyTorch loop, one photo at a time",
    "no batches, no workers: their fastest setting here": "no batches, no workers; its fastest setting here",
    "reading, decoding, cropping alone": "reading, decoding and cropping alone",
    # bench.evidence.
    "ODIR, normal/abnormal by eye, 224 px, held-out patients": (
        "ODIR, normal vs. abnormal per eye, 224 px, held-out patients"
    ),
    "ResNet-18, ODIR normal/abnormal, 4 epochs": "ResNet-18 trained for 4 epochs on ODIR, normal vs. abnormal",
    "drawn, 1400 px wide": "synthetic, 1400 px wide",
    "csrc, host": "C++",
    "as drawn": "unmodified",
    "dark (0.15 of the light)": "dark (15% of the brightness)",
}


def label(text: str) -> str:
    """Return the display text for a name or a setting in a result; texts without an entry are returned unchanged."""
    return _LABELS.get(text, text)
