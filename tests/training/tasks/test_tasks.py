"""Each task end to end: training, model selection, operating point, evaluation and files; and joined caches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from fastfundus.config import ModelConfig, OptimizerConfig, TrainConfig
from fastfundus.data import PhotoCache, build_cache, list_photos
from fastfundus.data.joined_cache import open_caches
from fastfundus.data.masks import native_map, native_masks
from fastfundus.errors import CheckpointError, ConfigError, DataError
from fastfundus.evaluation.folds import pool_folds
from fastfundus.evaluation.operating_point import fit_operating_point, measure
from fastfundus.evaluation.page import write_run_page
from fastfundus.evaluation.segmentation import centreline_dice
from fastfundus.models.classifier import create_model
from fastfundus.models.segmenter import create_segmenter
from fastfundus.photo.prepare import prepare_photo
from fastfundus.screening.run import screen_to_folder
from fastfundus.training.optimizer import build_optimizer
from fastfundus.training.run import Run
from fastfundus.training.tasks.segmentation import SegmentationTask, binned, binned_auroc, masks_in_cache
from fastfundus.training.trainer import Interrupted, Trainer
from fastfundus.workflow.build_engine import build_engine
from tests.tolerances import ENGINE_FP32
from tests.training.test_trainer import StopAt

LESIONS = ("drusen", "haemorrhages", "exudates")


def labelled(cache: PhotoCache) -> PhotoCache:
    """Return the synthetic photos with a class, a grade, and a finding with missing labels."""
    lesions = cache.manifest.select(LESIONS).to_numpy()
    count = lesions.sum(axis=1)
    unknown = np.where(np.arange(len(count)) % 5 == 0, np.nan, lesions[:, 0])
    columns = {
        "class": pl.Series(np.where(count == 0, "normal", np.array(LESIONS)[lesions.argmax(axis=1)])),
        "dr_grade": pl.Series(count.astype(float)),
        "drusen": pl.Series(unknown, nan_to_null=True),
    }
    return replace(cache, manifest=cache.manifest.with_columns(**columns))


def config(task: str, **sections: dict[str, object]) -> TrainConfig:
    plain: dict[str, dict[str, object]] = {
        "model": {"backbone": "test_resnet"},
        "data": {"folds": 3},
        "optimizer": {"learning_rate": 1e-2},
        "loop": {"epochs": 2, "batch_size": 8},
    }
    for name, values in sections.items():
        plain[name] = {**plain.get(name, {}), **values}
    return TrainConfig.from_dict({"task": task, **plain})


@pytest.mark.parametrize(
    ("task", "labels", "outputs", "score"),
    [
        ("multilabel", LESIONS, LESIONS, "auroc"),
        pytest.param("multiclass", (), (*sorted(LESIONS), "normal"), "auroc", marks=pytest.mark.long),
        pytest.param("ordinal", (), ("dr_grade_ge1", "dr_grade_ge2", "dr_grade_ge3"), "qwk", marks=pytest.mark.long),
    ],
)
def test_task_end_to_end(
    cache: PhotoCache, tmp_path: Path, task: str, labels: tuple[str, ...], outputs: tuple[str, ...], score: str
) -> None:
    photos = labelled(cache)
    wanted = photos.manifest["dr_grade"].max()
    outputs = outputs[: int(wanted)] if task == "ordinal" else outputs  # type: ignore[arg-type]
    settings = config(
        task, data={"labels": list(labels)}, loss={"positive_weight": 0, "mixup": 0.3}, loop={"sampler": "balanced"}
    )
    Trainer(photos, tmp_path / "run", settings).fit()
    run = Run.open(tmp_path / "run")
    assert set(run.labels) == set(outputs)
    assert run.score[0] == score
    assert f"val_{score}" in pl.read_csv(run.path / "metrics.csv").columns
    document = fit_operating_point(run, photos)
    assert json.loads((run.path / "operating_point.json").read_text()) == document
    points = document["labels"]
    assert {name for name, point in points.items() if not point["finding"]} == ({"normal"} & set(outputs))
    if task != "multilabel":
        # The outputs form one distribution, so they share one temperature.
        assert len({point["temperature"] for point in points.values()}) == 1
    assert set(document["overall"]["test"]) == {"multilabel": {"auroc"}, "multiclass": {"auroc", "accuracy"}}.get(
        task, {"auroc", "qwk"}
    )
    table = pl.read_parquet(run.path / "predictions.parquet")
    splits = pl.read_parquet(run.path / "splits.parquet")
    assert sorted(table["path"]) == sorted(splits.filter(pl.col("split") != "train")["path"])
    probabilities = table.select(f"p_{name}" for name in run.labels).to_numpy()
    if task == "multiclass":
        np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    if task == "ordinal":
        assert (np.diff(probabilities, axis=1) <= 0).all()
    if task == "multilabel":
        assert 0 < table["label_drusen"].null_count() < len(table)
        assert points["drusen"]["test"]["photos"] < points["exudates"]["test"]["photos"]
    measured = measure(run, photos)
    assert measured.labels == {name: point["test"] for name, point in points.items()}
    write_run_page(run, photos)
    page = (run.path / "run.html").read_text()
    test = table.filter(pl.col("split") == "test")
    wrong = pl.any_horizontal(
        (pl.col(f"p_{name}") >= points[name]["threshold"]) != (pl.col(f"label_{name}") == 1) for name in run.labels
    )
    assert page.count("<figure>") == min(12, len(test.filter(wrong)))
    assert all(name in page for name in run.labels)
    # The engine gives the same probabilities, and its bundle lists the findings.
    bundle, parity = build_engine(run, tmp_path / "bundle", cache=cache.path, precision="fp32")
    assert parity.passed
    assert set(bundle.findings) == set(outputs) - {"normal"}
    rows = {path: row for row, path in enumerate(cache.manifest["path"])}
    engine = bundle.load()
    got = engine.infer(np.stack([cache.photos[rows[path]] for path in table["path"]]))
    engine.close()
    np.testing.assert_allclose(got, probabilities, atol=1e-3)  # the gate of fp32


def test_sets_with_different_labels_train_together(cache: PhotoCache, tmp_path: Path, photo_folder: Path) -> None:
    """Both sets have labels of haemorrhages and exudates, but only the first has labels of drusen."""
    second = tmp_path / "second"
    listing = list_photos(photo_folder, labels=photo_folder / "labels.csv")
    others = [
        replace(photo, columns={k: v for k, v in photo.columns.items() if k != "drusen"}) for photo in listing.photos
    ]
    build_cache(others[:20], second, cache.spec, source=listing.root)
    both = open_caches(cache.path, second)
    assert len(both.manifest) == len(both.photos) == len(cache.manifest) + 20
    assert both.paths == (cache.path, second)
    np.testing.assert_array_equal(both.photos[len(cache.manifest) + 3], PhotoCache.open(second).photos[3])
    np.testing.assert_array_equal(both.photos[[0, len(cache.manifest)]][0], cache.photos[0])
    assert both.manifest["drusen"].null_count() == 20
    assert both.manifest["path"][len(cache.manifest)].startswith("second/")
    Trainer(both, tmp_path / "run", config("multilabel", data={"labels": list(LESIONS)}, loop={"epochs": 1})).fit()
    run = Run.open(tmp_path / "run")
    assert run.caches == (cache.path, second)
    splits = pl.read_parquet(run.path / "splits.parquet")
    # The second set repeats photos of the first, so each is assigned to the same split in both.
    assert splits.group_by("sha256").agg(pl.col("split").n_unique())["split"].max() == 1
    fit_operating_point(run, both)
    assert measure(run, both).which == "test patients"
    with pytest.raises(DataError, match="is given twice"):
        open_caches(cache.path, cache.path)
    wrong = tmp_path / "wrong"
    text = [replace(photo, columns={"exudates": "yes"}) for photo in listing.photos]
    build_cache(text[:2], wrong, cache.spec, source=listing.root)
    with pytest.raises(DataError, match="column 'exudates' is String here but Float64 elsewhere; rename one"):
        open_caches(cache.path, wrong)


@pytest.mark.parametrize("task", ["abnormality", "ordinal"])
def test_auxiliary_labels_serve_training_only(cache: PhotoCache, tmp_path: Path, task: str) -> None:
    photos = labelled(cache)
    settings = config(task, data={"auxiliary": list(LESIONS[1:])}, loss={"mixup": 0.3}, optimizer={"ema_decay": 0.0})
    trainer = Trainer(photos, tmp_path / "run", settings)
    own = len(trainer.task.outputs)
    loss = trainer.task.loss(torch.device("cpu"))
    logits, truth = torch.randn(8, own + 2), torch.zeros(8, own + 2)
    truth[0, -1] = np.nan
    plain = Trainer(photos, tmp_path / "plain", config(task)).task.loss(torch.device("cpu"))
    auxiliary = torch.nn.functional.softplus(logits[:, own:])[truth[:, own:].isfinite()].sum() / (8 * 2)
    torch.testing.assert_close(loss(logits, truth), plain(logits[:, :own], truth[:, :own]) + 0.3 * auxiliary)
    head = trainer.model.get_classifier().weight.detach().clone()
    trainer.fit()
    learned = trainer.model.get_classifier().weight.detach()
    assert (learned != head).any(dim=1).all()
    run = Run.open(tmp_path / "run")
    assert run.labels == trainer.task.outputs
    best = run.load_model().get_classifier()
    assert best.weight.shape[0] == own
    # The next run starts from it as from any other.
    Trainer(photos, tmp_path / "next", config(task, model={"init": str(tmp_path / "run")}))


def test_auxiliary_labels_resume_bit_for_bit(cache: PhotoCache, tmp_path: Path) -> None:
    photos = labelled(cache)
    settings = config("abnormality", data={"auxiliary": ["drusen"]})
    Trainer(photos, tmp_path / "whole", settings).fit()
    with pytest.raises(Interrupted):
        Trainer(photos, tmp_path / "parts", settings, observer=StopAt(1, 2)).fit()
    Trainer(photos, tmp_path / "parts", settings, resume=True).fit()
    one, two = (Run.open(tmp_path / name).load_model().state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_linear_probe_trains_only_the_head(cache: PhotoCache, tmp_path: Path) -> None:
    Trainer(cache, tmp_path / "up", config("abnormality", loop={"epochs": 1})).fit()
    probe = config(
        "abnormality",
        model={"init": str(tmp_path / "up"), "freeze": True},
        optimizer={"learning_rate": 0.1},
        loop={"seed": 5},
    )
    Trainer(cache, tmp_path / "probe", probe).fit()
    before, after = (Run.open(tmp_path / name).load_model().state_dict() for name in ("up", "probe"))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_early_layers_learn_slower() -> None:
    model, _ = create_model(ModelConfig(backbone="resnet18"), 1)
    groups = build_optimizer(model, OptimizerConfig(learning_rate=1e-3, layer_decay=0.5)).param_groups
    scale = {id(value): group["lr_scale"] for group in groups for value in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    assert scale[id(model.fc.weight)] == 1
    assert (
        scale[id(model.conv1.weight)]
        < scale[id(model.layer1[0].conv1.weight)]
        < scale[id(model.layer4[0].conv1.weight)]
        < 1
    )
    decays = {id(value): group["weight_decay"] for group in groups for value in group["params"]}
    assert decays[id(model.bn1.weight)] == 0 < decays[id(model.fc.weight)]


def vessels(**sections: dict[str, object]) -> TrainConfig:
    quick = {
        "loop": {"epochs": 12, "batch_size": 4, "tile": 96, "tiles": 4},
        "optimizer": {"learning_rate": 3e-3, "warmup_epochs": 0.5},
    }
    for name, values in sections.items():
        quick[name] = {**quick.get(name, {}), **values}
    shares = {"data": {"split": "holdout", "test_share": 0.25, "val_share": 0.15}}
    return config("vessels", **(shares | quick))


@pytest.mark.long
def test_vessels_end_to_end(vessel_cache: PhotoCache, tmp_path: Path) -> None:
    built_task = SegmentationTask(vessel_cache, vessels(), lambda text: None)
    # Images and masks are aligned: vessel pixels are darker than their surroundings.
    built_task.load(torch.device("cpu"), 0)
    (inputs, truth) = next(built_task.batches([np.arange(8)], 0, torch.device("cpu")))
    assert inputs.shape == (8, 3, 96, 96)
    assert truth.shape == (8, 1, 96, 96)
    green = inputs[:, 1:2]
    assert float(green[truth == 1].mean()) < float(green[truth == 0].mean()) - 0.1

    Trainer(vessel_cache, tmp_path / "run", vessels()).fit()
    run = Run.open(tmp_path / "run")
    assert run.score[0] == "auroc"
    document = fit_operating_point(run, vessel_cache)
    point = document["labels"]["vessel"]
    # After a few seconds of training, the score only has to be far from chance.
    assert point["test"]["auroc"]["value"] > 0.85
    # Compare with scikit-learn on the pixels.
    from sklearn.metrics import f1_score, roc_auc_score

    from fastfundus.training.tasks.segmentation import vessel_maps

    table = pl.read_parquet(run.path / "predictions.parquet").filter(pl.col("split") == "test")
    path, dice, auroc = table.row(0, named=True)["path"], table["dice"][0], table["auroc"][0]
    row = vessel_cache.manifest["path"].to_list().index(path)
    (probabilities,) = vessel_maps(run.load_model(), vessel_cache.photos, np.array([row]), vessel_cache.spec)
    known = vessel_cache.manifest.row(row, named=True)
    native = native_map(probabilities, known)
    yes, inside = native_masks(vessel_cache, row, "mask_vessels")
    assert native.shape == yes.shape == (known["height_px"], known["width_px"])
    assert roc_auc_score(yes[inside], native[inside]) == pytest.approx(auroc, abs=1e-4)
    assert f1_score(yes[inside], native[inside] >= point["threshold"]) == pytest.approx(dice, abs=1e-3)
    assert measure(run, vessel_cache).labels["vessel"] == point["test"]
    at = native >= point["threshold"]
    assert centreline_dice(at & inside, yes & inside) == pytest.approx(table["cldice"][0], abs=1e-3)
    write_run_page(run, vessel_cache)
    assert "Lowest Dice" in (run.path / "run.html").read_text()
    # Initialised from another vessel run, every tensor is loaded, not only the encoder.
    again, report = create_segmenter(ModelConfig(backbone="test_resnet", init=str(run.path)), 1)
    assert (report.loaded, report.fresh) == (len(again.state_dict()), ())

    # The engine gives the maps of the evaluation; 216 is not a multiple of the network's stride.
    bundle, report = build_engine(run, tmp_path / "bundle", precision="fp32")
    assert report.passed
    assert report.auroc_loss == pytest.approx(0, abs=1e-6)
    assert report.decisions == report.photos * 216**2
    with bundle.load() as engine:
        mapped = engine.infer(np.ascontiguousarray(vessel_cache.photos[row : row + 1]))
    assert mapped.shape == (1, 1, 216, 216)
    np.testing.assert_allclose(mapped[0, 0], probabilities, atol=ENGINE_FP32)

    # The masks of screening are in the camera's frame and agree with the engine's map.
    photos = list_photos(vessel_cache.path.parent / "training")
    screened = screen_to_folder(photos, bundle, tmp_path / "results", sources=[photos.root])
    row = screened.results.filter(pl.col("status") == "ok").row(0, named=True)
    mask = cv2.imread(str(tmp_path / "results" / row["mask_vessel"]), cv2.IMREAD_GRAYSCALE)
    prepared = prepare_photo(photos.root / row["path"], bundle.spec)
    assert prepared.image is not None
    assert mask.shape == (prepared.height_px, prepared.width_px)
    with bundle.load() as engine:
        seen = engine.infer(prepared.image[None])[0, 0] >= bundle.threshold_of("vessel")
    assert row["share_vessel"] == pytest.approx(seen.mean())
    assert set(np.unique(mask)) <= {0, 255}
    left, top, side = prepared.window or (0, 0, 0)
    y, x = np.nonzero(seen)
    # Where four adjacent map pixels are vessel, the frame pixel between them is, too.
    inside = [
        mask[int(top + (row + 1) * side / 216), int(left + (column + 1) * side / 216)]
        for row, column in zip(y.tolist(), x.tolist(), strict=True)
        if row < 215
        and column < 215
        and seen[row : row + 2, column : column + 2].all()
        and 0 <= top + (row + 1) * side / 216 < mask.shape[0]
        and 0 <= left + (column + 1) * side / 216 < mask.shape[1]
    ]
    assert inside
    assert min(inside) == 255
    assert f"map over {row['path']}" in screened.report.read_text()


def test_maps_are_placed_in_the_camera_frame() -> None:
    """Check by hand a 60 px window at (20, -10) of a 100 x 80 frame, with a 30 px map: each map pixel covers 2 x 2."""
    known = {"window_side_px": 60, "window_x_px": 20, "window_y_px": -10, "width_px": 100, "height_px": 80}
    values = np.zeros((30, 30), np.float32)
    values[10, 5] = 1.0  # covers columns 30 and 31, rows 10 and 11 of the frame
    native = native_map(values, known)
    assert native.shape == (80, 100)
    y, x = np.mgrid[:80, :100] + 0.5
    assert (native * x).sum() / native.sum() == pytest.approx(31)
    assert (native * y).sum() / native.sum() == pytest.approx(11)
    assert native[10:12, 30:32].min() == native.max()
    values[:] = 1.0
    assert native_map(values, known)[60:].max() == 0


def test_masks_survive_the_cache_round_trip(vessel_cache: PhotoCache) -> None:
    masks = masks_in_cache(vessel_cache, np.arange(3), "mask_vessels")
    for row, mask in enumerate(masks):
        known = vessel_cache.manifest.row(row, named=True)
        # The window differs from the frame and from the cache's size, so the map has to be resampled and moved.
        assert known["window_side_px"] != vessel_cache.spec.size
        back = native_map((mask[..., 0] > 127).astype(np.float32), known) >= 0.5
        vessels, field = native_masks(vessel_cache, row, "mask_vessels")
        # Resampling changes the outer pixels of thin vessels.
        assert 2 * (back & vessels & field).sum() / ((back & field).sum() + (vessels & field).sum()) > 0.9


@pytest.mark.long
def test_vessels_resume_bit_for_bit(vessel_cache: PhotoCache, tmp_path: Path) -> None:
    settings = vessels(loop={"epochs": 2, "tiles": 3})
    Trainer(vessel_cache, tmp_path / "whole", settings).fit()
    with pytest.raises(Interrupted):
        Trainer(vessel_cache, tmp_path / "parts", settings, observer=StopAt(2, 1)).fit()
    Trainer(vessel_cache, tmp_path / "parts", settings, resume=True).fit()
    whole, parts = (torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("whole", "parts"))
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())
    assert whole["state"]["history"][1]["val_dice"] == parts["state"]["history"][1]["val_dice"]


def test_vessel_folds_are_pooled(vessel_cache: PhotoCache, tmp_path: Path) -> None:
    free = replace(vessel_cache, manifest=vessel_cache.manifest.with_columns(split=pl.lit(None, pl.String)))
    runs = []
    for fold in range(3):
        settings = vessels(data={"split": "folds", "folds": 3, "fold": fold}, loop={"epochs": 1, "tiles": 1})
        Trainer(free, tmp_path / f"fold{fold}", settings).fit()
        runs.append(Run.open(tmp_path / f"fold{fold}"))
        fit_operating_point(runs[-1], free)
    pooled = pool_folds(tmp_path, runs, free)
    assert pooled["out_of_fold"]["labels"]["vessel"]["photos"] == 9
    table = pl.read_parquet(tmp_path / "out_of_fold.parquet")
    assert pooled["out_of_fold"]["labels"]["vessel"]["dice"]["value"] == pytest.approx(table["dice"].mean())


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext"])
def test_encoder_loads_every_tensor(backbone: str, tmp_path: Path) -> None:
    classifier, _ = create_model(ModelConfig(backbone=backbone), 1)
    torch.save(classifier.state_dict(), tmp_path / "w.pth")
    torch.manual_seed(1)
    model, report = create_segmenter(ModelConfig(backbone=backbone, init=str(tmp_path / "w.pth")), 1)
    names = [name for name in model.state_dict() if name.startswith("encoder.")]
    assert report.loaded == len(names)
    assert {name.split(".")[0] for name in report.unused} == {"fc" if backbone == "test_resnet" else "head"}
    ours = {(*tuple(value.shape), float(value.double().sum())) for value in classifier.state_dict().values()}
    assert all((*tuple(v.shape), float(v.double().sum())) in ours for k, v in model.state_dict().items() if k in names)
    with pytest.raises(CheckpointError, match="missing or differ in shape"):
        create_segmenter(ModelConfig(backbone="resnet34", init=str(tmp_path / "w.pth")), 1)


def test_vessel_errors(vessel_cache: PhotoCache, cache: PhotoCache, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'mask_vessels' with mask paths"):
        Trainer(cache, tmp_path / "run", vessels()).fit()
    with pytest.raises(ConfigError, match=r"loop.tile is 256, but the photos are 216 pixels"):
        Trainer(vessel_cache, tmp_path / "run", vessels(loop={"tile": 256})).fit()
    with pytest.raises(ConfigError, match=r"loss.mixup is 0.2, but does not apply to vessels; set it to 0"):
        Trainer(vessel_cache, tmp_path / "run", vessels(loss={"mixup": 0.2})).fit()
    with pytest.raises(ConfigError, match=r"loop.tile must be a multiple of 32, got 100"):
        vessels(loop={"tile": 100})
    with pytest.raises(ConfigError, match="cannot be used as a U-Net encoder"):
        create_segmenter(ModelConfig(backbone="mixer_b16_224"), 1)
    broken = replace(
        vessel_cache,
        manifest=vessel_cache.manifest.with_columns(mask_vessels=pl.lit("training/images/21_training.tif")),
    )
    bad = vessel_cache.source / "small.png"
    Image.new("L", (8, 8)).save(bad)
    broken = replace(vessel_cache, manifest=vessel_cache.manifest.with_columns(mask_vessels=pl.lit("small.png")))
    with pytest.raises(DataError, match=r"small.png: is 8x8 pixels, but its photo is 220x\d+; sizes must match"):
        Trainer(broken, tmp_path / "run", vessels()).fit()
    assert not (tmp_path / "run").exists()


def test_binned_auroc_is_exact() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    truth = rng.random(5000) < 0.1
    probabilities = np.round(rng.beta(1 + truth, 2), 3)
    assert binned_auroc(binned(probabilities, truth)) == pytest.approx(roc_auc_score(truth, probabilities), abs=1e-6)
    assert np.isnan(binned_auroc(binned(probabilities, np.zeros(5000, bool))))
