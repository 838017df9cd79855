"""Spec, config and errors: accepted values and messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastfundus.config import TrainConfig, override, to_toml
from fastfundus.errors import ConfigError, DataError, MissingDependency, SpecMismatch, close_matches, require
from fastfundus.spec import PreprocessSpec, fingerprint_of


def test_fingerprint_is_of_the_meaning_not_of_the_spelling() -> None:
    spec = PreprocessSpec()
    assert PreprocessSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert PreprocessSpec(mean=[0.485, 0.456, 0.406]).fingerprint == spec.fingerprint  # type: ignore[arg-type]
    others = [{"size": 224}, {"margin": 0.03}, {"field": "frame"}, {"mask_outside": False}, {"std": (1.0, 1.0, 1.0)}]
    assert len({spec.fingerprint, *(PreprocessSpec(**other).fingerprint for other in others)}) == 6
    # Existing caches, runs and bundles contain this value: it may only change together with spec.version.
    assert spec.fingerprint == "82dfd902f4ecf2f44b36fb3eeaf5cb80241bde67f8c504ea33daee3595e739e5"


def test_fingerprint_of_is_sha256_of_canonical_json() -> None:
    assert fingerprint_of({"b": 1, "a": [1.5, "x"]}) == fingerprint_of({"a": [1.5, "x"], "b": 1})
    assert fingerprint_of({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint_of(float("nan"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 16}, "spec.size must be 32 to 4096 pixels, got 16"),
        ({"margin": 0.9}, "spec.margin must be 0 to 0.5"),
        ({"field": "square"}, "spec.field must be 'circle' or 'frame', got 'square'"),
        ({"std": (1.0, 0.0, 1.0)}, "spec.std must be positive"),
        ({"mean": (1.0,)}, "spec.mean needs three numbers"),
        ({"version": 1}, "supports only version 2; prepare the photos and train again"),
        ({"version": 3}, "supports only version 2; upgrade FastFundus"),
        ({"filter": "lanczos"}, "spec.filter must be 'area'"),
        ({"marign": 0.1}, "spec.marign is not a setting; did you mean 'margin'"),
    ],
)
def test_bad_specs(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreprocessSpec.from_dict(settings)


def test_a_mismatch_lists_what_differs() -> None:
    with pytest.raises(SpecMismatch, match=r"the cache a and the run b .*\(size 512 / 224, margin 0.02 / 0.1\)"):
        PreprocessSpec().require_same(PreprocessSpec(size=224, margin=0.1), mine="the cache a", theirs="the run b")


def test_config_round_trip(tmp_path: Path) -> None:
    config = TrainConfig.from_dict(
        {"model": {"init": 'a "b" \\ c'}, "data": {"labels": ["é", "b"]}, "loop": {"amp": False, "epochs": 3}}
    )
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config.to_dict()))
    assert TrainConfig.from_toml(path) == config
    assert TrainConfig.from_toml(path, {"loop.epochs": 7, "model.init": None}).loop.epochs == 7


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"lop": {}}, "lop is not a setting; did you mean 'loop'"),
        ({"loop": {"epoch": 3}}, "loop.epoch is not a setting; did you mean 'epochs'"),
        ({"loop": {"epochs": "3"}}, "loop.epochs must be int, got '3'"),
        ({"loop": {"epochs": 0}}, "loop.epochs must be 1 to 100000, got 0"),
        ({"loop": {"amp": 1}}, 'loop.amp must be true, false or "auto", got 1'),
        ({"loop": {"compile": "maybe"}}, "loop.compile must be 'auto' or 'on' or 'graphs' or 'off', got 'maybe'"),
        ({"loop": 3}, "loop must be a table of settings, got 3"),
        ({"data": {"folds": 3, "fold": 3}}, "data.fold must be 0 to 2, got 3"),
        ({"task": "grading"}, "task must be 'abnormality' or .* or 'ordinal' or 'vessels', got 'grading'"),
        ({"data": {"labels": "a"}}, "data.labels must be a list of names, got 'a'"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate must be"),
    ],
)
def test_bad_configs(plain: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(plain)


def test_whole_numbers_pass_for_reals() -> None:
    assert TrainConfig.from_dict({"optimizer": {"warmup_epochs": 2}}).optimizer.warmup_epochs == 2.0


def test_files_that_are_no_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        TrainConfig.from_toml(tmp_path / "gone.toml")
    (tmp_path / "bad.toml").write_text("[loop\n")
    with pytest.raises(ConfigError, match="is not TOML"):
        TrainConfig.from_toml(tmp_path / "bad.toml")


def test_override_leaves_its_input_alone() -> None:
    plain = {"loop": {"epochs": 1}}
    assert override(plain, {"loop.epochs": 2, "model.init": "x"}) == {"loop": {"epochs": 2}, "model": {"init": "x"}}
    assert plain == {"loop": {"epochs": 1}}


def test_errors_name_the_place_and_the_cure() -> None:
    assert str(DataError("is wrong", path="a.csv", row=3)) == "a.csv, line 3: is wrong"
    with pytest.raises(
        MissingDependency, match=r"no_such_package is not installed; run: pip install 'fastfundus\[dali\]'"
    ):
        require("no_such_package", extra="dali")
    assert require("json", extra="train") is json
    assert close_matches("zzz", ["b", "a"]) == "; allowed: a, b"
