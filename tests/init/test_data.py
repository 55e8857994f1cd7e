"""EVA, CorDA and LoRA-GA against numpy, on plain, stacked and branched kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from tests.support import error, same_bits

RANK = 3


def noise(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


PARAMS = {"up": noise(8, 16), "layers": 0.3 * noise(3, 16, 16), "table": noise(20, 8), "head": noise(16, 10)}
PARAMS = jax.device_put(PARAMS)
# Inputs with a spectrum that falls, as those of a network do.
BATCHES = [jax.device_put(noise(40, 8, seed=i) * np.float32(0.6) ** np.arange(8, dtype=np.float32)) for i in range(3)]


def model(params, x):
    x = jnp.tanh(x @ params["up"])
    x = lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["layers"])[0]
    return x @ params["head"]


def inputs_of(batch):
    """The inputs of each kernel, written out."""
    hidden = [np.tanh(np.asarray(batch) @ np.asarray(PARAMS["up"]))]
    for w in np.asarray(PARAMS["layers"]):
        hidden.append(hidden[-1] + np.tanh(hidden[-1] @ w))
    return np.asarray(batch), np.stack(hidden[:-1]), hidden[-1]


def plan(params=PARAMS, **settings):
    spec = jlora.LoraSpec(targets=["up", "layers", "head"], rank=RANK, **settings)
    return jlora.wrap(params, spec, sites=jlora.sites(model, PARAMS, BATCHES[0]))


@functools.cache
def wrapped(**settings):
    return jax.jit(lambda params: plan(params, **settings))(PARAMS)


def shapes(**settings):
    return jax.eval_shape(lambda params: plan(params, **settings), PARAMS)


def projector(columns):
    return columns @ np.swapaxes(columns, -1, -2)


@pytest.mark.parametrize("variant", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_eva_finds_the_directions_of_most_variance(variant):

    @jax.jit
    def started(params, batches):
        params = jlora.init.eva(model, params, batches)
        return params, jlora.apply(model)(params, batches[0]), model(PARAMS, batches[0])

    params, found, expected = started(wrapped(variant=variant), BATCHES)
    assert error(found, expected) <= 2e-6
    every = [np.concatenate(x, axis=-2) for x in zip(*map(inputs_of, BATCHES), strict=True)]
    for name, x in zip(("up", "layers", "head"), every, strict=True):
        _, _, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
        leading = np.swapaxes(vt[..., :RANK, :], -1, -2)
        columns = np.asarray(params[name].lora_a, np.float64)
        np.testing.assert_allclose(projector(columns), projector(leading), atol=2e-3)
        np.testing.assert_allclose(np.abs(np.sum(columns * leading, -2)), 1, atol=2e-3)  # one by one, in order
        assert not np.any(params[name].lora_b)
    assert same_bits(jlora.unwrap(params), PARAMS)


def test_eva_leaves_embeddings_alone():
    """Beside a kernel of DoRA."""
    fn = lambda params, tokens: params["table"][tokens] @ params["up"]
    tokens = np.array([1, 2, 3, 3, 7, 9, 11, 12], np.int32)
    spec = jlora.LoraSpec(targets=["table", "up"], rank=2, variant="dora")

    @jax.jit
    def both(tree):
        params = jlora.wrap(tree, spec, sites=jlora.sites(fn, tree, tokens))
        return params, jlora.init.eva(fn, params, [tokens], passes=6)

    params, after = both({"table": PARAMS["table"], "up": PARAMS["up"]})
    assert same_bits(after["table"], params["table"])
    _, _, vt = np.linalg.svd(np.asarray(PARAMS["table"])[tokens])
    np.testing.assert_allclose(projector(np.asarray(after["up"].lora_a)), projector(vt[:2].T), atol=1e-2)


def test_eva_of_a_convolution_sees_its_patches():
    fn = lambda params, x: lax.conv_general_dilated(
        x, params["conv"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    x = noise(2, 9, 4) * np.float32(0.5) ** np.arange(4, dtype=np.float32)

    @jax.jit
    def start(tree):
        params = jlora.wrap(tree, jlora.LoraSpec(targets="conv", rank=2), sites=jlora.sites(fn, tree, x))
        return jlora.init.eva(fn, params, [x], passes=8)["conv"].lora_a

    found = np.asarray(start({"conv": noise(3, 4, 6)})).reshape(12, 2)
    patches = np.stack([x[:, i : i + 3].reshape(2, 12) for i in range(7)]).reshape(-1, 12)
    _, _, vt = np.linalg.svd(patches)
    np.testing.assert_allclose(projector(found), projector(vt[:2].T), atol=1e-2)


def loss(params, batch):
    return jnp.square(model(params, batch) - 1).mean()


def test_lora_ga_takes_the_singular_vectors_of_the_gradient():

    @jax.jit
    def started(before, plain, batches):
        params = jlora.init.lora_ga(loss, before, batches)
        outputs = [jlora.apply(model)(tree, batches[0]) for tree in (params, before)]
        return params, outputs, [jax.grad(loss)(plain, batch) for batch in batches]

    params, (after, before), grads = started(wrapped(), PARAMS, BATCHES)
    np.testing.assert_array_equal(after, before)
    for name in ("up", "layers", "head"):
        grad = sum(np.asarray(g[name], np.float64) for g in grads)
        u, _, vt = np.linalg.svd(grad, full_matrices=False)
        node = params[name]
        scale = grad.shape[-1] ** 0.25 / 16**0.5
        left, right = np.asarray(node.lora_a, np.float64) / scale, np.asarray(node.lora_b, np.float64) / scale
        np.testing.assert_allclose(projector(left), projector(u[..., :RANK]), atol=5e-3)
        rows, expected = np.swapaxes(right, -1, -2), np.swapaxes(vt[..., RANK : 2 * RANK, :], -1, -2)
        np.testing.assert_allclose(projector(rows), projector(expected), atol=2e-2)
    assert same_bits(jlora.unwrap(params), PARAMS)


@pytest.mark.slow
def test_lora_ga_steps_nearer_to_full_training():
    """The update of W in one small step of gradient descent: its angle to the gradient, against a random start."""
    grads = sum(np.asarray(jax.grad(loss)(PARAMS, batch)["head"]) for batch in BATCHES)

    def cosine(params):
        total = lambda params: sum(jlora.apply(loss)(params, batch) for batch in BATCHES)
        node, grad = params["head"], jlora.grad(total)(params)["head"]
        step = node.lora_a @ grad.lora_b + grad.lora_a @ node.lora_b
        return float(np.sum(np.asarray(step) * grads) / np.linalg.norm(step) / np.linalg.norm(grads))

    assert cosine(jlora.init.lora_ga(loss, wrapped(), BATCHES)) > 0.9 > 0.7 > cosine(wrapped())


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_takes_the_parts_that_the_inputs_use(mode):
    before = wrapped(scaling=0.5)

    @jax.jit
    def started(before, batches):
        params = jlora.init.corda(model, before, batches, mode=mode)
        return params, jlora.apply(model)(params, batches[0]), model(PARAMS, batches[0])

    params, found, expected = started(before, BATCHES)
    assert error(found, expected) <= 2e-6
    every = [np.concatenate(x, axis=-2) for x in zip(*map(inputs_of, BATCHES), strict=True)]
    for name, x in zip(("up", "layers", "head"), every, strict=True):
        x, kernel = x.astype(np.float64), np.asarray(PARAMS[name], np.float64)
        covariance = np.swapaxes(x, -1, -2) @ x
        mean = np.trace(covariance, axis1=-2, axis2=-1)[..., None, None] / x.shape[-1]
        covariance = covariance / mean + 0.01 * np.eye(x.shape[-1])
        u, s, vt = np.linalg.svd(covariance @ kernel, full_matrices=False)
        kept = slice(RANK) if mode == "ipm" else slice(s.shape[-1] - RANK, None)
        part = np.linalg.inv(covariance) @ (u[..., kept] * s[..., None, kept]) @ vt[..., kept, :]
        node = params[name]
        assert error(0.5 * node.lora_a @ node.lora_b, part) <= 2e-3
        sizes = [np.linalg.norm(node.lora_b, axis=-1), np.sqrt(s[..., kept] / 0.5)]
        np.testing.assert_allclose(*sizes, rtol=2e-3)  # the values are halved between the two
    assert same_bits(jlora.unwrap(params), PARAMS)
    jlora.to_plain_lora(params)


def test_corda_leaves_embeddings_alone():
    fn = lambda params, tokens: params["table"][tokens] @ params["up"]
    tokens = np.array([1, 2, 3, 3, 7, 9, 11, 12], np.int32)
    small = {"table": PARAMS["table"], "up": PARAMS["up"]}
    spec = jlora.LoraSpec(targets=["table", "up"], rank=2, init="pissa", variant="dora")
    before = jlora.wrap(small, spec, sites=jlora.sites(fn, small, tokens))
    after = jlora.init.corda(fn, before, [tokens])
    assert same_bits(jlora.merge(after)["table"], jlora.merge(before)["table"])
    assert same_bits(after["table"].lora_a, before["table"].lora_a)
    assert error(jlora.apply(fn)(after, tokens), fn(small, tokens)) <= 1e-5


def explained(x):
    """What the directions of a kernel's inputs explain: shares of the variance, the mean over a stack."""
    s = np.linalg.svd(x.astype(np.float64), compute_uv=False) ** 2
    return (s / s.sum(-1, keepdims=True)).reshape(-1, s.shape[-1]).mean(0)


