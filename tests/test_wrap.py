"""`wrap`: which leaves it takes, in any container; their factors; what it refuses."""

import dataclasses
import re
from collections import namedtuple
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

import jlora
from jlora import Axes, LoraParam, LoraSpec, TrainableParam, wrap
from jlora.nodes.node import is_node
from jlora.targets.paths import flatten
from tests.support import error, randomised, same_bits


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


PARAMS = {
    "block": {
        "mlp": {"bias": normal(5), "kernel": normal(6, 5)},
        "norm": {"scale": normal(6)},
        "query": {"bias": normal(2, 3), "kernel": normal(6, 2, 3)},
    },
    "embed": {"embedding": normal(7, 6)},
    "lm_head": {"kernel": normal(6, 7)},
}
MLP, QUERY, EMBED, HEAD = "block/mlp/kernel", "block/query/kernel", "embed/embedding", "lm_head/kernel"
MLP_BIAS, QUERY_BIAS = "block/mlp/bias", "block/query/bias"


def spec(**settings: Any) -> LoraSpec:
    return LoraSpec(**{"rank": 2, "alpha": 2} | settings)


def nodes(tree: Any) -> dict[str, Any]:
    """The nodes of a wrapped tree, by path."""
    paths, leaves, _ = flatten(tree, is_node)
    return {path: leaf for path, leaf in zip(paths, leaves, strict=True) if is_node(leaf)}


def adapted(**settings: Any) -> set[str]:
    return {path for path, node in nodes(wrap(PARAMS, spec(**settings))).items() if isinstance(node, LoraParam)}


def trained(**settings: Any) -> set[str]:
    return {path for path, node in nodes(wrap(PARAMS, spec(**settings))).items() if isinstance(node, TrainableParam)}


def described(tree: Any) -> Any:
    """The structure of a tree with the shape and the dtype of each leaf."""
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


# -------------------------------------------------------------------------------- targets

TARGETS = {
    "all_linear": ("all-linear", {MLP, QUERY}),
    "glob": ("query", {QUERY}),
    "glob_of_a_leaf": ("mlp/kernel", {MLP}),
    "list": (["query", "mlp"], {QUERY, MLP}),
    "table": ("embed", {EMBED}),
    "regex": ("re:block/(query|mlp)/kernel", {QUERY, MLP}),
    "detected_regex": (".*/(query|mlp)", {QUERY, MLP}),
    "compiled_regex": (re.compile("BLOCK/M.*", re.IGNORECASE), {MLP}),
    "function": (lambda path, leaf: leaf.ndim == 2 and "bias" not in path, {MLP, EMBED, HEAD}),
    "tree": (jax.tree.map(lambda leaf: leaf.shape[0] == 6 and leaf.ndim == 2, PARAMS), {MLP, HEAD}),
    "prefix_tree": ({"block": False, "embed": True, "lm_head": {"kernel": True}}, {EMBED, HEAD}),
}


@pytest.mark.parametrize("targets, expected", TARGETS.values(), ids=TARGETS)
def test_targets(targets, expected):
    assert adapted(targets=targets) == expected


@pytest.mark.parametrize("name", ["lm_head", "embed_out", "logits_dense"])
def test_all_linear_leaves_out_output_layers(name):
    params = {"decoder": {name: {"kernel": normal(6, 7)}, "mlp": {"kernel": normal(6, 6)}}}
    assert set(nodes(wrap(params, spec()))) == {"decoder/mlp/kernel"}


def test_leaves_that_are_no_targets_stay_the_same_objects():
    wrapped = wrap(PARAMS, spec(targets="mlp"))
    assert wrapped["embed"]["embedding"] is PARAMS["embed"]["embedding"]
    assert wrapped["block"]["mlp"]["kernel"].base is PARAMS["block"]["mlp"]["kernel"]


def test_wrap_does_not_touch_its_input():
    before = jax.tree.map(lambda leaf: leaf, PARAMS)
    wrap(PARAMS, spec(bias="all", train="lm_head"))
    assert same_bits(PARAMS, before)


def test_exclude_takes_out_of_the_targets():
    assert adapted(exclude="query") == {MLP}
    assert adapted(targets=["block/*", "embed"], exclude=("embed", "query")) == {MLP}


def test_train_is_trained_in_full():
    assert trained(train=["lm_head", "norm/scale"]) == {HEAD, "block/norm/scale"}
    assert wrap(PARAMS, spec(train="lm_head"))["lm_head"]["kernel"].base is PARAMS["lm_head"]["kernel"]


