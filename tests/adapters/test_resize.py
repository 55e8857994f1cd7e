"""`resize`: the best update of another rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.adapters import resize
from tests.adapters.test_weighted import base, nodes, places, tree
from tests.support import error, same_bits


def test_a_lower_rank_is_the_best_approximation():
    given = nodes(tree(0, rank=3))
    made = jax.jit(lambda tree: resize(tree, 2))(tree(0, rank=3))
    for path, node in nodes(made).items():
        assert node.rank == 2 and node.scale == given[path].scale
        for (a, b, _), (old_a, old_b, _) in zip(places(path, node), places(path, given[path]), strict=True):
            u, s, vt = np.linalg.svd(old_a @ old_b, full_matrices=False)
            np.testing.assert_allclose(a @ b, u[:, :2] * s[:2] @ vt[:2], atol=1e-5 * s[0], err_msg=path)


def test_a_higher_rank_is_the_same_function_and_all_of_it_trains():
    given = tree(0, rank=2)
    made = resize(given, 3)
    assert error(jlora.merge(made), jlora.merge(given)) < 1e-6
    node, old = made["query"]["kernel"], given["query"]["kernel"]
    assert same_bits((node.lora_a[..., :2], node.lora_b[:2]), (old.lora_a, old.lora_b)) and node.lora_b[2:].max() == 0
    assert jnp.abs(node.lora_a[..., 2]).min() > 0
    assert not same_bits(made["layers"]["kernel"].lora_a[0, :, 2], made["layers"]["kernel"].lora_a[1, :, 2])
    assert resize(given, 100)["head"]["kernel"].rank == 4  # as much as it has
    assert same_bits(resize(given, 2), given)


def test_dora_keeps_its_magnitudes_and_starts_become_plain():
    dora = tree(0, variant="dora", targets=("head",))
    for rank in (2, 3):
        assert error(jlora.merge(resize(dora, rank)), jlora.merge(dora)) < 1e-5
    assert resize(dora, 1)["head"]["kernel"].magnitude is dora["head"]["kernel"].magnitude
    pissa = tree(0, init="pissa", targets=("head",))
    made = resize(pissa, 4)
    assert not made["head"]["kernel"].start and error(jlora.merge(made), jlora.merge(pissa)) < 1e-5


def test_what_is_no_update_stays():
    given = tree(0, train=("bias",), targets=("head",), layers=None)
    assert resize(given, 1)["query"]["bias"] is given["query"]["bias"]


@pytest.mark.parametrize(
    ("given", "rank", "message"),
    [
        (lambda: tree(0), 1.5, "rank must be a positive integer, found 1.5"),
        (lambda: tree(0), True, "found True"),
        (base, 2, "no leaf of it is wrapped"),
        (lambda: tree(0, variant="lora_fa"), 2, "is a LoraFaParam, not LoRA or DoRA"),
    ],
)
def test_what_is_refused(given, rank, message):
    with pytest.raises((ValueError, TypeError), match=f"adapters.resize.*{message}"):
        resize(given(), rank)
