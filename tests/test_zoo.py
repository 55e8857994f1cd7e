"""The zoo itself: every program runs plainly, is finite, is differentiable, and tells the truth about its axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import GetAttrKey, keystr, tree_leaves_with_path

from tests.handwritten import PAIRS, merged
from tests.models import MODELS
from tests.programs import PROGRAMS

ZOO = PROGRAMS + MODELS
BY_NAME = {program.name: program for program in ZOO}
KINDS = {"dot", "embedding", "conv", "ragged_dot", "other"}
WITHOUT_GRADIENT = {"never_used": {"unused"}, "stop_gradient_of_kernel": {"w"}}


def leaves_of(tree):
    """The leaves of a tree by path, {"layers/0/w": array}; a variable of NNX is one with its value."""
    return {
        keystr(_without_value(path), simple=True, separator="/"): leaf for path, leaf in tree_leaves_with_path(tree)
    }


def _without_value(path):
    return path[:-1] if path and path[-1] == GetAttrKey("value") else path


def total(tree):
    """One smooth number of all the floats in a tree."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum(jnp.sum(jnp.sin(leaf.astype(jnp.float32))) for leaf in floats)


def is_finite(tree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def test_names_are_unique():
    assert len(BY_NAME) == len(ZOO)


@pytest.mark.parametrize("name", BY_NAME)
def test_axes_partition_each_kernel(name):
    program = BY_NAME[name]
    leaves = leaves_of(program.params)
    assert program.axes.keys() == program.kind.keys()
    assert set(program.kind.values()) <= KINDS
    for path, axes in program.axes.items():
        assert sorted(sum(axes, ())) == list(range(leaves[path].ndim)), path
        assert axes[0] and axes[1], path


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_runs_and_differentiates(name):
    """As the laws need it, which fail where it does not."""
    program = BY_NAME[name]
    if not program.reverse:
        assert is_finite(jax.jit(program.fn)(program.params, *program.args))
        return
    out, grads = jax.jit(value_and_grad_of(program))(program.params)
    assert is_finite((out, grads))
    zero = {path for path, grad in leaves_of(grads).items() if path in program.axes and not np.any(grad)}
    assert zero == WITHOUT_GRADIENT.get(name, set())


def value_and_grad_of(program):
    def loss(params):
        out = program.fn(params, *program.args)
        return total(out), out

    def run(params):
        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return out, grads

    return run


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_hand_written_lora_starts_as_the_plain_model(pair):
    plain = jax.jit(pair.plain_loss)(pair.params, pair.batch)
    hand = jax.jit(pair.hand_loss)(pair.params, pair.make_lora(pair.params), pair.batch)
    np.testing.assert_allclose(hand, plain, rtol=1e-6)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_hand_written_lora_is_the_plain_model_of_merged_kernels(pair):
    lora = pair.make_lora(pair.params, random_b=True)
    start = jax.jit(pair.plain_loss)(pair.params, pair.batch)
    plain = jax.jit(pair.plain_loss)(merged(pair.params, lora), pair.batch)
    hand, grads = jax.jit(jax.value_and_grad(pair.hand_loss, argnums=1))(pair.params, lora, pair.batch)
    assert abs(plain - start) > 1e-2
    np.testing.assert_allclose(hand, plain, rtol=1e-5)
    assert all(np.any(grad) for grad in jax.tree.leaves(grads))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_hand_written_lora_trains_nothing_else(pair):
    grads = jax.jit(jax.grad(pair.hand_loss))(pair.params, pair.make_lora(pair.params, random_b=True), pair.batch)
    assert not any(np.any(grad) for grad in jax.tree.leaves(grads))
