"""Checkpoints of other programs: every form gives its tensors, and none runs code."""

from __future__ import annotations

import argparse
import collections
import datetime
import fractions
import functools
import http
import os
import pathlib
import pickle
import random
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from fastfundus.config import ModelConfig
from fastfundus.errors import CheckpointError
from fastfundus.models.classifier import create_model
from fastfundus.models.foreign import read_foreign, without_prefix

SMALL = {"backbone": "test_resnet", "init": "scratch"}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, _ = create_model(ModelConfig(**SMALL), 1000)
    return {name: torch.rand_like(value) if value.is_floating_point() else value for name, value in
            model.state_dict().items()}  # fmt: skip


@pytest.fixture
def third_party() -> Iterator[Any]:
    """A module of some training library, which the reader does not have."""
    module = types.ModuleType("somelib")
    for name in ("CfgNode", "Callback"):
        kind = type(name, (), {"__module__": "somelib"})
        setattr(module, name, kind)
    sys.modules["somelib"] = module
    yield module
    del sys.modules["somelib"]


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def forms(state: dict[str, Tensor], third_party: Any) -> dict[str, Any]:
    arguments = argparse.Namespace(
        model="vit_large_patch16", lr=1e-3, output=pathlib.Path("out"), when=datetime.date.today()
    )
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    return {
        "RETFound": {"model": state, "optimizer": {"state": {}}, "epoch": 49, "scaler": {}, "args": arguments},
        "timm, average first": {
            "arch": "x",
            "state_dict": other,
            "state_dict_ema": state,
            "args": arguments,
            "epoch": 3,
        },
        "Lightning": {
            "state_dict": {**prefixed(state, "model."), "criterion.weight": torch.ones(2)},
            "pytorch-lightning_version": "2.4",
            "hyper_parameters": {"cfg": third_party.CfgNode(), "loss": functools.partial(third_party.Callback, 3)},
            "callbacks": {"x": third_party.Callback()},
        },
        "MONAI": {"net": prefixed(state, "module."), "trainer": {"seed": 3}},
        "torch.compile": prefixed(state, "_orig_mod."),
        "torch.compile in Lightning": {"state_dict": prefixed(state, "model._orig_mod.")},
        "data parallel and compiled": {"model": prefixed(state, "module._orig_mod.")},
        "torchvision": collections.OrderedDict(state),
        "self-supervised": {"state_dict": prefixed(state, "module.encoder_q.")},
        "a set and a counter": {"model": state, "seen": {1, 2}, "counts": collections.Counter("ab")},
    }


FORMS = ["RETFound", "timm, average first", "Lightning", "MONAI", "torch.compile", "torch.compile in Lightning",
         "data parallel and compiled", "torchvision", "self-supervised", "a set and a counter"]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_form_gives_its_tensors(
    tmp_path: Path, state: dict[str, Tensor], third_party: Any, form: str, legacy: bool
) -> None:
    path = tmp_path / "w.pth"
    torch.save(forms(state, third_party)[form], path, _use_new_zipfile_serialization=not legacy)
    model, report = create_model(ModelConfig(backbone="test_resnet", init=str(path)), 1)
    got = model.state_dict()
    assert report.fresh == ("fc.bias", "fc.weight")
    assert all(torch.equal(got[name], value) for name, value in state.items() if not name.startswith("fc."))


def test_a_folder_of_the_hub_is_read(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "model.safetensors")
    tensors, _ = read_foreign(tmp_path)
    assert tensors.keys() == state.keys()


class Settings(dict):  # type: ignore[type-arg]
    """As yacs's CfgNode: a dict of a class of its own, with attributes."""


class Meters(list):  # type: ignore[type-arg]
    pass


