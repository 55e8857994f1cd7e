"""Products that share their input: one x @ [A ...], and the values and gradients of the merged function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora
from tests.support import equations, randomised

DIM, RANKS = 8, {"q": 2, "k": 3, "v": 2}
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, DIM)), jnp.float32)


def kernels(**shapes):
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


SQUARE = kernels(q=(DIM, DIM), k=(DIM, 6), v=(DIM, DIM))


def wrapped(params, axes=None, **settings):
    overrides = {name: {"rank": rank, "alpha": 3 * rank + len(name)} for name, rank in RANKS.items() if name in params}
    axes = {name: axes or jlora.Axes(0, 1) for name in params}
    return randomised(jlora.wrap(params, jlora.LoraSpec(targets=[*params], axes=axes, overrides=overrides, **settings)))


def mixed(q, k, v):
    return jnp.tanh(q).sum() + jnp.sin(k).sum() + (v * v).sum()


def plain(p, x):
    return mixed(x @ p["q"], x @ p["k"], x @ p["v"])


def of_casts(p, x):
    """As Flax's Dense does it: x is cast for each product."""
    dense = lambda name: x.astype(jnp.bfloat16) @ p[name].astype(jnp.bfloat16)
    return mixed(*(dense(name).astype(jnp.float32) for name in "qkv"))


def of_reshapes(p, x):
    dense = lambda name: (x.reshape(-1, DIM) @ p[name]).reshape(*x.shape[:-1], -1)
    return mixed(*map(dense, "qkv"))


def of_names(p, x):
    return mixed(*(checkpoint_name(x, name) @ p[name] for name in "qkv"))


def on_the_left(p, x):
    dense = lambda name: lax.dot_general(p[name], x, (((0,), (2,)), ((), ())))
    return mixed(*map(dense, "qkv"))


def turned(p, x):
    """Of kernels that lie the other way round."""
    return mixed(*(x @ p[name].T.reshape(-1, DIM).T for name in "qkv"))


def stacked(p, x):
    """As experts, each with its own rows: a batch axis."""
    return mixed(*(jnp.einsum("ebd,edf->ebf", x, p[name]) for name in "qkv"))


def in_a_loop(p, x):
    def step(x, _):
        return jnp.tanh(x @ p["q"] + x @ p["v"] + (x @ p["k"]).sum(-1, keepdims=True)), None

    return lax.scan(step, x, length=3)[0].sum()


def under_remat(p, x):
    return jax.checkpoint(plain)(p, x)


ALIKE = [plain, of_reshapes, of_names, on_the_left, turned, in_a_loop, under_remat]
GROUPED = [*ALIKE, of_casts]


def into_factors(jaxpr):
    """How many products with first factors a program has: those whose result ends in a rank, and which rank."""
    found = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "low_rank_product"]
    return [eqn.outvars[0].aval.shape[-1] for eqn in found if eqn.params["fn"].out[-1] == "rank"]


def groups(fn, tree, *args):
    return [use.group for use in jlora.explain(fn, tree, *args).uses]


@pytest.mark.parametrize("fn", GROUPED)
def test_products_of_one_input_are_one_product_with_the_first_factors(fn):
    tree = wrapped(SQUARE)
    assert into_factors(jax.make_jaxpr(jlora.apply(fn))(tree, X)) == [sum(RANKS.values())]
    assert {frozenset(group) for group in groups(fn, tree, X)} == {frozenset("qkv")}


def test_those_of_a_batch_axis_too():
    tree = wrapped(kernels(q=(2, DIM, 4), k=(2, DIM, 4), v=(2, DIM, 6)), axes=jlora.Axes(1, 2, 0))
    assert into_factors(jax.make_jaxpr(jlora.apply(stacked))(tree, X)) == [7]
    check_against_merged(stacked, tree, X)


def gradients(fn, tree, x):
    trainable, frozen = jlora.partition(tree)
    return jax.value_and_grad(lambda t, x: fn(jlora.combine(t, frozen), x), argnums=(0, 1))(trainable, x)


def check_against_merged(fn, tree, x):
    """Values and gradients are within 1e-5 of those of the merged function in float64."""
    ours = gradients(jlora.apply(fn), tree, x)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (tree, x))
        exact = gradients(lambda tree, x: fn(jlora.merge(tree), x), *double)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("fn", ALIKE)
def test_values_and_gradients_are_those_of_the_merged_function(fn):
    check_against_merged(fn, wrapped(SQUARE), X)