def test_all_linear_leaves_out_what_is_trained():
    assert adapted(train="mlp") == {QUERY}
    assert trained(train="mlp") == {MLP, MLP_BIAS}


@pytest.mark.parametrize(
    "bias, expected", [("none", set()), ("all", {MLP_BIAS, QUERY_BIAS}), ("lora_only", {MLP_BIAS})]
)
def test_bias_modes(bias, expected):
    assert trained(targets="mlp", bias=bias) == expected


def test_overrides_set_rank_scale_dropout_and_dtype_of_what_they_match():
    overrides = {"query": {"rank": 1, "alpha": 4, "dropout": 0.5, "dtype": "bfloat16"}}
    found = nodes(wrap(PARAMS, spec(overrides=overrides)))
    told = {path: (n.rank, n.scale, n.dropout, n.lora_a.dtype.name) for path, n in found.items()}
    assert told == {MLP: (2, 1.0, 0.0, "float32"), QUERY: (1, 4.0, 0.5, "bfloat16")}


# -------------------------------------------------------------------------------- containers

KERNEL, BIAS, X = normal(4, 3), normal(3), normal(2, 4, seed=1)
Layer = namedtuple("Layer", "kernel bias")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    kernel: Any
    bias: Any
    name: str = dataclasses.field(default="dense", metadata={"static": True})


def of_linen():
    module = nn.Dense(3)
    return module.apply, module.init(jax.random.key(0), X), "params/kernel", {}


def of_partitioned_linen():
    module = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))
    return module.apply, module.init(jax.random.key(0), X), "params/kernel", {}


def of_nnx_state():
    graph, state = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    return (lambda state, x: nnx.merge(graph, state)(x)), state, "kernel", {}


def of_nnx_pure_dict():
    graph, state = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    return (lambda params, x: nnx.merge(graph, params)(x)), nnx.to_pure_dict(state), "kernel", {}


def of_equinox():
    model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
    return (lambda model, x: jax.vmap(model)(x)), model, "weight", {"axes": {"weight": Axes(1, 0)}}


def of_haiku():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(3)(x)))
    return model.apply, model.init(jax.random.key(0), X), "linear/w", {}


CONTAINERS = {
    "dict": lambda: (lambda p, x: x @ p["kernel"] + p["bias"], {"kernel": KERNEL, "bias": BIAS}, "kernel", {}),
    "list": lambda: (lambda p, x: x @ p[0] + p[1], [KERNEL, BIAS], "0", {"targets": "0"}),
    "tuple": lambda: (lambda p, x: x @ p[0] + p[1], (KERNEL, BIAS), "0", {"targets": "0"}),
    "namedtuple": lambda: (lambda p, x: x @ p.kernel + p.bias, Layer(KERNEL, BIAS), "kernel", {}),
    "dataclass": lambda: (lambda p, x: x @ p.kernel + p.bias, Dense(KERNEL, BIAS), "kernel", {}),
    "frozen_dict": lambda: (lambda p, x: x @ p["kernel"], FrozenDict(kernel=KERNEL, bias=BIAS), "kernel", {}),
    "linen": of_linen,
    "partitioned_linen": of_partitioned_linen,
    "nnx_state": of_nnx_state,
    "nnx_pure_dict": of_nnx_pure_dict,
    "equinox": of_equinox,
    "haiku": of_haiku,
}


@pytest.mark.parametrize("build", CONTAINERS.values(), ids=CONTAINERS)
def test_containers(build):
    fn, params, path, settings = build()
    wrapped = wrap(params, spec(**settings))
    assert type(wrapped) is type(params)
    assert list(nodes(wrapped)) == [path]
    assert same_bits(jlora.unwrap(wrapped), params)
    assert same_bits(jlora.apply(fn)(wrapped, X), fn(params, X))


def test_leaves_that_are_no_kernels_pass_through():
    params = {"kernel": KERNEL, "step": 3, "key": jax.random.key(1), "count": jnp.uint32(0), "none": None, "name": "a"}
    wrapped = wrap(params, spec())
    assert all(wrapped[name] is leaf for name, leaf in params.items() if name != "kernel")


def test_an_nnx_state_with_random_keys():
    rngs = nnx.Rngs(0)
    state = nnx.state(nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)))
    assert list(nodes(wrap(state, spec()))) == ["layers/0/kernel"]


# -------------------------------------------------------------------------------- factors


