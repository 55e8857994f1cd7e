"""Every variant against a reference in numpy and float64, written from the papers: merged kernels, gradients, inits.

A reference knows one kernel as a matrix (in, out) and the node's arrays as matrices; here alone the axes are taken
apart and put together. Gradients are central differences of the reference.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jlora
from jlora.variants import VARIANTS
from jlora.variants.dense import drawn
from tests.support import evaluated, same_bits
from tests.variants.cases import moved, noise

IN, OUT, RANK, ALPHA = 8, 12, 2, 3.0
SCALE = ALPHA / RANK


# The uses: functions linear in their kernel, so that the loss sum(C * y) is the sum of G * W with a known G.


@dataclasses.dataclass(frozen=True)
class Use:
    """A function of a kernel and of an input, with the gradient of sum(C * y) by the kernel."""

    shape: tuple[int, ...]
    axes: jlora.Axes
    fn: Callable
    x: Any
    pull: Callable

    @property
    def base(self):
        return noise(*self.shape)

    def run(self, params, x):
        return self.fn(params["w"], x)


def product(equation: str, x_shape, shape, axes) -> Use:
    (xs, ws), out = equation.split("->")[0].split(","), equation.split("->")[1]
    fn = lambda w, x: jnp.einsum(equation, x, w)
    pull = lambda x, c: np.einsum(f"{xs},{out}->{ws}", x, c)
    return Use(shape, jlora.Axes(*axes), fn, noise(*x_shape), pull)


def _convolved(w, x):
    return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolved_pull(x, c):
    (_, h, w, _), (_, height, width, _) = c.shape, x.shape
    places = [(i, j) for i in range(height - h + 1) for j in range(width - w + 1)]
    grads = [np.einsum("nhwi,nhwo->io", x[:, i : i + h, j : j + w], c) for i, j in places]
    return np.stack(grads).reshape(height - h + 1, width - w + 1, *grads[0].shape)


TOKENS = jnp.asarray([3, 0, 7, 3, 3])


def _looked_up_pull(tokens, c):
    grad = np.zeros((IN, OUT))
    np.add.at(grad, tokens, c)
    return grad


USES = {
    "dense": product("td,df->tf", (5, IN), (IN, OUT), ((0,), (1,))),
    "out_in": product("td,fd->tf", (5, IN), (OUT, IN), ((1,), (0,))),
    "heads": product("td,dhk->thk", (5, IN), (IN, 3, 4), ((0,), (1, 2))),
    "heads_in": product("thk,hkd->td", (5, 2, IN), (2, IN, 6), ((0, 1), (2,))),
    "stacked": product("ltd,ldf->ltf", (3, 5, IN), (3, IN, OUT), ((1,), (2,), (0,))),
    "stacked_inside": product("ltd,dlhk->lthk", (3, 5, IN), (IN, 3, 3, 4), ((0,), (2, 3), (1,))),
    "some_layers": product("ltd,dlf->ltf", (4, 5, IN), (IN, 4, OUT), ((0,), (2,), (1,))),
    "conv": Use((3, 2, IN, OUT), jlora.Axes((0, 1, 2), (3,)), _convolved, noise(2, 5, 4, IN), _convolved_pull),
    "embedding": Use((IN, OUT), jlora.Axes((0,), (1,)), lambda w, x: w[x], TOKENS, _looked_up_pull),
}
LAYERS = (3, 1)


# The references: p has the node's arrays by name, W among them as "base"; `held` is p where no gradient flows.


def lora(p, held, node):
    start = p["start_0"] @ p["start_1"] if "start_0" in p else 0
    return p["base"] + SCALE * (p["lora_a"] @ p["lora_b"] - start)


def dora(p, held, node):
    norm = np.linalg.norm(lora(held, held, node), axis=0)
    return p["magnitude"] / norm * lora(p, held, node)


def vera(p, held, node):
    return p["base"] + p["vera_a"] @ np.diag(p["lambda_d"]) @ p["vera_b"] @ np.diag(p["lambda_b"])


def adalora(p, held, node):
    return p["base"] + SCALE * p["lora_a"] @ np.diag(p["lora_e"]) @ p["lora_b"]


def loha(p, held, node):
    return p["base"] + SCALE * (p["loha_a1"] @ p["loha_b1"]) * (p["loha_a2"] @ p["loha_b2"])


def lokr(p, held, node):
    return p["base"] + SCALE * np.kron(p["lokr_c"], p["lokr_a"] @ p["lokr_b"])


def ia3(p, held, node):
    return p["base"] @ np.diag(p["ia3_l"])


def ia3_in(p, held, node):
    return np.diag(p["ia3_l"]) @ p["base"]


def miss(p, held, node):
    """Row i gets row i mod r of M, whose columns the outputs repeat."""
    block = p.get("miss_block", p.get("miss_mini"))
    rows, columns = (np.arange(n) % m for n, m in zip(p["base"].shape, block.shape, strict=True))
    return p["base"] + block[np.ix_(rows, columns)]


def hra(p, held, node):
    """One reflection after the other."""
    kernel = p["base"]
    for u in p["hra_u"].T:
        kernel = (np.eye(len(u)) - 2 * np.outer(u, u) / (u @ u)) @ kernel
    return kernel


def road(p, held, node):
    """Each pair of outputs, half a group apart, by its own 2 x 2 matrix."""
    n, size, turn = p["base"].shape[1], node.group_size, np.zeros([p["base"].shape[1]] * 2)
    each = 2 * len(p["road_theta"]) // n
    for group in range(0, n, size):
        for i in range(size // 2):
            pair = [group + i, group + i + size // 2]
            turn[np.ix_(pair, pair)] = scaled_rotation(p["road_theta"], p["road_alpha"], group, i, size, each)
    return p["base"] @ turn.T


def scaled_rotation(theta, alpha, group, i, size, each):
    """The entries of a pair: of one angle, of one for each row, or of one for each entry."""
    at = {
        1: np.full((2, 2), group // 2 + i),
        2: group + i + np.array([[0, 0], [1, 1]]) * size // 2,
        4: 2 * group + i + np.array([[0, 2], [3, 1]]) * size // 2,
    }[each]
    theta, alpha = theta[at], alpha[at]
    return alpha * np.array([[np.cos(theta[0, 0]), -np.sin(theta[0, 1])], [np.sin(theta[1, 0]), np.cos(theta[1, 1])]])


def c3a(p, held, node):
    """Entry (i, o) is that of c at i - o, around its block."""
    size, delta = p["c3a_kernel"].shape[-1], np.zeros_like(p["base"])
    for i, o in np.ndindex(*delta.shape):
        delta[i, o] = p["c3a_kernel"][o // size, i // size, (i - o) % size] / len(delta)
    return p["base"] + delta


def gralora(p, held, node):
    """Block by block."""
    a, b, delta = p["gralora_a"], p["gralora_b"], np.zeros_like(p["base"])
    (k, n, _, _), m = a.shape, b.shape[-1]
    for i, j in np.ndindex(k, k):
        delta[i * n : (i + 1) * n, j * m : (j + 1) * m] = a[i, :, j] @ b[j, i]
    return p["base"] + SCALE * (delta + (p["hybrid_a"] @ p["hybrid_b"] if "hybrid_a" in p else 0))


def matrix_of(p, node):
    """The coefficients, (outputs, inputs), at their places."""
    whole = np.zeros(p["base"].T.shape)
    whole[tuple(drawn(node.seed, whole.shape, len(p["spectrum"])))] = p["spectrum"]
    return whole


def fourierft(p, held, node):
    return p["base"] + node.scaling * np.fft.ifft2(matrix_of(p, node)).real.T


def waveft(p, held, node):
    """Neighbours are a sum and a difference of two coefficients, of both axes.

    PEFT's upper right band has the differences along the outputs, and its lower left one those along the inputs.
    """
    whole = matrix_of(p, node)
    if node.wavelet:
        rows, columns = (n // 2 for n in whole.shape)
        right, left = whole[:rows, columns:].copy(), whole[rows:, :columns].copy()
        of = lambda y, a, b: np.add(y, np.einsum("ij,p,q->ipjq", *(a, *b)).reshape(whole.shape))
        sums, differences = np.array([1, 1]) / 2**0.5, np.array([1, -1]) / 2**0.5
        made = of(0, whole[:rows, :columns], (sums, sums))
        made = of(made, right, (differences, sums))
        made = of(made, left, (sums, differences))
        whole = of(made, whole[rows:, columns:], (differences, differences))
    return p["base"] + node.scaling * whole.T


def shira(p, held, node):
    outputs, inputs = p["shira_places"].astype(int)
    delta = np.zeros_like(p["base"])
    delta[inputs, outputs] = p["shira_weight"]
    return p["base"] + delta


def randlora(p, held, node):
    """Its ranks are counted by r and n on the side of A, and by n and r on that of B."""
    small = np.stack([d * a * p["randlora_gamma"][n] for ds, a in zip(p["randlora_lambda"], p["bases_a"], strict=True)
                      for n, d in enumerate(ds)])  # fmt: skip
    large = p["bases_b"].reshape(len(p["bases_b"]), -1)
    ins, outs = p["base"].shape
    return p["base"] + SCALE * ((large @ small).T if ins <= outs else large @ small)


def pvera(p, held, node):
    """The means alone."""
    half = len(p["pvera_b"])
    a, d = p["pvera_a"][:, :half], p["lambda_d"][:half]
    return p["base"] + a @ np.diag(d) @ p["pvera_b"] @ np.diag(p["lambda_b"])


def hira(p, held, node):
    return p["base"] * (1 + p["hira_a"] @ p["hira_b"])


def delora(p, held, node):
    a, b = p["delora_a"], p["delora_b"]
    a, b = a / np.linalg.norm(a, axis=0), b / np.linalg.norm(b, axis=1)[:, None]
    return p["base"] + np.linalg.norm(p["base"], axis=1)[:, None] * p["delora_lambda"] / len(b) * (a @ b)


def oft(p, held, node):
    """R_0 R_1 ... W, with R_i = P^T diag(blocks) P where P brings elements that are size^i apart next to each other."""
    size, n, rotation = node.size, len(p["base"]), np.eye(len(p["base"]))
    for i, entries in enumerate(p["oft_q"]):
        count = n // (len(entries) * size)  # the places of a window, which share their blocks
        blocks = np.kron(np.eye(count), block_diagonal([cayley(q, size) for q in entries]))
        permutation = apart(n, size, size**i)
        rotation = rotation @ permutation.T @ blocks @ permutation
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(n), atol=1e-12)
    return rotation @ p["base"]


def cayley(entries, size):
    q = np.zeros((size, size))
    q[np.triu_indices(size, 1)] = entries
    q = q - q.T
    return (np.eye(size) - q) @ np.linalg.inv(np.eye(size) + q)


def block_diagonal(blocks):
    whole = np.zeros([sum(len(block) for block in blocks)] * 2)
    for i, block in enumerate(blocks):
        whole[i * len(block) : (i + 1) * len(block), i * len(block) : (i + 1) * len(block)] = block
    return whole


def apart(n, size, stride):
    """The permutation matrix that brings elements `stride` apart, `size` of them, next to each other."""
    order = [
        first + within + stride * j
        for first in range(0, n, size * stride)
        for within in range(stride)
        for j in range(size)
    ]
    return np.eye(n)[order]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A variant with its settings, its reference, and the arrays of its nodes as the docstrings give them."""

    reference: Callable
    trained: dict[str, str]
    frozen: dict[str, str]
    settings: dict[str, Any]
    uses: list[str]
    std: float

    def wrapped(self, name: str):
        """The kernel of a use, wrapped and some way from its start."""
        use = USES[name]
        layers = {"layers": LAYERS} if name == "some_layers" else {}
        spec = jlora.LoraSpec(targets="w", rank=RANK, alpha=ALPHA, **self.settings, **layers)
        params = {"w": use.base}
        return moved(jlora.wrap(params, spec, sites=jlora.sites(use.run, params, use.x)), self.std)