def test_the_backward_pass_has_one_product_to_the_input_and_one_to_the_factors():
    """Beside two for each kernel: of its second factor, and from it."""
    tree = wrapped(SQUARE)
    jaxpr = jax.make_jaxpr(lambda tree, x: gradients(jlora.apply(plain), tree, x))(tree, X)
    names = [eqn.primitive.name for eqn in equations(jaxpr.jaxpr)]
    assert names.count("low_rank_product") == 2 + 3 * 3  # x @ [A ...] is a dot_general, seen by policies


def test_quantised_bases_are_grouped():
    axes = dict.fromkeys("qkv", jlora.Axes(0, 1))
    params = kernels(q=(64, 64), k=(64, 64), v=(64, 64))
    tree = wrapped(jlora.quant.quantize(params, "int8", targets=[*params], axes=axes))
    x = jnp.ones((3, 64))
    assert {frozenset(group) for group in groups(plain, tree, x)} == {frozenset("qkv")}
    np.testing.assert_allclose(jlora.apply(plain)(tree, x), plain(jlora.merge(tree, dtype=jnp.float32), x), rtol=1e-5)


def test_dropout_draws_for_each_kernel_and_explain_says_so():
    tree = wrapped(SQUARE, dropout=0.5)
    dropped = jlora.apply(plain, rng=jax.random.key(0))
    assert sorted(into_factors(jax.make_jaxpr(dropped)(tree, X))) == sorted(RANKS.values())
    assert "with dropout on, one each" in str(jlora.explain(plain, tree, X)).replace("\n    ", " ")


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: mixed(x @ p["q"], (x + 1) @ p["k"], (2 * x) @ p["v"]),
        lambda p, x: mixed(x @ p["q"], x @ p["k"] * 0, x.astype(jnp.bfloat16) @ p["v"].astype(jnp.bfloat16)),
        lambda p, x: mixed(x @ p["q"], jnp.matmul(x, p["k"], precision="highest"), x[:1] @ p["v"]),
    ],
    ids=["other inputs", "another type", "other settings"],
)
def test_what_is_not_the_same_product_is_not_grouped(fn):
    tree = wrapped(SQUARE)
    assert all(len(group) < 3 for group in groups(fn, tree, X))
    ours, merged = jlora.apply(fn)(tree, X), fn(jlora.merge(tree), X)
    np.testing.assert_allclose(ours, merged, rtol=2e-2 if "bfloat16" in str(jax.make_jaxpr(fn)(SQUARE, X)) else 1e-5)


def test_an_input_transform_stands_alone():
    """OFT turns x first; DoRA and IA3 scale the result, which changes no group."""
    params = kernels(q=(DIM, DIM), k=(DIM, DIM))
    fn = lambda p, x: (x @ p["q"]).sum() + jnp.sin(x @ p["k"]).sum()
    dora = randomised(
        jlora.wrap(params, jlora.LoraSpec(targets=["q", "k"], rank=2, variant="dora", axes={"q|k": jlora.Axes(0, 1)}))
    )
    assert {frozenset(group) for group in groups(fn, dora, X)} == {frozenset("qk")}
    check_against_merged(fn, dora, X)


class Attention(nn.Module):
    """Query, key and value of linen are multiplied as matrices that their kernels are reshaped to."""

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, dtype=jnp.bfloat16)(x)


def test_a_group_is_found_in_linens_attention():
    params = Attention().init(jax.random.key(0), X)
    tree = randomised(jlora.wrap(params, jlora.LoraSpec(rank=2)))
    sizes = sorted(len(group) for group in groups(Attention().apply, tree, X))
    assert sizes == [0, 3, 3, 3]


@pytest.mark.parametrize("differ", [False, True])
def test_on_a_mesh_of_explicit_axes_nothing_is_moved_for_a_group(differ):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    place = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    with jax.set_mesh(mesh):
        params = {"q": place(SQUARE["q"], "model", None), "v": place(SQUARE["v"], None if differ else "model", None)}
        axes = {"q|v": jlora.Axes(0, 1)}
        tree = jlora.wrap(params, jlora.LoraSpec(targets=["q", "v"], rank=2, axes=axes))
        product = lambda x, w: lax.dot_general(x, w, (((1,), (0,)), ((), ())), out_sharding=PartitionSpec("data", None))
        fn = lambda p, x: product(x, p["q"]) + product(x, p["v"])
        x = place(jnp.ones((4, DIM)), "data", None if differ else "model")
        found = {frozenset(group) for group in groups(fn, tree, x)}
        np.testing.assert_allclose(jlora.apply(fn)(tree, x), fn(params, x), rtol=1e-6)
    assert found == ({frozenset()} if differ else {frozenset("qv")})
