"""What a mixed batch costs over the base alone: FLOPs and bytes of the compiled programs."""

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora import adapters
from tests.support import compiled, flops

WIDTH, HIDDEN, LAYERS, RANK, MEMBERS = 2048, 5632, 2, 8, 8
SHAPES = dict.fromkeys("qkvo", (WIDTH, WIDTH)) | {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}


def layer(params, x):
    q, k, v = (x @ params[name] for name in "qkv")
    x = x + jnp.tanh(q * k + v) @ params["o"]
    return x + jax.nn.silu(x @ params["up"]) @ params["down"]


def unrolled(params, x):
    for kernels in params:
        x = layer(kernels, x)
    return x


def scanned(params, x):
    return jax.lax.scan(lambda x, kernels: (layer(kernels, x), None), x, params)[0]


def plans(is_scanned, members=MEMBERS):
    """The base, one adapter on it, several."""
    shape = lambda size: jax.ShapeDtypeStruct((LAYERS, *size) if is_scanned else size, jnp.float32)
    one_layer = {name: shape(size) for name, size in SHAPES.items()}
    params = one_layer if is_scanned else [one_layer] * LAYERS
    axes = jlora.Axes((1,), (2,), (0,)) if is_scanned else jlora.Axes((0,), (1,))
    spec = jlora.LoraSpec(targets="re:.*", rank=RANK, axes={"re:.*": axes})
    wrap = lambda params: jlora.wrap(params, spec)
    return params, *(jax.eval_shape(f, params) for f in (wrap, lambda p: adapters.stack([wrap(p)] * members)))


def bytes_of(program):
    return program.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize("is_scanned", [False, True])
def test_decoding_reads_little_more_than_the_base(is_scanned):
    """32 rows of one token and 8 adapters: their factors are read once, whichever rows take them."""
    fn = scanned if is_scanned else unrolled
    params, one, stacked = plans(is_scanned)
    x, ids = jax.ShapeDtypeStruct((32, 1, WIDTH), jnp.float32), jax.ShapeDtypeStruct((32,), jnp.int32)
    plain, mixed = compiled(fn, params, x), compiled(adapters.batched(fn), stacked, ids, x)
    assert bytes_of(mixed) < 1.15 * bytes_of(plain)
    others = sum(4 * x.size for x in jax.tree.leaves(stacked)) - sum(4 * x.size for x in jax.tree.leaves(one))
    alone = bytes_of(compiled(jlora.apply(fn), one, x))
    assert is_scanned or bytes_of(mixed) - alone < 1.5 * others  # of a loop XLA counts copies of all slices


@pytest.mark.parametrize("is_scanned", [False, True])
def test_long_rows_cost_what_one_adapter_costs(is_scanned):
    fn = scanned if is_scanned else unrolled
    params, one, stacked = plans(is_scanned)
    x, ids = jax.ShapeDtypeStruct((8, 64, WIDTH), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
    mixed = flops(compiled(adapters.batched(fn), stacked, ids, x))
    assert mixed < 1.005 * flops(compiled(jlora.apply(fn), one, x))
    assert mixed < 1.02 * flops(compiled(fn, params, x))


def test_the_way_is_chosen_by_what_it_costs():
    """Masks read all factors once, gathered ones are copied for each row."""
    from jlora.interpret.choice import takes_masks

    assert takes_masks(members=8, rows=32, tokens=1)
    assert not takes_masks(members=8, rows=8, tokens=512)
    assert not takes_masks(members=1000, rows=4, tokens=1)
    assert takes_masks(members=1, rows=4, tokens=1)
