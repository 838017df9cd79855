"""Parity check of an engine against its source model on held-out photos, the gate that every build must pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["GATES", "MAP_QUANTILE", "MAX_AUROC_LOSS", "MIN_SPEEDUP", "Gate", "ParityReport", "compare"]


@dataclass(frozen=True, slots=True)
class Gate:
    """Limits on how much an engine may differ from its model."""

    probability: float
    """Largest allowed difference in any probability."""
    flipped: float
    """Largest allowed share of decisions that differ at the threshold."""


_Float = TypeVar("_Float", np.float32, np.float64)

GATES = {
    # Only the order of summation differs: no photo's decision may flip, and at most one pixel in a hundred thousand.
    "fp32": Gate(probability=1e-3, flipped=1e-5),
    # Half precision has 11 mantissa bits, so its rounding error is an eighth of bfloat16's.
    "fp16": Gate(probability=1e-2, flipped=0.002),
    # bfloat16 has 8 mantissa bits; over fifty layers, errors add up to a few hundredths where the sigmoid is steepest.
    # A decision may flip only if its probability is that close to the threshold.
    "bf16": Gate(probability=5e-2, flipped=0.01),
    # 8-bit integers are about as coarse as bfloat16, but their ranges are calibrated on other photos and clip values
    # outside, so single photos may differ twice as much.
    "int8": Gate(probability=1e-1, flipped=0.02),
    # 8-bit floats have 4 mantissa bits over the same ranges.
    "fp8": Gate(probability=1e-1, flipped=0.02),
}

MAP_QUANTILE = 0.999
"""Quantile of a map's per-pixel differences that the gate limits. The maximum is not used because the sigmoid is
steepest at the edges of vessels, and a map is read as a whole."""
MAX_AUROC_LOSS = 0.002
"""Largest allowed loss of AUROC of any output. It is a quarter of the width of a confidence interval from ten thousand
photos, too small to be measured."""
MIN_SPEEDUP = 1.15
"""Smallest speedup of an 8-bit engine over the fastest passing engine of higher precision; a smaller one does not
justify validating the model again."""


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Differences between the outputs of an engine and those of its model."""

    precision: str
    photos: int
    largest_difference: float
    """Largest difference in any probability."""
    gated_difference: float
    """Difference that the gate limits: the largest one, or for maps the `MAP_QUANTILE` of the per-pixel differences."""
    mean_difference: float
    flipped: int
    """Number of decisions that differ at the threshold."""
    decisions: int
    """Number of decisions: photos times outputs, or pixels of maps."""
    images_per_s: float
    """Throughput of the engine alone, with photos in memory; 0 if it was not measured: only its graph was run."""
    torch_images_per_s: float
    """Throughput of the float32 model in torch, on the same photos in the same process."""
    gate_probability: float
    gate_flipped: float
    auroc_loss: float | None
    """Largest loss of AUROC of any output, 0 if at most one pair of photos changed order; None if the ground truth is
    unknown or contains only one class."""
    passed: bool
    speedup: float | None = None
    """Speedup of an 8-bit engine over the fastest passing engine of higher precision, measured in alternating rounds in
    one process; None for other precisions."""

    error: str | None = None
    """Reason why the engine could not be built or run; the other values are then meaningless."""

    def against(self, speedup: float) -> ParityReport:
        """Return a copy with this speedup, which does not pass if the speedup is below `MIN_SPEEDUP`."""
        return replace(self, speedup=speedup, passed=self.passed and speedup >= MIN_SPEEDUP)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.precision} failed: {self.error}"
        verdict = "passes" if self.passed else "misses the gate"
        speedup = (
            "" if self.speedup is None else f", {self.speedup:.2f}x the fastest 16/32-bit (at least {MIN_SPEEDUP})"
        )
        rate = f"{self.images_per_s:.0f} images/s" if self.images_per_s else "not run yet"
        loss = "" if self.auroc_loss is None else f"AUROC loss {self.auroc_loss:.4f} (at most {MAX_AUROC_LOSS}), "
        return (
            f"{self.precision} {verdict}: |dp| {self.gated_difference:.2e} (at most {self.gate_probability:g}), "
            f"{self.flipped} of {self.decisions} decisions flipped (at most {self.gate_flipped:.3%}), {loss}"
            f"{rate}, torch float32 {self.torch_images_per_s:.1f}{speedup}"
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
    """Compare the probabilities of an engine with those of its model.

    Args:
        expected: probabilities of the model, float32 [N, L], or [N, L, S, S] for maps.
        got: probabilities of the engine, in the same shape. Non-finite values and values outside 0 to 1 always fail the
            gate.
        thresholds: [L] decision threshold of each output.
        precision: one of `GATES`.
        images_per_s: throughput of the engine.
        torch_images_per_s: throughput of the model in torch.
        truth: ground truth, float64 in the shape of `expected`: 0, 1 or NaN.
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
        and (loss is None or loss <= MAX_AUROC_LOSS),
    )


def _by_output(values: NDArray[_Float]) -> NDArray[_Float]:
    """Return [N, L] unchanged and [N, L, S, S] as [N * S * S, L]."""
    return np.moveaxis(values, 1, -1).reshape(-1, values.shape[1])


def _auroc_loss(expected: NDArray[np.float32], got: NDArray[np.float32], truth: NDArray[np.float64]) -> float | None:
    losses = []
    for before, after, known in zip(expected.T, got.T, truth.T, strict=True):
        yes, no = (known == side for side in (1, 0))
        if yes.any() and no.any():
            loss = _auroc(before[yes], before[no]) - _auroc(after[yes], after[no])
            # A single pair in another order is the smallest possible loss, and not informative on few photos.
            losses.append(0.0 if loss <= 1 / (int(yes.sum()) * int(no.sum())) * (1 + 1e-9) else loss)
    return max(losses) if losses else None


def _auroc(yes: NDArray[np.float32], no: NDArray[np.float32]) -> float:
    """Return the share of correctly ordered pairs, ties counting half.

    Implemented here so that screening needs no further dependency.
    """
    no = np.sort(no)
    below, up_to = (np.searchsorted(no, yes, side=side).mean() for side in ("left", "right"))
    return float((below + up_to) / 2 / len(no))
