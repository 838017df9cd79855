"""Screening: one row per input of any kind, in order, and a self-contained report."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fastfundus.data import list_photos
from fastfundus.errors import ConfigError
from fastfundus.photo import prepare_photo
from fastfundus.screening import gallery
from fastfundus.screening.pipeline import Timing, screen_photos
from fastfundus.screening.run import ScreeningRun, screen_to_folder
from tests.conftest import Trained


def screen(trained: Trained, folder: Path, output: Path, **options: object) -> ScreeningRun:
    listing = list_photos(folder)
    return screen_to_folder(listing, trained.bundle, output, sources=[folder], **options)  # type: ignore[arg-type]


def test_every_broken_input_has_its_row(trained: Trained, broken_photos: Path, tmp_path: Path) -> None:
    (broken_photos / "name_left.csv").write_text("file\ngood.jpg\n")
    run = screen(trained, broken_photos, tmp_path / "out")
    rows = {row["path"]: row for row in run.results.iter_rows(named=True)}
    assert len(rows) == len(run.results) == 10
    assert {name: row["status"] for name, row in rows.items() if row["status"] != "unsupported"} == {
        "black.png": "ungradable",
        "deep.png": "ok",
        "good.jpg": "ok",
        "text.jpg": "unreadable",
        "truncated.jpg": "unreadable",
        "zero.jpg": "unreadable",
    }
    for row in rows.values():
        scored = row["status"] == "ok"
        assert (row["p_abnormal"] is not None) == scored
        assert bool(row["reason"]) != scored
        assert row["bundle"] == trained.bundle.fingerprint
        expected = {"ok": {"positive", "negative"}, "ungradable": {"retake"}}.get(row["status"], {None})
        assert row["decision"] in expected
    # The same pixels in 8 and 16 bits differ only by JPEG decoding.
    assert rows["good.jpg"]["p_abnormal"] == pytest.approx(rows["deep.png"]["p_abnormal"], abs=0.02)


def test_files_agree_with_each_other(trained: Trained, broken_photos: Path, tmp_path: Path) -> None:
    run = screen(trained, broken_photos, tmp_path / "out")
    parquet = pl.read_parquet(tmp_path / "out" / "results.parquet")
    assert parquet.equals(run.results)
    csv = pl.read_csv(tmp_path / "out" / "results.csv", schema=parquet.schema)
    assert csv.select(pl.exclude("p_abnormal", "quality")).equals(parquet.select(pl.exclude("p_abnormal", "quality")))
    np.testing.assert_allclose(csv["p_abnormal"].drop_nulls(), parquet["p_abnormal"].drop_nulls(), rtol=1e-12)
    events = [json.loads(line) for line in (tmp_path / "out" / "audit.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", *["photo"] * 10, "end"]
    assert events[0]["thresholds"] == {"abnormal": trained.bundle.thresholds[0]}
    assert events[0]["bundle"] == trained.bundle.fingerprint
    assert [event["path"] for event in events[1:-1]] == parquet["path"].to_list()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.csv",
        "results.parquet",
        "eyes.csv",
        "patients.csv",
        "report.html",
        "audit.jsonl",
        "run.json",
    }


def test_batched_rows_equal_single_photos_in_order(trained: Trained, photo_folder: Path) -> None:
    listing = list_photos(photo_folder)
    engine = trained.bundle.load()
    rows = list(screen_photos(listing.photos, trained.bundle, Timing(), batch_size=7))
    assert [row.source for row in rows] == listing.photos
    for row in rows[:9]:
        prepared = prepare_photo(row.source.path, trained.bundle.spec)
        assert prepared.image is not None
        alone = engine.infer(prepared.image[None])[0, 0]
        assert row.answer == pytest.approx(float(alone), abs=1e-6)
        assert row.decision == ("positive" if alone >= trained.bundle.thresholds[0] else "negative")
    engine.close()


def test_patients_get_their_worst_decision(trained: Trained, photo_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(photo_folder / "images", folder)
    (folder / "p00000_left.jpg").write_bytes(b"")
    for eye in ("left", "right"):
        (folder / f"p00001_{eye}.jpg").write_bytes(b"")
    run = screen(trained, folder, tmp_path / "out")
    patients = {row["patient"]: row for row in pl.read_csv(tmp_path / "out" / "patients.csv").iter_rows(named=True)}
    assert len(patients) == 24
    assert patients["p00001"]["decision"] == "not screened"
    assert patients["p00001"]["scored"] == 0
    other_eye = run.results.filter(pl.col("path") == "p00000_right.jpg")["decision"].item()
    assert patients["p00000"]["decision"] == ("positive" if other_eye == "positive" else "not screened")
    for name, row in list(patients.items())[2:]:
        decisions = run.results.filter(pl.col("patient") == name)["decision"].to_list()
        assert row["decision"] == ("positive" if "positive" in decisions else "negative")
        assert row["eyes"] == "L+R"


def test_results_are_not_overwritten_by_default(trained: Trained, broken_photos: Path, tmp_path: Path) -> None:
    screen(trained, broken_photos, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"already contains results.csv; add --overwrite"):
        screen(trained, broken_photos, tmp_path / "out")
    (broken_photos / "zero.jpg").unlink()
    assert len(screen(trained, broken_photos, tmp_path / "out", overwrite=True).results) == 9
    assert len(pl.read_csv(tmp_path / "out" / "results.csv")) == 9


class _Links(HTMLParser):
    """Collects every resource that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data", "action", "srcset")]


def test_the_report_is_self_contained_and_escapes_names(trained: Trained, broken_photos: Path, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>&.jpg"
    shutil.copy(broken_photos / "good.jpg", broken_photos / name)
    run = screen(trained, broken_photos, tmp_path / "out")
    html = run.report.read_text()
    links = _Links()
    links.feed(html)
    assert links.fetched
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links.fetched)
    assert "script" not in links.tags
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", html)
    assert "onerror" in html  # the name is shown ...
    assert "<img src=x" not in html  # ... as text
    for path in run.results["path"]:
        assert path.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in html
    assert "For research use only" in html


def test_the_report_shows_a_bounded_number_worst_first(
    trained: Trained, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "MAX_SHOWN", 5)
    run = screen(trained, photo_folder, tmp_path / "out")
    html = run.report.read_text()
    shown = re.findall(r'alt="retina of (images/[^"]+)"', html)
    ranked = run.results.drop_nulls("p_abnormal").sort("p_abnormal", descending=True, maintain_order=True)
    assert shown[:5] == ranked["path"].to_list()[:5]
    assert f"The 5 highest of {len(ranked)} scores" in html


def test_report_without_scored_photos(trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "zero.jpg").write_bytes(b"")
    run = screen(trained, folder, tmp_path / "out")
    assert run.results["status"].to_list() == ["unreadable"]
    assert "No photo could be scored" in run.report.read_text()


def test_timing_counts_everything(trained: Trained, photo_folder: Path) -> None:
    timing = Timing()
    listing = list_photos(photo_folder)
    assert len(list(screen_photos(listing.photos, trained.bundle, timing))) == timing.photos == 48
    assert timing.wall > 0
    assert 0 < timing.engine <= timing.wall
    assert timing.decode > 0
