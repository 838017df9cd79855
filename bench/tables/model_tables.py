"""Tables of harness results for training, engines and screening."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.tables.case_tables import cases_of, provenance, ratio_text
from bench.tables.labels import label

__all__ = ["engine_table", "screen_table", "train_table"]

PEER, OURS = "Pillow + torchvision + DataLoader, float32, channels first", "FastFundus, train --amp"
EAGER, EAGER_KEPT = "torch eager, float32", "torch eager, float32, memory kept"
FP32, BF16, INT8 = "OpenVINO fp32", "OpenVINO bf16", "OpenVINO int8"
SCREEN_PEERS, DECODING = "PIL, torchvision, torch eager float32", "reading, decoding, cropping alone"
SCREEN_BEST = "the peers' loop, photo by photo"


def train_table(result: dict[str, Any]) -> str:
    """Return the table of training against the baseline, as Markdown."""
    lines = [
        "| on the CPU | typical PyTorch pipeline, images/s | **FastFundus** `train --amp`, images/s | speed-up | "
        "share of its step alone | share of bf16 matmul throughput in the step |",
        "|---|---|---|---|---|---|",
    ]
    cases = cases_of(result, "train")
    for found in cases:
        peer, ours = (found["variants"][name] for name in (PEER, OURS))
        step = found["variants"][found["case"]["limit"]["what"]]
        job = f"{found['case']['name'].removeprefix('train, ')}, {found['case']['what']}"
        lines.append(
            f"| {job} | {peer['photos_per_s']:.2f} | {ours['photos_per_s']:.2f} | {ratio_text(found, PEER, OURS)} | "
            f"{ours['share_of_limit']:.0%} | {step['share_of_limit']:.0%} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "Typical PyTorch pipeline: Pillow, torchvision transforms and a DataLoader with one worker per core, on "
            "JPEG files twice as wide as the input; float32, channels first. Share of its step alone: throughput "
            "including data loading, relative to the same training step on a resident batch. Variants interleaved in "
            f"one run, medians of {' and '.join(str(found['rounds']) for found in cases)} rounds. "
            + provenance(result, "make bench SUITES=train"),
        ]
    )


def engine_table(result: dict[str, Any]) -> str:
    """Return the table of engines against torch, as Markdown."""
    cases = result["cases"]
    titles = [found["case"]["name"].replace("_patch16_224", "") for found in cases]
    lines = ["| images/s | " + " | ".join(titles) + " |", "|---" * (len(cases) + 1) + "|"]
    for name in cases[0]["variants"]:
        cells = [f"{found['variants'][name]['photos_per_s']:.1f}" for found in cases]
        title = {EAGER: f"{EAGER} (baseline)", BF16: f"**{BF16}**", INT8: f"**{INT8}**"}.get(name, label(name))
        lines.append(f"| {title} | {' | '.join(cells)} |")
        if name == EAGER:
            cells = [f"{found['one_photo']['variants'][EAGER]['photos_per_s']:.1f}" for found in cases]
            lines.append(f"| {EAGER}, one photo at a time | {' | '.join(cells)} |")
    for slow, fast, title in (
        (EAGER, EAGER_KEPT, "speed-up: torch eager, tuned malloc vs. default"),
        (EAGER, BF16, "speed-up: OpenVINO bf16 vs. torch eager float32"),
        ("torch.compile, bfloat16", BF16, "speed-up: OpenVINO bf16 vs. torch.compile bfloat16"),
        (BF16, INT8, "speed-up: OpenVINO int8 vs. bf16"),
        (EAGER, INT8, "speed-up: OpenVINO int8 vs. torch eager float32"),
        ("OpenVINO bf16, by its own queue", BF16, "speed-up: FastFundus's engine vs. AsyncInferQueue, bf16"),
    ):
        if {slow, fast} <= set(cases[0]["variants"]):
            cells = [ratio_text(found, slow, fast, 2) for found in cases]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    for name in (EAGER_KEPT, FP32, BF16, INT8):
        rows = [found["variants"][name] for found in cases if name in found["variants"]]
        if rows:
            cells = [f"{row['share_of_limit']:.0%}" for row in rows]
            lines.append(f"| share of {label(rows[0]['limit']['what'])}: {label(name)} | {' | '.join(cells)} |")
    for name in (EAGER, BF16, INT8):
        if name in cases[0]["variants"]:
            times = [found["one_photo"]["variants"][name]["times_ms"] for found in cases]
            cells = [f"{np.percentile(each, 50):.0f} / {np.percentile(each, 99):.0f} ms" for each in times]
            lines.append(f"| latency of one photo, p50 / p99: {name} | {' | '.join(cells)} |")
    most = max(row["distance"] for found in cases for row in found["variants"].values())
    return "\n".join(
        [
            *lines,
            "",
            "From uint8 photos in memory to probabilities, on all cores. Variants interleaved in one run, medians of "
            f"{' / '.join(str(found['rounds']) for found in cases)} rounds. torch runs batches of 16. The baseline "
            "runs in its own process, as users run it; all other variants share a process in which malloc keeps freed "
            "memory. In every round, each variant's probabilities were compared with those of torch float32 (random "
            f"weights, largest difference {most:.0e}). " + provenance(result, "make bench SUITES=engine"),
        ]
    )


def screen_table(result: dict[str, Any]) -> str:
    """Return the table of screening against a typical PyTorch loop and its own stages, as Markdown."""
    (found,) = result["cases"]
    rows = found["variants"]
    lines = [
        "| camera JPEGs, ResNet-50, 512 px | photos/s | speed-up over the typical loop | over its fastest setting | "
        "share of the engine alone | relative to sequential stages |",
        "|---|---|---|---|---|---|",
        f"| typical PyTorch loop ({SCREEN_PEERS}): {label(rows[SCREEN_PEERS]['settings'])} | "
        f"{rows[SCREEN_PEERS]['photos_per_s']:.2f} | 1x | | | |",
        f"| {label(SCREEN_BEST)}: {label(rows[SCREEN_BEST]['settings'])} | {rows[SCREEN_BEST]['photos_per_s']:.2f} | "
        f"{ratio_text(found, SCREEN_PEERS, SCREEN_BEST)} | 1x | | |",
    ]
    for precision in found["busy"]:
        whole, alone = f"screen, {precision}", f"engine alone, {precision}"
        both = np.add(rows[DECODING]["times_ms"], rows[alone]["times_ms"]) / rows[whole]["times_ms"]
        lines.append(
            f"| **screen, {precision}** | {rows[whole]['photos_per_s']:.2f} | "
            f"{ratio_text(found, SCREEN_PEERS, whole)} | {ratio_text(found, SCREEN_BEST, whole)} | "
            f"{rows[alone]['ms'] / rows[whole]['ms']:.0%} of {rows[alone]['photos_per_s']:.2f} | "
            f"{np.median(both):.0%} |"
        )
    lines.append(f"| {label(DECODING)} | {rows[DECODING]['photos_per_s']:.1f} | | | | |")
    most = max(row["distance"] for row in rows.values())
    return "\n".join(
        [
            *lines,
            "",
            f"{label(found['case']['what'])}; variants interleaved in one run, medians of {found['rounds']} rounds. "
            "Decoding and the engine share the cores; the last column compares with running the two stages one after "
            "the other, each on all cores. Every probability was compared with that of torch float32 on the same "
            f"prepared photos (random weights, largest difference {most:.0e}). "
            + provenance(result, "make bench SUITES=screen"),
        ]
    )