@pytest.mark.parametrize("rho", [1.34, 2.0, 4.0])
def test_eva_shares_out_the_ranks(rho):
    """A stack of three kernels counts three times; all ranks together stay."""
    names, counts, widths, ranks = ("up", "layers", "head"), (1, 3, 1), (8, 16, 10), (6, 2, 3)
    overrides = {name: {"rank": rank} for name, rank in zip(names, ranks, strict=True)}
    params = jlora.init.eva(model, plan(overrides=overrides), BATCHES, passes=8, rho=rho)
    every = [np.concatenate(x, axis=-2) for x in zip(*map(inputs_of, BATCHES), strict=True)]
    most = [min(round(rank * rho), width) for rank, width in zip(ranks, widths, strict=True)]
    shares = sorted((-share, i) for i, x in enumerate(every) for share in explained(x)[: most[i]])
    left, expected = 15, [0, 0, 0]
    for _, i in shares:
        if counts[i] <= left:
            expected[i], left = expected[i] + 1, left - counts[i]
    assert [params[name].rank for name in names] == expected != [*ranks]
    assert error(jlora.apply(model)(params, BATCHES[0]), model(PARAMS, BATCHES[0])) <= 2e-6
    _, _, vt = np.linalg.svd(every[0].astype(np.float64), full_matrices=False)
    columns = np.asarray(params["up"].lora_a, np.float64)
    np.testing.assert_allclose(projector(columns), projector(vt[: expected[0]].T), atol=2e-3)


