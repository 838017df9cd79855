"""Targets that each task reads from a manifest, losses compared with other libraries, and activations."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn import functional

from fastfundus.errors import ConfigError, DataError
from fastfundus.models.activation import activate, probabilities
from fastfundus.training.metrics import mean_auroc, validation_scores
from fastfundus.training.tasks.losses import (
    binary_loss,
    class_loss,
    grade_loss,
    known_labels,
    rarity_weight,
    vessel_loss,
)
from fastfundus.training.tasks.targets import finding_outputs, grades, read_auxiliary, read_targets

NAN = np.nan


@pytest.fixture
def table() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "path": list("abcdef"),
            "status": ["ok"] * 6,
            "normal": [1.0, 0.0, None, 1.0, 0.0, 0.0],
            "DME": [0.0, 1.0, 1.0, 0.0, 0.0, 0.0],
            "glaucoma": [0.0, None, 0.0, 1.0, 0.0, None],
            "age": [1.0, 2.0, 3.0, 4.0, 5.0, 6.5],
            "class": ["normal", "AMD", "AMD", None, "DR", "DR"],
            "dr_grade": [0.0, 1.0, 4.0, None, 2.0, 0.0],
        }
    )


def test_abnormality(table: pl.DataFrame) -> None:
    targets = read_targets(table, "abnormality")
    np.testing.assert_array_equal(targets.truth[:, 0], [0.0, 1.0, NAN, 0.0, 1.0, 1.0])
    assert (targets.outputs, targets.summary) == (("abnormal",), "1 - normal")
    np.testing.assert_array_equal(read_targets(table, "abnormality", ("DME",)).truth[:3, 0], [0.0, 1.0, 1.0])
    with pytest.raises(DataError, match="did you mean 'normal'"):
        read_targets(table, "abnormality", ("nromal",))
    with pytest.raises(DataError, match=r"'age' must be 0 or 1, got .* for"):
        read_targets(table, "abnormality", ("age",))
    with pytest.raises(DataError, match="prepared without labels"):
        read_targets(table.select("path"), "abnormality")
    with pytest.raises(ConfigError, match="has 2 columns; abnormality takes one"):
        read_targets(table, "abnormality", ("DME", "glaucoma"))


def test_multilabel(table: pl.DataFrame) -> None:
    targets = read_targets(table, "multilabel", ("DME", "glaucoma"))
    np.testing.assert_array_equal(targets.truth[:, 1], [0.0, NAN, 0.0, 1.0, 0.0, NAN])
    # Glaucoma is the rarer finding; photos without any finding are in stratum 0.
    np.testing.assert_array_equal(targets.strata, [0, 1, 1, 2, 0, 0])
    # In a set without glaucoma labels, glaucoma is unknown, not absent.
    other = read_targets(table.drop("glaucoma"), "multilabel", (), ("DME", "glaucoma"))
    assert np.isnan(other.truth[:, 1]).all()
    with pytest.raises(ConfigError, match=r"columns of 0 and 1 in this cache: normal, DME, glaucoma$"):
        read_targets(table, "multilabel")
    with pytest.raises(DataError, match="did you mean 'glaucoma'"):
        read_targets(table, "multilabel", ("DME", "glaukoma"))


def test_multiclass(table: pl.DataFrame) -> None:
    targets = read_targets(table, "multiclass")
    assert targets.outputs == ("AMD", "DR", "normal")
    np.testing.assert_array_equal(targets.truth.argmax(1)[[0, 1, 2, 4, 5]], [2, 0, 0, 1, 1])
    assert np.isnan(targets.truth[3]).all()
    # The classes of a run apply; photos of any other class in the manifest are unknown.
    np.testing.assert_array_equal(
        read_targets(table, "multiclass", (), ("DR", "AMD")).truth[[0, 1]], [[NAN] * 2, [0, 1]]
    )
    assert read_targets(table, "multiclass", ("dr_grade",)).outputs == ("0", "1", "2", "4")
    with pytest.raises(DataError, match="has 1 classes; multiclass needs 2"):
        read_targets(table[1:3], "multiclass")


def test_ordinal(table: pl.DataFrame) -> None:
    targets = read_targets(table, "ordinal")
    assert targets.outputs == tuple(f"dr_grade_ge{grade}" for grade in (1, 2, 3, 4))
    np.testing.assert_array_equal(targets.truth[4], [1, 1, 0, 0])
    assert np.isnan(targets.truth[3]).all()
    np.testing.assert_array_equal(grades(targets.truth)[[0, 1, 2, 4]], [0, 1, 4, 2])
    with pytest.raises(DataError, match=r"'age' must be a whole number of 0 or more, got 6.5 for f"):
        read_targets(table, "ordinal", ("age",))


def test_findings_exclude_normal() -> None:
    assert finding_outputs(("AMD", "Normal", "DR"), ()) == ("AMD", "DR")
    assert finding_outputs(("a", "b"), ("b",)) == ("b",)
    with pytest.raises(ConfigError, match="did you mean 'dr_grade_ge2'"):
        finding_outputs(("dr_grade_ge1", "dr_grade_ge2"), ("dr_grade_g2",))


def test_the_wrong_cell_of_a_column_of_text_is_named(table: pl.DataFrame) -> None:
    text = table.with_columns(normal=pl.Series(["1", "0", None, "maybe", "0", "1"]))
    with pytest.raises(DataError, match="must be 0 or 1, got 'maybe' for d;"):
        read_targets(text, "abnormality")
    right = table.with_columns(normal=pl.Series(["1", "0", None, "1", "0", "0"]))
    np.testing.assert_array_equal(read_targets(right, "abnormality").truth, read_targets(table, "abnormality").truth)


def test_auxiliary_labels(table: pl.DataFrame) -> None:
    truth, names = read_auxiliary(table, ("glau*", "DME", "[Dn]*ME"), used=("abnormal",))
    assert names == ("glaucoma", "DME")
    np.testing.assert_array_equal(truth, table.select(names).to_numpy())
    assert read_auxiliary(table, ())[0].shape == (6, 0)
    with pytest.raises(DataError, match=r"no label column matches 'glaucom'; did you mean 'glaucoma'"):
        read_auxiliary(table, ("glaucom",))
    with pytest.raises(DataError, match="no label column matches 'DME'"):
        read_auxiliary(table, ("DME",), used=("DME",))
    with pytest.raises(DataError, match=r"label 'age' must be 0 or 1, got 2.0"):
        read_auxiliary(table, ("a*",))


def test_unknown_labels_are_excluded_from_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 3, generator=generator, requires_grad=True)
    truth = (torch.rand(8, 3, generator=generator) < 0.5).float()
    known = torch.rand(8, 3, generator=generator) < 0.6
    masked = torch.where(known, truth, torch.nan)
    per_photo = float(known.sum() / 8)
    loss = binary_loss(logits, masked, known=per_photo)
    want = functional.binary_cross_entropy_with_logits(logits[known], truth[known])
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert (logits.grad[~known] == 0).all()
    # The parts add up to the whole batch although their numbers of known labels differ.
    parts = sum(
        float(binary_loss(logits.detach()[part], masked[part], known=per_photo)) * 4 / 8
        for part in (slice(4), slice(4, 8))
    )
    assert parts == pytest.approx(float(loss.detach()), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_loss_matches_torch(smoothing: float) -> None:
    logits, classes = torch.randn(10, 4, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 4
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    truth = functional.one_hot(classes, 4).float()
    want = functional.cross_entropy(logits, classes, label_smoothing=smoothing)
    torch.testing.assert_close(class_loss(logits, truth, smoothing=smoothing), want)
    # torch divides by the sum of weights in the batch, so that the other photos would affect a photo's weight.
    want = functional.cross_entropy(logits, classes, weight=weight, reduction="sum") / 10
    torch.testing.assert_close(class_loss(logits, truth, weight=weight), want)


def test_grade_loss_is_a_likelihood() -> None:
    """Compare with the negative log-probability that the activation gives to the true grade."""
    generator = torch.Generator().manual_seed(2)
    logits, grade = torch.randn(50, 4, generator=generator), torch.randint(0, 5, (50,), generator=generator)
    truth = (grade[:, None] >= torch.arange(1, 5)).float()
    reached = torch.cat([torch.ones(50, 1), activate(logits, "cumulative"), torch.zeros(50, 1)], dim=1)
    each = (reached[:, :-1] - reached[:, 1:]).gather(1, grade[:, None])
    known = known_labels(truth.numpy().astype(float), "cumulative")
    assert known == pytest.approx(float((grade + 1).clamp(max=4).float().mean()))
    torch.testing.assert_close(grade_loss(logits, truth, known=known) * known, -each.log().mean())


def test_loss_is_linear_in_blended_targets() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))
    one = torch.tensor([[1.0, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    two = one.roll(1, 0)
    for loss, left, right in (
        (binary_loss, one, two),
        (grade_loss, one, two),
        (
            class_loss,
            functional.one_hot(torch.arange(6) % 3, 3).float(),
            functional.one_hot(torch.arange(6) // 2, 3).float(),
        ),
    ):
        blended = loss(logits, 0.7 * left + 0.3 * right)
        torch.testing.assert_close(blended, 0.7 * loss(logits, left) + 0.3 * loss(logits, right))


def test_properties_of_each_activation() -> None:
    logits = np.random.default_rng(0).normal(0, 4, (100, 5))
    steps = probabilities(logits, "cumulative")
    assert (np.diff(steps, axis=1) <= 0).all()
    np.testing.assert_allclose(steps[:, 2], np.prod(1 / (1 + np.exp(-logits[:, :3])), axis=1))
    np.testing.assert_allclose(probabilities(logits, "softmax").sum(axis=1), 1)
    np.testing.assert_allclose(probabilities(logits, "sigmoid"), 1 / (1 + np.exp(-logits)))


def test_rarity_weights_by_hand() -> None:
    truth = np.array([[1, 0], [0, 0], [0, NAN], [0, 0]])
    np.testing.assert_allclose(rarity_weight(truth, "sigmoid"), [3, 1])
    np.testing.assert_allclose(rarity_weight(np.eye(3)[[0, 0, 0, 1]], "softmax"), [4 / 6, 2, 1])
    np.testing.assert_allclose(rarity_weight(np.array([[1, 1], [1, 0], [1, 0], [0, 0]]), "cumulative"), [1 / 3, 2])


def test_vessel_loss_by_hand() -> None:
    truth = torch.tensor([1.0, 0.0, torch.nan, 0.0]).reshape(1, 1, 2, 2)
    logits = torch.tensor([0.0, 0.0, 50.0, 0.0]).reshape(1, 1, 2, 2).requires_grad_()
    assert float(vessel_loss(logits.detach(), truth, dice=0.0)) == pytest.approx(np.log(2))
    # Soft Dice: an overlap of 2 * 0.5, divided by 3 * 0.25 + 1.
    loss = vessel_loss(logits, truth, dice=1.0)
    assert float(loss.detach()) == pytest.approx(1 - 1 / 1.75)
    loss.backward()
    assert logits.grad[0, 0, 1, 0] == 0


def test_scores() -> None:
    truth = np.array([[1.0, NAN], [0, 1], [1, NAN], [0, 1]])
    predicted = np.array([[0.9, 0.5], [0.1, 0.2], [0.4, 0.1], [0.6, 0.3]])
    # The known labels of the second output are all of one class, so it is omitted.
    assert mean_auroc(predicted, truth) == 0.75
    assert np.isnan(mean_auroc(predicted[:, 1:], truth[:, 1:]))
    reached = np.array([[1.0, 1], [0, 0], [1, 0]])
    assert validation_scores("ordinal", reached * 0.8, reached)["qwk"] == 1.0
    assert np.isnan(validation_scores("ordinal", np.zeros((3, 2)), np.zeros((3, 2)))["qwk"])
    assert validation_scores("multiclass", np.eye(3), np.eye(3)[[0, 1, 1]])["accuracy"] == pytest.approx(2 / 3)