PAIR = {"lora_a": "batch in .", "lora_b": "batch . out"}
START = {"start_0": "batch in .", "start_1": "batch . out"}
LOHA = {"loha_a1": "batch in .", "loha_b1": "batch . out", "loha_a2": "batch in .", "loha_b2": "batch . out"}
MAGNITUDE, NORM2, TURNS = {"magnitude": "batch out"}, {"norm2": "batch out"}, {"oft_q": "batch . . ."}
VERA = {"vera_a": "in .", "vera_b": ". out"}
LOKR = {"lokr_c": "batch . .", "lokr_a": "batch . .", "lokr_b": "batch . ."}
ROAD = {"road_theta": "batch .", "road_alpha": "batch ."}
GRALORA = {"gralora_a": "batch . . . .", "gralora_b": "batch . . . ."}
HYBRID = {"hybrid_a": "batch in .", "hybrid_b": "batch . out"}
HIRA = {"hira_a": "batch in .", "hira_b": "batch . out"}
DELORA = {"delora_a": "batch in .", "delora_b": "batch . out", "delora_lambda": "batch ."}
SPECTRUM = {"spectrum": "batch ."}
RANDLORA = {"randlora_lambda": "batch . .", "randlora_gamma": "batch . ."}
BASES = {"bases_a": ". .", "bases_b": ". . ."}
PVERA = {"pvera_a": "in .", "pvera_b": ". out"}
FEW, TURNED = ["dense", "heads", "some_layers"], [name for name in USES if name != "embedding"]

