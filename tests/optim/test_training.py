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
from tests.optim.support import at, noisy, stepped, trained
from tests.support import same_bits


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def first_zero(x: np.ndarray) -> np.ndarray:
    """With zeros whose sign an addition loses."""
    x[0] = -0.0
    return x


PARAMS = {
    "dense": {"kernel": first_zero(normal(6, 5)), "bias": np.full(5, -0.0, np.float32)},
    "head": {"kernel": normal(5, 2)},
    "scale": first_zero(normal(6)),
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
    return noisy(PARAMS, LoraSpec(rank=2, targets="dense/kernel", train="head"))


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
WHOLE, HOLES = jax.jit(jax.grad(loss)), jax.jit(jlora.grad(loss))
OPTIMIZERS = {
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.5),
    "clipped_inside": optax.chain(optax.clip_by_global_norm(0.01), optax.adamw(0.1, weight_decay=0.5)),
    "multi_steps_inside": optax.MultiSteps(optax.adamw(0.1, weight_decay=0.5), 2),
}
PAIRS = [*zip(OPTIMIZERS, [WHOLE, HOLES, WHOLE, HOLES], strict=True)]
ADD = jax.jit(optax.apply_updates)


def train(tx: Any, tree: Any, gradient: Callable[[Any], Any] = HOLES, steps: int = 3) -> Any:
    """A loop whose gradient, update and addition are each compiled by itself."""
    state, update = jax.jit(tx.init)(tree), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(gradient(tree), state, tree)
        tree = ADD(tree, updates)
    return tree


def assert_close(x: Any, y: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), x, y)


# -------------------------------------------------------------------------------- frozen means frozen


@pytest.mark.parametrize("name, gradient", PAIRS, ids=OPTIMIZERS)
def test_frozen_leaves_keep_every_bit(name, gradient):
    after = train(jlora.optimizer(OPTIMIZERS[name], wrapped()), wrapped(), gradient)
    assert same_bits(frozen_half(after), frozen_half(wrapped()))
    assert all_changed(wrapped(), after)


@pytest.mark.parametrize(
    "name", ["adamw", *(pytest.param(x, marks=pytest.mark.slow) for x in OPTIMIZERS if x != "adamw")]
)
def test_gradients_with_holes_of_the_whole_tree_and_of_the_half_train_alike(name):
    """In a step compiled whole."""
    before, half = wrapped(), trainable_half(wrapped())
    whole, of_half = (jlora.optimizer(OPTIMIZERS[name], tree) for tree in (before, half))

    @jax.jit
    def runs(before: Any, half: Any) -> Any:
        with_gradient = lambda tx, tree, gradient: at(trained(tx, tree, gradient, 3), -1)
        return (
            with_gradient(whole, before, jlora.grad(loss)),
            with_gradient(whole, before, jax.grad(loss)),
            with_gradient(of_half, half, jax.grad(loss_of_the_half)),
        )

    holes, of_all, halved = runs(before, half)
    assert_close(of_all, holes)
    assert_close(halved, trainable_half(holes))


@pytest.mark.parametrize("gradient", [jlora.grad(loss), jax.grad(loss)], ids=["with_holes", "of_the_whole_tree"])
def test_clipping_outside_and_inside_is_by_the_norm_of_what_trains(gradient):
    clip, sgd = optax.clip_by_global_norm(0.01), optax.sgd(1.0)
    outside = optax.chain(clip, jlora.optimizer(sgd, wrapped()))
    inside = jlora.optimizer(optax.chain(clip, sgd), wrapped())

    @jax.jit
    def steps(tree: Any) -> Any:
        grads = gradient(tree)
        return [stepped(tx, tree, tx.init(tree), grads)[0] for tx in (outside, inside)]

    for after in steps(wrapped()):
        assert same_bits(frozen_half(after), frozen_half(wrapped()))
        np.testing.assert_allclose(distance(after, wrapped()), 0.01, rtol=1e-4)


def test_multi_steps_outside():
    tx = optax.MultiSteps(jlora.optimizer(optax.sgd(0.1), wrapped()), 2)
    assert same_bits(frozen_half(train(tx, wrapped(), WHOLE)), frozen_half(wrapped()))


