"""`apply`: arguments and results pass as they are, JAX's transforms compose with it, what is frozen stays so."""

import collections
import dataclasses
import functools
import re
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export, lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from tests.support import equations, error, evaluated, randomised, same_bits

RNG = np.random.default_rng(0)
SPEC = jlora.LoraSpec(targets=lambda path, leaf: leaf.ndim == 2, rank=2)


def noise(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


X = noise(5, 6)
PLAIN = {"w": noise(6, 4), "v": noise(4, 6), "b": noise(4)}
WRAPPED = randomised(jlora.wrap(PLAIN, SPEC))
MERGED = jlora.merge(WRAPPED)


def mlp(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def assert_close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert error(found, expected) <= tolerance


# -------------------------------------------------------------------------------- arguments and results


def test_static_arguments_decide_the_control_flow():
    def fn(p, x, train, activation, depth):
        for _ in range(depth):
            x = getattr(jnp, activation)(x @ p["w"]) @ p["v"]
        return -x if train else x

    for arguments in ((True, "tanh", 2), (False, "sin", 1)):
        assert_close(jlora.apply(fn)(WRAPPED, X, *arguments), fn(MERGED, X, *arguments))


def test_every_argument_may_be_given_by_keyword():
    assert_close(jlora.apply(mlp)(x=X, p=WRAPPED), mlp(MERGED, X))


def test_python_and_numpy_arguments_stay_what_they_are():
    def fn(p, x, n, flag, items, nothing):
        assert type(x) is np.ndarray and type(n) is int and flag is True and items == ["a", 1.5] and nothing is None
        return x @ p["w"]

    x = np.asarray(X)
    assert_close(jlora.apply(fn)(WRAPPED, x, 3, flag=True, items=["a", 1.5], nothing=None), x @ MERGED["w"])


def test_leaves_that_are_no_arrays_stay_in_the_tree():
    tree = WRAPPED | {"act": jnp.tanh, "name": "mlp", "depth": 2}

    def fn(p, x):
        assert p["name"] == "mlp" and type(p["depth"]) is int
        return p["act"](x @ p["w"]) * p["depth"]

    assert_close(jlora.apply(fn)(tree, X), 2 * jnp.tanh(X @ MERGED["w"]))


def test_results_that_are_no_arrays_pass_unchanged():
    host = np.arange(3)

    def fn(p, x):
        return None, {"loss": jnp.sum(x @ p["w"]), "name": "step", "count": 7, "nothing": None, "host": host}

    nothing, aux = jlora.apply(fn)(WRAPPED, X)
    assert nothing is None and aux["nothing"] is None
    assert (aux["name"], aux["count"]) == ("step", 7) and type(aux["count"]) is int
    assert aux["host"] is host
    assert_close(aux["loss"], jnp.sum(X @ MERGED["w"]))


def test_integer_and_boolean_results():
    fn = lambda p, x: ((x @ p["w"]).argmax(-1), x @ p["w"] > 0)
    found, expected = jlora.apply(fn)(WRAPPED, X), fn(MERGED, X)
    assert [y.dtype for y in found] == [jnp.int32, jnp.bool_]
    assert same_bits(found, expected)


def test_arguments_and_plain_leaves_may_be_returned():
    fn = lambda p, x, n: (x, p["b"], n)
    assert same_bits(jlora.apply(fn)(WRAPPED, X, jnp.arange(3)), (X, PLAIN["b"], jnp.arange(3)))


def test_constants_may_be_returned():
    fn = lambda p: {"weak": jnp.asarray(2.0), "strong": jnp.float32(3), "vector": jnp.arange(3)}
    found = jlora.apply(fn)(WRAPPED)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(found))
    assert same_bits(found, fn(PLAIN))


def test_a_returned_tree_is_merged():
    with pytest.warns(jlora.DenseFallbackWarning, match=r"w of shape \(6, 4\).*the function returns it"):
        returned = jlora.apply(lambda p: {"w": p["w"], "b": p["b"]})(WRAPPED)
    assert_close(returned, {"w": MERGED["w"], "b": MERGED["b"]})


def test_dicts_keep_the_order_of_their_keys():
    """Of those that come in, and of those that are returned: JAX would sort them."""

    def fn(p, batch):
        y = jnp.zeros((5, 4))
        for x in batch.values():
            y = jnp.tanh(y + x @ p["w"])
        return {"z": y, "a": [{"q": y, "b": 2, "c": {}}], "m": None}

    batch = {"z": X, "a": 2 * X}
    found, expected = jlora.apply(fn)(WRAPPED, batch), fn(MERGED, batch)
    assert_close(found, expected)
    assert list(found) == ["z", "a", "m"] and list(found["a"][0]) == ["q", "b", "c"]
    default = lambda p, x: collections.defaultdict(list, {"z": x @ p["w"], "a": 1})
    found = jlora.apply(default)(WRAPPED, X)
    assert list(found) == ["z", "a"] and found["new"] == []


def test_several_wrapped_trees_in_one_call():
    other = randomised(jlora.wrap({"w": noise(4, 3)}, SPEC))
    fn = lambda p, x, q: (x @ p["w"]) @ q["w"]
    assert_close(jlora.apply(fn)(WRAPPED, X, q=other), X @ MERGED["w"] @ jlora.merge(other)["w"])


def test_one_node_in_two_places_of_a_tree():
    tied = {"first": WRAPPED["w"], "second": WRAPPED["w"]}
    fn = lambda p, x: x @ p["first"] - jnp.tanh(x) @ p["second"]
    assert_close(jlora.apply(fn)(tied, X), fn(jlora.merge(tied), X))


def test_a_call_without_nodes_is_the_plain_call():
    assert same_bits(jlora.apply(mlp)(PLAIN, X), mlp(PLAIN, X))


def test_functions_that_are_objects():
    for fn in (functools.partial(mlp, x=X), jax.jit(lambda p: mlp(p, X)), _Callable()):
        assert_close(jlora.apply(fn)(WRAPPED), mlp(MERGED, X))


class _Callable:
    def __call__(self, p):
        return mlp(p, X)


def test_the_function_keeps_its_name():
    assert jlora.apply(mlp).__name__ == "mlp"


def branching(p, x):
    return x if jnp.sum(x @ p["w"]) > 0 else -x


WITH_VALUES = {
    "branch": branching,
    "numpy": lambda p, x: np.asarray(x @ p["w"]),
    "float": lambda p, x: float(jnp.sum(p["w"])),
    "index": lambda p, x: [x][p["w"].argmax()],
}


@pytest.mark.parametrize("fn", WITH_VALUES.values(), ids=WITH_VALUES)
@pytest.mark.parametrize("run", ["apply", "jit", "sites", "explain"])
def test_values_that_a_trace_has_not_are_asked_for_by_the_users_function(run, fn):
    """The error is JAX's: it names the function, its line and the leaf, and what to do."""
    calls = {
        "apply": lambda: jlora.apply(fn)(WRAPPED, X),
        "jit": lambda: jax.jit(jlora.apply(fn))(WRAPPED, X),
        "sites": lambda: jlora.sites(fn, PLAIN, X),
        "explain": lambda: jlora.explain(fn, WRAPPED, X),
    }
    with pytest.raises(jax.errors.JAXTypeError) as caught:
        calls[run]()
    message = str(caught.value)
    assert f"the function {fn.__name__} at {__file__}:{fn.__code__.co_firstlineno}" in message
    assert "argument params['w']" in message and "jlora" not in message.replace(__file__, "")
    assert any("jax.lax.cond" in note for note in caught.value.__notes__)


def test_a_plan_has_no_values_to_compute_with():
    plan = jax.eval_shape(lambda: WRAPPED)
    with pytest.raises(ValueError, match=r"apply: v is a plan, without values; jax.eval_shape\(jlora.apply\(fn\)"):
        jlora.apply(mlp)(plan, X)
    assert jax.eval_shape(jlora.apply(mlp), plan, X).shape == (5, 6)


KEYS = {
    "split": (jax.random.split(jax.random.key(0)), "found 2 of them; jax.vmap takes several"),
    "split, of old style": (jax.random.split(jax.random.PRNGKey(0), (2, 3)), "found 6 of them"),
    "none at all": (jax.random.split(jax.random.key(0), 0), "found 0 of them"),
    "of another width": (np.zeros(3, np.uint32), r"found uint32 of shape \(3,\)"),
    "a number": (np.uint32(0), r"found uint32 of shape \(\)"),
    "a seed": (0, "found 0"),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_key_is_one_key(name):
    key, told = KEYS[name]
    with pytest.raises(TypeError, match=f"apply: rng must be .*{told}"):
        jlora.apply(mlp, rng=key)
    with pytest.raises(TypeError, match=f"wrap: key must be .*{told}"):
        jlora.wrap(PLAIN, SPEC, key=key)


def test_an_exception_of_the_function_comes_through():
    def fn(p):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        jlora.apply(fn)(WRAPPED)


def test_the_function_is_called_once():
    calls = []
    jlora.apply(lambda p: calls.append(X @ p["w"]))(WRAPPED)
    assert len(calls) == 1


def test_apply_inside_apply():
    fn = lambda p, x: jlora.apply(mlp)(p, x)
    assert_close(jlora.apply(fn)(WRAPPED, X), mlp(MERGED, X))


def test_updated_collections_of_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))

    net = Net()
    variables = net.init(jax.random.key(0), X)
    wrapped = variables | {"params": randomised(jlora.wrap(variables["params"], SPEC))}
    merged = variables | {"params": jlora.merge(wrapped["params"])}
    found, updates = jlora.apply(net.apply)(wrapped, X, mutable=["batch_stats"])
    expected, expected_updates = net.apply(merged, X, mutable=["batch_stats"])
    assert_close(found, expected, 1e-4)
    assert_close(updates, expected_updates)
    assert error(updates["batch_stats"], variables["batch_stats"]) > 1e-2


