"""Law 4 for the variants: what their compiled steps compute and hold, beside plain LoRA's. Nothing large runs."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.support import compiled, flops, temporaries

TOKENS, WIDTH, DEPTH = 4096, 1024, 2
MOVES = {"parameter", "copy", "bitcast", "get-tuple-element", "transpose"}


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def mlp(params, x, depth=DEPTH):
    for i in range(depth):
        x = jnp.tanh(x @ params[f"layer_{i}"]["kernel"])
    return x


def abstract(width=WIDTH, depth=DEPTH, **settings):
    """The wrapped tree, without its values."""
    params = {f"layer_{i}": {"kernel": f32(width, width)} for i in range(depth)}
    return jlora.wrap(params, jlora.LoraSpec(**({"rank": 16} | settings)))


def step(tree, model=mlp, x=None):
    """The compiled training step on the trainable half, with Adam."""
    tx = optax.adam(1e-3)
    trainable, frozen = jlora.partition(tree)
    loss = lambda part, frozen, x: jnp.square(jlora.apply(model)(jlora.combine(part, frozen), x)).mean()

    def run(part, state, frozen, x):
        value, grads = jax.value_and_grad(loss)(part, frozen, x)
        updates, state = tx.update(grads, state, part)
        return optax.apply_updates(part, updates), state, value

    return compiled(run, trainable, jax.eval_shape(tx.init, trainable), frozen, x or f32(TOKENS, WIDTH))


def made(program):
    """The operations that make values with as many elements as a kernel, in whatever shape."""
    values = re.findall(r"= \w+\[([\d,]+)\]\S* (\S+?)\(", program.as_text())
    return {name for shape, name in values if math.prod(map(int, shape.split(","))) == WIDTH * WIDTH}


def size(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(jlora.partition(tree)[0]))


@functools.cache
def step_of(kind):
    """The compiled step of one of `SETTINGS`, made once for all that is asked of it."""
    return step(abstract(**SETTINGS[kind]))


def ratio(kind, other):
    return flops(step_of(kind)) / flops(step_of(other))


def test_dora_costs_at_most_a_tenth_more():
    """The norm is three products of the rank's size, none with the tokens."""
    assert 1 < ratio("dora", "lora") <= 1.10


KERNEL_FREE = {
    "lora": {},
    "lora+pissa": {"init": "pissa"},
    "lora_fa": {"variant": "lora_fa"},
    "dora": {"variant": "dora"},
    "dora+pissa": {"variant": "dora", "init": "pissa"},
    "vera": {"variant": "vera"},
    "adalora": {"variant": "adalora"},
    "loha": {"variant": "loha", "rank": 4},
    "lokr": {"variant": "lokr", "rank": 4},
    "ia3": {"variant": "ia3"},
    "ia3+in": {"variant": "ia3", "options": {"on": "in"}},
    "oft": {"variant": "oft"},
    "boft": {"variant": "boft"},
    "miss": {"variant": "miss"},
    "hra": {"variant": "hra"},
    "road": {"variant": "road"},
    "pvera": {"variant": "pvera"},
    "gralora": {"variant": "gralora"},
    "delora": {"variant": "delora"},
}
SETTINGS = KERNEL_FREE | {
    "lora of rank 4": {"rank": 4},
    "lora of rank 32": {"rank": 32},
    "loha of rank 2": {"variant": "loha", "rank": 2},
    "lora+olora": {"init": "olora"},
    "lora+milora": {"init": "milora"},
    "c3a": {"variant": "c3a"},
    "hira": {"variant": "hira"},
    "waveft": {"variant": "waveft"},
    "randlora": {"variant": "randlora"},
    "shira": {"variant": "shira"},
}


@pytest.mark.parametrize("kind", KERNEL_FREE)
def test_a_step_holds_nothing_of_a_kernels_size(kind):
    """No dW, no A B, no W + A B, no R W: every value of a kernel's shape is the kernel itself."""
    found = made(step_of(kind))
    assert "parameter" in found
    assert found <= MOVES


PARTS = ("lora", "dora", "loha", "ia3", "oft")  # of a factored weight: the other kinds have some of these


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in PARTS else [pytest.mark.slow]) for kind in KERNEL_FREE]
)
def test_the_measure_sees_a_merged_kernel(kind):
    tree = abstract(**KERNEL_FREE[kind], depth=1)
    merged = compiled(lambda tree, x: mlp(jlora.merge(tree), x, depth=1), tree, f32(TOKENS, WIDTH))
    assert made(merged) - MOVES


