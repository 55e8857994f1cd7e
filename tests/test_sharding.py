"""Specs and shardings of a wrapped tree, from those of its base, however they are told."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from tests.support import error

NAMES = ("fsdp", "tensor")


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), NAMES, axis_types=(kind, kind))


def params():
    rng = np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    layer = {"kernel": noise(3, 8, 16), "bias": noise(3, 16)}
    return {"embed": {"embedding": noise(16, 8)}, "layers": layer, "norm": {"scale": noise(8)}}


SPEC = jlora.LoraSpec(targets=("layers/kernel", "embed/*"), rank=2, train="norm/*", bias="lora_only",
                      axes={"layers/kernel": jlora.Axes((1,), (2,), (0,))})  # fmt: skip
BASE = {
    "embed": {"embedding": P("tensor", "fsdp")},
    "layers": {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")},
    "norm": {"scale": None},
}


def wrapped():
    return jlora.wrap(params(), SPEC)


def test_specs_follow_the_base():
    tree = wrapped()
    specs = jlora.sharding.specs(tree, BASE)
    kernel, table = specs["layers"]["kernel"], specs["embed"]["embedding"]
    assert (kernel.base, kernel.lora_a, kernel.lora_b) == (
        P(None, "fsdp", "tensor"), P(None, "fsdp", None), P(None, None, "tensor")
    )  # fmt: skip
    assert (table.base, table.lora_a, table.lora_b) == (P("tensor", "fsdp"), P("tensor", None), P(None, "fsdp"))
    assert specs["norm"]["scale"].base == P()
    assert all(isinstance(x, P) for x in jax.tree.leaves(specs))
    assert jax.tree.structure(specs) == jax.tree.structure(tree)


def test_a_short_spec_and_one_for_all_below():
    specs = jlora.sharding.specs(wrapped(), {"embed": P("fsdp"), "layers": P(), "norm": P()})
    assert specs["embed"]["embedding"].lora_a == P("fsdp", None)
    assert specs["embed"]["embedding"].lora_b == P(None, None)
    assert specs["layers"]["kernel"].lora_a == P(None, None, None)
    assert jlora.sharding.specs(wrapped(), P())["layers"]["bias"].base == P()


def test_named_shardings_and_other_mappings_are_taken():
    placed = jax.tree.map(lambda spec: NamedSharding(mesh(), spec or P()), BASE, is_leaf=lambda x: x is None)
    assert specs_of(wrapped(), freeze(placed)) == specs_of(wrapped(), BASE)


def specs_of(tree, base):
    return jax.tree.leaves(jlora.sharding.specs(tree, base))


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_abstract_and_concrete_trees_have_the_same(variant):
    spec = jlora.LoraSpec(targets="layers/kernel", rank=2, variant=variant, axes=SPEC.axes)
    base = {**BASE, "norm": P()}
    plan = jlora.wrap(jax.eval_shape(params), spec)
    assert specs_of(plan, base) == specs_of(jlora.wrap(params(), spec), base)


def test_bias_rows_and_leaves_trained_in_full():
    spec = jlora.LoraSpec(targets="layers/kernel", rank=2, axes=SPEC.axes, lora_bias=True, train="norm/*",
                          train_tokens={"embed/embedding": [1, 5]})  # fmt: skip
    specs = jlora.sharding.specs(jlora.wrap(params(), spec), {**BASE, "norm": {"scale": P("fsdp")}})
    assert specs["layers"]["bias"].lora_bias == P(None, "tensor")
    assert specs["embed"]["embedding"].rows == P(None, "fsdp")
    assert specs["norm"]["scale"].base == P("fsdp")


@pytest.mark.parametrize(
    "base, message",
    [
        ({**BASE, "norm": {}}, "base_specs has nothing for norm/scale"),
        ({**BASE, "head": P()}, "base_specs has 'head', but the tree has no such leaf; its leaves are embed"),
        ({**BASE, "norm": {"scael": P()}}, "base_specs has 'norm/scael', .* and has nothing for norm/scale"),
        ({**BASE, "norm": {"scale": P("fsdp", "tensor")}}, r"has 2 entries, but norm/scale of shape \(8,\) has 1"),
        ({**BASE, "norm": {"scale": "fsdp"}}, "base_specs has 'fsdp' at 'norm/scale'; it takes PartitionSpecs"),
    ],
)
def test_what_does_not_fit_is_said(base, message):
    with pytest.raises(ValueError, match=message):
        jlora.sharding.specs(wrapped(), base)


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            P("mlp", None),
            r"of embed/embedding.* names 'mlp', which is no axis of the mesh \(fsdp, tensor\).*logical_to_mesh",
        ),
        (P("fsdp", "fsdp"), "of embed/embedding.* names an axis of the mesh twice"),
    ],
)
def test_names_that_the_mesh_has_not(spec, message):
    with pytest.raises(ValueError, match=message):
        jlora.sharding.shardings(wrapped(), mesh(), {**BASE, "embed": {"embedding": spec}})


def test_what_can_not_be_of_a_state():
    tree, _, tx = on_one_axis()
    state = jax.eval_shape(tx.init, tree)
    with pytest.raises(TypeError, match="takes a wrapped tree second"):
        jlora.sharding.of_state(tree, {"count": jnp.zeros(3)})
    explicit = jax.device_put(wrapped(), jlora.sharding.shardings(wrapped(), mesh(AxisType.Explicit), ONE_AXIS))
    with pytest.raises(ValueError, match="these are explicit"):
        jlora.sharding.of_state(state, explicit, spread=True)


def test_mesh_and_specs_come_together():
    with pytest.raises(ValueError, match="takes mesh and base_specs together"):
        jlora.sharding.shardings(wrapped(), mesh())


def test_shardings_of_placed_and_of_other_trees():
    places = jlora.sharding.shardings(wrapped(), mesh(), BASE)
    tree = jax.device_put(wrapped(), places)
    found = jlora.sharding.shardings(tree)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(places), strict=True):
        assert isinstance(x, NamedSharding) and x.is_equivalent_to(y, 3)
    assert jax.tree.leaves(jlora.sharding.shardings(wrapped())) == []


def test_out_shardings_of_a_jitted_init():
    """A model that no device could hold is made, and wrapped, in place."""
    make = lambda: jlora.wrap(params(), SPEC)
    places = jlora.sharding.shardings(jax.eval_shape(make), mesh(), BASE)
    tree = jax.jit(make, out_shardings=places)()
    assert error(tree, make()) <= 1e-6
    assert tree["layers"]["kernel"].lora_a.sharding.spec == P(None, "fsdp", None)
    assert tree["layers"]["kernel"].lora_a.addressable_shards[0].data.shape == (3, 4, 2)


class Mlp(nn.Module):
    """A kernel with the axes of a mesh, one with logical ones, one with none."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        x = nn.Dense(16, kernel_init=nn.with_partitioning(init, NAMES), name="up")(x)
        x = nn.Dense(16, kernel_init=nn.with_logical_partitioning(init, ("mlp", "embed")), name="down")(x)
        return nn.Dense(8, name="plain")(x)