def test_intermediates_that_linen_sows():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "hidden", y := nn.Dense(3)(x))
            return y.sum()

    params = randomised(jlora.wrap(Net().init(jax.random.key(0), X)["params"], SPEC))
    _, state = jlora.apply(Net().apply)({"params": params}, X, mutable="intermediates")
    kernel = jlora.merge(params)["Dense_0"]["kernel"]
    assert_close(state["intermediates"]["hidden"], (X @ kernel,))


def test_base_of_numpy():
    wrapped = jlora.wrap(jax.tree.map(np.asarray, PLAIN), SPEC)
    assert_close(jlora.apply(mlp)(wrapped, X), mlp(PLAIN, X))


def test_activations_keep_their_type():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PLAIN)
    wrapped = randomised(jlora.wrap(half, SPEC))
    x = X.astype(jnp.bfloat16)
    assert jlora.apply(mlp)(wrapped, x).dtype == jnp.bfloat16
    dots = re.findall(r":(\w+)\[[\d,]*\] = dot_general", str(jax.make_jaxpr(jlora.apply(mlp))(wrapped, x)))
    assert len(dots) == 6 and set(dots) == {"bf16"}


def test_double_precision():
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: x.astype(jnp.float64), (WRAPPED, X))
        found = jlora.apply(mlp)(*double)
        assert found.dtype == jnp.float64
        assert_close(found, mlp(jlora.merge(double[0]), double[1]), 1e-13)


