"""Condenses pytest-benchmark's JSON into `bench/results/`, and draws README's tables from the results there.

    python -m bench.report RAW.json     condense a run, then draw
    python -m bench.report              draw only

Measuring and drawing are separate; numbers in the README are never typed by hand.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
# Benchmark, its peer in the same run (if any), the work of one call, and how many units of it that is.
ROWS = (
    ("test_draw_1024", None, "draw a synthetic photo, 1024 px, one core", 1),
    ("test_prepare_fastfundus", "test_prepare_pil_torchvision", "prepare a 9-megapixel JPEG to 512 px, one core", 1),
    ("test_augment_fastfundus", "test_augment_torchvision", "augment and normalise at 512 px, one core", 16),
    ("test_infer_engine", "test_infer_torch_float32", "infer ResNet-50 at 512 px, all cores", 16),
)
PEERS = {
    "test_prepare_pil_torchvision": "Pillow decode + torchvision resize",
    "test_augment_torchvision": "torchvision v2, one by one",
    "test_infer_torch_float32": "torch eager float32",
}


def condense(raw: dict[str, Any]) -> dict[str, Any]:
    """Keep what identifies the run, and medians with their spread."""
    cpu = raw["machine_info"]["cpu"]
    packages = ("torch", "torchvision", "openvino", "opencv-python-headless", "simplejpeg", "numpy", "pillow")
    return {
        "date": raw["datetime"][:10],
        "commit": raw["commit_info"]["id"][:12] + ("-dirty" if raw["commit_info"]["dirty"] else ""),
        "machine": {"cpu": cpu.get("brand_raw", ""), "cores": os.cpu_count()},
        "versions": {name: metadata.version(name) for name in packages},
        "seconds": {
            entry["name"]: {key: entry["stats"][key] for key in ("median", "iqr", "rounds")}
            for entry in raw["benchmarks"]
        },
    }


def speed_table(result: dict[str, Any]) -> str:
    """Rates and ratios of one run, as Markdown."""
    lines = ["| one core or all, same run | images/s | peer | peer's images/s | ratio |", "|---|---|---|---|---|"]
    for name, peer, work, units in ROWS:
        rate = units / result["seconds"][name]["median"]
        if peer is None:
            lines.append(f"| {work} | {rate:.1f} | | | |")
        else:
            other = units / result["seconds"][peer]["median"]
            lines.append(f"| {work} | {rate:.1f} | {PEERS[peer]} | {other:.1f} | {rate / other:.1f} x |")
    machine, versions = result["machine"], result["versions"]
    told = f"{machine['cpu']}, {machine['cores']} cores; " + ", ".join(f"{k} {v}" for k, v in versions.items())
    return "\n".join(
        [*lines, "", f"Medians, {result['date']}, commit {result['commit']}; {told}. `make bench` repeats it."]
    )


def evidence_table(result: dict[str, Any]) -> str:
    """The run on real photographs, as Markdown."""

    def show(entry: dict[str, float]) -> str:
        return f"{entry['value']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"

    parts = result["results"]
    lines = [
        f"{result['what']}, {result['backbone']}:",
        "",
        "| photos | patients | AUROC (95 % interval) |",
        "|---|---|---|",
    ]
    for name, entry in parts.items():
        if "test patients" in name or "pooled" in name:
            lines.append(f"| {name}: {entry['photos']} | {entry['patients']} | {show(entry['auroc'])} |")
    engine, screen = parts["engine"], parts["screen"]
    statuses = ", ".join(f"{count} {name}" for name, count in screen["status"].items())
    lines += [
        "",
        f"The engine of fold 0 ({engine['precision']}) differs from its model by {engine['largest_difference']:.1e} in "
        f"probability at most, flips {engine['flipped']} of {engine['photos']} decisions, and runs "
        f"{engine['images_per_s'] / engine['torch_images_per_s']:.1f} times as fast as torch float32 in the same "
        "process. "
        f"Screening {screen['inputs']} inputs, faulty ones among them: {statuses}; "
        f"{screen['images_per_s']:.0f} photos/s end to end with {screen['cores_busy']:.1f} cores busy. "
        f"{result['date']}, {result['machine']}, commit {result['commit']}. `make odir` repeats it.",
    ]
    return "\n".join(lines)


def draw() -> None:
    """Put the newest tables between their markers in the README."""
    text = README.read_text()
    for marker, pattern, table in [
        ("speed", "cpu_*.json", speed_table),
        ("evidence", "odir_cpu_*.json", evidence_table),
    ]:
        files = sorted(RESULTS.glob(pattern))
        if files:
            begin, end = f"<!-- {marker} -->\n", f"\n<!-- /{marker} -->"
            before, rest = text.split(begin)
            text = before + begin + table(json.loads(files[-1].read_text())) + end + rest.split(end)[1]
    README.write_text(text)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        result = condense(json.loads(Path(sys.argv[1]).read_text()))
        RESULTS.mkdir(exist_ok=True)
        target = RESULTS / f"cpu_{result['date'][:7].replace('-', '')}.json"
        target.write_text(json.dumps(result, indent=1) + "\n")
    draw()
