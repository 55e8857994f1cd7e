"""LoRA dropout: off without a key, of the stated rate with one, drawn anew wherever a kernel is used.

Where the base is zero and both factors are the identity, a product gives the dropped input itself, so that of an
input of ones it gives the mask.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax import lax

import jlora
from tests.support import error, evaluated, randomised, same_bits

N, RATE = 16, 0.4
KEY = jax.random.key(7)
ONES = jnp.ones((32, N))
RNG = np.random.default_rng(0)


def noise(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def show(*stack: int, rate: float = RATE) -> jlora.LoraParam:
    """A kernel, or a stack of them, whose product gives its dropped input."""
    eye = jnp.broadcast_to(jnp.eye(N), (*stack, N, N))
    n = len(stack)
    axes = jlora.Axes((n,), (n + 1,), tuple(range(n)))
    return jlora.LoraParam(0 * eye, eye, eye, axes=axes, scale=1.0, dropout=rate)


def random_node(rate: float = RATE) -> jlora.LoraParam:
    return jlora.LoraParam(noise(N, 5), noise(N, 3), noise(3, 5), axes=jlora.Axes((0,), (1,)), scale=0.7, dropout=rate)


def drop(fn: Callable, params: Any, *args: Any, key: jax.Array = KEY) -> Any:
    return jlora.apply(fn, rng=key, fallback="error")(params, *args)


def dense(p: Any, x: Any) -> Any:
    return x @ p["w"]


def masks_of(fn: Callable, params: Any, *args: Any) -> list[np.ndarray]:
    """What each result of a function of ones kept."""
    return [np.asarray(y) > 0 for y in jax.tree.leaves(evaluated(functools.partial(drop, fn), params, *args))]


def all_differ(masks: Any) -> bool:
    return len({np.asarray(mask).tobytes() for mask in masks}) == len(masks) > 1


# -------------------------------------------------------------------------------- on and off


def test_off_without_a_key():
    wrapped, without = {"w": random_node()}, {"w": random_node(0.0)}
    without = {"w": jlora.LoraParam(*jax.tree.leaves(wrapped), axes=wrapped["w"].axes, scale=0.7)}
    assert same_bits(jlora.apply(dense)(wrapped, ONES), jlora.apply(dense)(without, ONES))


def test_a_rate_of_zero_adds_nothing():
    params = {"w": random_node(0.0)}
    jaxpr = lambda key: str(jax.make_jaxpr(lambda p, x: jlora.apply(dense, rng=key)(p, x))(params, ONES))
    assert jaxpr(KEY) == jaxpr(None)


def test_it_is_drawn_where_the_rate_is_not_zero():
    """The test above could not tell otherwise."""
    assert "random_bits" in str(jax.make_jaxpr(functools.partial(drop, dense))({"w": random_node()}, ONES))


# -------------------------------------------------------------------------------- the formula


def test_inputs_are_dropped_or_scaled_up():
    values = np.unique(drop(dense, {"w": show()}, ONES))
    np.testing.assert_allclose(values, [0, 1 / (1 - RATE)], rtol=1e-6)


def test_formula():
    """x @ W + s ((x * mask / (1 - rate)) @ A) @ B, with the mask that the same key and shapes give."""
    (mask,) = masks_of(dense, {"w": show()}, ONES)
    node, x = random_node(), noise(*ONES.shape)
    expected = x @ node.base + 0.7 * ((x * mask / (1 - RATE)) @ node.lora_a) @ node.lora_b
    assert error(drop(dense, {"w": node}, x), expected) <= 1e-5


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate(rate):
    (mask,) = masks_of(dense, {"w": show(rate=rate)}, jnp.ones((1000, N)))
    deviation = (rate * (1 - rate) / mask.size) ** 0.5
    assert abs(mask.mean() - (1 - rate)) < 4 * deviation


def test_expectation_is_the_value_without():
    params, x = {"w": random_node()}, noise(4, N)
    samples = jax.jit(jax.vmap(lambda key: drop(dense, params, x, key=key)))(jax.random.split(KEY, 1000))
    deviation = samples.std(0) / 1000**0.5
    assert np.all(np.abs(samples.mean(0) - jlora.apply(dense)(params, x)) < 5 * deviation)


def test_the_base_sees_the_input_whole():
    node = show()
    node = jlora.LoraParam(noise(N, N), node.lora_a, 0 * node.lora_b, axes=node.axes, dropout=RATE)
    assert same_bits(drop(dense, {"w": node}, ONES), ONES @ node.base)


def test_activations_keep_their_type():
    params = {"w": jax.tree.map(lambda x: x.astype(jnp.bfloat16), show())}
    assert drop(dense, params, ONES.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_lookup_is_not_dropped():
    tables = [jlora.LoraParam(noise(9, 4), noise(9, 2), noise(2, 4), axes=jlora.Axes((0,), (1,)), dropout=RATE)]
    fn = lambda p, ids: p[0][ids]
    ids = jnp.arange(9)
    assert same_bits(drop(fn, tables, ids), jlora.apply(fn)(tables, ids))


def dropped_conv(p, x):
    return lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def dropped_ragged(p, x):
    return lax.ragged_dot(x, p["w"], jnp.array([3, 5], jnp.int32))


@pytest.mark.parametrize(
    ("fn", "shape", "axes", "x"),
    [(dropped_conv, (3, 4, 5), ((0, 1), (2,)), (2, 9, 4)), (dropped_ragged, (2, 4, 5), ((1,), (2,), (0,)), (8, 4))],
)
def test_expectation_of_other_products(fn, shape, axes, x):
    base = {"w": noise(*shape)}
    spec = jlora.LoraSpec(targets="w", axes={"w": jlora.Axes(*axes)}, rank=2, alpha=1, dropout=RATE)
    params, x = randomised(jlora.wrap(base, spec)), noise(*x)
    # Not vmap, under which JAX has no ragged_dot.
    draw = jax.jit(lambda keys: lax.map(lambda key: drop(fn, params, x, key=key), keys))
    samples = draw(jax.random.split(KEY, 1000))
    deviation = samples.std(0) / 1000**0.5
    assert np.all(deviation > 0)
    assert np.all(np.abs(samples.mean(0) - jlora.apply(fn)(params, x)) < 5 * deviation)


# -------------------------------------------------------------------------------- every use has a mask of its own


def test_same_key_same_mask():
    params = {"w": show()}
    assert same_bits(drop(dense, params, ONES), drop(dense, params, ONES))


@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), jax.random.key(0, impl="rbg")], ids=["raw", "rbg"])
def test_keys_of_any_kind(key):
    fn = lambda p, x: list(lax.scan(lambda x, w: (x, x @ w), x, p["w"])[1])
    assert all_differ(drop(fn, {"w": show(3)}, ONES, key=key))


def test_jit_changes_no_mask():
    params = {"w": show()}
    jitted = jax.jit(lambda p, x, key: drop(dense, p, x, key=key))
    assert same_bits(jitted(params, ONES, KEY), drop(dense, params, ONES))


def test_masks_differ_by_key():
    params = {"w": show()}
    assert all_differ([drop(dense, params, ONES, key=jax.random.key(i)) for i in range(3)])


def test_masks_differ_by_key_under_vmap():
    params = {"w": show()}
    assert all_differ(jax.vmap(lambda key: drop(dense, params, ONES, key=key))(jax.random.split(KEY, 3)))


def test_masks_differ_by_token():
    (mask,) = masks_of(dense, {"w": show()}, jnp.ones((2, 8, N)))
    assert all_differ(mask.reshape(16, N))


def test_masks_differ_by_kernel():
    assert all_differ(masks_of(lambda p, x: [x @ w for w in p], [show(), show()], ONES))


def test_masks_differ_by_use():
    assert all_differ(masks_of(lambda p, x: [x @ p["w"], x @ p["w"], x @ p["w"].T], {"w": show()}, ONES))


def test_masks_differ_by_tree():
    """Of two arguments with the same paths."""
    fn = lambda p, q, x: [x @ p["w"], x @ q["w"]]
    assert all_differ(masks_of(fn, {"w": show()}, {"w": show()}, ONES))


def test_masks_differ_by_call_of_a_compiled_function():
    inner = jax.jit(lambda w, x: x @ w)
    assert all_differ(masks_of(lambda p, x: [inner(p["w"], x), inner(p["w"], x)], {"w": show()}, ONES))


def test_masks_differ_by_scanned_layer():
    fn = lambda p, x: list(lax.scan(lambda x, w: (x, x @ w), x, p["w"])[1])
    assert all_differ(masks_of(fn, {"w": show(4)}, ONES))


def test_masks_differ_by_step_of_a_scan():
    fn = lambda p, x: list(lax.scan(lambda x, _: (x, x @ p["w"]), x, length=4)[1])
    assert all_differ(masks_of(fn, {"w": show()}, ONES))


def test_masks_differ_by_step_of_a_scan_that_carries_the_kernel():
    fn = lambda p, x: list(lax.scan(lambda w, _: (w, x @ w), p["w"], length=4)[1])
    assert all_differ(masks_of(fn, {"w": show()}, ONES))


def test_masks_differ_by_step_of_nested_scans():
    inner = lambda x, w: lax.scan(lambda x, _: (x, x @ w), x, length=2)
    fn = lambda p, x: list(lax.scan(inner, x, p["w"])[1].reshape(6, *x.shape))
    assert all_differ(masks_of(fn, {"w": show(3)}, ONES))


def test_masks_differ_by_step_of_a_while_loop():
    def fn(p, x):
        put = lambda i, ys: ys.at[i].set(x @ p["w"])
        return list(lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, put(*c)), (0, jnp.zeros((4, *x.shape))))[1])

    assert all_differ(masks_of(fn, {"w": show()}, ONES))


def test_masks_differ_by_step_of_a_loop_that_carries_the_kernel():
    def fn(p, x):
        body = lambda i, c: (c[0], c[1].at[i].set(x @ c[0]))
        return list(lax.fori_loop(0, jnp.int32(4), body, (p["w"], jnp.zeros((4, *x.shape))))[1])

    assert all_differ(masks_of(fn, {"w": show()}, ONES))


def test_masks_differ_by_row_of_a_map():
    fn = lambda p, x: list(lax.map(lambda row: row @ p["w"], x))
    assert all_differ(masks_of(fn, {"w": show()}, ONES))


def test_masks_differ_by_example_of_an_inner_vmap():
    fn = lambda p, x: list(jax.vmap(lambda row: row @ p["w"])(x))
    assert all_differ(masks_of(fn, {"w": show()}, ONES))


def test_masks_differ_by_expert():
    fn = lambda p, x: list(jnp.einsum("etd,edf->etf", x, p["w"]))
    assert all_differ(masks_of(fn, {"w": show(3)}, jnp.ones((3, *ONES.shape))))


def test_masks_differ_by_branch():
    branches = [lambda w, x: x @ w, lambda w, x: x @ w]
    fn = lambda p, x: [lax.switch(i, branches, p["w"], x) for i in range(2)]
    assert all_differ(masks_of(fn, {"w": show()}, ONES))


def test_masks_differ_by_shard():
    """Of a mapped function whose rows are split over two devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("data")
    product = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(jax.P(), rows), out_specs=rows)
    (mask,) = masks_of(lambda p, x: product(p["w"], x), {"w": show()}, ONES)
    assert all_differ(np.split(mask, 2))


