"""The report rendered in a real browser, offline."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2

from fastfundus.data import list_photos
from fastfundus.screening.policy import ScreenPolicy
from fastfundus.screening.run import screen_to_folder
from tests.browser import open_browser
from tests.conftest import Trained


def test_report_renders_without_network_requests(
    trained: Trained, photo_folder: Path, broken_photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photo_folder / "images", folder / "clinic")
    shutil.copytree(broken_photos, folder / "broken")
    shutil.copy(broken_photos / "good.jpg", folder / '<img src=x onerror="document.title=1">.jpg')
    policy = ScreenPolicy(abstain=0.02)
    run = screen_to_folder(list_photos(folder), trained.bundle, tmp_path / "out", sources=[folder], policy=policy)
    with open_browser(tmp_path / "profile") as page:
        page.open(run.report.as_uri())
        assert page.run("document.title") == f"Screening report: {folder}"
        assert page.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        heatmaps = page.run("[...document.images].filter(image => image.alt.startsWith('heatmap over')).length")
        assert heatmaps == min(60, int(run.results["decision"].is_in(["positive", "uncertain"]).sum())) > 0
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth"), "no horizontal scrolling"
        assert page.run("document.querySelectorAll('script').length") == 0
        picture = cv2.imread(str(page.picture(tmp_path / "report.png")))
        assert picture.shape[0] > 1400
        assert picture.std() > 10  # something is drawn
        assert page.requests == [run.report.as_uri()]
        assert page.complaints == []