def test_kaiming_is_uniform_in_one_over_sqrt_in():
    lora_a = np.asarray(wrap({"kernel": jnp.ones((64, 512))}, LoraSpec(rank=64))["kernel"].lora_a)
    assert 0.99 / 8 < np.abs(lora_a).max() <= 1 / 8
    np.testing.assert_allclose(lora_a.std(), 1 / 8 / np.sqrt(3), rtol=0.03)


def test_gaussian_has_a_standard_deviation_of_one_over_rank():
    lora_a = np.asarray(wrap({"kernel": jnp.ones((512, 64))}, LoraSpec(rank=16, init="gaussian"))["kernel"].lora_a)
    np.testing.assert_allclose(lora_a.std(), 1 / 16, rtol=0.05)
    assert abs(lora_a.mean()) < 0.003


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_lora_b_of_a_kernel_starts_at_zero(init):
    assert not np.any(wrap({"kernel": jnp.ones((6, 5))}, spec(init=init))["kernel"].lora_b)


def test_a_table_starts_with_a_zero_and_b_standard_normal():
    node = wrap({"embedding": jnp.ones((20, 2048))}, LoraSpec(rank=8, targets="embedding"))["embedding"]
    assert not np.any(node.lora_a)
    np.testing.assert_allclose([np.mean(node.lora_b), np.std(node.lora_b)], [0, 1], atol=0.03)


def test_an_init_of_the_users_own():
    init = lambda key, ins, outs, rank, dtype: (jnp.full((*ins, rank), 2, dtype), jnp.full((rank, *outs), 3, dtype))
    node = wrap({"query": {"kernel": jnp.ones((6, 2, 3))}}, spec(init=init, dtype="bfloat16"))["query"]["kernel"]
    assert np.all(node.lora_a == 2) and np.all(node.lora_b == 3)
    assert described((node.lora_a, node.lora_b))[1] == [((6, 2), jnp.bfloat16), ((2, 2, 3), jnp.bfloat16)]


def test_an_init_of_wrong_shapes_is_refused():
    init = lambda key, ins, outs, rank, dtype: (jnp.zeros((*outs, rank), dtype), jnp.zeros((rank, *ins), dtype))
    with pytest.raises(ValueError, match="init"):
        wrap({"kernel": jnp.ones((6, 5))}, spec(init=init))


@pytest.mark.parametrize("base", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_factors_are_float32_beside_any_base(base):
    node = wrap({"kernel": jnp.ones((6, 5), base)}, spec())["kernel"]
    assert (node.lora_a.dtype, node.lora_b.dtype, node.base.dtype) == (jnp.float32, jnp.float32, base)


@pytest.mark.parametrize("axis, shape", [(0, (3, 6, 5)), (1, (6, 3, 5)), (2, (6, 5, 3))])
def test_the_stacked_axis_of_factors_stands_first(axis, shape):
    ins, outs = (i for i in range(3) if i != axis)
    plan = wrap({"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}, spec(axes={"kernel": Axes(ins, outs, axis)}))
    assert (plan["kernel"].lora_a.shape, plan["kernel"].lora_b.shape) == ((3, 6, 2), (3, 2, 5))


def test_two_stacked_axes_stand_first():
    plan = wrap({"kernel": jax.ShapeDtypeStruct((2, 6, 3, 5), jnp.float32)}, spec(axes={"kernel": Axes(1, 3, (0, 2))}))
    assert (plan["kernel"].lora_a.shape, plan["kernel"].lora_b.shape) == ((2, 3, 6, 2), (2, 3, 2, 5))


def test_stacked_kernels_have_factors_of_their_own_with_the_statistics_of_one():
    lora_a = wrap({"kernel": jnp.ones((3, 16, 64))}, LoraSpec(rank=16, axes={"kernel": Axes(1, 2, 0)}))["kernel"].lora_a
    assert all(len(np.unique(column)) > 1 for column in np.asarray(lora_a).reshape(3, -1).T)
    assert 0.95 / 4 < np.abs(lora_a).max() <= 1 / 4


# -------------------------------------------------------------------------------- keys


def test_wrap_is_deterministic():
    assert same_bits(wrap(PARAMS, spec()), wrap(PARAMS, spec()))


def test_a_seed_is_the_key_made_of_it():
    assert same_bits(wrap(PARAMS, spec(seed=3)), wrap(PARAMS, spec(), key=jax.random.key(3)))


def test_a_key_goes_before_the_seed():
    assert same_bits(wrap(PARAMS, spec(seed=3), key=jax.random.key(1)), wrap(PARAMS, spec(seed=1)))


def test_seeds_differ():
    assert np.all(wrap(KERNELS, spec(seed=1))["a"]["kernel"].lora_a != wrap(KERNELS, spec())["a"]["kernel"].lora_a)


KERNELS = {"a": {"kernel": jnp.ones((6, 5))}, "b": {"kernel": jnp.ones((6, 5))}}


def test_kernels_of_one_shape_differ():
    wrapped = wrap(KERNELS, spec())
    assert np.all(wrapped["a"]["kernel"].lora_a != wrapped["b"]["kernel"].lora_a)


def test_another_layer_changes_no_other_factor():
    more = {"0": {"kernel": jnp.ones((3, 9))}, **KERNELS, "aa": {"kernel": jnp.ones((6, 5))}}
    assert same_bits({name: wrap(more, spec())[name] for name in KERNELS}, wrap(KERNELS, spec()))


def test_the_container_does_not_change_the_factors():
    assert same_bits(wrap(FrozenDict(KERNELS), spec()).unfreeze(), wrap(KERNELS, spec()))


# -------------------------------------------------------------------------------- pure and abstract

FULL = spec(bias="all", train="lm_head", overrides={"query": {"rank": 1, "dtype": "bfloat16"}})


def test_wrap_under_jit():
    wrapped = jax.jit(lambda params: wrap(params, FULL))(PARAMS)
    assert described(wrapped) == described(wrap(PARAMS, FULL))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), *map(as_f32, (wrapped, wrap(PARAMS, FULL)))
    )


def as_f32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


def test_wrap_under_eval_shape():
    assert described(jax.eval_shape(lambda params: wrap(params, FULL), PARAMS)) == described(wrap(PARAMS, FULL))


def test_wrap_of_shapes():
    plan = wrap(jax.eval_shape(lambda: PARAMS), FULL)
    assert described(plan) == described(wrap(PARAMS, FULL))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(plan))


