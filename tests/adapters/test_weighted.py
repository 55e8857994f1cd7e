"""`weighted` against the formulas in NumPy; against PEFT itself in `test_oracle`."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.adapters import combine, extract, pruning, resize, weighted
from jlora.adapters.combine import METHODS
from jlora.adapters.weighted import keys_of
from tests.adapters import reference
from tests.optim.support import noisy
from tests.support import same_bits

TARGETS = ("query", "table", "layers", "conv", "head")
AXES = {
    "query/kernel": jlora.Axes(0, (1, 2)),
    "table/embedding": jlora.Axes(0, 1),
    "layers/kernel": jlora.Axes(1, 2, 0),
    "conv/kernel": jlora.Axes((0, 1, 2), 3),
}
WEIGHTS, KEY = (0.7, -0.4, 1.5), jax.random.key(7)
PRUNING = {"density": 0.6}
CASES = {
    **{method: (method, PRUNING if method not in ("linear", "cat", "svd") else {}) for method in METHODS},
    "svd of a rank": ("svd", {"svd_rank": 1}),
    "frequency": ("ties", {"density": 0.6, "majority_sign_method": "frequency"}),
    "frequency_svd": ("dare_ties_svd", {"density": 0.6, "majority_sign_method": "frequency"}),
    "all": ("ties", {"density": 1}),
}


@functools.cache
def base():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "query": {"kernel": normal(6, 2, 3), "bias": normal(2, 3)},
        "table": {"embedding": normal(9, 5)},
        "layers": {"kernel": normal(3, 6, 5)},
        "conv": {"kernel": normal(2, 2, 3, 4)},
        "head": {"kernel": normal(6, 4)},
    }


@functools.cache
def tree(seed, **settings):
    """With other values for each seed; `without` names what it lacks."""
    settings = {"targets": TARGETS, "rank": 2, "alpha": 3 + seed, "axes": AXES} | settings
    made = noisy(base(), jlora.LoraSpec(**settings), std=1.0)
    shifted = lambda x: (
        x * np.float32(1 + seed) + jnp.sin(jnp.arange(x.size, dtype=x.dtype) * (seed + 1)).reshape(x.shape)
    )
    trainable, frozen = jlora.partition(made)
    return jlora.combine(jax.tree.map(shifted, trainable), frozen)


@functools.cache
def trees():
    """The second has no head, the third no table."""
    return [tree(0), tree(1, targets=TARGETS[:4], dropout=0.5), tree(2, targets=("query", "layers", "conv", "head"))]


def turned():
    axes = {**AXES, "head/kernel": jlora.Axes(1, 0)}
    return jlora.wrap(base(), jlora.LoraSpec(targets=TARGETS, rank=2, axes=axes))


def nodes(tree):
    paths, leaves, _ = jlora.targets.paths.flatten(tree, lambda x: isinstance(x, jlora.AdaptedParam))
    return {path: x for path, x in zip(paths, leaves, strict=True) if isinstance(x, jlora.AdaptedParam)}


def places(path, node):
    """The node's factors as matrices, for each of its places, and DARE's key there."""
    n = len(node.axes.batch_axis)
    a, b = np.asarray(node.lora_a), np.asarray(node.lora_b)
    a = a.reshape(*a.shape[:n], -1, node.rank)
    b = b.reshape(*b.shape[: n + 1], -1)
    keys = keys_of(path, node.shape, node.axes, None, KEY)
    return [(a[i], b[i], keys[i]) for i in np.ndindex(a.shape[:n])] if n else [(a, b, keys)]


def masks_of(key, numbers, a, b, density):
    of = lambda part, shape: [
        np.asarray(pruning.drawn(combine.part_key(key, number, part), shape, density)) for number in numbers
    ]
    return [of(combine.A, a.shape), of(combine.B, b.shape), of(combine.UPDATE, (len(a), b.shape[1]))]


def expected(path, of_trees, method, settings):
    """The updates of one kernel, place by place."""
    numbers = [i for i, x in enumerate(of_trees) if path in x]
    found = [of_trees[i][path] for i in numbers]
    for parts in zip(*(places(path, node) for node in found), strict=True):
        pairs, key = [(a, b) for a, b, _ in parts], parts[0][2]
        is_random = method.startswith("dare")
        masks = masks_of(key, numbers, *pairs[0], settings["density"]) if is_random else None
        yield reference.update(
            pairs, [node.scale for node in found], [WEIGHTS[i] for i in numbers], method, settings.get("density"),
            settings.get("majority_sign_method", "total"), settings.get("svd_rank", 2), masks,
        )  # fmt: skip


@pytest.mark.parametrize(("method", "settings"), CASES.values(), ids=CASES)
def test_each_method_is_its_formula(method, settings):
    key = {"key": KEY} if method.startswith("dare") else {}
    made = weighted(trees(), WEIGHTS, method, **settings, **key)
    of_trees = [nodes(x) for x in trees()]
    assert nodes(made).keys() == of_trees[0].keys()
    for path, node in nodes(made).items():
        for (a, b, _), wanted in zip(places(path, node), expected(path, of_trees, method, settings), strict=True):
            np.testing.assert_allclose(a @ b, wanted, atol=2e-5 * np.abs(wanted).max(), err_msg=path)


def test_the_result_is_a_tree_of_plain_lora_on_the_first_base():
    made = weighted(trees(), WEIGHTS, "cat")
    assert {path: node.rank for path, node in nodes(made).items()} == {
        "conv/kernel": 6, "head/kernel": 4, "layers/kernel": 6, "query/kernel": 6, "table/embedding": 4
    }  # fmt: skip
    assert all(type(x) is jlora.LoraParam and x.scale == 1 and not x.start for x in nodes(made).values())
    assert nodes(made)["query/kernel"].dropout == 0
    assert nodes(weighted(trees()[::-1], WEIGHTS, "cat"))["table/embedding"].dropout == 0.5
    assert same_bits(jlora.unwrap(made), base())


def test_it_traces_and_has_gradients_in_the_weights():
    leaf = lambda tree: tree["query"]["kernel"]
    mixed = lambda method: lambda w: leaf(jlora.merge(weighted(trees(), w, method)))
    updates = [leaf(jlora.merge(x)) - leaf(base()) for x in trees()]
    for method in ("cat", "svd", "linear"):
        w = jnp.asarray(WEIGHTS)
        np.testing.assert_allclose(jax.jit(mixed(method))(w), mixed(method)(w), rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda w: mixed("cat")(w).sum())(jnp.zeros(3))
    np.testing.assert_allclose(gradient, [u.sum() for u in updates], rtol=1e-4, atol=1e-3)


def test_trees_may_be_traced_or_planned():
    heads = [{"head": x["head"]} for x in (trees()[0], trees()[2])]
    mix = lambda trees, w: weighted(trees, w, "ties_svd", density=0.6)
    made = mix(heads, [1.0, 2.0])["head"]["kernel"]
    traced = jax.jit(mix)(heads, jnp.array([1.0, 2.0]))["head"]["kernel"]
    np.testing.assert_allclose(traced.lora_a @ traced.lora_b, made.lora_a @ made.lora_b, atol=1e-4)
    planned = mix(jax.eval_shape(lambda x: x, heads), [1.0, 2.0])
    assert jax.tree.structure(planned) == jax.tree.structure({"head": {"kernel": made}})
    assert planned["head"]["kernel"].lora_a.shape == (6, 2)


def test_layers_and_starts_are_plain_updates():
    """Of stacked kernels those that are adapted; of PiSSA's the difference from the start."""
    some = [tree(0, layers=(0, 2)), tree(1, layers=(1, 2)), tree(2, init="pissa", scaling=0.5)]
    some = [{"layers": x["layers"]} for x in some]
    found = jlora.merge(weighted(some, WEIGHTS, "cat"))
    update = lambda x: jlora.merge(x)["layers"]["kernel"] - base()["layers"]["kernel"]
    wanted = sum(w * update(x) for w, x in zip(WEIGHTS, some, strict=True))
    np.testing.assert_allclose(update(weighted(some, WEIGHTS, "cat")), wanted, atol=1e-4)
    assert found["layers"]["kernel"].shape == (3, 6, 5)
    turned = weighted(some[2:] * 2, [1.0, -0.5], "svd")  # of rank 2r: exact
    np.testing.assert_allclose(update(turned), 0.5 * update(some[2]), atol=1e-4)
    alike = [{"layers": tree(seed, layers=(0, 2))["layers"]} for seed in (0, 1)]
    made = weighted(alike, [1.0, 2.0], "ties", density=0.5)["layers"]["kernel"]
    whole = weighted([{"layers": tree(seed)["layers"]} for seed in (0, 1)], [1.0, 2.0], "linear")["layers"]["kernel"]
    assert made.layers == (0, 2) and made.lora_a.shape == (2, 6, 2) and whole.layers is None