def test_eva_leaves_a_kernel_that_explains_little_without_an_adapter():
    """Two directions explain the inputs of one kernel, eight those of the other; a table has no inputs."""
    fn = lambda params, x: (x[0] @ params["plane"], x[1] @ params["ball"], params["table"][jnp.array([0, 1])])
    params = jax.device_put({"plane": noise(8, 6), "ball": noise(8, 6, seed=1), "table": noise(4, 3)})
    x = jax.device_put([noise(50, 2) @ noise(2, 8), noise(50, 8, seed=2)])
    spec = jlora.LoraSpec(targets="*", rank=1, variant="dora")
    before = jlora.wrap(params, spec, sites=jlora.sites(fn, params, x))
    after = jlora.init.eva(fn, before, [x], rho=2)
    assert after["plane"].lora_a.shape == (8, 2) and after["plane"].lora_b.shape == (2, 6)
    assert after["ball"] is before["ball"].base
    assert same_bits(after["table"], before["table"])
    assert error(jlora.apply(fn)(after, x), fn(params, x)) <= 1e-6


STARTS = [jlora.init.eva, jlora.init.corda, jlora.init.lora_ga]


@pytest.mark.parametrize("init", STARTS)
def test_data_that_tell_nothing_are_refused(init):
    tree, total = wrapped(), lambda params, x: model(params, x).sum()
    with pytest.raises(ValueError, match=f"{init.__name__}: the .* of all adapted kernels are zero: no gradient flows"):
        init(lambda params, x: model(PARAMS, x).sum(), tree, BATCHES)
    with pytest.raises(ValueError, match=f"{init.__name__}: the .* of head have NaN or infinite values"):
        init(total, tree, [BATCHES[0].at[0, 0].set(jnp.nan)])
    with pytest.raises(ValueError, match=f"{init.__name__}: this tree holds 2 adapters"):
        init(total, jlora.adapters.stack([tree, tree]), BATCHES)


