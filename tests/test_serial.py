"""Nodes in files of `flax.serialization` and of `jax.export`."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState
from jax import export

import jlora
from jlora import serial
from jlora.variants import VARIANTS
from tests.support import error, randomised, same_bits
from tests.variants.cases import OPTIONS

OLD = pathlib.Path(__file__).parent / "data" / "wrapped_v1.msgpack"
PARAMS = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}, "head": jnp.ones((4, 2))}
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)


def fn(params, x):
    return (x @ params["dense"]["kernel"] + params["dense"]["bias"]) @ params["head"]


def tree_of(std=0.5, **settings):
    return randomised(
        jlora.wrap(PARAMS, jlora.LoraSpec(**{"rank": 2, "targets": "kernel", "train": "head"} | settings)), std
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_of_flax_give_every_bit_back(variant):
    tree = tree_of(variant=variant, options=OPTIONS.get(variant, {}))
    fresh = jax.tree.map(jnp.zeros_like, tree)
    back = serialization.from_bytes(fresh, serialization.to_bytes(tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert jax.tree.all(jax.tree.map(same_bits, back, tree))
    assert jax.tree.all(
        jax.tree.map(same_bits, serialization.from_state_dict(fresh, serialization.to_state_dict(tree)), tree)
    )


def test_a_train_state():
    tree = tree_of()
    tx = jlora.optimizer(optax.adamw(0.1), tree)
    state = TrainState.create(apply_fn=None, params=tree, tx=tx)
    grads = jlora.grad(lambda p: (jlora.apply(fn)(p, X) ** 2).mean())(tree)
    state = state.apply_gradients(grads=grads)
    fresh = TrainState.create(apply_fn=None, params=tree_of(std=0.1), tx=tx)
    back = serialization.from_bytes(fresh, serialization.to_bytes(state))
    assert back.step == 1 and jax.tree.all(jax.tree.map(same_bits, back.params, state.params))
    again = back.apply_gradients(grads=grads).params, state.apply_gradients(grads=grads).params
    assert jax.tree.all(jax.tree.map(same_bits, *again))


def test_halves_with_holes():
    trainable, _ = jlora.partition(tree_of())
    back = serialization.from_bytes(jax.tree.map(jnp.zeros_like, trainable), serialization.to_bytes(trainable))
    assert jax.tree.structure(back) == jax.tree.structure(trainable)
    assert jax.tree.all(jax.tree.map(same_bits, back, trainable))


@pytest.mark.parametrize(
    "other, told",
    [
        ({"alpha": 3.0}, "differs in scale"),
        ({"variant": "dora"}, "expected a DoraParam, found a LoraParam"),
        ({"dropout": 0.1}, "differs in dropout"),
    ],
)
def test_what_does_not_fit_is_refused(other, told):
    data = serialization.to_bytes(tree_of())
    with pytest.raises(ValueError, match=told):
        serialization.from_bytes(tree_of(**other), data)


def test_a_plain_tree_is_refused():
    with pytest.raises(ValueError, match="expected the state of a LoraParam"):
        serialization.from_bytes(tree_of(), serialization.to_bytes(PARAMS))


def test_an_old_file_is_read():
    """Written by version 1: the names of its fields are fixed."""
    fresh = jlora.wrap(PARAMS, jlora.LoraSpec(rank=2, targets="kernel", train="head"))
    found = serialization.from_bytes(fresh, OLD.read_bytes())["dense"]["kernel"]
    assert same_bits(found.lora_a, jnp.arange(16.0).reshape(8, 2)) and same_bits(found.lora_b, -jnp.ones((2, 4)))
    assert jlora.Axes(0, 1) == found.axes and found.scale == 8.0


def test_a_later_version_is_refused():
    state = serialization.to_state_dict(tree_of())
    state["dense"]["kernel"]["jlora"] = state["dense"]["kernel"]["jlora"].replace('"version": 1', '"version": 2')
    with pytest.raises(ValueError, match="version 2 was written by a later jlora"):
        serialization.from_state_dict(tree_of(), state)


@pytest.mark.parametrize(
    "settings", [{}, {"variant": "dora"}, {"variant": "oft", "rank": 2}, {"dropout": 0.1}], ids=str
)
def test_an_exported_function_takes_a_wrapped_tree(settings):
    tree = tree_of(**settings)
    step = jax.jit(jlora.apply(fn))
    blob = export.export(step)(tree, X).serialize()
    again = export.deserialize(blob)
    assert again.in_tree == jax.tree.structure(((tree, X), {}))
    assert error(again.call(tree, X), step(tree, X)) <= 1e-6


def test_an_exported_gradient_with_a_stack_and_a_table():
    params = {"layers": {"kernel": jnp.ones((3, 6, 6))}, "table": jnp.ones((5, 6))}
    axes = {"table": jlora.Axes(0, 1), "layers/kernel": jlora.Axes((1,), (2,), (0,))}
    tree = jlora.wrap(params, jlora.LoraSpec(rank=2, targets=[*axes], axes=axes, overrides={"layers": {"rank": 3}}))

    def run(p, ids):
        return jnp.square(jax.lax.scan(lambda x, k: (x @ k, None), p["table"][ids], p["layers"]["kernel"])[0]).mean()

    loss = lambda tree: jlora.apply(run)(tree, jnp.arange(2))
    gradient = jax.jit(jlora.grad(loss))
    again = export.deserialize(export.export(gradient)(tree).serialize())
    assert jax.tree.structure(again.call(tree)) == jax.tree.structure(gradient(tree))


def test_a_quantised_tree_is_exported():
    params = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(64, 32)), jnp.float32)}
    tree = jlora.wrap(jlora.quant.quantize(params, "int8"), jlora.LoraSpec(rank=2))
    step = jax.jit(jlora.apply(lambda p, x: x @ p["kernel"]))
    x = jnp.ones((2, 64))
    assert error(export.deserialize(export.export(step)(tree, x).serialize()).call(tree, x), step(tree, x)) <= 1e-6


def test_a_class_of_ones_own():
    from jlora.nodes.fields import trained

    class Shift(jlora.AdaptedParam):
        base: jax.Array
        shift: jax.Array = trained("out")

        def effective(self, name, key):
            return self.base + self.shift

    cls = serial.register(jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, eq=False)(Shift)))
    node = cls(jnp.ones((2, 3)), jnp.arange(3.0))
    back = serialization.from_bytes(cls(jnp.zeros((2, 3)), jnp.zeros(3)), serialization.to_bytes(node))
    assert same_bits(back.shift, node.shift)
    exported = export.export(jax.jit(lambda tree: tree.shift.sum()))(node).serialize()
    assert export.deserialize(exported).call(node) == 3
