"""Trees with quantised leaves: made, turned back, measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.interpret.sites import Site
from jlora.nodes.axes import Axes
from jlora.nodes.node import is_node, is_unit
from jlora.nodes.qarray import dense, is_qarray, nbits
from jlora.quant.formats import DTYPES, Format, package, quantised, read_as
from jlora.spec import LoraSpec
from jlora.targets.conventions import kernel_axes
from jlora.targets.paths import flatten, flatten_named
from jlora.targets.select import select, sites_of
from jlora.tree import has_nodes, merge


def quantize(
    params: Any,
    dtype: str = "nf4",
    *,
    targets: Any = "all-linear",
    exclude: Iterable[Any] = (),
    tile: int | None = 64,
    double_quant: bool = False,
    sites: Mapping[str, Site] | None = None,
    axes: Mapping[Any, Axes] | None = None,
) -> Any:
    """Puts a Qwix `QArray` in the place of each target: a few bits a weight, and a scale for each tile of it.

    Leaf by leaf, each where it lies: sharded kernels stay so, and leaves that are NumPy arrays, mapped from a file,
    say, come to the device one at a time. Runs under jit, and on `jax.ShapeDtypeStruct`, which gives a plan.

    Args:
      params: a plain tree, as of `jlora.wrap`, which then takes the result.
      dtype: of the codes: ``"nf4"`` (the quantiles of a normal distribution), ``"int4"``, ``"int8"`` or ``"fp8"``
        (e4m3).
      targets: which leaves, as of `jlora.LoraSpec`.
      exclude: of these, which not.
      tile: how many elements along the contracted axes share a scale, which has the kernel's type. If it does not
        divide the axes, the largest number below it that does is taken. Below 16 it is an error, unless `tile` or the
        axes are as small. A table has tiles along its rows. None: one scale for each output.
      double_quant: whether the scales are quantised too, to 8 bits, at most 256 of them together.
      sites: what `jlora.sites` found: the kernels' axes. Without it Flax's conventions decide.
      axes: those of kernels that neither sites nor conventions tell, as of `jlora.LoraSpec`.

    Returns:
      The tree, to be used through `jlora.apply`, with adapters or without. With scales in float32 a weight takes 4.5
      bits as nf4 or int4 (4.13 with `double_quant`) and 8.5 as int8 or fp8.

    Raises:
      ModuleNotFoundError: if qwix is not installed.
      ValueError: if `dtype` is unknown, a pattern matches nothing, a kernel's axes are ambiguous or allow no tiles.
      TypeError: if a target is quantised already, or the tree is wrapped.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = jlora.quant.quantize({"dense": {"kernel": jnp.ones((128, 3)), "bias": jnp.zeros(3)}}, "nf4")
      >>> params["dense"]["kernel"].qvalue.dtype.name, params["dense"]["kernel"].scale.shape
      ('uint4', (2, 3))
      >>> params = jlora.wrap(params, jlora.LoraSpec(rank=2))
      >>> jlora.apply(lambda p, x: x @ p["dense"]["kernel"])(params, jnp.ones((1, 128)))
      Array([[128., 128., 128.]], dtype=float32)

    References:
      Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314.
    """
    package()
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"quantize: dtype must be one of {', '.join(DTYPES)}, found {_short(dtype)}")
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
        raise ValueError(f"quantize: tile must be a positive number of elements or None, found {tile!r}")
    paths, leaves, treedef = flatten_named("quantize", params, is_unit)
    if wrapped := [path for path, leaf in zip(paths, leaves, strict=True) if is_node(leaf)]:
        raise TypeError(f"quantize: {wrapped[0]} is wrapped; quantise the plain tree, then wrap it")
    by_path = dict(zip(paths, leaves, strict=True))
    forms = _formats(params, by_path, dtype, tile, double_quant, _spec(targets, exclude, axes), sites)
    return treedef.unflatten([quantised(x, forms[p]) if p in forms else x for p, x in zip(paths, leaves, strict=True)])


def _short(x: Any) -> str:
    return repr(x) if isinstance(x, str) else type(x).__name__


def _spec(targets: Any, exclude: Iterable[Any], axes: Mapping[Any, Axes] | None) -> LoraSpec:
    try:
        return LoraSpec(targets=targets, exclude=exclude, axes=axes or {})  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"quantize: {str(error).removeprefix('LoraSpec: ')}") from None


def _formats(
    params: Any,
    by_path: Mapping[str, Any],
    dtype: str,
    tile: int | None,
    double_quant: bool,
    spec: LoraSpec,
    sites: Any,
) -> dict[str, Format]:
    """The format of each target."""
    found = {}
    try:
        known = sites_of(sites, by_path)
        for path in sorted(select(params, by_path, spec, known).targets):
            leaf = by_path[path]
            _check(path, leaf)
            axes, kind = kernel_axes(path, by_path, spec.axes, known)
            found[path] = Format.fitting(path, tuple(leaf.shape), axes, kind, dtype, tile, double_quant)
    except ValueError as error:  # raised by what jlora.wrap uses too
        told = str(error).replace("wrap: ", "quantize: ").replace("jlora.wrap(params, spec,", "quantize(params,")
        raise ValueError(told.replace("LoraSpec(axes=", "quantize(params, axes=")) from None
    return found


def _check(path: str, leaf: Any) -> None:
    if is_qarray(leaf):
        raise TypeError(f"quantize: {path} is quantised already, to {leaf.qtype}; jlora.quant.dequantize it first")
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or 0 in leaf.shape:
        raise ValueError(
            f"quantize: {path} of shape {tuple(leaf.shape)} has dtype {jnp.dtype(leaf.dtype).name}; it takes floating "
            "kernels with elements. Exclude it"
        )


def dequantize(tree: Any, *, dtype: Any = None) -> Any:
    """The tree with numbers in the place of quantised leaves, computed in float32 and rounded once.

    Args:
      tree: plain or wrapped; adapters stay, on dense bases.
      dtype: of these leaves; None: that of their scales, which was the kernel's.

    Returns:
      The tree with a dense array for each quantised leaf; of a plan its shapes and types.

    Raises:
      TypeError: if nothing in the tree is quantised.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = jlora.quant.quantize({"kernel": jnp.ones((64, 3))}, "nf4")
      >>> jlora.quant.dequantize(params)["kernel"][0]
      Array([1., 1., 1.], dtype=float32)
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_qarray)
    if not any(map(is_qarray, leaves)):
        raise TypeError("dequantize: no leaf of this tree is quantised")
    return treedef.unflatten([_dense(leaf, dtype) for leaf in leaves])


