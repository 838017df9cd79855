"""Heatmaps, checked against autograd, Captum, networks with known attention and known lesions; and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl
import pytest
import timm
import torch
from torch import Tensor, nn

from fastfundus.data import PhotoCache
from fastfundus.errors import ConfigError
from fastfundus.evaluation import explain
from fastfundus.evaluation.explain import Explainer, faithfulness
from fastfundus.evaluation.sheets import OUTCOMES, outcome_rows
from fastfundus.models.cam import grad_cam, split
from fastfundus.photo.prepare import prepare_bytes
from fastfundus.spec import PreprocessSpec
from fastfundus.synthetic import draw_photo
from fastfundus.training.run import Run
from tests.cli.test_cli import run
from tests.conftest import Trained

SIZE = 224


def by_autograd(network: Any, features: Tensor, label: int, after: Any) -> Tensor:
    """Grad-CAM by its original definition, for one output and feature maps [N, C, h, w]."""
    features = features.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(after(features)[:, label].sum(), features)
    return torch.relu((gradient.mean((2, 3), keepdim=True) * features).sum(1)).detach()


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_maps_equal_torchs_own_derivatives(name: str) -> None:
    torch.manual_seed(0)
    network: Any = timm.create_model(name, num_classes=3).eval()
    inputs = torch.randn(2, 3, SIZE, SIZE)
    cut = split(network, inputs)
    maps = cut.as_maps(cut.features).contiguous()
    # The inverse: from maps to the input of the head.
    back = (lambda maps: maps.permute(0, 2, 3, 1)) if name.startswith("swin") else (lambda maps: maps)
    heat = grad_cam(cut.features, cut.head, cut.as_maps)
    assert heat.shape[:2] == (2, 3)
    for label in range(3):
        expected = by_autograd(network, maps, label, lambda maps: network.forward_head(back(maps)))
        torch.testing.assert_close(heat[:, label], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer4"), ("convnext_atto", "stages")])
def test_maps_equal_captums(name: str, layer: str) -> None:
    from captum.attr import LayerGradCam

    torch.manual_seed(0)
    network: Any = timm.create_model(name, num_classes=3).eval()
    inputs = torch.randn(2, 3, SIZE, SIZE)
    cut = split(network, inputs)
    heat = grad_cam(cut.features, cut.head, cut.as_maps)
    for label in range(3):
        expected = LayerGradCam(network, getattr(network, layer)).attribute(
            inputs, target=label, relu_attributions=True
        )
        torch.testing.assert_close(heat[:, label], expected[:, 0].detach(), rtol=1e-3, atol=1e-5)


def test_occlusion_equals_captums(trained: Trained, cache: PhotoCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a grid that divides the photo evenly and the same fill colour as ours."""
    from captum.attr import Occlusion

    monkeypatch.setattr(explain, "CELLS", 8)
    explainer = Explainer(Run.open(trained.run), "occlusion")
    photo, cell = np.array(cache.photos[:1]), cache.photos.shape[1] // 8
    covered = np.tile(explain._typical(photo[0]), (1, 64, 64, 1))
    found = Occlusion(explainer._network).attribute(
        explainer._inputs(photo), target=0, sliding_window_shapes=(3, cell, cell), strides=(3, cell, cell),
        baselines=explainer._inputs(covered),
    )  # fmt: skip
    expected = found[0, 0, ::cell, ::cell].clamp(min=0).float()
    ours = torch.from_numpy(explainer.explain(photo).heat[0, 0])
    assert ours.max() > 0
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


def test_tokens_of_a_transformer_make_maps() -> None:
    torch.manual_seed(0)
    network: Any = timm.create_model("vit_tiny_patch16_224", num_classes=2).eval()
    inputs = torch.randn(2, 3, SIZE, SIZE)
    cut = split(network, inputs)
    torch.testing.assert_close(cut.head(cut.features), network(inputs))
    heat = grad_cam(cut.features, cut.head, cut.as_maps)
    assert heat.shape == (2, 2, 14, 14)
    assert heat.max() > 0
    # Tokens are in row-major order of their position in the photo.
    marked = torch.zeros(1, 1 + 196, 192)
    marked[0, 1 + 14 * 3 + 5] = 1
    assert cut.as_maps(marked)[0, 0].nonzero().tolist() == [[3, 5]]


