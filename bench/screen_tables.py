"""Tables of screening: speed, memory, serving, and what a hundred million photos take."""

from __future__ import annotations

from typing import Any

__all__ = ["fleet_table", "screen_table"]

PEERS = "PIL, torchvision, torch eager float32"
# Assumptions, not measurements: of the order of what is asked for rented machines and object storage in 2026.
CORE_HOUR, GB_MONTH = 0.04, 0.02
_MANY = 100_000_000


def screen_table(result: dict[str, Any]) -> str:
    """Speed against the peers and the stages, memory, and the server under load, as Markdown."""
    speed, memory, serve, start = (result[part] for part in ("speed", "memory", "serve", "start"))
    rates, stamp = speed["images_per_s"], f"{result['date']}, {result['machine']['cpu']}"
    lines = ["| camera JPEGs, ResNet-50, 512 px | photos/s | over the peers | of the engine alone | of both stages |"]
    lines += ["|---|---|---|---|---|", f"| the peers' loop: {PEERS} | {rates[PEERS]:.2f} | 1 | | |"]
    for precision, ratio in speed["over_peers"].items():
        engine, alone = speed["of_engine_alone"][precision]["median"], rates[f"engine alone, {precision}"]
        lines.append(
            f"| **screen, {precision}** | {rates[f'screen, {precision}']:.2f} | {ratio['median']:.1f} x "
            f"({ratio['least']:.1f} to {ratio['most']:.1f}) | {engine:.0%} of {alone:.2f} | "
            f"{speed['of_both_stages'][precision]:.0%} |"
        )
    lines.append(f"| reading, decoding, cropping alone | {rates['decoding alone']:.1f} | | | |")
    growth = ", ".join(f"{run['inputs']:,} inputs {run['peak_gib']:.2f} GiB" for run in memory["runs"])
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines += [
        "",
        f"{speed['photos']} photos of 10 megapixels and {speed['mean_bytes'] / 1e6:.1f} MB, medians of "
        f"{speed['rounds']} rounds in turns. Decoding and engine share the cores here: the last column compares with "
        "one after the other, each with all cores. Memory at its highest, small photos, most of them copies: "
        f"{growth}. One photo of 1024 px takes {start['seconds']:.1f} s from command to report (ResNet-50 at 512 px, "
        f"{start['precision']}).",
        "",
        f"`serve`, {serve['backbone']} at {serve['size']} px {serve['precision']}, {serve['clients']} clients at once "
        f"for a minute: {serve['answers']:,} answers, {serve['lost_or_mixed_up']} lost or mixed up, "
        f"{serve['images_per_s']:.0f} photos/s (a batch alone {serve['batch_images_per_s']:.0f}), "
        f"{serve['p50_s']:.2f} s at the median, {serve['p99_s']:.2f} s at p99, "
        f"{serve['photos_an_engine_call']:.0f} photos an engine call.",
        "",
        f"{stamp}, {result['machine']['cores']} cores, commit {result['commit']}; {versions}. `make bench-screen` "
        "repeats it.",
    ]
    return "\n".join(lines)


def fleet_table(result: dict[str, Any]) -> str:
    """Nodes, storage and cost of a hundred million photos from the measured rates, as Markdown."""
    speed, cores = result["speed"], result["machine"]["cores"]
    size, row = speed["mean_bytes"], result["memory"]["runs"][-1]["bytes_a_row"]
    names = {f"screen, {precision}": f"screen, {precision}" for precision in speed["over_peers"]}
    lines = [
        "| ResNet-50, 512 px | photos/s a core | core-hours | hours of one 64-core node | it reads | cost |",
        "|---|---|---|---|---|---|",
    ]
    for title, name in {**names, "the peers' loop": PEERS}.items():
        rate = speed["images_per_s"][name] / cores
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