PRODUCTS = [name for name in TURNED if name != "conv"]


def kind(reference, trained, frozen=(), uses=tuple(USES), std=0.3, **settings):
    return Kind(reference, trained, dict(frozen), settings, list(uses), std)


KINDS = {
    "lora": kind(lora, PAIR),
    "lora+orthogonal": kind(lora, PAIR, init="orthogonal", uses=FEW),
    "lora+pissa": kind(lora, PAIR, START, init="pissa"),
    "lora+pissa_niter": kind(lora, PAIR, START, init="pissa_niter_4", uses=FEW),
    "lora+olora": kind(lora, PAIR, START, init="olora"),
    "lora+milora": kind(lora, PAIR, START, init="milora", uses=FEW),
    "dora": kind(dora, PAIR | MAGNITUDE, NORM2, variant="dora"),
    "dora+pissa": kind(dora, PAIR | MAGNITUDE, NORM2 | START, variant="dora", init="pissa"),
    "lora_fa": kind(lora, {"lora_b": PAIR["lora_b"]}, {"lora_a": PAIR["lora_a"]}, variant="lora_fa"),
    "vera": kind(vera, {"lambda_d": "batch .", "lambda_b": "batch out"}, VERA, variant="vera", std=1.0),
    "adalora": kind(adalora, PAIR | {"lora_e": "batch ."}, variant="adalora"),
    "loha": kind(loha, LOHA, variant="loha"),
    "lokr": kind(lokr, LOKR, variant="lokr", options={"factor": 4}),
    "lokr+wide": kind(lokr, LOKR, variant="lokr", options={"factor": 3}),
    "ia3": kind(ia3, {"ia3_l": "batch out"}, variant="ia3"),
    "ia3+in": kind(ia3_in, {"ia3_l": "batch in"}, variant="ia3", options={"on": "in"}, uses=TURNED),
    "oft": kind(oft, TURNS, variant="oft", options={"block_size": 4}, uses=TURNED),
    "boft": kind(oft, TURNS, variant="boft", options={"block_size": 2, "factors": 3}, uses=TURNED),
    "miss": kind(miss, {"miss_block": "batch . out"}, variant="miss"),
    "miss+mini": kind(miss, {"miss_mini": "batch . ."}, variant="miss", options={"mini": 3}, uses=FEW),
    "hra": kind(hra, {"hra_u": "batch in ."}, variant="hra"),
    "road": kind(road, ROAD, variant="road", uses=TURNED),
    "road_2": kind(road, ROAD, variant="road", options={"kind": "road_2", "group_size": 2}, uses=FEW),
    "road_4": kind(road, ROAD, variant="road", options={"kind": "road_4", "group_size": 4}, uses=FEW),
    "c3a": kind(c3a, {"c3a_kernel": "batch . . ."}, variant="c3a", uses=PRODUCTS, std=1.0),
    "gralora": kind(gralora, GRALORA, variant="gralora"),
    "gralora+hybrid": kind(gralora, GRALORA | HYBRID, variant="gralora", options={"hybrid": 3, "k": 1}, uses=FEW),
    "fourierft": kind(fourierft, SPECTRUM, variant="fourierft", uses=PRODUCTS, options={"frequencies": 9}),
    "waveft": kind(waveft, SPECTRUM, variant="waveft", uses=PRODUCTS, options={"frequencies": 9, "scaling": 2}),
    "waveft+entries": kind(waveft, SPECTRUM, variant="waveft", uses=FEW, options={"wavelet": False}),
    "shira": kind(shira, {"shira_weight": "batch ."}, {"shira_places": "batch . ."}, variant="shira", uses=PRODUCTS),
    "randlora": kind(randlora, RANDLORA, BASES, variant="randlora", uses=PRODUCTS),
    "pvera": kind(pvera, {"lambda_d": "batch .", "lambda_b": "batch out"}, PVERA, variant="pvera", std=1.0),
    "hira": kind(hira, HIRA, variant="hira", uses=TURNED),
    "delora": kind(delora, DELORA, {"norms": "batch in"}, variant="delora"),
}
assert {re.split(r"\+|_\d", name)[0] for name in KINDS} == {*VARIANTS}, "each variant has a reference"
CORE = ("dense", "heads", "stacked", "conv", "embedding")
PARTS = ("lora", "dora", "loha", "ia3", "oft", "lora+pissa")


