"""`jlora.nnx`: an adapted module is called, trained, split, saved and sharded as the model was."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType

import jlora
from jlora.nnx.unchanged import unchanged
from tests.support import error, same_bits

WIDTH, TOKENS = 8, 6
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, TOKENS, WIDTH)), jnp.float32)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.norm(self.attention(x)))


class Model(nnx.Module):
    """Batch norm, dropout, attention, a list of blocks, a tied embedding."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)
        self.width = WIDTH

    def encode(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def __call__(self, x):
        x = self.encode(x)
        self.mean = nnx.Intermediate(x.mean())
        return self.head(x)

    def logits(self, tokens):
        return self.embed.attend(self.embed(tokens))

    @property
    def norm_of_head(self):
        return jnp.square(self.head.kernel[...]).sum()

    @property
    def sizes(self):
        return {"width": self.width}


SPEC = jlora.LoraSpec(rank=2, targets=["attention/*/kernel", "embed"])


def model():
    return Model(nnx.Rngs(0))


def trained(adapted):
    """With factors that do something."""
    state = nnx.state(adapted, nnx.LoRAParam)
    keys = iter(jax.random.split(jax.random.key(7), 100))
    nnx.update(adapted, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), state))
    return adapted


def rest_of(module):
    """Batch statistics, random streams, what was sown: by path."""
    state = nnx.to_flat_state(nnx.as_pure(nnx.state(module, nnx.Not(nnx.Param))))
    return {path: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for path, x in state}


def check_same_rest(adapted, plain):
    ours, theirs = rest_of(adapted.base_model), rest_of(plain)
    assert [*ours] == [*theirs]
    for path, x in theirs.items():
        assert same_bits(ours[path], x), path


def test_the_start_is_the_model_bit_for_bit_and_its_state_changes_as_it_would():
    adapted, plain, call = jlora.nnx.wrap(model(), SPEC), model(), nnx.jit(lambda model, x: model(x))
    for _ in range(3):
        assert same_bits(call(adapted, X), call(plain, X))
        check_same_rest(adapted, plain)
    assert adapted.base_model.mean[...].shape == plain.mean[...].shape


def test_a_call_is_one_of_the_merged_model():
    adapted = trained(jlora.nnx.wrap(model(), SPEC))
    merged = jlora.nnx.merge(adapted)
    assert type(merged) is Model
    assert error(adapted(X), merged(X)) <= 1e-5
    assert error(adapted(X), merged(X)) <= 1e-5  # and the next, with its own masks
    for path, x in rest_of(merged).items():
        assert error(rest_of(adapted.base_model)[path], x) <= 1e-5, path
    assert error(adapted(X), jlora.nnx.unwrap(adapted)(X)) > 1e-2


def test_unwrap_gives_the_bits_of_the_base():
    adapted = trained(jlora.nnx.wrap(model(), SPEC))
    bases = nnx.state(jlora.nnx.unwrap(adapted), nnx.Param)
    assert jax.tree.all(jax.tree.map(same_bits, nnx.as_pure(bases), nnx.as_pure(nnx.state(model(), nnx.Param))))


def test_the_given_model_stays_as_it_is():
    given = model()
    before = copy.copy(nnx.as_pure(nnx.state(given)))
    adapted = trained(jlora.nnx.wrap(given, SPEC))
    adapted(X)
    check = lambda x, y: x is y
    assert jax.tree.all(jax.tree.map(check, nnx.as_pure(nnx.state(given)), before))
    kernel = lambda m: m.blocks[0].attention.query.kernel.get_value()
    assert kernel(adapted.base_model) is kernel(given)  # and is not copied


def test_types_of_variables():
    adapted = jlora.nnx.wrap(model(), jlora.LoraSpec(rank=2, targets="attention/*/kernel", train="head"))
    lora = {path for path, _ in nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam))}
    kernels = [(i, name) for i in range(2) for name in ("key", "out", "query", "value")]
    factors = {
        ("lora_params", "blocks", i, "attention", name, "kernel", factor)
        for i, name in kernels
        for factor in ("lora_a", "lora_b")
    }
    assert lora == factors | {("base_model", "head", "kernel"), ("base_model", "head", "bias")}
    types = lambda m: {path: type(x) for path, x in nnx.to_flat_state(nnx.state(m))}
    changed = {path: kind for path, kind in types(adapted.base_model).items() if kind is not types(model())[path]}
    assert changed == {("head", "kernel"): nnx.LoRAParam, ("head", "bias"): nnx.LoRAParam}
    assert types(jlora.nnx.merge(adapted)) == types(jlora.nnx.unwrap(adapted)) == types(model())


