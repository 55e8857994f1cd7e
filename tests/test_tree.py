"""Functions of a wrapped tree: merge, unwrap, partition and combine, labels; trees in other hands."""

import dataclasses
import logging
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

import jlora
from jlora import Axes, LoraParam, LoraSpec, MergePrecisionWarning, TrainableParam
from tests.support import randomised, same_bits


def normal(*shape: int, dtype: Any = jnp.float32, std: float = 1.0) -> jax.Array:
    return jnp.asarray(std * np.random.default_rng(shape).normal(size=shape), dtype)


def node(shape: tuple[int, ...], axes: Axes, *, dtype: Any = jnp.float32, rank: int = 2, std: float = 0.3) -> LoraParam:
    """A kernel of noise with factors of noise."""
    size = lambda which: tuple(shape[axis] for axis in which)
    lora_a = normal(*size(axes.batch_axis), *size(axes.in_axis), rank, std=std)
    lora_b = normal(*size(axes.batch_axis), rank, *size(axes.out_axis), std=std)
    return LoraParam(normal(*shape, dtype=dtype), lora_a, lora_b, axes=axes, scale=1.5)


def tree(**settings: Any) -> dict[str, Any]:
    return {
        "dense": {"kernel": node((6, 5), Axes(0, 1), **settings), "bias": normal(5)},
        "head": TrainableParam(normal(5, 2)),
        "step": jnp.int32(7),
    }


def exact(weight: LoraParam) -> np.ndarray:
    """W + s A B in float64, by the letters of an einsum."""
    letters = "abcdefgh"[: weight.ndim]
    pick = lambda which: "".join(letters[axis] for axis in which)
    batch, ins, outs = pick(weight.axes.batch_axis), pick(weight.axes.in_axis), pick(weight.axes.out_axis)
    base, lora_a, lora_b = (np.asarray(x, np.float64) for x in (weight.base, weight.lora_a, weight.lora_b))
    return base + weight.scale * np.einsum(f"{batch}{ins}r,{batch}r{outs}->{letters}", lora_a, lora_b)


def described(x: Any) -> Any:
    return jax.tree.structure(x), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(x)]


# -------------------------------------------------------------------------------- merge

SPLITS = {
    "in_out": ((6, 5), Axes(0, 1)),
    "out_in": ((5, 6), Axes(1, 0)),
    "query": ((6, 2, 3), Axes(0, (1, 2))),
    "out": ((2, 3, 6), Axes((0, 1), 2)),
    "out_in_out": ((2, 6, 3), Axes(1, (0, 2))),
    "conv": ((3, 2, 4, 5), Axes((0, 1, 2), 3)),
    "stacked": ((4, 6, 5), Axes(1, 2, 0)),
    "stacked_inside": ((6, 4, 5), Axes(0, 2, 1)),
    "stacked_twice": ((2, 6, 4, 5), Axes(1, 3, (0, 2))),
    "stacked_backwards": ((2, 6, 4, 5), Axes(1, 3, (2, 0))),
    "axes_backwards": ((6, 2, 3, 4), Axes((1, 0), (3, 2))),
    "axes_of_size_one": ((1, 6, 1, 5), Axes((0, 1), (2, 3))),
}


@pytest.mark.parametrize("shape, axes", SPLITS.values(), ids=SPLITS)
def test_merge_is_the_sum_in_float64_to_float32_rounding(shape, axes):
    weight = node(shape, axes)
    merged = jlora.merge({"w": weight})["w"]
    assert merged.dtype == jnp.float32
    np.testing.assert_allclose(merged, exact(weight), rtol=1e-6, atol=1e-6)


def fractions(dtype: Any) -> LoraParam:
    """Numbers whose sum needs rounding in 16 bits and none in 32."""
    integers = lambda *shape: np.random.default_rng(shape).integers(-8, 9, shape)
    lora_a, lora_b = (jnp.asarray(integers(*shape) / 16, jnp.float32) for shape in ((32, 4), (4, 16)))
    return LoraParam(jnp.asarray(integers(32, 16) / 4, dtype), lora_a, lora_b, axes=Axes(0, 1), scale=0.3125)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_merge_into_16_bits_is_rounded_once(dtype):
    weight = fractions(dtype)
    summed = exact(weight)
    assert np.all(summed == summed.astype(np.float32)) and np.any(summed != summed.astype(dtype))
    with jax.numpy_dtype_promotion("standard"):
        merged = jlora.merge({"w": weight})["w"]
    assert merged.dtype == dtype
    np.testing.assert_array_equal(np.asarray(merged), summed.astype(np.float32).astype(dtype))


