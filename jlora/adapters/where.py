"""Where the rows of a batch are, in the arguments of a function and in its results."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def spread(caller: str, name: str, axes: Any, tree: Any) -> Any:
    """The axes of a prefix of a tree, for each of its leaves; `name` is the argument that gives them."""
    for_all = lambda axis, part: jax.tree.map(lambda _: axis, part)
    try:
        return jax.tree.map(for_all, axes, tree, is_leaf=is_none)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{caller}: {name} has another structure than what it is for: {axes} for {jax.tree.structure(tree)}. It "
            "has a number or None for each array, or one for a whole part"
        ) from error


def with_row(axis: Any, x: Any) -> Any:
    return x if axis is None else jnp.expand_dims(x, axis)


def without_row(caller: str, outputs: Any, axes: Any) -> Any:
    """The results without the axis of the one row."""

    def squeezed(path: Any, axis: Any, x: Any) -> Any:
        if axis is None:
            return x
        shape = jnp.shape(x)
        if not -len(shape) <= axis < len(shape) or shape[axis] != 1:
            raise ValueError(
                f"{caller}: the function sees batches of one row, and returns an array of shape {shape} for one"
                f"{_at(path)}, which has no axis {axis} of size 1; out_axes tells where the rows are, None where there "
                "are none, and in_axes where those of the arguments are"
            )
        return jnp.squeeze(x, axis)

    return jax.tree_util.tree_map_with_path(
        squeezed, spread(caller, "out_axes", axes, outputs), outputs, is_leaf=is_none
    )


def check_rows(caller: str, args: tuple[Any, ...], axes: tuple[Any, ...], rows: int) -> None:
    def check(path: Any, axis: Any, x: Any) -> None:
        shape, counted = jnp.shape(x), "ids" if caller == "batched" else "rows"
        if axis is not None and not (-len(shape) <= axis < len(shape) and shape[axis] == rows):
            raise ValueError(
                f"{caller}: there are {rows} {counted}, and an argument of shape {shape}{_at(path)} has not as many "
                f"rows on its axis {axis}; in_axes tells where they are, None where all rows share an argument"
            )

    jax.tree_util.tree_map_with_path(check, axes, args, is_leaf=is_none)


def _at(path: Any) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return f" at {name}" if name else ""


def is_none(x: Any) -> bool:
    return x is None
