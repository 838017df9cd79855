"""The results table, with one row per input, and the eye and patient tables derived from it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl

from fastfundus.engines.bundle import Bundle
from fastfundus.files import hash_file
from fastfundus.records import Status, identity
from fastfundus.screening.pipeline import ScreenedPhoto
from fastfundus.screening.policy import DECISIONS, NEGATIVE, NOT_SCREENED, POSITIVE, RETAKE, UNCERTAIN, ScreenPolicy

__all__ = ["eye_table", "hash_masks", "makes_maps", "patient_table", "result_row", "results_schema", "results_table"]

_RANK = {decision: rank for rank, decision in enumerate(DECISIONS)}
_NAMES = dict(enumerate(DECISIONS))


def makes_maps(bundle: Bundle) -> bool:
    """Return whether a bundle produces maps, such as vessel maps, instead of decisions."""
    return bool(bundle.metadata["output"] == "maps")


def results_schema(bundle: Bundle) -> dict[str, Any]:
    """Return the columns of the results and their types."""
    if makes_maps(bundle):
        scores: dict[str, Any] = {f"mask_{label}": pl.String for label in bundle.labels}
        scores |= {f"share_{label}": pl.Float64 for label in bundle.labels}
    else:
        scores = {f"p_{label}": pl.Float64 for label in bundle.labels}
    return {
        "path": pl.String,
        "sha256": pl.String,
        "status": pl.String,
        "reason": pl.String,
        "patient": pl.String,
        "eye": pl.String,
        "camera": pl.String,
        "quality": pl.Float64,
        **scores,
        "decision": pl.String,
        "bundle": pl.String,
    }


def result_row(photo: ScreenedPhoto, bundle: Bundle, masks: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return one row of the results.

    Args:
        photo: the result of one photo.
        bundle: the bundle it was screened with.
        masks: mask columns from `masks.write_masks`, for bundles that produce maps.
    """
    patient, _, eye = identity(photo.source, photo.prepared.facts)
    row: dict[str, Any] = dict.fromkeys(results_schema(bundle))
    row |= {
        "path": photo.source.name,
        "sha256": photo.prepared.sha256 or None,
        "status": photo.status.value,
        "reason": photo.reason or None,
        "patient": patient,
        "eye": eye,
        "camera": photo.source.camera or photo.prepared.facts.camera,
        "quality": photo.prepared.quality,
        "decision": photo.decision,
        "bundle": bundle.fingerprint,
    }
    if photo.answer is not None and not makes_maps(bundle):
        row |= {f"p_{label}": float(value) for label, value in zip(bundle.labels, photo.answer, strict=True)}
    return row | (masks or {})


def hash_masks(output: Path) -> str:
    """Return the SHA-256 of the names and contents of all masks in a results folder, as 64 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(path for path in (output / "masks").rglob("*") if not path.is_dir()):
        digest.update(os.fsencode(path.relative_to(output)) + b"\0" + hash_file(path).encode())
    return digest.hexdigest()


def results_table(rows: Iterable[dict[str, Any]], bundle: Bundle) -> pl.DataFrame:
    """Return rows as a table with fixed column types."""
    return pl.DataFrame(list(rows), schema=results_schema(bundle), orient="row")


def eye_table(results: pl.DataFrame, policy: ScreenPolicy) -> pl.DataFrame:
    """Aggregate photos to eyes, in the order of their first photo. Photos of an unknown eye form an eye of their own.

    Columns: patient, eye, photos, scored, quality (of the best photo), the highest of each probability, decision, why.
    """
    probabilities = [name for name in results.columns if name.startswith("p_")]

    def count(decision: str) -> pl.Expr:
        return (pl.col("decision") == decision).sum()

    eyes = results.group_by("patient", "eye", maintain_order=True).agg(
        photos=pl.len(),
        scored=(pl.col("status") == Status.OK.value).sum(),
        retake=count(RETAKE),
        positive=count(POSITIVE),
        uncertain=count(UNCERTAIN),
        undecided=((pl.col("status") == Status.OK.value) & pl.col("decision").is_null()).sum(),
        quality=pl.col("quality").max(),
        **{f"highest_{name}": pl.col(name).max() for name in probabilities},
    )
    scored, photos, retake = pl.col("scored"), pl.col("photos"), pl.col("retake")
    enough = scored >= policy.least_images
    lacking = pl.format("{} of the {} required photos", scored, pl.lit(policy.least_images))
    blocks = policy.unusable == "block"
    rules: list[tuple[pl.Expr, str | None, pl.Expr | None]] = [
        # For bundles that produce maps or have no findings.
        (pl.col("undecided") > 0, None, None),
        (pl.col("positive") > 0, POSITIVE, None),
        (pl.col("uncertain") > 0, UNCERTAIN, pl.lit("a probability is close to its threshold")),
        (pl.lit(blocks) & (retake > 0), RETAKE, pl.format("{} ungradable", retake)),
        (pl.lit(blocks) & (scored < photos), NOT_SCREENED, pl.format("{} could not be screened", photos - scored)),
        (enough, NEGATIVE, None),
        (scored + retake > 0, RETAKE, lacking),
        (pl.lit(True), NOT_SCREENED, pl.lit("no photo could be screened")),
    ]
    decision, why = pl.lit(None, pl.String), pl.lit(None, pl.String)
    for condition, name, reason in reversed(rules):
        decision = pl.when(condition).then(pl.lit(name, pl.String)).otherwise(decision)
        why = pl.when(condition).then(pl.lit(None, pl.String) if reason is None else reason).otherwise(why)
    return eyes.with_columns(decision=decision, why=why).drop("positive", "uncertain", "retake", "undecided")


def patient_table(eyes: pl.DataFrame, policy: ScreenPolicy) -> pl.DataFrame:
    """Aggregate eyes to patients. A patient gets the decision of their worst eye; every patient has a row.

    Columns: patient, photos, scored, eyes, the highest of each probability, decision, why.
    """
    highest = [name for name in eyes.columns if name.startswith("highest_")]
    rank = pl.col("decision").replace_strict(_RANK, return_dtype=pl.Int8)
    patients = (
        eyes.with_columns(rank=rank)
        .group_by("patient", maintain_order=True)
        .agg(
            photos=pl.col("photos").sum(),
            scored=pl.col("scored").sum(),
            eyes=pl.col("eye").drop_nulls().unique().sort().str.join("+"),
            **{name: pl.col(name).max() for name in highest},
            why=pl.col("why").get(pl.col("rank").arg_max()),
            decision=pl.col("rank").max().replace_strict(_NAMES, return_dtype=pl.String),
        )
    )
    if policy.both_eyes:
        # Photos of an unknown eye may show either eye, so they do not prove that both were photographed.
        missing = (
            pl.when(pl.col("eyes") == "L").then(pl.lit("no photo of the right eye"))
            .when(pl.col("eyes") == "R").then(pl.lit("no photo of the left eye"))
            .when(pl.col("eyes") == "").then(pl.lit("the eye is not known for any photo"))
        )  # fmt: skip
        torn = (pl.col("decision") == NEGATIVE) & missing.is_not_null()
        patients = patients.with_columns(
            decision=pl.when(torn).then(pl.lit(RETAKE)).otherwise(pl.col("decision")),
            why=pl.when(torn).then(missing).otherwise(pl.col("why")),
        )
    return patients.select("patient", "photos", "scored", "eyes", *highest, "decision", "why")
