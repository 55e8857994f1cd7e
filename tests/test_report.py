"""`summary` and `explain`: their numbers against hand counts, their text and their HTML."""

import dataclasses
from html.parser import HTMLParser
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import jlora
from tests.support import adapted
from tests.test_laws import ZOO

SHAPE = jax.ShapeDtypeStruct
SPEC = jlora.LoraSpec(rank=4, alpha=8)
PLAIN = {
    "norm": {"scale": jnp.ones(64)},
    "up": {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)},
}


class Page(HTMLParser):
    """Reads HTML, and refuses tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# -------------------------------------------------------------------------------- summary


def test_summary():
    """64 * 4 + 4 * 32 = 384 of 384 + 64 * 32 + 32 + 64 = 2528 numbers of four bytes."""
    assert str(jlora.summary(jlora.wrap(PLAIN, SPEC))) == (
        "path       shape     adapter  rank  scale  trainable\n"
        "up/kernel  (64, 32)  lora     4     2      384\n"
        "trainable 384 of 2,528, 15.19%; 1.5 KiB of 9.9 KiB"
    )


def test_summary_of_leaves_trained_in_full():
    wrapped = jlora.wrap(PLAIN, dataclasses.replace(SPEC, train="norm", bias="all"))
    table = jlora.summary(wrapped)
    assert [(row[0], row[2], row[5]) for row in table.rows] == [
        ("norm/scale", "in full", "64"),
        ("up/bias", "in full", "32"),
        ("up/kernel", "lora", "384"),
    ]
    assert table.footer == ("trainable 480 of 2,528, 18.99%; 1.9 KiB of 9.9 KiB",)


def test_summary_counts_bytes_by_type():
    """A base of bfloat16 beside factors of float32: 2 * 2048 + 4 * 384 bytes."""
    wrapped = jlora.wrap({"kernel": jnp.ones((64, 32), jnp.bfloat16)}, SPEC)
    assert jlora.summary(wrapped).footer == ("trainable 384 of 2,432, 15.79%; 1.5 KiB of 5.5 KiB",)


def test_summary_counts_every_layer_of_a_stack():
    spec = dataclasses.replace(SPEC, axes={"kernel": jlora.Axes((1,), (2,), (0,))})
    (row,) = jlora.summary(jlora.wrap({"kernel": jnp.ones((3, 64, 32))}, spec)).rows
    assert row == ("kernel", "(3, 64, 32)", "lora", "4", "2", "1,152")


def test_summary_tells_the_rank_and_scale_of_each():
    spec = dataclasses.replace(SPEC, overrides={"b/kernel": {"rank": 2, "scaling": "rslora"}})
    kernels = {name: {"kernel": jnp.ones((8, 8))} for name in "ab"}
    assert [row[3:5] for row in jlora.summary(jlora.wrap(kernels, spec)).rows] == [("4", "2"), ("2", "5.65685")]


@pytest.mark.parametrize("name", ["linen_mlp", "nnx_stacked_lax_scan", "equinox_attention", "haiku_attention"])
def test_summary_agrees_with_partition(name):
    wrapped = adapted(ZOO[name])
    table = jlora.summary(wrapped)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert sum(int(row[5].replace(",", "")) for row in table.rows) == count(jlora.partition(wrapped)[0])
    assert table.footer[0].startswith(f"trainable {count(jlora.partition(wrapped)[0]):,} of {count(wrapped):,}, ")


def test_summary_of_a_plan():
    """A kernel of 40 GB: what it will cost is told without it."""
    plan = jlora.wrap({"kernel": SHAPE((100_000, 200_000), jnp.bfloat16)}, SPEC)
    assert jlora.summary(plan).footer == ("trainable 1,200,000 of 20.0B, 0.01%; 4.6 MiB of 37.3 GiB",)


def test_summary_of_a_plain_tree():
    table = jlora.summary(PLAIN)
    assert table.rows == () and table.footer[0].startswith("trainable 0 of 2,144, 0.00%")


def test_text_of_many_kernels_is_cut():
    many = jlora.wrap({f"layer{i:03}": {"kernel": jnp.ones((4, 4))} for i in range(250)}, jlora.LoraSpec(rank=1))
    lines = str(jlora.summary(many)).splitlines()
    assert len(lines) == 1 + 200 + 2
    assert lines[-2] == "... 50 more rows"
    assert max(map(len, lines)) < 80
    assert len(jlora.summary(many).rows) == 250


def test_columns_are_aligned():
    wrapped = jlora.wrap({name: {"kernel": jnp.ones((4, 4))} for name in ("a", "much_longer")}, jlora.LoraSpec(rank=1))
    header, *rows = str(jlora.summary(wrapped)).splitlines()[:-1]
    for column in ("shape", "adapter", "rank"):
        place = header.index(column)
        assert all(row[place - 1] == " " and row[place] != " " for row in rows)


@pytest.mark.parametrize("names", [("a" * 300,), tuple("abcdefgh" * 30), ("слой_" * 40, "ядро")])
@pytest.mark.parametrize("shape", [(4, 4), (1,) * 30])
def test_text_fits_80_columns(names, shape):
    """The ends of what is too long are there, and all of it in the rows."""
    tree = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    axes = {"*kernel": jlora.Axes(tuple(range(len(shape) - 1)), (len(shape) - 1,))}
    tree["kernel"] = jnp.ones(shape)
    for name in reversed(names):
        tree = {name: tree}
    wrapped = jlora.wrap(tree, jlora.LoraSpec(targets="kernel", rank=1, axes=axes))
    table = jlora.summary(wrapped)
    lines = str(table).splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 80
    assert lines[1].startswith(names[0][:5]) and "kernel" in lines[1]
    assert table.rows[0][:2] == ("/".join([*names, "kernel"]), str(shape))


def test_html_is_a_tree_of_all_leaves():
    page = Page(jlora.summary(jlora.wrap(PLAIN, SPEC))._repr_html_())
    assert {"norm", "scale", "up", "bias", "kernel", "(64, 32)", "lora", "rank 4", "scale 2", "384 train"} <= set(
        page.texts
    )
    assert {"384 of 2,464 train", "64 frozen"} <= set(page.texts)
    assert "trainable 384 of 2,528, 15.19%; 1.5 KiB of 9.9 KiB" in page.texts
    assert page.tags.count("details") == 2 and "script" not in page.tags


def test_html_shows_alike_layers_once():
    layers = {f"layer_{i}": {"kernel": jnp.ones((4, 4))} for i in range(12)}
    layers["layer_5"] = {"kernel": jnp.ones((4, 8))}
    texts = Page(jlora.summary(jlora.wrap({"net": layers}, jlora.LoraSpec(rank=1)))._repr_html_()).texts
    assert {"layer_0-4,6-11", "11x", "layer_5"} <= set(texts)
    assert texts.count("kernel") == 2


def test_html_of_a_large_tree_is_small():
    layer = {f"w{i}": {"kernel": SHAPE((8192, 8192), jnp.bfloat16)} for i in range(12)}
    wrapped = jlora.wrap({f"layer_{i}": layer for i in range(80)}, SPEC)
    assert len(jlora.summary(wrapped)._repr_html_()) < 10_000
    unlike = {
        f"layer_{i}": {f"w{j}": {"kernel": SHAPE((i + 9, j + 9), jnp.float32)} for j in range(12)} for i in range(80)
    }
    assert len(jlora.summary(jlora.wrap(unlike, SPEC))._repr_html_()) < 400_000


def test_html_has_a_leaf_whose_name_is_a_modules_too():
    tree = {"a": jnp.ones(3), "a/b": jnp.ones(5), "kernel": jnp.ones((4, 4))}
    texts = Page(jlora.summary(jlora.wrap(tree, jlora.LoraSpec(rank=1)))._repr_html_()).texts
    assert texts.count("a") == 2 and {"(3,)", "b", "(5,)"} <= set(texts)


def test_html_escapes_names():
    name = "<script>alert('&')<script>"
    page = Page(jlora.summary(jlora.wrap({name: {"kernel": jnp.ones((4, 4))}}, jlora.LoraSpec(rank=1)))._repr_html_())
    assert "script" not in page.tags and name in page.texts


def test_summary_with_functions_among_the_leaves():
    """As an Equinox module has them."""
    net = eqx.nn.MLP(6, 3, 8, 1, key=jax.random.key(0))
    spec = jlora.LoraSpec(targets="weight", rank=2, axes={"weight": jlora.Axes((1,), (0,))})
    assert len(jlora.summary(jlora.wrap(net, spec)).rows) == 2


# -------------------------------------------------------------------------------- explain


def mlp(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def wide(tokens: int = 64, rank: int = 2) -> tuple[Any, Any]:
    spec = jlora.LoraSpec(targets=("up", "down"), rank=rank)
    shapes = {"up": SHAPE((512, 1024), jnp.float32), "down": SHAPE((1024, 512), jnp.float32)}
    return jlora.wrap(shapes, spec), SHAPE((tokens, 512), jnp.float32)


def squashed(p, x):
    return x @ jnp.tanh(p["up"]) @ p["down"]


def test_explain():
    """Abstract arguments are enough."""
    table = jlora.explain(mlp, *wide())
    assert [(use.path, use.shape, use.kind, use.factored, use.reason, use.primitive) for use in table.uses] == [
        ("up", (512, 1024), "dot", True, "", "dot_general"),
        ("down", (1024, 512), "dot", True, "", "dot_general"),
    ]
    line = mlp.__code__.co_firstlineno + 1
    assert {use.source for use in table.uses} == {f"{__file__}:{line} (mlp)"}
    assert table.header == ("path", "shape", "kind", "computed", "by", "at")
    assert table.rows[0] == ("up", "(512, 1024)", "dot", "factored", "dot_general", f"test_report.py:{line} (mlp)")


def test_explain_of_a_dense_use_gives_the_reason():
    up, down = jlora.explain(squashed, *wide()).uses
    assert (up.path, up.factored, up.primitive) == ("up", False, "tanh")
    assert "tanh has no factored rule" in up.reason
    assert down.factored


def test_explain_of_a_returned_kernel():
    (use,) = jlora.explain(lambda p, x: p["up"], *wide()).uses
    assert (use.primitive, use.factored, use.reason) == ("output", False, "the function returns it")


def test_explain_does_not_warn():
    """Of the dense use that the table shows: the suite turns warnings into errors."""
    assert "dense" in str(jlora.explain(squashed, *wide()))


def test_flops_are_those_of_the_plain_model():
    """Two products of rank 2 beside one of 512 by 1024: less than a hundredth more."""
    adapted_flops, plain_flops = jlora.explain(mlp, *wide()).flops
    assert plain_flops == pytest.approx(2 * 2 * 64 * 512 * 1024, rel=0.01)
    assert 1 < adapted_flops / plain_flops < 1.01


def test_flops_of_the_factors_are_counted():
    """2 * tokens * rank * (in + out) for each kernel."""
    adapted_flops, plain_flops = jlora.explain(mlp, *wide(rank=64)).flops
    assert adapted_flops - plain_flops == pytest.approx(2 * 2 * 64 * 64 * (512 + 1024), rel=0.05)


def test_flops_of_a_dense_use_show():
    adapted_flops, plain_flops = jlora.explain(squashed, *wide(tokens=4)).flops
    assert adapted_flops / plain_flops > 1.2


def test_bytes_of_a_dense_use_show():
    factored, dense = (jlora.explain(fn, *wide(tokens=4)).bytes_accessed for fn in (mlp, squashed))
    assert dense[0] / dense[1] > 1.2 > factored[0] / factored[1]


def test_footer():
    table = jlora.explain(squashed, *wide())
    uses, flops, moved, trained = table.footer
    assert uses == "2 uses: 1 factored, 1 dense"
    ratio = table.flops[0] / table.flops[1]
    assert flops == f"forward FLOPs: {table.flops[0] / 1e6:.1f}M, {ratio:.3f}x of the plain model's"
    assert moved.startswith("forward bytes: ") and moved.endswith("x of the plain model's")
    assert trained == jlora.summary(wide()[0]).footer[0] and "%" in trained


def test_explain_takes_a_models_arguments():
    """A tree of variables, a key, a flag, a keyword; results that are no arrays."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            self.sow("intermediates", "x", x)
            return nn.Dropout(0.5, deterministic=not train)(nn.Dense(4, name="up")(x)), None, "name"

    params = jlora.wrap(Net().init(jax.random.key(0), jnp.ones((2, 6)), False)["params"], jlora.LoraSpec(rank=2))
    settings = {"train": True, "rngs": {"dropout": jax.random.key(1)}, "mutable": "intermediates"}
    table = jlora.explain(Net().apply, {"params": params}, jnp.ones((2, 6)), **settings)
    assert [use.path for use in table.uses] == ["params/up/kernel"]


