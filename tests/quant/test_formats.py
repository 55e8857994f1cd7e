"""Codes and scales: NF4 as bitsandbytes rounds it, all as Qwix does; tiles, types, what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

import jlora
from jlora.nodes.qarray import NF4, chosen, looked_up
from tests.support import error, same_bits

# The thresholds of bitsandbytes' `dQuantizeNF4` (csrc/kernels.cu), from the lowest code to the highest.
THRESHOLDS = [
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
    -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
    0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
    0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
]  # fmt: skip
PAPER = [  # arXiv:2305.14314, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def noise(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def quantised(kernel, dtype="nf4", **settings):
    return jlora.quant.quantize({"kernel": kernel}, dtype, **settings)["kernel"]


def test_nf4_has_the_published_values():
    np.testing.assert_array_equal(NF4, np.float32(PAPER))


def test_nf4_rounds_as_bitsandbytes_does():
    """Each number goes to the code whose thresholds it lies between; one on a threshold goes down."""
    near = [np.nextafter(np.float32(t), np.float32(way)) for t in THRESHOLDS for way in (-2, 2)]
    values = np.float32([*THRESHOLDS, *near, *PAPER, *np.random.default_rng(0).uniform(-1, 1, 1000)])
    column = np.concatenate([values, np.ones(-len(values) % 64, np.float32)])
    column[::64] = 1.0  # every tile has the scale 1
    found = quantised(jnp.asarray(column[:, None]))
    assert (found.scale == 1).all()
    expected = (column[:, None] > np.float32(THRESHOLDS)).sum(1)
    np.testing.assert_array_equal(np.asarray(found.qvalue[:, 0], np.int32), expected)
    np.testing.assert_array_equal(jlora.quant.dequantize(found)[:, 0], np.float32(PAPER)[expected])


def test_absmax_of_each_tile_is_its_scale():
    kernel = noise(128, 3)
    found = quantised(kernel)
    np.testing.assert_array_equal(found.scale, jnp.abs(kernel.reshape(2, 64, 3)).max(1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_a_tpu_the_same_values_are_chosen(dtype):
    codes = jnp.arange(16).astype(jnp.uint4)
    assert same_bits(chosen(codes, dtype), looked_up(codes, dtype))


QTYPES = {"nf4": "nf4", "int4": jnp.int4, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


@pytest.mark.parametrize("name", QTYPES)
def test_leaves_are_those_of_qwix(name):
    def both(kernel):
        ours, theirs = (
            quantised(kernel, name),
            qwix.quantize(kernel, QTYPES[name], channelwise_axes=[1], tiled_axes={0: 64}),
        )
        return (ours, theirs), (jlora.quant.dequantize(ours), qwix.dequantize(theirs))

    (found, expected), numbers = jax.jit(both)(noise(128, 6))
    assert isinstance(found, qwix.QArray)
    assert same_bits(found, expected)
    assert error(*numbers) <= 1e-6


WAYS = [(double_quant, dtype) for double_quant in (False, True) for dtype in (jnp.float32, jnp.bfloat16)]


@pytest.mark.parametrize("name, most", [("nf4", 0.1), ("int4", 0.11), ("int8", 0.007), ("fp8", 0.03)])
def test_what_is_lost(name, most):
    """Relative to a normal kernel's norm; scales in 16 bits or in 8 cost little more. Zeros stay zeros."""
    kernel = np.array(noise(256, 64))
    kernel[:64, 1] = kernel[:, 2] = 0
    again = lambda x, double: jlora.quant.dequantize(quantised(x, name, double_quant=double))
    found = jax.jit(lambda kernel: [again(kernel.astype(dtype), double) for double, dtype in WAYS])(kernel)
    for x, (double_quant, dtype) in zip(found, WAYS, strict=True):
        assert x.dtype == dtype
        x, exact = np.asarray(x, np.float32), np.asarray(kernel.astype(dtype), np.float32)
        assert np.linalg.norm(x - exact) / np.linalg.norm(exact) < most, (double_quant, dtype)
        assert (x[:64, 1] == 0).all() and (x[:, 2] == 0).all() and np.isfinite(x).all(), (double_quant, dtype)


def test_double_quantisation_keeps_scales_to_their_own_resolution():
    kernel = noise(256, 64)
    once, twice = quantised(kernel), quantised(kernel, double_quant=True)
    scales = jlora.quant.dequantize(twice.scale)
    assert twice.scale.qvalue.dtype == jnp.uint8 and scales.shape == once.scale.shape
    assert jnp.abs(scales - once.scale).max() <= once.scale.max() / 255 / 2 * 1.001


TILES = [
    ((128, 6), ((0,), (1,)), 64, (64, 1)),
    ((100, 6), ((0,), (1,)), 64, (50, 1)),  # the largest below that divides
    ((48, 6), ((0,), (1,)), 64, (48, 1)),
    ((6, 128), ((1,), (0,)), 64, (1, 64)),
    ((3, 128, 6), ((1,), (2,), (0,)), 64, (1, 64, 1)),  # stacked
    ((8, 16, 6), ((0, 1), (2,)), 64, (4, 16, 1)),  # heads: all of the last, and several of those before
    ((3, 3, 32, 8), ((0, 1, 2), (3,)), 64, (1, 1, 32, 1)),
    ((128, 6), ((0,), (1,)), None, (128, 1)),
]


