"""An engine against the model it came from, on held-out photos: the gate that every build must pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["GATES", "LEAST_SPEEDUP", "MAP_QUANTILE", "MOST_AUROC_LOSS", "Gate", "ParityReport", "compare"]


@dataclass(frozen=True, slots=True)
class Gate:
    """The most by which an engine may differ."""

    probability: float
    """Largest difference in any probability."""
    flipped: float
    """Largest share of decisions that differ at the threshold."""


_Float = TypeVar("_Float", np.float32, np.float64)

GATES = {
    # Float32 engines order their sums differently, no more: not one photo's decision, a pixel in a hundred thousand's.
    "fp32": Gate(probability=1e-3, flipped=1e-5),
    # Half precision keeps 11 bits of mantissa, an eighth of bfloat16's rounding.
    "fp16": Gate(probability=1e-2, flipped=0.002),
    # bfloat16 keeps 8 bits of mantissa; fifty layers add up to a few hundredths where the sigmoid is steepest. A
    # decision may flip only where the probability lies that close to the threshold.
    "bf16": Gate(probability=5e-2, flipped=0.01),
    # Integers of 8 bits are about as coarse as bfloat16, but their ranges are learned on other photos and cut off what
    # lies outside: twice as much, for single photos.
    "int8": Gate(probability=1e-1, flipped=0.02),
    # Floats of 8 bits keep 4 of mantissa over the same ranges.
    "fp8": Gate(probability=1e-1, flipped=0.02),
}

MAP_QUANTILE = 0.999
"""Of the differences of a map's pixels, what the gate is held against: the edge of a vessel is where a sigmoid is
steepest, and a map is read as a whole."""
MOST_AUROC_LOSS = 0.002
"""Of any output. A quarter of the width of an interval from ten thousand photos: what nobody could measure anyway."""
LEAST_SPEEDUP = 1.15
"""Of eight bits over the fastest engine of more that passes; for less, nobody should have to recheck a model."""


@dataclass(frozen=True, slots=True)
class ParityReport:
    """How far an engine's answers are from its model's."""

    precision: str
    photos: int
    largest_difference: float
    """Of any probability."""
    gated_difference: float
    """What the gate is held against: the same, or `MAP_QUANTILE` of the differences of a map's pixels."""
    mean_difference: float
    flipped: int
    """Decisions that differ at the threshold."""
    decisions: int
    """Of how many: photos times outputs, or pixels of maps."""
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
    speedup: float | None = None
    """Of eight bits over the fastest engine of more that passes, in turns in one process; None of others."""

    error: str | None = None
    """Why there is no engine, or no answer of it; the figures then mean nothing."""

    def against(self, speedup: float) -> ParityReport:
        """Return the same with a speedup, refused where it is below `LEAST_SPEEDUP`."""
        return replace(self, speedup=speedup, passed=self.passed and speedup >= LEAST_SPEEDUP)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.precision} FAILED: {self.error}"
        verdict = "passes" if self.passed else "MISSES"
        speedup = (
            "" if self.speedup is None else f", {self.speedup:.2f}x the best of more bits (at least {LEAST_SPEEDUP})"
        )
        loss = "" if self.auroc_loss is None else f"AUROC loss {self.auroc_loss:.4f} (at most {MOST_AUROC_LOSS}), "
        return (
            f"{self.precision} {verdict}: |dp| {self.gated_difference:.2e} (at most {self.gate_probability:g}), "
            f"{self.flipped} of {self.decisions} decisions flipped (at most {self.gate_flipped:.3%}), {loss}"
            f"{self.images_per_s:.0f} images/s against {self.torch_images_per_s:.1f} in torch float32{speedup}"
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
    """Compare probabilities with those of the model.

    Args:
        expected: float32 [N, L], or [N, L, S, S] of maps, what the model gives.
        got: the same of the engine. Values that are not numbers, or outside 0 to 1, fail the gate whatever else.
        thresholds: [L] turn probabilities into decisions.
        precision: one of `GATES`.
        images_per_s: of the engine.
        torch_images_per_s: of the model.
        truth: float64, of `expected`'s shape: 0, 1 or NaN.
    """
    gate, photos, maps = GATES[precision], len(expected), expected.ndim > 2
    expected, got = _by_output(expected), _by_output(got)
    loss = None if truth is None else _auroc_loss(expected, got, _by_output(truth))
    sound = bool(np.isfinite(got).all() and (got >= 0).all() and (got <= 1).all())
    difference = np.abs(got - expected)
    flipped = int(((expected >= thresholds) != (got >= thresholds)).sum())
    largest = float(difference.max()) if sound else 1.0
    gated = float(np.quantile(difference, MAP_QUANTILE)) if sound and maps else largest
    return ParityReport(
        precision=precision,
        photos=photos,
        largest_difference=largest,
        gated_difference=gated,
        mean_difference=float(difference.mean(dtype=np.float64)) if sound else 1.0,
        flipped=flipped,
        decisions=expected.size,
        images_per_s=images_per_s,
        torch_images_per_s=torch_images_per_s,
        gate_probability=gate.probability,
        gate_flipped=gate.flipped,
        auroc_loss=loss,
        passed=sound
        and gated <= gate.probability
        and flipped <= gate.flipped * expected.size
        and (loss is None or loss <= MOST_AUROC_LOSS),
    )


def _by_output(values: NDArray[_Float]) -> NDArray[_Float]:
    """[N, L] as it is, [N, L, S, S] as [N * S * S, L]."""
    return np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])


def _auroc_loss(expected: NDArray[np.float32], got: NDArray[np.float32], truth: NDArray[np.float64]) -> float | None:
    losses = []
    for before, after, known in zip(expected.T, got.T, truth.T, strict=True):
        yes, no = (known == side for side in (1, 0))
        if yes.any() and no.any():
            loss = _auroc(before[yes], before[no]) - _auroc(after[yes], after[no])
            # One pair in another order is the least that can be seen: on few photos it says nothing.
            losses.append(0.0 if loss <= 1 / (int(yes.sum()) * int(no.sum())) * (1 + 1e-9) else loss)
    return max(losses) if losses else None


def _auroc(yes: NDArray[np.float32], no: NDArray[np.float32]) -> float:
    """Share of pairs in the right order, ties by half; without a library that screening would have to install."""
    no = np.sort(no)
    below, up_to = (np.searchsorted(no, yes, side=side).mean() for side in ("left", "right"))
    return float((below + up_to) / 2 / len(no))