def test_merge_of_16_bits_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        jlora.merge({"w": fractions(jnp.bfloat16)})


def test_merge_into_8_bits_is_rounded_once():
    weight = fractions(jnp.float8_e4m3fn)
    expected = jnp.asarray(exact(weight), jnp.float32).astype(jnp.float8_e4m3fn)
    with warnings.catch_warnings(action="ignore", category=MergePrecisionWarning):
        assert same_bits(jlora.merge({"w": weight}), {"w": expected})


def test_merge_to_a_wider_dtype_keeps_what_rounding_would_lose():
    weight = fractions(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        merged = jlora.merge({"w": weight, "bias": normal(3, dtype=jnp.bfloat16)}, dtype=jnp.float32)
    np.testing.assert_array_equal(np.asarray(merged["w"]), exact(weight))
    assert merged["bias"].dtype == jnp.bfloat16


def test_merge_to_a_narrower_dtype_rounds_once():
    weight = fractions(jnp.float32)
    merged = jlora.merge({"w": weight}, dtype=jnp.bfloat16)["w"]
    np.testing.assert_array_equal(np.asarray(merged), exact(weight).astype(np.float32).astype(jnp.bfloat16))


def test_merge_to_integers_is_refused():
    with pytest.raises((TypeError, ValueError), match=r"merge: dtype.*int8"):
        jlora.merge(tree(), dtype=jnp.int8)


def test_merge_right_after_wrap_is_the_base():
    base = normal(6, 5)
    merged = jlora.merge(jlora.wrap({"kernel": base}, LoraSpec(rank=2)))["kernel"]
    np.testing.assert_array_equal(merged, base)


def test_merge_returns_the_tree_that_was_wrapped():
    params = {"dense": {"kernel": normal(6, 5), "bias": normal(5)}, "head": {"kernel": normal(5, 2)}}
    merged = jlora.merge(jlora.wrap(params, LoraSpec(rank=2, train="head")))
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert merged["dense"]["bias"] is params["dense"]["bias"]
    assert merged["head"]["kernel"] is params["head"]["kernel"]


def test_merge_of_an_nnx_state_runs_in_its_model():
    graph, state = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    wrapped = jax.tree.map(lambda leaf: leaf + 1, jlora.wrap(state, LoraSpec(rank=2)))
    x = normal(2, 4)
    expected = jlora.apply(lambda state, x: nnx.merge(graph, state)(x))(wrapped, x)
    np.testing.assert_allclose(nnx.merge(graph, jlora.merge(wrapped))(x), expected, rtol=1e-5)


def test_merge_under_jit():
    merged = jax.jit(jlora.merge)(tree())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), merged, jlora.merge(tree()))


def test_merge_under_eval_shape():
    assert described(jax.eval_shape(jlora.merge, tree())) == described(jlora.merge(tree()))


def test_merge_of_shapes():
    merged = jlora.merge(jax.eval_shape(tree), dtype=jnp.bfloat16)
    assert merged["dense"]["kernel"] == jax.ShapeDtypeStruct((6, 5), jnp.bfloat16)
    assert merged["head"] == jax.ShapeDtypeStruct((5, 2), jnp.float32)


def test_merge_warns_of_an_adapter_below_the_types_resolution():
    wrapped = tree(dtype=jnp.bfloat16, std=1e-3)
    with jax.numpy_dtype_promotion("standard"), pytest.warns(MergePrecisionWarning, match=r"dense/kernel to bfloat16"):
        jlora.merge(wrapped)