def test_the_training_loop_of_a_full_fine_tune():
    """As by hand on the tree: the same losses; the base keeps its bits, batch statistics move."""
    adapted = jlora.nnx.wrap(model(), SPEC)
    optimizer = nnx.Optimizer(adapted, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda model, x: (model(x) ** 2).mean()
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x)
        optimizer.update(model, grads)
        return value

    losses = [float(step(adapted, optimizer, X)) for _ in range(5)]

    graphdef, params, rest = nnx.split(model(), nnx.Param, ...)
    tree, tx = jlora.wrap(nnx.as_pure(params), SPEC), optax.adam(1e-2)
    half, frozen = jlora.partition(tree)
    state, rest = tx.init(half), nnx.as_pure(rest)

    def forward(params, rest, x):
        model = nnx.merge(graphdef, params, rest)
        y = model(x)
        return (y**2).mean(), nnx.as_pure(nnx.state(model, nnx.Not((nnx.Param, nnx.Intermediate))))

    by_hand = []
    for _ in range(5):
        loss = lambda half, rest=rest: jlora.apply(forward)(jlora.combine(half, frozen), rest, X)
        (value, rest), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(half)
        updates, state = tx.update(grads, state, half)
        half = optax.apply_updates(half, updates)
        by_hand.append(float(value))
    np.testing.assert_allclose(losses, by_hand, rtol=1e-5)
    assert losses[-1] != losses[0]
    check = jax.tree.map(same_bits, jlora.unwrap(jlora.nnx.tree(adapted)), nnx.as_pure(params))
    assert jax.tree.all(check)


def test_other_methods_properties_and_attributes():
    adapted = trained(jlora.nnx.wrap(model(), SPEC))
    merged = jlora.nnx.merge(adapted)
    for each in (adapted, merged):
        each.eval()
    assert error(adapted.encode(X), merged.encode(X)) <= 1e-5
    tokens = jnp.arange(5)
    assert error(adapted.logits(tokens), merged.logits(tokens)) <= 1e-5
    assert adapted.encode.__name__ == "encode" and "encode" in dir(adapted)
    assert adapted.width == WIDTH and adapted.sizes == {"width": WIDTH}
    assert error(adapted.norm_of_head, merged.norm_of_head) <= 1e-6
    adapted.width = 5
    assert adapted.base_model.width == adapted.width == 5
    with pytest.raises(AttributeError, match="nothing_of_it"):
        _ = adapted.nothing_of_it


def test_a_submodule_is_seen_through_its_adapters():
    """Called by itself it would run without them."""
    adapted = trained(jlora.nnx.wrap(model(), SPEC))
    merged = jlora.nnx.merge(adapted)
    adapted.eval(), merged.eval()
    assert error(adapted.blocks[1](X), merged.blocks[1](X)) <= 1e-5
    assert error(adapted.blocks[1].attention.query(X), merged.blocks[1].attention.query(X)) <= 1e-5
    x = y = X
    for ours, theirs in zip(adapted.blocks, merged.blocks, strict=True):
        x, y = ours(x), theirs(y)
    assert error(x, y) <= 1e-5 and len(adapted.blocks) == 2
    assert error(nnx.jit(lambda part, x: part(x))(adapted.blocks[0], X), merged.blocks[0](X)) <= 1e-5
    assert error(adapted.embed.attend(X), merged.embed.attend(X)) <= 1e-5
    adapted.blocks[0].dropout.rate = 0.9
    assert adapted.base_model.blocks[0].dropout.rate == 0.9


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, *, rngs=None, scale=1.0, double=False):
        x = self.attention(x, decode=True) if self.attention.decode else self.attention(x, decode=False)
        return self.dropout(x, rngs=rngs) * (2 * scale if double else scale)


