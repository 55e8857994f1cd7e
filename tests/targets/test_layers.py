"""Layer ranges, on unrolled and on stacked layers."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora.targets.layers import layer_of
from tests.support import error
from tests.variants.cases import Case, moved, noise


@pytest.mark.parametrize(
    "path, name, layer",
    [
        ("encoder/layer_3/query/kernel", None, 3),
        ("h/7/attn/kernel", None, 7),
        ("model/layers/11/mlp/up_proj/kernel", None, 11),
        ("blocks.4/w/kernel", None, 4),
        ("stage_0/layers_3/Dense_1/kernel", "layers", 3),
        ("stage_0/layers/3/kernel", "layers", 3),
        ("stage_0/layers_3/kernel", None, 0),
        ("head/kernel", None, None),
        ("head/kernel", "layers", None),
        ("a/3", None, None),  # a leaf in a list: no layer
    ],
)
def test_the_first_number_is_the_layer(path, name, layer):
    assert layer_of(path, name) == layer


def stacked(p, x):
    layers = p["up"], jnp.moveaxis(p["down"], 1, 0)
    return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w[0]) @ w[1], None), x, layers)[0]


STACKED = Case(stacked, {"up": noise(3, 8, 12), "down": noise(12, 3, 8)}, (noise(5, 8),))


def unrolled(n=4):
    block = lambda: {"up": {"kernel": jnp.ones((8, 12))}, "down": {"kernel": jnp.ones((12, 8))}}
    return {f"layer_{i}": block() for i in range(n)} | {"head": {"kernel": jnp.ones((8, 5))}}


def adapted(params):
    """The names of the modules that have adapters."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_node)
    return [jax.tree_util.keystr(path[:1], simple=True) for path, leaf in leaves if is_node(leaf)]


def is_node(x):
    return isinstance(x, jlora.AdaptedParam)


def test_unrolled_layers():
    params = jlora.wrap(unrolled(), jlora.LoraSpec(layers=range(1, 3), rank=2))
    assert adapted(params) == ["layer_1", "layer_1", "layer_2", "layer_2"]


def test_what_other_layers_have_is_not_looked_at():
    """The head, of one output, allows no rank of 2; it is in no layer."""
    tree = unrolled() | {"head": {"kernel": jnp.ones((8, 1))}}
    assert adapted(jlora.wrap(tree, jlora.LoraSpec(layers=[3], rank=2))) == ["layer_3", "layer_3"]


def test_stacked_layers_train_alone():
    case = STACKED
    spec = jlora.LoraSpec(targets=tuple(case.params), rank=2, layers=[0, 2])
    params = moved(jlora.wrap(case.params, spec, sites=case.sites))
    assert params["up"].lora_a.shape == (2, 8, 2)
    assert params["down"].lora_b.shape == (2, 2, 8)  # its layers are on axis 1, its factors' on the first
    change = jax.tree.map(lambda x, y: x - y, jlora.merge(params), case.params)
    assert not jnp.any(change["up"][1]) and jnp.all(jnp.any(change["up"][jnp.array([0, 2])] != 0, (1, 2)))
    assert not jnp.any(change["down"][:, 1])
    assert (
        error(jlora.apply(case.fn, fallback="error")(params, *case.args), case.fn(jlora.merge(params), *case.args))
        < 2e-5
    )
    whole = jlora.wrap(case.params, jlora.LoraSpec(targets=tuple(case.params), rank=2), sites=case.sites)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(jlora.partition(tree)[0]))
    assert count(params) * 3 == count(whole) * 2


def test_a_layer_starts_the_same_whichever_are_adapted():
    case = STACKED
    make = lambda layers: (
        jlora.wrap(case.params, jlora.LoraSpec(targets="up", rank=2, layers=layers), sites=case.sites)["up"].lora_a
    )
    assert jnp.array_equal(make([0, 2]), make(None)[jnp.array([0, 2])])


def test_all_layers_are_no_choice():
    case = STACKED
    node = jlora.wrap(case.params, jlora.LoraSpec(targets="up", rank=2, layers=range(3)), sites=case.sites)["up"]
    assert node.layers is None


