"""Law 7 on quantised bases: codes and scales lie as their kernel does; nothing is gathered; values are one device's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from tests.support import error, randomised

MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
SPECS = {"embed": P("tensor", "fsdp"), "layers": {"up": P(None, "fsdp", "tensor"), "down": P(None, "tensor", "fsdp")}}
AXES = {"up": jlora.Axes(1, 2, 0), "down": jlora.Axes(1, 2, 0), "embed": jlora.Axes(0, 1)}
TARGETS = ("up", "down", "embed")
FORMATS = [("nf4", True), pytest.param("int8", False, marks=pytest.mark.slow)]


def mesh_of(mode):
    return jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(MODES[mode],) * 2)


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def params():
    return {"embed": noise(24, 128), "layers": {"up": noise(3, 128, 256) / 10, "down": noise(3, 256, 128) / 10}}


def placed(mesh):
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    return jax.tree.map(put, params(), SPECS)


def quantised(tree, dtype="nf4", double_quant=False):
    settings = {"double_quant": double_quant, "targets": TARGETS, "axes": AXES, "tile": 32}
    return jlora.quant.quantize(tree, dtype, **settings)


SPEC = jlora.LoraSpec(targets=TARGETS, axes=AXES, rank=2)


def wrapped(tree):
    return randomised(jlora.wrap(tree, SPEC), 0.02)


TOKENS = jnp.arange(16).reshape(8, 2)
ROWS = P("fsdp", None, None)


def forward(p, tokens, constrain=lambda x, spec: x, out=lambda spec: None):
    """A table that is looked up, scanned layers, and products that are told where to lie."""
    x = constrain(p["embed"].at[tokens].get(out_sharding=out(P("fsdp", None, None))), ROWS)

    def step(x, layer):
        h = jnp.tanh(jnp.einsum("btd,df->btf", x, layer["up"], out_sharding=out(P("fsdp", None, "tensor"))))
        y = jnp.einsum("btf,fd->btd", h, layer["down"], out_sharding=out(ROWS))
        return constrain(x + y, ROWS), None

    return lax.scan(step, x, p["layers"])[0]


def model(mode, mesh):
    if mode == "explicit":
        return lambda p, tokens: forward(p, tokens, out=lambda spec: NamedSharding(mesh, spec))
    return lambda p, tokens: forward(
        p, tokens, lambda x, spec: lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype, double_quant", FORMATS)
def test_quantize_and_wrap_place(mode, dtype, double_quant):
    """With jit and without, and as a plan: where `jlora.sharding.shardings` says."""
    mesh = mesh_of(mode)
    expected = jlora.wrap(quantised(params(), dtype, double_quant), SPEC)
    make = lambda tree: jlora.wrap(quantised(tree, dtype, double_quant), SPEC)
    with jax.set_mesh(mesh):
        plain = placed(mesh)
        plan = make(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), plain))
        for found in (make(plain), jax.jit(make)(plain)):
            assert error(found, expected) <= 1e-5
            wanted = jlora.sharding.shardings(make(plain))
            for x, place, planned in zip(*map(jax.tree.leaves, (found, wanted, plan)), strict=True):
                assert x.sharding.is_equivalent_to(place, x.ndim), (x.shape, x.sharding, place)
                assert x.sharding.is_equivalent_to(planned.sharding, x.ndim)
    up = make(plain)["layers"]["up"]
    assert up.base.qvalue.sharding.spec == P(None, "fsdp", "tensor")
    assert up.lora_a.sharding.spec == P(None, "fsdp", None)


@pytest.mark.parametrize("dtype, double_quant", FORMATS)
def test_specs(dtype, double_quant):
    """Scales are split along the axes of which they have several tiles."""
    tree = wrapped(quantised(params(), dtype, double_quant))
    specs = jlora.sharding.specs(tree, SPECS)
    assert jax.tree.structure(specs) == jax.tree.structure(tree)
    base = specs["layers"]["up"].base
    scale = base.scale.qvalue if double_quant else base.scale
    assert base.qvalue == scale == P(None, "fsdp", "tensor")
    if double_quant:  # 4 tiles of 256 columns each, quantised together
        assert base.scale.scale == P(None, "fsdp", None)
    shardings = jlora.sharding.shardings(tree, mesh_of("auto"), SPECS)
    assert jax.tree.structure(shardings) == jax.tree.structure(tree)


def test_scales_that_are_too_few_are_whole():
    """On a mesh with more parts than an axis has tiles; specs may come from the quantised tree itself."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    make = lambda: jlora.wrap(
        jlora.quant.quantize({"kernel": noise(128, 32)}, double_quant=True), jlora.LoraSpec(rank=2)
    )
    plan = jax.eval_shape(make)
    specs = jax.tree.map(lambda x: P("fsdp", None), jlora.unwrap(plan))
    found = jax.jit(make, out_shardings=jlora.sharding.shardings(plan, mesh, specs))()
    assert found["kernel"].base.qvalue.sharding.spec == P("fsdp", None)
    assert found["kernel"].base.scale.qvalue.sharding.spec == P(None, None)  # two tiles on eight devices
    assert error(jlora.quant.dequantize(found["kernel"].base), jlora.quant.dequantize(make()["kernel"].base)) <= 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype, double_quant", FORMATS)
