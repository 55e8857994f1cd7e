"""`sites`: the kinds, axes and uses that the zoo tells, and `wrap` by what it found."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jlora
from tests.models import MODELS
from tests.programs import PROGRAMS, Program
from tests.test_zoo import leaves_of

ZOO = {program.name: program for program in PROGRAMS + MODELS}
every_program = pytest.mark.parametrize("program", ZOO.values(), ids=ZOO)
# A slice of a table's row is one of a stack of layers too; a lookup of columns is one of a table's columns too.
TOLD_OTHERWISE = {"embedding_0d_by_slice": "other", "take_columns": "embedding"}

SHAPE = jax.ShapeDtypeStruct
WHOLE = SHAPE((5, 6), jnp.float32)


def sites_of(program: Program) -> Mapping[str, Any]:
    return _sites_of(program.name)


@functools.cache
def _sites_of(name: str) -> Mapping[str, Any]:
    program = ZOO[name]
    return jlora.sites(program.fn, program.params, *program.args)


def axes_of(axes: Any, shape: tuple[int, ...]) -> Any:
    """The groups as tuples, without the axes of size 1, which belong to any."""
    groups = dataclasses.astuple(axes) if isinstance(axes, jlora.Axes) else axes
    return groups and tuple(tuple(i for i in group if shape[i] > 1) for group in groups)


# -------------------------------------------------------------------------------- the zoo's truths


@every_program
def test_kinds_and_axes(program):
    """As the program tells; a kernel that the walk can't follow may be of kind other, and has no axes then."""
    found, leaves = sites_of(program), leaves_of(program.params)
    assert list(found) == list(leaves)
    for path, truth in program.axes.items():
        site, shape = found[path], leaves[path].shape
        if program.name in TOLD_OTHERWISE:
            assert site.kind == TOLD_OTHERWISE[program.name]
        elif program.factored is True or site.kind != "other":
            assert site.kind == program.kind[path]
            assert site.axes is None if site.kind == "other" else axes_of(site.axes, shape) == axes_of(truth, shape)
        else:
            assert site.axes is None


@every_program
def test_vectors_are_no_kernels(program):
    for site in (sites_of(program)[path] for path, leaf in leaves_of(program.params).items() if leaf.ndim < 2):
        assert (site.kind, site.axes) == ("other", None)


def test_axes_of_size_one_are_out():
    """Whatever the product does with them."""
    kernel, x = SHAPE((1, 6, 10), jnp.float32), SHAPE((5, 1, 6), jnp.float32)
    found = jlora.sites(lambda p, x: jnp.tensordot(x, p["w"], 2), {"w": kernel}, x)
    assert found["w"].axes == jlora.Axes((1,), (0, 2))


# -------------------------------------------------------------------------------- uses

COUNTS = {
    "dot_rhs": {"w": 1},
    "same_kernel_twice": {"w": 2},
    "index_unrolled": {"w": 3},
    "scan_constant": {"w": 1, "v": 1},
    "linen_lstm": {"cell/hi/kernel": 1},
    "switch_three_kernels": {"a": 3, "b": 3, "c": 3},
    "never_used": {"unused": 0},
    "embedding_tied": {"e": 2},
    "grad_inside": {"w": 2},
    "jit_shared_by_adapted_and_plain": {"a": 1, "b": 1, "plain": 1},
}


@pytest.mark.parametrize("name", COUNTS)
def test_uses(name):
    found = sites_of(ZOO[name])
    assert {path: len(found[path].uses) for path in COUNTS[name]} == COUNTS[name]


def test_a_use_tells_where_it_stands():
    (use,) = sites_of(ZOO["dot_rhs"])["w"].uses
    assert (use.kind, use.primitive, use.axes) == ("dot", "dot_general", jlora.Axes((0,), (1,)))
    line = ZOO["dot_rhs"].fn.__code__.co_firstlineno + 2
    assert use.source == f"{ZOO['dot_rhs'].fn.__code__.co_filename}:{line} (dot_rhs)"