def test_updates_that_are_not_finite_are_skipped_inside():
    tx = jlora.optimizer(optax.apply_if_finite(optax.sgd(0.1), 3), wrapped())
    nans = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), HOLES(wrapped()))
    step = jax.jit(lambda tree, grads: stepped(tx, tree, tx.init(tree), grads)[0])
    assert same_bits(step(wrapped(), nans), wrapped())


def test_a_step_compiled_whole():
    before = wrapped()
    tx = jlora.optimizer(optax.adamw(0.1, weight_decay=0.5), before)

    @jax.jit
    def step(tree, state):
        value, grads = jlora.value_and_grad(loss)(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    tree, state, values = before, jax.jit(tx.init)(before), []
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


def test_frozen_leaves_of_any_type_keep_the_bits_that_an_addition_changes_too():
    before = wrapped() | ODD | FLUSHED
    after = train(jlora.optimizer(optax.sgd(0.1), before), before, steps=1)
    assert [name for name in ODD | FLUSHED if not same_bits(after[name], before[name])] == []


def test_gradients_of_integers_are_taken_and_left():
    before = wrapped() | {"step": np.int32(3)}
    tx = jlora.optimizer(optax.sgd(0.1), before)
    step = lambda tree: stepped(tx, tree, tx.init(tree), jax.grad(loss, allow_int=True)(tree))[0]
    after = jax.jit(step)(before)
    assert same_bits(after["step"], before["step"])
    assert all_changed(wrapped(), {name: after[name] for name in wrapped()})


# -------------------------------------------------------------------------------- state


def test_the_state_is_that_of_a_multi_transform():
    """Of each of the optimizers."""
    plain = lambda tx: tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx
    by_hand = lambda tx: optax.multi_transform({"trainable": plain(tx), "frozen": optax.set_to_zero()}, jlora.labels)
    states = lambda wrap: jax.jit(lambda tree: {name: wrap(tx).init(tree) for name, tx in OPTIMIZERS.items()})(
        wrapped()
    )
    ours, expected = states(lambda tx: jlora.optimizer(plain(tx), wrapped())), states(by_hand)
    for name in OPTIMIZERS:
        assert jax.tree.structure(ours[name]) == jax.tree.structure(expected[name])
        assert same_bits(jax.tree.leaves(ours[name]), jax.tree.leaves(expected[name]))


@pytest.mark.parametrize("ratio", [None, 16.0])
def test_adam_holds_two_copies_of_what_trains_and_nothing_else(ratio):
    state = jax.eval_shape(jlora.optimizer(optax.adam(0.1), wrapped(), b_lr_ratio=ratio).init, wrapped())
    trainable = sum(leaf.nbytes for leaf in jax.tree.leaves(trainable_half(wrapped())))
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in moments) == 2 * trainable
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(state) if not leaf.ndim)


def test_the_state_of_shapes():
    tx = jlora.optimizer(optax.adam(0.1), jax.eval_shape(wrapped))
    state = jax.eval_shape(tx.init, jax.eval_shape(wrapped))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * (6 * 2 + 2 * 5 + 5 * 2) + 1


def test_extra_arguments_reach_the_optimizer():
    halve = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = jlora.optimizer(optax.chain(optax.sgd(1.0), halve), wrapped())

    def step(state: Any, _: None) -> Any:
        updates, state = tx.update(grads, state, wrapped(), value=1.0)
        return state, jnp.abs(updates["head"]["kernel"].base).max()

    grads = HOLES(wrapped())
    sizes = jax.jit(lambda: jax.lax.scan(step, tx.init(wrapped()), None, 3)[1])()
    assert list(sizes) == [sizes[0], sizes[0] / 2, sizes[0] / 4]


# -------------------------------------------------------------------------------- LoRA+


