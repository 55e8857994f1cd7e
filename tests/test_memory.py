"""What a layer keeps for the backward pass, over what the frozen layer keeps: counted in its jaxpr."""

import functools

import jax
import pytest

import jlora
from benchmarks.residuals import POLICIES, over_floor, textbook

KEY = jax.random.key(0)


def ours(policy, **settings):
    return over_floor(POLICIES[policy], lambda fn: jlora.apply(fn, rng=KEY), **settings)


@pytest.mark.parametrize("policy", ["dots_saveable", "dots_with_no_batch_dims_saveable"])
def test_policies_that_save_products_save_none_of_the_adapters(policy):
    """The products with A alone, (tokens, rank): written by hand, those with B are saved too."""
    assert ours(policy) <= 1.03
    assert over_floor(POLICIES[policy], lambda fn: functools.partial(fn, linear=textbook)) > 1.8


def test_a_policy_of_names_saves_what_it_names():
    assert ours("save_only_these_names") <= 1.1


@pytest.mark.parametrize(
    "settings, most", [({}, 1.27), ({"dropout": 0.1}, 1.3), ({"variant": "dora"}, 1.6)], ids=["lora", "dropout", "dora"]
)
def test_without_remat_one_copy_of_each_input_is_kept(settings, most):
    """Those of q, k and v are one, whether grouped or, with dropout, not; so are those of gate and up."""
    assert ours("no remat", **settings) <= most


def test_the_inputs_are_what_is_kept():
    """The measure sees them: five of the layer's width and one of the hidden layer's, in bfloat16."""
    assert ours("no remat") > 1.1