def test_a_scanned_use_is_one():
    program = ZOO["linen_scan_remat"]
    uses = jlora.explain(program.fn, adapted(program), *program.args).uses
    assert sorted(use.path for use in uses) == sorted(program.axes)
    assert all(use.factored for use in uses)


def test_the_shape_of_a_use_is_the_kernels():
    program = ZOO["scan_stacked"]
    uses = jlora.explain(program.fn, adapted(program), *program.args).uses
    assert {use.path: use.shape for use in uses} == {"layers/up": (3, 6, 10), "layers/down": (3, 10, 6)}


def test_each_use_of_a_kernel_has_a_row():
    fn = lambda p, x, ids: (p["e"][ids], x @ p["e"].T, x @ jnp.tanh(p["e"]).T)
    table = jlora.wrap({"e": jnp.ones((9, 6))}, jlora.LoraSpec(targets="e", rank=2))
    uses = jlora.explain(fn, table, jnp.ones((5, 6)), jnp.arange(3)).uses
    assert [(use.kind, use.factored) for use in uses] == [("embedding", True), ("dot", True), ("other", False)]


def test_each_call_of_a_compiled_function_has_a_row():
    inner = jax.jit(lambda w, x: x @ w)
    fn = lambda p, x: inner(p["up"], x) + inner(p["up"], 2 * x)
    assert len(jlora.explain(fn, *wide()).uses) == 2