# -------------------------------------------------------------------------------- gradients


def value_and_input_gradient(fn: Callable) -> tuple[Any, Any]:
    """y, and dL/dx of L = sum(c * y): if the backward pass has the forward pass's masks, c * y where x is ones."""
    cotangent = noise(*ONES.shape)

    def both(params, x):
        y, vjp = jax.vjp(lambda x: drop(fn, params, x), x)
        return cotangent * y, vjp(cotangent)[0]

    return evaluated(both, {"w": show(), "v": show()}, ONES)


REMATS = {
    "none": lambda f: f,
    "all": jax.checkpoint,
    "nothing saveable": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.nothing_saveable),
    "under jit": lambda f: jax.jit(jax.checkpoint(f)),
    "nested": lambda f: jax.checkpoint(jax.checkpoint(f)),
}


@pytest.mark.parametrize("remat", REMATS.values(), ids=REMATS)
def test_the_backward_pass_has_the_masks_of_the_forward_pass(remat):
    value, gradient = value_and_input_gradient(lambda p, x: remat(lambda w, x: x @ w)(p["w"], x))
    assert 0.1 < np.mean(np.asarray(value) == 0) < 0.9
    assert error(gradient, value) <= 1e-6


def test_the_backward_pass_of_a_rematerialised_scan_has_its_masks():
    def fn(p, x):
        step = jax.checkpoint(lambda x, _: (x @ p["w"], None), prevent_cse=False)
        return lax.scan(step, x, length=2)[0]

    value, gradient = value_and_input_gradient(fn)
    assert error(gradient, value) <= 1e-6