# -------------------------------------------------------------------------------- transforms from outside

model = jlora.apply(mlp)


def loss_of(fn):
    return lambda p, x: jnp.sum(jnp.sin(fn(p, x)))


def test_jit():
    assert_close(jax.jit(model)(WRAPPED, X), mlp(MERGED, X))


def test_eval_shape():
    shapes = jax.eval_shape(lambda tree: tree, WRAPPED)
    assert jax.eval_shape(model, shapes, X).shape == (5, 6)


def test_vmap_over_inputs():
    xs = noise(3, 5, 6)
    assert_close(evaluated(jax.vmap(model, (None, 0)), WRAPPED, xs), mlp(MERGED, xs))


def test_vmap_over_stacked_adapters():
    """Three adapters over one base: only the factors have the mapped axis."""
    several = [randomised(WRAPPED, std) for std in (0.1, 0.2, 0.4)]
    trainable, frozen = jlora.partition(WRAPPED)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(jlora.partition(tree)[0] for tree in several))
    together = jlora.combine(stacked, frozen)
    in_axes = jlora.combine(jax.tree.map(lambda _: 0, trainable), jax.tree.map(lambda _: None, frozen))
    one_by_one = lambda: jnp.stack([mlp(jlora.merge(tree), X) for tree in several])
    assert_close(*evaluated(lambda: (jax.vmap(model, (in_axes, None))(together, X), one_by_one())))