def test_uses_are_in_the_order_of_the_program():
    kinds = [use.kind for use in sites_of(ZOO["embedding_tied"])["e"].uses]
    assert kinds == ["embedding", "dot"]


def test_calls_of_one_compiled_function_are_uses_of_their_own():
    inner = jax.jit(lambda w, x: x @ w)
    fn = lambda p, x: inner(p["w"], x) + inner(p["w"], 2 * x)
    found = jlora.sites(fn, {"w": SHAPE((6, 6), jnp.float32)}, WHOLE)
    assert len(found["w"].uses) == 2


def contradictory(p, x):
    return x @ p["w"].reshape(6, 20), jnp.einsum("nb,abc->nac", x[:, :4], p["w"])


CUBE = {"w": SHAPE((6, 4, 5), jnp.float32), "v": SHAPE((6, 7), jnp.float32)}


def test_contradictory_uses_have_no_axes():
    site = jlora.sites(contradictory, CUBE, WHOLE)["w"]
    assert site.kind == "dot" and site.axes is None
    assert [use.axes for use in site.uses] == [jlora.Axes((0,), (1, 2)), jlora.Axes((1,), (0, 2))]


def test_a_tied_table_takes_its_axes_from_the_lookup():
    """Also where the product comes first."""
    fn = lambda p, x, ids: (x @ p["e"].T, p["e"][ids])
    found = jlora.sites(fn, {"e": SHAPE((11, 6), jnp.float32)}, WHOLE, SHAPE((3,), jnp.int32))
    assert (found["e"].kind, found["e"].axes) == ("embedding", jlora.Axes((0,), (1,)))


def test_both_ways_round_is_no_contradiction():
    assert sites_of(ZOO["both_ways"])["w"].axes == jlora.Axes((0,), (1,))


def test_a_penalty_does_not_hide_the_product():
    found = sites_of(ZOO["penalty"])["w"]
    assert found.axes == jlora.Axes((0,), (1,))
    assert {use.kind for use in found.uses} == {"dot", "other"}


def test_tables_side_by_side_are_looked_up():
    """A lookup in one of both, after which they are put together, is one of that table."""
    table = SHAPE((9, 6), jnp.float32)
    whole = jlora.sites(lambda p, ids: jnp.concatenate([p["a"], p["b"]])[ids], {"a": table, "b": table}, jnp.arange(3))
    assert {site.kind for site in whole.values()} == {"embedding"}
    rows = lambda p, ids: jnp.concatenate([p["a"][ids], jnp.ones((2, 6))]) * 2
    assert jlora.sites(rows, {"a": table}, jnp.arange(3))["a"].kind == "embedding"
    stacked = lambda p, ids: jnp.tanh(jnp.concatenate([jnp.take(p["s"], ids, axis=0), p["t"]]))
    stacks = {"s": SHAPE((3, 6, 4), jnp.float32), "t": SHAPE((2, 6, 4), jnp.float32)}
    assert jlora.sites(stacked, stacks, jnp.arange(2))["s"].kind == "embedding"


# -------------------------------------------------------------------------------- what it takes

TRACED = ["linen_scan", "linen_transformer_with_tied_embedding", "nnx_transformer", "haiku_attention", "equinox_mlp"]


@pytest.mark.parametrize("name", TRACED)
def test_shapes_are_enough(name):
    program = ZOO[name]
    shapes = jax.eval_shape(lambda *tree: tree, program.params, *program.args)
    assert dict(jlora.sites(program.fn, *shapes)) == dict(sites_of(program))


def test_static_arguments_and_keywords():
    def fn(p, x, *, train, name):
        return x @ p["w"] if train and name == "w" else x @ p["v"]

    params = {"w": np.ones((6, 4), np.float32), "v": np.ones((6, 4), np.float32)}
    found = jlora.sites(fn, params, np.ones((5, 6), np.float32), train=True, name="w")
    assert (len(found["w"].uses), len(found["v"].uses)) == (1, 0)


def test_results_of_any_kind():
    found = jlora.sites(lambda p, x: (None, "name", {"y": x @ p["w"]}, 3), {"w": SHAPE((6, 4), jnp.float32)}, WHOLE)
    assert found["w"].kind == "dot"


