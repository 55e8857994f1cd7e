"""`wrap`: puts the factors next to the kernels."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.checks import check_made
from jlora.conventions import kernel_axes
from jlora.interpret.sites import Site
from jlora.kernel import Kernel
from jlora.layers import chosen_paths, chosen_slices
from jlora.nodes import AdaptedParam, TrainableParam, is_node, is_unit
from jlora.paths import checked_key, flatten
from jlora.placement import Makers
from jlora.qarray import codes
from jlora.select import biases_of, lora_biases, select, sites_of
from jlora.spec import LoraSpec
from jlora.variants.bias import LoraBiasParam
from jlora.variants.tokens import TokensParam


def wrap(params: Any, spec: LoraSpec, *, key: jax.Array | None = None, sites: Mapping[str, Site] | None = None) -> Any:
    """Puts low-rank factors, or what else the variant has, next to each kernel that `spec` targets.

    Pure: it runs under `jax.jit` and `jax.eval_shape`, and on `jax.ShapeDtypeStruct`s, which gives the plan of the
    tree without a byte of it. Each leaf's key comes from its path, so that adding a layer changes no other leaf.

    Args:
      params: any pytree of arrays: dicts, `FrozenDict`, `nnx.State`, Equinox modules, registered dataclasses.
      spec: what to adapt, and how.
      key: a PRNG key for the factors; None takes ``jax.random.key(spec.seed)``.
      sites: what `jlora.sites` found: how each leaf is used, with its axes. Without it Flax's conventions decide.

    Returns:
      The tree with a `LoraParam`, or the variant's own class, for each targeted kernel and a `TrainableParam` for each
      leaf trained in full. For a kernel with axes (batch..., in..., out...) lora_a is (batch..., in..., rank) and
      lora_b (batch..., rank, out...).

    Raises:
      ValueError: if a pattern matches nothing, a kernel's axes are ambiguous, its type is no floating one, the rank is
        larger than the kernel, or the variant does not have such a use of a kernel.
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
    paths, leaves, treedef = flatten(params, is_unit)
    for path, leaf in zip(paths, leaves, strict=True):
        if is_node(leaf):
            raise TypeError(
                f"wrap: {path} is wrapped already ({type(leaf).__name__}); use jlora.merge or jlora.unwrap on the tree "
                "first, or put all targets into one spec"
            )
    by_path = dict(zip(paths, leaves, strict=True))
    found = sites_of(sites, by_path)
    chosen = select(params, by_path, spec, found)
    kernels = {path: _kernel(path, by_path, spec, found) for path in sorted(chosen.targets)}
    kept = chosen_paths(kernels, spec.layers, spec.layers_name, {p for p, k in kernels.items() if k.axes.batch_axis})
    kernels = {path: _of_layers(kernels[path], by_path[path]) for path in kept}
    biases = lora_biases(by_path, kernels) if spec.lora_bias else {}
    full = chosen.full | (biases_of(by_path, kernels, spec.bias) - {*biases})
    root = jax.random.key(spec.seed) if key is None else checked_key("wrap: key", key)
    makers = Makers()

    def node(path: str, leaf: Any) -> Any:
        if path in kernels:
            return adapt(leaf, kernels[path], root, makers)
        if path in biases:
            return lora_bias(leaf, biases[path], makers)
        if path in chosen.tokens:
            return trained_tokens(path, leaf, chosen.tokens[path], makers)
        return TrainableParam(leaf) if path in full else leaf

    return treedef.unflatten([node(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])


def adapt(base: Any, kernel: Kernel, root: jax.Array, makers: Makers) -> AdaptedParam:
    """The node of one kernel, its arrays placed as the base is; its key comes from `root` and its path."""
    make = lambda base, key: _bare(kernel.spec.node.create(base, kernel, key))
    is_planned = isinstance(codes(base), jax.ShapeDtypeStruct)
    key = root if is_planned else jax.random.fold_in(root, zlib.crc32(kernel.path.encode()))
    node = _beside(base, makers(dataclasses.replace(kernel, path=""), make, base, key))
    check_made(kernel.path, node)
    return node


def lora_bias(base: Any, kernel: Kernel, makers: Makers) -> AdaptedParam:
    """The node of a bias, with the scale of the kernel beside it."""
    make = lambda base: _bare(LoraBiasParam.create(base, kernel))
    return _beside(base, makers((LoraBiasParam, kernel.spec), make, base))


def trained_tokens(path: str, base: Any, tokens: Sequence[int], makers: Makers) -> AdaptedParam:
    """The node of a table of which some rows train."""
    make = lambda base: _bare(TokensParam.of(path, base, tokens))
    return _beside(base, makers((TokensParam, tokens), make, base))


def _bare(node: Any) -> Any:
    return dataclasses.replace(node, base=None)


def _beside(base: Any, node: Any) -> Any:
    return dataclasses.replace(node, base=base)


def _kernel(path: str, leaves: Mapping[str, Any], spec: LoraSpec, sites: Mapping[str, Site] | None) -> Kernel:
    axes, kind = kernel_axes(path, leaves, spec, sites)
    return Kernel(path, tuple(leaves[path].shape), axes, kind, spec.at(path))


def _of_layers(kernel: Kernel, base: Any) -> Kernel:
    """The kernel, if it can be adapted, with the layers of it that are."""
    _check(kernel, base.dtype)
    spec, batch = kernel.spec, kernel.axes.batch_axis
    layers = chosen_slices(kernel.path, spec.layers, spec.layers_name, kernel.shape[batch[0]]) if batch else None
    return dataclasses.replace(kernel, layers=layers)


def _check(kernel: Kernel, dtype: Any) -> None:
    path, shape, axes, spec = kernel.path, kernel.shape, kernel.axes, kernel.spec
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"wrap: {path} has dtype {jnp.dtype(dtype).name}; factors need a floating-point kernel. Exclude it, "
            "or cast it first"
        )
    every = (*axes.batch_axis, *axes.in_axis, *axes.out_axis)
    if sorted(every) != list(range(len(shape))) or not axes.in_axis or not axes.out_axis:
        raise ValueError(
            f"wrap: {axes} does not fit {path} of shape {shape}: each of its {len(shape)} axes must "
            "stand in one group, and in_axis and out_axis need at least one each"
        )
    if kernel.kind not in spec.node.KINDS:
        raise ValueError(
            f"wrap: {spec.variant_name} adapts no {kernel.kind}, but {path} of shape {shape} is one (it adapts "
            f"{', '.join(spec.node.KINDS)}). Exclude it, or give it another variant with overrides={{{path!r}: "
            "{'variant': 'lora'}}"
        )
    sizes = [kernel.size("in"), kernel.size("out")]
    if 0 in sizes:
        raise ValueError(f"wrap: the kernel {path} of shape {shape} has no elements; exclude it")
    if "init" in spec.node.SETTINGS and spec.rank > min(sizes):
        raise ValueError(
            f"wrap: rank {spec.rank} is larger than {path} of shape {shape} allows: it maps {sizes[0]} to "
            f"{sizes[1]}, so its rank is at most {min(sizes)}. Lower it with overrides={{{path!r}: {{'rank': "
            f"{min(sizes)}}}}}, exclude it, or train it in full with train=({path!r},)"
        )
