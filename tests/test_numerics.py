"""Numbers at their limits: none that is not one, half precision, zero columns, great ranks, overflow."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.models import MODELS
from tests.programs import PROGRAMS
from tests.support import adapted, error, randomised, same_bits, thinned
from tests.test_zoo import total

MATRIX = {"*": jlora.Axes((0,), (1,))}
X = jnp.asarray(np.random.default_rng(0).standard_normal((5, 16)), jnp.float32)
OPTIONS = {"oft": {"block_size": 4}, "boft": {"block_size": 2, "factors": 2}, "lokr": {"factor": 2}}
FEW = ("dot_rhs", "embedding_1d", "conv_2d", "scan_stacked")
ZOO = {program.name: program for program in PROGRAMS + MODELS}


def kernel(*shape, dtype=jnp.float32, scale=0.3):
    return jnp.asarray(scale * np.random.default_rng(1).standard_normal(shape), dtype)


@pytest.mark.parametrize("name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in ZOO])
def test_no_step_of_a_program_makes_what_is_no_number(name):
    """`jax_debug_nans` looks at every result, in the forward pass and in the backward one."""
    program, params = ZOO[name], adapted(ZOO[name])
    fn = lambda p: total(jlora.apply(program.fn, fallback="ignore")(p, *program.args))
    with jax.debug_nans(True):
        jax.block_until_ready((jlora.value_and_grad(fn) if program.reverse else fn)(params))


HALF = (jnp.float16, jnp.bfloat16)


@pytest.mark.parametrize("variant, dtype", thinned(4, ("lora", "dora", "ia3", "oft", "loha", "vera", "adalora"), HALF))
def test_bases_of_half_precision(variant, dtype):
    """Factors are of float32; a step of training moves them by finite amounts, and the base not at all."""
    params = {"up": kernel(16, 16, dtype=dtype), "down": kernel(16, 16, dtype=dtype)}
    spec = jlora.LoraSpec(targets="*", axes=MATRIX, rank=2, variant=variant, options=OPTIONS.get(variant, {}))
    tree = randomised(jlora.wrap(params, spec), std=0.1)
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    found, expected = jlora.apply(fn)(tree, X.astype(dtype)), fn(jlora.merge(tree, dtype=jnp.float32), X)
    assert found.dtype == dtype and error(found, expected) <= 0.05
    tx = jlora.optimizer(optax.adam(1e-2), tree)
    grads = jlora.grad(lambda p: jnp.sum(jlora.apply(fn)(p, X.astype(dtype)).astype(jnp.float32) ** 2))(tree)
    after = optax.apply_updates(tree, tx.update(grads, tx.init(tree), tree)[0])
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), *(jlora.partition(t)[0] for t in (tree, after)))
    assert all(jax.tree.leaves(moved)) and all(np.isfinite(x).all() for x in jax.tree.leaves(jlora.partition(after)[0]))
    assert same_bits(jlora.unwrap(after), params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16], ids=["float32", "float16"])
def test_dora_of_columns_of_zeros(dtype):
    """Pruned outputs: their norm is nothing, and so is what they give, until the adapter moves them."""
    params = {"w": kernel(16, 8, dtype=dtype).at[:, 2:5].set(0)}
    tree = jlora.wrap(params, jlora.LoraSpec(targets="*", axes=MATRIX, rank=2, variant="dora"))
    fn = lambda p, x: x @ p["w"]
    loss = lambda p: jnp.sum(jnp.sin(jlora.apply(fn)(p, X.astype(dtype)).astype(jnp.float32)))
    assert jnp.array_equal(jlora.apply(fn)(tree, X.astype(dtype))[:, 2:5], jnp.zeros((5, 3)))
    for params in (tree, randomised(tree)):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(jlora.grad(loss)(params)))
        found, expected = jlora.apply(fn)(params, X.astype(dtype)), fn(jlora.merge(params, dtype=jnp.float32), X)
        assert np.isfinite(found).all() and error(found, expected) <= (2e-5 if dtype == jnp.float32 else 5e-3)


def test_rank_stabilised_scaling_at_a_great_rank():
    """Outputs neither vanish nor grow with the rank, which is what alpha / sqrt(r) is for."""
    params = {"w": kernel(1024, 1024, scale=1 / 32)}
    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, 1024)), jnp.float32)
    sizes = []
    for rank in (4, 1024):
        spec = jlora.LoraSpec(targets="*", axes=MATRIX, rank=rank, alpha=1, scaling="rslora")
        tree = randomised(jlora.wrap(params, spec), std=1.0)
        found = jlora.apply(lambda p, x: x @ p["w"])(tree, x)
        assert error(found, x @ jlora.merge(tree)["w"]) <= 2e-5
        sizes.append(float(jnp.std(found - x @ params["w"])))
    assert 0.5 < sizes[1] / sizes[0] < 2


def test_a_scale_of_zero_is_the_base_and_an_alpha_of_zero_is_refused():
    """An adapter may be turned off; one that is made so would never train."""
    params = {"w": kernel(16, 8)}
    tree = randomised(jlora.wrap(params, jlora.LoraSpec(targets="*", axes=MATRIX, rank=2)))
    off = {"w": dataclasses.replace(tree["w"], scale=0.0)}
    assert jnp.array_equal(jlora.merge(off)["w"], params["w"])
    assert jnp.array_equal(jlora.apply(lambda p: X @ p["w"])(off), X @ params["w"])
    with pytest.raises(ValueError, match="alpha must be a positive finite number, found 0"):
        jlora.LoraSpec(alpha=0)


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("shape", [(16, 8), (8, 16)])
def test_a_rank_as_great_as_the_kernels_side(shape, variant):
    settings = {"init": "pissa"} if variant == "pissa" else {"variant": variant}
    tree = jlora.wrap({"w": kernel(*shape)}, jlora.LoraSpec(targets="*", axes=MATRIX, rank=8, **settings))
    x = X[:, : shape[0]]
    assert error(jlora.apply(lambda p: x @ p["w"])(tree), x @ kernel(*shape)) <= 2e-5
    full = randomised(tree)
    assert error(jlora.apply(lambda p: x @ p["w"])(full), x @ jlora.merge(full)["w"]) <= 2e-5


@pytest.mark.parametrize(
    "variant", ["lora", "dora", "ia3", "oft", "boft", "loha", "lokr", "vera", "adalora", "lora_fa"]
)
def test_double_precision_is_kept(variant):
    with jax.enable_x64(True):
        params = {"w": kernel(16, 8, dtype=jnp.float64)}
        spec = jlora.LoraSpec(targets="*", axes=MATRIX, rank=2, variant=variant, dtype=jnp.float64,
                              options=OPTIONS.get(variant, {}))  # fmt: skip
        tree, x = randomised(jlora.wrap(params, spec)), jnp.asarray(X, jnp.float64)
        found, expected = jlora.apply(lambda p: x @ p["w"])(tree), x @ jlora.merge(tree)["w"]
        assert found.dtype == expected.dtype == jnp.float64
        assert error(found, expected) <= 1e-13


def test_merging_beyond_a_type_says_so():
    """Not that the update is too small: that it is too large."""
    params = {"w": jnp.full((16, 8), 6e4, jnp.float16)}
    tree = randomised(jlora.wrap(params, jlora.LoraSpec(targets="*", axes=MATRIX, rank=2)), std=60.0)
    with pytest.warns(jlora.MergePrecisionWarning, match=r"weights of w are infinite in float16: .* ends at 6.55e\+04"):
        jlora.merge(tree)
    with warnings.catch_warnings(action="error"):
        assert np.isfinite(jlora.merge(tree, dtype=jnp.float32)["w"]).all()
        jlora.merge(tree, dtype=jnp.bfloat16)


def test_merging_beyond_the_type_of_the_sum_says_so():
    params = {"w": jnp.full((16, 8), 3.3e38, jnp.bfloat16)}
    tree = randomised(jlora.wrap(params, jlora.LoraSpec(targets="*", axes=MATRIX, rank=2)), std=3e18)
    with pytest.warns(jlora.MergePrecisionWarning, match=r"of w are infinite in bfloat16: .* ends at 3.39e\+38"):
        jlora.merge(tree)


def test_merging_beyond_a_type_without_infinity_says_so():
    params = {"w": jnp.full((16, 8), 0.5)}
    tree = randomised(jlora.wrap(params, jlora.LoraSpec(targets="*", axes=MATRIX, rank=2)), std=60.0)
    with pytest.warns(jlora.MergePrecisionWarning, match=r"weights of w are NaN in float8_e4m3fn: .* ends at 448"):
        jlora.merge(tree, dtype=jnp.float8_e4m3fn)


def test_what_lies_between_the_factors_may_be_larger_than_half_precision():
    params = {"w": jnp.full((512, 4), 1e-3, jnp.float16)}
    tree = jlora.wrap(params, jlora.LoraSpec(targets="*", axes=MATRIX, rank=1, alpha=1))
    large = dataclasses.replace(tree["w"], lora_a=jnp.full((512, 1), 0.3), lora_b=jnp.full((1, 4), 1e-3))
    x = jnp.full((2, 512), 1e3, jnp.float16)
    fn = lambda p: x @ p["w"]
    assert error(jlora.apply(fn)({"w": large}), fn(jlora.merge({"w": large}))) <= 1e-2
