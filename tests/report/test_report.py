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
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jlora
from jlora.report import Explanation, Summary, Use
from jlora.report.groups import grouped, name_of, title
from jlora.report.summary import Leaf
from jlora.report.text import columns, lines, printable
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
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    def text(self) -> str:
        """The words, with one space between them."""
        return " ".join(" ".join(self.texts).split())


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


def test_summary_tells_dropout_and_the_layers_of_a_stack():
    """Below the row; the rows themselves are as ever."""
    axes = {"kernel": jlora.Axes((1,), (2,), (0,))}
    spec = dataclasses.replace(SPEC, axes=axes, dropout=0.1, layers=[0, 2])
    table = jlora.summary(jlora.wrap({"layers": {"kernel": jnp.ones((4, 64, 32))}}, spec))
    assert "    dropout 0.1; layers {0,2} of 4" in str(table).splitlines()
    assert "dropout 0.1; layers {0,2} of 4" in table._repr_html_()
    assert "dropout" not in str(jlora.summary(jlora.wrap(PLAIN, SPEC)))


def test_summary_of_a_plan():
    """A kernel of 40 GB: what it will cost is told without it."""
    plan = jlora.wrap({"kernel": SHAPE((100_000, 200_000), jnp.bfloat16)}, SPEC)
    assert jlora.summary(plan).footer == ("trainable 1,200,000 of 20.0B, 0.01%; 4.6 MiB of 37.3 GiB",)


def test_summary_of_a_plain_tree():
    table = jlora.summary(PLAIN)
    assert table.rows == () and table.footer[0].startswith("trainable 0 of 2,144, 0.00%")


def test_text_of_many_unlike_kernels_is_cut():
    shapes = {f"layer{i:03}": {"kernel": SHAPE((4, 4 + i), jnp.float32)} for i in range(250)}
    many = jlora.wrap(shapes, jlora.LoraSpec(rank=1))
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


def test_alike_layers_share_a_row():
    """With what trains in all of them, so that a column adds up to the last line; `rows` has each."""
    net = {f"layer_{i}": {"up": {"kernel": jnp.ones((8, 8))}, "down": {"kernel": jnp.ones((8, 8))}} for i in range(30)}
    net["layer_7"] = {"up": {"kernel": jnp.ones((8, 4))}}
    table = jlora.summary(jlora.wrap(net, jlora.LoraSpec(rank=1)))
    _, *rows, total = str(table).splitlines()
    assert [row.split()[:2] for row in rows] == [
        ["layer_{0..6,8..29}/down/kernel", "29x"],
        ["layer_{0..6,8..29}/up/kernel", "29x"],
        ["layer_7/up/kernel", "(8,"],
    ]
    assert [row.split()[-1] for row in rows] == ["464", "464", "12"] and total.startswith("trainable 940 of ")
    assert len(table.rows) == 59 and sum(leaf.trained for leaf in table.leaves) == 940


def test_layers_of_other_ranks_have_rows_of_their_own():
    spec = jlora.LoraSpec(rank=1, overrides={"layer_1/kernel": {"rank": 2}})
    table = jlora.summary(jlora.wrap({f"layer_{i}": {"kernel": jnp.ones((8, 8))} for i in range(3)}, spec))
    paths = [line.split()[0] for line in str(table).splitlines()[1:-1]]
    assert paths == ["layer_{0,2}/kernel", "layer_1/kernel"]


def test_names_that_differ_in_two_numbers():
    paths = [f"stage_{i}/block_{j}/w" for i in range(2) for j in range(4)]
    ((name, count, _),) = grouped((name_of(path), 1, None) for path in paths)
    assert (title(name), count) == ("stage_{0,1}/block_{0..3}/w", 8)
    some = grouped((name_of(path), 1, None) for path in paths[:-1])
    assert [(title(name), count) for name, count, _ in some] == [
        ("stage_{0,1}/block_{0..2}/w", 6),
        ("stage_0/block_3/w", 1),
    ]


def test_many_runs_of_numbers_are_cut():
    ((name, count, _),) = grouped((name_of(f"w{i}"), 1, None) for i in range(0, 40, 2))
    assert (title(name), count) == ("w{0,2,4,…,38}", 20)