@pytest.mark.parametrize(
    "settings, dtype",
    [
        ({"dtype": jnp.bfloat16, "std": 1.0}, None),
        ({"dtype": jnp.bfloat16, "std": 0.0}, None),
        ({"dtype": jnp.bfloat16, "std": 1e-3}, jnp.float32),
        ({"dtype": jnp.float32, "std": 1e-3}, None),
    ],
    ids=["large", "none", "kept_in_float32", "float32"],
)
def test_merge_does_not_warn_of_an_adapter_that_is_kept(settings, dtype):
    with jax.numpy_dtype_promotion("standard"), warnings.catch_warnings(action="error", category=MergePrecisionWarning):
        jlora.merge(tree(**settings), dtype=dtype)


def three(dtype=jnp.bfloat16, std=1e-4):
    params = {f"layer_{i}": {"kernel": jnp.ones((8, 8), dtype)} for i in range(3)}
    return randomised(jlora.wrap(params, LoraSpec(rank=2)), std)


def test_one_warning_tells_of_all_kernels():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jlora.merge(three())
    (told,) = [str(w.message) for w in caught]
    assert "rounding layer_0/kernel and 2 more to bfloat16 loses 100% of their adapters" in told
    assert "merge(tree, dtype=jnp.float32, everything=True) keeps it" in told and "merge_error" in told
    assert caught[0].filename == __file__


def test_a_model_whole_in_one_type():
    """As the warning advises: a scan whose carry has the base's type goes on."""
    params = {"layers": {"kernel": jnp.ones((3, 8, 8), jnp.bfloat16)}, "table": jnp.ones((5, 8), jnp.bfloat16)}
    params |= {"steps": jnp.arange(3), "head": jnp.ones((8, 2), jnp.bfloat16)}
    spec = LoraSpec(rank=2, targets="layers/kernel", train="head", axes={"layers/kernel": Axes((1,), (2,), (0,))})
    tree = jlora.wrap(params, spec)

    def fn(p, ids):
        step = lambda x, kernel: (x @ kernel, None)
        return jax.lax.scan(step, p["table"][ids], p["layers"]["kernel"])[0] @ p["head"]

    with pytest.raises(TypeError, match="carry"):
        fn(jlora.merge(tree, dtype=jnp.float32), jnp.arange(2))
    whole = jlora.merge(tree, dtype=jnp.float32, everything=True)
    assert fn(whole, jnp.arange(2)).dtype == jnp.float32
    assert {name: x.dtype.name for name, x in whole.items() if name != "layers"} == {
        "head": "float32", "steps": "int32", "table": "float32"
    }  # fmt: skip
    plan = jlora.merge(jax.eval_shape(lambda: tree), dtype=jnp.float32, everything=True)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), plan) == jax.tree.map(lambda x: (x.shape, x.dtype), whole)
    with pytest.raises(ValueError, match="everything=True casts to dtype, and none is given"):
        jlora.merge(tree, everything=True)


@pytest.mark.parametrize("std, dtype", [(1e-4, None), (3e-2, None), (1e-4, jnp.float16), (1e-5, jnp.float32)])
def test_merge_error_is_the_share_that_rounding_takes(std, dtype):
    """Against float64 by hand; nothing is warned of."""
    tree = three(std=std)
    with warnings.catch_warnings(action="error"):
        found = jlora.merge_error(tree, dtype=dtype)
        made = jlora.merge(tree, dtype=jnp.float32) if dtype == jnp.float32 else None
    for i in range(3):
        node = tree[f"layer_{i}"]["kernel"]
        wide = lambda x: np.asarray(x, np.float64)
        update = node.scale * wide(node.lora_a) @ wide(node.lora_b)
        if made is None:
            rounded = wide((wide(node.base) + update).astype(dtype or jnp.bfloat16))
        else:
            rounded = wide(made[f"layer_{i}"]["kernel"])
        lost = np.linalg.norm(rounded - wide(node.base) - update) / np.linalg.norm(update)
        np.testing.assert_allclose(found.lost[f"layer_{i}/kernel"], min(lost, 1), rtol=2e-2, atol=1e-7)