def test_caches_and_streams_that_are_arguments():
    spec = jlora.LoraSpec(rank=2)
    adapted = trained(jlora.nnx.wrap(Decoder(nnx.Rngs(0)), spec))
    merged = jlora.nnx.merge(adapted)
    ours, theirs = nnx.Rngs(dropout=3), nnx.Rngs(dropout=3)
    for each in (adapted, merged):
        each.attention.init_cache((4, TOKENS, WIDTH))
    for i in range(3):
        given = {"scale": 0.5, "double": i == 1}
        found = adapted(X[:, i : i + 1], rngs=ours, **given)
        assert error(found, merged(X[:, i : i + 1], rngs=theirs, **given)) <= 1e-5
    assert ours.dropout.count[...] == theirs.dropout.count[...] == 3
    cache = lambda m: m.attention.cached_key[...]
    assert adapted.base_model.attention.cache_index[...] == 3
    assert error(cache(adapted.base_model), cache(merged)) <= 1e-5


def test_what_is_sown_is_captured():
    class Sows(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            x = self.inner(x)
            self.sow(nnx.Intermediate, "features", x)
            return x

    if not hasattr(nnx, "capture"):
        pytest.skip("this Flax has no nnx.capture")
    adapted = trained(jlora.nnx.wrap(Sows(nnx.Rngs(0)), jlora.LoraSpec(rank=2)))
    y, found = nnx.capture(adapted, nnx.Intermediate)(X)
    expected = nnx.capture(jlora.nnx.merge(adapted), nnx.Intermediate)(X)
    assert error(y, expected[0]) <= 1e-5
    assert error(jax.tree.leaves(found)[0], jax.tree.leaves(expected[1])[0]) <= 1e-5


class Stack(nnx.Module):
    """Scanned layers under remat, as large models have them."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, x):
        @nnx.remat
        def layer(x, layer):
            return jnp.tanh(layer(x))

        return nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_transforms_inside():
    sites = jlora.nnx.sites(Stack(nnx.Rngs(0)), X)
    adapted = trained(jlora.nnx.wrap(Stack(nnx.Rngs(0)), jlora.LoraSpec(rank=2), sites=sites))
    merged = jlora.nnx.merge(adapted)
    assert error(adapted(X), merged(X)) <= 1e-5
    assert error(nnx.jit(lambda m, x: m(x))(adapted, X), merged(X)) <= 1e-5
    assert jax.tree.leaves(nnx.state(adapted, nnx.LoRAParam))[0].shape == (3, WIDTH, 2)


def test_a_loop_that_changes_an_adapted_kernel_is_refused():
    """And the one that hands it on makes nothing of it: no dense kernel."""

    class Decays(Stack):
        def __call__(self, x):
            def layer(x, layer):
                layer.kernel[...] = layer.kernel[...] * 0.9
                return jnp.tanh(layer(x))

            return nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    sites = jlora.nnx.sites(Stack(nnx.Rngs(0)), X)
    wrapped = lambda kind: jlora.nnx.wrap(kind(nnx.Rngs(0)), jlora.LoraSpec(rank=2), sites=sites, fallback="error")
    with pytest.raises(TypeError, match="the call assigns to layers/kernel, which is adapted"):
        wrapped(Decays)(X)
    wrapped(Stack)(X)


def test_what_a_program_hands_on():
    def program(a, b, c, d):
        (e, _), f = jax.lax.scan(lambda carry, x: ((carry[0], carry[1] + x.sum()), x), (a, 0.0), b)
        g = jax.lax.while_loop(lambda x: x[0] < 3, lambda x: (x[0] + 1, x[1], x[2] * 2), (0, c, d))
        h = jax.lax.cond(d.sum() > 0, lambda x, y: (x, y), lambda x, y: (x, y + 1), g[1], g[2])
        return jax.jit(jax.checkpoint(lambda e, f: (e, f)))(e, f) + h

    arrays = [jnp.ones((3,)), jnp.ones((2, 3)), jnp.ones((4,)), jnp.ones((4,))]
    assert unchanged(program, arrays) == [True, True, True, False]
    assert unchanged(lambda x, y: (y, x), arrays[2:]) == [False, False]
    rotated = lambda x, y: (jax.lax.scan(lambda c, x: (c, x), 0, x, reverse=True)[1], y * 1)
    assert unchanged(rotated, arrays[:2]) == [True, False]


def test_transforms_around():
    adapted = trained(jlora.nnx.wrap(model(), SPEC))
    adapted.eval()
    expected = jlora.nnx.merge(adapted)(X)
    rows = nnx.vmap(lambda m, x: m.encode(x), in_axes=(nnx.StateAxes({...: None}), 0))(adapted, X)
    assert error(rows, adapted.encode(X)) <= 1e-5
    remat = nnx.remat(lambda m, x: m(x))
    value = lambda call: nnx.grad(lambda m, x: (call(m, x) ** 2).mean(), argnums=nnx.DiffState(0, nnx.LoRAParam))
    assert error(value(remat)(adapted, X), value(lambda m, x: m(x))(adapted, X)) <= 1e-5
    graphdef, state = nnx.split(adapted)
    assert error(jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, X), expected) <= 1e-5
    step = lambda m, x: m.encode(x)
    carried = nnx.scan(step, in_axes=(nnx.StateAxes({...: None}), 0), out_axes=0)(adapted, X[None])
    assert error(carried[0], adapted.encode(X)) <= 1e-5
    assert error(nnx.clone(adapted)(X), expected) <= 1e-5
    slope = lambda model: nnx.grad(lambda x: (model.encode(x) ** 2).mean())(X)
    assert error(slope(adapted), slope(jlora.nnx.merge(adapted))) <= 1e-5


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.second = self.first
        self.third = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.third.kernel = self.first.kernel
        self.last = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.third(jnp.tanh(self.second(self.first(x)))))


@pytest.mark.parametrize("settings", [{}, {"targets": "last", "train": "first"}], ids=["adapted", "in full"])
def test_shared_variables_stay_shared(settings):
    adapted = trained(jlora.nnx.wrap(Tied(nnx.Rngs(0)), jlora.LoraSpec(rank=2, **settings)))
    merged = jlora.nnx.merge(adapted)
    assert merged.first is merged.second and merged.third.kernel is merged.first.kernel
    assert adapted.base_model.third.kernel is adapted.base_model.first.kernel
    assert error(adapted(X), merged(X)) <= 1e-5
    assert error(adapted(X), Tied(nnx.Rngs(0))(X)) > 1e-3


def test_dropout_of_the_adapters_follows_train_and_eval():
    spec = jlora.LoraSpec(rank=2, dropout=0.5)
    adapted = trained(jlora.nnx.wrap(nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0)), spec))
    assert error(adapted(X), adapted(X)) > 1e-2
    again = jlora.nnx.wrap(nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0)), spec)
    nnx.update(again, nnx.state(adapted))
    assert same_bits(again(X), adapted(X))  # the stream is part of the state
    adapted.eval()
    assert error(adapted(X), jlora.nnx.merge(adapted)(X)) <= 1e-5
    adapted.train()
    assert error(adapted(X), jlora.nnx.merge(adapted)(X)) > 1e-2
    view = nnx.view(adapted, deterministic=True)
    assert error(view(X), jlora.nnx.merge(adapted)(X)) <= 1e-5


@pytest.mark.parametrize("variant", ["vera", "dora", "lora_fa", "loha", "oft"])
def test_what_of_an_adapter_does_not_train_is_no_parameter(variant):
    adapted = jlora.nnx.wrap(model(), jlora.LoraSpec(rank=2, targets="attention/query/kernel", variant=variant))
    trainable, frozen = jlora.partition(jlora.nnx.tree(adapted))
    shapes = lambda tree: sorted(x.shape for x in jax.tree.leaves(tree))
    assert shapes(trainable) == shapes(nnx.state(adapted, nnx.LoRAParam))
    held = nnx.state(adapted, jlora.nnx.FrozenParam)
    assert bool(jax.tree.leaves(held)) == (variant in ("vera", "lora_fa", "dora"))
    assert shapes(frozen) == sorted(shapes(held) + shapes(nnx.state(model(), nnx.Param)))


def test_tree_and_update():
    adapted = jlora.nnx.wrap(model(), SPEC)
    tree = jlora.nnx.tree(adapted)
    expected = jlora.wrap(nnx.as_pure(nnx.state(model(), nnx.Param)), SPEC)
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(same_bits, tree, expected))
    before = adapted.lora_params["embed"]["embedding"].lora_b
    jlora.nnx.update(adapted, jax.tree.map(lambda x: x + 1, tree))
    assert adapted.lora_params["embed"]["embedding"].lora_b is before  # an optimizer's variable
    assert jax.tree.all(jax.tree.map(lambda x, y: same_bits(x, y + 1), jlora.nnx.tree(adapted), tree))


def test_update_takes_other_adapters():
    adapted = jlora.nnx.wrap(model(), jlora.LoraSpec(rank=2, targets="query", train="head"))
    other = trained(jlora.nnx.wrap(model(), jlora.LoraSpec(rank=3, targets=["key", "value"], train="embed")))
    jlora.nnx.update(adapted, jlora.nnx.tree(other))
    adapted.eval(), other.eval()
    assert same_bits(adapted(X), other(X))
    kinds = [type(jlora.nnx.merge(adapted).head.kernel), type(adapted.base_model.embed.embedding)]
    assert kinds == [nnx.Param, nnx.LoRAParam]
    wrong = jlora.nnx.tree(jlora.nnx.wrap(nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0)), jlora.LoraSpec(rank=2)))
    with pytest.raises(ValueError, match=r"nnx.update: .* is in the .* alone"):
        jlora.nnx.update(adapted, wrong)


def test_files_of_peft_and_back(tmp_path):
    adapted = trained(jlora.nnx.wrap(model(), jlora.LoraSpec(rank=2, targets="attention/*/kernel")))
    jlora.peft.save(tmp_path / "adapter", jlora.nnx.tree(adapted))
    fresh = jlora.nnx.wrap(model(), jlora.LoraSpec(rank=2, targets="attention/*/kernel"))
    plain = jlora.unwrap(jlora.nnx.tree(fresh))
    jlora.nnx.update(fresh, jlora.peft.load(tmp_path / "adapter", plain))
    adapted.eval(), fresh.eval()
    assert error(fresh(X), adapted(X)) <= 1e-6


def test_saved_by_orbax(tmp_path):
    adapted = trained(jlora.nnx.wrap(model(), jlora.LoraSpec(rank=2, targets="attention/*/kernel", variant="vera")))
    pure = nnx.state(adapted, nnx.Not(nnx.RngState))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.to_pure_dict(pure))
        checkpointer.wait_until_finished()
        fresh = jlora.nnx.wrap(model(), jlora.LoraSpec(rank=2, targets="attention/*/kernel", variant="vera"))
        state = nnx.state(fresh, nnx.Not(nnx.RngState))
        found = checkpointer.restore(tmp_path / "state", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, found)
    nnx.update(fresh, state)
    adapted.eval(), fresh.eval()
    assert same_bits(fresh(X), adapted(X))


def test_on_a_mesh():
    """Named axes of the base are those of the factors, and what is made lies there."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    with jax.set_mesh(mesh):
        plain = nnx.Linear(WIDTH, 16, rngs=nnx.Rngs(0), kernel_init=init)
        adapted = trained(jlora.nnx.wrap(plain, jlora.LoraSpec(rank=2)))
        specs = nnx.get_partition_spec(nnx.state(adapted, nnx.LoRAParam))["lora_params"]["kernel"]
        assert tuple(specs["lora_b"].get_value()) == (None, "model")
        assert not any(tuple(specs["lora_a"].get_value()))
        assert adapted.lora_params["kernel"].lora_b[...].sharding.spec == jax.P(None, "model")
        found = nnx.jit(lambda m, x: m(x))(adapted, X)
        assert error(found, jlora.nnx.merge(adapted)(X)) <= 1e-5


def test_a_quantised_base():
    plain = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    params = nnx.as_pure(nnx.state(plain, nnx.Param))
    x = jnp.ones((2, 64))
    quantised = jlora.quant.quantize(params, "int8", targets="kernel")
    adapted = jlora.nnx.wrap(plain, jlora.LoraSpec(rank=2))
    jlora.nnx.update(adapted, jlora.wrap(quantised, jlora.LoraSpec(rank=2)))
    trained(adapted)
    tree = jlora.nnx.tree(adapted)
    assert "quantised: 1 leaf" in str(jlora.summary(tree))
    assert error(adapted(x), jlora.nnx.merge(adapted, dtype=jnp.float32)(x)) <= 1e-5
    grads = nnx.grad(lambda m: (m(x) ** 2).mean(), argnums=nnx.DiffState(0, nnx.LoRAParam))(adapted)
    assert all(jnp.isfinite(g).all() and jnp.any(g != 0) for g in jax.tree.leaves(grads))


def test_settings_of_apply():
    class Odd(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones((WIDTH, WIDTH)))

        def __call__(self, x):
            return x @ jnp.sort(self.kernel[...], axis=0)

    with pytest.raises(jlora.DenseFallbackError):
        jlora.nnx.wrap(Odd(), jlora.LoraSpec(rank=2), fallback="error")(X)
    with pytest.raises(ValueError, match="strategy must be one of"):
        jlora.nnx.wrap(Odd(), jlora.LoraSpec(rank=2), strategy="fast")


def test_an_adapted_kernel_is_not_assigned_to():
    class Assigns(nnx.Module):
        def __init__(self):
            self.first = nnx.Param(jnp.ones((WIDTH, WIDTH)))
            self.other = nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            self.first[...] = self.first[...] * 0.9
            return self.other(x @ self.first[...])

    spec = jlora.LoraSpec(rank=2, targets="first", axes={"first": jlora.Axes(0, 1)})
    with pytest.raises(TypeError, match="the call assigns to first, which is adapted"):
        jlora.nnx.wrap(Assigns(), spec, fallback="ignore")(X)
    whole = jlora.nnx.wrap(Assigns(), jlora.LoraSpec(rank=2, targets="other/kernel", train="first"))
    whole(X)
    assert error(whole.base_model.first[...], jnp.full((WIDTH, WIDTH), 0.9)) <= 1e-7


def test_what_a_call_returns_of_the_model_is_seen_through_its_adapters():
    class Hands(nnx.Module):
        def __init__(self):
            self.inner = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))

        def parts(self):
            return {"inner": self.inner}

        def kernel_of(self):
            return self.inner.kernel[...]

    adapted = trained(jlora.nnx.wrap(Hands(), jlora.LoraSpec(rank=2), fallback="ignore"))
    merged = jlora.nnx.merge(adapted)
    assert error(adapted.parts()["inner"](X), merged.inner(X)) <= 1e-5
    assert error(adapted.kernel_of(), merged.kernel_of()) <= 1e-6


