"""An engine against the model it came from, on held-out photos: the gate that every build must pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GATES", "MOST_AUROC_LOSS", "Gate", "ParityReport", "compare"]


@dataclass(frozen=True, slots=True)
class Gate:
    """The most by which an engine may differ."""

    probability: float
    """Largest difference in any probability."""
    flipped: float
    """Largest share of decisions that differ at the threshold."""


GATES = {
    # Float32 engines order their sums differently, no more.
    "fp32": Gate(probability=1e-3, flipped=0.0),
    # bfloat16 keeps 8 bits of mantissa; fifty layers add up to a few hundredths where the sigmoid is steepest. A
    # decision may flip only where the probability lies that close to the threshold.
    "bf16": Gate(probability=5e-2, flipped=0.01),
}

MOST_AUROC_LOSS = 0.002
"""Of any output. A quarter of the width of an interval from ten thousand photos: what nobody could measure anyway."""


@dataclass(frozen=True, slots=True)
class ParityReport:
    """How far an engine's answers are from its model's."""

    precision: str
    photos: int
    largest_difference: float
    """Of any probability."""
    mean_difference: float
    flipped: int
    """Decisions that differ at the threshold."""
    images_per_s: float
    """Of the engine alone, photos in memory."""
    torch_images_per_s: float
    """Of the model in torch, float32, same photos, same process."""
    gate_probability: float
    gate_flipped: float
    auroc_loss: float | None
    """Largest loss of AUROC of any output, 0 where no more than one pair of photos changed places; None where the truth
    is not known, or shows one class only."""
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        verdict = "passes" if self.passed else "MISSES"
        return (
            f"{self.precision} {verdict}: largest |dp| {self.largest_difference:.2e} "
            f"(at most {self.gate_probability:g}), "
            f"{self.flipped} of {self.photos} decisions flipped (at most {self.gate_flipped:.1%}), "
            + ("" if self.auroc_loss is None else f"AUROC loss {self.auroc_loss:.4f} (at most {MOST_AUROC_LOSS}), ")
            + f"{self.images_per_s:.0f} images/s against {self.torch_images_per_s:.1f} in torch float32"
        )


def compare(
    expected: NDArray[np.float32],
    got: NDArray[np.float32],
    thresholds: NDArray[np.float64],
    *,
    precision: str,
    images_per_s: float,
    torch_images_per_s: float,
    truth: NDArray[np.float64] | None = None,
) -> ParityReport:
    """Compare probabilities [N, L] with those of the model; thresholds [L] turn them into decisions.

    Probabilities that are not numbers, or outside 0 to 1, fail the gate whatever the differences are.
    """
    gate = GATES[precision]
    loss = None if truth is None else _auroc_loss(expected, got, truth)
    difference = np.abs(got.astype(np.float64) - expected)
    sound = bool(np.isfinite(got).all() and (got >= 0).all() and (got <= 1).all())
    flipped = int(((expected >= thresholds) != (got >= thresholds)).sum())
    largest = float(difference.max()) if sound else 1.0
    return ParityReport(
        precision=precision,
        photos=len(expected),
        largest_difference=largest,
        mean_difference=float(difference.mean()) if sound else 1.0,
        flipped=flipped,
        images_per_s=images_per_s,
        torch_images_per_s=torch_images_per_s,
        gate_probability=gate.probability,
        gate_flipped=gate.flipped,
        auroc_loss=loss,
        passed=sound
        and largest <= gate.probability
        and flipped <= gate.flipped * expected.size
        and (loss is None or loss <= MOST_AUROC_LOSS),
    )


def _auroc_loss(expected: NDArray[np.float32], got: NDArray[np.float32], truth: NDArray[np.float64]) -> float | None:
    losses = []
    for before, after, known in zip(expected.T, got.T, truth.T, strict=True):
        yes, no = (known == side for side in (1, 0))
        if yes.any() and no.any():
            loss = _auroc(before[yes], before[no]) - _auroc(after[yes], after[no])
            # One pair in another order is the least that can be seen: on few photos it says nothing.
            losses.append(0.0 if loss <= 1 / (yes.sum() * no.sum()) * (1 + 1e-9) else loss)
    return max(losses) if losses else None


def _auroc(yes: NDArray[np.float32], no: NDArray[np.float32]) -> float:
    """By its definition, pair by pair: a few hundred photos, and no library that screening would have to install."""
    difference = yes[:, None].astype(np.float64) - no
    return float((np.sign(difference) + 1).mean() / 2)