def test_grad():
    theirs = lambda p, x: loss_of(mlp)(jlora.merge(p), x)
    assert_close(*evaluated(lambda p: [jlora.grad(loss)(p, X) for loss in (loss_of(model), theirs)], WRAPPED))


def test_jvp():
    tangents = jax.tree.map(jnp.ones_like, jlora.partition(WRAPPED)[0])
    frozen = jlora.partition(WRAPPED)[1]
    run = lambda fn: jax.jvp(lambda t: fn(jlora.combine(t, frozen)), (jlora.partition(WRAPPED)[0],), (tangents,))
    assert_close(*evaluated(lambda: (run(lambda p: model(p, X)), run(lambda p: mlp(jlora.merge(p), X)))))


def test_hessian():
    """Second order, forward over reverse and reverse over reverse."""
    frozen = {"w": WRAPPED["w"], "v": PLAIN["v"], "b": PLAIN["b"]}
    at = lambda fn: lambda b: loss_of(fn)(frozen | {"w": dataclasses.replace(WRAPPED["w"], lora_b=b)}, X)
    ours, theirs = at(model), at(lambda p, x: mlp(jlora.merge(p), x))
    b = WRAPPED["w"].lora_b
    orders = lambda b: (jax.hessian(theirs)(b), jax.hessian(ours)(b), jax.jacrev(jax.grad(ours))(b))
    expected, forward_over_reverse, reverse_over_reverse = evaluated(orders, b)
    assert_close(forward_over_reverse, expected, 1e-4)
    assert_close(reverse_over_reverse, expected, 1e-4)


def test_jit_of_grad_of_vmap():
    xs = noise(3, 5, 6)
    ours = lambda p: jnp.sum(jax.vmap(loss_of(model), (None, 0))(p, xs))
    theirs = lambda p: loss_of(mlp)(jlora.merge(p), xs)
    assert_close(*evaluated(lambda p: (jax.jit(jlora.grad(ours))(p), jlora.grad(theirs)(p)), WRAPPED))


def test_per_example_gradients():
    gradient = jlora.grad(loss_of(model))
    found, whole = evaluated(lambda p: (jax.vmap(gradient, (None, 0))(p, X), gradient(p, X)), WRAPPED)
    assert found["w"].lora_a.shape == (5, 6, 2)
    assert_close(jax.tree.map(lambda g: g.sum(0), found), whole, 1e-4)


def test_map_from_outside():
    assert_close(lax.map(lambda row: model(WRAPPED, row), X), mlp(MERGED, X))


def test_wrapped_tree_in_the_carry_of_an_outer_scan():
    step = lambda carry, x: ((jax.tree.map(lambda leaf: 0.9 * leaf, carry)), model(carry, x))
    plain = lambda carry, x: ((jax.tree.map(lambda leaf: 0.9 * leaf, carry)), mlp(jlora.merge(carry), x))
    xs = noise(3, 5, 6)
    assert_close(lax.scan(step, WRAPPED, xs)[1], lax.scan(plain, WRAPPED, xs)[1])


def test_checkpoint_from_outside():
    found = jlora.grad(loss_of(jax.checkpoint(model)))(WRAPPED, X)
    assert_close(found, jlora.grad(loss_of(model))(WRAPPED, X))


def test_values_of_outer_transforms_may_be_closed_over():
    slope = jax.grad(lambda t: jnp.sum(jlora.apply(lambda p: jnp.sin(t * (X @ p["w"])))(WRAPPED)))(0.5)
    y = X @ MERGED["w"]
    assert_close(slope, jnp.sum(y * jnp.cos(0.5 * y)))


def test_a_second_call_traces_nothing():
    traces = []

    @jax.jit
    def step(p, x):
        traces.append(x.shape)
        return model(p, x)

    step(WRAPPED, X)
    step(jax.tree.map(lambda leaf: 2 * leaf, WRAPPED), 3 * X)
    assert len(traces) == 1


def test_no_tracer_leaks():
    with jax.checking_leaks():
        jlora.apply(mlp)(WRAPPED, X)