def test_merge_error_of_a_functions_results():
    tree, x = three(std=3e-2), jnp.ones((2, 8), jnp.bfloat16)
    fn = lambda p, x: x @ p["layer_0"]["kernel"].astype(jnp.float32)
    found = jlora.merge_error(tree, fn, x)
    exact, merged = jlora.apply(fn)(tree, x), fn(jlora.merge(tree), x)
    np.testing.assert_allclose(found.outputs, jnp.linalg.norm(merged - exact) / jnp.linalg.norm(exact), rtol=1e-3)
    assert found.outputs > 0 and "distance of the results over their norm" in str(found)
    assert jlora.merge_error(tree, fn, x, dtype=jnp.float32).outputs < 1e-6
    large = jax.tree.map(lambda x: x * 1e4 if x.dtype == jnp.float32 else x, three(std=1.0))
    assert jlora.merge_error(large, dtype=jnp.float16).lost["layer_1/kernel"] == np.inf
    with pytest.raises(TypeError, match="merge_error: no leaf of the first argument is wrapped"):
        jlora.merge_error({"kernel": x})


# -------------------------------------------------------------------------------- unwrap

BITS = np.array([0x80000000, 0x7FC01234, 0xFFC00001, 0x7F800001, 0x00000001, 0x80000001, 0x7F800000], np.uint32)


def odd() -> jax.Array:
    """-0.0, quiet and signalling NaNs with payloads, subnormals, infinity."""
    return jnp.asarray(np.stack([BITS] * 3, axis=1).view(np.float32))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_unwrap_gives_every_bit_back(transform):
    params = {"kernel": odd(), "scale": odd()[:, 0], "half": odd().view(jnp.uint32)}
    back = transform(jlora.unwrap)(jax.tree.map(lambda x: x, jlora.wrap(params, LoraSpec(rank=2))))
    assert same_bits(back, params)
    assert np.asarray(back["kernel"]).view(np.uint32)[:, 0].tolist() == BITS.tolist()


def test_unwrap_gives_the_arrays_themselves_back():
    params = {"kernel": normal(6, 5), "bias": normal(5)}
    back = jlora.unwrap(jlora.wrap(params, LoraSpec(rank=2)))
    assert all(back[name] is params[name] for name in params)


def test_unwrap_drops_the_adapter():
    assert same_bits(jlora.unwrap(tree())["dense"]["kernel"], tree()["dense"]["kernel"].base)


def test_unwrap_keeps_what_was_trained_in_full():
    wrapped = tree() | {"head": TrainableParam(jnp.full((5, 2), 3.0))}
    assert np.all(jlora.unwrap(wrapped)["head"] == 3)


@pytest.mark.parametrize("function", [jlora.merge, jlora.unwrap, jlora.partition])
def test_a_plain_tree_is_refused(function):
    with pytest.raises(TypeError, match=rf"^{function.__name__} takes a tree that jlora.wrap returned"):
        function({"kernel": normal(6, 5)})


def test_merge_twice_is_refused():
    with pytest.raises(TypeError, match=r"merged twice\?"):
        jlora.merge(jlora.merge(tree()))


@pytest.mark.parametrize("half", [0, 1])
def test_merge_of_one_half_says_to_combine(half):
    with pytest.raises((TypeError, ValueError), match="combine"):
        jlora.merge(jlora.partition(tree())[half])


# -------------------------------------------------------------------------------- partition and combine


def test_partition_gives_each_leaf_to_one_half():
    trainable, frozen = jlora.partition(tree())
    weight = tree()["dense"]["kernel"]
    assert same_bits(jax.tree.leaves(trainable), [weight.lora_a, weight.lora_b, tree()["head"].base])
    assert same_bits(jax.tree.leaves(frozen), [tree()["dense"]["bias"], weight.base, tree()["step"]])


def test_the_halves_have_none_where_the_other_has_a_leaf():
    holes = [jax.tree.map(lambda x: x is None, half, is_leaf=lambda x: x is None) for half in jlora.partition(tree())]
    assert jax.tree.structure(holes[0]) == jax.tree.structure(holes[1]) == jax.tree.structure(tree())
    assert jax.tree.leaves(holes[0]) == [not hole for hole in jax.tree.leaves(holes[1])]


def test_combine_undoes_partition():
    assert same_bits(jlora.combine(*jlora.partition(tree())), tree())


def test_combine_takes_the_halves_in_any_order():
    trainable, frozen = jlora.partition(tree())
    assert same_bits(jlora.combine(frozen, trainable), tree())


