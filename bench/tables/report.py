"""Condense pytest-benchmark's JSON into `bench/results/`, and draw the tables of README and docs from these results.

    python -m bench.tables.report SUITE RAW.json   condense a run of a suite, then draw
    python -m bench.tables.report                  draw only

Measuring and drawing are separate steps; numbers in the README are never typed by hand.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import RESULTS, ROOT
from bench.tables.case_tables import loader_table, prepare_table, sample_table
from bench.tables.cost_tables import cluster_table, cost_table, serve_table
from bench.tables.labels import label
from bench.tables.model_tables import engine_table, screen_table, train_table
from bench.tables.plots import draw_speed
from bench.tables.study_table import study_table
from bench.tables.targets import newest, targets_table
from fastfundus.records import interval_text

README = ROOT / "README.md"
PACKAGES = {
    "prepare": ("torch", "torchvision", "pillow", "opencv-python-headless", "simplejpeg", "nvidia-dali-cuda130"),
    "sample": ("torch", "torchvision", "opencv-python-headless", "albumentations"),
    "loader": ("torch", "torchvision", "timm", "albumentations", "nvidia-dali-cuda130", "pillow"),
    "train": ("torch", "torchvision", "timm", "pillow"),
    "engine": ("torch", "timm", "openvino", "nncf", "onnxruntime"),
    "screen": ("torch", "torchvision", "openvino", "pillow", "simplejpeg"),
}
"""Suites, and the packages that their results depend on."""


def condense(raw: dict[str, Any], suite: str) -> dict[str, Any]:
    """Return the identification of a run and its cases.

    Args:
        raw: JSON of pytest-benchmark.
        suite: one of `PACKAGES`.

    Raises:
        SystemExit: the run contains no cases, or not every benchmark has one.
    """
    cases = [entry["extra_info"] for entry in raw["benchmarks"]]
    if not cases or any("case" not in found for found in cases):
        raise SystemExit(
            f"{suite}: the run contains no cases; run bench/suites/bench_{suite}.py with --benchmark-enable"
        )
    return {
        "date": raw["datetime"][:10],
        "commit": raw["commit_info"]["id"][:12] + ("-dirty" if raw["commit_info"]["dirty"] else ""),
        "machine": {"cpu": raw["machine_info"]["cpu"].get("brand_raw", ""), "cores": os.cpu_count()},
        "versions": {name: metadata.version(name) for name in (*PACKAGES[suite], "numpy")},
        "cases": cases,
    }


def transfer_table(result: dict[str, Any]) -> str:
    """Return the table of upstream training on fundus photographs, as Markdown."""
    grading, vessels = result["grading"], result["vessels"]
    first = grading["downstream"]["scratch"]["pooled"]
    lines = [
        f"| {result['backbone']} trained from | DR vs. no DR: AUROC of {first['photos']} photos of {first['patients']} "
        f"patients | AUROC over five folds, mean ± SD | vessels: Dice of {vessels['scratch']['photos']} photos | pixel "
        "AUROC |",
        "|---|---|---|---|---|",
    ]
    for start, title in (("scratch", "scratch"), ("upstream", "the upstream run on ODIR")):
        down, maps = grading["downstream"][start], vessels[start]
        folds = down["over_folds"]
        lines.append(
            f"| {title} | {interval_text(down['pooled']['auroc'])} | {folds['mean']:.3f} ± {folds['sd']:.3f} | "
            f"{interval_text(maps['dice'])} | {maps['pixels']['value']:.3f} |"
        )
    up = grading["upstream"]
    return "\n".join(
        [
            *lines,
            "",
            f"Every DR photo was tested once, at {result['size']} px, by a model that had not seen its patient; AUROC "
            f"of upstream minus scratch: {interval_text(grading['difference'])}. The upstream run itself (normal vs. "
            f"abnormal, per eye) reached an AUROC of {interval_text(up['auroc'])} on {up['photos']} photos of "
            f"{up['patients']} held-out ODIR patients. DRIVE: 13 photos for training, 3 for validation and 4 for "
            "testing, evaluated within the field of view at camera resolution. Brackets give 95% confidence intervals "
            f"from resampling patients. {_stamp(result, 'transfer')}",
        ]
    )


def parity_table(result: dict[str, Any]) -> str:
    """Return the parity matrix, as Markdown."""
    lines = [
        "| photos | executor | mean difference, grey levels | worst photo | largest difference | largest difference in "
        "probability |",
        "|---|---|---|---|---|---|",
    ]
    for part, entry in result["parts"].items():
        for name, row in entry["rows"].items():
            cells = [row[f"grey_levels_{key}"] for key in ("mean", "worst_photo", "most")]
            values = " | ".join(f"{cell:.2g}" for cell in [*cells, row["probability_most"]])
            lines.append(f"| {entry['photos']} {label(part)} | {label(name)} | {values} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Differences from the float64 reference on fully decoded photos, at {result['size']} px. Probabilities "
            f"are those of a {label(result['model'])}. {_stamp(result, 'parity')}",
        ]
    )


def compiled_table(record: dict[str, Any]) -> str:
    """Return the GPU resources of the compiled Triton kernels, from the record that the tests check, as Markdown."""
    lines = ["| kernel | GPU | registers | shared memory, bytes | spills, bytes |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[dict[str, int]]] = {}
    for name, used in record["variants"].items():
        groups.setdefault((name.split()[0], name.split()[1]), []).append(used)
    for (kernel, chip), used in groups.items():
        spans = []
        for key in ("registers", "shared_bytes"):
            low, high = (choose(one[key] for one in used) for choose in (min, max))
            spans.append(f"{low}" if low == high else f"{low} to {high}")
        spilled = sum(one["spilled_bytes"] for one in used)
        lines.append(f"| `{kernel}`, {len(used)} variants | {chip} | {' | '.join(spans)} | {spilled} |")
    return "\n".join(
        [*lines, "", f"Compiled by Triton {record['triton']}. `tests/kernels/compiled.json` lists every variant."]
    )


def builder_table(result: dict[str, Any]) -> str:
    """Return what NVIDIA's builder made of each graph, as Markdown."""
    kinds = list(next(iter(result["graphs"].values())))
    lines = [f"| network | photos, px | {' | '.join(kinds)} |", "|---" * (len(kinds) + 2) + "|"]
    refused, versions = [], set()
    for name, entries in result["graphs"].items():
        cells = []
        for kind, entry in entries.items():
            if "refused" in entry:
                refused.append(f"{name}, {kind}: {entry['refused']}")
                cells.append("refused")
                continue
            versions.add(entry["version"])
            pairs = f", {entry['quantized']} Q" if entry["quantized"] else ""
            cells.append(f"{entry['layers']} layers{pairs}, {entry['bytes'] / 2**20:.0f} MiB, {entry['seconds']:.1f} s")
        lines.append(f"| {name} | {result['sizes'][name]} | {' | '.join(cells)} |")
    said = f"Refused: {'; '.join(refused)}" if refused else "None was refused"
    return "\n".join(
        [
            *lines,
            "",
            f"TensorRT for RTX {', '.join(sorted(versions))}, without a GPU, for sm89 and batches of 1 to 32, with "
            "random weights and the guard of classifiers: layers after parsing (of them quantisations, Q), size of the "
            f"engine, time of the builder. {said}. {_stamp(result, 'nvidia')}",
        ]
    )