def _dense(leaf: Any, dtype: Any = None) -> Any:
    if not is_qarray(leaf):
        return leaf
    if not isinstance(leaf.qvalue, jax.ShapeDtypeStruct):
        return dense(leaf, dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=leaf.qvalue.sharding)


class Error(NamedTuple):
    """What quantising lost, as `requantize` tells it: norms of the difference, over others (Frobenius norms).

    Args:
      weight: over that of the weight: 0.01 is one percent.
      update: over that of the adapter's update: 0 where nothing of it is lost, 1 and more where most of it is, and
        infinity where the update is zero.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = jlora.quant.quantize({"kernel": jnp.ones((64, 3))}, "int8")
      >>> _, errors = jlora.quant.requantize(jlora.wrap(params, jlora.LoraSpec(rank=2)))  # B is zero at the start
      >>> errors["kernel"].update
      inf
    """

    weight: float
    update: float


def requantize(tree: Any) -> tuple[Any, dict[str, Error]]:
    """Folds the adapters in and quantises the sums again, each to the format of its base; tells what that loses.

    An update that is small beside the steps of the base's codes is mostly lost: an error over the update near to 1 and
    above says so. `jlora.merge` with a `dtype` loses nothing of it.

    Args:
      tree: a wrapped tree, with values (it does not run under jit).

    Returns:
      The plain tree, its quantised leaves still so, and for each adapted one its `Error`.

    Raises:
      TypeError: if nothing in the tree is wrapped.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = jlora.quant.quantize({"kernel": jnp.ones((64, 3))}, "int8")
      >>> merged, errors = jlora.quant.requantize(jlora.wrap(params, jlora.LoraSpec(rank=2)))
      >>> errors["kernel"].weight < 0.01
      True
    """
    if not has_nodes(tree):
        raise TypeError("requantize takes a tree that jlora.wrap returned; no leaf of this one is wrapped")
    paths, leaves, treedef = flatten(tree, is_unit)
    made, errors = [], {}
    for path, leaf in zip(paths, leaves, strict=True):
        if is_node(leaf) and is_qarray(leaf.base):
            exact = merge({path: leaf}, dtype=jnp.float32)[path]
            made.append(quantised(exact.astype(leaf.dtype), Format.of(leaf.base)))
            errors[path] = _error(made[-1], exact, leaf.base)
        else:
            made.append(merge({path: leaf})[path] if is_node(leaf) else leaf)
    return treedef.unflatten(made), errors


