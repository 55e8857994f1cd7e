"""The laws, over the zoo: equivalence, identity at the start, frozen means frozen, purity, placement.

No dense gradient and no dense product: `test_cost.py`. Nothing silent: `test_wrap.py`, `test_apply.py`.
"""

import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from tests.models import MODELS
from tests.programs import PROGRAMS
from tests.support import adapted, error, evaluated, has_loop, same_bits, spec_of
from tests.test_zoo import total

ZOO = {program.name: program for program in PROGRAMS + MODELS}
every_program = pytest.mark.parametrize("name", ZOO)
SOME_MODELS = ["linen_mlp", "linen_scan", "nnx_mlp", "dot_rhs", "embedding_tied"]
some_models = pytest.mark.parametrize("name", SOME_MODELS)
# One for each rule.
EXACT = (
    "dot_rhs contract_interleaved batch_and_pairs view_slice_strided embedding_1d experts_by_token conv_2d scan_stacked"
    " ragged_experts cond_two_kernels checkpoint_plain custom_jvp_of_activation linen_mlp nnx_tied_embedding"
).split()
# Loops whose derivatives JAX takes as those of another here, and models that have another's blocks in another loop.
ALIKE = (
    "scan_constant_over_sequence scan_stacked_at_one scan_stacked_last scan_in_scan_with_constant scan_reversed"
    " scan_unrolled_by_two scan_kernels_swapped_in_carry map_over_kernels map_in_batches lstm view_stacked_then_scanned"
    " linen_scan linen_scan_at_axis_one linen_scan_remat_with_policy linen_vmap linen_remat linen_lstm"
    " linen_optimized_lstm nnx_transformer nnx_stacked_nnx_scan nnx_stacked_lax_scan haiku_attention"
    " linen_transformer_with_tied_embedding"
).split()
# Their gradients amplify rounding, as a run in float64 shows (1e-12): a second-order scan, deep attention.
ILL_CONDITIONED = {"grad_inside_of_scan": 1e-3, "nnx_transformer": 2e-4, "nnx_stacked_remat_scan": 2e-4}


@every_program
def test_equivalence(name):
    """apply(f)(w) == f(merge(w)), values and gradients; and a dense fallback where one is due, and only there."""
    program, params = ZOO[name], adapted(ZOO[name])
    run = value_and_grad_of if program.reverse and name not in ALIKE else value_of
    with warnings.catch_warnings(record=True) as caught, jax.numpy_dtype_promotion("strict"):
        warnings.simplefilter("always")
        found, expected = evaluated(both(run, program), params)
    assert jax.tree.structure(found[0]) == jax.tree.structure(expected[0])
    assert error(found[0], expected[0]) <= program.tolerance
    assert error(found[1], expected[1]) <= ILL_CONDITIONED.get(name, 2 * program.tolerance)
    fell_back = [w.message for w in caught if issubclass(w.category, jlora.DenseFallbackWarning)]
    assert program.factored == (not fell_back), fell_back


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE)
def test_equivalence_of_gradients(name):
    """Of those that another stands for above."""
    program = ZOO[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jlora.DenseFallbackWarning)
        (_, found), (_, expected) = evaluated(both(value_and_grad_of, program), adapted(program))
    assert error(found, expected) <= ILL_CONDITIONED.get(name, 2 * program.tolerance)


def both(run, program):
    """What a function makes of the program through apply, and of the merged one."""
    merged = lambda p, *args: program.fn(jlora.merge(p), *args)
    return lambda params: [run(fn, program.args)(params) for fn in (jlora.apply(program.fn), merged)]


def value_and_grad_of(fn, args):
    def loss(params):
        out = fn(params, *args)
        return total(out), out

    def run(params):
        (_, out), grads = jlora.value_and_grad(loss, has_aux=True)(params)
        return out, grads

    return run


def value_of(fn, args):
    return lambda params: (fn(params, *args), None)


@pytest.mark.parametrize("name", EXACT)
def test_identity_at_the_start(name):
    """Right after wrap: B is zero, the base's own equations are as written. Bit for bit, but for loops' rounding."""
    program = ZOO[name]
    params = jlora.wrap(program.params, spec_of(program))
    found = jlora.apply(program.fn, fallback="ignore")(params, *program.args)
    # Eager JAX fuses a derivative that its trace spells out.
    trace = jax.make_jaxpr(program.fn)(program.params, *program.args)
    expected = jaxpr_as_fun(trace)(*jax.tree.leaves((program.params, *program.args)))
    if has_loop(trace.jaxpr):
        assert error(found, expected) <= 1e-6
    else:
        for x, y in zip(jax.tree.leaves(found), expected, strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


OPTIMIZERS = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "accumulated": optax.MultiSteps(optax.adamw(1e-2, weight_decay=0.1), every_k_schedule=2),
}
PAIRED = ("linen_mlp", "adamw"), ("linen_scan", "accumulated"), ("nnx_mlp", "clipped"), ("embedding_tied", "adamw")


