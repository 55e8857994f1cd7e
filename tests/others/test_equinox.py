"""Equinox's attention, whose weights are (out, in) and applied to one token at a time, against LoRA by hand."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from tests.others import support
from tests.others.support import RANK

WIDTH, HEADS, BATCH, LENGTH = 256, 4, 2, 64
PROJECTIONS = [f"{name}_proj" for name in ("query", "key", "value", "output")]
X = np.random.default_rng(0).standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)
MASK = np.tril(np.ones((LENGTH, LENGTH), bool))


def make():
    return eqx.nn.MultiheadAttention(HEADS, WIDTH, use_query_bias=True, key=jax.random.key(0))


def attend(attention, x):
    return jax.vmap(lambda x: attention(x, x, x, MASK))(x)


SHAPES, STATIC = eqx.partition(eqx.filter_eval_shape(make), lambda x: isinstance(x, jax.ShapeDtypeStruct))
PARAMS = support.filled(SHAPES)


def predict(params, x):
    return attend(eqx.combine(params, STATIC), x)


def loss(params, x):
    return jnp.mean((predict(params, x) - x) ** 2)


@functools.cache
def tree():
    return support.wrapped(predict, PARAMS, X)


def test_kernels_are_found():
    support.check_kernels(tree(), {f"{name}/weight": "oi" for name in PROJECTIONS})


def test_nothing_is_dense():
    support.check_all_factored(predict, tree(), X)


def test_training():
    support.check_training(loss, tree(), X)


class LoraLinear(eqx.Module):
    linear: eqx.nn.Linear
    a: jax.Array
    b: jax.Array

    def __call__(self, x):
        return self.linear(x) + (x @ self.a) @ self.b


def test_it_costs_what_it_costs_by_hand():
    linears = lambda attention: [getattr(attention, name) for name in PROJECTIONS]
    factors = lambda attention: [x for linear in linears(attention) for x in (linear.a, linear.b)]
    zeros = np.zeros((WIDTH, RANK), np.float32), np.zeros((RANK, WIDTH), np.float32)
    plain = eqx.combine(PARAMS, STATIC)
    model = eqx.tree_at(linears, plain, [LoraLinear(linear, *zeros) for linear in linears(plain)])
    is_factor = eqx.tree_at(factors, jax.tree.map(lambda _: False, model), replace_fn=lambda _: True)
    lora, rest = eqx.partition(model, is_factor)
    arrays, static = eqx.partition(rest, eqx.is_array)

    def hand_loss(lora, arrays, x):
        return jnp.mean((attend(eqx.combine(lora, arrays, static), x) - x) ** 2)

    support.check_against(
        hand_loss, lora, arrays, lambda path: path.replace("_proj/", "_proj/weight/"), loss, tree(), X
    )
