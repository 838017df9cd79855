"""Folders that name splits and classes, in the layouts that people use."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastfundus.data import list_photos
from fastfundus.data.classes import is_normal_class, read_folders


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize("wrap", ["", "dataset/", "a/b/"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_splits_and_classes(tmp_path: Path, wrap: str, val: str) -> None:
    names = [f"{wrap}{split}/{label}/{split}{n}.jpg" for split in ("train", val, "test") for label, n in
             (("Normal", 1), ("DR", 2))]  # fmt: skip
    photos = {photo.name: photo for photo in list_photos(touch(tmp_path, *names)).photos}
    assert {name: (photo.split, photo.columns["class"]) for name, photo in photos.items()} == {
        name: ({"train": "train", "test": "test"}.get(name[len(wrap) :].split("/")[0], "val"), name.split("/")[-2])
        for name in names
    }
    assert photos[names[0]].columns["abnormal"] == 0.0
    assert photos[names[1]].columns["abnormal"] == 1.0


def test_classes_outside_and_splits_inside(tmp_path: Path) -> None:
    photos = list_photos(touch(tmp_path, "normal/train/1.jpg", "dr/train/2.jpg", "normal/test/3.jpg", "dr/test/4.jpg"))
    assert [(photo.split, photo.columns["class"]) for photo in photos.photos] == [
        ("test", "dr"),
        ("train", "dr"),
        ("test", "normal"),
        ("train", "normal"),
    ]


def test_classes_of_grades_have_a_class_without_a_word_for_normal(tmp_path: Path) -> None:
    names = ("train/a_mild/1.jpg", "train/b_severe/2.jpg", "test/a_mild/3.jpg", "test/b_severe/4.jpg")
    listing = list_photos(touch(tmp_path, *names))
    assert [photo.columns for photo in listing.photos][:2] == [{"class": "a_mild"}, {"class": "b_severe"}]
    assert any("there is no label 'abnormal'" in note for note in listing.notes)


def test_folders_that_are_neither_stay_folders(tmp_path: Path) -> None:
    listing = list_photos(touch(tmp_path, "monday/1.jpg", "tuesday/2.jpg"))
    assert [photo.columns for photo in listing.photos] == [{}, {}]
    one_split = list_photos(touch(tmp_path / "x", "train/1.jpg", "train/2.jpg"))
    assert [photo.split for photo in one_split.photos] == [None, None]


def test_notes_name_the_interpretation_and_the_flag_for_the_other(tmp_path: Path) -> None:
    names = ("train/Normal/1.jpg", "train/Suspect/2.jpg", "test/normal/3.jpg", "test/Ungradable/4.jpg")
    listing = list_photos(touch(tmp_path, *names))
    text = "\n".join(listing.notes)
    assert "sub-folders interpreted as splits: test, train; use --adapter folder" in text
    assert "classes that differ only by case are one class" in text
    assert "Suspect, Ungradable count as abnormal, as all classes but" in text
    plain = list_photos(tmp_path, adapter="folder").photos[0]
    assert (plain.split, plain.columns) == (None, {})


def test_a_patient_of_two_splits_is_taken_out_unless_numbers_restart(tmp_path: Path) -> None:
    torn = list_photos(touch(tmp_path / "a", "train/1_left.jpg", "test/1_right.jpg", "test/2_left.jpg"))
    assert {photo.name: photo.split for photo in torn.photos} == {
        "train/1_left.jpg": "excluded",
        "test/1_right.jpg": "excluded",
        "test/2_left.jpg": "test",
    }
    restarts = list_photos(touch(tmp_path / "b", "train/1_left.jpg", "test/1_left.jpg", "test/1_right.jpg"))
    assert {photo.name: (photo.split, photo.patient) for photo in restarts.photos} == {
        "train/1_left.jpg": ("train", "train/1"),
        "test/1_left.jpg": ("test", "test/1"),
        "test/1_right.jpg": ("test", "test/1"),
    }


@pytest.mark.parametrize("name", ["normal", "0_normal", "No DR", "no-dr", "NoDR", "0", "Healthy", "a_Normal", "Non_DR"])
def test_names_of_normal(name: str) -> None:
    assert is_normal_class(name)


@pytest.mark.parametrize("name", ["abnormal", "anormal", "not normal", "1", "dr", "n", "normal_tension_glaucoma"])
def test_names_of_other_classes(name: str) -> None:
    assert not is_normal_class(name)


def test_a_few_other_photos_do_not_change_a_layout(tmp_path: Path) -> None:
    names = [f"{split}/{label}/{n}.jpg" for split in ("train", "test") for label in ("normal", "dr") for n in range(6)]
    listing = list_photos(touch(tmp_path, *names, "overview.png", "masks/1.png"))
    photos = {photo.name: photo for photo in listing.photos}
    assert (photos["train/dr/3.jpg"].split, photos["train/dr/3.jpg"].columns["class"]) == ("train", "dr")
    assert (photos["overview.png"].split, photos["overview.png"].columns) == (None, {"class": None})
    assert any("2 photos are in no such folder" in note for note in listing.notes)


@pytest.mark.parametrize(
    ("train", "test"),
    [("Training_Set", "Test_Set"), ("train_images", "test_images"), ("a. Training Set", "b. Testing Set")],
)
def test_folders_of_splits_by_the_names_that_sets_have(tmp_path: Path, train: str, test: str) -> None:
    listing = list_photos(touch(tmp_path, f"{train}/1.jpg", f"{test}/2.jpg"))
    assert {photo.split for photo in listing.photos} == {"train", "test"}


def test_no_photos_no_layout() -> None:
    assert read_folders({}).classes == {}


def test_classes_above_folders_of_people() -> None:
    names = {name: name for name in ("normal/P2/OS.jpg", "dr/P2/OD.jpg", "dr/P3/OD.jpg")}
    layout = read_folders(names)
    assert layout.classes == {"normal/P2/OS.jpg": "normal", "dr/P2/OD.jpg": "dr", "dr/P3/OD.jpg": "dr"}
    assert set(layout.used.values()) == {1}


def test_a_split_beside_an_unknown_folder_is_noted() -> None:
    names = {name: name for name in ("train/normal/1.jpg", "train/dr/2.jpg", "external/normal/3.jpg")}
    layout = read_folders(names)
    assert (layout.splits, layout.classes) == ({}, {})
    assert any("'train' looks like a split, but 'external' does not" in note for note in layout.notes)


def test_folders_that_may_be_classes_are_noted() -> None:
    names = {name: name for name in (f"{folder}/{n}.jpg" for folder in ("RG", "NRG") for n in range(3))}
    layout = read_folders(names)
    assert layout.classes == {}
    assert any("the folders NRG, RG may be classes: --adapter classes" in note for note in layout.notes)
    people = {name: name for name in (f"P00{folder}/{n}.jpg" for folder in (1, 2) for n in range(3))}
    assert read_folders(people).notes == ()