def test_a_tree_larger_than_any_memory_is_planned():
    shapes = {f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((65536, 65536), jnp.bfloat16)} for i in range(80)}
    plan = wrap(shapes, LoraSpec(rank=16))
    assert plan["layer_79"]["kernel"].lora_b == jax.ShapeDtypeStruct((16, 65536), jnp.float32)


def test_wrap_takes_numpy_arrays():
    node = wrap({"kernel": np.ones((6, 5), np.float32)}, spec())["kernel"]
    assert isinstance(node.base, np.ndarray) and node.lora_a.shape == (6, 2)


# -------------------------------------------------------------------------------- errors

ERRORS = {
    "misspelt_target": ({"targets": "qurey"}, ["'qurey' in targets matches no leaf", "Nearest: block/query"]),
    "misspelt_in_a_list": ({"targets": ["mlp", "qurey"]}, ["'qurey' in targets", "block/query"]),
    "misspelt_regex": ({"targets": "re:.*/qurey"}, ["re:.*/qurey", "Nearest"]),
    "misspelt_exclude": ({"exclude": "mpl"}, ["'mpl' in exclude matches no leaf", "block/mlp"]),
    "misspelt_train": ({"train": "lmhead"}, ["'lmhead' in train matches no leaf", "lm_head"]),
    "misspelt_override": ({"overrides": {"mpl": {"rank": 1}}}, ["'mpl' in overrides", "block/mlp"]),
    "misspelt_axes": ({"axes": {"mpl": Axes(0, 1)}}, ["'mpl' in axes", "block/mlp"]),
    "override_of_no_target": ({"overrides": {"embed": {"rank": 1}}}, ["'embed' in overrides"]),
    "target_of_a_bias": ({"targets": "mlp/bias"}, ["'mlp/bias'", MLP_BIAS, "no", "train="]),
    "target_of_a_norm": ({"targets": "norm"}, ["'norm'", "block/norm/scale", "train="]),
    "target_and_train": ({"targets": "mlp", "train": "mlp/kernel"}, [MLP, "targets", "train"]),
    "all_excluded": ({"exclude": ["mlp", "query"]}, ["no leaf is a kernel of", "('mlp', 'query')"]),
    "function_of_nothing": ({"targets": lambda path, leaf: False}, ["no leaf is a kernel of", "block/"]),
    "no_such_bias": ({"targets": "embed", "bias": "lora_only"}, ["bias='lora_only'", "no such bias"]),
    "rank_too_large": ({"rank": 6}, ["rank 6", MLP, "(6, 5)", "at most 5", "overrides="]),
    "axes_too_many": ({"axes": {"mlp/kernel": Axes(0, (1, 2))}}, [MLP, "(6, 5)", "does not fit", "2 axes"]),
    "axes_too_few": ({"axes": {"mlp/kernel": Axes(0, ())}}, [MLP, "does not fit", "out_axis"]),
    "axes_twice": ({"axes": {"mlp/kernel": Axes(0, (0, 1))}}, [MLP, "does not fit"]),
    "axes_negative": ({"axes": {"mlp/kernel": Axes(0, -1)}}, [MLP, "does not fit"]),
    "tree_of_another_structure": ({"targets": {"blok": True}}, ["targets", "structure", "blok"]),
}


