"""Functions of an adapted NNX model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jlora import report
from jlora import tree as trees
from jlora.apply import apply
from jlora.interpret.sites import Site
from jlora.nnx.calls import Path, nested, nodes_of, tree_of
from jlora.nnx.module import Adapted, Part
from jlora.nnx.variables import as_variables, is_variable
from jlora.nodes.node import TrainableParam, is_node, is_unit
from jlora.spec import LoraSpec
from jlora.wrap import wrap as wrap_tree


def wrap(
    model: nnx.Module,
    spec: LoraSpec,
    *,
    key: jax.Array | None = None,
    sites: Mapping[str, Site] | None = None,
    fallback: str = "warn",
    native_dots: bool = False,
    strategy: str = "auto",
) -> Adapted:
    """Adapts a model of NNX: what it returns is called and trained as the model was.

    The adapters, and what the spec trains in full, are `nnx.LoRAParam` variables; those of the base keep their types
    and their bits. `nnx.jit`, `nnx.grad`, `nnx.split`, `nnx.Optimizer`, Orbax and meshes take it as any other module.
    A call runs the unchanged model by `jlora.apply`. Names of axes for sharding are handed on to the factors. Gradients
    go to `nnx.LoRAParam` variables and to inputs, and are zero for other parameters: an optimizer with
    ``wrt=nnx.Param`` would have them decay.

    Args:
      model: any `nnx.Module`. It stays as it is; arrays are shared with it, not copied.
      spec: what to adapt; paths are those of ``nnx.state(model, nnx.Param)``, as in ``"layers/0/q/kernel"``.
      key: a PRNG key for the factors; None takes ``jax.random.key(spec.seed)``.
      sites: what `jlora.nnx.sites` found, for kernels whose use does not follow Flax's conventions.
      fallback, native_dots, strategy: as in `jlora.apply`.

    Returns:
      The adapted model. Dropout of the adapters is on, as NNX has it, until ``model.eval()``.

    Raises:
      TypeError: if `model` is no `nnx.Module`, or is adapted already.
      ValueError: as `jlora.wrap` and `jlora.apply` do.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> from flax import nnx
      >>> model = jlora.nnx.wrap(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jlora.LoraSpec(rank=2))
      >>> model(jnp.ones((5, 4))).shape
      (5, 3)
      >>> [variable.shape for variable in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))]
      [(4, 2), (2, 3)]
    """
    _check_model(model)
    apply(_check_model, fallback=fallback, strategy=strategy)  # checks them
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    try:
        wrapped = wrap_tree(nnx.as_pure(params), spec, key=key, sites=sites)
    except ValueError as error:
        error.add_note("of an NNX model: jlora.nnx.wrap(model, spec, sites=jlora.nnx.sites(model, *args))")
        of_tree = "Trace the function, jlora.wrap(params, spec, sites=jlora.sites(fn, params, *args))"
        of_model = "Trace the model, jlora.nnx.wrap(model, spec, sites=jlora.nnx.sites(model, *args))"
        error.args = (str(error).replace(of_tree, of_model),)
        raise
    settings = {"native_dots": native_dots, "merged": strategy == "merged"}
    given = {"rngs": _stream(wrapped, spec.seed), "fallback": fallback, "settings": settings}
    return _adapted(graphdef, params, rest, wrapped, given)


def merge(model: Adapted, *, dtype: Any = None, everything: bool = False, donate: bool = False) -> Any:
    """Folds the adapters into the kernels, and gives the plain model of its own class.

    Args:
      model: the adapted model, which stays as it is.
      dtype, everything, donate: as in `jlora.merge`.

    Returns:
      A model of the class that was wrapped.

    Raises:
      TypeError: if the model is not adapted.
      ValueError: as `jlora.merge` does.

    Example:
      >>> import jlora
      >>> from flax import nnx
      >>> model = jlora.nnx.wrap(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jlora.LoraSpec(rank=2))
      >>> type(jlora.nnx.merge(model)).__name__
      'Linear'
    """
    merged = trees.merge(tree(_checked("merge", model)), dtype=dtype, everything=everything, donate=donate)
    return _plain(model, merged)


def unwrap(model: Adapted) -> Any:
    """Drops the adapters: the plain model of its own class, bit for bit.

    What was trained in full keeps its trained values.

    Args:
      model: the adapted model, which stays as it is.

    Returns:
      A model of the class that was wrapped.

    Raises:
      TypeError: if the model is not adapted.

    Example:
      >>> import jlora
      >>> from flax import nnx
      >>> plain = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> again = jlora.nnx.unwrap(jlora.nnx.wrap(plain, jlora.LoraSpec(rank=2)))
      >>> bool((again.kernel[...] == plain.kernel[...]).all())
      True
    """
    return _plain(_checked("unwrap", model), trees.unwrap(tree(model)))


def tree(model: Adapted) -> Any:
    """The wrapped tree of the model's parameters, for all that takes one: `jlora.peft.save`, `jlora.summary`, ...

    Args:
      model: the adapted model.

    Returns:
      A wrapped tree with the paths of ``nnx.state(model, nnx.Param)``; arrays are shared with the model. `update` gives
      the model another one.

    Raises:
      TypeError: if the model is not adapted.

    Example:
      >>> import jlora
      >>> from flax import nnx
      >>> model = jlora.nnx.wrap(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jlora.LoraSpec(rank=2))
      >>> jlora.nnx.tree(model)["kernel"].lora_a.shape
      (4, 2)
    """
    return tree_of(_checked("tree", model))


def update(model: Adapted, tree: Any) -> None:
    """Gives the model the values of a wrapped tree, as `tree` returned it and `jlora` or an optimizer changed it.

    Variables stay the same objects, so that an `nnx.Optimizer` goes on with them. A tree with other adapters, of
    another rank for example, makes new variables.

    Args:
      model: the adapted model, which is changed.
      tree: a wrapped tree of the same parameters.

    Raises:
      TypeError: if the model is not adapted, or nothing in the tree is wrapped.
      ValueError: if the tree's paths or shapes are not those of the model's parameters.

    Example:
      >>> import jax, jlora
      >>> from flax import nnx
      >>> model = jlora.nnx.wrap(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jlora.LoraSpec(rank=1))
      >>> jlora.nnx.update(model, jlora.adapters.resize(jlora.nnx.tree(model), 2))
      >>> [variable.shape for variable in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))]
      [(4, 2), (2, 3)]
    """
    if not trees.has_nodes(tree):
        raise TypeError("nnx.update takes a wrapped tree, as jlora.nnx.tree(model) is; of this one no leaf is wrapped")
    now, new = _flat(tree_of(_checked("update", model))), _flat(tree)
    _check_alike(now, new)
    graphdef, params, rest = nnx.split(model.base_model, nnx.Param, ...)
    if any(_kind(now[path]) != _kind(new[path]) for path in now):
        plain = _with_values(params, {path: _base(x) for path, x in new.items()}, dict(model.lora_types))
        settings = {"fallback": model.lora_fallback, "settings": dict(model.lora_settings)}
        model.lora_rngs = nnx.data(model.lora_rngs or _stream(tree, 0))
        made = _adapted(graphdef, plain, rest, tree, {"rngs": model.lora_rngs, **settings})
        model.base_model, model.lora_params, model.lora_types = made.base_model, made.lora_params, made.lora_types
        return
    for path, node in nodes_of(model).items():
        for variable, x in zip(_variables(node), jax.tree.leaves(_bare(new[path])), strict=True):
            variable.set_value(x)
    for path, variable in nnx.to_flat_state(nnx.variables(model.base_model, nnx.Param)):
        variable.set_value(_base(new[path]))


def sites(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
    """How ``model(*args, **kwargs)`` uses each parameter, as `jlora.sites` tells it: for the `sites` of `wrap`.

    Args:
      model: any `nnx.Module` that is not adapted.
      *args, **kwargs: of the call; arrays may be of type `jax.ShapeDtypeStruct`.

    Returns:
      For each leaf's path how it is used; it prints as a table.

    Raises:
      TypeError: if `model` is no `nnx.Module`, or is adapted already.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> from flax import nnx
      >>> jlora.nnx.sites(nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0)), jnp.ones((5, 4)))
      path    shape   kind  uses  in    out
      kernel  (4, 3)  dot   1     (0,)  (1,)
    """
    graphdef, params, rest = nnx.split(_check_model(model), nnx.Param, ...)
    call = lambda params, *args, **kwargs: nnx.merge(graphdef, params, nnx.as_pure(rest))(*args, **kwargs)
    return report.sites(call, nnx.as_pure(params), *args, **kwargs)


def _adapted(graphdef: Any, params: Any, rest: Any, wrapped: Any, settings: Mapping[str, Any]) -> Adapted:
    """An adapted model from the parts of a plain one, and the wrapped tree of its parameters."""
    variables = dict(nnx.to_flat_state(params))
    nodes = {path: x for path, x in _flat(wrapped).items() if is_node(x)}
    full = [path for path, node in nodes.items() if isinstance(node, TrainableParam)]
    adapters = {path: as_variables(node, variables[path]) for path, node in nodes.items() if path not in full}
    trained = _with_values(params, {path: nodes[path].base for path in full}, dict.fromkeys(full, nnx.LoRAParam))
    types = [(path, type(variables[path])) for path in full]
    return Adapted(nnx.merge(graphdef, trained, nnx.as_pure(rest)), nested(adapters), types=types, **settings)


def _stream(wrapped: Any, seed: int) -> nnx.Rngs | None:
    """That of the adapters' dropout, if any kernel has some."""
    has_dropout = any(getattr(node, "dropout", 0) for node in jax.tree.leaves(wrapped, is_leaf=is_node))
    return nnx.Rngs(lora=seed) if has_dropout else None


