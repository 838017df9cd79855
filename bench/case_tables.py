"""Tables of harness cases, of the cost model, and of the targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["cost_table", "loader_table", "sample_table", "targets_table"]

SCREEN_TARGET, PREPARE_TARGET, TRAIN_TARGET = 15, 5, 2


def _stamp(result: dict[str, Any], packages: tuple[str, ...], command: str) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in packages if name in result["versions"])
    return (
        f"{result['date']}, {machine['cpu']}, {machine['cores']} cores, commit {result['commit']}; {versions}. "
        f"`{command}` repeats it."
    )


def _cases(result: dict[str, Any], start: str) -> list[dict[str, Any]]:
    return [found for found in result["cases"] if found["case"]["name"].startswith(start)]


def _by_us(name: str) -> bool:
    return name.startswith("FastFundus")


def sample_table(result: dict[str, Any]) -> str:
    """Sampling on one core, as Markdown."""
    lines = ["| one core | photos/s | | of copying as many bytes | GB/s |", "|---|---|---|---|---|"]
    cases = [*_cases(result, "augment"), *(found for found in result["cases"] if " to " in found["case"]["name"])]
    for found in cases:
        ours = next(row for name, row in found["variants"].items() if _by_us(name))["ms"]
        for name, row in found["variants"].items():
            mark, told = ("**", "") if row["ms"] == ours else ("", f"{row['ms'] / ours:.1f} x the time")
            lines.append(
                f"| {found['case']['name']}: {mark}{name}{mark} | {row['photos_per_s']:.0f} | {told} | "
                f"{row['share_of_limit']:.0%} | {row['gb_per_s']:.2f} |"
            )
    peers = "; ".join(
        f"{name}: {row['settings']}"
        for found in cases for name, row in found["variants"].items() if row["settings"]
    )  # fmt: skip
    arithmetic = "; ".join(f"{found['case']['name']}: {found['case']['bytes_how']}" for found in cases)
    return "\n".join(
        [
            *lines,
            "",
            f"In turns in one run, medians of {cases[0]['rounds']} rounds; each result was compared with ours in every "
            "round, and ours with the float64 reference. "
            f"Bytes: {arithmetic}. Settings: {peers}. "
            + _stamp(
                result, ("torch", "torchvision", "opencv-python-headless", "albumentations", "numpy"), "make bench"
            ),
        ]
    )


def loader_table(result: dict[str, Any]) -> str:
    """Feeding training, as Markdown."""
    cases = _cases(result, "loader")
    titles = [found["case"]["name"].removeprefix("loader, ") for found in cases]
    lines = ["| photos/s, all cores | " + " | | ".join(titles) + " | |", "|---" * (2 * len(cases) + 1) + "|"]
    for name, row in cases[0]["variants"].items():
        cells = []
        for found in cases:
            mine = found["variants"][name]
            speed = mine["speedup"]
            told = "" if mine["reference"] else f"{speed['median']:.1f} x ({speed['least']:.1f} to {speed['most']:.1f})"
            cells += [f"{mine['photos_per_s']:.0f}", told]
        mark = "**" if _by_us(name) else ""
        lines.append(f"| {mark}{name}{mark}: {row['settings']} | {' | '.join(cells)} |")
    limits = " | ".join(f"{1000 * found['case']['units'] / found['case']['limit']['ms']:.0f} | " for found in cases)
    lines.append(f"| decoding the files alone: the limit of those who read them | {limits} |")
    return "\n".join(
        [
            *lines,
            "",
            "Augmented, normalised float32 batches of 16, an epoch of 256 photos from JPEG files twice as wide as the "
            f"input; in turns in one run, medians of {cases[0]['rounds']} rounds, ratios to torchvision's of the same "
            "round. Every loader draws its own changes; mean and spread of the channels agree within "
            f"{max(row['distance'] for found in cases for row in found['variants'].values()):.2f}. "
            + _stamp(result, ("torch", "torchvision", "timm", "albumentations", "nvidia-dali-cuda130"), "make bench"),
        ]
    )


def cost_table(result: dict[str, Any]) -> str:
    """The cost model where it was not fitted, and how screening scales, as Markdown."""
    model = result["model"]
    lines = [
        "| real camera photos, predicted | preparing, core-ms | engine, core-ms | screen, photos/s | off by |",
        "|---|---|---|---|---|",
    ]
    for check in model["checks"]:
        told, measured = check["predicted"]["photos_per_s"], check["measured"]["photos_per_s"]
        parts = " | ".join(
            f"{1000 * check[part]['predicted_s']:.1f}, measured {1000 * check[part]['measured_s']:.1f}"
            for part in ("prepare", "engine")
        )
        lines.append(
            f"| {check['backbone']}, {check['size']} px, {check['gflop']:.1f} GFLOP | {parts} | {told:.1f}, measured "
            f"{measured:.1f} | {told / measured - 1:+.0%} |"
        )
    fitted = ", ".join(f"{row['backbone']} at {row['size']} px" for row in model["fitted_on"])
    check = model["checks"][0]
    cost, photo = check["cost"], check["photos"]
    lines += [
        "",
        f"Fitted on drawn JPEGs of {len(check['fit'])} sizes and qualities and on {fitted}, in {result['precision']}; "
        f"predicted for other networks and the photos of real cameras ({photo['megapixels']:.1f} megapixels, "
        f"{photo['megabytes']:.2f} MB). To {check['size']} px a photo takes {1000 * cost['fixed_s']:.2f} ms, "
        f"{1000 * cost['per_megapixel_s']:.2f} ms a megapixel, {1000 * cost['per_decoded_megapixel_s']:.2f} ms a "
        f"megapixel that is left after scaling in the DCT, and {1000 * cost['per_megabyte_s']:.1f} ms a megabyte of "
        f"one core; the engine {1000 * model['s_per_gflop']:.2f} ms a GFLOP.",
        "",
        "| ResNet-50, 512 px | " + " | ".join(f"{row['cores']} core(s)" for row in _of(result, "prepare")) + " |",
        "|---" * (len(_of(result, "prepare")) + 1) + "|",
    ]
    for part, title in (("prepare", "preparing"), ("engine", "the engine")):
        rates = " | ".join(format(row["photos_per_s"], ".1f") for row in _of(result, part))
        lines.append(f"| {title}, photos/s | {rates} |")
    batches = ", ".join(f"{row['batch']}: {row['photos_per_s']:.1f}" for row in result["batch"])
    lines += [
        "",
        f"The engine by photos a call, photos/s: {batches}.",
        "",
        "| photos of a cache | opening | splitting by patient | highest memory |",
        "|---|---|---|---|",
    ]
    for row in result["manifest"]:
        lines.append(
            f"| {row['photos']:,} | {row['open_s']:.2f} s | {row['split_s']:.1f} s | {row['peak_mib']:,.0f} MiB |"
        )
    stamp = _stamp(result, ("openvino", "simplejpeg", "numpy", "polars"), "make bench-cost")
    return "\n".join([*lines, "", stamp])


def _of(result: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in result["cores"] if row["part"] == part]


def targets_table(folder: Path) -> str:
    """Each target with what was measured, as Markdown.

    Args:
        folder: of all results.
    """

    def newest(name: str) -> dict[str, Any]:
        return json.loads(sorted(folder.glob(f"{name}_cpu_*.json"))[-1].read_text())

    screen, prepare, train, engine = (newest(name) for name in ("screen", "prepare", "train", "engine"))
    rates = screen["speed"]["images_per_s"]
    ratios = {name: ratio["median"] for name, ratio in screen["speed"]["over_peers"].items()}
    best = max(ratios, key=lambda name: ratios[name])
    decode, alone = 1 / rates["decoding alone"], 1 / rates[f"engine alone, {best}"]
    most = rates[f"engine alone, {best}"] / rates["PIL, torchvision, torch eager float32"]
    one = prepare["cores_1"]
    ours, decoder = one["fastfundus"]["ms"], one["decoder alone"]["ms"]
    peer, bicubic = (one[f"Pillow + torchvision, {kind}"]["ms"] for kind in ("bilinear", "bicubic"))
    half = next(part for part in engine["parts"] if (part["backbone"], part["size"]) == ("resnet50", 512))
    gflops = half["images_per_s"]["OpenVINO bf16"] * half["gflop"]
    speedups = [part["speedup"]["median"] for part in train["parts"]]
    feeding = min(part["of_step"]["median"] for part in train["parts"])
    rows = [
        (
            f"CPU `screen` on camera JPEGs: {SCREEN_TARGET} x the peers' loop",
            ", ".join(f"{name} {ratio:.1f} x" for name, ratio in ratios.items()),
            max(ratios.values()) >= SCREEN_TARGET,
            f"{best}: {1000 * decode:.0f} ms of both cores to prepare a photo, {1000 * alone:.0f} ms for the engine. "
            f"With nothing to prepare it would be {most:.1f} x. The engine in bf16 does {gflops:.0f} GFLOP/s, "
            f"{gflops / engine['matmul_gflops']['bfloat16']:.0%} of what matrix products reach here: a processor with "
            "AMX would close it, no code on this one",
        ),
        (
            f"`prepare`: {PREPARE_TARGET} x Pillow + torchvision a core",
            f"{peer / ours:.1f} x bilinear, {bicubic / ours:.1f} x bicubic",
            peer / ours >= PREPARE_TARGET,
            f"the decoder alone, by the same plan, is {peer / decoder:.1f} x the bilinear peer and takes "
            f"{decoder / ours:.0%} of our time: a faster decoder would close it (hardware JPEG on a GPU)",
        ),
        (
            f"`train --amp` on a CPU: {TRAIN_TARGET} x float32 eager",
            " and ".join(f"{value:.1f} x" for value in speedups),
            min(speedups) >= TRAIN_TARGET,
            f"feeding leaves {feeding:.0%} of the step alone",
        ),
    ]
    gpu = [
        "`sample` on a GPU: 85 % of copy bandwidth",
        "loader on a GPU: the step keeps 97 % of its speed",
        "end to end on a GPU: 90 % of the slowest stage",
    ]
    lines = ["| target | measured | met | where the time goes, and what would close it |", "|---|---|---|---|"]
    lines += [f"| {what} | {told} | {'yes' if met else 'no'} | {why} |" for what, told, met, why in rows]
    lines += [
        f"| {what} | not measured: no GPU was at hand | open | `bench/gpu_suite.sh` measures it |" for what in gpu
    ]
    return "\n".join([*lines, "", "From the tables here, each with its conditions."])