def uses_of(name, i):
    """Of the core all for a kind that has a part of its own, and every second, by turns, for the others.

    A gain, which is 1 in layers that are not adapted, has some of the layers too.
    """
    gained = ("some_layers",) if name in ("dora", "ia3", "road") else ()
    core = tuple(use for use in KINDS[name].uses if use in CORE + gained)
    return core if name in PARTS else core[i % 2 :: 2]


# An embedding's A starts as zero, and so it stays where A is frozen: nothing trains.
every_kind = pytest.mark.parametrize(
    "name, uses",
    [
        pytest.param(name, uses, id=f"{name}-{label}", marks=marks)
        for i, (name, kind) in enumerate(KINDS.items())
        for label, marks, uses in (
            ("core", [], uses_of(name, i)),
            ("rest", [pytest.mark.slow], tuple(use for use in kind.uses if use not in uses_of(name, i))),
        )
        if uses
    ],
)


@functools.cache
def wrapped(name: str, use: str):
    return KINDS[name].wrapped(use)


def grouped(x, dims: str, use: Use):
    """An array with each group of the kernel's axes as one: (layers, ...), a single layer where there is no batch."""
    own = iter(x.shape)
    sizes = []
    for word in dims.split():
        axes = (0,) if word == "." else getattr(use.axes, f"{word}_axis")
        sizes.append(int(np.prod([next(own) for _ in axes], dtype=int)))
    return x.reshape(sizes if dims.startswith("batch") else [1, *sizes])


