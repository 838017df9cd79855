"""Decisions for photos, eyes and patients, checked by hand."""

from __future__ import annotations

import polars as pl
import pytest

from fastfundus.errors import ConfigError
from fastfundus.screening.policy import ScreenPolicy
from fastfundus.screening.results import eye_table, patient_table


@pytest.mark.parametrize(
    ("found", "abstain", "decision"),
    [
        ({"dr": 0.5}, 0.0, "positive"),  # reached at or above
        ({"dr": 0.4999}, 0.0, "negative"),
        ({"dr": 0.55}, 0.1, "uncertain"),
        ({"dr": 0.45}, 0.1, "uncertain"),
        ({"dr": 0.6}, 0.1, "positive"),
        ({"dr": 0.4}, 0.1, "negative"),
        ({"dr": 0.1, "glaucoma": 0.9}, 0.05, "positive"),
        ({"dr": 0.52, "glaucoma": 0.9}, 0.05, "positive"),  # one clear finding is enough
        ({"dr": 0.52, "glaucoma": 0.1}, 0.05, "uncertain"),
        ({}, 0.0, None),
    ],
)
def test_photos(found: dict[str, float], abstain: float, decision: str | None) -> None:
    thresholds = {"dr": 0.5, "glaucoma": 0.7}
    assert ScreenPolicy(abstain=abstain).decide(found, thresholds) == decision


def table(*photos: tuple[str, str | None, str, str | None]) -> pl.DataFrame:
    """Return a results table of photos given as (patient, eye, status, decision)."""
    rows = [(f"{number}.jpg", *photo, 0.5, 0.25) for number, photo in enumerate(photos)]
    return pl.DataFrame(
        rows, schema={"path": pl.String, "patient": pl.String, "eye": pl.String, "status": pl.String,
                      "decision": pl.String, "quality": pl.Float64, "p_dr": pl.Float64}, orient="row",
    )  # fmt: skip


GOOD, BAD, POOR, LOST = ("ok", "negative"), ("ok", "positive"), ("ungradable", "retake"), ("unreadable", None)
UNSURE, MAPPED = ("ok", "uncertain"), ("ok", None)


@pytest.mark.parametrize(
    ("photos", "policy", "eye", "why"),
    [
        ([GOOD, GOOD], {}, "negative", None),
        ([GOOD, BAD], {}, "positive", None),
        ([BAD, POOR], {}, "positive", None),
        ([GOOD, UNSURE], {}, "uncertain", "a probability is close to its threshold"),
        ([GOOD, POOR], {}, "retake", "1 ungradable"),
        ([GOOD, POOR], {"unusable": "ignore"}, "negative", None),
        ([GOOD, LOST], {}, "not screened", "1 could not be screened"),
        ([GOOD, LOST], {"unusable": "ignore"}, "negative", None),
        ([GOOD], {"least_images": 2}, "retake", "1 of the 2 required photos"),
        ([GOOD, POOR], {"least_images": 2, "unusable": "ignore"}, "retake", "1 of the 2 required photos"),
        ([BAD], {"least_images": 2}, "positive", None),
        ([LOST], {}, "not screened", "1 could not be screened"),
        ([LOST], {"unusable": "ignore"}, "not screened", "no photo could be screened"),
        ([POOR], {"unusable": "ignore"}, "retake", "0 of the 1 required photos"),
        ([MAPPED, MAPPED], {}, None, None),
        ([MAPPED, POOR], {}, None, None),
    ],
)
def test_eyes(
    photos: list[tuple[str, str | None]], policy: dict[str, object], eye: str | None, why: str | None
) -> None:
    rolled = eye_table(table(*[("a", "L", *photo) for photo in photos]), ScreenPolicy(**policy))  # type: ignore[arg-type]
    assert rolled.select("decision", "why", "photos").row(0) == (eye, why, len(photos))
    assert patient_table(rolled, ScreenPolicy()).select("decision", "why").row(0) == (eye, why)


def test_patients_have_their_worse_eye_and_its_reason() -> None:
    photos = table(("b", "L", *GOOD), ("a", "L", *GOOD), ("a", "R", *POOR), ("b", "R", *BAD), ("c", None, *GOOD))
    plain = patient_table(eye_table(photos, ScreenPolicy()), ScreenPolicy())
    assert plain.select("patient", "eyes", "decision", "why").rows() == [
        ("b", "L+R", "positive", None),
        ("a", "L+R", "retake", "1 ungradable"),
        ("c", "", "negative", None),
    ]
    strict = ScreenPolicy(both_eyes=True)
    rows = patient_table(eye_table(photos, strict), strict).select("patient", "decision", "why").rows()
    assert rows[2] == ("c", "retake", "the eye is not known for any photo")
    one = table(("a", "L", *GOOD), ("a", None, *GOOD))
    assert patient_table(eye_table(one, strict), strict)["why"].item() == "no photo of the right eye"


@pytest.mark.parametrize("wrong", [{"abstain": -0.1}, {"abstain": 0.6}, {"least_images": 0}, {"unusable": "drop"}])
def test_policies_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(wrong)))):
        ScreenPolicy(**wrong)  # type: ignore[arg-type]
