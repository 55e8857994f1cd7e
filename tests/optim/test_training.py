"""Training: the optimizer of a wrapped tree, gradients of what trains, and frozen leaves that stay frozen."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import jlora
from jlora import LoraSpec
from tests.support import randomised, same_bits


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


PARAMS = {
    "dense": {"kernel": normal(6, 5).at[0].set(-0.0), "bias": jnp.full(5, -0.0)},
    "head": {"kernel": normal(5, 2)},
    "scale": normal(6).at[0].set(-0.0),
}
X, Y = normal(4, 6), normal(4, 2)


def model(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh((x * params["scale"]) @ params["dense"]["kernel"] + params["dense"]["bias"])
    return hidden @ params["head"]["kernel"]


def loss(params: Any, x: jax.Array = X, *, target: jax.Array = Y) -> jax.Array:
    return jnp.mean((jlora.apply(model)(params, x) - target) ** 2)


@functools.cache
def wrapped() -> Any:
    """An adapted dense kernel, a head trained in full, a bias and a scale that stay."""
    return randomised(jlora.wrap(PARAMS, LoraSpec(rank=2, targets="dense/kernel", train="head")))


def trainable_half(tree: Any) -> Any:
    return jlora.partition(tree)[0]


def frozen_half(tree: Any) -> Any:
    return jlora.partition(tree)[1]


def all_changed(before: Any, after: Any) -> bool:
    pairs = zip(jax.tree.leaves(trainable_half(before)), jax.tree.leaves(trainable_half(after)), strict=True)
    return all(not np.array_equal(x, y) for x, y in pairs)


def distance(before: Any, after: Any) -> float:
    """The norm of the change of what trains."""
    pairs = zip(jax.tree.leaves(trainable_half(before)), jax.tree.leaves(trainable_half(after)), strict=True)
    return float(np.sqrt(sum(np.sum((x - y) ** 2) for x, y in pairs)))


def loss_of_the_half(half: Any) -> jax.Array:
    return loss(jlora.combine(half, frozen_half(wrapped())))


# Each gradient is compiled by itself, apart from the update.
WHOLE, HOLES, HALF = jax.jit(jax.grad(loss)), jax.jit(jlora.grad(loss)), jax.jit(jax.grad(loss_of_the_half))
GRADIENTS = {"of_the_whole_tree": WHOLE, "with_holes": HOLES}
OPTIMIZERS = {
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.5),
    "clipped_inside": optax.chain(optax.clip_by_global_norm(0.01), optax.adamw(0.1, weight_decay=0.5)),
    "multi_steps_inside": optax.MultiSteps(optax.adamw(0.1, weight_decay=0.5), 2),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_gradient = pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)


def train(tx: Any, tree: Any, gradient: Callable[[Any], Any] = HOLES, steps: int = 3) -> Any:
    """A loop whose gradient, update and addition are each compiled by itself."""
    state = tx.init(tree)
    update, add = jax.jit(tx.update), jax.jit(optax.apply_updates)
    for _ in range(steps):
        updates, state = update(gradient(tree), state, tree)
        tree = add(tree, updates)
    return tree


@functools.cache
def trained(name: str, gradient: Callable[[Any], Any]) -> Any:
    before = trainable_half(wrapped()) if gradient is HALF else wrapped()
    return train(jlora.optimizer(OPTIMIZERS[name], before), before, gradient)


def assert_close(x: Any, y: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), x, y)


# -------------------------------------------------------------------------------- frozen means frozen


@every_optimizer
@every_gradient
def test_frozen_leaves_keep_every_bit(name, gradient):
    after = trained(name, gradient)
    assert same_bits(frozen_half(after), frozen_half(wrapped()))
    assert all_changed(wrapped(), after)


@every_optimizer
def test_both_gradients_train_alike(name):
    assert_close(trained(name, WHOLE), trained(name, HOLES))


@every_optimizer
def test_the_trainable_half_trains_alike(name):
    assert_close(trained(name, HALF), trainable_half(trained(name, HOLES)))


@every_gradient
def test_clipping_outside(gradient):
    tx = optax.chain(optax.clip_by_global_norm(0.01), jlora.optimizer(optax.sgd(1.0), wrapped()))
    after = train(tx, wrapped(), gradient, steps=1)
    assert same_bits(frozen_half(after), frozen_half(wrapped()))
    np.testing.assert_allclose(distance(after, wrapped()), 0.01, rtol=1e-4)


@every_gradient
def test_clipping_inside_is_by_the_norm_of_what_trains(gradient):
    tx = jlora.optimizer(optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0)), wrapped())
    np.testing.assert_allclose(distance(train(tx, wrapped(), gradient, steps=1), wrapped()), 0.01, rtol=1e-4)


def test_multi_steps_outside():
    tx = optax.MultiSteps(jlora.optimizer(optax.sgd(0.1), wrapped()), 2)
    assert same_bits(frozen_half(train(tx, wrapped(), WHOLE)), frozen_half(wrapped()))


def test_updates_that_are_not_finite_are_skipped_inside():
    tx = jlora.optimizer(optax.apply_if_finite(optax.sgd(0.1), 3), wrapped())
    nans = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), HOLES(wrapped()))
    updates, _ = tx.update(nans, tx.init(wrapped()), wrapped())
    assert same_bits(optax.apply_updates(wrapped(), updates), wrapped())


def test_schedule_free():
    tx = optax.contrib.schedule_free_adamw(0.1, weight_decay=0.5)
    after = train(jlora.optimizer(tx, wrapped()), wrapped())
    assert same_bits(frozen_half(after), frozen_half(wrapped()))
    assert all_changed(wrapped(), after)


def test_a_step_compiled_whole():
    before = wrapped()
    tx = jlora.optimizer(optax.adamw(0.1, weight_decay=0.5), before)

    @jax.jit
    def step(tree, state):
        value, grads = jlora.value_and_grad(loss)(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    tree, state, values = before, tx.init(before), []
    for _ in range(20):
        tree, state, value = step(tree, state)
        values.append(value)
    assert same_bits(frozen_half(tree), frozen_half(before))
    assert values[-1] < 0.5 * values[0]


ODD = {
    "integers": jnp.arange(3),
    "bytes": jnp.arange(3, dtype=jnp.uint8),
    "booleans": jnp.array([True, False]),
    "float8": jnp.array([-0.0, 0.1], jnp.float8_e4m3fn),
    "float16": jnp.array([-0.0, 1e-7, 1], jnp.float16),
    "infinity": jnp.array([jnp.inf, -jnp.inf]),
    "empty": jnp.zeros((0, 3)),
}
FLUSHED = {
    "subnormals": jnp.asarray(np.array([1, 0x80000001], np.uint32).view(np.float32)),
    "signalling": jnp.asarray(np.array([0x7F800001], np.uint32).view(np.float32)),
    "bfloat16": jnp.asarray(np.array([1], np.uint16).view(jnp.bfloat16)),
    "complex": jnp.asarray(np.array([complex(1, -0.0)], np.complex64)),
}


def test_frozen_leaves_of_any_type_keep_every_bit():
    before = wrapped() | ODD
    after = train(jlora.optimizer(optax.sgd(0.1), before), before, steps=1)
    assert [name for name in ODD if not same_bits(after[name], before[name])] == []


def test_frozen_leaves_keep_the_bits_that_an_addition_changes():
    before = wrapped() | FLUSHED
    after = train(jlora.optimizer(optax.sgd(0.1), before), before, steps=1)
    assert [name for name in FLUSHED if not same_bits(after[name], before[name])] == []


def test_gradients_of_integers_are_taken_and_left():
    before = wrapped() | {"step": jnp.int32(3)}
    tx = jlora.optimizer(optax.sgd(0.1), before)
    updates, _ = tx.update(jax.grad(loss, allow_int=True)(before), tx.init(before), before)
    assert same_bits(optax.apply_updates(before, updates)["step"], before["step"])


# -------------------------------------------------------------------------------- state


@every_optimizer
def test_the_state_is_that_of_a_multi_transform(name):
    tx = OPTIMIZERS[name]
    tx = tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx
    by_hand = optax.multi_transform({"trainable": tx, "frozen": optax.set_to_zero()}, jlora.labels)
    ours = jlora.optimizer(tx, wrapped()).init(wrapped())
    assert jax.tree.structure(ours) == jax.tree.structure(by_hand.init(wrapped()))
    assert same_bits(jax.tree.leaves(ours), jax.tree.leaves(by_hand.init(wrapped())))


@pytest.mark.parametrize("ratio", [None, 16.0])
def test_adam_holds_two_copies_of_what_trains_and_nothing_else(ratio):
    state = jlora.optimizer(optax.adam(0.1), wrapped(), b_lr_ratio=ratio).init(wrapped())
    trainable = sum(leaf.nbytes for leaf in jax.tree.leaves(trainable_half(wrapped())))
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.nbytes for leaf in moments) == 2 * trainable
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(state) if not leaf.ndim)


def test_the_state_of_shapes():
    tx = jlora.optimizer(optax.adam(0.1), jax.eval_shape(wrapped))
    state = jax.eval_shape(tx.init, jax.eval_shape(wrapped))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * (6 * 2 + 2 * 5 + 5 * 2) + 1


def test_extra_arguments_reach_the_optimizer():
    halve = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = jlora.optimizer(optax.chain(optax.sgd(1.0), halve), wrapped())
    state, grads, sizes = tx.init(wrapped()), HOLES(wrapped()), []
    for _ in range(3):
        updates, state = tx.update(grads, state, wrapped(), value=1.0)
        sizes.append(float(jnp.abs(updates["head"]["kernel"].base).max()))
    assert sizes == [sizes[0], sizes[0] / 2, sizes[0] / 4]


# -------------------------------------------------------------------------------- LoRA+


@pytest.mark.parametrize("ratio", [16.0, 3.0, 0.5])
def test_the_ratio_scales_the_updates_of_lora_b_exactly(ratio):
    tree, grads = wrapped(), jlora.grad(loss)(wrapped())
    once, scaled = (update_of(jlora.optimizer(optax.sgd(0.1), tree, b_lr_ratio=r), grads, tree) for r in (None, ratio))
    np.testing.assert_array_equal(scaled["dense"]["kernel"].lora_b, once["dense"]["kernel"].lora_b * np.float32(ratio))
    assert same_bits(scaled["dense"]["kernel"].lora_a, once["dense"]["kernel"].lora_a)
    assert same_bits(scaled["head"]["kernel"].base, once["head"]["kernel"].base)


def update_of(tx: optax.GradientTransformation, grads: Any, tree: Any) -> Any:
    return tx.update(grads, tx.init(tree), tree)[0]


def test_the_ratio_keeps_frozen_leaves():
    after = train(jlora.optimizer(optax.sgd(0.1), wrapped(), b_lr_ratio=16.0), wrapped())
    assert same_bits(frozen_half(after), frozen_half(wrapped()))


def test_the_ratio_keeps_clipping_by_the_norm_of_all_that_trains():
    tree, grads = wrapped(), jlora.grad(loss)(wrapped())
    tx = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    once, scaled = (update_of(jlora.optimizer(tx, tree, b_lr_ratio=ratio), grads, tree) for ratio in (None, 2.0))
    np.testing.assert_allclose(scaled["dense"]["kernel"].lora_a, once["dense"]["kernel"].lora_a, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0, -1.0, float("nan")])
def test_the_ratio_is_a_positive_number(ratio):
    with pytest.raises(ValueError, match="b_lr_ratio must be a positive number"):
        jlora.optimizer(optax.sgd(0.1), wrapped(), b_lr_ratio=ratio)


@pytest.mark.parametrize("ratio", [float("inf"), "16"])
def test_the_ratio_is_a_finite_number(ratio):
    with pytest.raises(ValueError, match="b_lr_ratio must be a positive"):
        jlora.optimizer(optax.sgd(0.1), wrapped(), b_lr_ratio=ratio)


# -------------------------------------------------------------------------------- gradients


def test_grad_is_the_gradient_of_the_trainable_half():
    half, rest = jlora.partition(wrapped())
    expected = jax.grad(lambda half: loss(jlora.combine(half, rest)))(half)
    assert same_bits(jlora.grad(loss)(wrapped()), expected)


def test_grad_has_none_at_what_is_frozen():
    grads = jlora.grad(loss)(wrapped())
    assert jax.tree.structure(grads) == jax.tree.structure(trainable_half(wrapped()))
    assert grads["dense"]["bias"] is None and grads["dense"]["kernel"].base is None


def test_the_gradient_of_the_whole_tree_is_zero_at_what_is_frozen():
    grads = jax.grad(loss)(wrapped())
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen_half(grads)))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(trainable_half(grads)))


def test_value_and_grad_gives_both():
    value, grads = jlora.value_and_grad(loss)(wrapped())
    np.testing.assert_array_equal(value, loss(wrapped()))
    assert same_bits(grads, jlora.grad(loss)(wrapped()))


def test_gradients_pass_arguments_on():
    expected = jlora.grad(lambda tree: loss(tree, 2 * X, target=3 * Y))(wrapped())
    assert same_bits(jlora.grad(loss)(wrapped(), 2 * X, target=3 * Y), expected)


def with_aux(tree: Any, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    return loss(tree, x), {"rows": len(x), "name": "aux"}


def test_value_and_grad_with_aux():
    (value, aux), grads = jlora.value_and_grad(with_aux, has_aux=True)(wrapped(), X)
    assert (value, aux) == (loss(wrapped()), {"rows": 4, "name": "aux"})
    assert same_bits(grads, jlora.grad(loss)(wrapped()))


def test_grad_with_aux():
    grads, aux = jlora.grad(with_aux, has_aux=True)(wrapped(), X)
    assert aux == {"rows": 4, "name": "aux"}
    assert same_bits(grads, jlora.grad(loss)(wrapped()))


def test_gradients_beside_leaves_that_have_none():
    tree = wrapped() | {"step": jnp.int32(3), "key": jax.random.key(0), "none": None}
    grads = jlora.grad(loss)(tree)
    assert same_bits(jax.tree.leaves(grads), jax.tree.leaves(jlora.grad(loss)(wrapped())))


def test_gradients_under_jit():
    jitted, plain = jax.jit(jlora.grad(loss))(wrapped()), jlora.grad(loss)(wrapped())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), jitted, plain)


def test_gradients_keep_the_name_of_the_loss():
    assert jlora.grad(loss).__name__ == jlora.value_and_grad(loss).__name__ == "loss"


# -------------------------------------------------------------------------------- a loop of Flax, errors


def test_a_train_state_of_flax():
    before = wrapped()
    tx = jlora.optimizer(optax.adamw(0.1, weight_decay=0.5), before)
    state = TrainState.create(apply_fn=jlora.apply(model), params=before, tx=tx)

    @jax.jit
    def step(state):
        grads = jlora.grad(lambda params: jnp.mean((state.apply_fn(params, X) - Y) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(3):
        state = step(state)
    assert state.step == 3
    assert same_bits(frozen_half(state.params), frozen_half(before))
    assert all_changed(before, state.params)


def test_an_optimizer_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"no leaf of this tree trains; pass a tree that jlora.wrap returned"):
        jlora.optimizer(optax.sgd(0.1), PARAMS)


def test_an_optimizer_of_the_frozen_half_trains_nothing():
    with pytest.raises(ValueError, match="no leaf of this tree trains"):
        jlora.optimizer(optax.sgd(0.1), frozen_half(wrapped()))


@pytest.mark.parametrize("gradient", [jlora.grad, jlora.value_and_grad])
def test_a_gradient_of_a_plain_tree_is_refused(gradient):
    with pytest.raises(TypeError, match=r"pass jlora\.wrap's result"):
        gradient(loss)(PARAMS)


def test_a_loss_without_apply_says_how():
    with pytest.raises(TypeError, match=r"jlora\.apply"):
        jlora.grad(lambda params: jnp.sum(model(params, X)))(wrapped())