def as_matrices(kernel, use: Use):
    """A kernel as (layers, in, out)."""
    order = (*use.axes.batch_axis, *use.axes.in_axis, *use.axes.out_axis)
    return grouped(np.asarray(kernel, np.float64).transpose(order), "batch in out", use)


def arrays_of(node, kind: Kind, use: Use):
    """The node's arrays in float64, as (layers, ...)."""
    found = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    found |= {f"start_{i}": x for i, x in enumerate(found.pop("start", ()))}
    given = {n: np.asarray(found[n], np.float64) for n in (*kind.trained, *kind.frozen)}
    return {n: grouped(x, (kind.trained | kind.frozen)[n], use) for n, x in given.items()}


def effective(kind: Kind, use: Use, node, arrays, held):
    """The merged kernel by the reference, as (layers, in, out); layers that are not adapted are the base's."""
    whole = as_matrices(use.base, use).copy()
    for i, layer in enumerate(getattr(node, "layers", None) or range(len(whole))):
        pick = lambda p, i=i, layer=layer: {n: x[i % len(x)] for n, x in p.items()} | {"base": whole[layer]}
        whole[layer] = kind.reference(pick(arrays), pick(held), node)
    return whole


def differences(loss, x, step=1e-6):
    """The gradient of a function of no arguments by an array, which is changed in place and put back."""
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        at = x[i]
        x[i] = at + step
        above = loss()
        x[i] = at - step
        grad[i] = (above - loss()) / (2 * step)
        x[i] = at
    return grad


def reference_grads(name: str, use_name: str, node, is_detached=True):
    """The gradient of sum(C * y) by each trained array, as (layers, ...)."""
    kind, use = KINDS[name], USES[use_name]
    arrays = arrays_of(node, kind, use)
    held = {n: x.copy() for n, x in arrays.items()} if is_detached else arrays
    pulled = as_matrices(use.pull(*_inputs(use)), use)
    loss = lambda: (pulled * effective(kind, use, node, arrays, held)).sum()
    return loss(), {n: differences(loss, arrays[n]) for n in kind.trained}


def _inputs(use: Use):
    y = jax.eval_shape(use.fn, use.base, use.x)
    x = np.asarray(use.x)
    return x if x.dtype.kind == "i" else x.astype(np.float64), np.asarray(noise(*y.shape), np.float64)


@functools.cache
def found(name: str, uses: tuple[str, ...]):
    """Of one compiled program: for each use the merged kernel, the loss, and its gradient by each trained array."""
    tree = {use: wrapped(name, use) for use in uses}
    weights = {use: np.asarray(_inputs(USES[use])[1], np.float32) for use in uses}
    run = jlora.apply(lambda tree: {use: USES[use].run(tree[use], USES[use].x) for use in uses}, fallback="ignore")

    def loss(tree):
        losses = {use: (weights[use] * y).sum() for use, y in run(tree).items()}
        return sum(losses.values()), losses

    both = lambda tree: (jlora.merge(tree), jlora.value_and_grad(loss, has_aux=True)(tree))
    merged, ((_, losses), grads) = evaluated(both, tree)
    return {use: (merged[use]["w"], losses[use], fields_of(grads[use]["w"], KINDS[name], USES[use])) for use in uses}


def fields_of(grads, kind: Kind, use: Use):
    """The gradients in a node by name, as (layers, ...): of what trains and of nothing else."""
    names = {f.name for f in dataclasses.fields(grads) if jax.tree.leaves(getattr(grads, f.name))}
    statics = {f.name for f in dataclasses.fields(grads) if f.metadata.get("static")}
    fields = {n: getattr(grads, n) for n in names - statics}
    assert {*fields} == {*kind.trained}
    return {n: grouped(np.asarray(x, np.float64), kind.trained[n], use) for n, x in fields.items()}


def close(found, expected, tolerance):
    """Within a part of the largest value."""
    expected = np.asarray(expected, np.float64)
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape
    return bool(np.abs(found - expected).max() <= tolerance * np.abs(expected).max())


@every_kind
def test_merged_kernels_and_gradients(name, uses):
    for use, (merged, value, grads) in found(name, uses).items():
        assert_merged(name, use, merged)
        assert_gradients(name, use, value, grads)


def assert_merged(name, use, merged):
    node, base = wrapped(name, use)["w"], as_matrices(USES[use].base, USES[use])
    arrays = arrays_of(node, KINDS[name], USES[use])
    expected = effective(KINDS[name], USES[use], node, arrays, arrays)
    assert close(as_matrices(merged, USES[use]), expected, 1e-5), use
    assert not close(as_matrices(merged, USES[use]), base, 1e-2), use


