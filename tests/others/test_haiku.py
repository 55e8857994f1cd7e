"""Haiku's attention, whose module names hold slashes, against LoRA by hand: an interceptor of its linear layers."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from tests.others import support
from tests.others.support import RANK

WIDTH, HEADS, BATCH, LENGTH = 256, 4, 2, 64
X = np.random.default_rng(0).standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)
MASK = np.tril(np.ones((1, 1, LENGTH, LENGTH), bool))


@hk.without_apply_rng
@hk.transform
def model(x):
    init = hk.initializers.VarianceScaling()
    return hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=init)(x, x, x, MASK)


def loss(params, x):
    return jnp.mean((model.apply(params, x) - x) ** 2)


@functools.cache
def params():
    return support.filled(jax.eval_shape(lambda: model.init(jax.random.key(0), X)))


@functools.cache
def tree():
    return support.wrapped(model.apply, params(), X)


def test_kernels_are_found():
    names = ("query", "key", "value", "linear")
    support.check_kernels(tree(), {f"multi_head_attention/{name}/w": "io" for name in names})


def test_nothing_is_dense():
    support.check_all_factored(model.apply, tree(), X)


def test_training():
    support.check_training(loss, tree(), X)


def add_lora(linear, args, kwargs, context):
    y = linear(*args, **kwargs)
    if not isinstance(context.module, hk.Linear) or context.method_name != "__call__":
        return y
    a = hk.get_parameter("lora_a", (args[0].shape[-1], RANK), init=jnp.zeros)
    b = hk.get_parameter("lora_b", (RANK, y.shape[-1]), init=jnp.zeros)
    return y + (args[0] @ a) @ b


def test_it_costs_what_it_costs_by_hand():
    def hand_loss(lora, params, x):
        with hk.intercept_methods(add_lora):
            return loss(hk.data_structures.merge(params, lora), x)

    with hk.intercept_methods(add_lora):
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), X))
    lora, _ = hk.data_structures.partition(lambda _, name, __: name.startswith("lora_"), shapes)
    support.check_against(hand_loss, lora, params(), lambda path: path.replace("/lora_", "/w/"), loss, tree(), X)
