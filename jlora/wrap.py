"""`wrap`: puts the factors next to the kernels."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax

from jlora.interpret.sites import Site
from jlora.nodes.checks import check_made
from jlora.nodes.makers import Makers
from jlora.nodes.node import AdaptedParam, TrainableParam, is_node, is_unit
from jlora.nodes.qarray import codes
from jlora.spec import LoraSpec
from jlora.targets.paths import checked_key, flatten_named
from jlora.targets.plan import Adapted, Becomes, InFull, WithBias, WithRows, resolve
from jlora.variants.bias import LoraBiasParam
from jlora.variants.tokens import TokensParam


def wrap(params: Any, spec: LoraSpec, *, key: jax.Array | None = None, sites: Mapping[str, Site] | None = None) -> Any:
    """Puts low-rank factors, or what else the variant has, next to each kernel that `spec` targets.

    Pure: it runs under `jax.jit` and `jax.eval_shape`, and on arrays of type `jax.ShapeDtypeStruct`, which gives the
    plan of the tree without a byte of it. Each leaf's key comes from its path, so that adding a layer changes no other
    leaf.

    Args:
      params: any pytree of arrays: dicts, `FrozenDict`, `nnx.State`, Equinox modules, registered dataclasses.
      spec: the `jlora.LoraSpec`, which says what is adapted, and how.
      key: a PRNG key for the factors; None takes ``jax.random.key(spec.seed)``.
      sites: what `jlora.sites` found: how each leaf is used, with its axes. Without it Flax's conventions decide.

    Returns:
      The tree with a `LoraParam`, or the variant's own class, for each targeted kernel and a `TrainableParam` for each
      leaf trained in full. For a kernel with axes (batch..., in..., out...) lora_a is (batch..., in..., rank) and
      lora_b (batch..., rank, out...).

    Raises:
      ValueError: if a pattern matches nothing, two leaves have one path, a kernel's axes are ambiguous, its type is no
        floating one, the rank is larger than the kernel, or the variant does not have such a use of a kernel.
      TypeError: if the tree is wrapped already, or an ``nnx.Module``, `spec` is no `LoraSpec`, or `key` is not one
        PRNG key.

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
    if any(f"{cls.__module__}.{cls.__name__}".endswith("nnx.module.Module") for cls in type(params).__mro__):
        raise TypeError(
            "wrap takes a tree of parameters, and this is an nnx.Module: jlora.nnx.wrap(model, spec) adapts it. The "
            "functional way splits it first: graphdef, params, rest = nnx.split(model, nnx.Param, ...)"
        )
    paths, leaves, treedef = flatten_named("wrap", params, is_unit)
    _check_plain(paths, leaves)
    plan = resolve(params, dict(zip(paths, leaves, strict=True)), spec, sites)
    root = jax.random.key(spec.seed) if key is None else checked_key("wrap: key", key)
    makers = Makers()
    made = [_become(path, leaf, plan.get(path), root, makers) for path, leaf in zip(paths, leaves, strict=True)]
    return treedef.unflatten(made)


def _check_plain(paths: list[str], leaves: list[Any]) -> None:
    for path, leaf in zip(paths, leaves, strict=True):
        if is_node(leaf):
            raise TypeError(
                f"wrap: {path} is wrapped already ({type(leaf).__name__}); use jlora.merge or jlora.unwrap on the tree "
                "first, or put all targets into one spec"
            )


def _become(path: str, leaf: Any, becomes: Becomes | None, root: jax.Array, makers: Makers) -> Any:
    """The leaf, or the node that takes its place."""
    match becomes:
        case Adapted():
            return adapt(leaf, becomes, root, makers)
        case WithBias(kernel):
            make = lambda base: _bare(LoraBiasParam.create(base, kernel))
            return _beside(leaf, makers((LoraBiasParam, kernel.spec), make, leaf))
        case WithRows(tokens):
            make = lambda base: _bare(TokensParam.of(path, base, tokens))
            return _beside(leaf, makers((TokensParam, tokens), make, leaf))
        case InFull():
            return TrainableParam(leaf)
    return leaf


def adapt(base: Any, adapted: Adapted, root: jax.Array, makers: Makers) -> AdaptedParam:
    """The node of one kernel, its arrays placed as the base is; its key comes from `root` and its path."""
    node, kernel = adapted
    make = lambda base, key: _bare(node.create(base, kernel, key))
    is_planned = isinstance(codes(base), jax.ShapeDtypeStruct)
    key = root if is_planned else jax.random.fold_in(root, zlib.crc32(kernel.path.encode()))
    made = _beside(base, makers((node, dataclasses.replace(kernel, path="")), make, base, key))
    check_made(kernel.path, made)
    return made


def _bare(node: Any) -> Any:
    return dataclasses.replace(node, base=None)


def _beside(base: Any, node: Any) -> Any:
    return dataclasses.replace(node, base=base)
