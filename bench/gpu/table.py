"""Merge the results of `gpu_suite.sh` into one file, and print one table.

    python -m bench.gpu.table OUTPUT

Merges `kernels_*.json`, `train_*.json` and `engine_*.json` of a folder into `gpu_<chip>_<yyyymm>.json`. Parts that were
not measured are missing from the file, and the table lists them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.tables.labels import label

__all__ = ["gpu_table", "merged"]

PARTS = ("kernels", "train", "engine")


def merged(folder: Path) -> Path:
    """Write the merged file, and remove its parts.

    Raises:
        SystemExit: there are no kernel results, or the parts belong to different runs.
    """
    found = {part: sorted(folder.glob(f"{part}_*.json")) for part in PARTS}
    if not found["kernels"]:
        raise SystemExit(f"{folder} contains no kernels_*.json; run bench/gpu_suite.sh")
    files = {part: paths[-1] for part, paths in found.items() if paths}
    ends = {path.name.split("_", 1)[1] for path in files.values()}
    if len(ends) > 1:
        raise SystemExit(f"{folder} contains parts of different runs ({', '.join(sorted(ends))}); remove older ones")
    target = folder / f"gpu_{ends.pop()}"
    target.write_text(json.dumps({part: json.loads(path.read_text()) for part, path in files.items()}, indent=1) + "\n")
    for path in files.values():
        path.unlink()
    return target


def gpu_table(result: dict[str, Any]) -> str:
    """Return all results as a Markdown table."""
    kernels = result["kernels"]
    lines = ["| | photos/s | share of its limit |", "|---|---|---|"]
    for found in (found for part in PARTS for found in result.get(part, {"cases": []})["cases"]):
        name = found["case"]["name"]
        if "failed" in found:
            lines.append(f"| {name} | {found['failed'][:120]} | |")
            continue
        for variant, row in found["variants"].items():
            limit = row["limit"] or found["case"]["limit"]
            share = "" if limit is None else f"{row['share_of_limit']:.0%} of {label(limit['what'])}"
            rate = f", {row['gb_per_s']:.0f} GB/s" if row["gb_per_s"] else ""
            lines.append(f"| {name}: {variant} | {row['photos_per_s']:,.0f}{rate} | {share} |")
    missing = [part for part in PARTS if part not in result]
    tests = ", ".join(f"{count} {name}" for name, count in kernels["tests"].items())
    summary = f"{kernels['gpu'] or 'no GPU'}; copy bandwidth {kernels['copy_gb_per_s']:.0f} GB/s; kernel tests: {tests}"
    lacks = f"; not measured: {', '.join(missing)}" if missing else ""
    return "\n".join([*lines, "", f"{summary}{lacks}. {kernels['date']}, commit {kernels['commit']}."])


if __name__ == "__main__":
    path = merged(Path(sys.argv[1]))
    print(gpu_table(json.loads(path.read_text())))
    print(path)
