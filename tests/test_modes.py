"""What trains beside the adapters: rows of tables, biases of updates; and what a spec refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import variants as v
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
        ({"targets": ["dense", "embed"], "train_tokens": {"embed": [1]}}, "stands both in targets and in train_tokens"),
        ({"targets": "dense", "train": "embed", "train_tokens": {"embed": [1]}}, "stands both"),
        (
            {"targets": ["dense", "bare"], "lora_bias": True},
            r"needs a bias beside each target, but bare/kernel has none",
        ),
        (
            {"variant": "oft", "options": {"block_size": 4}},
            r"options=.*does not fit dense/kernel .* axis, 6: block_size is one of \[2, 3, 6\]",
        ),
        ({"variant": "ia3", "options": {"on": "up"}}, "it is 'out' or 'in'"),
        ({"variant": "lokr", "rank": 2, "options": {"factor": 0}}, "at least 1, or -1"),
        ({"targets": "dense", "init": "orthogonal", "rank": 3}, "must be even, found 3"),
    ],
)
def test_what_does_not_fit_the_tree(settings, message):
    with pytest.raises(ValueError, match=message):
        jlora.wrap(
            tree(), jlora.LoraSpec(**({"targets": "dense"} | ({} if "variant" in settings else {"rank": 2}) | settings))
        )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"variant": "lokar"}, "variant must be one of .*'lokr'.* subclass of jlora.AdaptedParam"),
        ({"variant": dict}, "variant must be"),
        ({"options": {"block_size": 4}}, "variant 'lora': options has no setting 'block_size' .it has none"),
        ({"variant": "oft", "options": {"blocksize": 4}}, "did you mean 'block_size'"),
        ({"variant": "DoRA"}, "did you mean 'dora'"),
        ({"init": "pisa"}, "did you mean 'pissa'"),
        ({"init": "eva"}, "jlora.init.eva"),
        ({"variant": "oft", "dropout": 0.1}, "dropout=0.1 means nothing to variant 'oft'"),
        ({"variant": "vera", "init": "pissa"}, "init='pissa' means nothing to variant 'vera'"),
        ({"init": "pissa_niter_x"}, "init must be one of .*pissa_niter_N"),
        ({"lora_bias": 1}, "lora_bias must be True or False"),
        ({"train_tokens": {"embed": "12"}}, r"train_tokens\['embed'\] must be a sequence of different indices"),
        ({"train_tokens": {"embed": [1, 1]}}, "different indices"),
        ({"layers_name": ""}, "layers_name must be"),
        ({"layers_name": []}, "layers_name must be"),
        ({"layers_name": ["h", 3]}, "layers_name must be"),
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


def test_blocks_of_a_rotation_that_fit():
    params = {"w": jnp.ones((36, 4)), "v": jnp.ones((64, 4)), "u": jnp.ones((10, 4))}
    sizes = lambda variant: {
        name: (node.size, node.oft_q.shape[0])
        for name, node in jlora.wrap(params, jlora.LoraSpec(targets=["w", "v", "u"], variant=variant)).items()
    }
    assert sizes("oft") == {"w": (18, 1), "v": (32, 1), "u": (10, 1)}
    assert sizes("boft") == {"w": (3, 2), "v": (4, 2), "u": (2, 1)}


def test_a_direction_that_has_all_but_gone_does_not_blow_up():
    """V = 1e-4 W: its norm, a sum of three terms in float32, is rounding; m / ||V|| stays bounded."""
    u, s, vt = np.linalg.svd(np.asarray(noise(32, 8)), full_matrices=False)
    node = jlora.wrap({"w": noise(32, 8)}, jlora.LoraSpec("w", rank=8, alpha=8, variant="dora"))["w"]
    node = dataclasses.replace(node, lora_a=jnp.asarray(-(1 - 1e-4) * u * s), lora_b=jnp.asarray(vt))
    merged, limit = jlora.merge({"w": node})["w"], 10 * jnp.abs(noise(32, 8)).max()
    assert jnp.all(jnp.isfinite(merged)) and jnp.abs(merged).max() <= limit


def test_another_variant_takes_over_only_what_it_has():
    overrides = {"bare": {"variant": "loha"}, "dense": {"variant": "oft", "options": {"block_size": 2}}}
    spec = jlora.LoraSpec(targets=["dense", "bare"], rank=2, alpha=6, init="pissa", dropout=0.1, overrides=overrides)
    params = jlora.wrap(tree(), spec)
    assert params["bare"]["kernel"].scale == 3 and params["bare"]["kernel"].dropout == 0.1
    assert type(params["dense"]["kernel"]).__name__ == "OftParam"
    assert jlora.LoraSpec.from_dict(spec.to_dict()) == spec


def own(**changes):
    """A variant with something changed."""
    fields = {"base": v.frozen(), "w": v.trained("batch in rank"), "axes": v.static(), "layers": v.static(default=None)}
    body = (
        {
            "__annotations__": dict.fromkeys(fields | changes.get("fields", {}), Any),
            "create": classmethod(lambda cls, base, kernel, key: cls(base, jnp.zeros_like(base), **kernel.place)),
            "effective": lambda self, name, key: self.w,
            "SETTINGS": (),
        }
        | fields
        | changes.pop("fields", {})
        | changes
    )
    cls = type("Own", (jlora.AdaptedParam,), {name: x for name, x in body.items() if x is not None})
    return dataclasses.dataclass(frozen=True, eq=False)(cls)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fields": {"extra": dataclasses.field(default=0)}}, "field extra is declared with none of trained, frozen"),
        ({"create": None}, "no classmethod create"),
        ({"fields": {"w": v.frozen("batch in rank")}}, "none of its fields is trained"),
    ],
)
def test_a_class_that_is_no_variant_yet(changes, message):
    with pytest.raises(ValueError, match=f"variant Own is no variant yet: .*{message}"):
        jlora.LoraSpec(variant=own(**changes))


def test_a_variant_that_makes_something_else():
    with pytest.raises(TypeError, match=r"Own is no pytree; put @jax.tree_util.register_dataclass above"):
        jlora.wrap(tree(), jlora.LoraSpec(targets="dense", variant=own()))
    cls = jax.tree_util.register_dataclass(own(fields={"w": v.trained("batch out rank")}))
    with pytest.raises(
        ValueError, match=r"Own.create made w of shape \(6, 8\) for dense/kernel .* dims 'batch out rank'"
    ):
        jlora.wrap(tree(), jlora.LoraSpec(targets="dense", variant=cls))
    cls = jax.tree_util.register_dataclass(own(fields={"w": v.trained("batch in size")}, effective=lambda *_: None))
    with pytest.raises(TypeError, match=r"Own.effective returned None for dense/kernel; it returns a Factored"):
        jlora.apply(model)(jlora.wrap(tree(), jlora.LoraSpec(targets="dense", variant=cls)), TOKENS)
    bare = lambda self, name, key: v.low_rank(self.base, self.w, self.w)
    cls = jax.tree_util.register_dataclass(own(fields={"w": v.trained("batch in size")}, effective=bare))
    with pytest.raises(ValueError, match=r"the factor 'a' that Own.effective gives .* self.beside"):
        jlora.apply(model)(jlora.wrap(tree(), jlora.LoraSpec(targets="dense", variant=cls)), TOKENS)


def test_keys_and_sites_are_what_they_should_be():
    params = jlora.wrap(tree(), jlora.LoraSpec(targets="dense", rank=2))
    with pytest.raises(TypeError, match=r"apply: rng must be a PRNG key, such as jax.random.key\(0\), found 0"):
        jlora.apply(model, rng=0)
    with pytest.raises(TypeError, match="wrap: key must be a PRNG key"):
        jlora.wrap(tree(), jlora.LoraSpec(rank=2), key=0)
    part = {name: leaf for name, leaf in tree().items() if name != "bare"}
    sites = jlora.sites(lambda p, tokens: p["embed"]["embedding"][tokens] @ p["dense"]["kernel"], part, TOKENS)
    with pytest.raises(ValueError, match="sites do not have bare/kernel, which the parameters have"):
        jlora.wrap(tree(), jlora.LoraSpec(rank=2), sites=sites)
    with pytest.raises(ValueError, match=r"unwrap: dense/kernel lacks some of its arrays"):
        jlora.unwrap(jlora.partition(params)[0])


def test_halves_with_and_without_a_start():
    wrapped = lambda init: jlora.wrap(tree(), jlora.LoraSpec(targets="dense", rank=2, init=init))
    with pytest.raises(
        ValueError, match=r"combine: dense/kernel differs: .*start=\(...\).* in the one tree, .*start=\(\)"
    ):
        jlora.combine(jlora.partition(wrapped("pissa"))[0], jlora.partition(wrapped("kaiming"))[1])


def test_a_class_of_ones_own_is_no_plain_data():
    with pytest.raises(TypeError, match="to_dict: variant is"):
        jlora.LoraSpec(variant=jlora.variants.DoraParam).to_dict()