def circle_table(result: dict[str, Any]) -> str:
    """Return the errors of the field circle on synthetic photos, as Markdown."""
    lines = [
        "| synthetic photos, 1400 px wide | mean centre error | 95th percentile | maximum | mean radius error |",
        "|---|---|---|---|---|",
    ]
    for name, entry in result["circle"].items():
        cells = (entry[key] for key in ("centre_mean", "centre_95", "centre_most", "radius_mean"))
        lines.append(f"| {label(name)} | " + " | ".join(f"{cell:.2f}%" for cell in cells) + " |")
    drive, photos = result["drive"], next(iter(result["circle"].values()))["photos"]
    return "\n".join(
        [
            *lines,
            "",
            f"In percent of the field's radius, over {photos} photos per row from four cameras; radius errors are "
            f"signed. On the {drive['photos']} photos of DRIVE that have field masks, the Dice score of circle and "
            f"mask is {drive['dice_mean']:.4f} on average and {drive['dice_least']:.4f} at worst. "
            + _stamp(result, "photos"),
        ]
    )


def quality_table(result: dict[str, Any]) -> str:
    """Return the refusals among synthetic faults and real photos, as Markdown."""
    lines = ["| photos | count | ok | refused | reasons |", "|---|---|---|---|---|"]
    for name, entry in result["faults"].items():
        reasons = "; ".join(f"{n} {reason}" for reason, n in entry["reasons"].items() if reason != "ok")
        refused = entry["photos"] - entry["passed"]
        lines.append(f"| synthetic, {name} | {entry['photos']} | {entry['passed']} | {refused} | {reasons} |")
    for name, entry in result["real"].items():
        if name == "odir by flag":
            for group, counts in entry.items():
                total, ok = sum(counts.values()), counts.get("ok", 0)
                lines.append(f"| ODIR, {group} | {total} | {ok} | {total - ok} ({(total - ok) / total:.1%}) | |")
        else:
            ok = entry["status"].get("ok", 0)
            reasons = "; ".join(f"{n} {reason}" for reason, n in entry["reasons"].items())
            lines.append(f"| {name} | {entry['photos']} | {ok} | {entry['photos'] - ok} | {reasons} |")
    return "\n".join([*lines, "", _stamp(result, "photos")])


