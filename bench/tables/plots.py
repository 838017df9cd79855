"""README figure of photos/s of FastFundus and its peers, drawn from the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.tables.case_tables import cases_of
from bench.tables.model_tables import SCREEN_BEST, SCREEN_PEERS
from bench.tables.targets import CACHE_LOADER, DECODER, HABIT, newest
from fastfundus.pictures import as_svg

__all__ = ["draw_speed"]

OURS, THEIRS, LIMIT = "#0f766e", "#94a3b8", "#d6d3d1"


def _panels(folder: Path) -> list[tuple[str, list[tuple[str, float, str]]]]:
    """Return titles, and bars of name, photos/s and colour."""
    loaders = cases_of(newest(folder, "loader"), "loader, 512 px")
    cases = (newest(folder, "prepare")["cases"][0], newest(folder, "screen")["cases"][0], loaders[0])
    one, rates, fed = ({name: row["photos_per_s"] for name, row in found["variants"].items()} for found in cases)
    return [
        (
            "Preprocessing camera JPEGs, one core",
            [
                ("FastFundus", one["FastFundus"], OURS),
                ("Pillow + torchvision", one[HABIT], THEIRS),
                ("OpenCV", one["OpenCV + area"], THEIRS),
                ("DALI CPU", one["DALI CPU"], THEIRS),
                ("JPEG decoder alone", one[DECODER], LIMIT),
            ],
        ),
        (
            "Loading training data, 512 px, all cores",
            [
                ("FastFundus, cache", fed[CACHE_LOADER], OURS),
                ("FastFundus, files", fed["FastFundus, from files"], OURS),
                ("torchvision v2", fed["torchvision v2, DataLoader"], THEIRS),
                ("timm", fed["timm, create_loader"], THEIRS),
                ("Albumentations", fed["Albumentations, DataLoader"], THEIRS),
                ("DALI CPU", fed["DALI CPU"], THEIRS),
            ],
        ),
        (
            "Screening, ResNet-50, 512 px, all cores",
            [
                ("FastFundus, int8", rates["screen, int8"], OURS),
                ("FastFundus, bf16", rates["screen, bf16"], OURS),
                ("FastFundus, fp32", rates["screen, fp32"], OURS),
                ("PyTorch, batch size 1", rates[SCREEN_BEST], THEIRS),
                ("PyTorch, batch size 16", rates[SCREEN_PEERS], THEIRS),
            ],
        ),
    ]


def draw_speed(folder: Path, output: Path) -> None:
    """Draw the newest results of a folder as an SVG."""
    panels = _panels(folder)

    def draw(plots: Sequence[Any]) -> None:
        for axes, (title, bars) in zip(plots, panels, strict=True):
            names, values, colours = zip(*bars, strict=True)
            drawn = axes.barh(range(len(bars)), values, color=colours, height=0.7)
            axes.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
            axes.set_yticks(range(len(bars)), names)
            axes.invert_yaxis()
            axes.set_xlim(0, 1.18 * max(values))
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(left=False)
            axes.set_title(title, fontsize=9, loc="left")
            axes.set_xlabel("photos/s", loc="left")

    output.write_text(as_svg(draw, columns=len(panels), width_in=11, height_in=2.2), encoding="utf-8")