def test_a_use_inside_a_library_function_tells_the_users_line():
    (use,) = jlora.explain(lambda p, x: x @ jnp.sort(p["up"], axis=0), *wide()).uses
    assert use.source.startswith(f"{__file__}:")


def test_no_use():
    table = jlora.explain(lambda p, x: 2 * x, *wide())
    assert table.uses == () and table.footer[0] == "0 uses: 0 factored, 0 dense"


def test_flops_with_arrays_of_numpy():
    arguments = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), wide())
    assert jlora.explain(mlp, *arguments).flops == jlora.explain(mlp, *wide()).flops


def test_explain_runs_nothing():
    ran = []
    fn = lambda p, x: (jax.debug.callback(lambda _: ran.append(1), x), mlp(p, x))[1]
    params, x = wide()
    jlora.explain(fn, params, x)
    jax.effects_barrier()
    assert not ran


def test_explanation_in_html():
    table = jlora.explain(squashed, *wide())
    texts = Page(table._repr_html_()).texts
    assert {"up", "down", "factored", "dense", "dot_general", "(512, 1024)", *table.footer} <= set(texts)
    assert table.uses[0].reason in texts


def test_explanation_as_text():
    """The reason of a dense use is whole, below its row."""
    table = jlora.explain(squashed, *wide())
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= 80 and repr(table) == str(table)
    assert lines[1].split()[:5] == ["up", "(512,", "1024)", "other", "dense"]
    assert lines[2].startswith("    tanh: ")
    assert " ".join("\n".join(lines).split()).count(table.uses[0].reason) == 1


