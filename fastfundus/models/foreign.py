"""Reader for third-party weights: safetensors, state dicts and whole pickled networks; never runs code from them."""

from __future__ import annotations

import collections
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from fastfundus.errors import CheckpointError

__all__ = ["network_prefix", "read_foreign", "refuse_deeper_network", "resample_positions", "without_prefix"]

_NESTED = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model", "teacher", "net",
    "network", "module", "weights", "params",
)  # fmt: skip
"""Keys under which training programs store the weights, in the order in which they are tried: averages first."""
_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of data parallelism and torch.compile, at any place of a name."""
_NETWORKS = ("ema", "teacher", "model", "backbone", "encoder", "net", "student")
"""Words in prefixes of networks, in the order in which they are preferred."""
_IN_FOLDERS = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
"""Names of weights in the folder of a run, or of a model of the Hugging Face hub."""
_DEEPEST = 16
_INERT_MODULES = (
    nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Linear, nn.Sequential,
    nn.Dropout, nn.Identity, nn.Flatten, nn.parallel.DataParallel,
)  # fmt: skip
_MAX_PLACEHOLDERS = 64
_PLAIN_DATA = frozenset(
    {
        "argparse.Namespace", "types.SimpleNamespace", "types.MappingProxyType", "functools.partial", "re._compile",
        "http.HTTPStatus", "logging.Logger", "logging.getLogger", "random.Random", "builtins.set", "builtins.frozenset",
        "builtins.slice", "builtins.complex", "builtins.bytearray", "builtins.range", "builtins.object",
        "builtins.list", "builtins.dict", "builtins.int", "builtins.float", "builtins.str", "builtins.bool",
        "builtins.tuple",
    }
)  # fmt: skip
"""Names of the standard library in which training programs store their arguments."""
_PLAIN_MODULES = frozenset({"collections", "datetime", "decimal", "enum", "fractions", "itertools", "pathlib", "uuid"})
_WITHOUT_WEIGHTS = ("torch.nn.modules.loss.", "torch.nn.modules.activation.", "torch.nn.functional.")
"""Parts of torch that are settings of a training program, not a network."""
_FILLED = re.compile(r"Can only (SETITEMS?|append) .*?but got <class '[\w.]*?(\w+)'>", re.DOTALL)
"""The error of the unpickler about a class that it is asked to fill."""
_UNSUPPORTED_GLOBAL = re.compile(r"Unsupported (?:global|class|operand)[^:]*: (?:GLOBAL )?([\w.]+)|GLOBAL ([\w.]+)")


class _Placeholder:
    """Stands in for an object of a checkpoint that is not a tensor: takes everything and does nothing."""

    def __new__(cls, *arguments: object, **options: object) -> _Placeholder:
        return object.__new__(cls)

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _EmptyDict:
    """Stands in for a subclass of dict: the unpickler fills plain ones only."""

    def __new__(cls, *arguments: object, **options: object) -> collections.OrderedDict[Any, Any]:  # type: ignore[misc]
        return collections.OrderedDict()


class _EmptyList:
    """Stands in for a subclass of list."""

    def __new__(cls, *arguments: object, **options: object) -> list[Any]:  # type: ignore[misc]
        return []


_CONTAINERS = ((_EmptyDict, "collections.defaultdict"), (_EmptyList, "collections.deque"))


def read_foreign(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read every tensor of a file with weights, without running code from it.

    Pickles are read with torch's restricted unpickler. Plain data, tensors and whole pickled ResNets of torchvision are
    read. Objects of training programs, such as arguments and schedules of RETFound, timm, Lightning and MONAI, are
    replaced by placeholders that do nothing; functions and other classes of Python's standard library are refused.

    Args:
        path: a .safetensors file, a file written by `torch.save`, or a folder that contains one.

    Returns:
        Tensors by name, without the prefixes of data parallelism and torch.compile, and a description of the file.

    Raises:
        CheckpointError: the file is missing or damaged, contains other objects, or contains no tensors.
    """
    path = _file_in(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder without {', '.join(_IN_FOLDERS)}; give the file with the weights")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a .safetensors file, or a file written by torch.save")
    _refuse_other_kinds(path)
    if path.suffix == ".safetensors":
        try:
            tensors = _without_wrappers(load_file(path))
        except Exception as error:
            # safetensors raises an error type of its Rust library; any error means that the file is not valid.
            raise CheckpointError(f"{path} is not a valid safetensors file ({error}); copy it again") from None
        _require_finite(tensors, path)
        return tensors, "safetensors"
    return _tensors_of(_unpickled(path), path)