def test_disable_jit():
    step = lambda p, x: lax.scan(lambda x, _: (mlp(p, x), None), x, length=2)[0]
    with jax.disable_jit():
        assert_close(jlora.apply(step)(WRAPPED, X), step(MERGED, X))


def test_references_that_the_function_writes():
    ref = jax.new_ref(jnp.zeros((5, 6)))

    def fn(p, x, ref):
        ref[...] = mlp(p, x)
        return ref[...] * 2

    assert_close(jlora.apply(fn)(WRAPPED, X, ref), 2 * mlp(MERGED, X))
    assert_close(ref[...], mlp(MERGED, X))


def test_export():
    exported = export.export(jax.jit(lambda x: model(WRAPPED, x)))
    batch = export.symbolic_shape("batch, 6")
    assert_close(exported(jax.ShapeDtypeStruct(batch, jnp.float32)).call(X), mlp(MERGED, X))


def test_donated_buffers_are_used():
    """A donated tree is updated in place; a buffer that can't be reused would be warned of."""
    tree = jax.tree.map(jnp.copy, WRAPPED)

    def step(p, x):
        return jax.tree.map(lambda leaf: leaf + jnp.sum(model(p, x)), p)

    expected = step(WRAPPED, X)
    found = jax.jit(step, donate_argnums=0)(tree, X)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(tree))
    assert_close(found, expected)


def test_equinox_filters():
    """Functions among the leaves, as an Equinox module has them, and Equinox's own transforms around it."""
    net = eqx.nn.MLP(6, 3, 8, 1, key=jax.random.key(0))
    spec = jlora.LoraSpec(targets="weight", rank=2, axes={"weight": jlora.Axes((1,), (0,))})
    wrapped = jlora.wrap(net, spec)
    call = lambda net, x: jax.vmap(net)(x)
    assert_close(eqx.filter_jit(jlora.apply(call))(wrapped, X), call(net, X))


def on_two_devices(fn):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(fn, mesh=mesh, in_specs=(whole, rows), out_specs=rows)


def test_shard_map_of_the_model():
    fn = lambda p, x: on_two_devices(mlp)(p, x)
    x = noise(4, 6)
    assert_close(jlora.apply(fn, fallback="error")(WRAPPED, x), mlp(MERGED, x))


def test_shard_map_of_activations():
    fn = lambda p, x: on_two_devices(lambda b, x: jnp.tanh(x))(p["b"], x) @ p["w"]
    x = noise(4, 6)
    assert_close(jlora.apply(fn)(WRAPPED, x), jnp.tanh(x) @ MERGED["w"])


