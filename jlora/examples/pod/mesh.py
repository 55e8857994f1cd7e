"""The mesh of a job, and where on it the model lies."""

import argparse
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from jlora.examples.pod.processes import PodError
from jlora.examples.smollm2 import SmolLM2
from jlora.targets.paths import flatten

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that share out a batch
ACTIVATIONS = jax.P(ROWS)
# What is stacked by layer has that axis first. Each kernel is split both ways: between its attention heads or hidden
# features by `tensor`, along its other axis by `fsdp`.
RULES = {
    r"(q|k|v|gate|up)_proj/kernel": jax.P(None, "fsdp", "tensor"),
    r"(o|down)_proj/kernel": jax.P(None, "tensor", "fsdp"),
    r"embed/embedding": jax.P("tensor", "fsdp"),
    r"norm/scale": jax.P(),
}


def read_mesh(text: str) -> dict[str, int]:
    """Returns the axes' sizes from text such as ``fsdp=8,tensor=4``; -1 is the rest of the devices."""
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    given: set[str] = set()
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name in given:
            raise argparse.ArgumentTypeError(f"{name} is there twice: {text}")
        given.add(name)
        if name not in AXES:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no axis of the mesh; its axes are {', '.join(AXES)}, as in fsdp=8,tensor=4"
            )
        if not re.fullmatch(r"-1|[1-9]\d*|", size):
            raise argparse.ArgumentTypeError(f"the size of {name} is a number from 1, or -1 for the rest: {size!r}")
        sizes[name] = int(size or -1)
    if list(sizes.values()).count(-1) > 1:
        raise argparse.ArgumentTypeError(f"one axis can take the rest of the devices, not two: {text}")
    return sizes


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """Returns the mesh of all devices of all processes.

    Raises:
      PodError: if the sizes' product is not the number of devices.
    """
    devices = jax.device_count()
    known = math.prod(size for size in sizes.values() if size > 0)
    whole = {name: devices // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(whole.values()) != devices:
        asked = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise PodError(
            f"--mesh {asked} does not fit {devices} devices ({jax.process_count()} processes of "
            f"{jax.local_device_count()}): the product of its sizes must be {devices}. One size can be -1: the rest of "
            f"the devices. On a laptop, --virtual-devices {known} makes {known} of one CPU"
        )
    return jax.make_mesh(tuple(whole.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_model(model: SmolLM2, mesh: Mesh) -> None:
    """Refuses a mesh that would split a head, or an axis of the model into unequal parts.

    Raises:
      PodError: it names the size, and those that fit.
    """
    sizes = {
        "tensor": {"heads": model.heads, "kv_heads": model.kv_heads, "hidden": model.hidden, "vocab": model.vocab},
        "fsdp": {"width": model.width, "hidden": model.hidden},
    }
    for axis, parts in sizes.items():
        size, fitting = mesh.shape[axis], math.gcd(*parts.values())
        if odd := [f"{name} = {n}" for name, n in parts.items() if n % size]:
            divisors = [str(n) for n in range(1, fitting + 1) if fitting % n == 0]
            raise PodError(
                f"--mesh {axis}={size} does not divide the model's {' and '.join(odd)}; {axis} can be one of "
                f"{', '.join(divisors)}, and data takes what is left: data=-1,{axis}={divisors[-1]}"
            )


def check_batch(batch: int, accumulate: int, mesh: Mesh) -> None:
    """Refuses a batch whose parts are not shared out evenly.

    Raises:
      PodError: it names the number that the batch must be a multiple of.
    """
    places = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % (places * accumulate):
        raise PodError(
            f"--batch {batch} is not a multiple of {places * accumulate}: each of the {accumulate} parts that "
            f"--accumulate makes of it is shared out over data x fsdp = {places} places of the mesh"
        )


def place(params: Any, mesh: Mesh, dtype: Any) -> Any:
    """Returns the host's arrays on the mesh by `RULES`, in a type; each device gets its own part, and nothing more."""
    paths, leaves, treedef = flatten(params)
    places = [NamedSharding(mesh, spec_of(path)) for path in paths]
    return treedef.unflatten([_placed(x, where, dtype) for x, where in zip(leaves, places, strict=True)])


def spec_of(path: str) -> jax.P:
    """Returns the place of a leaf by its path."""
    return next(spec for pattern, spec in RULES.items() if re.search(f"{pattern}$", path))


def _placed(x: Any, sharding: NamedSharding, dtype: Any) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x[index], dtype))