def test_tiles_lie_along_the_contracted_axes():
    kernels = [noise(*shape) for shape, *_ in TILES]
    make = lambda kernel, axes, tile: quantised(
        kernel, tile=tile, targets=("kernel",), axes={"kernel": jlora.Axes(*axes)}
    )

    def program(kernels):
        found = [make(kernel, axes, tile) for kernel, (_, axes, tile, _) in zip(kernels, TILES, strict=True)]
        return [x.scale for x in found], jlora.quant.dequantize(found)

    for kernel, scale, numbers, case in zip(kernels, *jax.jit(program)(kernels), TILES, strict=True):
        assert scale.shape == tuple(n // t for n, t in zip(kernel.shape, case[-1], strict=True)), case
        assert np.abs(np.asarray(numbers) - kernel).max() < 0.2 * np.abs(kernel).max(), case


def test_tables_have_tiles_along_their_rows():
    params = {"embed": {"embedding": noise(10, 128)}}
    found = jlora.quant.quantize(params, targets=("embed",))["embed"]["embedding"]
    assert found.scale.shape == (10, 2)


def test_bits():
    params = {"a": {"kernel": noise(256, 64)}, "b": {"bias": noise(7)}}
    assert jlora.quant.bits(jlora.quant.quantize(params)) == 4.5
    assert jlora.quant.bits(jlora.quant.quantize(params, double_quant=True)) == 4 + 8 / 64 + 32 / 64 / 256
    assert jlora.quant.bits(jlora.quant.quantize(params, "int8", tile=None)) == 8 + 32 / 256
    halves = {"kernel": noise(256, 64, dtype=jnp.bfloat16)}
    assert jlora.quant.bits(jlora.quant.quantize(halves)) == 4.25


def test_targets_and_the_rest():
    params = {
        "a": {"kernel": noise(64, 4), "bias": noise(4)},
        "b": {"kernel": noise(64, 4)},
        "lm_head": {"kernel": noise(64, 9)},
    }
    found = jlora.quant.quantize(params, exclude="b/*")
    kinds = {path: isinstance(found[path]["kernel"], qwix.QArray) for path in params}
    assert kinds == {"a": True, "b": False, "lm_head": False}
    assert found["a"]["bias"] is params["a"]["bias"]


def test_under_jit_and_abstract():
    params = {"kernel": noise(128, 6)}
    make = lambda params: jlora.quant.quantize(params, double_quant=True)
    assert same_bits(jax.jit(make)(params), make(params))
    plan = make(jax.eval_shape(lambda: params))
    assert plan == jax.eval_shape(make, params)
    back = jlora.quant.dequantize(plan)["kernel"]
    assert (back.shape, back.dtype) == ((128, 6), jnp.float32)


def test_numpy_leaves_come_to_the_device_one_at_a_time():
    kernel = np.asarray(noise(128, 6))
    assert same_bits(quantised(kernel), quantised(jnp.asarray(kernel)))


WRONG = [
    ({"dtype": "nf5"}, ValueError, "dtype must be one of nf4, int4, int8, fp8, found 'nf5'"),
    ({"dtype": {}}, ValueError, "dtype must be one of .* found dict"),
    ({"tile": 0}, ValueError, "tile must be a positive number of elements or None, found 0"),
    ({"targets": "qury"}, ValueError, "quantize: the pattern 'qury' in targets matches no leaf. Nearest: "),
    ({"targets": 3}, ValueError, "quantize: targets"),
    ({"exclude": "a/kernell"}, ValueError, "quantize: the pattern 'a/kernell' in exclude matches no leaf"),
    ({"targets": "c/kernel"}, ValueError, r"axes of c/kernel .* ambiguous.*quantize\(params, sites=.*axes="),
    ({"targets": "d/kernel"}, ValueError, "d/kernel .* has 97 elements along .* no tile of 16 to 64; .*tile=97"),
    ({"targets": "e/kernel"}, ValueError, "e/kernel .* has dtype int32"),
]  # fmt: skip


@pytest.mark.parametrize("settings, kind, message", WRONG)
def test_what_is_refused(settings, kind, message):
    params = {"a": noise(64, 4), "c": noise(4, 8, 8), "d": noise(97, 4), "e": jnp.ones((64, 4), jnp.int32)}
    with pytest.raises(kind, match=message):
        jlora.quant.quantize({name: {"kernel": x} for name, x in params.items()}, **settings)


def test_trees_that_are_refused():
    params = {"kernel": noise(64, 4)}
    once = jlora.quant.quantize(params)
    with pytest.raises(TypeError, match="kernel is quantised already, to nf4"):
        jlora.quant.quantize(once)
    with pytest.raises(TypeError, match="quantize: kernel is wrapped"):
        jlora.quant.quantize(jlora.wrap(params, jlora.LoraSpec(rank=2)))
    for name in ("dequantize", "bits"):
        with pytest.raises(TypeError, match=f"{name}: no leaf of this tree is quantised"):
            getattr(jlora.quant, name)(params)


def test_without_qwix(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'jlora[quant]'")):
        jlora.quant.quantize({"kernel": noise(64, 5)}, "int4")
    jlora.wrap({"kernel": noise(64, 5)}, jlora.LoraSpec(rank=2))  # all else works


@pytest.mark.parametrize("settings", [{"calibration_method": "minmax"}, {"scale_dtype": jnp.bfloat16}])
def test_arrays_that_qwix_made_are_bases_too(settings):
    """With a zero point, or scales of another type: what they stand for is what Qwix says."""
    made = qwix.quantize(noise(128, 6), jnp.int8, channelwise_axes=[1], tiled_axes={0: 32}, **settings)
    params = jlora.wrap({"kernel": made}, jlora.LoraSpec(rank=2))
    x = noise(5, 128, seed=1)
    run = jlora.apply(lambda p, x: x @ p["kernel"].astype(jnp.float32))
    both = jax.jit(lambda params, made: (run(params, x), x @ qwix.dequantize(made).astype(jnp.float32)))
    assert error(*both(params, made)) <= (1e-5 if made.zero_point is not None else 2e-2)
