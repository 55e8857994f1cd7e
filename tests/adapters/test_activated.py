"""An adapter that acts at some tokens only: against products with a mask, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from jlora.variants import VARIANTS
from tests.adapters.support import WIDTH, adapter, base, noisy
from tests.support import error, same_bits

ROWS, TOKENS = 3, 7
X = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, TOKENS, WIDTH)), jnp.float32)
ACTIVE = np.arange(TOKENS) >= np.array([[4], [0], [TOKENS]])  # from the fifth token on, all, none
BASE = base()


def mixed(x, past=None):
    """Each token is the mean of itself and those before it: here tokens meet, as in attention."""
    past = jnp.zeros((x.shape[0], 0, x.shape[2])) if past is None else past
    whole = jnp.concatenate([past, x], 1)
    sums = jnp.cumsum(whole, 1)[:, past.shape[1] :]
    return sums / jnp.arange(past.shape[1] + 1, whole.shape[1] + 1)[:, None], whole


def model(params, x):
    """Of (rows, tokens, WIDTH): layers in a loop, and a head."""

    def layer(x, kernels):
        return x + jnp.tanh(mixed(x)[0] @ kernels["up"]["kernel"]) @ kernels["down"]["kernel"], None

    x, _ = lax.scan(layer, x, params["layers"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def by_hand(params, x, active):
    """The same with W + m s A B in each product, m being 1 at active tokens."""

    def times(x, node, i=...):
        update = (x @ node.lora_a[i]) @ node.lora_b[i] * node.scale
        return x @ node.base[i] + jnp.where(active[..., None], update, 0)

    up, down = (params["layers"][name]["kernel"] for name in ("up", "down"))
    for i in range(len(up.base)):
        x = x + times(jnp.tanh(times(mixed(x)[0], up, i)), down, i)
    return times(x, params["head"]["kernel"]) + params["head"]["bias"]


@pytest.fixture(scope="module")
def tree():
    return adapter(BASE, 1, rank=2)


RUN = jax.jit(jlora.adapters.activated(model))


def test_is_a_product_with_a_mask(tree):
    assert error(RUN(tree, ACTIVE, X), by_hand(tree, X, ACTIVE)) <= 2e-6


def test_at_all_tokens_it_is_the_adapter_and_at_none_the_base(tree):
    everywhere = np.ones_like(ACTIVE)
    assert error(RUN(tree, everywhere, X), jlora.apply(model)(tree, X)) <= 2e-6
    assert error(RUN(tree, ~everywhere, X), model(BASE, X)) <= 2e-6


def test_tokens_before_the_first_active_one_are_the_bases(tree):
    """Bit for bit, whatever the adapter is: so that a cache of them serves all adapters."""
    found, none = RUN(tree, ACTIVE, X), RUN(tree, np.zeros_like(ACTIVE), X)
    assert same_bits(found[0, :4], none[0, :4]) and same_bits(found[2], none[2])
    assert same_bits(RUN(adapter(BASE, 2, rank=2), ACTIVE, X)[0, :4], none[0, :4])


def test_gradients(tree):
    loss = lambda run: lambda half, x: jnp.square(run(jlora.combine(half, jlora.partition(tree)[1]), x)).mean()
    half = jlora.partition(tree)[0]
    found = jax.jit(jax.grad(loss(lambda t, x: jlora.adapters.activated(model)(t, ACTIVE, x)), (0, 1)))(half, X)
    expected = jax.grad(loss(lambda t, x: by_hand(t, x, ACTIVE)), (0, 1))(half, X)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert error(ours, theirs) <= 1e-5
    none = jax.grad(loss(lambda t, x: jlora.adapters.activated(model)(t, ACTIVE & False, x)))(half, X)
    assert not any(np.any(x) for x in jax.tree.leaves(none))


def test_steps_with_a_cache(tree):
    """The tokens up to the invocation with the base, then chunks of several tokens and of one, with the adapter."""
    tree = {"up": jlora.wrap({"k": BASE["head"]["kernel"]}, jlora.LoraSpec("k", rank=2))["k"]}
    tree = noisy(tree, 2)

    def step(params, x, past):
        y, past = mixed(x, past)
        return y @ params["up"], past

    active = np.arange(TOKENS) >= np.array([[3], [3], [3]])
    whole = jlora.adapters.activated(lambda p, x: step(p, x, None)[0])(tree, active, X)
    y, past = step({"up": tree["up"].base}, X[:, :3], None)
    made = [y]
    for part in (slice(3, 6), slice(6, 7)):
        y, past = jlora.adapters.activated(step)(tree, active[:, part], X[:, part], past)
        made.append(y)
    assert error(jnp.concatenate(made, 1), whole) <= 2e-6


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "lora"])
def test_variants_whose_update_is_a_product_act_so_and_the_others_are_refused(variant):
    params = {"kernel": jnp.asarray(np.random.default_rng(3).normal(size=(8, 8)), jnp.float32)}
    fn = lambda p, x: x @ p["kernel"]
    tree = noisy(jlora.wrap(params, jlora.LoraSpec(variant=variant, rank=2)), 4)
    run = jlora.adapters.activated(fn)
    kin = {"lora_fa", "vera", "adalora", "loha", "lokr", "miss", "hra", "gralora", "delora", "randlora", "pvera"}
    if variant not in kin:
        with pytest.raises(
            TypeError, match=f"activated: kernel is a {type(tree['kernel']).__name__}, whose update is no"
        ):
            run(tree, ACTIVE, X)
        return
    expected = jnp.where(ACTIVE[..., None], jlora.apply(fn)(tree, X), fn(params, X))
    assert error(run(tree, ACTIVE, X), expected) <= 5e-6


EVERYWHERE = {
    "trained in full": ({"train": ("head",)}, "head/bias is trained in full, by train= or bias="),
    "biases": ({"targets": "head/kernel", "bias": "lora_only"}, "head/bias is trained in full, by train= or bias="),
    "of B": ({"targets": "head/kernel", "lora_bias": True}, "head/bias is the bias of an adapter"),
    "rows": ({"train_tokens": {"table": (1, 2)}}, "table has rows that are trained, by train_tokens="),
}


@pytest.mark.parametrize("what", EVERYWHERE)
def test_what_would_act_at_all_tokens_is_refused(what):
    settings, told = EVERYWHERE[what]
    settings = {"targets": "layers/*/kernel", "rank": 2} | settings
    axes = {"layers/*/kernel": jlora.Axes((1,), (2,), (0,)), "table": jlora.Axes((0,), (1,))}
    used = {
        name: x for name, x in axes.items() if name == settings["targets"] or name in settings.get("train_tokens", ())
    }
    params = BASE | {"table": jnp.ones((9, WIDTH))}
    with pytest.raises(TypeError, match=f"activated: {told}"):
        RUN(jlora.wrap(params, jlora.LoraSpec(**settings, axes=used)), ACTIVE, X)


def test_tokens_have_one_reading():
    """Their axis is told by the row: where it lies in the product is the model's own affair."""
    tree = noisy(jlora.wrap({"kernel": BASE["head"]["kernel"]}, jlora.LoraSpec(rank=2)), 5)
    run = lambda fn, active, x: jlora.adapters.activated(fn)(tree, active, x)
    expected = run(lambda p, x: x @ p["kernel"], ACTIVE, X)
    turned = lambda p, x: jnp.swapaxes(jnp.swapaxes(x, 0, 1) @ p["kernel"], 0, 1)
    flat = lambda p, x: (x.reshape(-1, WIDTH) @ p["kernel"]).reshape(*x.shape[:2], -1)
    left = lambda p, x: jnp.einsum("io,bti->bto", p["kernel"], x)
    for fn in (turned, flat, left):
        assert error(run(fn, ACTIVE, X), expected) <= 2e-6
    # as many tokens as inputs, and a row's batch that is as long
    square = jnp.concatenate([X, X[:, :1]], 1)
    active = np.arange(8) >= np.array([[4], [0], [8]])
    wanted = jnp.where(
        active[..., None], jlora.apply(lambda p, x: x @ p["kernel"])(tree, square), square @ BASE["head"]["kernel"]
    )
    assert error(run(turned, active, square), wanted) <= 2e-6

    pooled = lambda p, x: x.mean(1) @ p["kernel"]
    with pytest.raises(
        ValueError, match=r"kernel is multiplied with vectors of shape \(1,\) for one row; expected is .*7 tokens"
    ):
        run(pooled, ACTIVE, X)
    pairs = lambda p, x: (x[:, :, None] + x[:, None])[..., :] @ p["kernel"]
    with pytest.raises(ValueError, match=r"vectors of shape \(1, 7, 7\) for one row"):
        run(pairs, ACTIVE, X)
    with pytest.raises(ValueError, match=r"vectors of shape \(1, 6\) for one row"):
        run(lambda p, x: x[:, 1:] @ p["kernel"], ACTIVE, X)
    with pytest.raises(ValueError, match="kernel is used in a way that is no plain product"):
        run(lambda p, x: x @ jnp.tanh(p["kernel"]), ACTIVE, X)


