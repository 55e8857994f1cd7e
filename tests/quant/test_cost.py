"""What a quantised base costs: bits in the arguments, and no dense kernel kept, however deep the model is."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import jlora
from tests.support import compiled, flops, temporaries

WIDTH, HIDDEN, TOKENS, RANK = 256, 512, 128, 4
SHALLOW, DEEP = 2, 6  # layers
KERNEL = 4 * WIDTH * HIDDEN  # bytes of one in float32


def mlp(layer, x):
    return x + jnp.tanh(x @ layer["up"]) @ layer["down"]


def unrolled(params, x):
    for layer in params:
        x = mlp(layer, x)
    return (x**2).mean()


def unrolled_remat(params, x):
    for layer in params:
        x = jax.checkpoint(mlp)(layer, x)
    return (x**2).mean()


def scanned(params, x, step=mlp):
    x, _ = jax.lax.scan(lambda x, layer: (step(layer, x), None), x, params)
    return (x**2).mean()


def scanned_remat(params, x):
    return scanned(params, x, jax.checkpoint(mlp, prevent_cse=False))


def shapes(fn, depth):
    """The parameters, abstract: a program is compiled without a byte of them."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    if fn in (unrolled, unrolled_remat):
        return [{"up": shape(WIDTH, HIDDEN), "down": shape(HIDDEN, WIDTH)} for _ in range(depth)]
    return {"up": shape(depth, WIDTH, HIDDEN), "down": shape(depth, HIDDEN, WIDTH)}


@functools.cache
def step_of(fn, depth, dtype=None, double_quant=False, adapted=True):
    """The compiled step, and the bytes of its base."""
    params, x = shapes(fn, depth), jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)
    sites = jlora.sites(fn, params, x)
    if dtype is not None:
        params = jlora.quant.quantize(params, dtype, double_quant=double_quant, sites=sites)
    if not adapted:
        return compiled(jax.grad(lambda x, params: jlora.apply(fn)(params, x)), x, params)
    tree = jlora.wrap(params, jlora.LoraSpec(rank=RANK), sites=sites)
    tx = jlora.optimizer(optax.sgd(1e-3), tree)

    def step(tree, state, x):
        value, grads = jlora.value_and_grad(jlora.apply(fn))(tree, x)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    return compiled(step, tree, jax.eval_shape(tx.init, tree), x)


def heeds_barriers():
    """Whether XLA keeps apart what a barrier keeps apart: on the CPU that of JAX 0.10.2 does not."""

    def twice(x, w):
        parts = [jax.lax.optimization_barrier((w, x + i))[0] for i in range(2)]
        return x @ jnp.exp(parts[0]) @ jnp.exp(parts[1])

    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    return compiled(twice, shape, shape).as_text().count(" exponential(") == 2


needs_barriers = pytest.mark.skipif(not heeds_barriers(), reason="XLA drops barriers here, as for jax.checkpoint")
MODELS = [pytest.param(unrolled, marks=needs_barriers, id="unrolled")]
MODELS += [pytest.param(unrolled_remat, marks=[needs_barriers, pytest.mark.slow], id="unrolled_remat")]
MODELS += [pytest.param(fn, id=fn.__name__) for fn in (scanned, scanned_remat)]
every_model = pytest.mark.parametrize("fn", MODELS)
# A model under remat keeps less still: slow.
DEEPER = [*MODELS[:3], pytest.param(scanned_remat, marks=pytest.mark.slow, id="scanned_remat")]
BASES = [(fn, "nf4", False) for fn in (unrolled, scanned, scanned_remat)]
OTHERS = [
    (unrolled_remat, "nf4", False),
    (scanned, "nf4", True),
    (scanned_remat, "int8", False),
    (unrolled, "int8", True),
]


