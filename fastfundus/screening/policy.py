"""Decision policy of a screening programme for photos, eyes and patients. Uses the standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastfundus.errors import ConfigError

__all__ = ["DECISIONS", "NEGATIVE", "NOT_SCREENED", "POSITIVE", "RETAKE", "UNCERTAIN", "ScreenPolicy"]

POSITIVE, UNCERTAIN, RETAKE, NOT_SCREENED, NEGATIVE = "positive", "uncertain", "retake", "not screened", "negative"
DECISIONS = (NEGATIVE, NOT_SCREENED, RETAKE, UNCERTAIN, POSITIVE)
"""Decisions from best to worst; a patient gets the worst of their eyes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreenPolicy:
    """The decision rules of a screening programme. Thresholds belong to the bundle and are locked there.

    Raises:
        ConfigError: a value is out of range.
    """

    abstain: float = 0.0
    """Half-width of the uncertain band around each threshold, 0 to 0.5. A photo with a probability within the band of a
    finding, and none above a band, is `uncertain` and left to a human reader; 0 decides every photo."""
    least_images: int = 1
    """Minimum number of scored photos for an eye to be negative."""
    unusable: Literal["block", "ignore"] = "block"
    """Treatment of photos that are ungradable or could not be screened. "block": an eye with such a photo is never
    negative. "ignore": such photos do not count, as long as the eye has enough scored photos."""
    both_eyes: bool = False
    """If True, a patient without a photo of each eye is never negative."""

    def __post_init__(self) -> None:
        if not 0 <= self.abstain <= 0.5:
            raise ConfigError(f"abstain {self.abstain}: must be a distance between probabilities, 0 to 0.5")
        if self.least_images < 1:
            raise ConfigError(f"least_images {self.least_images}: an eye needs at least one photo")
        if self.unusable not in ("block", "ignore"):
            raise ConfigError(f"unusable {self.unusable!r}: must be block or ignore")

    def decide(self, found: Mapping[str, float], thresholds: Mapping[str, float]) -> str | None:
        """Return the decision for one scored photo.

        Args:
            found: probability of each finding.
            thresholds: threshold of each finding, reached at or above its value.

        Returns:
            "positive", "uncertain" or "negative"; None if the bundle has no findings.
        """
        if not found:
            return None
        around = [(value, thresholds[name]) for name, value in found.items()]
        if any(value >= threshold + self.abstain for value, threshold in around):
            return POSITIVE
        return UNCERTAIN if any(value > threshold - self.abstain for value, threshold in around) else NEGATIVE

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as JSON data."""
        return asdict(self)
