"""to_plain_lora and fold_and_restart: the function stays, the form changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.support import error, evaluated, same_bits
from tests.variants.cases import CASES, moved, spec_of, wrapped

LOW_RANK = ["lora", "lora_fa", "vera", "adalora", "loha", "lokr", "lora+pissa", "lora+olora", "lora_fa+olora"]
RANKS = {"loha": 4, "lokr": 4, "lora+pissa": 4, "lora+olora": 4}


@pytest.mark.parametrize(
    "kind, use",
    [
        pytest.param(kind, use, marks=[] if kind == "lora" or use == "multi_axis" else [pytest.mark.slow])
        for kind in LOW_RANK
        for use in ("dense", "multi_axis", "stacked", "expert")
    ],
)
def test_plain_lora_is_the_same_function(kind, use):
    case, params = CASES[use], moved(wrapped(kind, CASES[use]))
    run = lambda params, fallback: jlora.apply(case.fn, fallback=fallback)(params, *case.args)

    def both(params):
        plain = jlora.to_plain_lora(params)
        return plain, [(jlora.merge(plain), jlora.merge(params)), (run(plain, "error"), run(params, "warn"))]

    plain, (merged, values) = evaluated(both, params)
    nodes = jax.tree.leaves(plain, is_leaf=lambda x: isinstance(x, jlora.AdaptedParam))
    assert all(type(node) is jlora.LoraParam and node.start == () for node in nodes)
    assert {node.rank for node in nodes} == {RANKS.get(kind, 2)}
    assert error(*merged) <= 1e-6
    assert error(*values) <= 1e-5
    assert same_bits(jlora.unwrap(plain), case.params)


def test_layers_that_were_left_out_get_zeros():
    params = moved(wrapped("lora+pissa", CASES["stacked"], layers=[0, 2]))
    assert params["w"].lora_a.shape[0] == 2
    plain, *merged = evaluated(lambda p: (q := jlora.to_plain_lora(p), jlora.merge(q), jlora.merge(p)), params)
    assert plain["w"].lora_a.shape[0] == 3
    assert error(*merged) <= 1e-6


@pytest.mark.parametrize("kind", ["dora", "ia3", "oft"])
def test_what_is_no_low_rank_update_is_refused(kind):
    with pytest.raises(ValueError, match=r"to_plain_lora: (up|down) is a \w+Param, which is no low-rank update.*merge"):
        jlora.to_plain_lora(wrapped(kind, CASES["dense"]))


def test_the_rest_of_the_tree_stays():
    tree = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}, "embed": jnp.ones((9, 8)), "norm": jnp.ones(8)}
    spec = jlora.LoraSpec(targets="dense", rank=2, lora_bias=True, train="norm", train_tokens={"embed": [1, 3]})
    params = moved(jlora.wrap(tree, spec))
    assert same_bits(jlora.to_plain_lora(params), params)
    again = jlora.fold_and_restart(params)
    assert error(jlora.merge(again), jlora.merge(params)) <= 1e-6
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert same_bits(again["norm"], params["norm"])
    assert not np.any(again["dense"]["bias"].lora_bias)


KINDS = ["lora", "dora", "lora_fa", "vera", "adalora", "loha", "lokr", "ia3", "ia3+in", "oft", "boft", "lora+layers"]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in ("lora", "dora", "oft") else [pytest.mark.slow]) for kind in KINDS]
)
def test_a_restart_is_the_same_function_with_fresh_adapters(kind):
    case, params = CASES["stacked"], moved(wrapped(kind, CASES["stacked"]))
    run = lambda params: jlora.apply(case.fn, fallback="ignore")(params, *case.args)

    def both(params):
        again = jlora.fold_and_restart(params)
        return again, (jlora.unwrap(again), jlora.merge(params)), (run(again), run(params))

    again, bases, values = evaluated(both, params)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert [x.shape for x in jax.tree.leaves(again)] == [x.shape for x in jax.tree.leaves(params)]
    assert error(*bases) <= 1e-6
    assert error(*values) <= 2e-5


def test_restarts_raise_the_rank():
    """Three rounds of rank 2 fit a target of rank 6, which one round of any length does not."""
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.standard_normal((12, 6)) @ rng.standard_normal((6, 10)) / 6, jnp.float32)
    params = jlora.wrap({"w": jnp.zeros((12, 10))}, jlora.LoraSpec(targets="w", rank=2, alpha=2))
    loss = lambda params: jnp.square(jlora.merge(params)["w"] - target).sum()
    tx, errors = jlora.optimizer(optax.adam(0.05), params), []

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jlora.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=300)[0][0]

    for _ in range(4):
        params = train(params)
        errors.append(float(loss(params)))
        before, params = params, jlora.fold_and_restart(params)
        assert not np.allclose(before["w"].lora_a, params["w"].lora_a)
    assert errors[0] > 1.0 and errors[-1] < 1e-3


def test_restarts_draw_new_factors_each_time_and_a_key_decides():
    params = moved(wrapped("lora", CASES["dense"]))
    one = jlora.fold_and_restart(params)
    assert same_bits(one, jlora.fold_and_restart(params))
    assert not np.allclose(one["up"].lora_a, jlora.fold_and_restart(moved(one))["up"].lora_a)
    keyed = [jlora.fold_and_restart(params, key=jax.random.key(i))["up"].lora_a for i in range(2)]
    assert not np.allclose(*keyed)
    assert spec_of("lora", CASES["dense"]).rank == one["up"].rank