def _file_in(path: Path) -> Path:
    return next((path / name for name in _IN_FOLDERS if (path / name).is_file()), path) if path.is_dir() else path


def _refuse_other_kinds(path: Path) -> None:
    """Raise if the file is something that people mistake for weights."""
    with path.open("rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights themselves; run git lfs pull")
    if text.startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(f"{path} is a web page, not weights; download the file itself, or log in first")
    if start.startswith(b"\x89HDF"):
        raise CheckpointError(f"{path} is a Keras file; only weights of PyTorch are read")
    if not start:
        raise CheckpointError(f"{path} is empty; copy it again")


def _unpickled(path: Path) -> Any:
    """Read a pickle, replacing objects of training programs by placeholders, one kind after the other."""
    from torchvision.models import resnet

    allowed: list[Any] = [*_INERT_MODULES, resnet.ResNet, resnet.Bottleneck, resnet.BasicBlock]
    allowed.append(collections.OrderedDict)
    replaced: dict[str, Any] = {name: kind for kind, name in _CONTAINERS}
    while True:
        try:
            with torch.serialization.safe_globals([*allowed, *((kind, name) for name, kind in replaced.items())]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            # The unpickler raises many types of errors for files in other formats, in every case without running code.
            text = str(error)
            filled = _FILLED.search(text)
            if filled and (name := _name_of(filled[2], replaced)):
                # Only plain containers can be filled while a pickle is read.
                replaced[name] = _EmptyList if filled[1] == "append" else _EmptyDict
                continue
            name = _refused_name(text)
            if not _is_plain_data(name) or name in replaced or len(replaced) == _MAX_PLACEHOLDERS:
                raise CheckpointError(f"{path}: {_why(text, error)}") from None
            replaced[name] = type(name.rsplit(".", 1)[-1], (_Placeholder,), {})


def _name_of(last: str, replaced: dict[str, Any]) -> str | None:
    """Return the full name of the class whose placeholder has this name."""
    return next((n for n, kind in replaced.items() if n.endswith(f".{last}") and issubclass(kind, _Placeholder)), None)


def _refused_name(text: str) -> str:
    """Return what an error of the unpickler does not allow; "" if it is about something else."""
    found = _UNSUPPORTED_GLOBAL.search(text)
    name = (found[1] or found[2]) if found else ""
    # torch leaves out the module of Python's built-in names.
    return f"builtins.{name}" if name and "." not in name else name


def _is_plain_data(name: str) -> bool:
    """Return whether a placeholder may stand in for a class: nothing of Python itself, and no network."""
    if not name or (
        name.startswith(("torch.nn.", "torch.jit.", "torch.fx.")) and not name.startswith(_WITHOUT_WEIGHTS)
    ):
        return False
    top = name.split(".")[0]
    if top in sys.stdlib_module_names or top == "nt":
        return name in _PLAIN_DATA or top in _PLAIN_MODULES
    return True


def _why(text: str, error: Exception) -> str:
    if "TorchScript" in text:
        return "is a TorchScript archive; save the state_dict() of its network instead"
    found = _UNSUPPORTED_GLOBAL.search(text)
    reason = f"it contains {found[1] or found[2]}" if found else f"damaged, or of another kind: {type(error).__name__}"
    return (
        f"cannot be read as weights ({reason}). Only tensors, plain data and torchvision's ResNets are accepted, "
        "because other pickled objects could run code"
    )


def _tensors_of(loaded: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    what = "a state dict"
    if isinstance(loaded, nn.Module):
        what = f"a pickled {type(loaded).__name__}"
        loaded = _taken_apart(loaded)
    for _ in range(_DEEPEST):
        inner = _nested_in(loaded)
        if inner is None:
            break
        what = f"a checkpoint with {inner!r}"
        loaded = _taken_apart(loaded[inner]) if isinstance(loaded[inner], nn.Module) else loaded[inner]
    tensors = {}
    if isinstance(loaded, dict):
        tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if isinstance(loaded, _Placeholder):
        raise CheckpointError(
            f"{path} is a whole pickled {type(loaded).__name__}; save its state_dict() instead: reading the object "
            "itself could run code"
        )
    if not tensors:
        raise CheckpointError(f"{path} contains no tensors; is it a checkpoint with weights?")
    _require_finite(tensors, path)
    return _without_wrappers(tensors), what


def _require_finite(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise if weights are not numbers; best scores and other single values of metrics may be infinite."""
    broken = [
        name
        for name, value in tensors.items()
        if value.is_floating_point() and value.numel() > 1 and not value.isfinite().all()
    ]
    if broken:
        raise CheckpointError(
            f"{path}: {len(broken)} tensors contain NaN or infinity, such as {broken[0]}; its training diverged: "
            "take an earlier checkpoint"
        )


def _nested_in(loaded: Any) -> str | None:
    """Return the key of the weights in a checkpoint, or None if the tensors are its own."""
    if not isinstance(loaded, dict) or sum(isinstance(value, Tensor) for value in loaded.values()) > len(loaded) / 2:
        return None
    return next((key for key in _NESTED if isinstance(loaded.get(key), dict | nn.Module) and loaded[key]), None)


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    def plain(name: str) -> str:
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
        return name.removeprefix(_WRAPPERS[0])

    return {plain(name): value for name, value in tensors.items()}


def _preference(prefix: str) -> tuple[int, int]:
    parts = prefix.lower().split(".")
    ranks = [rank for rank, word in enumerate(_NETWORKS) if any(word in part for part in parts)]
    return min(ranks, default=len(_NETWORKS)), len(parts)


def network_prefix(tensors: dict[str, Tensor], wanted: Iterable[str]) -> str:
    """Return the prefix under which a program keeps a network, such as "model." of Lightning or "net." of MONAI.

    Args:
        tensors: tensors by name.
        wanted: names of the tensors of the network.

    Returns:
        The prefix with which most tensors are wanted; "" if none has more than the names as they are.
    """
    names = set(wanted)
    hits: collections.Counter[str] = collections.Counter()
    for name in tensors:
        parts = name.split(".")
        for depth in range(min(len(parts), 5)):
            if ".".join(parts[depth:]) in names:
                hits[".".join(parts[:depth])] += 1
    if not hits or hits[""] >= max(hits.values()):
        return ""
    best = [prefix for prefix, count in hits.items() if count == max(hits.values())]
    # Of several networks of one shape: an average, then the one that is called a model, never an auxiliary one.
    return min(best, key=_preference) + "."


def without_prefix(tensors: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of the network in a checkpoint, without their prefix; see `network_prefix`."""
    prefix = network_prefix(tensors, wanted)
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def refuse_deeper_network(tensors: Iterable[str], wanted: Iterable[str], source: str) -> None:
    """Raise if tensors belong to blocks that the model does not have: all of ResNet-50's are in a file of ResNet-101.

    Args:
        tensors: names of the tensors of the network in a checkpoint.
        wanted: names of the tensors of the model, without its head.
        source: name of the file, for the error.

    Raises:
        CheckpointError: there are such tensors.
    """

    def kind(name: str) -> str:
        return re.sub(r"\d+", "#", name)

    own = set(wanted)
    kinds = set(map(kind, own))
    deeper = [name for name in tensors if name not in own and kind(name) in kinds]
    if deeper:
        raise CheckpointError(
            f"{source}: has {len(deeper)} tensors of a deeper network of this family, such as {deeper[0]}; is it the "
            "same model.backbone?"
        )


def _taken_apart(module: nn.Module, prefix: str = "", depth: int = 0) -> dict[str, Tensor]:
    """Return the tensors of a pickled network by name, without calling its methods: the file may have replaced them."""
    if depth > _DEEPEST:
        raise CheckpointError(f"a pickled network is nested more than {_DEEPEST} levels deep; the file is not valid")
    found = {}
    for kind in ("_parameters", "_buffers"):
        for name, value in vars(module).get(kind, {}).items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value.detach()
    for name, inner in vars(module).get("_modules", {}).items():
        if isinstance(inner, nn.Module):
            found |= _taken_apart(inner, f"{prefix}{name}.", depth + 1)
    return found


def resample_positions(value: Tensor, length: int, source: str) -> Tensor:
    """Resample position embeddings to another square grid of patches; keep those of the tokens before the grid.

    Args:
        value: [1, T, C], T tokens.
        length: number of tokens wanted.
        source: name of their file, for the error.

    Returns:
        float32 [1, length, C].

    Raises:
        CheckpointError: the number of tokens before the grid differs.

    Source: bicubic with antialiasing, as in timm's `resample_abs_pos_embed`.
    """
    old, new = (int(count**0.5) for count in (value.shape[1], length))
    extra = value.shape[1] - old * old
    if length - new * new != extra:
        raise CheckpointError(
            f"{source}: its {value.shape[1]} position embeddings cannot be resampled to {length}: the number of tokens "
            "before the grid differs"
        )
    grid = value[:, extra:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([value[:, :extra].float(), grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)], dim=1)