def test_networks_without_maps_are_refused() -> None:
    with pytest.raises(ConfigError, match="explain it by occlusion"):
        split(nn.Flatten(), torch.zeros(1, 3, 8, 8))


class _Yellow(nn.Module):
    """A network with known attention: it responds to yellow on red and nothing else."""

    num_features = 2

    def forward_features(self, inputs: Tensor) -> Tensor:
        """Return how much green exceeds its surroundings, and a second, irrelevant map: [N, 2, 28, 28]."""
        green = nn.functional.avg_pool2d(inputs[:, 1:2], 4)
        green = green - nn.functional.avg_pool2d(green, 9, 1, 4, count_include_pad=False)
        blobs = nn.functional.avg_pool2d(torch.relu(green - 0.05), 2)
        return torch.cat([blobs, inputs.mean() + torch.ones_like(blobs)], dim=1)

    def forward_head(self, features: Tensor) -> Tensor:
        """Return a logit from the mean of the first map."""
        return 2000 * features[:, :1].mean((2, 3)) - 2

    def forward(self, inputs: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(inputs))


@pytest.fixture
def yellow(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> Explainer:
    """An explainer of the network `_Yellow`."""
    opened = Run.open(trained.run)
    monkeypatch.setattr(type(opened), "load_model", lambda self: _Yellow())
    explainer = Explainer(opened)
    explainer._mean, explainer._std = torch.zeros(3), torch.ones(3)
    explainer._temperatures = np.ones(1)
    return explainer


@pytest.fixture(scope="module")
def with_exudates() -> tuple[np.ndarray, np.ndarray]:
    """Six photos with bright lesions and their masks: uint8 [6, 224, 224, 3] and bool [6, 224, 224]."""
    photos, masks = [], []
    for seed in range(6):
        drawn = draw_photo(seed=seed, eye="L", lesions=("exudates",), long_side=640)
        prepared = prepare_bytes(cv2.imencode(".png", drawn.image[..., ::-1])[1].tobytes(), PreprocessSpec(size=SIZE))
        assert prepared.image is not None
        assert prepared.window is not None
        left, top, side = prepared.window
        place = np.array([[side / SIZE, 0, left], [0, side / SIZE, top]], np.float64)
        mask = cv2.warpAffine(
            drawn.lesion_masks["exudates"].astype(np.uint8), place, (SIZE, SIZE), flags=cv2.WARP_INVERSE_MAP
        )
        photos.append(prepared.image)
        masks.append(mask > 0)
    return np.stack(photos), np.stack(masks)


@pytest.mark.parametrize("method", ["gradcam", "occlusion"])
def test_the_gaze_is_found_where_it_is(
    yellow: Explainer, with_exudates: tuple[np.ndarray, np.ndarray], method: str
) -> None:
    photos, masks = with_exudates
    yellow.method = method  # type: ignore[assignment]
    heat = yellow.explain(photos).heat[:, 0]
    # Heatmaps are coarser than lesions: eleven pixels beside a lesion count as a hit.
    near = [cv2.dilate(mask.astype(np.uint8), np.ones((23, 23))) for mask in masks]
    smooth = [cv2.resize(hot, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for hot in heat]
    hits = [zone.flat[hot.argmax()] for hot, zone in zip(smooth, near, strict=True)]
    # The optic disc is as bright as the lesions, and the network does not exclude it.
    assert np.mean(hits) >= 0.5 > 3 * np.mean(near)


def test_true_heatmaps_are_faithful_and_wrong_ones_are_not(
    yellow: Explainer, with_exudates: tuple[np.ndarray, np.ndarray]
) -> None:
    photos, _ = with_exudates
    heat = yellow.explain(photos).heat[:, 0]
    right = faithfulness(yellow, photos, heat, 0)
    assert right.deletion.mean() < right.random_deletion.mean() - 0.02
    assert right.insertion.mean() > right.random_insertion.mean() + 0.02
    wrong = faithfulness(yellow, photos, heat.max() - heat, 0)
    assert wrong.deletion.mean() > right.deletion.mean()
    assert wrong.insertion.mean() < right.insertion.mean()


def test_outcomes_show_the_surest_and_the_worst() -> None:
    probabilities = np.array([0.9, 0.8, 0.7, 0.2, 0.1, 0.95, 0.3, 0.4])
    truth = np.array([1, 1, 0, 1, 0, np.nan, 0, 1.0])
    chosen = outcome_rows(probabilities, truth, 0.5, limit=2)
    assert {name: rows.tolist() for name, rows in chosen.items()} == dict(
        zip(OUTCOMES, [[0, 1], [2], [3, 7], [4, 6]], strict=True)
    )


def test_photos_get_heatmaps_in_their_own_frame(trained: Trained, broken_photos: Path, tmp_path: Path) -> None:
    # Grad-CAM may be zero everywhere for a model that has learned nothing; occlusion is not.
    result = run("explain", trained.run, broken_photos, "--output", tmp_path / "out", "--method", "occlusion")
    assert result.exit_code == 0, result.output
    table = pl.read_csv(tmp_path / "out" / "explain.csv")
    assert len(table) == 10
    row = table.row(by_predicate=pl.col("path") == "good.jpg", named=True)
    picture = cv2.imread(str(tmp_path / "out" / row["heatmap"]))
    whole = cv2.imread(str(broken_photos / "good.jpg"))
    assert picture.shape == whole.shape
    assert 0 <= row["hottest_x_px"] < whole.shape[1]
    # The photo is visible below the heatmap in its original position; flipped or shifted, it would not correlate.
    assert np.corrcoef(picture.mean(axis=2).ravel(), whole.mean(axis=2).ravel())[0, 1] > 0.9
    assert np.corrcoef(picture[:, ::-1].mean(axis=2).ravel(), whole.mean(axis=2).ravel())[0, 1] < 0.9
    changed = np.abs(picture.astype(int) - whole).sum(axis=2)
    assert changed[row["hottest_y_px"], row["hottest_x_px"]] > np.median(changed)
    scored = prepare_bytes((broken_photos / "good.jpg").read_bytes(), trained.bundle.spec).image
    assert scored is not None
    with trained.bundle.load() as engine:
        assert row["p_abnormal"] == pytest.approx(float(engine.infer(scored[None])[0, 0]), abs=1e-3)
    assert table.filter(pl.col("path") == "text.jpg")["status"].item() == "unreadable"
    assert 'alt="heatmap over good.jpg"' in (tmp_path / "out" / "explain.html").read_text()


def test_a_cache_gets_sheets_by_outcome(trained: Trained, cache: PhotoCache, tmp_path: Path) -> None:
    result = run("explain", trained.run, cache.path, "--output", tmp_path, "--max-photos", "3")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "explain.html").read_text()
    for outcome in OUTCOMES:
        assert f"<h2>{outcome}</h2>" in page
    recorded = json.loads((tmp_path / "faithfulness.json").read_text())
    assert set(recorded) in ({"deletion", "insertion", "random_deletion", "random_insertion"}, set())
    refused = run("explain", trained.run, cache.path, "--output", tmp_path, "--label", "abnormall")
    assert "'abnormall' is not an output of the run; did you mean 'abnormal'?" in refused.output
    (tmp_path / "empty").mkdir()
    assert run("explain", trained.run, tmp_path / "empty", "--output", tmp_path / "failed").exit_code == 1
    assert not (tmp_path / "failed").exists()