def test_numbers_among_the_leaves():
    found = jlora.sites(lambda p, x: p["n"] * (x @ p["w"]), {"w": SHAPE((6, 4), jnp.float32), "n": 2.0}, WHOLE)
    assert found["w"].kind == "dot"


def test_functions_among_the_leaves():
    """As an Equinox module has them."""
    net = eqx.nn.MLP(6, 3, 8, 1, key=jax.random.key(0))
    found = jlora.sites(lambda net, x: jax.vmap(net)(x), net, jnp.ones((5, 6)))
    assert found["layers/0/weight"].axes == jlora.Axes((1,), (0,))


def test_the_trace_is_abstract():
    """No array is made: a kernel of 4 TB does no harm."""
    kernel, x = SHAPE((10**6, 10**6), jnp.float32), SHAPE((2, 10**6), jnp.float32)
    assert jlora.sites(lambda p, x: x @ p["w"], {"w": kernel}, x)["w"].axes == jlora.Axes((0,), (1,))


# -------------------------------------------------------------------------------- what it gives


def test_it_is_a_mapping():
    found = sites_of(ZOO["never_used"])
    assert len(found) == 2 and set(found) == {"w", "unused"} and "other" not in found
    with pytest.raises(KeyError):
        found["other"]


def test_layers_that_are_alike_share_a_row():
    fn = lambda p, x: functools.reduce(lambda x, name: x @ p[name], sorted(p), x)
    table = str(jlora.sites(fn, {f"w_{i}": SHAPE((6, 6), jnp.float32) for i in range(3)}, WHOLE))
    assert table == ("path      count  shape   kind  uses  in    out\nw_{0..2}  3x     (6, 6)  dot   1     (0,)  (1,)")


def test_table():
    def fn(p, x):
        layer = lambda x, w: (x + jnp.einsum("nd,dhk->nhk", x, w).sum(), None)
        return jax.lax.scan(layer, x * p["norm"], p["layers"]["w"])

    params = {"layers": {"w": SHAPE((3, 6, 2, 4), jnp.float32)}, "norm": SHAPE((6,), jnp.float32)}
    assert str(jlora.sites(fn, params, WHOLE)) == (
        "path      shape         kind   uses  in    out     batch\n"
        "layers/w  (3, 6, 2, 4)  dot    1     (1,)  (2, 3)  (0,)\n"
        "norm      (6,)          other  1"
    )


# -------------------------------------------------------------------------------- wrap by the sites

WRAPPED = [
    "linen_mlp",
    "linen_transformer_with_tied_embedding",
    "linen_dense_general",
    "linen_einsum",
    "linen_lstm",
    "linen_scan",
    "linen_scan_at_axis_one",
    "linen_scan_remat_with_policy",
    "linen_batch_norm",
    "nnx_transformer",
    "nnx_stacked_nnx_scan",
    "nnx_linear_general_and_einsum",
    "equinox_mlp",
    "equinox_attention",
    "haiku_mlp",
    "haiku_attention",
]


def nodes_of(tree: Any) -> dict[str, jlora.LoraParam]:
    is_node = lambda x: isinstance(x, jlora.LoraParam)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node)
    path_of = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value")
    return {path_of(keys): leaf for keys, leaf in leaves if is_node(leaf)}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrap_takes_targets_and_axes_from_the_sites(name):
    """Every kernel of a product, with the axes of the truth; then apply needs no dense computation: all on shapes."""
    program = ZOO[name]
    params, args = jax.eval_shape(lambda *tree: tree, program.params, program.args)
    wrapped = jlora.wrap(params, jlora.LoraSpec(rank=2), sites=sites_of(program))
    nodes = nodes_of(wrapped)
    assert set(nodes) == {path for path, kind in program.kind.items() if kind == "dot"}
    assert {path: axes_of(node.axes, node.shape) for path, node in nodes.items()} == {
        path: axes_of(program.axes[path], node.shape) for path, node in nodes.items()
    }
    found = jax.eval_shape(jlora.apply(program.fn, fallback="error"), wrapped, *args)
    assert found == jax.eval_shape(program.fn, params, *args)