def test_none_and_what_is_no_array_come_back():
    wrapped = tree() | {"none": None, "name": "text", "rate": 0.5, "nested": [None, {"none": None}]}
    trainable, frozen = jlora.partition(wrapped)
    assert {name for name, leaf in trainable.items() if jax.tree.leaves(leaf)} == {"dense", "head"}
    again = jlora.combine(trainable, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(wrapped)
    assert [again[name] for name in ("none", "name", "rate", "nested")] == [None, "text", 0.5, [None, {"none": None}]]


def test_partition_of_shapes():
    trainable, frozen = jlora.partition(jax.eval_shape(tree))
    assert described(jlora.combine(trainable, frozen)) == described(tree())
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == 6 * 2 + 2 * 5 + 5 * 2


def test_partition_under_jit():
    assert same_bits(jax.jit(jlora.partition)(tree()), jlora.partition(tree()))


def test_a_leaf_in_both_halves_is_refused():
    trainable, _ = jlora.partition(tree())
    with pytest.raises(ValueError, match=r"combine: .* is in both trees"):
        jlora.combine(trainable, tree())


def test_a_leaf_in_both_halves_is_named():
    trainable, frozen = jlora.partition(tree())
    with pytest.raises(ValueError, match="head"):
        jlora.combine(trainable, frozen | {"head": TrainableParam(normal(5, 2))})


def test_halves_of_two_trees_are_refused():
    trainable, frozen = jlora.partition(tree())
    with pytest.raises(ValueError):
        jlora.combine(trainable, frozen | {"more": normal(3)})


# -------------------------------------------------------------------------------- labels


def test_labels_have_the_structure_of_the_tree():
    assert jax.tree.structure(jlora.labels(tree())) == jax.tree.structure(tree())


def test_labels_say_what_trains():
    labels = jlora.labels(tree())
    weight = labels["dense"]["kernel"]
    assert (weight.base, weight.lora_a, weight.lora_b) == ("frozen", "trainable", "trainable")
    assert (labels["dense"]["bias"], labels["head"].base, labels["step"]) == ("frozen", "trainable", "frozen")


def test_labels_of_a_plain_tree_are_frozen():
    assert jlora.labels({"a": normal(3), "b": None}) == {"a": "frozen", "b": None}


# -------------------------------------------------------------------------------- other hands


@pytest.mark.parametrize("value", ["label", 1, object()])
def test_nodes_hold_anything_that_tree_map_puts_into_them(value):
    mapped = jax.tree.map(lambda _: value, tree())
    assert jax.tree.structure(mapped) == jax.tree.structure(tree())
    assert isinstance(mapped["dense"]["kernel"], LoraParam) and mapped["dense"]["kernel"].lora_a is value


def test_nodes_hold_none():
    mapped = jax.tree.map(lambda _: None, tree())
    assert isinstance(mapped["dense"]["kernel"], LoraParam) and isinstance(mapped["head"], TrainableParam)
    assert jax.tree.leaves(mapped) == []


def test_nodes_hold_shardings():
    devices = jax.devices()
    shardings = jax.tree.map(lambda _: SingleDeviceSharding(devices[-1]), tree())
    placed = jax.device_put(tree(), shardings)
    assert {device for leaf in jax.tree.leaves(placed) for device in leaf.devices()} == {devices[-1]}
    assert same_bits(placed, tree())


def test_nodes_stack_and_scan_as_trees_do():
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[tree()] * 3)
    _, each = jax.lax.scan(lambda carry, layer: (carry, jlora.unwrap(layer)["head"].sum()), 0, stacked)
    np.testing.assert_allclose(each, jnp.full(3, tree()["head"].base.sum()), rtol=1e-6)


@pytest.mark.parametrize("pick", [lambda w: w, lambda w: jlora.partition(w)[0]], ids=["whole", "trainable"])
def test_orbax_saves_and_restores(tmp_path, pick):
    saved = pick(tree())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.eval_shape(lambda: saved))
    assert same_bits(restored, saved)


def test_a_restored_half_goes_with_the_frozen_one(tmp_path):
    trainable, frozen = jlora.partition(tree())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "adapter", trainable)
        checkpointer.wait_until_finished()
        shapes, _ = jlora.partition(jax.eval_shape(tree))
        restored = checkpointer.restore(tmp_path / "adapter", shapes)
    assert same_bits(jlora.combine(restored, frozen), tree())


