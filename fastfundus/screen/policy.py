"""What a programme decides from probabilities: for a photo, an eye, a patient. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastfundus.errors import ConfigError

__all__ = ["DECISIONS", "NEGATIVE", "NOT_SCREENED", "POSITIVE", "RETAKE", "UNCERTAIN", "ScreenPolicy"]

POSITIVE, UNCERTAIN, RETAKE, NOT_SCREENED, NEGATIVE = "positive", "uncertain", "retake", "not screened", "negative"
DECISIONS = (NEGATIVE, NOT_SCREENED, RETAKE, UNCERTAIN, POSITIVE)
"""From best to worst: of several eyes, a patient has the worst."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreenPolicy:
    """The rules of a programme. Thresholds are the bundle's, and are locked there.

    Raises:
        ConfigError: a value is out of its range.
    """

    abstain: float = 0.0
    """Photos whose probability lies closer than this to the threshold of a finding, and above none clearly, are
    `uncertain`: somebody reads them. 0 to 0.5; 0 decides every photo."""
    least_images: int = 1
    """Scored photos that an eye needs before it can be negative."""
    unusable: Literal["block", "ignore"] = "block"
    """"block": an eye with a photo that is ungradable, or could not be screened, is never negative. "ignore": such
    photos do not count, as long as enough others do."""
    both_eyes: bool = False
    """A patient without a photo of the left or of the right eye is never negative."""

    def __post_init__(self) -> None:
        if not 0 <= self.abstain <= 0.5:
            raise ConfigError(f"abstain {self.abstain} is a distance of probabilities: 0 to 0.5")
        if self.least_images < 1:
            raise ConfigError(f"least_images {self.least_images}: an eye needs one photo at least")
        if self.unusable not in ("block", "ignore"):
            raise ConfigError(f"unusable {self.unusable!r}: block or ignore")

    def decide(self, found: Mapping[str, float], thresholds: Mapping[str, float]) -> str | None:
        """Decide about one scored photo.

        Args:
            found: probability by finding.
            thresholds: reached at or above, by finding.

        Returns:
            "positive", "uncertain" or "negative"; None for a bundle without findings.
        """
        if not found:
            return None
        around = [(value, thresholds[name]) for name, value in found.items()]
        if any(value >= threshold + self.abstain for value, threshold in around):
            return POSITIVE
        return UNCERTAIN if any(value > threshold - self.abstain for value, threshold in around) else NEGATIVE

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)
