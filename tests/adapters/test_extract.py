"""`extract`: the nearest LoRA between two trees, and nothing lost beside it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.adapters import extract
from tests.adapters.test_weighted import AXES, TARGETS, base, tree
from tests.support import error, same_bits

SPEC = jlora.LoraSpec(targets=TARGETS, axes=AXES)


@functools.cache
def tuned(seed=3):
    """The base with every leaf moved; the heads by a matrix of rank 1."""
    rng = np.random.default_rng(seed)
    made = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape), x.dtype), base())
    made["head"]["kernel"] = base()["head"]["kernel"] + jnp.outer(jnp.arange(6.0), jnp.arange(4.0) - 1)
    return made


def test_at_full_rank_nothing_is_lost():
    found = extract(base(), tuned(), 100, spec=SPEC)
    assert error(jlora.merge(found.tree), tuned()) < 1e-6 and max(found.error.values()) < 1e-5
    assert found.tree["layers"]["kernel"].rank == 5 and found.tree["head"]["kernel"].rank == 4
    assert isinstance(found.tree["query"]["bias"], jlora.TrainableParam)
    assert same_bits(found.tree["head"]["kernel"].base, base()["head"]["kernel"])


def test_the_error_is_that_of_the_best_approximation():
    tree, errors = extract(base(), tuned(), 2, spec=SPEC)
    difference = jax.tree.map(jnp.subtract, tuned(), base())
    left = jax.tree.map(jnp.subtract, tuned(), jlora.merge(tree))
    paths, leaves, _ = jlora.targets.paths.flatten(
        jax.tree.map(lambda x, y: (x, y), left, difference), lambda x: type(x) is tuple
    )
    norms = {path: float(jnp.linalg.norm(x) / jnp.linalg.norm(y)) for path, (x, y) in zip(paths, leaves, strict=True)}
    assert errors.keys() == norms.keys() - {"query/bias"} and norms["query/bias"] == 0
    assert all(abs(errors[path] - norms[path]) < 1e-5 for path in errors) and errors["conv/kernel"] > 0.3
    s = np.linalg.svd(np.asarray(difference["layers"]["kernel"]), compute_uv=False)
    np.testing.assert_allclose(errors["layers/kernel"] ** 2, (s[:, 2:] ** 2).sum() / (s**2).sum(), rtol=1e-4)
    assert errors["head/kernel"] < 1e-5


def test_a_merged_adapter_is_found_again():
    """At its own rank, with the scale, the ranks and the layers of the spec; what did not train stays as it was."""
    spec = jlora.LoraSpec(targets=("layers", "head"), axes=AXES, alpha=6, layers=(0, 2), layers_name="layers",
                          overrides={"head/kernel": {"rank": 3}})  # fmt: skip
    first = extract(base(), jlora.merge(tree(0, targets=("layers", "head"), layers=(0, 2))), 2, spec=spec)
    again = jlora.merge(tree(0, targets=("layers", "head"), layers=(0, 2)))
    assert error(jlora.merge(first.tree), again) < 1e-5 and max(first.error.values()) < 1e-5
    node = first.tree["layers"]["kernel"]
    assert node.layers == (0, 2) and node.scale == 3 and node.rank == 2 and first.tree["table"] is not None
    assert not isinstance(first.tree["query"]["kernel"], jlora.AdaptedParam)


def test_layers_that_are_left_out_are_an_error():
    spec = jlora.LoraSpec(targets="layers", layers=(0, 2), axes={"layers/kernel": AXES["layers/kernel"]})
    some = {"layers": base()["layers"]}
    moved = {"layers": {"kernel": base()["layers"]["kernel"] + jnp.ones((3, 6, 5))}}
    np.testing.assert_allclose(extract(some, moved, 1, spec=spec).error["layers/kernel"], np.sqrt(1 / 3), rtol=1e-5)


def test_without_a_spec_linear_layers_are_targets_at_scale_one():
    found = extract(base()["head"], tuned()["head"], 2)
    assert found.tree["kernel"].scale == 1 and found.tree["kernel"].rank == 2
    nothing = extract(base()["head"], base()["head"], 2)
    assert nothing.error == {"kernel": 0} and same_bits(jlora.merge(nothing.tree), base()["head"])
    gradient = jlora.grad(lambda p: jlora.apply(lambda p: (jnp.ones((1, 6)) @ p["kernel"]).sum() ** 2)(p))(nothing.tree)
    assert jnp.abs(jax.tree.leaves(gradient)[1]).max() > 0  # what has no update yet goes on training


def test_bases_of_few_bits():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
    quantised = jlora.quant.quantize({"dense": {"kernel": kernel}}, "int8")
    moved = jax.tree.map(lambda x: x + 0.1, jlora.quant.dequantize(quantised))
    found = extract(quantised, moved, 1)
    assert found.error["dense/kernel"] < 1e-3
    assert error(jlora.merge(found.tree, dtype=jnp.float32), moved) < 1e-3


HALF = {"kernel": jnp.ones((4, 3), jnp.bfloat16)}
WRONG = {
    "rank": (lambda: (base(), tuned(), 0), {}, "rank must be a positive integer, found 0"),
    "wrapped": (lambda: (tree(0), tuned(), 2), {}, "of base is wrapped"),
    "structure": (lambda: (base(), tuned()["head"], 2), {}, "only base has conv/kernel"),
    "shape": (
        lambda: (HALF, {"kernel": jnp.ones((4, 4))}, 2),
        {},
        r"kernel has the shape \(4, 3\) in base and \(4, 4\)",
    ),
    "abstract": (
        lambda: (jax.eval_shape(lambda x: x, base()), tuned(), 2),
        {},
        "values of conv/kernel of base are not known",
    ),
    "dora": (
        lambda: (base(), tuned(), 2),
        {"spec": jlora.LoraSpec(variant="dora")},
        "plain LoRA.*spec has variant 'dora'",
    ),
    "bias": (lambda: (base(), tuned(), 2), {"spec": jlora.LoraSpec(lora_bias=True)}, "lora_bias is not taken here"),
    "no spec": (lambda: (base(), tuned(), 2), {"spec": {}}, "spec must be a jlora.LoraSpec"),
    "counts": (lambda: ({**HALF, "n": 1}, {**HALF, "n": 2}, 1), {}, "n differs, and is of type int"),
    "infinite": (lambda: (HALF, {"kernel": HALF["kernel"] * np.inf}, 1), {}, "kernel differs by values that are NaN"),
    "scale": (lambda: (HALF, HALF, 1), {"spec": jlora.LoraSpec(scaling=0.0)}, "scale of kernel is 0"),
}


@pytest.mark.parametrize(("given", "settings", "message"), WRONG.values(), ids=WRONG)
def test_what_is_refused(given, settings, message):
    with pytest.raises((ValueError, TypeError), match=f"adapters.extract.*{message}"):
        extract(*given(), **settings)
