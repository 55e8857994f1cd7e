"""What merging costs: how much of each update the merged kernel's type does not hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.apply import apply
from jlora.nodes.checks import check_whole
from jlora.nodes.fold import loss_of
from jlora.nodes.node import TrainableParam, is_node
from jlora.report.text import Table
from jlora.targets.paths import flatten
from jlora.tree import has_nodes, merge


@dataclasses.dataclass(frozen=True, repr=False)
class MergeError(Table):
    """The table of `merge_error`.

    Args:
      lost: for each adapted kernel, the share of its update that rounding takes, by Frobenius norms: 0 to 1, and
        infinity where a weight is beyond the type.
      outputs: how far the merged model's result is from the adapted one's, over that one's norm; None without `fn`.
    """

    lost: Mapping[str, float] = dataclasses.field(default_factory=dict)
    outputs: float | None = None


def merge_error(
    tree: Any, fn: Callable[..., Any] | None = None, *args: Any, dtype: Any = None, **kwargs: Any
) -> MergeError:
    """How much of each adapter ``merge(tree, dtype=dtype)`` rounds away, and what that does to a function's result.

    A kernel of 16 bits keeps an update only where it is larger than half a step of the kernel's own numbers, so small
    updates are lost where `jlora.apply` has all of them. It gives no warning.

    Args:
      tree: a wrapped tree, with values.
      fn: the unchanged function, as given to `jlora.apply`; None measures the kernels alone.
      *args, **kwargs: its other arguments: a batch.
      dtype: of the merged kernels, as in `jlora.merge`; None keeps each base's.

    Returns:
      A `MergeError`, which prints as a table. `lost` has the share by path, `outputs` the relative distance of results.

    Raises:
      TypeError: if nothing in the tree is wrapped.
      ValueError: as `jlora.merge` does.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.full((64, 32), 0.5, jnp.bfloat16)}
      >>> tree = jlora.wrap(params, jlora.LoraSpec(rank=2))
      >>> tree = jax.tree.map(lambda x: x + 0.01 if x.dtype == jnp.float32 else x, tree)  # a trained one
      >>> found = jlora.merge_error(tree, lambda p, x: x @ p["kernel"].astype(x.dtype), jnp.ones((2, 64)))
      >>> found.lost["kernel"] > 0.05, found.outputs < 0.01
      (True, True)
    """
    if not has_nodes(tree):
        raise TypeError("merge_error: no leaf of the first argument is wrapped; pass the tree that jlora.wrap returned")
    paths, leaves, _ = flatten(tree, is_node)
    nodes = {p: x for p, x in zip(paths, leaves, strict=True) if is_node(x) and not isinstance(x, TrainableParam)}
    for path, node in nodes.items():
        check_whole("merge_error", path, node)
    jax.eval_shape(lambda tree: merge(tree, dtype=dtype), tree)  # refuses what merge refuses
    found = {path: loss_of(node, dtype) for path, node in nodes.items()}
    lost = {path: loss.share for path, (_, loss) in found.items()}
    rows = tuple(
        (path, str(tuple(nodes[path].shape)), kind.name, f"{_norm(loss.update):.3g}", f"{lost[path]:.1%}")
        for path, (kind, loss) in found.items()
    )
    outputs = None if fn is None else _distance(fn, tree, dtype, args, kwargs)
    worst = max(lost, key=lambda path: lost[path], default=None)
    footer = [] if worst is None else [f"largest share of an update that rounding takes: {lost[worst]:.1%}, {worst}"]
    footer += [] if outputs is None else [f"distance of the results over their norm: {outputs:.3g}"]
    return MergeError(("path", "shape", "type", "update", "lost"), rows, tuple(footer), lost, outputs)


def _norm(square: float) -> float:
    return square**0.5


def _distance(fn: Callable[..., Any], tree: Any, dtype: Any, args: Any, kwargs: Any) -> float:
    is_floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    floating = lambda tree: [x.astype(jnp.float32) for x in jax.tree.leaves(tree) if is_floating(x)]

    @jax.jit
    def norms(tree: Any, args: Any, kwargs: Any) -> Any:
        exact = floating(apply(fn, fallback="ignore")(tree, *args, **kwargs))
        merged = floating(fn(merge(tree, dtype=dtype), *args, **kwargs))
        square = lambda arrays: sum(jnp.sum(x * x) for x in arrays)
        return square([x - y for x, y in zip(merged, exact, strict=True)]), square(exact)

    apart, whole = norms(tree, args, kwargs)
    return float(jnp.sqrt(apart / whole)) if whole else 0.0
