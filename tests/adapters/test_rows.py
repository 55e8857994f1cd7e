"""A batch of which each row has its own adapter is, row by row, what each adapter alone gives."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jlora
from jlora import adapters
from tests.adapters.support import ALL, AXES, VARIANTS, adapter, base, family, forward, noisy
from tests.models import MODELS
from tests.programs import PROGRAMS
from tests.support import error, evaluated, spec_of, thinned

PARAMS = base()
IDS = [2, 0, -1, 1, 3, 2]
FEW, MANY = 1, 40  # tokens a row: masks, gathered factors


def rows(tokens, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(len(IDS), tokens, 8)), jnp.float32)


def one_by_one(fn, stacked, ids, x, **settings):
    """Each row through its own adapter alone."""
    run = jlora.apply(fn, **settings)
    return jnp.stack([run(adapters.select(stacked, int(i)), x[n : n + 1])[0] for n, i in enumerate(ids)])


@pytest.mark.parametrize(("name", "tokens"), thinned(2, VARIANTS, [FEW, MANY]))
def test_a_mixed_batch_is_each_row_by_itself(name, tokens):
    stacked = adapters.stack(family(PARAMS, name))
    x, ids = rows(tokens), jnp.asarray(IDS)
    found = jax.jit(adapters.batched(forward, fallback="error"))(stacked, ids, x)
    assert error(found, evaluated(lambda *args: one_by_one(forward, args[0], IDS, args[1]), stacked, x)) < 1e-5


def strategies(tokens, name="lora"):
    table = jlora.explain(
        adapters.batched(forward), adapters.stack(family(PARAMS, name)), jnp.asarray(IDS), rows(tokens)
    )
    return {use.path: (use.strategy, use.factored, use.note) for use in table.uses}


def test_explain_tells_the_way():
    masks, gathered = strategies(FEW), strategies(MANY)
    assert masks.keys() == gathered.keys() == {"layers/up/kernel", "layers/down/kernel", "head/kernel"}
    told = ("masks", True, "the ranks of all 4 adapters at once, those of other rows' masked")
    assert set(masks.values()) == {told}
    assert set(gathered.values()) == {("gathered", True, "each row's own factors, gathered")}


PROGRAMS_BY_NAME = {program.name: program for program in PROGRAMS + MODELS}


@pytest.mark.parametrize("name", thinned(16, list(PROGRAMS_BY_NAME)))
def test_every_program(name):
    """Whatever a function does with its weights."""
    program = PROGRAMS_BY_NAME[name]
    trees = [noisy(jlora.wrap(program.params, spec_of(program, rank=rank)), rank) for rank in (2, 1)]
    stacked, ids = adapters.stack(trees), (1, 0, -1)
    as_row = lambda *args: jax.tree.map(lambda x: x[None] if isinstance(x, jax.Array) else x, program.fn(*args))
    found = jax.jit(adapters.batched(as_row, None, fallback="ignore"))(stacked, jnp.asarray(ids), *program.args)
    run = jlora.apply(program.fn, fallback="ignore")
    for n, i in enumerate(ids):
        want = evaluated(run, adapters.select(stacked, i), *program.args)
        assert error(jax.tree.map(lambda x, n=n: x[n], found), want) < max(program.tolerance, 1e-5), i


def test_where_the_rows_are():
    stacked = adapters.stack(family(PARAMS, "lora"))
    x, ids = rows(3), jnp.asarray(IDS)

    def fn(params, tree, shared):
        y = forward(params, jnp.moveaxis(tree["x"], 1, 0)) + shared
        return {"y": jnp.moveaxis(y, 0, -1), "shared": shared}

    call = adapters.batched(fn, in_axes=({"x": 1}, None), out_axes={"y": -1, "shared": None})
    found = call(stacked, ids, {"x": jnp.moveaxis(x, 0, 1)}, jnp.float32(2.0))
    want = one_by_one(forward, stacked, IDS, x) + 2
    assert error(jnp.moveaxis(found["y"], -1, 0), want) < 1e-5
    assert found["shared"] == 2


def test_a_cache_of_keys_and_values():
    """Decoding token by token gives what the whole sequence gives."""

    class Model(nn.Module):
        decode: bool = False

        @nn.compact
        def __call__(self, x):
            mask = None if self.decode else nn.make_causal_mask(x[..., 0])
            attention = nn.MultiHeadDotProductAttention(2, decode=self.decode, deterministic=True, name="attention")
            return nn.Dense(5, name="head")(x + attention(x, mask=mask))

    x, ids = rows(4), jnp.asarray(IDS)
    variables = Model(decode=True).init(jax.random.key(0), x)
    spec = jlora.LoraSpec(targets="all-linear", rank=2)
    trees = [noisy(jlora.wrap(variables["params"], spec), seed) for seed in range(4)]
    stacked = adapters.stack(trees)
    whole = adapters.batched(lambda p, x: Model().apply({"params": p}, x))(stacked, ids, x)
    assert error(whole, one_by_one(lambda p, x: Model().apply({"params": p}, x), stacked, IDS, x)) < 1e-5

    def token(params, cache, x):
        y, after = Model(decode=True).apply({"params": params, "cache": cache}, x, mutable=["cache"])
        return y, after["cache"]

    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, variables["cache"])
    step = jax.jit(adapters.batched(token, in_axes=(axes, 0), out_axes=(0, axes)))
    cache, made = variables["cache"], []
    for t in range(x.shape[1]):
        y, cache = step(stacked, ids, cache, x[:, t : t + 1])
        made.append(y)
    assert error(jnp.concatenate(made, 1), whole) < 1e-5


@pytest.mark.parametrize(("kind", "name", "tokens"), thinned(3, ["int8", "nf4"], ["lora", "dora", "ia3"], [FEW, MANY]))
def test_quantised_bases(kind, name, tokens):
    quantised = jlora.quant.quantize(PARAMS, kind, targets=ALL, axes=AXES)
    stacked = adapters.stack(family(quantised, name))
    x, ids = rows(tokens), jnp.asarray(IDS)
    found = jax.jit(adapters.batched(forward, fallback="error"))(stacked, ids, x)
    assert error(found, one_by_one(forward, stacked, IDS, x)) < 1e-4


def test_embeddings():
    table = {"embed": {"embedding": jnp.asarray(np.random.default_rng(0).normal(size=(11, 8)), jnp.float32)}}
    fn = lambda params, ids: (
        jnp.tanh(jnp.take(params["embed"]["embedding"], ids, axis=0)) @ params["embed"]["embedding"].T
    )
    spec = jlora.LoraSpec(targets="embed/embedding", rank=2)
    stacked = adapters.stack([noisy(jlora.wrap(table, spec), seed) for seed in range(4)])
    tokens, ids = jnp.asarray(np.random.default_rng(0).integers(0, 11, (len(IDS), 5))), jnp.asarray(IDS)
    found = jax.jit(adapters.batched(fn, fallback="error"))(stacked, ids, tokens)
    assert error(found, one_by_one(fn, stacked, IDS, tokens)) < 1e-5


def experts(params, x):
    """Tokens in the order of their experts, of which each row has other numbers."""
    flat = x.reshape(-1, x.shape[-1])
    group = jnp.argmax(flat[:, :3], axis=1)
    order = jnp.argsort(group)
    made = jax.lax.ragged_dot(flat[order], params["experts"], jnp.bincount(group, length=3).astype(jnp.int32))
    return jnp.zeros_like(made).at[order].set(made).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("wraps", [True, False])
def test_experts(wraps):
    """Ragged products, for which `jax.vmap` has no rule, of adapted kernels and of others."""
    rng = np.random.default_rng(0)
    params = {"experts": jnp.asarray(rng.normal(size=(3, 8, 6)), jnp.float32), "w": {"kernel": jnp.eye(6)}}
    fn = lambda p, x: experts(p, x) @ p["w"]["kernel"]
    axes = {"experts": jlora.Axes((1,), (2,), (0,))}
    spec = (
        jlora.LoraSpec(targets=(*axes, "w/kernel"), axes=axes, rank=2)
        if wraps
        else jlora.LoraSpec(targets="w/kernel", rank=2)
    )
    stacked = adapters.stack([noisy(jlora.wrap(params, spec), seed) for seed in range(4)])
    x, ids = rows(7), jnp.asarray(IDS)
    call = adapters.batched(fn, fallback="error")
    assert error(jax.jit(call)(stacked, ids, x), one_by_one(fn, stacked, IDS, x)) < 1e-5
    loss = lambda run: lambda tree: jnp.sin(run(tree)).sum()
    found = jlora.grad(loss(lambda tree: call(tree, ids, x)))(stacked)
    want = jlora.grad(loss(lambda tree: one_by_one(fn, tree, IDS, x)))(stacked)
    assert error(found, want) < 1e-4


@pytest.mark.parametrize(("name", "tokens"), thinned(3, ["lora", "dora", "vera", "ia3"], [FEW, MANY]))
def test_gradients_are_those_of_each_row_by_itself(name, tokens):
    stacked = adapters.stack(family(PARAMS, name))
    x, ids = rows(tokens), jnp.asarray(IDS)
    mixed = jax.jit(jlora.grad(lambda tree: jnp.sin(adapters.batched(forward)(tree, ids, x)).sum()))(stacked)
    alone = jax.jit(jlora.grad(lambda tree: jnp.sin(one_by_one(forward, tree, IDS, x)).sum()))
    want = alone(stacked)
    assert error(mixed, want) < 1e-4
    bases = jax.grad(lambda tree: jnp.sin(adapters.batched(forward)(tree, ids, x)).sum())(stacked)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jlora.unwrap(bases)))


def test_dropout_is_each_rows_own():
    trees = [adapter(PARAMS, seed, rank=2, dropout=0.5) for seed in range(3)]
    stacked = adapters.stack(trees)
    x = jnp.broadcast_to(rows(4)[:1], (4, 4, 8))
    run = lambda key: adapters.batched(forward, rng=key)(stacked, jnp.asarray([1, 1, 2, -1]), x)
    y = run(jax.random.key(0))
    assert not np.allclose(y[0], y[1])
    assert error(y[3], forward(PARAMS, x[3:])[0]) < 1e-6
    assert error(run(jax.random.key(0)), y) == 0 < error(run(jax.random.key(1)), y)
    mixed = adapters.stack([*trees, adapter(PARAMS, 0, rank=2, dropout=0.1)])
    assert adapters.unstack(mixed)[3]["head"]["kernel"].dropout == 0.1
    assert np.isfinite(adapters.batched(forward)(mixed, jnp.asarray([0, 3]), x[:2])).all()
    with pytest.raises(ValueError, match=r"kernel holds adapters of different dropout"):
        adapters.batched(forward, rng=jax.random.key(0))(mixed, jnp.asarray([0, 3]), x[:2])


def test_numbers_of_no_adapter():
    stacked = adapters.stack(family(PARAMS, "lora"))
    call = adapters.batched(forward)
    for wrong in ([0, 4], [-2, 0]):
        with pytest.raises(ValueError, match=r"ids are of 0 to 3, and -1 for the base; found"):
            call(stacked, jnp.asarray(wrong), rows(2)[:2])
        y = jax.jit(call)(stacked, jnp.asarray(wrong), rows(2)[:2])
        assert [bool(np.isnan(row).all()) for row in y] == [not -1 <= i < 4 for i in wrong]


def test_what_does_not_go_together_is_refused():
    stacked, x = adapters.stack(family(PARAMS, "lora")), rows(2)
    with pytest.raises(ValueError, match=r"are 2 ids, and an argument of shape \(6, 2, 8\) at 0 has not as many rows"):
        adapters.batched(forward)(stacked, jnp.asarray([0, 1]), x)
    with pytest.raises(ValueError, match=r"in_axes has 2 entries, .*; found 1 such arguments"):
        adapters.batched(forward, in_axes=(0, 0))(stacked, jnp.asarray(IDS), x)
    with pytest.raises(ValueError, match=r"returns an array of shape \(\) for one, which has no axis 0 of size 1"):
        adapters.batched(lambda p, x: forward(p, x).sum())(stacked, jnp.asarray(IDS), x)
    with pytest.raises(TypeError, match=r"whole numbers of shape \(rows,\).*found float32"):
        adapters.batched(forward)(stacked, jnp.ones(6), x)
    with pytest.raises(TypeError, match=r"found \['a', 'b'\]; a jlora.adapters.Pool knows them by name"):
        adapters.batched(forward)(stacked, ["a", "b"], x)
    with pytest.raises(TypeError, match="takes no keyword arguments, found train; give it to the function"):
        adapters.batched(forward)(stacked, jnp.asarray(IDS), x, train=False)
    with pytest.raises(ValueError, match="in_axes has another structure than what it is for"):
        adapters.batched(forward, in_axes=({"y": 0},))(stacked, jnp.asarray(IDS), {"x": x})
    with pytest.raises(TypeError, match="batched takes a tree of several adapters"):
        adapters.batched(forward)(adapter(PARAMS, 0, rank=2), jnp.asarray(IDS), x)
    with pytest.raises(ValueError, match="fallback must be one of"):
        adapters.batched(forward, fallback="loud")


def test_a_dense_use_is_warned_of_once():
    fn = lambda p, x: x @ jnp.exp(p["head"]["kernel"])
    stacked = adapters.stack([adapter(PARAMS, i, targets=("head/kernel",), rank=2) for i in range(4)])
    with pytest.warns(jlora.DenseFallbackWarning, match="head/kernel") as told:
        found = adapters.batched(fn)(stacked, jnp.asarray(IDS), rows(2))
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert error(found, one_by_one(fn, stacked, IDS, rows(2))) < 1e-5


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("explicit", [False, True])
def test_on_a_mesh(tokens, explicit):
    """Rows split over one axis, adapters over another, the base over both."""
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    put = lambda x, *spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(*spec)))
    ids, x = jnp.asarray([2, 0, -1, 1, 3, 2, 0, 1]), jnp.concatenate([rows(tokens), rows(tokens)[:2]])
    trees = [adapter(PARAMS, seed, rank=2) for seed in range(4)]
    want = one_by_one(forward, adapters.stack(trees), list(map(int, ids)), x)
    split = lambda path, leaf: put(leaf, *[None] * (leaf.ndim - 1), "model" if leaf.shape[-1] % 4 == 0 else None)
    params = PARAMS if explicit else jax.tree_util.tree_map_with_path(split, PARAMS)
    stacked = adapters.stack([adapter(params, seed, rank=2) for seed in range(4)])
    with jax.set_mesh(mesh):
        call = jax.jit(adapters.batched(forward, fallback="error"))
        assert error(call(stacked, put(ids, "data"), put(x, "data")), want) < 1e-5
        if not explicit:
            axis = jax.tree.map(lambda i, leaf: put(leaf, *[None] * i, "model"), *_arrays(stacked))
            assert error(call(_with(stacked, axis), put(ids, "data"), put(x, "data")), want) < 1e-5


def _arrays(stacked):
    trainable, _ = jlora.partition(stacked)
    return adapters.axes(trainable), trainable


def _with(stacked, trainable):
    return jlora.combine(trainable, jlora.partition(stacked)[1])
