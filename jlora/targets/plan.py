"""The plan: what becomes of each leaf. A spec is resolved into it once; `jlora.wrap` then makes leaf by leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jlora.interpret.sites import Site
from jlora.nodes.axes import Axes
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam
from jlora.spec import LoraSpec
from jlora.targets.conventions import kernel_axes
from jlora.targets.layers import Name, chosen_slices, in_layers, layered
from jlora.targets.paths import module_of
from jlora.targets.select import biases_beside, biases_of, select, sites_of


class Adapted(NamedTuple):
    """A kernel that gets factors, or what else its variant has."""

    node: type[AdaptedParam]
    kernel: Kernel


class WithBias(NamedTuple):
    """A bias that gets one of its own beside it, at the scale of its kernel."""

    kernel: Kernel


class WithRows(NamedTuple):
    """A table of which some rows train."""

    tokens: tuple[int, ...]


class InFull(NamedTuple):
    """A leaf that trains as it is."""


Becomes = Adapted | WithBias | WithRows | InFull


def resolve(
    params: Any, leaves: Mapping[str, Any], spec: LoraSpec, sites: Mapping[str, Site] | None
) -> dict[str, Becomes]:
    """What becomes of each leaf that a spec names, by path; the others stay.

    Args:
      params: the tree.
      leaves: its leaves by path.
      spec: what the user asks for.
      sites: what `jlora.sites` found, or None.

    Raises:
      ValueError: as `jlora.wrap` does.
    """
    sites = sites_of(sites, leaves)
    chosen = select(params, leaves, spec, sites)
    adapted = _adapted(chosen.targets, leaves, spec, sites)
    beside = biases_beside(leaves, adapted) if spec.lora_bias else {}
    full = chosen.full | (biases_of(leaves, adapted, spec.bias) - {*beside})
    if spec.bias != "all":
        _check_slices(full | {*beside}, adapted, leaves, spec)
    return {
        **{path: InFull() for path in full},
        **{path: WithRows(tuple(tokens)) for path, tokens in chosen.tokens.items()},
        **{bias: WithBias(adapted[path].kernel) for bias, path in beside.items()},
        **adapted,
    }


def _check_slices(paths: Iterable[str], adapted: Mapping[str, Adapted], leaves: Mapping[str, Any], spec: LoraSpec):
    """Refuses a leaf that would train in all layers of a stack of which some are adapted."""
    stacks = {module_of(path): of.kernel for path, of in adapted.items() if of.kernel.layers is not None}
    for path in sorted(paths):
        kernel = stacks.get(module_of(path))
        if kernel is not None and leaves[path].shape[:1] == kernel.shape[:1]:
            raise ValueError(
                f"wrap: layers={list(spec.layers or ())} adapts these of {kernel.path}, but {path} beside it stacks "
                f"{kernel.shape[0]} layers in one array, all of which would train. Leave it frozen (bias='none', no "
                "lora_bias, not in train), adapt all layers, or unroll them"
            )


def _adapted(
    targets: Iterable[str], leaves: Mapping[str, Any], spec: LoraSpec, sites: Mapping[str, Site] | None
) -> dict[str, Adapted]:
    """The targets in the layers that the spec names."""
    layers, name = spec.layers, spec.layers_name
    axes = {path: kernel_axes(path, leaves, spec.axes, sites) for path in sorted(in_layers(targets, layers, name))}
    kept = layered(axes, layers, name, {path for path, (of, _) in axes.items() if of.batch_axis})
    return {path: _of_leaf(path, leaves[path], *axes[path], spec.at(path)) for path in kept}


def _of_leaf(path: str, leaf: Any, axes: Axes, kind: str, spec: LoraSpec) -> Adapted:
    """What becomes of one target, the overrides for it put into the spec."""
    kernel = Kernel(path, tuple(leaf.shape), axes, kind, spec.kernel)
    _check(kernel, leaf.dtype, spec)
    return Adapted(spec.node, dataclasses.replace(kernel, layers=_slices(kernel, spec.layers, spec.layers_name)))


def _slices(kernel: Kernel, layers: Sequence[int] | None, name: Name) -> tuple[int, ...] | None:
    batch = kernel.axes.batch_axis
    return chosen_slices(kernel.path, layers, name, kernel.shape[batch[0]]) if batch else None


def _check(kernel: Kernel, dtype: Any, spec: LoraSpec) -> None:
    """Refuses a kernel that the variant, or any adapter, can't adapt."""
    path, shape, axes = kernel.path, kernel.shape, kernel.axes
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"wrap: {path} has dtype {jnp.dtype(dtype).name}; factors need a floating-point kernel. Exclude it, "
            "or cast it first"
        )
    every = (*axes.batch_axis, *axes.in_axis, *axes.out_axis)
    if sorted(every) != list(range(len(shape))) or not axes.in_axis or not axes.out_axis:
        raise ValueError(
            f"wrap: {axes} does not fit {path} of shape {shape}: each of its {len(shape)} axes must "
            "stand in one group, by its number from 0, and in_axis and out_axis need at least one each"
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