def _stamp(result: dict[str, Any], target: str) -> str:
    return f"Measured {result['date']}, commit {result['commit']}. Reproduce with `make {target}`."


def evidence_table(result: dict[str, Any]) -> str:
    """Return the results of the run on real photographs, as Markdown."""
    parts = result["results"]
    lines = [
        f"{label(result['what'])}, {result['backbone']}:",
        "",
        "| test set | photos | patients | AUROC (95% interval) |",
        "|---|---|---|---|",
    ]
    for name, entry in parts.items():
        if "test patients" in name or "pooled" in name:
            lines.append(f"| {name} | {entry['photos']} | {entry['patients']} | {interval_text(entry['auroc'])} |")
    engine, screen = parts["engine"], parts["screen"]
    statuses = ", ".join(f"{count} {name}" for name, count in screen["status"].items())
    lines += [
        "",
        f"The probabilities of fold 0's engine ({engine['precision']}) differ from its model's by at most "
        f"{engine['largest_difference']:.1e}; {engine['flipped']} of {engine['photos']} decisions change, and it is "
        f"{engine['images_per_s'] / engine['torch_images_per_s']:.1f} times as fast as torch float32 in the same "
        f"process. Screening {screen['inputs']} inputs, some of them faulty, gave {statuses}, at "
        f"{screen['images_per_s']:.0f} photos/s end to end with {screen['cores_busy']:.1f} cores busy. "
        f"Measured {result['date']} on {result['machine']}, commit {result['commit']}. Reproduce with `make odir`.",
    ]
    return "\n".join(lines)


def draw() -> None:
    """Write the newest tables between their markers, and draw the speed figure."""
    root = README.parent
    kernels, photos, screening, evidence, engines = (
        root / "docs" / f"{name}.md" for name in ("kernels", "photos", "screening", "evidence", "engines")
    )
    for file, marker, source, table in [
        (README, "sample", RESULTS / "sample_cpu_*.json", sample_table),
        (README, "loader", RESULTS / "loader_cpu_*.json", loader_table),
        (README, "cost", RESULTS / "cost_cpu_*.json", cost_table),
        (README, "prepare", RESULTS / "prepare_cpu_*.json", prepare_table),
        (README, "evidence", RESULTS / "odir_cpu_*.json", evidence_table),
        (README, "train", RESULTS / "train_cpu_*.json", train_table),
        (README, "engine", RESULTS / "engine_cpu_*.json", engine_table),
        (README, "screen", RESULTS / "screen_cpu_*.json", screen_table),
        (README, "serve", RESULTS / "serve_cpu_*.json", serve_table),
        (evidence, "study", RESULTS / "study_cpu_*.json", study_table),
        (README, "transfer", RESULTS / "transfer_cpu_*.json", transfer_table),
        (kernels, "parity", RESULTS / "parity_*.json", parity_table),
        (kernels, "compiled", root / "tests" / "kernels" / "compiled.json", compiled_table),
        (engines, "builder", RESULTS / "nvidia_cpu_*.json", builder_table),
        (photos, "circle", RESULTS / "photos_*.json", circle_table),
        (photos, "quality", RESULTS / "photos_*.json", quality_table),
    ]:
        files = sorted(source.parent.glob(source.name))
        if files:
            _put(file, marker, table(json.loads(files[-1].read_text())))
    _put(screening, "fleet", cluster_table(newest(RESULTS, "screen"), newest(RESULTS, "serve")))
    _put(README, "targets", targets_table(RESULTS))
    draw_speed(RESULTS, root / "docs" / "speed.svg")


def _put(file: Path, marker: str, text: str) -> None:
    begin, end = f"<!-- {marker} -->\n", f"\n<!-- /{marker} -->"
    before, rest = file.read_text().split(begin)
    file.write_text(before + begin + text + end + rest.split(end)[1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        result = condense(json.loads(Path(sys.argv[2]).read_text()), sys.argv[1])
        RESULTS.mkdir(exist_ok=True)
        target = RESULTS / f"{sys.argv[1]}_cpu_{result['date'][:7].replace('-', '')}.json"
        target.write_text(json.dumps(result, indent=1) + "\n")
    draw()