@pytest.mark.parametrize(
    "name, optimizer",
    [
        pytest.param(name, optimizer, marks=[] if (name, optimizer) in PAIRED else pytest.mark.slow)
        for name in SOME_MODELS
        for optimizer in OPTIMIZERS
    ],
)
def test_frozen_means_frozen(name, optimizer):
    """After training steps each frozen leaf has the same bits, negative zeros included, and unwrap gives them back."""
    program = ZOO[name]
    plain = jax.tree.map(_with_a_negative_zero, program.params)
    params = before = jlora.wrap(plain, spec_of(program))
    tx = jlora.optimizer(OPTIMIZERS[optimizer], params)
    loss = lambda p: total(jlora.apply(program.fn)(p, *program.args))
    gradient = jax.jit(jax.grad(loss))

    @jax.jit
    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for _ in range(4):
        params, state = update(gradient(params), state, params)
    assert same_bits(jlora.partition(params)[1], jlora.partition(before)[1])
    assert same_bits(jlora.unwrap(params), plain)
    assert not same_bits(jlora.partition(params)[0], jlora.partition(before)[0])


def _with_a_negative_zero(x):
    array = np.array(x)
    array[(0,) * array.ndim] = -0.0
    return jnp.asarray(array)


@pytest.mark.parametrize("name", list(ZOO)[::20])
def test_pure_and_abstract(name):
    """wrap, merge and partition give the same tree concretely, on shapes alone, and under jit the same factors."""
    program = ZOO[name]
    spec = spec_of(program)
    whole = lambda p: (w := jlora.wrap(p, spec), jlora.merge(w), jlora.partition(w))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.params)
    concrete, abstract, evaluated = jax.jit(whole)(program.params), whole(shapes), jax.eval_shape(whole, program.params)
    facts = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert facts(concrete) == facts(abstract) == facts(evaluated)
    assert jax.tree.structure(concrete) == jax.tree.structure(abstract) == jax.tree.structure(evaluated)
    assert error(concrete[0], jlora.wrap(program.params, spec)) <= 1e-6


@some_models
def test_placement_follows_the_base(name):
    """On eight devices: factors lie along the base's axes, values are those of one device, no base is gathered."""
    program = ZOO[name]
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, _split_last_even_axis(x))), program.params)
    params = jlora.wrap(placed, spec_of(program))
    for node in filter(_is_lora, jax.tree.leaves(params, is_leaf=_is_lora)):
        base = (*node.base.sharding.spec, *[None] * (node.ndim - len(node.base.sharding.spec)))
        axes = node.axes
        place = lambda group, base=base: tuple(base[axis] for axis in group)
        assert _spec(node.lora_a) == (*place(axes.batch_axis), *place(axes.in_axis), None)
        assert _spec(node.lora_b) == (*place(axes.batch_axis), None, *place(axes.out_axis))
    here = jlora.wrap(program.params, spec_of(program))
    model = jax.jit(lambda p: jlora.apply(program.fn)(p, *program.args))
    assert error(params, here) <= 1e-6
    assert error(model(params), model(here)) <= 2e-5


def _is_lora(x):
    return isinstance(x, jlora.LoraParam)


def _spec(x):
    return (*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec)))


def _split_last_even_axis(x):
    even = [axis for axis, n in enumerate(x.shape) if n % 2 == 0]
    return PartitionSpec(*("model" if even and axis == even[-1] else None for axis in range(x.ndim)))


def test_neither_wrap_nor_the_step_gathers_a_base():
    """The step of a tensor-parallel MLP sums; wrap gathers nothing."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    kernels = {"up": put(jnp.ones((128, 512)), None, "model"), "down": put(jnp.ones((512, 128)), "model", None)}
    plain, spec = {name: {"kernel": w} for name, w in kernels.items()}, jlora.LoraSpec(rank=4)
    exchanges = ("all-gather", "all-to-all", "collective-permute")
    made = jax.jit(lambda p: jlora.wrap(p, spec)).lower(plain).compile().as_text()
    assert not any(op in made for op in exchanges)
    summed = re.findall(r"= \w+\[([\d,]*)\]\S* all-reduce", made)  # one column of a kernel at most
    assert all(math.prod(map(int, filter(None, dims.split(",")))) <= 512 for dims in summed)
    params = jlora.wrap(plain, spec)
    mlp = lambda p, x: jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"]
    loss = lambda p, x: jnp.sum(jlora.apply(mlp)(p, x) ** 2)
    text = jax.jit(jlora.grad(loss)).lower(params, put(jnp.ones((16, 128)))).compile().as_text()
    assert "all-reduce" in text
    assert not any(op in text for op in exchanges)