def test_sites():
    class Transposed(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones((3, WIDTH)))

        def __call__(self, x):
            return x @ self.weight[...].T

    sites = jlora.nnx.sites(Transposed(), X)
    adapted = trained(jlora.nnx.wrap(Transposed(), jlora.LoraSpec(rank=2), sites=sites))
    assert adapted.lora_params["weight"].lora_a.shape == (WIDTH, 2)
    assert error(adapted(X), jlora.nnx.merge(adapted)(X)) <= 1e-5


def test_the_model_abstractly():
    """`nnx.eval_shape`: the plan of an adapted model, without a byte of it."""
    plan = nnx.eval_shape(lambda: jlora.nnx.wrap(model(), SPEC))
    shapes = lambda m: {path: x.shape for path, x in nnx.to_flat_state(nnx.state(m, nnx.LoRAParam))}
    assert shapes(plan) == shapes(jlora.nnx.wrap(model(), SPEC))


def test_errors_say_the_way_out():
    with pytest.raises(TypeError, match=r"found dict; trees: jlora.wrap"):
        jlora.nnx.wrap({"kernel": X}, SPEC)
    adapted = jlora.nnx.wrap(model(), SPEC)
    for again in (adapted, adapted.blocks[0]):
        with pytest.raises(TypeError, match="adapted already"):
            jlora.nnx.wrap(again, SPEC)
    for verb in (jlora.nnx.merge, jlora.nnx.unwrap, jlora.nnx.tree):
        with pytest.raises(TypeError, match=r"takes a model that jlora.nnx.wrap returned, found Model"):
            verb(model())
    with pytest.raises(TypeError, match=r"jlora\.nnx\.wrap"):
        jlora.wrap(model(), SPEC)(X)