def test_wrap_takes_an_embedding_that_is_named():
    program = ZOO["linen_transformer_with_tied_embedding"]
    spec = jlora.LoraSpec(targets="embed/embedding", rank=2)
    node = jlora.wrap(program.params, spec, sites=sites_of(program))["embed"]["embedding"]
    assert not np.any(node.lora_a) and np.any(node.lora_b)


def test_sites_of_the_variables_are_those_of_the_parameters():
    """Traced on {"params": params, ...}, used for params."""
    program = ZOO["linen_batch_norm"]
    found = sites_of(program)
    assert "params/up/kernel" in found
    wrapped = jlora.wrap(program.params["params"], jlora.LoraSpec(rank=2), sites=found)
    assert set(nodes_of(wrapped)) == {"up/kernel", "down/kernel"}


def test_sites_of_another_tree():
    message = "sites are of another tree: they have paths such as w, the parameters up/kernel"
    with pytest.raises(ValueError, match=message):
        jlora.wrap({"up": {"kernel": jnp.ones((6, 4))}}, jlora.LoraSpec(rank=2), sites=sites_of(ZOO["dot_rhs"]))


def test_contradictory_uses_are_an_error_that_lists_them():
    found = jlora.sites(contradictory, CUBE, WHOLE)
    with pytest.raises(ValueError, match="sites do not tell the axes of w of shape") as caught:
        jlora.wrap(CUBE, jlora.LoraSpec(rank=2), sites=found)
    message = str(caught.value)
    assert len(re.findall(r"dot \(dot_general\) Axes\(.*?\) \S+test_sites\.py:\d+ \(contradictory\)", message)) == 2
    assert "LoraSpec(axes={'w': jlora.Axes(...)})" in message


def test_the_spec_decides_where_the_sites_cannot():
    found = jlora.sites(contradictory, CUBE, WHOLE)
    axes = jlora.Axes((0,), (1, 2))
    wrapped = jlora.wrap(CUBE, jlora.LoraSpec(rank=2, axes={"w": axes}), sites=found)
    assert wrapped["w"].axes == axes


def test_all_linear_leaves_out_what_is_not_used():
    program = ZOO["never_used"]
    assert set(nodes_of(jlora.wrap(program.params, jlora.LoraSpec(rank=2), sites=sites_of(program)))) == {"w"}


def test_a_target_that_is_not_used_is_an_error():
    program = ZOO["never_used"]
    with pytest.raises(ValueError, match=r"axes of unused of shape .* the function does not use it"):
        jlora.wrap(program.params, jlora.LoraSpec(targets="unused", rank=2), sites=sites_of(program))


def test_convolutions_are_no_linear_layers():
    program = ZOO["linen_conv"]
    assert set(nodes_of(jlora.wrap(program.params, jlora.LoraSpec(rank=2), sites=sites_of(program)))) == {"head/kernel"}


def test_experts_of_ragged_products_are_linear_layers():
    program = ZOO["ragged_mlp"]
    nodes = nodes_of(jlora.wrap(program.params, jlora.LoraSpec(rank=2), sites=sites_of(program)))
    assert nodes["up"].axes == nodes["down"].axes == jlora.Axes((1,), (2,), (0,))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, name="attention")(nn.Dense(6, name="lm_head")(x))


def test_end_to_end_on_a_plan():
    """From shapes to a wrapped plan of factors, without an array."""
    net = Attention()
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.ones((5, 6))))["params"]
    found = jlora.sites(net.apply, {"params": params}, WHOLE)
    plan = jax.eval_shape(lambda p: jlora.wrap(p, jlora.LoraSpec(rank=2), sites=found), params)
    shapes = {path: (node.lora_a.shape, node.lora_b.shape) for path, node in nodes_of(plan).items()}
    heads = dict.fromkeys([f"attention/{name}/kernel" for name in ("key", "query", "value")], ((6, 2), (2, 2, 3)))
    assert shapes == heads | {"attention/out/kernel": ((2, 3, 2), (2, 6))}
