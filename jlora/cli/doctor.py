"""Tell what is installed, the devices, and what of jlora they allow.

Paste the table into a bug report. It has no paths of this machine and no
variables of its environment. What is missing or broken is reported, and stops
nothing. If jlora can't be imported, run the file alone:
python -P FOLDER_OF_JLORA/cli/doctor.py
"""

from __future__ import annotations

import argparse
import collections
import importlib
import platform
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any

OLDEST, NEWEST = "0.10.2", "0.12"  # of JAX: those on which the tests run
PACKAGES = {  # what is to be installed, by the name that it is imported by
    "jlora": "jlora",
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
    "orbax.checkpoint": "orbax-checkpoint",
    "qwix": "qwix",
    "safetensors": "safetensors",
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface_hub",
    "grain": "grain",
    "tokenizers": "tokenizers",
}
NEEDS = {  # what a part of jlora needs: the import, and how it is had
    "quantised bases (jlora.quant)": ("qwix", 'pip install "jlora[quant]"'),
    "NNX modules (jlora.nnx)": ("flax.nnx", "pip install -U flax"),
    "adapters' files (jlora.peft)": ("safetensors", "pip install safetensors"),
    "checkpoints (jlora.checkpoint)": ("orbax.checkpoint", "pip install orbax-checkpoint"),
    "settings in YAML": ("yaml", "pip install pyyaml"),
    "files of the Hub": ("huggingface_hub", "pip install huggingface_hub"),
    "jlora.examples, tokenizers": ("tokenizers", 'pip install "jlora[examples]"'),
    "jlora.examples.pod": ("grain", 'pip install "jlora[pod]"'),
}
Row = tuple[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments."""


def run(given: argparse.Namespace | None = None) -> int:
    """Prints the table."""
    print(report())
    return 0


def report() -> str:
    """The table as text: versions, devices, and what they allow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [[*versions()], [*devices()], [*allowed()]]
    width = max(len(name) for rows in parts for name, _ in rows) + 2
    return "\n\n".join("\n".join(f"{name:{width}}{value}" for name, value in rows) for rows in parts)


def versions() -> Iterator[Row]:
    """What is installed, and which of it can't be imported."""
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", f"{platform.system()} {platform.machine()}"
    for module, package in PACKAGES.items():
        yield package, _version(module, package)
    yield "JAX's version", _tested()


def _version(module: str, package: str) -> str:
    found, fault = _found(package), _fault(module)
    if fault is None:
        return found or "installed, its version is not known"
    if found is None and _is_absent(module, fault):
        return "not installed"
    return f"{found or 'of an unknown version'}, but it can't be imported: {told(fault)}"


def _found(package: str) -> str | None:
    """The version that is installed, if any."""
    try:
        return metadata.version(package)
    except Exception:  # not there, or its description is damaged
        return None


def _fault(module: str) -> BaseException | None:
    """Why a module can't be imported, if so."""
    try:
        importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module that is broken may raise anything
        return error
    return None


def _is_absent(module: str, fault: BaseException) -> bool:
    """Whether the module itself is not there, and not one that it imports."""
    return isinstance(fault, ModuleNotFoundError) and f"{module}.".startswith(f"{fault.name}.")


def _tested() -> str:
    found = _found("jax")
    if found is None or not (numbers := _numbers(found)):
        return f"not known; tested are {OLDEST} to {NEWEST}"
    if numbers < _numbers(OLDEST):
        return f"{found} is too old: the oldest supported is {OLDEST}; pip install -U jax"
    if numbers[:2] > _numbers(NEWEST):
        return f"{found} is newer than all that were tested, {OLDEST} to {NEWEST}"
    return f"{found} is of the tested range, {OLDEST} to {NEWEST}"


def _numbers(version: str) -> tuple[int, ...]:
    start = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, start[0].split("."))) if start else ()


def devices() -> Iterator[Row]:
    """The backend and its devices, counted by kind."""
    yield "backend", _asked(lambda jax: jax.default_backend())
    yield (
        "devices",
        _asked(lambda jax: _counted(f"{device.device_kind} ({device.platform})" for device in jax.devices())),
    )
    yield "processes", _asked(lambda jax: str(jax.process_count()))


def _counted(kinds: Iterable[str]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in collections.Counter(kinds).items())


def _asked(ask: Callable[[Any], str]) -> str:
    """What JAX answers, or why it does not."""
    try:
        return ask(importlib.import_module("jax"))
    except Exception as error:
        return f"not known: {told(error)}"


def allowed() -> Iterator[Row]:
    """What of jlora can be used here."""
    yield "jlora allows", "here"
    yield "sharding", _asked(_sharding)
    yield "apply(native_dots=True)", _asked(_native)
    for what, (module, remedy) in NEEDS.items():
        fault = _fault(module)
        if fault is None:
            yield what, "yes"
        elif _is_absent(module, fault):
            yield what, f"no: {remedy}"
        else:
            yield what, f"no: {module} can't be imported, {told(fault)}; {remedy}"


def _sharding(jax: Any) -> str:
    count = jax.device_count()
    return f"yes, over {count} devices" if count > 1 else "there is one device: meshes are of size 1"


def _native(jax: Any) -> str:
    """On which kernels products are in 8 bits; `jlora.interpret.eightbits` has the rule."""
    eightbits = importlib.import_module("jlora.interpret.eightbits")
    device = jax.devices()[0]
    is_rocm = "rocm" in str(device.client.platform_version).lower()
    here = {"gpu": "rocm" if is_rocm else "cuda"}.get(device.platform, device.platform)
    kinds = [kind for kind, platforms in eightbits.PLATFORMS.items() if here in platforms]
    return f"yes, of kernels in {' and '.join(kinds)}" if kinds else f"changes nothing: {here} has no such products"


def told(error: BaseException) -> str:
    """An error in a line, without paths and addresses.

    Example:
      >>> told(ImportError("no name 'x' in 'qwix' (/home/me/qwix/__init__.py)"))
      "ImportError: no name 'x' in 'qwix' (<path>)"
    """
    text = next(iter(str(error).splitlines()), "")
    for pattern, name in HIDDEN:
        text = pattern.sub(name, text)
    return f"{type(error).__name__}: {text[:200]}".removesuffix(": ")


HIDDEN = (
    (re.compile(r"\w+://\S+"), "<address>"),
    (re.compile(r"(['\"])(?:[A-Za-z]:)?[\\/~][^'\"]*\1"), "<path>"),
    (re.compile(r"(?<![\w.<])(?:[A-Za-z]:[\\/]|[\\/~])[^\s'\",;:()]*"), "<path>"),
)

if __name__ == "__main__":
    raise SystemExit(run())
