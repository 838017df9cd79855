"""Tests that torch-free heatmaps match Grad-CAM computed with torch's autograd."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray

from fastfundus.data import PhotoCache
from fastfundus.engines.export import ScreeningModel
from fastfundus.engines.heatmap import Heatmapper
from fastfundus.engines.heatmap_export import export_heatmap
from fastfundus.errors import BundleError
from fastfundus.spec import PreprocessSpec
from fastfundus.training.run import Run
from tests.conftest import Trained


def by_autograd(model: ScreeningModel, photo: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return Grad-CAM heatmaps computed as in the original paper, with torch's backward pass."""
    network = model.network
    features = network.forward_features(model.normalise(torch.from_numpy(photo[None]))).detach().requires_grad_(True)
    logits = network.forward_head(features)[0]
    heat = []
    for logit in logits:
        (gradient,) = torch.autograd.grad(logit, features, retain_graph=True)
        heat.append(torch.relu((gradient.mean((2, 3), keepdim=True) * features).sum(1))[0])
    return torch.stack(heat).detach().numpy()


def test_a_bundle_looks_where_its_model_looks(trained: Trained, cache: PhotoCache) -> None:
    run = Run.open(trained.run)
    model = ScreeningModel(run.load_model(), run.spec, [1.0]).eval()
    mapper = Heatmapper(trained.bundle)
    for photo in np.array(cache.photos[:6]):
        expected = by_autograd(model, photo)
        # Float32 sums are accumulated in a different order.
        np.testing.assert_allclose(mapper.heat(photo), expected, atol=1e-4 * max(1.0, expected.max()), rtol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet"])
def test_heads_with_norms_and_several_labels(name: str, tmp_path: object) -> None:
    from pathlib import Path
    from types import SimpleNamespace

    from fastfundus.engines.export import export_onnx

    folder = Path(str(tmp_path))
    torch.manual_seed(0)
    model = ScreeningModel(timm.create_model(name, num_classes=3).eval(), PreprocessSpec(size=96), [1.0] * 3).eval()
    export_onnx(model, folder / "model.onnx", ["a", "b", "c"])
    metadata = export_heatmap(model, folder)
    bundle = SimpleNamespace(
        path=folder,
        folder=folder,
        spec=PreprocessSpec(size=96),
        precision="fp32",
        metadata={"files": {metadata["file"]: ""}},
    )
    photo = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    expected = by_autograd(model, photo)
    got = Heatmapper(bundle).heat(photo)  # type: ignore[arg-type]
    assert expected.shape == (3, 3, 3)
    np.testing.assert_allclose(got, expected, atol=1e-3 * expected.max())


def test_networks_of_tokens_have_none_and_say_so(trained: Trained, tmp_path: object) -> None:
    from pathlib import Path
    from types import SimpleNamespace

    network = timm.create_model("vit_tiny_patch16_224", num_classes=1, img_size=32).eval()
    metadata = export_heatmap(ScreeningModel(network, PreprocessSpec(size=32), [1.0]).eval(), Path(str(tmp_path)))
    assert metadata["file"] is None
    bundle = SimpleNamespace(path="b", metadata={"files": {}, "heatmap": metadata})
    with pytest.raises(BundleError, match=r"has no heatmaps \(the network has no final feature maps"):
        Heatmapper(bundle)  # type: ignore[arg-type]