def test_numbers_keep_their_zeros_and_their_length():
    found = grouped((name_of(f"w{i:03}"), 1, None) for i in range(12))
    assert [title(name) for name, *_ in found] == ["w{000..011}"]
    assert title(name_of("9" * 5000)) == "9" * 5000


ODD = [
    "<script>alert('&')</script>",
    "слой_" * 60,
    "層" * 100,
    "a" * 300,
    "two\nlines\tand\x1b[31m",
    "\u202eabc",
    "e\u0301" * 50,
]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_odd_names_fit_and_are_escaped(name):
    tree = {
        name: {"inner": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}},
        f"{name}2": {"kernel": jnp.ones((4, 4))},
    }
    wrapped = jlora.wrap(tree, jlora.LoraSpec(rank=1))
    forward = lambda p, x: jnp.tanh(p[name]["inner"]["kernel"]) @ x @ p[f"{name}2"]["kernel"]
    for table in (jlora.summary(wrapped), jlora.explain(forward, wrapped, jnp.ones((4, 4)))):
        check_text(table)
        page = Page(table._repr_html_().encode().decode())
        assert {*page.tags} <= {"div", "style", "span", "b", "i", "em", "details", "summary"}
        assert all(printable(part) in "".join(page.texts) for part in name.split("/"))
        assert {row[0] for row in table.rows} == {f"{name}/inner/kernel", f"{name}2/kernel"}


def check_text(table):
    """Fits eighty columns, and tells all paths apart."""
    lines = str(table).split("\n")
    assert max(map(columns, lines)) <= 80
    assert all(line.isprintable() for line in lines)


def test_columns_that_say_nothing_are_left_out():
    """But for the path, which is empty where the tree is one leaf."""
    table = jlora.summary(jlora.wrap(jnp.ones((4, 4)), jlora.LoraSpec(targets=lambda *_: True, variant="ia3")))
    header, row, _ = str(table).split("\n")
    assert header.split() == ["path", "shape", "adapter", "trainable"] and row.split() == ["(4,", "4)", "ia3", "4"]


NAMES = st.text(st.characters(exclude_characters="/"), min_size=1, max_size=60)


@given(
    st.lists(st.lists(NAMES, min_size=1, max_size=12), min_size=1, max_size=8),
    st.lists(st.integers(1, 9**9), max_size=30),
)
def test_any_names_and_shapes_fit(paths, shape):
    shape = tuple(shape)
    leaves = [
        Leaf("/".join(path), shape, "float32", "averylongvariantsname", 8, 0.123456789, 10**15, 10**16)
        for path in paths
    ]
    table = Summary(("path", "shape", "adapter", "rank", "scale", "trainable"), (), ("trainable",), None, tuple(leaves))
    check_text(table)
    Page(table._repr_html_())
    use = lambda path: Use(
        "/".join(path), shape, "ragged_dot", False, "no rule " * 40, "p" * 90, f"/a/{path[0]}.py:1 (f)"
    )
    check_text(Explanation(("path", "shape", "kind", "computed", "by", "at"), (), ("uses",), tuple(map(use, paths))))


def test_paths_that_would_look_alike_are_whole():
    paths = [f"model/{'x' * 30}/{middle}/{'y' * 30}/kernel" for middle in "ab"]
    tree = jlora.wrap({path: jnp.ones((4, 4)) for path in paths}, jlora.LoraSpec(targets=paths, rank=1))
    table = jlora.summary(tree)
    check_text(table)
    assert all(path in str(table).splitlines() for path in paths)


def test_a_path_too_long_for_its_column_has_a_line_of_its_own():
    """Where not even its ends fit."""
    long, short = "a_block_of_the_decoder/a_projection_of_its", "head/kernel"
    first, second, third = lines([(path, "x" * 25, "y" * 25) for path in (long, short)], ["", ""])
    assert first == long and second.split() == third.split()[1:] == ["x" * 25, "y" * 25]
    assert third.split()[0] == short and len(third) == 80