def test_explicit_sharding():
    """Megatron's: columns, then rows, whose partial sums the function asks to be summed."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    fn = lambda p, x: jnp.dot(jnp.tanh(x @ p["w"]), p["v"], out_sharding=PartitionSpec("data", None))
    with jax.set_mesh(mesh):
        put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        params = {"w": put(PLAIN["w"], None, "model"), "v": put(PLAIN["v"], "model", None)}
        wrapped = jlora.wrap(params, SPEC)
        found = jax.jit(jlora.apply(fn))(wrapped, put(X[:4], "data", None))
        assert found.sharding.spec == PartitionSpec("data", None)
    assert_close(found, jnp.tanh(X[:4] @ PLAIN["w"]) @ PLAIN["v"])


# -------------------------------------------------------------------------------- what is frozen


def test_bases_and_plain_leaves_get_no_gradient():
    grads = jax.grad(loss_of(model))(WRAPPED, X)
    trainable, frozen = jlora.partition(grads)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(trainable))


def test_without_freeze_they_get_theirs():
    grads = jax.grad(loss_of(jlora.apply(mlp, freeze=False)))(WRAPPED, X)
    expected = jax.grad(loss_of(mlp))(MERGED, X)
    assert_close(jlora.unwrap(grads), expected)


def test_leaves_trained_in_full_get_theirs():
    wrapped = randomised(jlora.wrap(PLAIN, dataclasses.replace(SPEC, targets="w", train="b")))
    grads = jax.grad(loss_of(model))(wrapped, X)
    assert_close(grads["b"].base, jax.grad(loss_of(mlp))(jlora.merge(wrapped), X)["b"])
    assert not np.any(grads["v"])


def test_other_arguments_get_their_gradients():
    fn = lambda p, x, scale, q: scale * mlp(p, x) @ q["w"]
    total = lambda fn: lambda p, x, scale, q: jnp.sum(jnp.sin(fn(p, x, scale, q)))
    others = (X, jnp.float32(0.7), {"w": noise(6, 3)})
    found = jax.grad(total(jlora.apply(fn)), (1, 2, 3))(WRAPPED, *others)
    assert_close(found, jax.grad(total(fn), (1, 2, 3))(MERGED, *others))


def test_other_keyword_arguments_get_their_gradients():
    """Whatever the order of their names, and however many leaves they have."""
    fn = lambda *, a, p, z: a @ p["w"] + z[0] * z[1]
    total = lambda a, z: jnp.sum(jnp.sin(jlora.apply(fn)(z=z, p=WRAPPED, a=a)))
    expected = lambda a, z: jnp.sum(jnp.sin(fn(a=a, p=MERGED, z=z)))
    z = noise(4), noise(4)
    assert_close(jax.grad(total, (0, 1))(X, z), jax.grad(expected, (0, 1))(X, z))


# -------------------------------------------------------------------------------- dense fallbacks


def sorted_kernel(p, x):
    return x @ lax.sort(p["w"], dimension=0)


def test_a_fallback_warns_of_path_shape_primitive_and_line():
    with pytest.warns(jlora.DenseFallbackWarning) as caught:
        jlora.apply(sorted_kernel)(WRAPPED, X)
    (warning,) = caught
    message = str(warning.message)
    line = 1 + sorted_kernel.__code__.co_firstlineno
    place = f"for sort at {__file__}:{line} (sorted_kernel)"
    assert message.startswith(f"w of shape (6, 4) is computed densely, as W + s A B, {place}: ")
    assert "jlora.explain shows every use" in message and 'fallback="ignore" is silent' in message


def test_a_fallback_inside_a_library_function_names_the_users_line():
    with pytest.warns(jlora.DenseFallbackWarning, match=re.escape(f" at {__file__}:")):
        jlora.apply(lambda p, x: x @ jnp.sort(p["w"], axis=0))(WRAPPED, X)


def test_a_fallback_names_the_path_inside_the_argument():
    with pytest.warns(jlora.DenseFallbackWarning, match="^params/layers/0/w of shape"):
        fn = lambda variables, x: sorted_kernel(variables["params"]["layers"][0], x)
        jlora.apply(fn)({"params": {"layers": [WRAPPED]}}, X)


def test_a_fallback_warns_once_per_place():
    def fn(p, x):
        x = sorted_kernel(p, x)
        for _ in range(3):
            x = x + sorted_kernel(p, X)
        x = lax.scan(lambda x, _: (x + jnp.sum(jnp.cumsum(p["w"], 0)), None), x, length=4)[0]
        return x + jnp.sum(jnp.exp(p["v"]))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        jlora.apply(fn)(WRAPPED, X)
        jax.jit(jlora.apply(fn))(WRAPPED, X)
    named = [re.search(r" for (\w+)", str(w.message))[1] for w in caught]
    assert sorted(named) == ["cumsum", "exp", "sort"]


def test_a_cause_is_told_once_and_names_its_kernels():
    fn = lambda p, x: x @ jnp.tanh(p["w"]) @ jnp.tanh(p["v"]) + jnp.sum(jnp.tanh(p["w"]))
    with pytest.warns(jlora.DenseFallbackWarning) as caught:
        jlora.apply(fn)(WRAPPED, X)
    (warning,) = caught
    told = r"w of shape \(6, 4\) and 1 more \(v\) are computed densely, as W \+ s A B, for tanh at .*\): tanh has no"
    assert re.match(told, str(warning.message))


def test_one_value_used_densely_twice_is_computed_once():
    fn = lambda p, x: x * jnp.sum(jnp.exp(p["w"])) + jnp.sum(jnp.sin(p["w"]))
    jaxpr = str(jax.make_jaxpr(jlora.apply(fn, fallback="ignore"))(WRAPPED, X))
    assert jaxpr.count("dot_general") == 1


def test_fallback_error():
    with pytest.raises(jlora.DenseFallbackError, match="w of shape"):
        jlora.apply(sorted_kernel, fallback="error")(WRAPPED, X)


def test_fallback_error_lets_factored_uses_pass():
    assert_close(jlora.apply(mlp, fallback="error")(WRAPPED, X), mlp(MERGED, X))


REPEATS = {
    "tile": lambda w: jnp.tile(w, (1, 3)),
    "tile of rows": lambda w: jnp.tile(w, (2, 1))[:6],
    "repeat": lambda w: jnp.repeat(w, 3, axis=1),
}


@pytest.mark.parametrize("repeat", REPEATS.values(), ids=REPEATS)
def test_a_repeated_kernel_is_no_fallback(repeat):
    """As the heads of grouped-query attention are."""
    fn = lambda p, x: x @ repeat(p["w"])
    assert_close(jlora.apply(fn, fallback="error")(WRAPPED, X), fn(MERGED, X))


def test_fallback_ignore():
    """Silent: the suite turns warnings into errors."""
    assert_close(jlora.apply(sorted_kernel, fallback="ignore")(WRAPPED, X), sorted_kernel(MERGED, X))


def test_fallback_is_one_of_three():
    with pytest.raises(ValueError, match=r"fallback must be one of .*'warn', 'error', 'ignore'.* found 'warning'"):
        jlora.apply(mlp, fallback="warning")


# -------------------------------------------------------------------------------- what the function said is kept

POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "named": jax.checkpoint_policies.save_only_these_names("hidden"),
    "everything": jax.checkpoint_policies.everything_saveable,
}


@pytest.mark.parametrize(("policy", "recomputed"), [("nothing", 2), ("named", 1), ("everything", 0)])
def test_the_policy_of_a_checkpoint_is_kept(policy, recomputed):
    """Of sin and tanh, the backward pass computes again as many as in the plain function."""

    @functools.partial(jax.checkpoint, policy=POLICIES[policy])
    def block(p, x):
        hidden = checkpoint_name(jnp.sin(x @ p["w"]), "hidden")
        return jnp.sin(jnp.sin(hidden) @ p["v"])

    text = lambda fn, p: str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(fn(p, X))))(p))
    sines = lambda fn, p: len(re.findall(r"= sin ", text(fn, p)))
    assert sines(jlora.apply(block), WRAPPED) == sines(block, PLAIN) == 3 + recomputed


@pytest.mark.parametrize("prevent_cse", [True, False])
def test_checkpoint_keeps_prevent_cse(prevent_cse):
    fn = jax.checkpoint(mlp, prevent_cse=prevent_cse)
    assert f"prevent_cse={prevent_cse}" in str(jax.make_jaxpr(jlora.apply(fn))(WRAPPED, X))


def test_a_custom_vjp_keeps_its_rule():
    @jax.custom_vjp
    def identity(x):
        return x

    identity.defvjp(lambda x: (x, None), lambda _, g: (100.0 * g,))
    fn = lambda scale: lambda p: jnp.sum(scale(X @ p["w"]))
    expected = jlora.grad(jlora.apply(fn(lambda y: y)))(WRAPPED)
    assert_close(jlora.grad(jlora.apply(fn(identity)))(WRAPPED), jax.tree.map(lambda g: 100 * g, expected))


def test_a_custom_jvp_keeps_its_rule():
    @jax.custom_jvp
    def identity(x):
        return x

    identity.defjvp(lambda primals, tangents: (primals[0], 100.0 * tangents[0]))
    fn = lambda scale: lambda p: jnp.sum(scale(X @ p["w"]))
    expected = jlora.grad(jlora.apply(fn(lambda y: y)))(WRAPPED)
    assert_close(jlora.grad(jlora.apply(fn(identity)))(WRAPPED), jax.tree.map(lambda g: 100 * g, expected))


class Named(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(7, name="up")(x)
        with jax.named_scope("mine"):
            return nn.remat(nn.Dense)(6, name="down")(jnp.tanh(x))


def test_named_scopes_are_kept():
    """Each operation of the compiled program, the adapters' too, stands under its module's name, once."""
    params = Named().init(jax.random.key(0), X)["params"]
    names = lambda p: _products(jax.jit(jlora.apply(Named().apply)).lower({"params": p}, X))
    plain, adapted = names(params), names(jlora.wrap(params, SPEC))
    assert len(adapted) == 3 * len(plain) == 6
    assert {name.split("jit(apply)/")[-1] for name in adapted} == {name.split("jit(apply)/")[-1] for name in plain}


def _products(lowered) -> list[str]:
    """The names of a program's products."""
    text = lowered.as_text(dialect="hlo", debug_info=True)
    return re.findall(r' dot\(.*op_name="([^"]*)"', text)


