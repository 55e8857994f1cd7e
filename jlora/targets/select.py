"""From a spec's patterns to the leaves they name."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.interpret.sites import Site
from jlora.nodes.qarray import is_qarray
from jlora.spec import LoraSpec
from jlora.targets.conventions import is_bias, is_kernel, is_linear, is_output_layer
from jlora.targets.paths import flatten, module_of
from jlora.targets.patterns import Pattern, is_of_modules, matcher, may_match_nothing, nearest

ALL_LINEAR = "all-linear"
Sites = Mapping[str, Site]


class Selection(NamedTuple):
    """Paths by what becomes of them: kernels to adapt, leaves to train in full, tables with rows to train."""

    targets: set[str]
    full: set[str]
    tokens: Mapping[str, Sequence[int]]


def select(params: Any, by_path: Mapping[str, Any], spec: LoraSpec, sites: Sites | None) -> Selection:
    """Finds what a spec names.

    Raises:
      ValueError: if a pattern matches nothing (the message names the nearest paths), the targets and `train` name the
        same leaf, or nothing is left.
    """
    paths = list(by_path)
    excluded = _matched("exclude", spec.exclude, paths)
    full = _matched("train", spec.train, paths)
    tokens = {path: ids for pattern, ids in spec.train_tokens.items() for path in _tables(pattern, by_path)}
    _matched("axes", spec.axes, paths)
    kernels = {path for path in paths if is_kernel(path, by_path[path], sites) or _has_axes(path, by_path[path], spec)}
    targets: set[str] = set()
    if not isinstance(spec.targets, str):
        targets = _named(params, paths, by_path, kernels, spec, excluded, sites) - excluded
        _disjoint("targets", targets, "train", full)
        _disjoint("targets", targets, "train_tokens", {*tokens})
    if spec.targets == ALL_LINEAR or (isinstance(spec.targets, tuple) and ALL_LINEAR in spec.targets):
        linear = {path for path in kernels if is_linear(path, by_path[path], sites) and not is_output_layer(path)}
        targets |= linear - full - excluded - {*tokens}
    _disjoint("train", full, "train_tokens", {*tokens})
    if not targets and not full and not tokens and spec.bias != "all":
        but = f" but exclude={_shown(spec.exclude)}" if spec.exclude else ""
        raise ValueError(
            f"wrap: no leaf is a kernel of targets={_shown(spec.targets)}{but}. "
            f"The tree's leaves are {_some(paths)}. Kernels of other names than kernel and w are found by "
            "jlora.wrap(params, spec, sites=jlora.sites(fn, params, *args)), or name them in targets"
        )
    _check_overrides(spec.overrides, paths, targets)
    for path in sorted(full | {*tokens}):
        _check_trainable(path, by_path[path])
    return Selection(targets, full, tokens)


def _has_axes(path: str, leaf: Any, spec: LoraSpec) -> bool:
    """Whether the spec says a leaf's axes: by its own name, or by its module's and with as many axes as it has."""
    for pattern, axes in spec.axes.items():
        count = len((*axes.in_axis, *axes.out_axis, *axes.batch_axis))
        found = matcher(pattern)(path)
        if found == "leaf" or (found == "module" and len(getattr(leaf, "shape", ())) == count):
            return True
    return False


def sites_of(sites: Sites | None, leaves: Mapping[str, Any]) -> Sites | None:
    """The sites keyed as the leaves are, if they were traced on ``{"params": params}``, say."""
    paths = [path for path, leaf in leaves.items() if hasattr(leaf, "shape")]
    if sites is None or all(path in sites for path in paths):
        return sites
    if any(path in sites for path in paths):
        missing = [path for path in paths if path not in sites]
        raise ValueError(
            f"wrap: sites do not have {_some(missing)}, which the parameters have: they are of another tree, or of a "
            "part of this one. Call jlora.sites with the tree that is wrapped as its second argument"
        )
    prefixes = {name.removesuffix(paths[0]) for name in sites if name.endswith("/" + paths[0])}
    for prefix in prefixes:
        if all(prefix + path in sites for path in paths):
            return {path: sites[prefix + path] for path in paths}
    raise ValueError(
        f"wrap: sites are of another tree: they have paths such as {_some(sites)}, the parameters {_some(paths)}. Call "
        "jlora.sites with the tree that is wrapped as its second argument"
    )


def _named(
    params: Any,
    paths: Sequence[str],
    by_path: Mapping[str, Any],
    kernels: set[str],
    spec: LoraSpec,
    excluded: set[str],
    sites: Sites | None,
) -> set[str]:
    if isinstance(spec.targets, tuple):
        patterns = [pattern for pattern in spec.targets if pattern != ALL_LINEAR]
        _check_uses(_matched("targets", patterns, paths) - kernels - excluded, by_path, sites)
        return _patterns(patterns, paths, kernels)
    if callable(spec.targets):
        named = {path for path in paths if spec.targets(path, by_path[path])}
    else:
        named = _marked(params, spec.targets)
    _check_uses(named - kernels, by_path, sites)
    for path in sorted(named - kernels):
        shape = tuple(getattr(by_path[path], "shape", ()))
        raise ValueError(
            f"wrap: {path} of shape {shape} is a target but no kernel (which has two axes or more, and is no bias and "
            "no norm's scale); leave it out, or say its axes with axes={...}"
        )
    return named


def _check_uses(named: set[str], by_path: Mapping[str, Any], sites: Sites | None) -> None:
    """Refuses a matrix that targets name and that the function uses in another way than as a kernel."""
    for path in sorted(named):
        leaf = by_path[path]
        if sites is not None and sites[path].uses and is_kernel(path, leaf, None):
            raise ValueError(
                f"wrap: {path} of shape {tuple(leaf.shape)} is a target, but its use tells no axes: "
                f"{sites[path].describe()}. Exclude it, exclude=({path!r},), or say its axes, "
                f"LoraSpec(axes={{{path!r}: jlora.Axes(in_axis, out_axis)}}): where no rule keeps its factors it is "
                "computed densely then"
            )


def _patterns(patterns: Iterable[Pattern], paths: Sequence[str], kernels: set[str]) -> set[str]:
    """The kernels among the leaves that a pattern names; the biases beside them are not meant."""
    named: set[str] = set()
    for pattern in patterns:
        matched = _matched("targets", [pattern], paths)
        if not matched & kernels:
            raise ValueError(
                f"wrap: the target {_shown(pattern)} matches {_some(sorted(matched))}, none of which is a kernel of at "
                "least two axes; train such leaves in full with train=(...) or bias=..."
            )
        named |= matched & kernels
    return named


def _marked(params: Any, marks: Any) -> set[str]:
    """The paths at which a tree of booleans is true."""
    paths, _, treedef = flatten(params)
    try:
        flags = jax.tree.broadcast(marks, params)
    except ValueError as error:
        raise ValueError(
            f"wrap: targets is a tree whose structure is not that of the parameters: {error}. Give patterns, a "
            "function (path, leaf) -> bool, or a tree of booleans made by jax.tree.map over the parameters"
        ) from None
    flags = treedef.flatten_up_to(flags)
    for path, flag in zip(paths, flags, strict=True):
        if not isinstance(flag, bool):
            raise ValueError(f"wrap: targets has {flag!r} at {path}; a tree of targets holds True or False")
    return {path for path, flag in zip(paths, flags, strict=True) if flag}


def _matched(setting: str, patterns: Iterable[Pattern], paths: Sequence[str]) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        hits = set(filter(matcher(pattern), paths))
        if not hits and not may_match_nothing(pattern):
            raise ValueError(
                f"wrap: the pattern {_shown(pattern)} in {setting} matches no leaf. Nearest: "
                f"{_some(nearest(pattern, paths))}"
            )
        matched |= hits
    return matched


def _check_overrides(patterns: Iterable[Pattern], paths: Sequence[str], targets: set[str]) -> None:
    """Refuses an override of nothing; those by modules' names come from `LoraSpec.from_peft`, where PEFT allows it."""
    for pattern in itertools.filterfalse(is_of_modules, patterns):
        if not (matched := _matched("overrides", [pattern], paths)) & targets:
            raise ValueError(
                f"wrap: the pattern {_shown(pattern)} in overrides names {_some(sorted(matched))}, none of which is a "
                f"target; targets are {_some(sorted(targets))}"
            )