def test_dare_draws_by_path_and_tree_and_is_right_on_average():
    kernel = jlora.unwrap(tree(0))["head"]["kernel"]
    one = [{"a": {"kernel": x["head"]["kernel"]}, "b": {"kernel": x["head"]["kernel"]}} for x in (tree(0), tree(0))]
    dare = lambda key: weighted(one, [1.0, 1.0], "dare_linear_svd", density=0.5, svd_rank=4, key=key)
    made = dare(KEY)
    assert same_bits(made, dare(KEY)) and not same_bits(made["a"], made["b"])
    keys = jax.random.split(KEY, 2000)
    mean = jnp.mean(jax.vmap(lambda key: jlora.merge(dare(key))["a"]["kernel"] - kernel)(keys), 0)
    wanted = 2 * (jlora.merge(one[0])["a"]["kernel"] - kernel)
    np.testing.assert_allclose(mean, wanted, atol=0.1 * float(jnp.abs(wanted).max()))


WRONG = {
    "method": (lambda t: (t, WEIGHTS, "tie"), {}, "method must be one of linear, cat.*did you mean 'ties'"),
    "weights": (lambda t: (t, [1.0, 2.0], "cat"), {}, "expected 3 weights"),
    "infinite weight": (lambda t: (t, [1.0, 2.0, np.inf], "cat"), {}, "weights must be finite"),
    "no trees": (lambda t: ([], [], "cat"), {}, "at least one wrapped tree"),
    "no density": (lambda t: (t, WEIGHTS, "ties"), {}, "needs density.*found None"),
    "density": (lambda t: (t, WEIGHTS, "ties"), {"density": 1.5}, "above 0 and at most 1, found 1.5"),
    "nothing kept": (lambda t: (t, WEIGHTS, "ties"), {"density": 0.05}, "keeps none of the .* values of a factor of"),
    "majority": (lambda t: (t, WEIGHTS, "ties"), {"density": 0.5, "majority_sign_method": "most"}, "'total' or 'freq"),
    "svd_rank": (lambda t: (t, WEIGHTS, "svd"), {"svd_rank": 0}, "svd_rank must be a positive integer"),
    "one": (lambda t: (t[:1], [1.0], "ties"), {"density": 0.5}, "PEFT makes method='linear'"),
    "no wrapped tree": (lambda t: ([t[0], base()], [1.0, 1.0]), {}, "no leaf of tree 1 is wrapped"),
    "ranks": (lambda t: ([t[0], tree(1, rank=3)], [1, 1]), {}, "those of conv/kernel have 2, 3. method='cat'"),
    "other leaves": (lambda t: ([t[0], {"head": t[0]["head"]}], [1, 1]), {}, "only one has conv/kernel"),
    "other axes": (lambda t: ([t[0], turned()], [1, 1]), {}, "in several ways"),
    "dora": (lambda t: ([t[0], tree(1, variant="dora")], [1, 1]), {}, "DoraParam: magnitudes do not add up"),
    "vera": (lambda t: ([t[0], tree(1, variant="lora_fa")], [1, 1]), {}, "jlora.to_plain_lora"),
    "in full": (lambda t: ([t[0], tree(1, train=("bias",))], [1, 1]), {}, "query/bias of tree 1.*trained in full"),
    "bias of B": (lambda t: ([t[0], tree(1, targets="query", lora_bias=True)], [1, 1]), {}, "only low-rank updates"),
    "half": (lambda t: ([t[0], jlora.partition(t[0])[1]], [1, 1]), {}, "lacks some of its arrays"),
}