@pytest.mark.parametrize("passes", [0, -1, 2.0, True])
def test_passes_are_counted(passes):
    with pytest.raises(ValueError, match="eva: passes must be an integer of at least 1"):
        jlora.init.eva(model, wrapped(), BATCHES, passes=passes)


@pytest.mark.parametrize("rho", [0.5, float("nan"), float("inf"), "2", True])
def test_rho_is_a_number_of_at_least_one(rho):
    with pytest.raises(ValueError, match=r"rho must be a number of at least 1, found"):
        jlora.init.eva(model, wrapped(), BATCHES, rho=rho)


def test_ranks_are_not_chosen_under_jit():
    with pytest.raises(ValueError, match=r"eva: rho=2 chooses ranks by the data.* outside jax\.jit"):
        jax.eval_shape(lambda tree: jlora.init.eva(model, tree, BATCHES, rho=2), wrapped())


@pytest.mark.parametrize("settings", [{"mode": "pca"}, {"damp": 0.0}, {"damp": float("nan")}])
def test_settings_of_corda(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"corda: {name} must be"):
        jlora.init.corda(model, wrapped(), BATCHES, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("init", [jlora.init.eva, jlora.init.corda, jlora.init.lora_ga])
def test_placed_as_the_base(init):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "model")))
    spec = jlora.LoraSpec(targets=["up", "layers", "head"], rank=RANK)
    placed = jlora.wrap(jax.tree.map(put, PARAMS), spec, sites=jlora.sites(model, PARAMS, BATCHES[0]))
    fn = loss if init is jlora.init.lora_ga else model
    found, expected = init(fn, placed, BATCHES), init(fn, wrapped(), BATCHES)
    product = lambda node: node.lora_a @ jnp.swapaxes(node.lora_a, -1, -2)
    for name in ("up", "layers", "head"):
        assert error(product(found[name]), product(expected[name])) <= 1e-3


@pytest.mark.parametrize("init", [jlora.init.eva, jlora.init.corda, jlora.init.lora_ga])
def test_what_can_not_be_is_said(init):
    with pytest.raises(ValueError, match="batches is empty"):
        init(loss, shapes(), [])
    with pytest.raises(ValueError, match="nothing in it is wrapped"):
        init(loss, PARAMS, BATCHES)
    with pytest.raises(ValueError, match="it has VeraParam"):
        init(loss, shapes(variant="vera"), BATCHES)
    with pytest.raises(TypeError, match=r"batches is an array of shape \(40, 8\).*\[batch\]"):
        init(loss, shapes(), BATCHES[0])
    with pytest.raises(
        ValueError, match=r"lora_ga: .* head of .* maps 16 to 10, so it has 10, fewer than 2 x 6\. .*'rank': 5"
    ):
        tree = jax.eval_shape(lambda params: jlora.wrap(params, jlora.LoraSpec(targets="head", rank=6)), PARAMS)
        jlora.init.lora_ga(loss, tree, BATCHES)
