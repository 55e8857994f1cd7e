"""Adapters that are trained together are trained as each would be alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import adapters
from tests.adapters.support import base, family, forward
from tests.support import compiled, error, flops, same_bits, thinned

PARAMS = base()
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 4, 5, 8)), jnp.float32)  # of each adapter its own data
Y = jnp.asarray(RNG.normal(size=(3, 4, 5, 6)), jnp.float32)
RATES = jnp.asarray([1e-2, 3e-3, 0.0])
adam = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, weight_decay=0.1)


def step(trainable, state, frozen, x, y):
    def loss(half):
        return jnp.mean((jlora.apply(forward)(jlora.combine(half, frozen), x) - y) ** 2)

    value, grads = jax.value_and_grad(loss)(trainable)
    updates, state = adam.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state, value


def together(trees, steps=3):
    """Trains all in one program; the trees, and the losses of each step."""
    trainable, frozen = jlora.partition(adapters.stack(trees))
    axes = adapters.axes(trainable)
    state = jax.vmap(adam.init, in_axes=(axes,))(trainable)
    state.hyperparams["learning_rate"] = jnp.copy(RATES)  # it is donated
    of_all = jax.jit(
        jax.vmap(step, in_axes=(axes, 0, adapters.axes(frozen), 0, 0), out_axes=(axes, 0, 0)), donate_argnums=(0, 1)
    )
    losses = []
    for _ in range(steps):
        trainable, state, values = of_all(trainable, state, frozen, X, Y)
        losses.append(values)
    return adapters.unstack(jlora.combine(trainable, frozen)), jnp.stack(losses), of_all


def alone(tree, i, steps=3):
    trainable, frozen = jlora.partition(tree)
    state = adam.init(trainable)
    state.hyperparams["learning_rate"] = RATES[i]
    losses = []
    for _ in range(steps):
        trainable, state, value = jax.jit(step)(trainable, state, frozen, X[i], Y[i])
        losses.append(value)
    return jlora.combine(trainable, frozen), jnp.stack(losses)


@pytest.mark.parametrize("name", thinned(2, ["lora", "pissa", "dora", "vera", "ia3", "lokr", "oft"]))
def test_each_is_trained_as_if_alone(name):
    """With ranks, scales, targets, layers, data and learning rates of its own; a rate of zero stops one."""
    trees = family(PARAMS, name)[:3]
    found, losses, program = together(trees)
    for i, tree in enumerate(trees):
        want, told = alone(tree, i)
        assert error(losses[:, i], told) < 1e-5, i
        assert error(jlora.merge(found[i]), jlora.merge(want)) < 2e-4, i
        assert same_bits(jlora.unwrap(found[i]), PARAMS)
    assert same_bits(found[2], trees[2])
    assert program._cache_size() == 1


def test_vmap_over_the_first_axis_where_there_are_no_layers():
    """Adapters that differ in nothing but their numbers need no tree of axes."""
    params = {"w": {"kernel": jnp.eye(8, 6)}}
    trees = [jlora.wrap(params, jlora.LoraSpec(targets="w/kernel", rank=2, seed=seed)) for seed in range(3)]
    trainable, frozen = jlora.partition(adapters.stack(trees))
    call = jlora.apply(lambda p, x: x @ p["w"]["kernel"])
    run = jax.vmap(lambda half, x: call(jlora.combine(half, frozen), x))
    assert run(trainable, X[:, 0]).shape == (3, 5, 6)


def test_one_half_alone_taken_apart_is_refused():
    trees = family(PARAMS, "lora")[:3]
    trainable, frozen = jlora.partition(adapters.stack(trees))
    run = lambda half, x: jlora.apply(forward)(jlora.combine(half, frozen), x)
    with pytest.raises(ValueError, match=r"some arrays .* are stacked and some are not.*adapters.axes\(frozen\)"):
        jax.vmap(run, in_axes=(adapters.axes(trainable), 0))(trainable, X)


def test_another_axis_than_that_of_the_adapters_is_refused():
    """Behind the layers of a scan: 0 would take these apart."""
    layers = adapters.stack(family(PARAMS, "lora")[:2])["layers"]
    call = lambda layers: jlora.apply(forward)({"layers": layers, "head": PARAMS["head"]}, X[0])
    with pytest.raises(ValueError, match=r"jax.vmap took another axis than that of the adapters"):
        jax.vmap(call, in_axes=(jax.tree.map(lambda _: 0, adapters.axes(layers)),))(layers)


def test_eight_at_once_cost_what_one_costs_for_each_example():
    wide = {"w": {"kernel": jnp.zeros((256, 256))}, "v": {"kernel": jnp.zeros((256, 256))}}
    fn = lambda p, x: jnp.tanh(x @ p["w"]["kernel"]) @ p["v"]["kernel"]
    trees = [jlora.wrap(wide, jlora.LoraSpec(rank=8, seed=seed)) for seed in range(8)]

    def grads(half, frozen, x):
        return jax.grad(lambda half: jnp.sum(jlora.apply(fn)(jlora.combine(half, frozen), x) ** 2))(half)

    x = jax.ShapeDtypeStruct((8, 64, 256), jnp.float32)
    halves = jlora.partition(adapters.stack(trees))
    axes = [adapters.axes(half) for half in halves]
    every = flops(compiled(jax.vmap(grads, in_axes=(*axes, 0), out_axes=axes[0]), *halves, x))
    one = flops(compiled(grads, *jlora.partition(trees[0]), jax.ShapeDtypeStruct((64, 256), jnp.float32)))
    assert every / 8 < 1.02 * one