# What the backward pass keeps.


def chain(params, x):
    """The gradient of a layer's sum does not need its input, only that of A does."""
    for i in range(len(params)):
        x = x + x @ params[f"layer_{i}"]["kernel"]
    return x


@functools.cache
def kept(variant):
    """Temporaries of the gradient in units of one layer's activations, of 8 layers."""
    tree, x = abstract(width=512, depth=8, variant=variant), f32(2048, 512)
    loss = lambda tree, x: jnp.square(jlora.apply(chain)(tree, x)).mean()
    return temporaries(compiled(jlora.value_and_grad(loss), tree, x)) / (4 * math.prod(x.shape))


@pytest.mark.parametrize("variant", ["lora_fa", "vera"])
def test_where_a_is_frozen_no_inputs_are_kept(variant):
    """Plain LoRA keeps the input of each layer for A's gradient; with a frozen A only x A is kept, of 1/32 of that."""
    assert kept("lora") >= 8
    assert kept(variant) <= 4


# Costs that the docstrings tell.


@pytest.mark.parametrize("loha, lora", [("loha of rank 2", "lora of rank 4"), ("loha", "lora")], ids=[2, 4])
def test_loha_costs_what_lora_of_its_rank_squared_does(loha, lora):
    assert ratio(loha, lora) <= 1.05


@pytest.mark.parametrize("init", ["pissa", "olora", "milora"])
def test_factors_from_the_kernel_cost_what_twice_their_rank_does(init):
    assert ratio(f"lora+{init}", "lora of rank 32") <= 1.02


@pytest.mark.parametrize("variant", ["lora_fa", "vera", "adalora", "ia3", "miss"])
def test_others_cost_at_most_what_lora_does(variant):
    assert ratio(variant, "lora") <= 1.01


@pytest.mark.parametrize("variant", ["c3a", "hira", "waveft", "shira"])
def test_what_has_no_factors_costs_what_training_the_kernels_does(variant):
    """Three products with each kernel, but for the first one's inputs, which need no gradient."""
    product = 2 * TOKENS * WIDTH**2
    assert (3 * DEPTH - 1) * product <= flops(step_of(variant)) <= 1.05 * (3 * DEPTH - 1) * product


def test_randlora_costs_at_most_four_times_what_lora_does():
    assert 3 <= ratio("randlora", "lora of rank 4") <= 4


def test_gralora_costs_what_lora_of_twice_its_rank_does():
    assert ratio("gralora", "lora of rank 32") <= 1.02


def test_a_rotation_costs_a_product_with_its_blocks():
    """Of 32 rows each, thrice, for the gradients; and the first layer's gradient by its input, which others skip."""
    kernel, blocks = (2 * TOKENS * WIDTH * n for n in (WIDTH, 32))
    found = flops(step_of("oft")) - flops(step_of("ia3"))
    assert found <= 1.02 * (kernel + DEPTH * 3 * blocks)


# Some of the stacked layers.


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["kernel"])[0]


@pytest.mark.parametrize(
    "variant",
    [
        "lora",
        "dora",
        "lora_fa",
        "vera",
        "adalora",
        "loha",
        "lokr",
        "ia3",
        "oft",
        "boft",
        "miss",
        "hra",
        "road",
        "c3a",
        "gralora",
        "hira",
        "delora",
        "fourierft",
        "waveft",
        "shira",
        "randlora",
        "pvera",
    ],
)
def test_the_chosen_layers_alone_have_parameters(variant):
    params, x = {"kernel": f32(8, 64, 64)}, f32(16, 64)
    sites = jlora.sites(scanned, params, x)
    wrap = lambda **settings: jlora.wrap(params, jlora.LoraSpec(rank=4, variant=variant, **settings), sites=sites)
    some, every = wrap(layers=(1, 5, 6)), wrap()
    assert 0 < size(some) * 8 == size(every) * 3
    moments = lambda tree: jax.eval_shape(optax.adam(1e-3).init, jlora.partition(tree)[0])[0].mu
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(moments(some))) == size(some)