def based(fn, *base, slow):
    """A model on a base; what XLA does to an unrolled one is told by barriers."""
    marks = [needs_barriers] * (fn in (unrolled, unrolled_remat)) + [pytest.mark.slow] * slow
    return pytest.param(fn, *base, marks=marks)


@pytest.mark.parametrize(
    "fn, dtype, double_quant",
    [based(*case, slow=False) for case in BASES] + [based(*case, slow=True) for case in OTHERS],
)
def test_no_dense_kernel_is_kept(fn, dtype, double_quant):
    """Temporaries of the step are those with a dense frozen base and at most two kernels'."""
    ours, dense = step_of(fn, DEEP, dtype, double_quant), step_of(fn, DEEP)
    assert temporaries(ours) <= temporaries(dense) + 2 * KERNEL


@pytest.mark.parametrize("fn", DEEPER)
def test_nor_with_depth(fn):
    """Of what the quantised base adds to the temporaries, nothing grows with the depth."""
    more = [temporaries(step_of(fn, depth, "nf4")) - temporaries(step_of(fn, depth)) for depth in (SHALLOW, DEEP)]
    assert more[1] <= more[0] + KERNEL / 9


@every_model
def test_without_adapters_too(fn):
    """The gradient of the inputs through a quantised base that nothing adapts."""
    ours, dense = (step_of(fn, DEEP, dtype, adapted=False) for dtype in ("nf4", None))
    assert temporaries(ours) <= temporaries(dense) + 2 * KERNEL


@needs_barriers
def test_the_measure_sees_what_is_kept():
    """Numbers made without a tie to where they are used stay from the forward to the backward pass."""
    params, x = shapes(unrolled, DEEP), jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)
    params = jlora.quant.quantize(params, "nf4", sites=jlora.sites(unrolled, params, x))
    naive = compiled(jax.grad(lambda x, params: unrolled(jlora.quant.dequantize(params), x)), x, params)
    assert temporaries(naive) > temporaries(step_of(unrolled, DEEP, "nf4", adapted=False)) + 6 * KERNEL


@needs_barriers
def test_the_numbers_are_made_twice():
    """Once in the forward pass and once in the backward pass of each kernel but the first, which needs no dx."""
    table = re.findall(r"= f32\[\d+,\d+\]\S* gather\(", lowered_text("nf4"))
    assert len(table) == 2 * 2 * 4


def lowered_text(dtype):
    params, x = shapes(unrolled, 4), jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)
    params = jlora.quant.quantize(params, dtype, sites=jlora.sites(unrolled, params, x))
    return compiled(jax.grad(lambda x, params: jlora.apply(unrolled)(params, x)), x, params).as_text()


def test_flops_are_those_of_the_products():
    """Making the numbers adds a few operations for each weight, twice."""
    ours, dense = step_of(unrolled, DEEP, "nf4"), step_of(unrolled, DEEP)
    weights = DEEP * 2 * WIDTH * HIDDEN
    assert flops(ours) <= flops(dense) + 2 * 3 * weights


BITS = [(scanned, "nf4", True, 4.2)]
BITS += [
    pytest.param(*base, marks=pytest.mark.slow)
    for base in [
        (unrolled, "nf4", True, 4.2),
        (scanned, "nf4", False, 4.6),
        (scanned, "int4", False, 4.6),
        (unrolled, "int8", False, 8.6),
        (scanned, "fp8", False, 8.6),
    ]
]


@pytest.mark.parametrize("fn, dtype, double_quant, most", BITS)
def test_bits_in_the_arguments(fn, dtype, double_quant, most):
    """Of a weight, as the compiled program takes it; the inputs' and factors' bytes are those of the dense program."""
    arguments = lambda program: program.memory_analysis().argument_size_in_bytes
    weights = DEEP * 2 * WIDTH * HIDDEN
    ours, dense = (arguments(step_of(fn, DEEP, *how)) for how in ((dtype, double_quant), ()))
    assert 8 * (ours - dense + 4 * weights) / weights <= most