def assert_gradients(name, use, found_value, found_grads):
    value, expected = reference_grads(name, use, wrapped(name, use)["w"])
    np.testing.assert_allclose(found_value, value, rtol=1e-4, atol=1e-3, err_msg=use)
    for field, x in expected.items():
        assert np.abs(x).max() > 1e-2, (use, field)
        assert close(found_grads[field], x, 1e-4), (use, field)


@pytest.mark.parametrize("use", ["dense", "stacked", "conv", "embedding"])
def test_the_gradient_does_not_flow_through_doras_norm(use):
    """The reference with a gradient through the norm differs, so that the other test can fail."""
    _, through = reference_grads("dora", use, wrapped("dora", use)["w"], is_detached=False)
    _, _, grads = found("dora", uses_of("dora", 0))[use]
    assert close(grads["magnitude"], through["magnitude"], 1e-4)
    assert not close(grads["lora_a"], through["lora_a"], 1e-2)
    assert not close(grads["lora_b"], through["lora_b"], 1e-2)


@pytest.mark.parametrize(
    "use, axis", [("dense", 0), ("heads", 0), ("stacked", 1), ("conv", (0, 1, 2)), ("embedding", 0)]
)
def test_doras_magnitude_starts_as_the_norm(use, axis):
    """Over all but the out axes; over the vocabulary for an embedding."""
    params = {"w": USES[use].base}
    spec = jlora.LoraSpec(targets="w", rank=2, variant="dora")
    node = jlora.wrap(params, spec, sites=jlora.sites(USES[use].run, params, USES[use].x))["w"]
    squares = np.square(np.asarray(params["w"], np.float64)).sum(axis)
    np.testing.assert_allclose(node.magnitude, np.sqrt(squares), rtol=1e-6)
    np.testing.assert_allclose(node.norm2, squares, rtol=1e-6)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_column_of_zeros_stays_one_in_dora(init):
    base = USES["dense"].base.at[:, 3].set(0)
    spec = jlora.LoraSpec(targets="w", rank=2, variant="dora", init=init, axes={"w": jlora.Axes((0,), (1,))})
    params, seen = trained(jlora.wrap({"w": base}, spec), "dense", optax.adam(1e-2))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(seen))
    merged = np.asarray(jax.jit(jlora.merge)(params)["w"])
    assert np.isfinite(merged).all() and not merged[:, 3].any()
    assert not np.array_equal(merged, base)


def trained(params, use, tx):
    """The tree after three steps, and the value and the gradients of each."""
    tx = jlora.optimizer(tx, params)
    loss = lambda p: (jlora.apply(USES[use].run)(p, USES[use].x) ** 2).sum()

    def step(carry, _):
        params, state = carry
        value, grads = jlora.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), (value, grads)

    run = jax.jit(lambda params: lax.scan(step, (params, tx.init(params)), length=3))
    (params, _), seen = run(params)
    return params, seen


@pytest.mark.parametrize("variant", ["shira", "c3a", "hira"])
def test_what_is_computed_as_it_is_merges_into_any_type(variant):
    """In float32, of a base of 16 bits too; what is lost in these is told."""
    params = {"kernel": noise(IN, OUT).astype(jnp.bfloat16)}
    rank = {"rank": 1} if variant != "c3a" else {}
    tree = moved(jlora.wrap(params, jlora.LoraSpec(variant=variant, **rank)), 1e-4)
    wide = jlora.merge(jax.tree.map(lambda x: x.astype(jnp.float32), tree))["kernel"]
    np.testing.assert_array_equal(jlora.merge(tree, dtype=jnp.float32)["kernel"], wide)
    with pytest.warns(jlora.MergePrecisionWarning, match="loses"):
        assert jlora.merge(tree)["kernel"].dtype == jnp.bfloat16
    assert jlora.merge_error(tree).lost["kernel"] > 0.25


def test_orthogonal_reflections_are_one_projection():
    """W - 2 Q Q^T W, whatever the order of the vectors."""
    base, u = noise(IN, OUT), noise(IN, 3)
    node = jlora.variants.HraParam(base, u, axes=jlora.Axes(0, 1), gram_schmidt=True)
    q = np.linalg.qr(np.asarray(u, np.float64))[0]
    expected = np.asarray(base, np.float64) - 2 * q @ q.T @ np.asarray(base, np.float64)
    assert close(jlora.merge({"w": node})["w"], expected, 1e-6)
    assert same_bits(jlora.merge({"w": node.identity()})["w"], base)