@pytest.mark.parametrize("settings, parts", ERRORS.values(), ids=ERRORS)
def test_errors(settings, parts):
    with pytest.raises(ValueError, match=r"^(wrap|LoraSpec): ") as error:
        wrap(PARAMS, spec(**settings))
    assert [part for part in parts if part not in str(error.value)] == []


def test_errors_come_under_eval_shape_too():
    with pytest.raises(ValueError, match="at most 5"):
        jax.eval_shape(lambda params: wrap(params, spec(rank=6)), PARAMS)


@pytest.mark.parametrize("dtype", [jnp.int8, bool, jnp.complex64])
def test_a_kernel_that_is_no_float_is_refused(dtype):
    with pytest.raises(ValueError, match=f"kernel has dtype {jnp.dtype(dtype).name}"):
        wrap({"kernel": jnp.ones((6, 5), dtype)}, spec())


@pytest.mark.parametrize("leaf", [jnp.int32(3), "text"])
def test_training_in_full_takes_floats_only(leaf):
    with pytest.raises(ValueError, match="train"):
        wrap({"kernel": KERNEL, "step": leaf}, spec(train="step"))


def test_a_tree_is_wrapped_once():
    with pytest.raises(TypeError, match=f"{MLP} is wrapped already"):
        wrap(wrap(PARAMS, spec(targets="mlp")), spec(targets="query"))


@pytest.mark.parametrize("wrong", [{"rank": 2}, LoraSpec, None])
def test_the_spec_is_a_lora_spec(wrong):
    with pytest.raises(TypeError, match=rf"must be a jlora.LoraSpec, found {type(wrong).__name__}"):
        wrap(PARAMS, wrong)


@pytest.mark.parametrize("empty", [{}, [], None])
def test_an_empty_tree_has_nothing_to_adapt(empty):
    with pytest.raises(ValueError, match="no leaf is a kernel of targets"):
        wrap(empty, spec())


def test_sites_of_another_tree_are_refused():
    found = jlora.sites(lambda p, x: x @ p["other"], {"other": jnp.ones((4, 4))}, X)
    with pytest.raises(ValueError, match="sites are of another tree: they have paths such as other"):
        wrap(PARAMS, spec(), sites=found)


def test_a_target_that_the_function_does_not_use_is_refused():
    params = {"used": {"kernel": KERNEL}, "unused": {"kernel": KERNEL}}
    found = jlora.sites(lambda p, x: x @ p["used"]["kernel"], params, X)
    with pytest.raises(ValueError, match=r"unused/kernel.*the function does not use it"):
        wrap(params, spec(targets=["used", "unused"]), sites=found)


def test_an_override_of_no_target_says_so():
    with pytest.raises(ValueError, match="overrides") as error:
        wrap(PARAMS, spec(overrides={"embed": {"rank": 1}}))
    assert "matches no leaf" not in str(error.value)


def test_a_kernel_without_elements_is_told_no_rank():
    with pytest.raises(ValueError, match="kernel") as error:
        wrap({"kernel": jnp.ones((0, 4))}, spec())
    assert "'rank': 0" not in str(error.value)


def test_a_function_that_targets_a_vector_is_told_that_it_is_no_kernel():
    with pytest.raises(ValueError, match=MLP_BIAS) as error:
        wrap(PARAMS, spec(targets=lambda path, leaf: path == MLP_BIAS))
    assert "ambiguous" not in str(error.value)


def test_a_target_of_vectors_alone_lists_them_in_order():
    params = {name: {"scale": jnp.ones(4)} for name in "gbfadce"} | {"w": {"kernel": jnp.ones((4, 4))}}
    with pytest.raises(
        ValueError, match=r"matches a/scale, b/scale, c/scale, d/scale, e/scale and 2 more, none of which"
    ):
        wrap(params, LoraSpec(targets="scale"))