@pytest.mark.parametrize(("given", "settings", "message"), WRONG.values(), ids=WRONG)
def test_what_is_refused(given, settings, message):
    with pytest.raises((ValueError, TypeError), match=re.compile(rf"adapters\.weighted.*{message}", re.DOTALL)):
        weighted(*given(trees()), **settings)


def test_what_a_method_does_without_counts_for_nothing():
    one = weighted(trees(), WEIGHTS, "cat", density=0.5, svd_rank=1, majority_sign_method="frequency")
    assert same_bits(one, weighted(trees(), WEIGHTS, "cat"))


def test_dare_without_a_key_takes_the_first():
    found = [weighted(trees(), WEIGHTS, "dare_linear", density=0.5, key=key) for key in (None, jax.random.key(0))]
    assert same_bits(*found)


def test_values_are_those_of_one_base():
    one, other = (noisy({"kernel": jnp.full((4, 3), x)}, jlora.LoraSpec(rank=2)) for x in (1.0, 2.0))
    with pytest.raises(ValueError, match="kernel has other values in tree 1 than in tree 0"):
        weighted([one, other], [1, 1])


def test_shapes_are_those_of_one_base():
    one = noisy({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
    other = noisy({"kernel": jnp.ones((4, 5))}, jlora.LoraSpec(rank=2))
    with pytest.raises(ValueError, match=r"kernel has the shapes \(4, 3\) and \(4, 5\)"):
        weighted([one, other], [1, 1])


def test_factors_lie_where_the_base_lies():
    """Those of a sharded kernel as `jlora.wrap` places them; a base may be planned, with the factors there."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    kernel = {"kernel": jax.device_put(jnp.ones((8, 4)), place)}
    wrapped = [jlora.wrap(kernel, jlora.LoraSpec(rank=2, seed=seed)) for seed in (0, 1)]
    like, made = wrapped[0]["kernel"], weighted(wrapped, [1.0, 2.0], "svd")["kernel"]
    others = [resize(wrapped[0], rank) for rank in (1, 3)] + [extract(kernel, {"kernel": jnp.zeros((8, 4))}, 2).tree]
    for node in (made, weighted(wrapped, [1.0, 2.0], "cat")["kernel"], *(tree["kernel"] for tree in others)):
        assert node.base is like.base
        for x, y in ((node.lora_a, like.lora_a), (node.lora_b, like.lora_b)):
            assert x.sharding.is_equivalent_to(y.sharding, 2) and not x.sharding.is_fully_replicated
    plan = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    planned = weighted([{"kernel": dataclasses.replace(x["kernel"], base=plan)} for x in wrapped], [1.0, 2.0], "svd")
    np.testing.assert_allclose(planned["kernel"].lora_a, made.lora_a, atol=1e-6)
    assert planned["kernel"].base is plan