def _check_trainable(path: str, leaf: Any) -> None:
    if is_qarray(leaf):
        raise ValueError(
            f"wrap: {path} can't train in full, or some of its rows, since it is quantised; take it out of the targets "
            "of jlora.quant.quantize with exclude=..., or of what trains"
        )
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        found = jnp.dtype(dtype).name if dtype is not None else repr(leaf)
        raise ValueError(f"wrap: {path} can't train, since it is {found}, not floating; take it out of train")


def _disjoint(one: str, paths: set[str], other: str, others: set[str]) -> None:
    if both := sorted(paths & others):
        raise ValueError(f"wrap: {_some(both)} stands both in {one} and in {other}; one of them is to decide")


def biases_of(leaves: Mapping[str, Any], targets: Iterable[str], mode: str) -> set[str]:
    """The biases that train: of no layer, of all, or of those whose kernels are adapted.

    Raises:
      ValueError: if there is none.
    """
    if mode == "none":
        return set()
    modules = {module_of(path) for path in targets}
    meant = lambda path: mode == "all" or module_of(path) in modules
    biases = {path for path, leaf in leaves.items() if is_bias(path, leaf) and meant(path)}
    if not biases:
        raise ValueError(f"wrap: bias={mode!r}, but the tree has no such bias: leaves are {_some(leaves)}")
    return biases - {*targets}


def biases_beside(leaves: Mapping[str, Any], kernels: Iterable[str]) -> dict[str, str]:
    """The bias beside each adapted kernel, and the kernel that it belongs to.

    Raises:
      ValueError: if a kernel has none.
    """
    biases = {module_of(path): path for path, leaf in leaves.items() if is_bias(path, leaf)}
    if bare := sorted(path for path in kernels if module_of(path) not in biases):
        raise ValueError(f"wrap: lora_bias=True needs a bias beside each target, but {_some(bare)} has none")
    return {biases[module_of(path)]: path for path in kernels}


def _tables(pattern: str, leaves: Mapping[str, Any]) -> set[str]:
    """The embedding tables that a pattern names."""
    matched = _matched("train_tokens", [pattern], list(leaves))
    tables = {path for path in matched if len(getattr(leaves[path], "shape", ())) == 2}
    if not tables:
        raise ValueError(
            f"wrap: the pattern {_shown(pattern)} in train_tokens names {_some(sorted(matched))}, none of which is a "
            "table of shape (tokens, features)"
        )
    return tables


def _shown(value: Any) -> str:
    return repr(getattr(value, "pattern", value))


def _some(names: Iterable[str], count: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