@pytest.mark.parametrize("tree", [PLAIN, {}, jnp.ones(3)], ids=["plain", "empty", "array"])
def test_explain_of_a_plain_tree(tree):
    with pytest.raises(TypeError, match=r"no leaf of the second argument is wrapped; pass the tree that jlora\.wrap"):
        jlora.explain(lambda p: p, tree)


def test_dense_loop_is_explained_by_its_reason():
    """A kernel that a loop changes."""
    program = ZOO["scan_fast_weights"]
    (use,) = jlora.explain(program.fn, adapted(program), *program.args).uses
    assert (use.primitive, use.factored) == ("scan", False)
    assert use.reason == "it is carried through a loop that changes it"


def test_convolutions_and_experts_have_their_kinds():
    conv, ragged = ZOO["conv_1d"], ZOO["ragged_experts"]
    kinds = [jlora.explain(p.fn, adapted(p), *p.args).uses[0].kind for p in (conv, ragged)]
    assert kinds == ["conv", "ragged_dot"]


def test_scan_costs_one_step():
    """XLA counts the body of a loop once, whatever its length."""
    step = lambda p, x: lax.scan(lambda x, _: (jnp.tanh(x @ p["up"] @ p["down"]), None), x, length=7)[0]
    once = jlora.explain(lambda p, x: jnp.tanh(x @ p["up"] @ p["down"]), *wide()).flops
    assert jlora.explain(step, *wide()).flops == pytest.approx(once, rel=0.01)