def test_a_start_that_is_not_the_kernel_is_refused():
    refused = {"rank": {"rank": 3}, "gram_schmidt": {"rank": 2, "options": {"gram_schmidt": True}}}
    for named, settings in refused.items():
        with pytest.raises(ValueError, match=named):
            jlora.wrap({"kernel": noise(IN, OUT)}, jlora.LoraSpec(variant="hra", **settings))


# What the factors start as.

SPECTRAL = ["dense", "out_in", "heads", "heads_in", "stacked_inside", "some_layers", "conv"]
spectral_uses = pytest.mark.parametrize("use", SPECTRAL)


def started(init: str, use: str, **settings):
    """The kernels as matrices, and A and B for each, right after `wrap`."""
    params = {"w": USES[use].base}
    layers = {"layers": LAYERS} if use == "some_layers" else {}
    spec = jlora.LoraSpec(targets="w", rank=RANK, alpha=ALPHA, init=init, **layers, **settings)
    wrapped = jlora.wrap(params, spec, sites=jlora.sites(USES[use].run, params, USES[use].x))
    assert same_bits(jlora.unwrap(wrapped), params)
    kernels = as_matrices(params["w"], USES[use])[
        [*layers.get("layers", range(len(as_matrices(params["w"], USES[use]))))]
    ]
    found = [grouped(np.asarray(getattr(wrapped["w"], n), np.float64), PAIR[n], USES[use]) for n in PAIR]
    return list(zip(kernels, *found, strict=True))


def parts(kernel, chosen: slice):
    """The part of a matrix that some of its singular values make."""
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    return u[:, chosen] * s[chosen] @ vt[chosen], s[chosen]


@pytest.mark.parametrize("init, chosen", [("pissa", slice(RANK)), ("milora", slice(-RANK, None))])
@spectral_uses
def test_pissa_and_milora_are_parts_of_the_decomposition(init, chosen, use):
    for kernel, a, b in started(init, use):
        part, values = parts(kernel, chosen)
        np.testing.assert_allclose(SCALE * a @ b, part, atol=5e-5)
        np.testing.assert_allclose(a.T @ a, np.diag(values / SCALE), atol=5e-5)
        np.testing.assert_allclose(b @ b.T, np.diag(values / SCALE), atol=5e-5)


@spectral_uses
def test_olora_is_part_of_q_r(use):
    for kernel, a, b in started("olora", use):
        q, r = np.linalg.qr(kernel.T)
        np.testing.assert_allclose(a @ b, (q[:, :RANK] @ r[:RANK]).T, atol=1e-5)
        np.testing.assert_allclose(b @ b.T, np.eye(RANK), atol=1e-5)
        signs = np.sign((b * q[:, :RANK].T).sum(1))
        np.testing.assert_allclose(signs[:, None] * b, q[:, :RANK].T, atol=1e-5)
        np.testing.assert_allclose(a * signs, r[:RANK].T, atol=1e-5)


@pytest.mark.parametrize("use", ["dense", "heads", "stacked_inside"])
def test_orthogonal_factors_have_no_product(use):
    for _, a, b in started("orthogonal", use):
        assert np.abs(a @ b).max() <= 1e-7
        assert np.linalg.matrix_rank(a, tol=1e-5) == np.linalg.matrix_rank(b, tol=1e-5) == RANK // 2


def test_orthogonal_factors_have_pefts_size():
    """Normal, on half of the ranks, over ten: the mean square of an entry is 1/200."""
    node = jlora.wrap({"kernel": jnp.zeros((600, 400))}, jlora.LoraSpec(rank=16, init="orthogonal"))["kernel"]
    assert np.square(node.lora_a).mean() == pytest.approx(1 / 200, rel=0.05)
    assert np.square(node.lora_b).mean() == pytest.approx(1 / 200, rel=0.05)
    values = np.linalg.svd(node.lora_a, compute_uv=False)
    assert values[7] > 1 and values[8] < 1e-4


@pytest.mark.parametrize("shape", [(64, 48), (48, 64)])
def test_rounds_of_iteration_come_to_the_exact_decomposition(shape):
    """On a kernel whose singular values fall off by a fifth each; each round brings the product nearer."""
    u, v = (np.linalg.qr(np.asarray(noise(n, n), np.float64))[0] for n in shape)
    n = min(shape)
    kernel = jnp.asarray(u[:, :n] * 0.8 ** np.arange(n) @ v[:n], jnp.float32)
    best, values = parts(np.asarray(kernel, np.float64), slice(4))
    found = {}
    for niter in (0, 1, 8):
        spec = jlora.LoraSpec(rank=4, alpha=6, init=f"pissa_niter_{niter}")
        node = jlora.wrap({"kernel": kernel}, spec)["kernel"]
        found[niter] = np.abs(node.scale * np.asarray(node.lora_a, np.float64) @ node.lora_b - best).max()
    assert found[0] > 10 * found[1] > 10 * found[8]
    assert found[8] <= 1e-5
    np.testing.assert_allclose(np.square(node.lora_a).sum(0) * node.scale, values, rtol=1e-4)