def _plain(model: Adapted, params: Any) -> Any:
    """The model of its own class, with these values."""
    graphdef, variables, rest = nnx.split(model.base_model, nnx.Param, ...)
    return nnx.merge(graphdef, _with_values(variables, _flat(params), dict(model.lora_types)), nnx.as_pure(rest))


def _with_values(state: Any, values: Mapping[Path, Any], types: Mapping[Path, type]) -> Any:
    """A state whose variables have these values, and where a type is given, that type."""

    def made(path: Path, variable: Any) -> Any:
        value = values.get(path, variable.get_value())
        kind = types.get(path)
        return variable.replace(value) if kind is None else kind(value, **variable.get_metadata())

    return nnx.from_flat_state([(path, made(path, variable)) for path, variable in nnx.to_flat_state(state)])


def _flat(tree: Any) -> dict[Path, Any]:
    keys = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_unit)[0]
    return {tuple(getattr(key, "key", getattr(key, "name", None)) for key in path): x for path, x in keys}


def _base(x: Any) -> Any:
    return x.base if is_node(x) else x


def _bare(x: Any) -> Any:
    return dataclasses.replace(x, base=None) if is_node(x) else None


def _variables(node: Any) -> list[Any]:
    return jax.tree.leaves(node, is_leaf=is_variable)


