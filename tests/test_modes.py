"""What trains beside the adapters: rows of tables, biases of updates; and what a spec refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.support import error, same_bits


def noise(*shape):
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), jnp.float32)


def tree():
    return {
        "embed": {"embedding": noise(11, 6)},
        "dense": {"kernel": noise(6, 8), "bias": noise(8)},
        "bare": {"kernel": noise(8, 6)},
    }


def model(p, tokens):
    x = p["embed"]["embedding"][tokens] @ p["dense"]["kernel"] + p["dense"]["bias"]
    return jnp.tanh(x) @ p["bare"]["kernel"] @ p["embed"]["embedding"].T


TOKENS = jnp.asarray([[3, 0, 9], [9, 1, 2]])


def trained(params, steps=5):
    tx = jlora.optimizer(optax.adamw(1e-1), params)
    state = tx.init(params)
    for _ in range(steps):
        grads = jlora.grad(lambda p: jnp.square(jlora.apply(model, fallback="error")(p, TOKENS)).sum())(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_rows_of_a_table_train_and_no_others():
    params = jlora.wrap(tree(), jlora.LoraSpec(targets="dense", rank=2, train_tokens={"embed": [9, 4]}))
    assert [x.shape for x in jax.tree.leaves(jlora.partition(params)[0])] == [(6, 2), (2, 8), (2, 6)]
    np.testing.assert_array_equal(jlora.apply(model)(params, TOKENS), model(tree(), TOKENS))
    after = jlora.merge(trained(params))["embed"]["embedding"]
    before, others = tree()["embed"]["embedding"], [i for i in range(11) if i not in (9, 4)]
    np.testing.assert_array_equal(after[jnp.asarray(others)], before[jnp.asarray(others)])
    assert np.all(np.any(np.asarray(after != before)[[9, 4]], -1))
    assert same_bits(jlora.unwrap(trained(params)), tree())


def test_rows_train_as_the_rows_of_a_table_trained_in_full():
    """The tied table: the gradient of each row is that of the whole table's."""
    params = jlora.wrap(tree(), jlora.LoraSpec(targets="dense", rank=2, train_tokens={"embed": [9, 4]}))
    loss = lambda p: jnp.square(jlora.apply(model)(p, TOKENS)).sum()
    rows = jlora.grad(loss)(params)["embed"]["embedding"].rows
    full = jax.grad(lambda p: jnp.square(model(p, TOKENS)).sum())(tree())["embed"]["embedding"]
    assert error(rows, full[jnp.asarray([9, 4])]) <= 1e-5


def test_the_bias_of_an_update():
    params = jlora.wrap(tree(), jlora.LoraSpec(targets="dense", rank=2, alpha=6, lora_bias=True))
    node = params["dense"]["bias"]
    assert node.scale == 3 and not np.any(node.lora_bias)
    after = trained(params)["dense"]["bias"]
    merged = jlora.merge({"b": after})["b"]
    np.testing.assert_allclose(merged, np.asarray(tree()["dense"]["bias"] + 3 * after.lora_bias), rtol=1e-6)
    assert np.any(after.lora_bias) and same_bits(jlora.unwrap({"b": after})["b"], tree()["dense"]["bias"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"targets": "dense", "train_tokens": {"embed": [11]}}, r"train_tokens names \[11\], but .* has 11 rows"),
        ({"targets": "dense", "train_tokens": {"bias": [1]}}, "none of which is a table"),
        ({"targets": "dense", "train_tokens": {"nothing": [1]}}, "matches no leaf. Nearest"),
        ({"targets": ["dense", "embed"], "train_tokens": {"embed": [1]}}, "stands both in targets and in train"),
        ({"targets": "dense", "train": "embed", "train_tokens": {"embed": [1]}}, "stands both"),
        (
            {"targets": ["dense", "bare"], "lora_bias": True},
            r"needs a bias beside each target, but bare/kernel has none",
        ),
        (
            {"targets": "dense", "variant": "oft"},
            r"options=.*does not fit dense/kernel .*must divide the last in axis, 6",
        ),
        ({"targets": "dense", "variant": "ia3", "options": {"on": "up"}}, "it is 'out' or 'in'"),
        ({"targets": "dense", "variant": "lokr", "options": {"factor": 0}}, "at least 1, or -1"),
        ({"targets": "dense", "init": "orthogonal", "rank": 3}, "must be even, found 3"),
    ],
)
def test_what_does_not_fit_the_tree(settings, message):
    with pytest.raises(ValueError, match=message):
        jlora.wrap(tree(), jlora.LoraSpec(**({"rank": 2} | settings)))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"variant": "lokar"}, "variant must be one of .*'lokr'.* subclass of jlora.AdaptedParam"),
        ({"variant": dict}, "variant must be"),
        ({"options": {"block_size": 4}}, "LoraParam: options has no setting 'block_size'"),
        ({"variant": "oft", "options": {"blocksize": 4}}, "did you mean 'block_size'"),
        ({"variant": "oft", "dropout": 0.1}, "dropout=0.1 means nothing to OftParam"),
        ({"variant": "vera", "init": "pissa"}, "init='pissa' means nothing to VeraParam"),
        ({"init": "pissa_niter_x"}, "init must be one of .*pissa_niter_N"),
        ({"lora_bias": 1}, "lora_bias must be True or False"),
        ({"train_tokens": {"embed": "12"}}, r"train_tokens\['embed'\] must be a sequence of different indices"),
        ({"train_tokens": {"embed": [1, 1]}}, "different indices"),
        ({"layers_name": ""}, "layers_name must be"),
    ],
)
def test_what_a_spec_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        jlora.LoraSpec(**settings)


def test_overrides_may_change_the_variant():
    spec = jlora.LoraSpec(
        targets=["dense", "bare"], rank=2, overrides={"bare": {"variant": "oft", "options": {"block_size": 4}}}
    )
    params = jlora.wrap(tree(), spec)
    assert [type(params[name]["kernel"]).__name__ for name in ("dense", "bare")] == ["LoraParam", "OftParam"]
    assert jlora.LoraSpec.from_dict(spec.to_dict()) == spec


def test_a_class_of_ones_own_is_no_plain_data():
    with pytest.raises(TypeError, match="to_dict: variant is"):
        jlora.LoraSpec(variant=jlora.variants.DoraParam).to_dict()