RULES = (("mlp", "tensor"), ("embed", "fsdp"), ("fsdp", "fsdp"), ("tensor", "tensor"))


def test_linen_boxes():
    x = jnp.ones((4, 8))
    boxed = Mlp().init(jax.random.key(0), x)["params"]
    tree = jlora.wrap(boxed, jlora.LoraSpec(rank=2))
    specs = jlora.sharding.specs(tree, nn.get_partition_spec(boxed))
    assert specs["up"]["kernel"].value.lora_a == P("fsdp", None)
    assert specs["down"]["kernel"].value.lora_a == P("mlp", None)
    assert specs["plain"]["kernel"].lora_b == P(None, None)
    places = nn.logical_to_mesh_sharding(specs, mesh(), RULES)
    placed = jax.device_put(tree, places)
    assert placed["down"]["kernel"].value.lora_a.sharding.spec == P("tensor", None)
    assert error(placed, tree) == 0
    expected = Mlp().apply({"params": boxed}, x)
    forward = lambda: jax.jit(jlora.apply(Mlp().apply, fallback="error"))({"params": placed}, x)
    assert error(forward(), expected) <= 2e-6
    with jax.set_mesh(mesh()), nn.logical_axis_rules(RULES):  # where linen constrains the kernels
        assert error(forward(), expected) <= 2e-6


