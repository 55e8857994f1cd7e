"""Trees with PyTorch's names and adapters on them: what the tests of jlora.peft share."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

import jlora

LINEAR, TABLE, EXPERTS = jlora.Axes((1,), (0,)), jlora.Axes((0,), (1,)), jlora.Axes((2,), (1,), (0,))
_seeds = itertools.count()


def noise(*shape: int) -> np.ndarray:
    """Normal numbers, others at each call."""
    return np.random.default_rng(next(_seeds)).standard_normal(shape).astype(np.float32)


def nested(state: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by dotted names as a tree."""
    tree: dict[str, Any] = {}
    for name, value in state.items():
        *modules, last = name.split(".")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[last] = value
    return tree


def flat(tree: Any) -> dict[str, Any]:
    """The inverse of `nested`; nodes are leaves."""
    paths, leaves, _ = jlora.targets.paths.flatten(tree, lambda x: isinstance(x, jlora.AdaptedParam))
    return {path.replace("/", "."): leaf for path, leaf in zip(paths, leaves, strict=True)}


def lora(weight: Any, rank: int = 2, scale: float = 0.5, axes: jlora.Axes | None = None, **fields: Any) -> Any:
    """A weight, (out, in) unless its axes are given, with random factors."""
    axes = axes or (LINEAR if weight.ndim == 2 else EXPERTS)
    sizes = lambda group: [weight.shape[axis] for axis in group]
    lora_a = noise(*sizes(axes.batch_axis), *sizes(axes.in_axis), rank)
    lora_b = noise(*sizes(axes.batch_axis), rank, *sizes(axes.out_axis))
    arrays = map(jnp.asarray, (weight, lora_a, lora_b))
    return jlora.LoraParam(*arrays, axes=axes, scale=scale, **fields)


def adapted(state: Mapping[str, np.ndarray], **axes: jlora.Axes) -> dict[str, Any]:
    """A PyTorch model's tree with random factors at every weight of two axes or more.

    Args:
      state: arrays by their names.
      axes: by the last name of the module, of weights that are not (out, in).
    """
    last = lambda name: name.removesuffix(".weight").rpartition(".")[2]
    of = lambda name, x: lora(x, axes=axes.get(last(name))) if x.ndim > 1 else jnp.asarray(x)
    return nested({name: of(name, x) for name, x in state.items()})


def merged(tree: Any) -> dict[str, np.ndarray]:
    """The arrays that a wrapped tree stands for, by dotted names."""
    return {name: np.asarray(x) for name, x in flat(jlora.merge(tree)).items()}


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any], atol: float = 1e-5) -> None:
    """The same names, and values up to rounding."""
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(found[name]), np.asarray(value), atol=atol, rtol=1e-5, err_msg=name)
