"""Tables of harness results for training, engines and screening."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.tables.case_tables import cases_of, provenance, ratio_text

__all__ = ["engine_table", "screen_table", "train_table"]

PEER, OURS = "Pillow + torchvision + DataLoader, float32, channels first", "FastFundus, train --amp"
EAGER, EAGER_KEPT = "torch eager, float32", "torch eager, float32, memory kept"
FP32, BF16, INT8 = "OpenVINO fp32", "OpenVINO bf16", "OpenVINO int8"
SCREEN_PEERS, DECODING = "PIL, torchvision, torch eager float32", "reading, decoding, cropping alone"
SCREEN_BEST = "the peers' loop, photo by photo"


def train_table(result: dict[str, Any]) -> str:
    """Return the table of training against the baseline, as Markdown."""
    lines = [
        "| on the CPU | peers' habit, images/s | **FastFundus** `train --amp` | faster by | of its step alone | the "
        "step, of matrix products in bf16 |",
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
            "The peers' habit: Pillow, torchvision's transforms and a DataLoader, a worker a core, on JPEG "
            "files twice as wide as the input, float32, channels first. Of its step alone: what feeding leaves of the "
            "step on a batch that is there already. In turns in one run, medians of "
            f"{' and '.join(str(found['rounds']) for found in cases)} rounds. "
            + provenance(result, "make bench SUITES=train"),
        ]
    )


def engine_table(result: dict[str, Any]) -> str:
    """Return the table of engines against torch, as Markdown."""
    cases = result["cases"]
    titles = [found["case"]["name"].replace("_patch16_224", "") for found in cases]
    lines = ["| images/s | " + " | ".join(titles) + " |", "|---" * (len(cases) + 1) + "|"]
    for label in cases[0]["variants"]:
        cells = [f"{found['variants'][label]['photos_per_s']:.1f}" for found in cases]
        summary = {EAGER: f"{EAGER} (the peers' habit)", BF16: f"**{BF16}**", INT8: f"**{INT8}**"}.get(label, label)
        lines.append(f"| {summary} | {' | '.join(cells)} |")
        if label == EAGER:
            cells = [f"{found['one_photo']['variants'][EAGER]['photos_per_s']:.1f}" for found in cases]
            lines.append(f"| torch eager, photo by photo | {' | '.join(cells)} |")
    for slow, fast, summary in (
        (EAGER, EAGER_KEPT, "what keeping memory does for torch eager"),
        (EAGER, BF16, "bf16 over torch eager"),
        ("torch.compile, bfloat16", BF16, "bf16 over torch.compile bf16"),
        (BF16, INT8, "int8 over bf16"),
        (EAGER, INT8, "int8 over torch eager"),
        ("OpenVINO bf16, by its own queue", BF16, "our call over OpenVINO's own queue"),
    ):
        if {slow, fast} <= set(cases[0]["variants"]):
            cells = [ratio_text(found, slow, fast, 2) for found in cases]
            lines.append(f"| {summary} | {' | '.join(cells)} |")
    for label in (EAGER_KEPT, FP32, BF16, INT8):
        rows = [found["variants"][label] for found in cases if label in found["variants"]]
        if rows:
            cells = [f"{row['share_of_limit']:.0%}" for row in rows]
            lines.append(f"| {label}, of {rows[0]['limit']['what']} | {' | '.join(cells)} |")
    for label in (EAGER, BF16, INT8):
        if label in cases[0]["variants"]:
            times = [found["one_photo"]["variants"][label]["times_ms"] for found in cases]
            cells = [f"{np.percentile(each, 50):.0f} / {np.percentile(each, 99):.0f} ms" for each in times]
            lines.append(f"| one photo, p50 / p99: {label} | {' | '.join(cells)} |")
    most = max(row["distance"] for found in cases for row in found["variants"].values())
    return "\n".join(
        [
            *lines,
            "",
            "Engines: uint8 photos in memory to probabilities, all cores, in turns in one run, medians of "
            f"{' / '.join(str(found['rounds']) for found in cases)} rounds. torch takes batches of 16; its eager "
            "habit has a process of its own, as users run it, all else one in which the C library keeps freed memory. "
            f"Every variant was compared with torch float32 in every round (random weights: at most {most:.0e}). "
            + provenance(result, "make bench SUITES=engine"),
        ]
    )


def screen_table(result: dict[str, Any]) -> str:
    """Return the table of screening against the peers' loop and its own stages, as Markdown."""
    (found,) = result["cases"]
    rows = found["variants"]
    lines = [
        "| camera JPEGs, ResNet-50, 512 px | photos/s | over the peers' loop | over the fastest of them | "
        "of the engine alone | of both stages |",
        "|---|---|---|---|---|---|",
        f"| the peers' loop: {SCREEN_PEERS}: {rows[SCREEN_PEERS]['settings']} | "
        f"{rows[SCREEN_PEERS]['photos_per_s']:.2f} | 1 | | | |",
        f"| {SCREEN_BEST}: {rows[SCREEN_BEST]['settings']} | {rows[SCREEN_BEST]['photos_per_s']:.2f} | "
        f"{ratio_text(found, SCREEN_PEERS, SCREEN_BEST)} | 1 | | |",
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
    lines.append(f"| {DECODING} | {rows[DECODING]['photos_per_s']:.1f} | | | | |")
    most = max(row["distance"] for row in rows.values())
    return "\n".join(
        [
            *lines,
            "",
            f"{found['case']['what']}; medians of {found['rounds']} rounds in turns. Decoding and engine share the "
            "cores here: the last column compares with one after the other, each with all cores. Every answer was "
            f"compared with torch's in float32 on the same prepared photos (random weights: at most {most:.0e}). "
            + provenance(result, "make bench SUITES=screen"),
        ]
    )