def test_a_kernel_that_is_read_has_its_adapter():
    """As where a tied head is outside of the module; gradients go to the factors."""
    adapted = trained(jlora.nnx.wrap(model(), SPEC))
    merged = jlora.nnx.merge(adapted)
    head = lambda model: X @ model.embed.embedding[...].T
    assert error(head(adapted), head(merged)) <= 1e-5
    kernel = lambda model: model.blocks[0].attention.query.kernel
    assert error(kernel(adapted)[...], kernel(merged)[...]) <= 1e-6 and isinstance(kernel(adapted), nnx.Param)
    grads = nnx.grad(lambda model: (head(model) ** 2).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(adapted)
    assert all(g.any() for g in jax.tree.leaves(grads["lora_params"]["embed"]))
    with pytest.raises(TypeError, match="an adapted kernel that is read from the model is computed"):
        adapted.embed.embedding[...] = jnp.zeros((11, WIDTH))
    assert adapted.head.kernel is adapted.base_model.head.kernel  # that of a frozen layer is the variable itself


class Speaks(nnx.Module):
    """Decides on the host, and by a switch of its own."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.deterministic = False

    def __call__(self, x):
        x = self.layer(x)
        return x if self.deterministic else self.dropout(x)

    def until(self, x):
        steps = 0
        while steps < 5 and float(x.sum()) <= 0:
            x, steps = self(x), steps + 1
        return steps

    def __len__(self):
        return 7

    def __getitem__(self, key):
        return self.layer(X)[key]


def test_switches_of_the_models_own():
    adapted = trained(jlora.nnx.wrap(Speaks(nnx.Rngs(0)), jlora.LoraSpec(rank=2)))
    assert adapted.deterministic is False
    adapted.deterministic = True
    assert adapted.base_model.deterministic and error(adapted(X), adapted(X)) == 0
    assert adapted.dropout.deterministic is False  # a part's is its own
    assert len(adapted) == 7 and error(adapted[0], jlora.nnx.merge(adapted)[0]) <= 1e-5
    assert repr(adapted.layer).startswith("layer of an adapted Speaks: Linear(")
    del adapted.deterministic
    assert not hasattr(adapted.base_model, "deterministic")


def test_values_on_the_host():
    """A call is traced; an unbound method is not, and sees the adapters all the same."""
    adapted = trained(jlora.nnx.wrap(Speaks(nnx.Rngs(0)), jlora.LoraSpec(rank=2)))
    adapted.deterministic = True
    with pytest.raises(jax.errors.ConcretizationTypeError) as caught:
        adapted.until(X)
    assert "Model.generate(model, ...)" in "".join(caught.value.__notes__)
    assert Speaks.until(adapted, X) == jlora.nnx.merge(adapted).until(X)


def test_functions_of_trees_name_those_of_models():
    adapted = jlora.nnx.wrap(model(), SPEC)
    for call in (jlora.merge, jlora.unwrap, jlora.summary, lambda tree: jlora.apply(lambda p: p)(tree)):
        with pytest.raises(ValueError, match=r"this is an adapted NNX model: jlora\.nnx\.tree\(model\)"):
            call(adapted)
    with pytest.raises(TypeError, match=r"nnx.update takes a wrapped tree"):
        jlora.nnx.update(adapted, jlora.unwrap(jlora.nnx.tree(adapted)))
    with pytest.raises(ValueError, match="ambiguous") as caught:
        jlora.nnx.wrap(Stack(nnx.Rngs(0)), jlora.LoraSpec(rank=2))
    assert "jlora.nnx.sites(model, *args)" in "".join(caught.value.__notes__)


def test_dropout_of_one_kernel_and_of_a_tree_that_comes_later():
    spec = jlora.LoraSpec(rank=2, overrides={"first": {"dropout": 0.5}})
    adapted = trained(jlora.nnx.wrap(Tied(nnx.Rngs(0)), spec))
    assert error(adapted(X), adapted(X)) > 1e-3
    later = trained(jlora.nnx.wrap(Tied(nnx.Rngs(0)), jlora.LoraSpec(rank=2)))
    assert error(later(X), later(X)) == 0
    jlora.nnx.update(later, jlora.nnx.tree(adapted))
    assert error(later(X), later(X)) > 1e-3


def test_wrap_refuses_a_module():
    with pytest.raises(TypeError, match=r"nnx\.Module: jlora\.nnx\.wrap"):
        jlora.wrap(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jlora.LoraSpec(rank=2))