@pytest.mark.parametrize(
    "tree, settings, message",
    [
        (unrolled(), {"layers": [2, 7]}, r"names \[7\], but targets are in layers \[0, 1, 2, 3\]"),
        ({"head": {"kernel": jnp.ones((8, 5))}}, {"layers": [0]}, "no target has a layer's number"),
        (unrolled(), {"layers": [1], "layers_name": "blocks"}, "'blocks' is neither a list"),
        (unrolled(), {"layers": [1], "layers_name": "head"}, "no target has a layer's number"),
        (
            {"Block_0": {"Dense_0": {"kernel": jnp.ones((8, 8))}}, "Dense_0": {"kernel": jnp.ones((8, 8))}},
            {"layers": [0]},
            "several lists, 'Block' as in Block_0/Dense_0/kernel, 'Dense' as in Dense_0/kernel",
        ),
    ],
)
def test_layers_that_are_not_there(tree, settings, message):
    with pytest.raises(ValueError, match=message):
        jlora.wrap(tree, jlora.LoraSpec(rank=2, **settings))


def test_a_stack_without_that_layer():
    case = STACKED
    with pytest.raises(ValueError, match=r"layers=\[5\] names \[5\], but down stacks 3 layers"):
        jlora.wrap(case.params, jlora.LoraSpec(targets="down", rank=2, layers=[5]), sites=case.sites)


SCANNED = {"ScanBlock_0": {"Dense_0": {"kernel": jnp.ones((4, 8, 8))}}, "head": {"kernel": jnp.ones((8, 5))}}
AXES = {"ScanBlock_0/*": jlora.Axes(1, 2, 0)}


def test_a_number_in_the_path_of_a_stack_has_two_readings():
    """Flax's automatic names have one."""
    spec = jlora.LoraSpec(rank=2, axes=AXES, layers=[0])
    with pytest.raises(ValueError, match=r"two readings.*layers_name='ScanBlock_0'.*layers_name='ScanBlock'"):
        jlora.wrap(SCANNED, spec)
    with pytest.raises(ValueError, match=r"names \[1, 2\], but.*layers_name='ScanBlock_0' says so"):
        jlora.wrap(SCANNED, dataclasses.replace(spec, layers=[1, 2]))
    node = lambda **settings: jlora.wrap(SCANNED, dataclasses.replace(spec, **settings))["ScanBlock_0"]["Dense_0"][
        "kernel"
    ]
    assert node(layers=[1, 2], layers_name="ScanBlock_0").layers == (1, 2)
    assert node(layers=[0], layers_name="ScanBlock").layers is None


def test_a_layer_of_experts_is_told_by_the_kernels_beside():
    layer = lambda: {"experts": {"kernel": jnp.ones((4, 8, 8))}, "query": {"kernel": jnp.ones((8, 8))}}
    spec = jlora.LoraSpec(rank=2, layers=[1], axes={"experts/*": jlora.Axes(1, 2, 0)})
    tree = jlora.wrap({f"layers_{i}": layer() for i in range(2)}, spec)
    assert is_node(tree["layers_1"]["experts"]["kernel"]) and not is_node(tree["layers_0"]["experts"]["kernel"])


@pytest.mark.parametrize("layers", [3, "all", [], [1, 1], [-1], [True], [0.5]])
def test_layers_are_different_indices(layers):
    with pytest.raises(ValueError, match="LoraSpec: layers must be a sequence of different indices"):
        jlora.LoraSpec(layers=layers)


def test_layers_round_trip():
    spec = jlora.LoraSpec(layers=range(8, 16), layers_name="layers")
    assert spec.layers == tuple(range(8, 16))
    assert jlora.LoraSpec.from_dict(spec.to_dict()) == spec


def test_a_layer_that_is_left_out_needs_no_axes():
    """Nor a type or a size that can be adapted."""
    params = {f"layer_{i}": {"up": {"kernel": x}} for i, x in enumerate((jnp.ones((8, 8)), jnp.ones((2, 3, 4))))}
    params["layer_2"] = {"up": {"kernel": jnp.ones((4, 4), jnp.int32)}}
    wrapped = jlora.wrap(params, jlora.LoraSpec(rank=2, layers=[0]))
    assert isinstance(wrapped["layer_0"]["up"]["kernel"], jlora.LoraParam)
    assert wrapped["layer_1"] == params["layer_1"] and wrapped["layer_2"] == params["layer_2"]
    with pytest.raises(ValueError, match=r"layer_1/up/kernel of shape .* ambiguous"):
        jlora.wrap(params, jlora.LoraSpec(rank=2, layers=[0, 1]))