# -------------------------------------------------------------------------------- halves that do not belong together


def test_halves_of_different_specs_are_told_by_what_differs():
    params = {"kernel": normal(6, 5), "bias": normal(5)}
    half = lambda alpha, part: jlora.partition(jlora.wrap(params, LoraSpec(rank=2, alpha=alpha)))[part]
    with pytest.raises(ValueError, match=r"combine: kernel differs: .*scale=2\.0.*scale=4\.0"):
        jlora.combine(half(4, 0), half(8, 1))
    with pytest.raises(ValueError, match=r"combine: kernel differs: .*a plain leaf"):
        jlora.combine(half(4, 0), params)


def test_factors_of_another_kernel_are_refused():
    wrapped = lambda n: jlora.wrap({"kernel": normal(6, n)}, LoraSpec(rank=2))
    mixed = jlora.combine(jlora.partition(wrapped(5))[0], jlora.partition(wrapped(4))[1])
    for use in (jlora.merge, lambda tree: jlora.apply(lambda p, x: x @ p["kernel"])(tree, jnp.ones((3, 6)))):
        with pytest.raises(ValueError, match="the factors of kernel have shapes"):
            use(mixed)


@pytest.mark.parametrize("half", [0, 1])
def test_one_half_is_refused_by_every_view(half):
    part = jlora.partition(jlora.wrap({"kernel": normal(6, 5)}, LoraSpec(rank=2)))[half]
    fn = lambda p, x: x @ p["kernel"]
    for use in (jlora.summary, lambda t: jlora.apply(fn)(t, jnp.ones((3, 6))), lambda t: jlora.explain(fn, t, 0)):
        with pytest.raises(ValueError, match=r"kernel lacks some of its arrays.*jlora\.combine"):
            use(part)


# Merging in one program.


def many(count, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    params = {f"layer_{i}": {"kernel": jnp.asarray(rng.normal(size=(64, 32)), dtype)} for i in range(count)}
    return randomised(jlora.wrap(params, LoraSpec(rank=4)))


def test_kernels_that_are_alike_are_merged_by_one_program():
    """Which checks the precision too: a tree of many kernels compiles nothing that one of few does not."""
    jax.clear_caches()
    jlora.merge(many(1))
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr(logging.Logger, "handle", lambda _, record: compiled.append(record.getMessage()))
        tree = many(5)
        compiled.clear()
        jlora.merge(tree)
    assert not [message for message in compiled if "Compiling" in message]


def test_the_merged_kernels_take_the_bases_buffers_where_they_are_given():
    tree = many(3)
    expected = jlora.merge(tree)
    places = [tree[name]["kernel"].base.unsafe_buffer_pointer() for name in tree]
    merged = jlora.merge(tree, donate=True)
    assert same_bits(merged, expected)
    assert [merged[name]["kernel"].unsafe_buffer_pointer() for name in tree] == places
    assert all(tree[name]["kernel"].base.is_deleted() for name in tree)
    assert not any(tree[name]["kernel"].lora_a.is_deleted() for name in tree)


def test_what_stands_twice_or_changes_its_type_is_not_given_away():
    tree = many(2)
    tied = tree | {
        "layer_1": {"kernel": dataclasses.replace(tree["layer_1"]["kernel"], base=tree["layer_0"]["kernel"].base)}
    }
    expected = jlora.merge(tied)
    assert same_bits(jlora.merge(tied, donate=True), expected)
    assert not tied["layer_0"]["kernel"].base.is_deleted()
    wider = jlora.merge(tree, dtype=jnp.float32, donate=True)
    assert wider["layer_1"]["kernel"].dtype == jnp.float32 and not tree["layer_1"]["kernel"].base.is_deleted()


def test_a_leaf_trained_in_full_is_itself():
    params = {"kernel": jnp.ones((4, 3)), "head": jnp.ones(3)}
    tree = jlora.wrap(params, LoraSpec(rank=2, train=("head",)))
    assert jlora.merge(tree, donate=True)["head"] is tree["head"].base