def test_long_paths_lose_their_middle():
    path = "params/model/decoder/blocks/self_attention/projections/query/kernel"
    tree = jlora.wrap(
        {path: jnp.ones((4, 4)), "b/kernel": jnp.ones((4, 4))}, jlora.LoraSpec(targets=[path, "b/*"], rank=1)
    )
    (line,) = [line for line in str(jlora.summary(tree)).splitlines() if "query" in line]
    assert line.startswith("params/model/…/projections/query/kernel  (4, 4)")
    check_text(jlora.summary(tree))


def test_wide_shapes_lose_their_middle():
    axes = {"kernel": jlora.Axes(tuple(range(29)), (29,))}
    table = jlora.summary(jlora.wrap({"kernel": jnp.ones((1,) * 30)}, jlora.LoraSpec(rank=1, axes=axes)))
    check_text(table)
    assert "…" in str(table) and table.rows[0][1] == str((1,) * 30)


def test_html_is_a_tree_of_all_leaves():
    page = Page(jlora.summary(jlora.wrap(PLAIN, SPEC))._repr_html_())
    text = page.text()
    assert "parameters 15.19% 384 of 2,528 train" in text and "bytes 15.19% 1.5 KiB of 9.9 KiB" in text
    assert "norm/scale frozen (64,) · float32 64" in text
    assert "up lora 384 of 2,464 15.58%" in text
    assert "bias frozen (32,) · float32 32" in text
    assert "kernel lora (64, 32) · float32 · rank 4 · scale 2 384 of 2,432 15.79%" in text
    assert page.tags.count("details") == page.tags.count("summary") == 1


def test_html_has_a_leaf_whose_name_is_a_modules_too():
    tree = {"a": jnp.ones(3), "a/b": jnp.ones(5), "kernel": jnp.ones((4, 4))}
    text = Page(jlora.summary(jlora.wrap(tree, jlora.LoraSpec(rank=1)))._repr_html_()).text()
    assert "(3,)" in text and "b frozen (5,)" in text and "kernel lora (4, 4)" in text


def test_html_shows_alike_layers_once():
    """Their sum on the line that stands for all, and within what each has."""
    layers = {f"layer_{i}": {"up": {"kernel": jnp.ones((4, 4))}, "scale": jnp.ones(4)} for i in range(12)}
    layers["layer_5"] = {"up": {"kernel": jnp.ones((4, 8))}}
    text = Page(jlora.summary(jlora.wrap({"net": layers}, jlora.LoraSpec(rank=1)))._repr_html_()).text()
    assert (
        "layer_{0..4,6..11} 11\u00d7 lora 88 of 308 28.57% each of the 11: scale frozen (4,) · float32 4 up/kernel"
        in text
    )
    assert "layer_5/up/kernel lora (4, 8)" in text