# Each variant with each start, each of them with both uses.
TRAINED = [
    ("lora", "pissa", "dense"),
    ("lora", "olora", "some_layers"),
    ("dora", "pissa", "some_layers"),
    ("dora", "olora", "dense"),
    ("lora_fa", "pissa", "dense"),
    ("lora_fa", "olora", "some_layers"),
]


@pytest.mark.parametrize("variant, init, use", TRAINED)
def test_training_from_parts_of_the_kernel_keeps_the_kernel(variant, init, use):
    before = {"w": USES[use].base}
    layers = {"layers": LAYERS} if use == "some_layers" else {}
    spec = jlora.LoraSpec(targets="w", rank=RANK, alpha=ALPHA, variant=variant, init=init, **layers)
    params = jlora.wrap(before, spec, sites=jlora.sites(USES[use].run, before, USES[use].x))
    params, _ = trained(params, use, optax.adamw(1e-2))
    assert same_bits(jlora.unwrap(params), before)
    assert not close(jax.jit(jlora.merge)(params)["w"], before["w"], 1e-3)


# Biases and rows.


def test_lora_bias():
    """y = x (W + s A B) + bias + s b."""
    params = {"kernel": noise(IN, OUT), "bias": noise(OUT)}
    params = moved(jlora.wrap(params, jlora.LoraSpec(rank=RANK, alpha=ALPHA, lora_bias=True)))
    model = lambda p, x: x @ p["kernel"] + p["bias"]
    x, weights = noise(5, IN), noise(5, OUT)
    loss = lambda params: (weights * jlora.apply(model)(params, x)).sum()
    value, grads = jax.jit(jlora.value_and_grad(loss))(params)
    whole = {n: np.asarray(getattr(params["kernel"], n), np.float64) for n in ("base", *PAIR)}
    bias = np.asarray(params["bias"].base, np.float64) + SCALE * np.asarray(params["bias"].lora_bias, np.float64)
    np.testing.assert_allclose(jax.jit(jlora.merge)(params)["bias"], bias, rtol=1e-6)
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    expected = (weights * (x @ lora(whole, whole, None) + bias)).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert close(grads["bias"].lora_bias, SCALE * weights.sum(0), 1e-5)
    assert close(grads["kernel"].lora_a, SCALE * x.T @ weights @ whole["lora_b"].T, 1e-5)
    assert close(grads["kernel"].lora_b, SCALE * (x @ whole["lora_a"]).T @ weights, 1e-5)
    assert grads["bias"].base is None and grads["kernel"].base is None


ROWS = (7, 3, 4)


def with_rows():
    params = {"table": noise(IN, OUT), "kernel": noise(OUT, 4)}
    return params, jlora.wrap(params, jlora.LoraSpec(targets="kernel", rank=2, train_tokens={"table": ROWS}))


def test_trained_rows_replace_those_of_the_table():
    params, tree = with_rows()
    np.testing.assert_array_equal(tree["table"].rows, np.asarray(params["table"])[[*ROWS]])
    tree = moved(tree)
    merged, base = np.asarray(jax.jit(jlora.merge)(tree)["table"]), np.asarray(params["table"])
    others = [i for i in range(IN) if i not in ROWS]
    np.testing.assert_allclose(merged[[*ROWS]], tree["table"].rows, rtol=1e-6, atol=1e-7)
    assert merged[others].tobytes() == base[others].tobytes()
    assert same_bits(jlora.unwrap(tree), params)


def test_nothing_of_a_table_but_the_rows_trains():
    _, tree = with_rows()
    half = jlora.partition(tree)[0]["table"]
    assert [x.shape for x in jax.tree.leaves(half)] == [(len(ROWS), OUT)]
    assert half.base is None


@pytest.mark.parametrize("is_tied", [False, True], ids=["looked_up", "tied"])
def test_the_gradient_of_rows_is_that_of_their_lookups(is_tied):
    tree = moved(with_rows()[1])
    weights = noise(len(TOKENS), IN if is_tied else OUT)

    def model(p, tokens):
        x = p["table"][tokens]
        return x @ p["table"].T if is_tied else x

    grads = jax.jit(jlora.grad(lambda p: (weights * jlora.apply(model)(p, TOKENS)).sum()))(tree)
    table = np.asarray(tree["table"].base, np.float64).copy()
    table[[*ROWS]] = tree["table"].rows
    c, unit = np.asarray(weights, np.float64), np.eye(IN)[np.asarray(TOKENS)]
    expected = unit.T @ c @ table + c.T @ unit @ table if is_tied else unit.T @ c
    assert close(grads["table"].rows, expected[[*ROWS]], 1e-5)
