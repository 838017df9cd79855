"""Tables of cost and scale: the cost model, long runs, the server, and an extrapolation to a hundred million photos."""

from __future__ import annotations

from typing import Any

from bench.tables.case_tables import provenance
from bench.tables.model_tables import SCREEN_BEST, SCREEN_PEERS

__all__ = ["cost_table", "fleet_table", "serve_table"]

# Assumptions, not measurements: typical prices of rented machines and object storage in 2026.
CORE_HOUR, GB_MONTH = 0.04, 0.02
_MANY = 100_000_000


def cost_table(result: dict[str, Any]) -> str:
    """Return the check of the cost model on new networks and photos, and the scaling of screening, as Markdown."""
    model = result["model"]
    lines = [
        "| real camera photos, predicted | preparing, core-ms | engine, core-ms | screen, photos/s | off by |",
        "|---|---|---|---|---|",
    ]
    for check in model["checks"]:
        summary, measured = check["predicted"]["photos_per_s"], check["measured"]["photos_per_s"]
        parts = " | ".join(
            f"{1000 * check[part]['predicted_s']:.1f}, measured {1000 * check[part]['measured_s']:.1f}"
            for part in ("prepare", "engine")
        )
        lines.append(
            f"| {check['backbone']}, {check['size']} px, {check['gflop']:.1f} GFLOP | {parts} | {summary:.1f}, measured "
            f"{measured:.1f} | {summary / measured - 1:+.0%} |"
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
    return "\n".join([*lines, "", provenance(result, "make bench-cost")])


def _of(result: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [row for row in result["cores"] if row["part"] == part]


def serve_table(result: dict[str, Any]) -> str:
    """Return memory of long runs, start-up time, and the server under load, as Markdown."""
    memory, serve, start = (result[part] for part in ("memory", "serve", "start"))
    growth = ", ".join(f"{run['inputs']:,} inputs {run['peak_gib']:.2f} GiB" for run in memory["runs"])
    return "\n".join(
        [
            f"Memory of `screen` at its highest, small photos, most of them copies: {growth}. One photo of 1024 px "
            f"takes {start['seconds']:.1f} s from command to report (ResNet-50 at 512 px, {start['precision']}).",
            "",
            f"`serve`, {serve['backbone']} at {serve['size']} px {serve['precision']}, {serve['clients']} clients at "
            f"once, on the same cores, for a minute: {serve['answers']:,} answers, {serve['lost_or_mixed_up']} lost or "
            f"mixed up, {serve['images_per_s']:.0f} photos/s (a batch alone {serve['batch_images_per_s']:.0f}), "
            f"{serve['p50_s']:.2f} s at the median, {serve['p99_s']:.2f} s at p99, "
            f"{serve['photos_an_engine_call']:.0f} photos an engine call.",
            "",
            provenance(result, "make bench-serve"),
        ]
    )


def fleet_table(result: dict[str, Any], long_run: dict[str, Any]) -> str:
    """Return nodes, storage and cost for a hundred million photos, from the measured rates, as Markdown.

    Args:
        result: result of the screening suite.
        long_run: result of `bench_serve`, for the bytes per row.
    """
    (found,), cores = result["cases"], result["machine"]["cores"]
    size, row = found["mean_bytes"], long_run["memory"]["runs"][-1]["bytes_a_row"]
    names = {f"screen, {precision}": f"screen, {precision}" for precision in found["busy"]}
    lines = [
        "| ResNet-50, 512 px | photos/s a core | core-hours | hours of one 64-core node | it reads | cost |",
        "|---|---|---|---|---|---|",
    ]
    for title, name in {**names, "the peers' loop": SCREEN_PEERS, SCREEN_BEST: SCREEN_BEST}.items():
        rate = found["variants"][name]["photos_per_s"] / cores
        hours = _MANY / rate / 3600
        lines.append(
            f"| {title} | {rate:.2f} | {hours:,.0f} | {hours / 64:.0f} | "
            f"{64 * rate * size / 1e6:.0f} MB/s | ${hours * CORE_HOUR:,.0f} |"
        )
    terabytes = _MANY * size / 1e12
    lines += [
        "",
        f"From the rates measured on {cores} cores ({result['machine']['cpu']}, {result['date']}), **extrapolated**: a "
        "node of 64 cores is taken for 32 times the machine measured, which holds while storage delivers what a node "
        f"reads. Assumed prices, not measured: ${CORE_HOUR} a core-hour, ${GB_MONTH} a GB and month; put in your own. "
        f"Photos of {size / 1e6:.1f} MB are {terabytes:,.0f} TB (${terabytes * 1000 * GB_MONTH:,.0f} a month); results "
        f"and log take {row:.0f} bytes a photo, {_MANY * row / 1e9:,.0f} GB. The process that is started holds the "
        "list of inputs and writes: give it runs of a few million photos, a region or a year each.",
    ]
    return "\n".join(lines)