# -------------------------------------------------------------------------------- one reading, or none


@pytest.mark.parametrize(
    "tree, told",
    [
        ({"a": {"b/kernel": 0}, "a/b": {"kernel": 1}}, r"\['a'\]\['b/kernel'\] and \['a/b'\]\['kernel'\]"),
        ({"a/kernel": 0, "a": {"kernel": 1}}, r"\['a'\]\['kernel'\] and \['a/kernel'\]"),
        ({"0": {"kernel": 0}, "x": [], "0/kernel": 1}, r"\['0'\]\['kernel'\] and \['0/kernel'\]"),
    ],
)
def test_two_leaves_of_one_path_are_refused(tree, told):
    tree = jax.tree.map(lambda _: jnp.ones((4, 4)), tree)
    with pytest.raises(ValueError, match=f"wrap: {told} have the same path"):
        jlora.wrap(tree, jlora.LoraSpec(rank=2))
    with pytest.raises(ValueError, match=f"quantize: {told} have the same path"):
        jlora.quant.quantize(tree, "int8")
    with pytest.raises(ValueError, match=f"sites: {told} have the same path"):
        jlora.sites(lambda p: 0, tree)


SQUARES = {"w0": jnp.ones((4, 4)), "w1": jnp.ones((4, 4)), "bias": jnp.ones(4)}


def passed_through_tanh(p, x):
    return x @ p["w0"] @ jnp.tanh(p["w1"]) + p["bias"]


@pytest.mark.parametrize("targets", [["w*"], ["w1"], [re.compile("w[01]")], lambda path, leaf: leaf.ndim == 2])
def test_a_target_that_is_used_otherwise_is_told_its_use(targets):
    sites = jlora.sites(passed_through_tanh, SQUARES, jnp.ones((3, 4)))
    line = passed_through_tanh.__code__.co_firstlineno + 1
    with pytest.raises(ValueError, match=rf"w1 of shape \(4, 4\) is a target.*other \(tanh\).*test_wrap.py:{line} "):
        jlora.wrap(SQUARES, jlora.LoraSpec(targets=targets, rank=2), sites=sites)


def test_a_target_that_is_used_otherwise_is_adapted_by_its_axes_or_excluded():
    sites = jlora.sites(passed_through_tanh, SQUARES, jnp.ones((3, 4)))
    given = {"w1": jlora.Axes((0,), (1,))}
    both = jlora.wrap(SQUARES, jlora.LoraSpec(targets=["w*"], rank=2, axes=given), sites=sites)
    one = jlora.wrap(SQUARES, jlora.LoraSpec(targets=["w*"], rank=2, exclude=["w1"]), sites=sites)
    assert [name for name in SQUARES if isinstance(both[name], jlora.LoraParam)] == ["w0", "w1"]
    assert [name for name in SQUARES if isinstance(one[name], jlora.LoraParam)] == ["w0"]
    filled, x = randomised(both), jnp.ones((3, 4))
    found = jlora.apply(passed_through_tanh, fallback="ignore")(filled, x)
    assert error(found, passed_through_tanh(jlora.merge(filled), x)) <= 2e-5


STACK = {"up": {"kernel": jnp.ones((4, 8, 8)), "bias": jnp.ones((4, 8))}, "head": {"bias": jnp.ones(4)}}


@pytest.mark.parametrize(
    "settings", [{"bias": "lora_only"}, {"lora_bias": True}, {"train": ["up/bias"]}], ids=lambda s: next(iter(s))
)
def test_a_bias_of_all_layers_does_not_train_beside_a_kernel_of_some(settings):
    axes = {"up/kernel": jlora.Axes((1,), (2,), (0,))}
    spec = jlora.LoraSpec(targets=["up"], rank=2, axes=axes, layers=[1, 3], **settings)
    with pytest.raises(ValueError, match=r"layers=\[1, 3\] adapts these of up/kernel, but up/bias beside it stacks 4"):
        jlora.wrap(STACK, spec)
    every = jlora.wrap(STACK, dataclasses.replace(spec, layers=[0, 1, 2, 3]))
    assert jlora.partition(every)[0]["up"]["bias"] is not None
    # What is named and stands beside no such kernel trains as it is.
    head = jlora.wrap(STACK, dataclasses.replace(spec, bias="none", lora_bias=False, train=["head"]))
    assert isinstance(head["head"]["bias"], jlora.TrainableParam)