def test_values_and_gradients_are_those_of_one_device(mode, dtype, double_quant):
    mesh = mesh_of(mode)
    expected_tree = wrapped(quantised(params(), dtype, double_quant))
    of = lambda fn: jax.jit(jlora.value_and_grad(lambda tree, tokens: (jlora.apply(fn)(tree, tokens) ** 2).mean()))
    expected = of(forward)(expected_tree, TOKENS)
    with jax.set_mesh(mesh):
        places = jlora.sharding.shardings(jlora.wrap(quantised(placed(mesh), dtype, double_quant), SPEC))
        tree = jax.device_put(expected_tree, places)
        tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("fsdp", None)))
        found = of(model(mode, mesh))(tree, tokens)
    assert error(found, expected) <= 1e-4


@pytest.mark.parametrize("around", [True, False])
@pytest.mark.parametrize("dtype, double_quant", FORMATS)
def test_inside_and_around_shard_map(dtype, double_quant, around):
    """Kernels that are gathered stay quantised on the way, with apply inside of the mapped function or around it."""
    mesh = mesh_of("auto")
    tree = wrapped(quantised(params(), dtype, double_quant))
    expected = jlora.apply(forward)(tree, TOKENS)

    def local(p, tokens):
        table = lax.all_gather(lax.all_gather(p["embed"], "fsdp", axis=1, tiled=True), "tensor", axis=0, tiled=True)

        def step(x, layer):
            up = lax.all_gather(layer["up"], "fsdp", axis=0, tiled=True)
            down = lax.all_gather(layer["down"], "fsdp", axis=1, tiled=True)
            return x + lax.psum(jnp.tanh(x @ up) @ down, "tensor"), None

        return lax.scan(step, table[tokens], p["layers"])[0]

    run = lambda fn, specs: jax.shard_map(
        fn, mesh=mesh, in_specs=(specs, P("fsdp")), out_specs=P("fsdp"), check_vma=False
    )
    if around:
        found = jax.jit(jlora.apply(run(local, SPECS), fallback="error"))(tree, TOKENS)
    else:
        found = jax.jit(run(jlora.apply(local, fallback="error"), jlora.sharding.specs(tree, SPECS)))(tree, TOKENS)
    assert error(found, expected) <= 1e-4


def test_no_dense_kernel_is_gathered():
    """Of the step on a mesh: a gather moves codes and scales, where there is one, never numbers of a kernel's size."""
    mesh = mesh_of("auto")
    with jax.set_mesh(mesh):
        tree = jlora.wrap(quantised(placed(mesh)), SPEC)
        tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("fsdp", None)))
        loss = lambda tree, tokens: (jlora.apply(model("auto", mesh))(tree, tokens) ** 2).mean()
        text = jax.jit(jlora.value_and_grad(loss)).lower(tree, tokens).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    kernels = ("f32[256,128]", "f32[128,256]", "f32[3,256,128]", "f32[3,128,256]", "f32[24,128]")
    assert not [line for line in gathers if any(f"= {kernel}" in line for kernel in kernels)]
