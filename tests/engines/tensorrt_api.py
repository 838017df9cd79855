"""The API of TensorRT's Python bindings, read from the vendor's wheel, and a test double created from it.

The wheel can be imported without TensorRT's library if stub libraries export its few entry points. Classes, methods,
signatures, properties and enums are then the real ones. Run as a script, this module prints them as JSON for one
version, given as the folder of an unpacked wheel or as the name of a module, in a separate process because two versions
cannot be loaded into the same one.
"""

from __future__ import annotations

import ctypes
import enum
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENTRIES = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip


def real_module(wheel: Path) -> Any:
    """Import the bindings from an unpacked wheel."""
    major = wheel.name.split(".")[0]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "stub.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in ENTRIES))
        for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            name = f"lib{library}.so.{major}"
            file = Path(folder) / name
            subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", file, source], check=True)
            ctypes.CDLL(str(file), ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(wheel))
    import tensorrt_bindings  # type: ignore[import-not-found, unused-ignore]

    return tensorrt_bindings


def described(module: Any) -> dict[str, Any]:
    """Return the classes and enums of the bindings as plain data."""
    result: dict[str, Any] = {"version": module.__version__, "classes": {}, "enums": {}}
    todo = [(name, value) for name, value in vars(module).items() if inspect.isclass(value)]
    for name, kind in todo:
        if members := getattr(kind, "__members__", None):
            result["enums"][name] = {member: int(value) for member, value in members.items()}
            continue
        methods, properties, inner = {}, {}, {}
        for base in reversed(kind.__mro__[:-1]):
            for attribute, value in vars(base).items():
                if isinstance(value, property):
                    properties[attribute] = value.fset is not None
                elif inspect.isclass(value) and hasattr(value, "__members__"):
                    inner[attribute] = {member: int(entry) for member, entry in value.__members__.items()}
                elif (not attribute.startswith("_") or attribute == "__init__") and callable(value):
                    methods[attribute] = [
                        signature for line in (value.__doc__ or "").splitlines()
                        if (signature := parsed(line, attribute))
                    ]  # fmt: skip
        result["classes"][name] = {"methods": methods, "properties": properties, "inner": inner}
    return result


def parsed(line: str, name: str) -> dict[str, Any] | None:
    """Parse a pybind11 signature into its return type and its parameters [name, type, has a default], without self."""
    found = re.match(rf"\s*(?:\d+\. )?{re.escape(name)}\((.*)\)(?: -> (.+))?$", line)
    if not found or found[1] == "*args, **kwargs":
        return None
    parts, depth = [""], 0
    for letter in found[1]:
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    parameters = []
    for part in parts:
        parameter, _, rest = part.strip().partition(": ")
        kind, default, _ = rest.partition(" = ")
        if parameter not in ("self", ""):
            parameters.append([parameter, kind.split(".")[-1] if "tensorrt" in kind else kind, bool(default)])
    return {"parameters": parameters, "returns": (found[2] or "None").split(".")[-1].strip()}


class Double(types.ModuleType):
    """Test double of the module `tensorrt`, created from the description of its API.

    Using a class, method, keyword, property or member that the real module lacks fails. `behaviour` maps "Class.method"
    to implementations; other methods return an instance of the real method's return type.
    """

    def __init__(self, api: dict[str, Any]) -> None:
        super().__init__("tensorrt")
        self.__version__ = api["version"]
        self.behaviour: dict[str, Callable[..., Any]] = {}
        self.used: set[str] = set()
        for name, members in api["enums"].items():
            setattr(self, name, enum.IntEnum(name, members))
        for name, metadata in api["classes"].items():
            setattr(self, name, self._class(name, metadata))

    def _class(self, name: str, metadata: dict[str, Any]) -> type:
        double = self

        def setting(instance: Any, attribute: str, value: Any) -> None:
            own = type(instance).__name__ != name or attribute.startswith("_")
            if attribute in metadata["properties"]:
                assert metadata["properties"][attribute], f"{name}.{attribute} cannot be set"
                double.used.add(f"{name}.{attribute}")
            else:
                assert own, f"{name} has no {attribute}"
            object.__setattr__(instance, attribute, value)

        def getting(instance: Any, attribute: str) -> Any:
            if attribute in metadata["properties"]:
                double.used.add(f"{name}.{attribute}")
                act = double.behaviour.get(f"{name}.{attribute}")
                return act(instance) if act else None
            raise AttributeError(f"TensorRT {double.__version__}: {name} has no {attribute}")

        def inherited(kind: type, **kwargs: Any) -> None:
            for method, signatures in metadata["methods"].items():
                if method in vars(kind) and method != "__init__" and signatures:
                    mine = list(inspect.signature(vars(kind)[method]).parameters)[1:]
                    assert mine == [entry[0] for entry in signatures[0]["parameters"]], f"{name}.{method}: {mine}"

        body: dict[str, Any] = {
            "__setattr__": setting, "__getattr__": getting, "__init_subclass__": classmethod(inherited),
            **{inner: enum.IntEnum(inner, members) for inner, members in metadata["inner"].items()},
        }  # fmt: skip
        for method, signatures in metadata["methods"].items():
            body[method] = self._method(name, method, signatures)
        return type(name, (), body)

    def _method(self, owner: str, name: str, signatures: list[dict[str, Any]]) -> Callable[..., Any]:
        def call(instance: Any, *given: Any, **named: Any) -> Any:
            fits = [entry for entry in signatures if self._fits(entry["parameters"], given, named)]
            assert fits or not signatures, (
                f"TensorRT {self.__version__}: {owner}.{name} takes {signatures}, got {given} {named}"
            )
            self.used.add(f"{owner}.{name}")
            act = self.behaviour.get(f"{owner}.{name}")
            if act:
                return act(instance, *given, **named)
            if name == "__init__":
                return None
            kind = fits[0]["returns"] if fits else "None"
            made = getattr(self, kind, None)
            return made.__new__(made) if isinstance(made, type) else {"bool": True, "int": 0, "str": ""}.get(kind)

        return call

    def _fits(self, parameters: list[list[Any]], given: tuple[Any, ...], named: dict[str, Any]) -> bool:
        names = [entry[0] for entry in parameters]
        if len(given) > len(names) or set(named) - set(names[len(given) :]):
            return False
        values = {**dict(zip(names, given, strict=False)), **named}
        return all(
            self._is(values[parameter], kind) if parameter in values else has_default
            for parameter, kind, has_default in parameters
        )

    def _is(self, value: Any, kind: str) -> bool:
        known = getattr(self, kind, None)
        if kind == "Dims":
            return isinstance(value, tuple)
        if isinstance(known, type):
            return isinstance(value, known) or value is None
        plain = {"str": str, "bool": bool, "tuple": tuple, "typing.SupportsInt": int}
        if "Buffer" in kind:
            return isinstance(value, bytes | bytearray | memoryview)
        return isinstance(value, plain[kind]) if kind in plain else True


if __name__ == "__main__":
    given = Path(sys.argv[1])
    module = real_module(given) if given.is_dir() else importlib.import_module(sys.argv[1])
    json.dump(described(module), sys.stdout)