def test_effects_happen_in_order(capfd):
    def fn(p, x):
        jax.debug.print("first {}", x.shape[0], ordered=True)
        y = x @ p["w"]
        jax.debug.print("second {}", y.shape[1], ordered=True)
        return y

    jax.block_until_ready(jax.jit(jlora.apply(fn))(WRAPPED, X))
    jax.effects_barrier()
    assert capfd.readouterr().out.splitlines() == ["first 5", "second 4"]


@pytest.mark.parametrize("precision", [None, "highest"])
def test_the_precision_is_the_products(precision):
    """Those of the adapter have the precision of the product that they stand beside."""
    fn = lambda p, x: x @ p["w"]
    with jax.default_matmul_precision(precision):
        ours, plain = (str(jax.make_jaxpr(f)(p, X)) for f, p in ((jlora.apply(fn), WRAPPED), (fn, PLAIN)))
    assert ours.count("HIGHEST") == 3 * plain.count("HIGHEST") == (6 if precision else 0)


def test_each_operand_keeps_its_precision():
    """Of a kernel on the left, with one precision for it and another for the activations."""
    kernel, activations = lax.Precision.HIGHEST, lax.Precision.DEFAULT
    fn = lambda p, x: lax.dot_general(p["w"], x, (((0,), (0,)), ((), ())), precision=(kernel, activations))
    jaxpr = jax.make_jaxpr(jlora.apply(fn))(WRAPPED, noise(6, 7))
    dots = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(dots) == 3
    for eqn in dots:
        sides = [activations if 7 in operand.aval.shape else kernel for operand in eqn.invars]
        assert [*eqn.params["precision"]] == sides