def letters(n):
    """A name of its own for each number, without digits: layers that have it are not alike."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(n)) + "_"


def test_html_of_large_trees_is_small():
    """80 layers of 70B, and a thousand leaves of which no two are alike."""
    kernel = lambda i, o: {"kernel": SHAPE((i, o), jnp.bfloat16)}
    layer = {name: kernel(8192, 8192) for name in "qkvo"} | {"up": kernel(8192, 28672), "down": kernel(28672, 8192)}
    layer |= {"gate": kernel(8192, 28672), "norm": {"scale": SHAPE((8192,), jnp.bfloat16)}}
    unlike = {f"layer_{i}": {f"w_{letters(i)}{j}": kernel(9, j + 9) for j in range(10)} for i in range(100)}
    for tree, limit in (({f"layer_{i}": layer for i in range(80)}, 10_000), (unlike, 300_000)):
        table = jlora.summary(jlora.wrap(tree, SPEC))
        page = table._repr_html_()
        assert len(page) < limit
        Page(page)
        check_text(table)


def test_html_of_a_huge_tree_is_cut():
    unlike = {
        f"layer_{i}": {f"w_{letters(i)}{j}": {"kernel": SHAPE((9, j + 9), jnp.float32)} for j in range(30)}
        for i in range(40)
    }
    table = jlora.summary(jlora.wrap(unlike, SPEC))
    page = table._repr_html_()
    assert len(page) < 300_000 and "more, which are not shown" in page and len(table.leaves) == 1200


def test_html_tells_types_of_quantised_bases():
    base = jlora.quant.quantize(
        {"kernel": jnp.ones((64, 64)), "head": {"kernel": jnp.ones((64, 64))}}, targets="kernel"
    )
    table = jlora.summary(jlora.wrap(base, jlora.LoraSpec(targets="head", rank=2)))
    text = Page(table._repr_html_()).text()
    assert "nf4" in text and table.totals.bases in text and str(table).endswith(table.footer[-1])


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
    assert moved.startswith("forward bytes moved before fusion: ") and moved.endswith("x of the plain model's")
    assert trained == jlora.summary(wide()[0]).footer[0] and "%" in trained and "KiB" in trained


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
    text = Page(table._repr_html_()).text()
    ratios = [f"{a / b:.3f}x of the plain model's" for a, b in (table.flops, table.bytes_accessed)]
    assert "uses 2 uses: 1 factored, 1 dense FLOPs " + ratios[0] in text and "bytes moved " + ratios[1] in text
    assert "parameters " in text and "0.58%" in text
    up = f"up dense (512, 1024) · other · tanh · test_report.py:{squashed.__code__.co_firstlineno + 1} (squashed)"
    assert f"{up} {table.uses[0].reason}" in text
    assert "down factored (1024, 512) · dot · " in text


def test_a_dense_use_is_never_folded_away():
    """Though there are too many lines for all modules to lie open."""
    shapes = {f"m{i}": {"a": jnp.ones((4, i + 1)), "b": jnp.ones((4, i + 1))} for i in range(30)}
    wrapped = jlora.wrap(shapes, jlora.LoraSpec(targets=["a", "b"], rank=1))

    def fn(p, x):
        return [(x @ (jnp.sin(m["a"]) if name == "m9" else m["a"]), x @ m["b"]) for name, m in p.items()]

    page = jlora.explain(fn, wrapped, jnp.ones((2, 4)))._repr_html_()
    assert page.count("<details>") == 29 and page.count("<details open>") == 1
    assert page.index("<details open>") < page.index("sin has no factored rule")


def test_uses_of_one_kernel_stand_together():
    fn = lambda p, x, ids: (p["e"][ids], x @ p["e"].T, x @ jnp.tanh(p["e"]).T)
    wrapped = jlora.wrap({"e": jnp.ones((9, 6))}, jlora.LoraSpec(targets="e", rank=2))
    text = Page(jlora.explain(fn, wrapped, jnp.ones((5, 6)), jnp.arange(3))._repr_html_()).text()
    assert (
        text.index("e factored (9, 6) · embedding") < text.index("factored (9, 6) · dot") < text.index("dense (9, 6)")
    )


def test_explanation_as_text():
    """The reason of a dense use is whole, below its row."""
    table = jlora.explain(squashed, *wide())
    header, up, reason, down, *footer = str(table).splitlines()
    assert header.split() == ["path", "shape", "kind", "computed", "at"]
    assert up.split()[:5] == ["up", "(512,", "1024)", "other", "dense"] and "test_report.py:" in up
    assert reason == f"    {table.uses[0].reason}" and down.split()[4] == "factored"
    assert footer == list(table.footer) and repr(table) == str(table)
    check_text(table)


def test_the_primitive_stands_before_a_reason_that_does_not_name_it():
    table = jlora.explain(lambda p, x: p["up"], *wide())
    assert "    output: the function returns it" in str(table).splitlines()


def test_alike_uses_share_a_row():
    layers = {f"layer_{i}": {"up": jnp.ones((4, 4)), "down": jnp.ones((4, 4))} for i in range(5)}

    def fn(p, x):
        for layer in p.values():
            x = x @ layer["up"] @ jnp.sin(layer["down"])
        return x

    table = jlora.explain(fn, jlora.wrap(layers, jlora.LoraSpec(targets=["up", "down"], rank=1)), jnp.ones((2, 4)))
    _, up, down, reason, *_ = str(table).splitlines()
    assert down.split()[:2] == ["layer_{0..4}/down", "5x"] and up.split()[:2] == ["layer_{0..4}/up", "5x"]
    assert "sin has no factored rule" in reason and len(table.uses) == len(table.rows) == 10


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


# -------------------------------------------------------------------------------- what trains in vain

VAIN = {name: {"kernel": jnp.ones((8, 8))} for name in ("body", "aux", "stopped", "unused", "tail", "picked")}
VAIN_SPEC = jlora.LoraSpec(rank=2, targets=["body", "aux", "stopped", "unused", "picked"])


def in_vain(p, x):
    """Of `aux` only a second result; `stopped` without a gradient; `picked` through an index."""
    x = x @ p["body"]["kernel"]
    aux = x @ p["aux"]["kernel"]
    best = jnp.argmax(x @ p["picked"]["kernel"], axis=-1)
    x = x + jax.lax.stop_gradient(x @ p["stopped"]["kernel"]) + best[:, None]
    return x @ p["tail"]["kernel"], aux


def test_adapters_without_effect_are_found():
    tree, x = jlora.wrap(VAIN, VAIN_SPEC), jnp.ones((3, 8))
    whole = jlora.explain(in_vain, tree, x)
    assert [*whole.without_effect] == ["picked/kernel", "stopped/kernel", "unused/kernel"]
    assert whole.without_effect["unused/kernel"] == "the function does not use it"
    assert "no gradient" in whole.without_effect["stopped/kernel"] and whole.plain == ("tail/kernel",)
    assert "WITHOUT EFFECT: unused/kernel: the function does not use it" in str(whole)
    assert str(whole).endswith("not adapted, though kernels: tail/kernel")


@pytest.mark.parametrize("compiled", [False, True])
def test_of_a_loss_too(compiled):
    """Which calls `jlora.apply` itself; loops and compiled functions between are seen through."""
    tree, x = jlora.wrap(VAIN, VAIN_SPEC), jnp.ones((3, 8))
    forward = jax.jit(in_vain) if compiled else in_vain

    def loss(tree, x):
        step = lambda x, _: (jlora.apply(forward)(tree, x)[0], None)
        return (jax.lax.scan(step, x, None, length=2)[0] ** 2).mean()

    table = jlora.explain(loss, tree, x)
    assert table.without_effect["aux/kernel"] == "its use does not reach the result"
    assert [*table.without_effect] == ["aux/kernel", "picked/kernel", "stopped/kernel", "unused/kernel"]
    assert len(table.uses) == 4


def test_all_that_trains_has_an_effect_in_the_model_that_was_meant():
    params, x = wide()
    assert jlora.explain(mlp, params, x).without_effect == {} and jlora.explain(mlp, params, x).plain == ()
    generate = lambda p, x: jnp.argmax(mlp(p, x), axis=-1)  # integers: of no gradient is told
    assert jlora.explain(generate, params, x).without_effect == {}
    until = lambda p, x: jax.lax.while_loop(lambda x: (x < 9).all(), lambda x: mlp(p, x) + 1, x)  # none backwards
    assert jlora.explain(until, params, x).without_effect == {}


def test_what_trains_in_full_in_vain():
    params = {"a": jnp.ones((4, 4)), "head": jnp.ones((4, 2)), "scale": jnp.ones(4)}
    spec = jlora.LoraSpec(rank=2, targets="a", train=["head", "scale"], axes={"a": jlora.Axes(0, 1)})
    table = jlora.explain(lambda p, x: x @ p["a"] * p["scale"], jlora.wrap(params, spec), jnp.ones((3, 4)))
    assert table.without_effect == {"head": "the function does not use it"}


@pytest.mark.parametrize(
    "fn", [jlora.apply(mlp, strategy="merged"), lambda p, x: jlora.apply(mlp, strategy="merged")(p, x)]
)
def test_the_strategy_of_the_functions_own_apply_is_explained(fn):
    assert {use.strategy for use in jlora.explain(fn, *wide()).uses} == {"merged"}
    assert {use.strategy for use in jlora.explain(mlp, *wide()).uses} == {"factored"}
