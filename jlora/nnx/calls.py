"""A call of a model with its adapters: one run of `jlora.apply`, whose changes of the model's state are handed back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jlora.apply import Settings, applied
from jlora.interpret.factored import Factored
from jlora.nnx.unchanged import unchanged
from jlora.nnx.variables import MergedParam, as_node, is_variable, value_of
from jlora.nodes.node import TrainableParam, is_node
from jlora.nodes.qarray import dense

_TAG = "jlora.nnx"
_RESULT = 3  # beside the model, args and kwargs, where 0 is the model

Path = tuple[Any, ...]


def nodes_of(adapted: Any) -> dict[Path, Any]:
    """The adapters by the path of their kernel; None for a leaf that is trained in full."""
    found = jax.tree_util.tree_flatten_with_path(adapted.lora_params, is_leaf=is_node)[0]
    return {tuple(key.key for key in keys): node for keys, node in found} | {
        path: None for path, _ in adapted.lora_types
    }


def nested(by_path: Mapping[Path, Any]) -> Any:
    """The inverse of `nodes_of`: dicts within dicts."""
    tree: dict[Any, Any] = {}
    for path, x in by_path.items():
        at = tree
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = x
    return tree


def tree_of(adapted: Any) -> Any:
    """The wrapped tree: the model's parameters as `nnx.state` has them, with a node for each that is adapted."""
    nodes = nodes_of(adapted)

    def joined(path: Path, value: Any) -> Any:
        if path not in nodes:
            return value
        return TrainableParam(value) if nodes[path] is None else as_node(nodes[path], value)

    params = nnx.to_flat_state(nnx.state(adapted.base_model, nnx.Param))
    return nnx.from_flat_state([(path, joined(path, value_of(x))) for path, x in params])


def merged_param(adapted: Any, variable: Any) -> Any:
    """A variable of the model as it is read outside of a call: that of an adapted kernel has its adapter."""
    nodes = nodes_of(adapted)
    paths = nnx.to_flat_state(nnx.variables(adapted.base_model, nnx.Param))
    path = next((path for path, x in paths if x is variable and nodes.get(path) is not None), None)
    if path is None:
        return variable
    value = as_node(nodes[path], dense(variable.get_value())).effective("/".join(map(str, path)), None)
    return MergedParam(value.dense() if isinstance(value, Factored) else value, **variable.get_metadata())


def run(adapted: Any, fn: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """``fn(model, *args, **kwargs)`` with the adapters: what it changes in the model or in its arguments is changed."""
    nodes = nodes_of(adapted)
    rng = adapted.lora_rngs.lora() if adapted.lora_rngs is not None and not adapted.lora_deterministic else None
    settings = Settings(rng=rng, **dict(adapted.lora_settings))
    after: list[Any] = []

    def on_bases(bases: Any) -> Any:
        params = {(0, *path): x for path, x in nnx.to_flat_state(bases)}
        values = before | params
        with nnx.merge_context(_TAG, inner=True) as context:
            model, args, kwargs = context.unflatten(graphdef, _flat_state(values))
        given = nnx.graphdef((model, args, kwargs))
        result = fn(model, *args, **kwargs)
        is_same = nnx.graphdef((model, args, kwargs)) == given
        with nnx.split_context(_TAG) as context:
            structure, leaves = context.flatten((model, args, kwargs, result))
        kept, made = _sorted_out(values, leaves)
        handed_on = _handed_on(fn, lambda now: _merged(graphdef, before | now), params, made.keys() & params.keys())
        kept |= {path: path for path in handed_on}
        made = {path: x for path, x in made.items() if path not in handed_on}
        _check_assigned([path[1:] for path in made if path[0] == 0 and nodes.get(path[1:]) is not None])
        if is_same and not any(path[0] != _RESULT for path in made) and not _has_objects(result):
            return result, None
        after[:] = [structure, kept, [*made]]
        return None, [*made.values()]

    with nnx.update_context(_TAG):
        with nnx.split_context(_TAG) as context:
            graphdef, leaves = context.flatten((adapted.base_model, args, kwargs))
        before = {path: _raw(x) for path, x in zip(leaves.paths, leaves.leaves, strict=True)}
        result, made = applied(on_bases, adapted.lora_fallback, settings)(tree_of(adapted))
        if not after:  # nothing changed
            return result
        structure, kept, paths = after
        values = {path: before[source] for path, source in kept.items()} | dict(zip(paths, made, strict=True))
        with nnx.merge_context(_TAG, inner=False) as context:
            return context.unflatten(structure, _flat_state(values))[_RESULT]


def _merged(graphdef: Any, values: Mapping[Path, Any]) -> Any:
    with nnx.merge_context() as context:
        return context.unflatten(graphdef, _flat_state(values))


def _sorted_out(values: Mapping[Path, Any], leaves: Any) -> tuple[dict[Path, Path], dict[Path, Any]]:
    """Which of the values that were given each leaf still is, but for results; and the leaves that are new."""
    known = {id(x): path for path, x in values.items() if isinstance(x, (jax.Array, np.ndarray))}
    found = {path: _raw(x) for path, x in zip(leaves.paths, leaves.leaves, strict=True)}
    kept = {path: known[id(x)] for path, x in found.items() if path[0] != _RESULT and id(x) in known}
    return kept, {path: x for path, x in found.items() if path not in kept}


def _handed_on(call: Callable[..., Any], part: Any, params: Mapping[Path, Any], paths: set[Path]) -> set[Path]:
    """Which of these parameters a call hands on as they were, through loops that give back the modules they are given.

    Args:
      call: a function of a model and the rest of its arguments.
      part: from values by path to these arguments.
      params: the model's parameters.
      paths: of the parameters that are other arrays after the call.
    """
    if not paths:
        return set()

    def after(*arrays: Any) -> list[Any]:
        now = dict(zip(params, arrays, strict=True))
        model, args, kwargs = part(now)
        call(model, *args, **kwargs)
        with nnx.split_context() as context:
            leaves = context.flatten((model,))[1]
        found = {path: _raw(x) for path, x in zip(leaves.paths, leaves.leaves, strict=True)}
        return [found.get(path, x) if path in paths else x for path, x in now.items()]

    same = unchanged(after, [*params.values()])
    return {path for path, is_same in zip(params, same, strict=True) if is_same} & paths


def _raw(x: Any) -> Any:
    return x.get_raw_value() if is_variable(x) else x


def _flat_state(values: Mapping[Path, Any]) -> Any:
    order = sorted(values, key=lambda path: tuple((isinstance(key, str), key) for key in path))
    return nnx.FlatState.from_sorted_keys_values(tuple(order), [values[path] for path in order])


def _has_objects(x: Any) -> bool:
    is_object = lambda x: isinstance(x, (nnx.Pytree, nnx.Variable))
    return any(map(is_object, jax.tree.leaves(x, is_leaf=is_object)))


def _check_assigned(paths: list[Path]) -> None:
    if paths:
        raise TypeError(
            f"jlora.nnx: the call assigns to {'/'.join(map(str, paths[0]))}, which is adapted; leave it out by "
            "LoraSpec(exclude=...), or train it in full"
        )
