"""The nodes of a wrapped tree as variables of NNX, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from jlora.nodes.fields import leaf_fields
from jlora.nodes.node import AdaptedParam
from jlora.nodes.placement import node_specs

_NAMES_OF_AXES = ("out_sharding", "sharding_names", "sharding")
_OF_PLACES = ("mesh", "eager_sharding", "sharding_rules")


class FrozenParam(nnx.Variable):
    """A variable of NNX for what an adapter has that does not train.

    It is no `nnx.Param`, so that no optimizer of parameters takes it. LoRA-FA's A is one, and VeRA's two matrices.

    Example:
      >>> import jax, jlora
      >>> from flax import nnx
      >>> spec = jlora.LoraSpec(variant="lora_fa", rank=2)
      >>> model = jlora.nnx.wrap(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), spec)
      >>> [variable.shape for variable in jax.tree.leaves(nnx.state(model, jlora.nnx.FrozenParam))]
      [(4, 2)]
    """


class MergedParam(nnx.Param):
    """An adapted kernel as it is read outside of a call: computed, with its adapter, so it can't be assigned to."""

    def set_value(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "jlora.nnx: an adapted kernel that is read from the model is computed, W + s A B; assign to the variables "
            "of model.base_model and model.lora_params, or give jlora.nnx.update(model, tree)"
        )


def as_variables(node: AdaptedParam, beside: nnx.Variable) -> AdaptedParam:
    """The node without its base, its arrays in variables whose axes are named as those of the base's variable are."""
    given: Any = node
    bare, names = dataclasses.replace(given, base=None), _metadata(node, beside)
    made = {}
    for field in leaf_fields(bare):
        kind = nnx.LoRAParam if field.metadata.get("trained") else FrozenParam
        arrays, spots = jax.tree.flatten(getattr(bare, field.name))
        metadata = names.get(field.name, [{}] * len(arrays))
        made[field.name] = spots.unflatten([kind(x, **of) for x, of in zip(arrays, metadata, strict=True)])
    return dataclasses.replace(bare, **made)


def _metadata(node: Any, beside: nnx.Variable) -> dict[str, list[dict[str, Any]]]:
    """For each field the metadata of its variables: the names of their axes, where the base's has names."""
    given = beside.get_metadata()
    name = next((name for name in _NAMES_OF_AXES if given.get(name)), None)
    if name is None:
        return {}
    is_spec = lambda x: isinstance(x, PartitionSpec)
    specs = node_specs(node, tuple(node.shape), PartitionSpec(*given[name]))
    kept = {key: given[key] for key in _OF_PLACES if key in given}
    make = lambda spec: {name: spec if is_spec(given[name]) else tuple(spec)} | kept
    fields = [field.name for field in leaf_fields(node) if field.name != "base"]
    return {key: [make(s) for s in jax.tree.leaves(getattr(specs, key), is_leaf=is_spec)] for key in fields}


def is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def value_of(x: Any) -> Any:
    """What a variable holds, as it is."""
    return x.get_value() if is_variable(x) else x


def as_node(variables: Any, base: Any) -> AdaptedParam:
    """The inverse of `as_variables`."""
    return dataclasses.replace(jax.tree.map(value_of, variables, is_leaf=is_variable), base=base)