def _kind(x: Any) -> Any:
    """What two nodes that differ in their values alone have in common."""
    return (jax.tree.structure(x), [y.shape for y in jax.tree.leaves(x)]) if is_node(x) else None


def _check_alike(now: Mapping[Path, Any], new: Mapping[Path, Any]) -> None:
    for path in sorted({*now} ^ {*new}, key=str):
        where = "the model" if path in now else "the tree"
        raise ValueError(f"nnx.update: {_told(path)} is in {where} alone; it takes a tree of the model's parameters")
    for path, x in now.items():
        if x.shape != new[path].shape:
            raise ValueError(f"nnx.update: {_told(path)} has shape {x.shape}, that of the tree {new[path].shape}")


def _told(path: Path) -> str:
    return "/".join(map(str, path))


def _checked(name: str, model: Any) -> Any:
    if not isinstance(model, Adapted):
        raise TypeError(f"nnx.{name} takes a model that jlora.nnx.wrap returned, found {type(model).__name__}")
    return model


def _check_model(model: Any) -> Any:
    if isinstance(model, (Adapted, Part)):
        raise TypeError("nnx: the model is adapted already; jlora.nnx.merge or unwrap gives the plain one")
    if not isinstance(model, nnx.Module):
        raise TypeError(f"nnx: the model must be a flax.nnx.Module, found {type(model).__name__}; trees: jlora.wrap")
    return model