def test_the_ratio_scales_the_updates_of_lora_b_exactly():
    tree, grads = wrapped(), HOLES(wrapped())
    ratios = [16.0, 3.0, 0.5]
    once, *scaled = updates_with([None, *ratios], optax.sgd(0.125), grads, tree)
    for ratio, updates in zip(ratios, scaled, strict=True):
        expected = once["dense"]["kernel"].lora_b * np.float32(ratio)
        np.testing.assert_array_equal(updates["dense"]["kernel"].lora_b, expected)
        assert same_bits(updates["dense"]["kernel"].lora_a, once["dense"]["kernel"].lora_a)
        assert same_bits(updates["head"]["kernel"].base, once["head"]["kernel"].base)
        assert same_bits(frozen_half(optax.apply_updates(tree, updates)), frozen_half(tree))


def updates_with(ratios: list[float | None], tx: optax.GradientTransformation, grads: Any, tree: Any) -> Any:
    """The updates of an optimizer with each of the ratios, as numpy."""
    ours = [jlora.optimizer(tx, tree, b_lr_ratio=ratio) for ratio in ratios]
    update = lambda tx, grads, tree: tx.update(grads, tx.init(tree), tree)[0]
    return jax.device_get(jax.jit(lambda *args: [update(tx, *args) for tx in ours])(grads, tree))


def test_the_ratio_keeps_clipping_by_the_norm_of_all_that_trains():
    tx = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    once, scaled = updates_with([None, 2.0], tx, HOLES(wrapped()), wrapped())
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
    """It has None at what is frozen, where the gradient of the whole tree is zero."""

    @jax.jit
    def three_ways(tree: Any) -> Any:
        half, rest = jlora.partition(tree)
        of_half = jax.grad(lambda half: loss(jlora.combine(half, rest)))
        return jlora.grad(loss)(tree), of_half(half), jax.grad(loss)(tree)

    grads, expected, whole = three_ways(wrapped())
    assert same_bits(grads, expected)
    assert jax.tree.structure(grads) == jax.tree.structure(trainable_half(wrapped()))
    assert grads["dense"]["bias"] is None and grads["dense"]["kernel"].base is None
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen_half(whole)))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(trainable_half(whole)))


def test_gradients_pass_arguments_on_and_give_values_and_aux():
    more = {"step": np.int32(3), "key": jax.random.key(0), "none": None}

    @jax.jit
    def all_ways(tree: Any, more: Any) -> Any:
        grads, value = jlora.grad(loss)(tree), loss(tree)
        (value_too, aux), with_value = jlora.value_and_grad(with_aux, has_aux=True)(tree, X)
        with_aux_alone, aux_too = jlora.grad(with_aux, has_aux=True)(tree, X)
        assert aux == aux_too == {"rows": 4, "name": "aux"}
        beside = jax.tree.leaves(jlora.grad(loss)(tree | more))
        passed_on = jlora.grad(loss)(tree, 2 * X, target=3 * Y)
        return {
            "values": (value, jlora.value_and_grad(loss)(tree)[0], value_too),
            "gradients": (grads, jlora.value_and_grad(loss)(tree)[1], with_value, with_aux_alone),
            "leaves beside leaves that have none": (jax.tree.leaves(grads), beside),
            "arguments": (jlora.grad(lambda tree: loss(tree, 2 * X, target=3 * Y))(tree), passed_on),
        }

    found = all_ways(wrapped(), more)
    for first, *others in found.values():
        assert all(same_bits(first, other) for other in others)
    assert not same_bits(found["arguments"][0], found["gradients"][0])


def with_aux(tree: Any, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    return loss(tree, x), {"rows": len(x), "name": "aux"}


def test_gradients_outside_of_jit():
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
        jlora.grad(loss)(wrapped()),
        HOLES(wrapped()),
    )


def test_gradients_keep_the_name_of_the_loss():
    assert jlora.grad(loss).__name__ == jlora.value_and_grad(loss).__name__ == "loss"


# -------------------------------------------------------------------------------- a loop of Flax, errors


def test_a_train_state_of_flax():
    before = wrapped()
    tx = jlora.optimizer(optax.adamw(0.1, weight_decay=0.5), before)
    create = lambda params: TrainState.create(apply_fn=jlora.apply(model), params=params, tx=tx)
    state = jax.jit(create)(before)

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
