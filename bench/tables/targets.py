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
CACHE_LOADER = "FastFundus, train's feed"


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
    shares = " and ".join(
        f"{engine['variants'][name]['share_of_limit']:.0%} with {name}"
        for name in (BF16, INT8) if name in engine["variants"]
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
            f"`screen` on a CPU, camera JPEGs: {SCREEN_TARGET}x a typical PyTorch loop",
            ", ".join(f"{kind} {value:.1f}x" for kind, value in ratios.items())
            + f"; {best} is {fastest:.1f}x the loop's fastest setting",
            max(ratios.values()) >= SCREEN_TARGET,
            f"the engine: on all cores, preparing a photo takes {decode:.0f} ms and {best} inference {alone:.0f} ms; "
            f"without preparation, the speed-up would be {most:.1f}x. The engine already reaches {shares} of the "
            "matmul throughput in the same type, so only a CPU with AMX would close the gap",
        ),
        (
            f"`prepare`: {PREPARE_TARGET}x Pillow + torchvision per core",
            f"bilinear {bilinear:.1f}x, bicubic {bicubic:.1f}x; bilinear with tuned malloc {kept:.1f}x",
            bilinear >= PREPARE_TARGET,
            f"the JPEG decoder: it takes {ours:.0%} of the time and alone is {decoder:.1f}x as fast as Pillow + "
            "torchvision with tuned malloc; only a faster decoder, such as hardware JPEG on a GPU, would help further",
        ),
        (
            f"`train --amp` on a CPU: {TRAIN_TARGET}x eager float32",
            " and ".join(f"{value:.1f}x" for value in speedups),
            min(speedups) >= TRAIN_TARGET,
            f"the training step: with data loading it keeps at least {feeding:.0%} of its speed",
        ),
    ]
    gpu = [
        "`sample` on a GPU: 85% of copy bandwidth",
        "loader on a GPU: the training step keeps 97% of its speed",
        "end to end on a GPU: 90% of the speed of the slowest stage",
    ]
    lines = ["| target | measured | met | bottleneck |", "|---|---|---|---|"]
    lines += [f"| {what} | {value} | {'yes' if met else 'no'} | {why} |" for what, value, met, why in rows]
    lines += [
        f"| {what} | not measured, no GPU was available | open | `bench/gpu_suite.sh` measures it |" for what in gpu
    ]
    return "\n".join([*lines, "", "Taken from the tables in this file, which state the conditions."])