def test_tables_and_convolutions_are_refused():
    table = jlora.wrap({"embedding": jnp.ones((9, 4))}, jlora.LoraSpec(targets="embedding", rank=2))
    with pytest.raises(ValueError, match="activated: embedding is used in a way that is no plain product"):
        jlora.adapters.activated(lambda p, ids: p["embedding"][ids])(table, ACTIVE, np.zeros((ROWS, TOKENS), int))
    conv = lambda p, x: lax.conv_general_dilated(x, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    tree = jlora.wrap({"kernel": jnp.ones((3, WIDTH, 4))}, jlora.LoraSpec(rank=2, axes={"*": jlora.Axes((0, 1), (2,))}))
    with pytest.raises(ValueError, match="activated: kernel is used in a way that is no plain product"):
        jlora.adapters.activated(conv)(tree, ACTIVE, X)


def test_explain_tells_its_uses(tree):
    found = jlora.explain(jlora.adapters.activated(model), tree, ACTIVE, X)
    assert {use.path for use in found.uses} == {"layers/up/kernel", "layers/down/kernel", "head/kernel"}
    assert all(use.factored for use in found.uses)


@pytest.mark.parametrize("active", [ACTIVE.astype(int), ACTIVE[0], np.float32(1)])
def test_active_is_a_mask_of_rows_and_tokens(tree, active):
    with pytest.raises(TypeError, match=r"booleans of shape \(rows, tokens\), found"):
        RUN(tree, active, X)


def test_what_does_not_fit_is_said(tree):
    with pytest.raises(ValueError, match="nothing in this one is wrapped"):
        RUN(BASE, ACTIVE, X)
    with pytest.raises(ValueError, match="activated: there are 2 rows, and an argument of shape"):
        RUN(tree, ACTIVE[:2], X)
    with pytest.raises(TypeError, match="activated takes no keyword arguments, found x"):
        jlora.adapters.activated(model)(tree, ACTIVE, x=X)
    with pytest.raises(ValueError, match="activated: fallback must be one of"):
        jlora.adapters.activated(model, fallback="never")
    with pytest.raises(ValueError, match="this tree holds 2 adapters"):
        RUN(jlora.adapters.stack([tree, tree]), ACTIVE, X)


def test_dropout_is_of_each_row(tree):
    dropped = adapter(BASE, 1, rank=2, dropout=0.5)
    run = jlora.adapters.activated(model, rng=jax.random.key(0))
    same = jnp.broadcast_to(X[:1], X.shape)
    found = run(dropped, np.ones_like(ACTIVE), same)
    assert error(found[0], found[1]) > 1e-3
    none = run(dropped, np.zeros_like(ACTIVE), same)
    assert error(none, model(BASE, same)) <= 2e-6


def searched(ids, tokens):
    """Position by position."""
    found = np.zeros(np.shape(ids), bool)
    for row, own in enumerate(ids):
        starts = [i for i in range(len(own) - len(tokens) + 1) if list(own[i : i + len(tokens)]) == list(tokens)]
        if starts:
            found[row, starts[-1] :] = True
    return found


@pytest.mark.parametrize("tokens", [[1], [1, 2], [2, 2], [0, 1, 0], [1] * 9])
def test_invoked(tokens):
    ids = np.random.default_rng(1).integers(0, 3, (200, 8)).astype(np.int32)
    found = jax.jit(lambda ids: jlora.adapters.invoked(ids, tokens))(ids)
    np.testing.assert_array_equal(found, searched(ids, tokens))


@pytest.mark.parametrize(
    "ids, tokens", [([[1, 2]], []), ([[1, 2]], [1.5]), ([[1, 2]], "ab"), ([1, 2], [1]), ([[1.0, 2.0]], [1])]
)
def test_what_invokes_are_whole_numbers(ids, tokens):
    with pytest.raises(ValueError, match=r"invoked: (tokens are the ids|ids are whole numbers)"):
        jlora.adapters.invoked(np.array(ids), tokens)


def test_ids_are_padded_and_tokens_known():
    with pytest.raises(ValueError, match=r"invoked: ids are one array .* padded"):
        jlora.adapters.invoked([[1, 2], [1]], [1])
    with pytest.raises(ValueError, match="tokens a list of whole numbers that is known"):
        jax.jit(lambda tokens: jlora.adapters.invoked(jnp.ones((2, 3), int), tokens))(jnp.array([1]))
