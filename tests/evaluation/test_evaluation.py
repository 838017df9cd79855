"""Label mapping of external sets, vessel subgroups and comparisons, and the evaluation page."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from fastfundus.config import TrainConfig
from fastfundus.data import PhotoCache
from fastfundus.errors import ConfigError, DataError
from fastfundus.evaluation.compare import compare_means
from fastfundus.evaluation.evaluation import evaluate_run, write_evaluation
from fastfundus.evaluation.label_map import LabelMap
from fastfundus.evaluation.operating_point import fit_operating_point
from fastfundus.evaluation.segmentation import centreline_dice
from fastfundus.models.guard import Penultimate
from fastfundus.training.predict import predict_logits
from fastfundus.training.run import Run
from fastfundus.training.trainer import Trainer
from tests.cli.test_cli import run
from tests.conftest import Trained

NAN = float("nan")


@pytest.fixture
def manifest() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "dr_grade": [0, 1, 2, None, 4],
            "drusen": [0, 0, 1, 0, None],
            "normal": [1.0, 0.0, 0.0, None, 0.0],
            "site": ["a", "b", "a", None, "c"],
        }
    )


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("abnormal=dr_grade>=2", [0, 0, 1, NAN, 1]),
        ("abnormal=dr_grade>=1|drusen", [0, 1, 1, NAN, 1]),
        ("abnormal = !normal", [0, 1, 1, NAN, 1]),
        ("abnormal=drusen", [0, 0, 1, 0, NAN]),
        ("abnormal=site==a", [1, 0, 1, NAN, 0]),
        ("abnormal=!site==a | drusen", [0, 1, 1, NAN, 1]),
        ("abnormal=dr_grade<1", [1, 0, 0, NAN, 0]),
        ("abnormal=dr_grade!=4", [1, 1, 1, NAN, 0]),
    ],
)
def test_rules(manifest: pl.DataFrame, rule: str, expected: list[float]) -> None:
    targets = LabelMap.parse([rule], ("abnormal",)).targets(manifest, ("abnormal",))
    np.testing.assert_array_equal(targets.truth[:, 0], expected)


def test_outputs_without_a_rule_are_their_columns(manifest: pl.DataFrame) -> None:
    outputs = ("dr", "drusen", "glaucoma")
    truth = LabelMap.parse(["dr=dr_grade>=1"], outputs).targets(manifest, outputs).truth
    np.testing.assert_array_equal(truth[:, 1], [0, 0, 1, 0, NAN])
    assert np.isnan(truth[:, 2]).all()


@pytest.mark.parametrize(
    ("rules", "error", "said"),
    [
        (["abnormal"], ConfigError, "must have the form OUTPUT=COLUMN"),
        (["abnormol=drusen"], ConfigError, "has no output 'abnormol'; did you mean 'abnormal'"),
        (["abnormal=drusen", "abnormal=normal"], ConfigError, "is mapped twice; combine the columns with |"),
        (["abnormal=drusn"], ConfigError, "no column 'drusn'; did you mean 'drusen'"),
        (["abnormal=dr_grade"], DataError, "'dr_grade' holds .*, but without a comparison it may hold only 0 and 1"),
        (["abnormal=site"], DataError, "'site' holds '.', but without a comparison it may"),
        (["abnormal=dr_grade>=mild"], ConfigError, "a numeric column and cannot be compared with 'mild'"),
        (["abnormal=>=2"], ConfigError, "is not a valid term"),
    ],
)
def test_rules_that_cannot_be_followed(
    manifest: pl.DataFrame, rules: list[str], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        LabelMap.parse(rules, ("abnormal",)).targets(manifest, ("abnormal",))


def test_an_external_set_with_other_labels(trained: Trained, cache: PhotoCache, tmp_path: Path) -> None:
    """The grades of the set encode the same label, so the metrics must equal those of the label itself."""
    grades = cache.manifest.with_columns(dr_grade=pl.col("abnormal") * 2).drop("abnormal")
    elsewhere = replace(cache, path=tmp_path / "other", manifest=grades)
    opened = Run.open(trained.run)
    plain, _ = evaluate_run(opened, replace(cache, path=tmp_path / "other"))
    mapped, document = evaluate_run(opened, elsewhere, rules=["abnormal=dr_grade>=1"], against=opened)
    assert mapped.labels == plain.labels
    assert document["map"] == {"abnormal": "dr_grade>=1"}
    assert document["against"]["labels"]["abnormal"]["auroc"]["difference"] == 0
    write_evaluation(opened, mapped, document, tmp_path / "out")
    for name in ("evaluation.html", "model_card.md"):
        assert "abnormal=dr_grade" in (tmp_path / "out" / name).read_text()
    with pytest.raises(DataError, match="no column 'abnormal' or 'normal'"):
        evaluate_run(opened, elsewhere)


def test_the_page_shows_what_the_file_says(trained: Trained, cache: PhotoCache, tmp_path: Path) -> None:
    result = run("evaluate", trained.run, cache.path, "--output", tmp_path, "--by", "eye", "--against", trained.run)
    assert result.exit_code == 0, result.output
    page, document = (tmp_path / "evaluation.html").read_text(), json.loads((tmp_path / "metrics.json").read_text())
    entry = document["labels"]["abnormal"]["auroc"]
    assert f'<td>{entry["value"]:.3f}<br><span class="count">{entry["low"]:.3f} to {entry["high"]:.3f}<' in page
    assert page.count("<svg") == 3
    for said in ("ROC curves", "Calibration curves", "By eye", "Comparison with", document["lock"][:12]):
        assert said in page
    assert 'src="http' not in page
    assert "<link" not in page


def test_centrelines_know_gaps_from_rims() -> None:
    vessel = np.zeros((60, 60), bool)
    vessel[28:33, 5:55] = True
    wide = np.zeros_like(vessel)
    wide[26:35, 5:55] = True
    broken = vessel.copy()
    broken[:, 20:40] = False
    assert centreline_dice(vessel, vessel) == 1
    assert centreline_dice(wide, vessel) == 1, "extra width does not count"
    # 60 % of the centreline is found and every positive call is correct: 2 * 0.6 / 1.6.
    assert centreline_dice(broken, vessel) == pytest.approx(0.75, abs=0.03)
    assert centreline_dice(~vessel & False, vessel) == 0
    assert np.isnan(centreline_dice(~vessel & False, ~vessel & False))


def test_means_are_compared_pairwise() -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.4, 0.9, 60)
    better, patients = hard + 0.02 + rng.normal(0, 0.01, 60), [str(n // 2) for n in range(60)]
    found = compare_means(better, hard, patients)
    assert found.low > 0
    assert found.p == pytest.approx(2 / 2001), "no resample is on the other side of zero: the smallest possible p"
    assert compare_means(hard, hard, patients).p == 1


@pytest.mark.long
def test_vessels_by_group_and_against_another_run(vessel_cache: PhotoCache, tmp_path: Path) -> None:
    runs = []
    for seed in (0, 1):
        settings = {
            "task": "vessels", "model": {"backbone": "test_resnet"},
            "loop": {"epochs": 1, "batch_size": 4, "tile": 96, "tiles": 2, "seed": seed},
            "data": {"split": "holdout", "test_share": 0.5, "val_share": 0.2},
        }  # fmt: skip
        Trainer(vessel_cache, tmp_path / str(seed), TrainConfig.from_dict(settings)).fit()
        runs.append(Run.open(tmp_path / str(seed)))
        fit_operating_point(runs[-1], vessel_cache)
    result = run(
        "evaluate", tmp_path / "0", vessel_cache.path, "--output", tmp_path / "out", "--by", "field_shape",
        "--against", tmp_path / "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out" / "metrics.json").read_text())
    groups = document["subgroups"]["field_shape"]["vessel"]
    assert sum(group["photos"] for group in groups) == document["labels"]["vessel"]["photos"]
    assert all(group["small"] for group in groups)
    tables = [pl.read_parquet(one.path / "predictions.parquet").filter(pl.col("split") == "test") for one in runs]
    difference = document["against"]["labels"]["vessel"]
    for name in ("dice", "cldice", "auroc"):
        by_hand = tables[0][name].mean() - tables[1][name].mean()  # type: ignore[operator]
        assert difference[name]["difference"] == pytest.approx(by_hand)
    assert "clDice" in (tmp_path / "out" / "evaluation.html").read_text()
    assert "vessel, clDice: first minus second" in result.output
    result = run("evaluate", tmp_path / "0", vessel_cache.path, "--output", tmp_path / "out", "--prevalence", "0.1")
    assert result.exit_code == 1
    assert "not to vessel runs" in result.output


@pytest.mark.parametrize("module", ["classification", "explain"])
def test_evaluation_runs_on_the_device_for_it(
    trained: Trained, cache: PhotoCache, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """Nothing can be read back from the meta device, so the error shows that everything was sent there."""
    there = importlib.import_module(f"fastfundus.evaluation.{module}")
    monkeypatch.setattr(there, "inference_device", lambda: torch.device("meta"))
    step: Callable[[], object] = {
        "classification": lambda: evaluate_run(Run.open(trained.run), cache),
        "explain": lambda: there.Explainer(Run.open(trained.run)).probabilities(np.array(cache.photos[:2])),
    }[module]
    with pytest.raises((NotImplementedError, RuntimeError), match=r"meta|unsupported scalarType"):
        step()


def test_the_guard_asks_the_network_where_it_is(trained: Trained) -> None:
    run = Run.open(trained.run)
    assert Penultimate.available(run.load_model().to("meta"), run.spec.size)


def test_float32_means_float32(trained: Trained, cache: PhotoCache) -> None:
    """cuDNN computes convolutions in TF32 unless it is told not to."""
    model = Run.open(trained.run).load_model()
    seen: list[bool] = []
    model.register_forward_hook(lambda *arguments: seen.append(torch.backends.cudnn.allow_tf32))
    assert torch.backends.cudnn.allow_tf32
    predict_logits(model, cache.photos, np.arange(2), cache.spec)
    predict_logits(model, cache.photos, np.arange(2), cache.spec, dtype=torch.bfloat16)
    assert seen == [False, True]
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("name", ["splits.parquet", "predictions.parquet", "operating_point.json"])
@pytest.mark.parametrize("content", [None, b"junk", b'{"schema": 2, "labels": 3}'])
def test_damaged_files_of_a_run_are_errors_in_words(
    trained: Trained, cache: PhotoCache, tmp_path: Path, name: str, content: bytes | None
) -> None:
    folder = Path(shutil.copytree(trained.run, tmp_path / "run"))
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    for command in (
        ("evaluate", folder, cache.path, "--output", tmp_path / "out"),
        ("build-engine", folder, "--output", tmp_path / "bundle"),
    ):
        result = run(*command)
        assert result.exit_code in (0, 1)
        assert isinstance(result.exception, SystemExit | None), result.exception
        if result.exit_code:
            assert name in result.output
    assert result.exit_code == 1, "building an engine reads all three"
