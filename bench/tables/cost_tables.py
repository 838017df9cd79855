"""Tables of cost and scale: the cost model, long runs, the server, and an extrapolation to a hundred million photos."""

from __future__ import annotations

from typing import Any

from bench.tables.case_tables import provenance
from bench.tables.labels import label
from bench.tables.model_tables import SCREEN_BEST, SCREEN_PEERS

__all__ = ["cluster_table", "cost_table", "serve_table"]

# Assumptions, not measurements: typical prices of rented machines and object storage in 2026.
CORE_HOUR, GB_MONTH = 0.04, 0.02
_MANY = 100_000_000


def cost_table(result: dict[str, Any]) -> str:
    """Return the check of the cost model on new networks and photos, and the scaling of screening, as Markdown."""
    model = result["model"]
    lines = [
        "| real camera photos, predicted / measured | preparation, core-ms | engine, core-ms | `screen`, photos/s | "
        "error |",
        "|---|---|---|---|---|",
    ]
    for check in model["checks"]:
        predicted, measured = check["predicted"]["photos_per_s"], check["measured"]["photos_per_s"]
        parts = " | ".join(
            f"{1000 * check[part]['predicted_s']:.1f} / {1000 * check[part]['measured_s']:.1f}"
            for part in ("prepare", "engine")
        )
        lines.append(
            f"| {check['backbone']}, {check['size']} px, {check['gflop']:.1f} GFLOP | {parts} | {predicted:.1f} / "
            f"{measured:.1f} | {predicted / measured - 1:+.0%} |"
        )
    fitted = ", ".join(f"{row['backbone']} at {row['size']} px" for row in model["fitted_on"])
    check = model["checks"][0]
    cost, photo = check["cost"], check["photos"]
    lines += [
        "",
        f"Fitted to synthetic JPEGs of {len(check['fit'])} combinations of size and quality and to {fitted}, in "
        f"{result['precision']}; predicted for other networks and for photos of real cameras "
        f"({photo['megapixels']:.1f} megapixels and {photo['megabytes']:.2f} MB on average). Preparing a photo for "
        f"{check['size']} px takes {1000 * cost['fixed_s']:.2f} core-ms plus "
        f"{1000 * cost['per_megapixel_s']:.2f} ms per megapixel, {1000 * cost['per_decoded_megapixel_s']:.2f} ms per "
        f"megapixel that remains after DCT scaling, and {1000 * cost['per_megabyte_s']:.1f} ms per megabyte; the "
        f"engine takes {1000 * model['s_per_gflop']:.2f} core-ms per GFLOP.",
        "",
        "| ResNet-50, 512 px | " + " | ".join(_cores(row["cores"]) for row in _of(result, "prepare")) + " |",
        "|---" * (len(_of(result, "prepare")) + 1) + "|",
    ]
    for part, title in (("prepare", "preparation"), ("engine", "engine")):
        rates = " | ".join(format(row["photos_per_s"], ".1f") for row in _of(result, part))
        lines.append(f"| {title}, photos/s | {rates} |")
    batches = ", ".join(f"{row['photos_per_s']:.1f} with {row['batch']}" for row in result["batch"])
    lines += [
        "",
        f"Engine throughput by photos per call, in photos/s: {batches}.",
        "",
        "| photos in the cache | opening it | splitting by patient | peak memory |",
        "|---|---|---|---|",
    ]
    for row in result["manifest"]:
        lines.append(
            f"| {row['photos']:,} | {row['open_s']:.2f} s | {row['split_s']:.1f} s | {row['peak_mib']:,.0f} MiB |"
        )
    return "\n".join([*lines, "", provenance(result, "make bench-cost")])


def _cores(count: int) -> str:
    return f"{count} {'core' if count == 1 else 'cores'}"


def _of(result: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in result["cores"] if row["part"] == part]


def serve_table(result: dict[str, Any]) -> str:
    """Return memory of long runs, start-up time, and the server under load, as Markdown."""
    memory, serve, start = (result[part] for part in ("memory", "serve", "start"))
    growth = ", ".join(f"{run['inputs']:,} inputs {run['peak_gib']:.2f} GiB" for run in memory["runs"])
    return "\n".join(
        [
            f"Peak memory of `screen` on small photos, most of them copies of one another: {growth}. One photo of "
            f"1024 px takes {start['seconds']:.1f} s from command to report (ResNet-50 at 512 px, "
            f"{start['precision']}).",
            "",
            f"`serve` with {serve['backbone']} at {serve['size']} px in {serve['precision']}, under load from "
            f"{serve['clients']} concurrent clients on the same cores for one minute: {serve['answers']:,} answers, "
            f"{serve['lost_or_mixed_up']} lost or mixed up; {serve['images_per_s']:.0f} photos/s (a batch run reaches "
            f"{serve['batch_images_per_s']:.0f}), latency {serve['p50_s']:.2f} s at p50 and {serve['p99_s']:.2f} s at "
            f"p99, {serve['photos_an_engine_call']:.0f} photos per engine call on average.",
            "",
            provenance(result, "make bench-serve"),
        ]
    )


def cluster_table(result: dict[str, Any], long_run: dict[str, Any]) -> str:
    """Return nodes, storage and cost for a hundred million photos, from the measured rates, as Markdown.

    Args:
        result: result of the screening suite.
        long_run: result of `bench_serve`, for the bytes per row.
    """
    (found,), cores = result["cases"], result["machine"]["cores"]
    size, row = found["mean_bytes"], long_run["memory"]["runs"][-1]["bytes_a_row"]
    names = {f"screen, {precision}": f"screen, {precision}" for precision in found["busy"]}
    lines = [
        "| ResNet-50, 512 px | photos/s per core | core-hours | hours on one 64-core node | read rate | cost |",
        "|---|---|---|---|---|---|",
    ]
    for title, name in {**names, "typical PyTorch loop": SCREEN_PEERS, label(SCREEN_BEST): SCREEN_BEST}.items():
        rate = found["variants"][name]["photos_per_s"] / cores
        hours = _MANY / rate / 3600
        lines.append(
            f"| {title} | {rate:.2f} | {hours:,.0f} | {hours / 64:.0f} | "
            f"{64 * rate * size / 1e6:.0f} MB/s | ${hours * CORE_HOUR:,.0f} |"
        )
    terabytes = _MANY * size / 1e12
    lines += [
        "",
        f"Rates were measured on {cores} cores ({result['machine']['cpu']}, {result['date']}) and **extrapolated**: a "
        f"64-core node is assumed to be {64 / cores:.0f} times as fast, which holds as long as storage sustains the "
        f"read rate. Prices are assumed, not measured: ${CORE_HOUR} per core-hour and ${GB_MONTH} per GB and month; "
        f"substitute your own. At {size / 1e6:.1f} MB per photo, the photos take {terabytes:,.0f} TB "
        f"(${terabytes * 1000 * GB_MONTH:,.0f} per month); results and log take {row:.0f} bytes per photo, "
        f"{_MANY * row / 1e9:,.0f} GB in total. The main process holds the list of inputs in memory and writes all "
        "results, so split the work into runs of a few million photos, for example by region or year.",
    ]
    return "\n".join(lines)
