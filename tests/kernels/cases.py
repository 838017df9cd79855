"""Shapes and matrices on which every implementation of `sample` is tested; the name of each row describes its path."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tests.tolerances import sample_grey_levels

IDENTITY = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
PLAIN = torch.eye(3, 4)


def affine(scale: float, degrees: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)) -> torch.Tensor:
    c, s = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    return torch.tensor([[c, -s, shift[0]], [s, c, shift[1]]])


def matrix(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


# Height and width of the source, geometry, side of the output. A block in the names is 512 pixels.
CASES: dict[str, tuple[tuple[int, int], torch.Tensor, int]] = {
    "one-pixel": ((1, 1), IDENTITY, 1),
    "one-pixel-enlarged": ((1, 1), affine(0.25), 5),
    "width-one": ((5, 1), IDENTITY, 4),
    "height-one": ((1, 5), affine(0.8), 4),
    "two-columns": ((4, 2), affine(0.5, 0, (-0.3, 0.2)), 6),
    "identity-two-whole-blocks": ((32, 32), IDENTITY, 32),
    "less-than-a-block": ((22, 22), IDENTITY, 22),
    "one-block-and-a-bit": ((23, 23), IDENTITY, 23),
    "not-square": ((9, 17), affine(0.7, 0, (1.5, 0.25)), 12),
    "enlarge": ((8, 8), affine(0.25), 32),
    "overhang-left": ((16, 16), affine(1.0, 0, (-5.5, 0.0)), 16),
    "overhang-top": ((16, 16), affine(1.0, 0, (0.0, -3.25)), 16),
    "overhang-right": ((16, 16), affine(1.0, 0, (7.75, 0.0)), 16),
    "overhang-bottom": ((16, 16), affine(1.0, 0, (0.0, 9.5)), 16),
    "all-outside": ((16, 16), affine(1.0, 0, (100.0, 0.0)), 8),
    "all-outside-minified": ((16, 16), affine(3.0, 0, (0.0, -200.0)), 8),
    "turned": ((24, 24), affine(0.9, 33.0, (8.0, -4.0)), 24),
    "turned-by-90": ((10, 14), affine(1.0, 90.0, (12.0, 0.0)), 12),
    "mirrored": ((12, 12), matrix([-1, 0, 12], [0, 1, 0]), 12),
    "sheared": ((20, 20), matrix([0.8, 0.3, 1], [0, 0.9, 0.5]), 18),
    "minify-2": ((32, 32), affine(2.0), 16),
    # Columns per box on the CPU: three and four have unrolled loops; boxes that overhang take another path.
    "minify-1.6-turned": ((40, 40), affine(1.6, 20.0, (6.0, -1.0)), 20),
    "minify-2.5-turned": ((40, 40), affine(2.5, 20.0, (3.0, -2.0)), 13),
    "minify-5-turned": ((64, 48), affine(5.0, -12.0, (1.0, 6.0)), 10),
    "minify-turned-box-as-large-as-the-photo": ((4, 4), affine(2.0, 45.0, (2.0, -1.0)), 3),
    "minify-7": ((64, 48), affine(7.0), 9),
    "minify-one-axis": ((40, 12), matrix([0.75, 0, 1.2], [0, 3.3, -0.4]), 12),
    "minify-overhang": ((30, 30), affine(4.3, 0, (-9.0, -7.5)), 10),
    "minify-box-wider-than-photo": ((3, 2), affine(9.0, 0, (-20.0, -20.0)), 6),
    "just-below-minification": ((12, 12), affine(1.0002), 12),
    "just-above-minification": ((12, 12), affine(1.0005), 12),
}


@dataclass(frozen=True)
class Batch:
    """Arguments of `sample_ragged`."""

    pixels: torch.Tensor
    offsets: torch.Tensor
    sizes: torch.Tensor
    geometry: torch.Tensor
    colour: torch.Tensor
    out_size: int

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        return self.pixels, self.offsets, self.sizes, self.geometry, self.colour, self.out_size

    @property
    def grey_levels(self) -> float:
        """Maximum error of float32 arithmetic, in grey levels."""
        corners = torch.tensor([[0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1.0]]) * torch.tensor(
            [self.out_size, self.out_size, 1.0]
        )
        farthest = float((self.geometry @ corners.T).abs().max()) if len(self.geometry) else 0.0
        box = float(torch.linalg.vector_norm(self.geometry[:, :, :2], dim=2).max()) if len(self.geometry) else 1.0
        return sample_grey_levels(farthest + box, box)


def ragged(rows: list[tuple[tuple[int, int], torch.Tensor]], out_size: int, *, gap: int = 0) -> Batch:
    """Return random photos of the given sizes in one buffer, `gap` bytes apart, with the given geometries."""
    generator = torch.Generator().manual_seed(sum(height + width for (height, width), _ in rows))
    sizes = torch.tensor([size for size, _ in rows], dtype=torch.int32).view(-1, 2)
    lengths = [3 * height * width + gap for (height, width), _ in rows]
    offsets = torch.tensor([gap + sum(lengths[:n]) for n in range(len(rows))], dtype=torch.int64)
    pixels = torch.randint(0, 256, (gap + sum(lengths),), dtype=torch.uint8, generator=generator)
    geometry = torch.stack([geometry for _, geometry in rows]) if rows else torch.zeros(0, 2, 3)
    return Batch(pixels, offsets, sizes, geometry, PLAIN.repeat(len(rows), 1, 1), out_size)


def case(name: str, copies: int = 2) -> Batch:
    size, geometry, out_size = CASES[name]
    return ragged([(size, geometry)] * copies, out_size)