SETTINGS = {
    "defaultdict": collections.defaultdict(list, {"loss": [1.0]}),
    "deque": collections.deque([1.0], 5),
    "chain of maps": collections.ChainMap({}),
    "subclass of dict": Settings(lr=0.1),
    "subclass of list": Meters([1.0]),
    "NumPy's numbers": [np.float64(0.5), np.float32(0.5), np.int64(5), np.bool_(True)],
    "NumPy's arrays": [np.arange(3.0), np.array(["a"])],
    "random states": [np.random.default_rng(0).bit_generator.state, random.getstate(), torch.get_rng_state()],
    "ranges": [range(3), slice(1)],
    "an enum of the standard library": http.HTTPStatus.OK,
    "loss": nn.CrossEntropyLoss(),
    "activation": [nn.GELU, functional.relu],
    "compiled pattern": re.compile("a"),
    "fraction": fractions.Fraction(1, 2),
    "optimizer": torch.optim.AdamW([nn.Parameter(torch.zeros(1))]),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_beside_the_weights_are_passed_over(tmp_path: Path, state: dict[str, Tensor], what: str) -> None:
    torch.save({"state_dict": state, "extra": SETTINGS[what]}, tmp_path / "w.pth")
    tensors, description = read_foreign(tmp_path / "w.pth")
    assert description == "a checkpoint with 'state_dict'"
    assert tensors.keys() == state.keys()


def test_weights_in_a_defaultdict_are_read(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(collections.defaultdict(int, state), tmp_path / "w.pth")
    assert read_foreign(tmp_path / "w.pth")[0].keys() == state.keys()


class Runs:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("what", ["os.system", "eval", "Path.touch", "getattr", "exec"])
def test_functions_are_refused_and_never_run(tmp_path: Path, state: dict[str, Tensor], what: str) -> None:
    mark = tmp_path / "it-ran"
    evil = {
        "os.system": Runs(os.system, f"touch {mark}"),
        "eval": Runs(eval, f"open({str(mark)!r}, 'w')"),
        "exec": Runs(exec, f"open({str(mark)!r}, 'w')"),
        "Path.touch": Runs(pathlib.Path.touch, mark),
        "getattr": Runs(getattr, mark, "touch"),
    }[what]
    path = tmp_path / "w.pth"
    for loaded in ({"model": state, "args": evil}, evil):
        torch.save(loaded, path)
        with pytest.raises(CheckpointError, match="could run code"):
            read_foreign(path)
    path.write_bytes(pickle.dumps(evil))
    with pytest.raises(CheckpointError, match="could run code"):
        read_foreign(path)
    assert not mark.exists()


def test_calls_of_foreign_classes_are_not_made(tmp_path: Path, state: dict[str, Tensor], third_party: Any) -> None:
    """The library of a checkpoint may be installed here: not even then is anything of it called."""
    called: list[object] = []

    def construct(*arguments: object) -> object:
        called.append(arguments)
        return object()

    construct.__module__, construct.__qualname__ = "somelib", "construct"
    third_party.construct = construct
    path = tmp_path / "w.pth"
    torch.save({"model": state, "hook": Runs(construct, 1)}, path)
    tensors, _ = read_foreign(path)
    assert tensors.keys() == state.keys()
    assert called == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "web page"),
        (b"\x89HDF\r\n\x1a\n", "Keras file"),
        (b"", "is empty"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_files_are_named(tmp_path: Path, data: bytes, words: str, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        read_foreign(path)


def test_weights_with_nan_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    broken = dict(state)
    name = next(name for name, value in broken.items() if value.is_floating_point())
    broken[name] = torch.full_like(broken[name], float("nan"))
    torch.save(broken, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=f"1 tensors contain NaN or infinity, such as {name}"):
        read_foreign(tmp_path / "w.pth")


class Whole(nn.Module):
    """A network of someone's own code."""


def test_nan_in_safetensors_is_named_and_single_values_may_be_infinite(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    name = next(name for name, value in state.items() if value.is_floating_point())
    save_file({**state, name: torch.full_like(state[name], float("nan"))}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        read_foreign(tmp_path / "w.safetensors")
    torch.save({"model": {**state, "val_metric.best": torch.tensor([-float("inf")])}}, tmp_path / "w.pth")
    assert len(read_foreign(tmp_path / "w.pth")[0]) == len(state) + 1


def test_of_two_networks_the_one_that_is_meant_is_taken() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    for auxiliary, meant in (("aux", "model"), ("student", "teacher"), ("model", "ema_model")):
        for first, second in ((auxiliary, meant), (meant, auxiliary)):
            values = {auxiliary: one, meant: two}
            tensors = {f"{prefix}.a.weight": values[prefix] for prefix in (first, second)}
            assert without_prefix(tensors, ["a.weight"])["a.weight"] is two


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_archives_and_whole_networks_say_what_to_save(tmp_path: Path) -> None:
    traced = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    traced.save(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match=r"state_dict\(\)"):
        read_foreign(tmp_path / "script.pt")
    torch.save(Whole(), tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match=r"whole pickled Whole; save its state_dict\(\)"):
        read_foreign(tmp_path / "whole.pt")


def test_a_prefix_is_removed_only_where_it_helps() -> None:
    one = torch.zeros(1)
    wanted = ["a.weight", "b.weight"]
    assert without_prefix({"a.weight": one, "b.weight": one}, wanted).keys() == {"a.weight", "b.weight"}
    assert without_prefix({"net.a.weight": one, "net.b.weight": one, "head.x": one}, wanted).keys() == set(wanted)
    assert without_prefix({"x": one}, wanted).keys() == {"x"}


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError, match=r"is a folder without best\.safetensors, model\.safetensors"):
        create_model(ModelConfig(backbone="test_resnet", init=str(tmp_path / "run")), 1)
