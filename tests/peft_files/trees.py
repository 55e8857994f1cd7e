"""Trees with PyTorch's names and adapters on them: what the tests of jlora.peft share."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
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
    return jlora.LoraParam(*jax.device_put([np.asarray(weight), lora_a, lora_b]), axes=axes, scale=scale, **fields)


def adapted(state: Mapping[str, np.ndarray], **axes: jlora.Axes) -> dict[str, Any]:
    """A PyTorch model's tree with random factors at every weight of two axes or more.

    Args:
      state: arrays by their names.
      axes: by the last name of the module, of weights that are not (out, in).
    """
    last = lambda name: name.removesuffix(".weight").rpartition(".")[2]
    of = lambda name, x: lora(x, axes=axes.get(last(name))) if x.ndim > 1 else jax.device_put(x)
    return nested({name: of(name, x) for name, x in state.items()})


def merged(tree: Any) -> dict[str, np.ndarray]:
    """The arrays that a wrapped tree stands for, by dotted names: plain factors multiplied by numpy, others merged."""
    leaves = flat(tree)
    leaves = {name: x.base if isinstance(x, jlora.TrainableParam) else x for name, x in leaves.items()}
    others = {name: x for name, x in leaves.items() if isinstance(x, jlora.AdaptedParam) and not _is_plain(x)}
    done = jax.jit(jlora.merge)(others) if others else {}
    of = lambda name, x: done[name] if name in done else multiplied(x) if _is_plain(x) else x
    return {name: np.asarray(of(name, x)) for name, x in leaves.items()}


def _is_plain(leaf: Any) -> bool:
    return type(leaf) is jlora.LoraParam and leaf.start == () and leaf.layers is None


def multiplied(node: jlora.LoraParam) -> np.ndarray:
    """W + scale * A @ B."""
    axes, rank = node.axes, np.ndim(node.base)
    of_a, of_b = (*axes.batch_axis, *axes.in_axis, rank), (*axes.batch_axis, rank, *axes.out_axis)
    base, lora_a, lora_b = (np.asarray(x) for x in (node.base, node.lora_a, node.lora_b))
    return (base + node.scale * np.einsum(lora_a, of_a, lora_b, of_b, range(rank))).astype(base.dtype)


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any], atol: float = 1e-5) -> None:
    """The same names, and values up to rounding."""
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(found[name]), np.asarray(value), atol=atol, rtol=1e-5, err_msg=name)
