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


SLOW = ("unrolled", "scan_remat")  # the blocks of "scan"


@pytest.mark.parametrize(
    "pair", [pytest.param(pair, id=pair.name, marks=[pytest.mark.slow] * (pair.name in SLOW)) for pair in PAIRS]
)
def test_hand_written_lora(pair):
    """It starts as the plain model, is the plain model of merged kernels, and trains nothing else."""
    start, lora = pair.make_lora(pair.params), pair.make_lora(pair.params, random_b=True)

    def facts(params, start, lora, batch):
        hand, (frozen, trained) = jax.value_and_grad(pair.hand_loss, argnums=(0, 1))(params, lora, batch)
        plain = pair.plain_loss(params, batch), pair.plain_loss(merged(params, lora), batch)
        return *plain, pair.hand_loss(params, start, batch), hand, frozen, trained

    plain, of_merged, at_start, hand, frozen, trained = jax.jit(facts)(pair.params, start, lora, pair.batch)
    np.testing.assert_allclose(at_start, plain, rtol=1e-6)
    assert abs(of_merged - plain) > 1e-2
    np.testing.assert_allclose(hand, of_merged, rtol=1e-5)
    assert all(np.any(grad) for grad in jax.tree.leaves(trained))
    assert not any(np.any(grad) for grad in jax.tree.leaves(frozen))
