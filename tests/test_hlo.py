"""The reader of compiled programs, on programs whose collectives and products can be counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks import hlo

P = jax.P
LAYERS = 5


@pytest.fixture(scope="module")
def text():
    """On each device: five rounds of a gather to (16, 16), a product and a sum of (2, 16); then a permutation."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def local(kernels, x):
        def layer(x, kernel):
            whole = lax.all_gather(kernel, "data", tiled=True)
            return lax.psum(jnp.tanh(x @ whole), "model"), None

        x, _ = lax.scan(layer, x, kernels)
        return lax.ppermute(x, "data", [(0, 1), (1, 2), (2, 3), (3, 0)])

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(P(None, "data"), P("data")), out_specs=P("data"), check_vma=False
    )
    kernels, x = np.ones((LAYERS, 16, 16), np.float32), np.ones((8, 16), np.float32)
    return jax.jit(mapped).lower(kernels, x).compile().as_text()


def test_what_a_loop_moves_counts_in_every_round(text):
    found = hlo.collectives(text)
    assert hlo.totals(found) == {
        "all-gather": (LAYERS, LAYERS * 16 * 16 * 4),
        "all-reduce": (LAYERS, LAYERS * 2 * 16 * 4),
        "collective-permute": (1, 2 * 16 * 4),
    }
    assert hlo.moves(found)["all-reduce", (2, 16)] == LAYERS
    assert "psum" in next(c.op_name for c in found if c.kind == "all-reduce")


def test_the_products_of_a_loop_count_in_every_round(text):
    assert hlo.flops(text) == LAYERS * 2 * 2 * 16 * 16


def test_loops_in_loops_multiply():
    def inner(x, w):
        return lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, None, length=3)[0]

    outer = lambda x, w: lax.scan(lambda x, _: (inner(x, w), None), x, None, length=7)[0]
    shapes = jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    assert hlo.flops(jax.jit(outer).lower(*shapes).compile().as_text()) == 3 * 7 * 2 * 32 * 64 * 64


def program(*lines, before=""):
    return "HloModule written\n" + before + "ENTRY %main (p: f32[4,8]) -> f32[4,8] {\n  " + "\n  ".join(lines) + "\n}\n"


def only(text):
    (found,) = hlo.collectives(text)
    return found.kind, [(array.dtype, array.shape) for array in found.arrays], found.times


def test_a_start_and_its_end_are_one():
    text = program(
        "%p = f32[4,8]{1,0} parameter(0)",
        "%s = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%p), channel_id=1, dimensions={0}",
        "ROOT %d = f32[16,8]{1,0} all-gather-done(%s)",
    )
    assert only(text) == ("all-gather", [("f32", (16, 8))], 1)
    text = program(
        "%s = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), channel_id=1",
        "ROOT %d = bf16[4,8]{1,0} collective-permute-done(%s)",
    )
    assert only(text) == ("collective-permute", [("bf16", (4, 8))], 1)
    text = program(
        "%s = ((f32[4,8]{1,0}, f32[]), (f32[4,8]{1,0}, f32[])) all-reduce-start(%p, %q), channel_id=1",
        "ROOT %d = (f32[4,8]{1,0}, f32[]) all-reduce-done(%s)",
    )
    assert only(text) == ("all-reduce", [("f32", (4, 8)), ("f32", ())], 1)


def test_a_collective_of_several_arrays():
    text = program("ROOT %r = (bf16[4,8]{1,0:T(8,128)(2,1)}, /*index=1*/f32[16]{0}) all-reduce(%p, %q), to_apply=%add")
    text = "%add (a: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}\n" + text
    assert only(text) == ("all-reduce", [("bf16", (4, 8)), ("f32", (16,))], 1)
    assert hlo.totals(hlo.collectives(text)) == {"all-reduce": (2, 4 * 8 * 2 + 16 * 4)}


def test_an_all_reduce_of_which_each_keeps_a_part():
    """A TPU's reduce-scatter."""
    fusion = "%all-reduce-scatter.1 (i: bf16[8,16]) -> bf16[2,16] {\n"
    fusion += "  %r = bf16[8,16]{1,0} all-reduce(%i), channel_id=3\n  ROOT %s = bf16[2,16]{1,0} dynamic-slice(%r)\n}\n"
    text = program("ROOT %f = bf16[2,16]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1", before=fusion)
    assert only(text) == ("reduce-scatter", [("bf16", (8, 16))], 1)


def test_the_pieces_of_a_collective_between_other_work_are_one():
    """A TPU runs it in fusions of the same channel."""
    line = '  %g = f32[16,8]{1,0} all-gather(%i), channel_id=9, backend_config={"async_collective_fusion_config":{}}\n'
    parts = "".join(f"%part.{i} (i: f32[4,8]) -> f32[16,8] {{\n{line}}}\n" for i in range(3))
    calls = [f"%f.{i} = f32[16,8]{{1,0}} fusion(%p), calls=%part.{i}" for i in range(3)]
    assert only(program(*calls, before=parts)) == ("all-gather", [("f32", (16, 8))], 1)


def loop(condition):
    body = "%body (i: s32[]) -> s32[] {\n  %r = f32[8]{0} all-reduce(%i), channel_id=1\n}\n"
    body += f"%condition (i: s32[]) -> pred[] {{\n  {condition}\n}}\n"
    return program("ROOT %w = s32[] while(%p), condition=%condition, body=%body", before=body)


def test_the_rounds_of_a_loop_are_read_from_its_condition():
    assert only(loop("%c = s32[]{:T(128)} constant(12)")) == ("all-reduce", [("f32", (8,))], 12)


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="how often w runs is not known"):
        hlo.collectives(loop("%c = s32[] parameter(0)"))
    with pytest.raises(ValueError, match="found no ENTRY"):
        hlo.collectives("nothing")


@pytest.mark.parametrize(
    ("out", "right", "window", "labels", "count"),
    [
        ("4,128,64", "1,512,64", "size=1", "0bf_0io->0bf", 4 * 128 * 512 * 64),
        # a product for each of four matrices, by a window that meets the right one and holes beside it
        ("4,128,64", "4,512,64", "size=4 stride=3 lhs_dilate=4", "0bf_0io->0bf", 4 * 128 * 512 * 64),
    ],
)
def test_products_that_a_tpu_writes_as_convolutions(out, right, window, labels, count):
    text = program(
        "%l = bf16[4,128,512]{2,1,0} parameter(0)",
        f"%r = bf16[{right}]{{2,1,0}} parameter(1)",
        f"ROOT %c = bf16[{out}]{{2,1,0}} convolution(%l, %r), window={{{window}}}, dim_labels={labels}",
    )
    assert hlo.flops(text) == 2 * count