def _error(made: Any, exact: jax.Array, base: Any) -> Error:
    lost = jnp.linalg.norm((dense(made, jnp.float32) - exact).ravel())
    update = jnp.linalg.norm((exact - dense(base, jnp.float32)).ravel())
    return Error(float(lost / jnp.linalg.norm(exact.ravel())), float(lost / update) if update else math.inf)


def bits(tree: Any) -> float:
    """The bits that a weight of the quantised leaves takes, scales and all.

    Args:
      tree: plain or wrapped, with quantised leaves; or a plan of it. Dense leaves and adapters do not count.

    Returns:
      Bits for one weight, on the average over all quantised leaves.

    Raises:
      TypeError: if nothing in the tree is quantised.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.quant.bits(jlora.quant.quantize({"kernel": jnp.ones((128, 8))}, "nf4"))
      4.5
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_qarray) if is_qarray(leaf)]
    if not leaves:
        raise TypeError("bits: no leaf of this tree is quantised")
    return sum(map(nbits, leaves)) / sum(math.prod(leaf.shape) for leaf in leaves)


def prepare(tree: Any) -> Any:
    """The tree with all in float32 that is dense and has 16 bits: norms, biases, the head, embeddings.

    What `peft.prepare_model_for_kbit_training` does to a model's weights. The rest of it is already so here: the base
    is frozen by `jlora.apply`, and layers are recomputed by `flax.linen.remat` or `jax.checkpoint` around them.

    Args:
      tree: plain or wrapped, with quantised leaves, which stay as they are; or a plan of it.

    Returns:
      The tree; leaves of bfloat16 and float16 are float32 in it, all others as they were.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.quant.prepare({"scale": jnp.ones(3, jnp.bfloat16)})["scale"].dtype.name
      'float32'
    """
    is_half = lambda x: hasattr(x, "dtype") and x.dtype in (jnp.bfloat16, jnp.float16)

    def wide(x: Any) -> Any:
        if is_qarray(x) or not is_half(x):
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
        return jnp.asarray(x).astype(jnp.float32)

    return jax.tree.map(wide, tree, is_leaf=is_qarray)


def fill(plan: Any, read: Callable[[str, Any], Any]) -> Any:
    """Makes the arrays of a plan leaf by leaf, so that a model larger than the memory is quantised as it is read.

    Args:
      plan: a tree of `jax.ShapeDtypeStruct`, of which `quantize` has made some leaves quantised; with shardings, each
        leaf is placed as it is read.
      read: called with the path of each leaf and its shape and type, ``(path, jax.ShapeDtypeStruct)``; returns the
        dense array.

    Returns:
      The tree with values: quantised where the plan is, dense and of the plan's type elsewhere.

    Raises:
      TypeError: if the plan is wrapped, or the arguments are swapped.
      ValueError: if an array has another shape than the plan.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, numpy as np
      >>> plan = jlora.quant.quantize(jax.eval_shape(lambda: {"kernel": jnp.ones((128, 8))}), "nf4")
      >>> params = jlora.quant.fill(plan, lambda path, leaf: np.ones(leaf.shape, leaf.dtype))
      >>> params["kernel"].qvalue.shape
      (128, 8)
    """
    if callable(plan) or not callable(read):
        raise TypeError("fill takes the plan first and the function that reads a leaf second")
    paths, leaves, treedef = flatten(plan, is_unit)
    if wrapped := [path for path, leaf in zip(paths, leaves, strict=True) if is_node(leaf)]:
        raise TypeError(f"fill: {wrapped[0]} is wrapped; fill the plan first, then wrap what it gives")
    return treedef.unflatten([_read(path, leaf, read) for path, leaf in zip(paths, leaves, strict=True)])


def _read(path: str, leaf: Any, read: Callable[[str, Any], Any]) -> Any:
    if not hasattr(leaf, "shape"):
        return leaf
    shape = _dense(leaf)
    found = read(path, shape)
    size = getattr(found, "shape", None)
    if size is None or tuple(size) != tuple(leaf.shape):
        what = f"an array of shape {tuple(size)}" if size is not None else f"a {type(found).__name__}"
        raise ValueError(f"fill: read gave {what} for {path}; the plan has shape {tuple(leaf.shape)}")
    if is_qarray(leaf):
        return read_as(found, leaf)
    array = found.astype(leaf.dtype)
    return jnp.asarray(array) if shape.sharding is None else jax.device_put(array, shape.sharding)
