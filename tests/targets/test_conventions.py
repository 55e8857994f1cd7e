"""Axes of kernels: from the spec, from the sites, from Flax's conventions, or an error."""

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora import Axes, LoraSpec, wrap

CONVENTIONS = {
    "mlp/kernel": ((6, 5), (6, 2), (2, 5)),
    "linear/w": ((6, 5), (6, 2), (2, 5)),
    "attention/query/kernel": ((6, 2, 3), (6, 2), (2, 2, 3)),
    "attention/key/kernel": ((6, 2, 3), (6, 2), (2, 2, 3)),
    "attention/value/kernel": ((6, 2, 3), (6, 2), (2, 2, 3)),
    "attention/out/kernel": ((2, 3, 6), (2, 3, 2), (2, 6)),
    "Conv_0/kernel": ((3, 3, 4, 5), (3, 3, 4, 2), (2, 5)),
    "conv1_d/w": ((3, 4, 5), (3, 4, 2), (2, 5)),
    "embed/embedding": ((7, 6), (7, 2), (2, 6)),
}


@pytest.mark.parametrize("path, shapes", CONVENTIONS.items(), ids=CONVENTIONS)
def test_conventions(path, shapes):
    base, lora_a, lora_b = shapes
    node = wrap({path: jax.ShapeDtypeStruct(base, jnp.float32)}, LoraSpec(rank=2, targets=path))[path]
    assert (node.lora_a.shape, node.lora_b.shape) == (lora_a, lora_b)
    assert (len(node.axes.in_axis), len(node.axes.out_axis)) == (len(lora_a) - 1, len(lora_b) - 1)


AMBIGUOUS = {
    "dense/kernel": (3, 4, 5),
    "layers/mlp/kernel": (2, 6, 5),
    "layers/query/kernel": (2, 6, 2, 3),
    "linear/weight": (4, 5),
    "query": (3, 4, 5),
}


@pytest.mark.parametrize("path, shape", AMBIGUOUS.items(), ids=AMBIGUOUS)
def test_ambiguous_axes_are_an_error_that_tells_the_ways_out(path, shape):
    with pytest.raises(ValueError, match="ambiguous") as error:
        wrap({path: jnp.ones(shape)}, LoraSpec(rank=2, targets=path))
    assert all(part in str(error.value) for part in (path, str(shape), "jlora.sites(", "LoraSpec(axes="))


def test_stacked_kernels_beside_each_other_are_no_heads():
    """Four layers of (6, 8) and (8, 6), without biases: not attention's (features, heads, size) and back."""
    stacked = {"layers": {"query": {"kernel": jnp.ones((4, 6, 8))}, "out": {"kernel": jnp.ones((4, 8, 6))}}}
    for name in ("query", "out"):
        with pytest.raises(ValueError, match=f"axes of layers/{name}/kernel .* are ambiguous"):
            wrap(stacked, LoraSpec(targets=name, rank=2))
    attention = {"query": {"kernel": jnp.ones((6, 2, 3))}, "out": {"kernel": jnp.ones((2, 3, 6))}}
    wrapped = wrap(attention, LoraSpec(rank=2))
    assert wrapped["query"]["kernel"].axes == Axes((0,), (1, 2))
    assert wrapped["out"]["kernel"].axes == Axes((0, 1), (2,))


def test_stacked_kernels_of_a_layer_named_query_are_ambiguous():
    with pytest.raises(ValueError, match="ambiguous"):
        wrap({"layers": {"query": {"kernel": jnp.ones((4, 6, 6)), "bias": jnp.ones((4, 6))}}}, LoraSpec(rank=2))


def test_a_matrix_is_in_out_whatever_its_bias():
    params = {"dense": {"kernel": jnp.ones((6, 5)), "bias": jnp.ones((1, 5))}}
    assert wrap(params, LoraSpec(rank=2))["dense"]["kernel"].axes == Axes(0, 1)


def test_the_specs_axes_go_before_the_convention():
    node = wrap({"kernel": jnp.ones((4, 3))}, LoraSpec(rank=2, axes={"kernel": Axes(1, 0)}))["kernel"]
    assert (node.lora_a.shape, node.lora_b.shape) == ((3, 2), (2, 4))


FUSED = {"fused": jnp.ones((6, 2, 3)), "scale": jnp.ones(6)}


def project(params, x):
    return jnp.einsum("td,dhk->thk", x * params["scale"], params["fused"])


def test_sites_tell_axes_that_no_convention_does():
    sites = jlora.sites(project, FUSED, jnp.ones((4, 6)))
    wrapped = wrap(FUSED, LoraSpec(rank=2), sites=sites)
    assert wrapped["fused"].axes == Axes(0, (1, 2))
    assert wrapped["scale"] is FUSED["scale"]


def test_sites_of_the_variables_fit_their_params():
    sites = jlora.sites(lambda variables, x: project(variables["params"], x), {"params": FUSED}, jnp.ones((4, 6)))
    assert wrap(FUSED, LoraSpec(rank=2), sites=sites)["fused"].axes == Axes(0, (1, 2))


def test_the_specs_axes_go_before_the_sites():
    sites = jlora.sites(project, FUSED, jnp.ones((4, 6)))
    spec = LoraSpec(rank=2, axes={"fused": Axes((0, 1), 2)})
    assert wrap(FUSED, spec, sites=sites)["fused"].axes == Axes((0, 1), 2)


def test_all_linear_takes_from_the_sites_what_is_multiplied():
    params = {"table": jnp.ones((7, 6)), "weight": jnp.ones((6, 5)), "conv": jnp.ones((3, 5, 5))}

    def fn(params, tokens):
        hidden = params["table"][tokens] @ params["weight"]
        return jax.lax.conv_general_dilated(
            hidden[None], params["conv"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )

    sites = jlora.sites(fn, params, jnp.arange(4))
    wrapped = wrap(params, LoraSpec(rank=2), sites=sites)
    assert [name for name in params if wrapped[name] is not params[name]] == ["weight"]
