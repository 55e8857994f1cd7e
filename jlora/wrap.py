"""`wrap`: puts the factors next to the kernels."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora import init as inits
from jlora import sharding
from jlora.conventions import kernel_axes
from jlora.interpret.sites import Site
from jlora.nodes import LoraParam, TrainableParam, is_node
from jlora.paths import flatten
from jlora.select import select, sites_of
from jlora.spec import Axes, LoraSpec


def wrap(params: Any, spec: LoraSpec, *, key: jax.Array | None = None, sites: Mapping[str, Site] | None = None) -> Any:
    """Puts low-rank factors next to each kernel that `spec` targets.

    Pure: it runs under `jax.jit` and `jax.eval_shape`, and on `jax.ShapeDtypeStruct`s, which gives the plan of the
    tree without a byte of it. Each leaf's key comes from its path, so that adding a layer changes no other leaf.

    Args:
      params: any pytree of arrays: dicts, `FrozenDict`, `nnx.State`, Equinox modules, registered dataclasses.
      spec: what to adapt, and how.
      key: a PRNG key for the factors; None takes ``jax.random.key(spec.seed)``.
      sites: what `jlora.sites` found: how each leaf is used, with its axes. Without it Flax's conventions decide.

    Returns:
      The tree with a `LoraParam` for each targeted kernel and a `TrainableParam` for each leaf trained in full. For a
      kernel with axes (batch..., in..., out...) lora_a is (batch..., in..., rank) and lora_b (batch..., rank, out...).

    Raises:
      ValueError: if a pattern matches nothing, a kernel's axes are ambiguous, its type is no floating one, or the rank
        is larger than the kernel.
      TypeError: if the tree is wrapped already.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> wrapped = jlora.wrap(params, jlora.LoraSpec(rank=2))
      >>> wrapped["dense"]["kernel"].lora_a.shape, wrapped["dense"]["kernel"].lora_b.shape
      ((4, 2), (2, 3))

    References:
      Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
    """
    if not isinstance(spec, LoraSpec):
        raise TypeError(f"wrap: spec must be a jlora.LoraSpec, found {type(spec).__name__}")
    paths, leaves, treedef = flatten(params, is_node)
    for path, leaf in zip(paths, leaves, strict=True):
        if is_node(leaf):
            raise TypeError(
                f"wrap: {path} is wrapped already ({type(leaf).__name__}); use jlora.merge or jlora.unwrap on the tree "
                "first, or put all targets into one spec"
            )
    found = sites_of(sites, paths)
    by_path = dict(zip(paths, leaves, strict=True))
    targets, full = select(params, by_path, spec, found)
    key = jax.random.key(spec.seed) if key is None else key

    def node(path: str, leaf: Any) -> Any:
        if path in targets:
            axes, kind = kernel_axes(path, by_path, spec, found)
            return _lora(path, leaf, spec.at(path), axes, kind, key)
        return TrainableParam(leaf) if path in full else leaf

    return treedef.unflatten([node(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])


def _lora(path: str, base: Any, spec: LoraSpec, axes: Axes, kind: str, key: jax.Array) -> LoraParam:
    _check(path, base, spec, axes)
    shape = lambda which: tuple(base.shape[axis] for axis in which)
    init = spec.init if callable(spec.init) else inits.embedding if kind == "embedding" else inits.INITS[spec.init]
    make = functools.partial(
        _factors, init, shape(axes.batch_axis), shape(axes.in_axis), shape(axes.out_axis), spec.rank,
        spec.dtype or jnp.float32,
    )  # fmt: skip
    placement = sharding.of_factors(base, axes)
    seed = zlib.crc32(path.encode())
    lora_a, lora_b = sharding.place(lambda: make(jax.random.fold_in(key, seed)), placement, base)
    return LoraParam(base, lora_a, lora_b, axes=axes, scale=spec.scale, dropout=float(spec.dropout))


def _factors(init: Any, batch: Any, ins: Any, outs: Any, rank: int, dtype: Any, key: jax.Array) -> Any:
    """One pair of factors for each place of the batch axes."""

    def make(key: Any) -> Any:
        lora_a, lora_b = init(key, ins, outs, rank, dtype)
        if lora_a.shape != (*ins, rank) or lora_b.shape != (rank, *outs):
            raise ValueError(
                f"wrap: init must return factors of shapes {(*ins, rank)} and {(rank, *outs)}, "
                f"found {lora_a.shape} and {lora_b.shape}"
            )
        return lora_a, lora_b

    if not batch:
        return make(key)
    lora_a, lora_b = jax.vmap(make)(jax.random.split(key, math.prod(batch)))
    return lora_a.reshape(*batch, *lora_a.shape[1:]), lora_b.reshape(*batch, *lora_b.shape[1:])


def _check(path: str, base: Any, spec: LoraSpec, axes: Axes) -> None:
    if not jnp.issubdtype(base.dtype, jnp.floating):
        raise ValueError(
            f"wrap: {path} has dtype {jnp.dtype(base.dtype).name}; factors need a floating-point kernel. Exclude it, "
            "or cast it first"
        )
    every = (*axes.batch_axis, *axes.in_axis, *axes.out_axis)
    if sorted(every) != list(range(len(base.shape))) or not axes.in_axis or not axes.out_axis:
        raise ValueError(
            f"wrap: {axes} does not fit {path} of shape {tuple(base.shape)}: each of its {len(base.shape)} axes must "
            "stand in one group, and in_axis and out_axis need at least one each"
        )
    sizes = [math.prod(base.shape[axis] for axis in group) for group in (axes.in_axis, axes.out_axis)]
    if 0 in sizes:
        raise ValueError(f"wrap: the kernel {path} of shape {tuple(base.shape)} has no elements; exclude it")
    if spec.rank > min(sizes):
        raise ValueError(
            f"wrap: rank {spec.rank} is larger than {path} of shape {tuple(base.shape)} allows: it maps {sizes[0]} to "
            f"{sizes[1]}, so its rank is at most {min(sizes)}. Lower it with overrides={{{path!r}: {{'rank': "
            f"{min(sizes)}}}}}, exclude it, or train it in full with train=({path!r},)"
        )