def copies(fn, tree, *args):
    """The copies in the trace of a function on a wrapped tree, through its loops."""
    text = str(jax.make_jaxpr(jlora.apply(fn))(tree, *args))
    return len(re.findall(r"= copy(?:_p)?\b", text))


def test_products_that_share_their_input_share_a_copy_of_it():
    """One for each value, made before its first product and cast as it is; none where one product reads a value."""
    x = jnp.ones((3, 4))
    tree = jlora.wrap({name: jnp.ones((4, 4)) for name in "qkv"}, jlora.LoraSpec(targets="*", rank=2, axes=AXES_QKV))
    assert copies(lambda p, x: x @ p["q"] + x @ p["k"] + x @ p["v"], tree, x) == 1
    half = lambda x, w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
    assert copies(lambda p, x: half(x, p["q"]) + half(x, p["k"]) + half(x, p["v"]), tree, x) == 1
    assert copies(lambda p, x: ((x @ p["q"]) @ p["k"]) @ p["v"], tree, x) == 0
    layer = lambda p: lambda x, _: (x @ p["q"] + x @ p["k"], None)
    assert copies(lambda p, x: jax.lax.scan(layer(p), x, None, length=2)[0], tree, x) == 1


AXES_QKV = {"*": jlora.Axes((0,), (1,))}


class Holder:
    def __init__(self, y):
        self.y = y


def test_a_function_that_is_returned_may_refer_to_what_is_not_there_yet():
    def fn(p, x):
        y = x @ p["w"]
        later = lambda: missing
        if x is None:
            missing = None
        return y, later

    found, later = jlora.apply(fn)(WRAPPED, X)
    assert_close(found, X @ MERGED["w"])
    assert later.__closure__


def test_objects_that_hide_an_array_of_the_trace_are_refused():
    for fn in (Holder, lambda y: lambda: y):
        with pytest.raises(TypeError, match=r"returns a (Holder|function) that holds an array and is no pytree"):
            jlora.apply(lambda p, x, fn=fn: fn(x @ p["w"]))(WRAPPED, X)
