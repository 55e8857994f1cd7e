"""Adapters on one base as one tree: nothing is lost on the way there and back, and one of them is what it was."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import jlora
from jlora import adapters
from tests.adapters.support import ALL, AXES, VARIANTS, WITHOUT_SUMS, adapter, base, family, forward
from tests.support import error, same_bits

PARAMS = base()
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 8)), jnp.float32)
every_variant = pytest.mark.parametrize("name", VARIANTS)
run = jax.jit(jlora.apply(forward, fallback="error"))


def plain(tree):
    return PARAMS if tree is None else tree


@every_variant
def test_unstack_gives_each_tree_back_bit_for_bit(name):
    trees = family(PARAMS, name)
    found = adapters.unstack(adapters.stack(trees))
    assert all(map(same_bits, found, map(plain, trees)))


@every_variant
def test_select_is_the_adapter_that_it_was(name):
    trees = family(PARAMS, name)
    stacked = adapters.stack(trees)
    select = jax.jit(adapters.select)
    for i, tree in enumerate(trees):
        assert same_bits(adapters.select(stacked, i), plain(tree))
        assert error(run(select(stacked, i), X), run(plain(tree), X)) < 1e-5, i
    assert adapters.select(stacked, -1)["head"]["kernel"] is PARAMS["head"]["kernel"]
    assert error(run(select(stacked, -1), X), forward(PARAMS, X)) < 1e-6
    assert np.isnan(run(select(stacked, 4), X)).all()
    assert np.isnan(run(select(stacked, -2), X)).all()


@every_variant
def test_mix_is_the_sum_of_the_updates(name):
    trees = family(PARAMS, name)
    stacked = adapters.stack(trees)
    weights = jnp.asarray([0.5, -1.5, 2.0, 7.0])
    if name in WITHOUT_SUMS:
        with pytest.raises(ValueError, match=r"mix: .*kernel has adapters of \w+Param, .*; select takes one"):
            adapters.mix(stacked, weights)
        return
    found = jlora.merge(jax.jit(adapters.mix)(stacked, weights))
    merged = [PARAMS if tree is None else jlora.merge(tree) for tree in trees]
    of_one = lambda w, *ms: w + sum(float(c) * (m - w) for c, m in zip(weights, ms, strict=True))
    assert error(found, jax.tree.map(of_one, PARAMS, *merged)) < 1e-5


def test_one_hot_mix_selects():
    stacked = adapters.stack(family(PARAMS, "lora"))
    for i, row in enumerate(jnp.eye(4)):
        assert error(run(adapters.mix(stacked, row), X), run(adapters.select(stacked, i), X)) < 1e-5


def test_numbers_and_weights_are_batched_and_differentiated():
    stacked = adapters.stack(family(PARAMS, "lora"))
    by_number = jax.vmap(lambda i: run(adapters.select(stacked, i), X))(jnp.asarray([2, 0, -1]))
    want = jnp.stack([run(adapters.select(stacked, i), X) for i in (2, 0, -1)])
    assert error(by_number, want) < 1e-5
    rows = jnp.asarray([[1.0, 0.5, 0, 0], [0, 0, -1.0, 3.0]])
    by_weight = jax.vmap(lambda w: run(adapters.mix(stacked, w), X))(rows)
    assert error(by_weight, jnp.stack([run(adapters.mix(stacked, w), X) for w in rows])) < 1e-5

    loss = lambda w: jnp.sin(jlora.apply(forward)(adapters.mix(stacked, w), X)).sum()
    weights, step = jnp.asarray([0.3, -0.2, 0.1, 1.0]), 1e-2
    grads = jax.jit(jax.grad(loss))(weights)
    moved = jax.jit(jax.vmap(loss))(jnp.concatenate([weights + step * jnp.eye(4), weights - step * jnp.eye(4)]))
    assert error(grads, (moved[:4] - moved[4:]) / (2 * step)) < 2e-2
    assert grads[3] == 0  # the base itself has no update


def test_gradients_of_the_mixed_weights_of_dora():
    stacked = adapters.stack(family(PARAMS, "dora"))
    loss = lambda w: jnp.sin(jlora.apply(forward)(adapters.mix(stacked, w), X)).sum()
    weights, step = jnp.asarray([0.3, -0.2, 0.1, 1.0]), 1e-2
    grads = jax.jit(jax.grad(loss))(weights)
    moved = jax.jit(jax.vmap(loss))(jnp.concatenate([weights + step * jnp.eye(4), weights - step * jnp.eye(4)]))
    assert error(grads, (moved[:4] - moved[4:]) / (2 * step)) < 2e-2


def test_what_is_trained_in_full():
    spec = jlora.LoraSpec(targets=ALL, axes=AXES, rank=2, train=("head/bias",))
    trees = [jax.tree.map(lambda x, i=i: x + i if x.shape == (6,) else x, jlora.wrap(PARAMS, spec)) for i in range(3)]
    stacked = adapters.stack([*trees, PARAMS])
    assert same_bits(adapters.unstack(stacked)[1], trees[1])
    assert error(run(jax.jit(adapters.select)(stacked, -1), X), forward(PARAMS, X)) < 1e-6
    mixed = adapters.mix(stacked, jnp.asarray([0.5, 0.5, 0.25, 0.0]))
    assert np.allclose(mixed["head"]["bias"].base, PARAMS["head"]["bias"] + 0.5 * 0 + 0.5 * 1 + 0.25 * 2, atol=1e-6)


def test_a_leaf_that_all_train_in_full_has_no_base_but_the_given_one():
    spec = jlora.LoraSpec(targets="head/kernel", rank=2, train=("head/bias",))
    trees = [jlora.wrap(PARAMS, spec) for _ in range(2)]
    assert np.isnan(adapters.select(adapters.stack(trees), -1)["head"]["bias"]).all()
    mixed = adapters.mix(adapters.stack(trees), jnp.asarray([0.25, 0.75]))["head"]["bias"].base
    assert error(mixed, PARAMS["head"]["bias"]) < 1e-6
    with pytest.raises(ValueError, match=r"head/bias is trained in full by all trees, .* None has no value there"):
        adapters.stack([*trees, None])
    known = adapters.stack([*trees, None], base=PARAMS)
    assert adapters.unstack(known)[2]["head"]["bias"] is PARAMS["head"]["bias"]
    assert adapters.select(known, -1)["head"]["bias"] is PARAMS["head"]["bias"]


def test_biases_of_updates():
    trees = [adapter(PARAMS, i, targets=("head/kernel",), rank=2, alpha=1 + i, lora_bias=True) for i in range(2)]
    assert type(trees[0]["head"]["bias"]).__name__ == "LoraBiasParam"
    stacked = adapters.stack([*trees, None])
    assert same_bits(adapters.unstack(stacked)[1], trees[1])
    for i in range(3):
        want = run(plain([*trees, None][i]), X)
        assert error(run(jax.jit(adapters.select)(stacked, i), X), want) < 1e-5
    merged = jlora.merge(adapters.mix(stacked, jnp.asarray([2.0, -1.0, 5.0])))["head"]["bias"]
    ones = [jlora.merge(tree)["head"]["bias"] - PARAMS["head"]["bias"] for tree in trees]
    assert np.allclose(merged, PARAMS["head"]["bias"] + 2 * ones[0] - ones[1], atol=1e-5)


def test_a_stacked_tree_is_a_wrapped_tree():
    """It is planned, split, labelled, trained, saved, and told of as any other."""
    trees = family(PARAMS, "lora")
    stacked = adapters.stack(trees)
    plan = jax.eval_shape(
        lambda params: adapters.stack([jlora.wrap(params, jlora.LoraSpec(targets="head/kernel", rank=3))]), PARAMS
    )
    assert plan["head"]["kernel"].lora_a.shape == (1, 3, 8)
    assert same_bits(jlora.combine(*jlora.partition(stacked)), stacked)
    tx = jlora.optimizer(optax.adamw(0.1, weight_decay=0.5), stacked)
    grads = jax.tree.map(jnp.ones_like, stacked)
    after = optax.apply_updates(stacked, tx.update(grads, tx.init(stacked), stacked)[0])
    assert same_bits(jlora.unwrap(after), PARAMS)
    assert "4x lora" in str(jlora.summary(stacked))


def test_planned_trees_give_a_plan():
    spec = jlora.LoraSpec(targets=ALL, axes=AXES, rank=2, variant="dora", train=("head/bias",))
    shapes = jax.eval_shape(lambda: PARAMS)
    plan = adapters.stack([*[jlora.wrap(shapes, spec)] * 2, shapes])
    made = adapters.stack([*[jlora.wrap(PARAMS, spec)] * 2, PARAMS])
    assert jax.tree.structure(plan) == jax.tree.structure(made)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(plan)] == [(x.shape, x.dtype) for x in jax.tree.leaves(made)]
    run = adapters.batched(forward)
    assert jax.eval_shape(run, plan, jnp.zeros(2, int), X).shape == run(made, jnp.zeros(2, int), X).shape


def test_files_keep_it(tmp_path):
    """Orbax's checkpoints, Flax's state dicts, and pickles."""
    stacked = adapters.stack(family(PARAMS, "dora"))
    jlora.checkpoint.save(tmp_path / "several", stacked)
    assert same_bits(jlora.checkpoint.load(tmp_path / "several", PARAMS), stacked)
    blank = jax.tree.map(jnp.zeros_like, stacked)
    assert same_bits(serialization.from_bytes(blank, serialization.to_bytes(stacked)), stacked)
    assert same_bits(pickle.loads(pickle.dumps(stacked)), stacked)


def test_one_call_takes_one_adapter():
    stacked = adapters.stack(family(PARAMS, "lora"))
    for call in (lambda: run(stacked, X), lambda: jlora.merge(stacked)):
        with pytest.raises(ValueError, match=r"holds 4 adapters on one base.*select.*mix.*batched.*vmap"):
            call()


def test_trees_that_do_not_go_together():
    one, other = adapter(PARAMS, 0, rank=2), adapter(base(1), 0, rank=2)
    with pytest.raises(ValueError, match=r"stack: head/bias is not the same in tree 0 and tree 1: .*different bases"):
        adapters.stack([one, other])
    with pytest.raises(ValueError, match="LoraParam in tree 0 and DoraParam in tree 2"):
        adapters.stack([one, None, adapter(PARAMS, 0, rank=2, variant="dora")])
    with pytest.raises(ValueError, match=r"lokr_c of .*kernel has shapes .*differ in more than the rank"):
        lokr = [adapter(PARAMS, 0, rank=2, variant="lokr", options={"factor": n}) for n in (2, 4)]
        adapters.stack(lokr)
    with pytest.raises(ValueError, match="size=4 in tree 0 and 2 in tree 1"):
        adapters.stack([adapter(PARAMS, 0, variant="oft", options={"block_size": n}) for n in (4, 2)])
    with pytest.raises(ValueError, match="trees 1 and 0 have different leaves, as at head/extra"):
        adapters.stack([one, {**one, "head": {**one["head"], "extra": X}}])
    with pytest.raises(ValueError, match="holds several adapters; unstack"):
        adapters.stack([adapters.stack([one])])
    for nothing in ([], [None], [PARAMS, None]):
        with pytest.raises(TypeError, match="no leaf of these is wrapped"):
            adapters.stack(nothing)


def test_each_keeps_its_types():
    trees = [adapter(PARAMS, i, rank=2, dtype=dtype) for i, dtype in enumerate((jnp.bfloat16, jnp.float32))]
    assert all(map(same_bits, adapters.unstack(adapters.stack(trees)), trees))


def test_functions_of_one_adapter_refuse_several():
    stacked = adapters.stack(family(PARAMS, "lora")[:1])
    calls = (
        lambda: adapters.resize(stacked, 1),
        lambda: adapters.weighted([stacked], [1.0]),
        lambda: forward(stacked, X),
        lambda: jlora.peft.low_rank(stacked, 1),
    )
    for call in calls:
        with pytest.raises((ValueError, TypeError), match=r"tree holds 1 adapters on one base .*\.select\(tree, i\)"):
            call()
    for function in (adapters.stack, lambda tree: adapters.weighted(tree, [1.0])):
        with pytest.raises(TypeError, match=r"takes a list of (wrapped )?trees, found a dict"):
            function(stacked)
    with pytest.raises(TypeError, match="axes takes a tree of several adapters"):
        adapters.axes(PARAMS)


def test_bases_that_are_equal_are_one():
    copy = jax.tree.map(jnp.copy, PARAMS)
    stacked = adapters.stack([adapter(PARAMS, 0, rank=2), adapter(copy, 1, rank=2)])
    assert stacked["head"]["bias"] is PARAMS["head"]["bias"]


def test_numbers_and_weights_that_are_none():
    stacked = adapters.stack(family(PARAMS, "lora"))
    with pytest.raises(IndexError, match="holds adapters 0 to 3, and -1 is the base; found 4"):
        adapters.select(stacked, 4)
    with pytest.raises(TypeError, match=r"i is the number of an adapter, found 1.5"):
        adapters.select(stacked, 1.5)
    with pytest.raises(ValueError, match=r"weights have shape \(3,\); this tree holds 4 adapters"):
        adapters.mix(stacked, jnp.ones(3))
    for call in (adapters.select, adapters.mix):
        with pytest.raises(TypeError, match="takes a tree of several adapters"):
            call(PARAMS, 0)


def test_a_variant_of_ones_own_says_what_it_is_where_it_changes_nothing():
    from jlora.variants import LoraParam

    class Own(LoraParam):
        LINEAR = ()

    Own.__name__ = "Own"
    own = jax.tree_util.register_dataclass(Own)
    trees = [adapter(PARAMS, i, rank=2 + i, variant=own) for i in range(2)]
    with pytest.raises(ValueError, match=r"have ranks \[2, 3\], and Own does not say that ranks of zeros add nothing"):
        adapters.stack(trees)
    same = adapters.stack([adapter(PARAMS, i, rank=2, variant=own) for i in range(2)])
    assert same_bits(adapters.unstack(same)[1], adapter(PARAMS, 1, rank=2, variant=own))
    with pytest.raises(ValueError, match="Own says neither in which fields its update is linear"):
        run(jax.jit(adapters.select)(same, 1), X)