def test_boxes_of_placed_arrays():
    """`wrap` places the factors of a model that was made in place, with jit and without."""
    make = lambda: Mlp().init(jax.random.key(0), jnp.ones((4, 8)))["params"]
    logical = nn.get_partition_spec(jax.eval_shape(make))
    boxed = jax.jit(make, out_shardings=nn.logical_to_mesh_sharding(logical, mesh(), RULES))()
    wrap = lambda tree: jlora.wrap(tree, jlora.LoraSpec(rank=2))
    for tree in (wrap(boxed), jax.jit(wrap)(boxed)):
        assert tree["up"]["kernel"].value.lora_a.sharding.is_equivalent_to(NamedSharding(mesh(), P("fsdp")), 2)
        assert tree["down"]["kernel"].value.lora_b.sharding.is_equivalent_to(NamedSharding(mesh(), P(None, "fsdp")), 2)


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), NAMES)
        self.up = nnx.Linear(8, 16, kernel_init=init, rngs=rngs)

    def __call__(self, x):
        return self.up(x)


def test_nnx_metadata():
    with jax.set_mesh(mesh()):
        model = NnxMlp(nnx.Rngs(0))  # placed by its own annotations
    graph, state = nnx.split(model)
    tree = jlora.wrap(state, jlora.LoraSpec(rank=2))
    assert tree["up"]["kernel"].get_value().lora_a.sharding.spec == P("fsdp", None)
    specs = jlora.sharding.specs(tree, nnx.get_partition_spec(state))
    assert specs["up"]["kernel"].get_value().lora_b == P(None, "tensor")
    x = jnp.ones((4, 8))
    found = jax.jit(jlora.apply(lambda state, x: nnx.merge(graph, state)(x), fallback="error"))(tree, x)
    assert error(found, model(x)) <= 2e-6


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("init", ["gaussian", "pissa_niter_4"])
def test_wrap_gathers_no_kernel(init, kind):
    """The largest value that is exchanged has a rank, or one, in the place of one of the kernel's axes."""
    where = NamedSharding(mesh(kind), P(*NAMES))
    plain = {"kernel": jax.device_put(jnp.asarray(np.random.default_rng(0).normal(size=(64, 128)), jnp.float32), where)}
    wrap = jax.jit(lambda p: jlora.wrap(p, jlora.LoraSpec(rank=4, init=init)))
    with jax.set_mesh(where.mesh):
        text = wrap.lower(plain).compile().as_text()
        tree = wrap(plain)
    exchanged = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", text)
    sizes = [np.prod([int(n) for n in shape.split(",") if n], initial=1) for shape in exchanged]
    width = 4 + 8 if init.startswith("pissa") else 1  # with what subspace iteration adds to the rank
    assert max(sizes, default=0) <= 128 * width, exchanged
    assert tree["kernel"].lora_a.sharding.is_equivalent_to(NamedSharding(where.mesh, P("fsdp", None)), 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_fold_keeps_the_placement(kind):
    where = NamedSharding(mesh(kind), P(*NAMES))
    tree = jlora.wrap({"kernel": jax.device_put(jnp.ones((8, 16)), where)}, jlora.LoraSpec(rank=2))
    again = jlora.fold_and_restart(tree, key=jax.random.key(1))
    assert again["kernel"].base.sharding.is_equivalent_to(where, 2)
    assert again["kernel"].lora_a.sharding.is_equivalent_to(tree["kernel"].lora_a.sharding, 2)
    assert jlora.merge(tree)["kernel"].sharding.is_equivalent_to(where, 2)


# An optimizer's state, on a mesh of which the tree uses one axis.
ONE_AXIS = {**BASE, "layers": {"kernel": P(None, "fsdp"), "bias": P()}}


def on_one_axis():
    """The tree, where it lies, and its optimizer."""
    places = jlora.sharding.shardings(wrapped(), mesh(), ONE_AXIS)
    tree = jax.device_put(wrapped(), places)
    return tree, places, jlora.optimizer(optax.adamw(1e-2), tree)


def test_moments_lie_as_what_they_follow():
    tree, _, tx = on_one_axis()
    moments = jlora.sharding.of_state(jax.eval_shape(tx.init, tree), tree).inner_states["trainable"].inner_state[0]
    assert moments.mu["layers"]["kernel"].lora_a.spec == P(None, "fsdp", None)
    assert moments.nu["layers"]["kernel"].lora_b.spec == P(None, None, None)
    assert moments.count.spec == P()
    assert jax.tree.leaves(jlora.sharding.of_state(jax.eval_shape(tx.init, wrapped()), wrapped())) == []


def test_moments_of_other_shapes_are_whole():
    tree, _, _ = on_one_axis()
    state = jax.eval_shape(optax.adafactor(1e-2, min_dim_size_to_factor=2).init, jlora.partition(tree)[0])
    rows = jlora.sharding.of_state(state, tree)[0].v_row["layers"]["kernel"].lora_a
    assert rows.spec == P()


def test_moments_spread_over_the_rest_of_the_mesh():
    """Each device has its part of all moments; the steps are those of the others."""
    tree, places, tx = on_one_axis()
    shapes = jax.eval_shape(tx.init, tree)
    spread = jlora.sharding.of_state(shapes, tree, spread=True)
    moments = spread.inner_states["trainable"].inner_state[0].mu["layers"]["kernel"]
    assert moments.lora_a.spec == P(None, ("fsdp", "tensor"), None)
    assert moments.lora_b.spec == P(None, None, ("fsdp", "tensor"))
    loss = lambda p, x: jnp.sum(jnp.sin(x @ p["layers"]["kernel"][0]) ** 2)
    grads = jlora.grad(jlora.apply(loss))

    def after_three_steps(where):
        def step(tree, state):
            updates, state = tx.update(grads(tree, jnp.ones((4, 8))), state, tree)
            return optax.apply_updates(tree, updates), state

        step = jax.jit(step, out_shardings=(places, where))
        found = tree, jax.jit(tx.init, out_shardings=where)(tree)
        for _ in range(3):
            found = step(*found)
        return found

    found, expected = after_three_steps(spread), after_three_steps(jlora.sharding.of_state(shapes, tree))
    assert error(found, expected) <= 1e-6
    assert error(found[0], tree) > 1e-3
    kept = found[1].inner_states["trainable"].inner_state[0].mu["layers"]["kernel"].lora_b
    assert kept.addressable_shards[0].data.size == kept.size // 8


def test_kernels_that_differ_in_placement_alone_are_placed_apart():
    """They share what makes their factors only where they lie alike."""
    put = lambda kind, *spec: jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh(kind), P(*spec)))
    for kind in (AxisType.Auto, AxisType.Explicit):
        plain = {"a": {"kernel": put(kind, "fsdp")}, "b": {"kernel": put(kind, None, "tensor")}}
        wrap = lambda tree: jlora.wrap(tree, jlora.LoraSpec(rank=2))
        with jax.set_mesh(mesh(kind)):
            for tree in (wrap(plain), jax.jit(wrap)(plain)):
                assert tree["a"]["kernel"].lora_a.sharding.spec[0] == "fsdp"
                assert tree["b"]["kernel"].lora_b.sharding.spec[1] == "tensor"


def test_shapes_and_arrays_in_one_tree():
    plan = {"a": {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32)}, "b": {"kernel": np.ones((8, 16), np.float32)}}
    tree = jlora.wrap(plan, jlora.LoraSpec(rank=2))
    assert isinstance(tree["a"]["kernel"].lora_a, jax.ShapeDtypeStruct)
    assert isinstance(tree["b"]["kernel"].lora_a, jax.Array)