def test_remat_of_the_whole_changes_no_gradient():
    loss = lambda p: jnp.sum(jnp.sin(drop(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, p, ONES)))
    both = lambda params: (jlora.grad(jax.checkpoint(loss))(params), jlora.grad(loss)(params))
    assert error(*jax.jit(both)({"w": random_node()})) <= 1e-6


def test_gradients_are_those_of_the_function():
    """Against differences, at a fixed key."""
    with jax.enable_x64(True):
        node, x = jax.tree.map(lambda x: x.astype(jnp.float64), (random_node(), noise(3, N)))
        at = lambda a, b: {"w": jlora.LoraParam(node.base, a, b, axes=node.axes, scale=0.7, dropout=RATE)}
        fn = lambda a, b, x: jnp.sin(drop(dense, at(a, b), x))
        jax.test_util.check_grads(jax.jit(fn), (node.lora_a, node.lora_b, x), order=1)


def test_a_model_of_layers_trains_with_dropout():
    """Two steps of the same key have the same gradients, of other keys others; the frozen base gets none."""
    params = {"w": show(3)}
    fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x + x @ w), None), x, p["w"])[0]
    grads = jax.jit(lambda p, key: jax.grad(lambda p: jnp.sum(drop(fn, p, ONES, key=key) ** 2))(p))
    first, again, other = grads(params, KEY), grads(params, KEY), grads(params, jax.random.key(8))
    assert same_bits(first, again)
    assert error(other, first) > 1e-2
    assert not np.any(first["w"].base)


def test_the_names_of_masks_in_a_program():
    """Masks are drawn in the scope of the product that they belong to."""

    def fn(p, x):
        with jax.named_scope("mine"):
            return x @ p["w"]

    text = jax.jit(functools.partial(drop, fn)).lower({"w": show()}, ONES).as_text(dialect="hlo", debug_info=True)
    assert re.search(r'op_name="[^"]*mine/[^"]*(random_bits|bernoulli)', text)


def test_dropout_that_is_off_is_told_once(caplog):
    from jlora.apply import _tell_dropout_is_off

    _tell_dropout_is_off.cache_clear()
    tree = jlora.wrap({"kernel": jnp.ones((4, 4))}, jlora.LoraSpec(rank=2, dropout=0.1))
    fn = lambda p, x: x @ p["kernel"]
    jlora.apply(fn, rng=jax.random.key(0))(tree, jnp.ones((2, 4)))
    assert not caplog.records
    for _ in range(2):
        jlora.apply(fn)(tree, jnp.ones((2, 4)))
    assert [record.getMessage() for record in caplog.records] == [
        "jlora.apply: the spec has dropout, and no rng was given, so it is off; for training, apply(fn, rng=key)"
    ]
