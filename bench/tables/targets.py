"""Table of the performance targets, with the measured values and where the time goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.harness.comparison import ratio
from bench.tables.case_tables import cases_of
from bench.tables.model_tables import BF16, DECODING, INT8, OURS, PEER, SCREEN_BEST, SCREEN_PEERS

__all__ = ["newest", "targets_table"]

SCREEN_TARGET, PREPARE_TARGET, TRAIN_TARGET = 15, 5, 2
HABIT, HABIT_KEPT = "Pillow + torchvision, bilinear", "Pillow + torchvision, memory kept"
DECODER = "the decoder alone, same plan"


def newest(folder: Path, name: str) -> dict[str, Any]:
    """Return the newest CPU result of a suite."""
    return json.loads(sorted(folder.glob(f"{name}_cpu_*.json"))[-1].read_text())


def targets_table(folder: Path) -> str:
    """Return the targets with the measured values, as Markdown.

    Args:
        folder: folder of all results.
    """
    (screen,) = newest(folder, "screen")["cases"]
    (prepare, _), train = newest(folder, "prepare")["cases"], newest(folder, "train")["cases"]
    (engine,) = cases_of(newest(folder, "engine"), "resnet50, 512 px")
    ratios = {kind: ratio(screen, SCREEN_PEERS, f"screen, {kind}")["median"] for kind in screen["busy"]}
    best = max(ratios, key=lambda kind: ratios[kind])
    decode, alone = (
        screen["variants"][name]["ms"] / screen["case"]["units"] for name in (DECODING, f"engine alone, {best}")
    )
    most = ratio(screen, SCREEN_PEERS, f"engine alone, {best}")["median"]
    fastest = ratio(screen, SCREEN_BEST, f"screen, {best}")["median"]
    shares = ", ".join(
        f"{label} {engine['variants'][label]['share_of_limit']:.0%}"
        for label in (BF16, INT8) if label in engine["variants"]
    )  # fmt: skip
    bilinear, bicubic, kept, decoder = (
        ratio(prepare, slow, fast)["median"]
        for slow, fast in (
            (HABIT, "FastFundus"), ("Pillow + torchvision, bicubic", "FastFundus"), (HABIT_KEPT, "FastFundus"),
            (HABIT_KEPT, DECODER),
        )
    )  # fmt: skip
    ours = prepare["variants"]["FastFundus"]["share_of_limit"]
    speedups = [ratio(found, PEER, OURS)["median"] for found in train]
    feeding = min(found["variants"][OURS]["share_of_limit"] for found in train)
    rows = [
        (
            f"CPU `screen` on camera JPEGs: {SCREEN_TARGET} x the peers' loop",
            ", ".join(f"{kind} {value:.1f} x" for kind, value in ratios.items())
            + f"; {best} {fastest:.1f} x the fastest of their settings",
            max(ratios.values()) >= SCREEN_TARGET,
            f"{best}: {decode:.0f} ms of all cores to prepare a photo, {alone:.0f} ms for the engine. With nothing to "
            f"prepare it would be {most:.1f} x. Of the rate of matrix products in the same type the engine reaches: "
            f"{shares}. A processor with AMX would close it, no code on this one",
        ),
        (
            f"`prepare`: {PREPARE_TARGET} x Pillow + torchvision a core",
            f"{bilinear:.1f} x bilinear, {bicubic:.1f} x bicubic; {kept:.1f} x a bilinear peer with memory kept",
            bilinear >= PREPARE_TARGET,
            f"the decoder alone, by the same plan, takes {ours:.0%} of our time and is {decoder:.1f} x the peer with "
            "memory kept: beyond that only a faster decoder helps (hardware JPEG on a GPU)",
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
    lines += [f"| {what} | {summary} | {'yes' if met else 'no'} | {why} |" for what, summary, met, why in rows]
    lines += [
        f"| {what} | not measured: no GPU was at hand | open | `bench/gpu_suite.sh` measures it |" for what in gpu
    ]
    return "\n".join([*lines, "", "From the tables here, each with its conditions."])
