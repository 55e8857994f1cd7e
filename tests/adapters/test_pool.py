"""Adapters come and go while the step stays: never compiled again, never a row of another, never more memory."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import adapters
from tests.adapters.support import AXES, adapter, base, forward
from tests.support import error, same_bits

PARAMS = base()
SPEC = jlora.LoraSpec(targets=("layers/*/kernel", "head/kernel"), axes=AXES)
X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 1, 8)), jnp.float32)


def some(count, **settings):
    """Adapters of other ranks, scales, targets and layers."""
    less = lambda i: {"targets": ("layers/*/kernel",), "layers": (0, 2)} if i % 3 == 1 else {}
    of = lambda i: adapter(PARAMS, i, **{"rank": 1 + i % 3, "alpha": 1 + i} | less(i) | settings)
    return {f"adapter {i}": of(i) for i in range(count)}


def wanted(trees):
    run = jax.jit(jlora.apply(forward))
    return {name: np.asarray(run(tree, X)) for name, tree in trees.items()} | {None: np.asarray(forward(PARAMS, X))}


def test_adapters_come_and_go():
    trees = some(7)
    want = wanted(trees)
    pool = adapters.Pool(PARAMS, capacity=3, rank=4, spec=SPEC)
    step = jax.jit(adapters.batched(forward, fallback="error"))
    rng = np.random.default_rng(0)
    held = []
    for count in range(200):
        name = f"adapter {rng.integers(7)}"
        pool.put(name, trees[name])
        names = [*rng.choice(list(pool), 3), None]
        tree, ids = pool.take(names)
        y = np.asarray(step(tree, ids, X))
        assert all(np.allclose(y[i], want[name][i], atol=1e-5) for i, name in enumerate(names)), (count, names)
        held.append(sum(x.nbytes for x in jax.live_arrays()))
    assert step._cache_size() == 1
    assert len({*held[50:]}) == 1
    assert same_bits(jlora.unwrap(pool.tree), PARAMS)


@pytest.mark.slow
def test_two_thousand_swaps_beside_running_steps():
    """Loading threads swap adapters while steps run: each row is always that of its own adapter, whole."""
    trees = some(9)
    want = wanted(trees)
    pool = adapters.Pool(PARAMS, capacity=5, rank=4, spec=SPEC)
    step = jax.jit(adapters.batched(forward, fallback="error"))
    for name in list(trees)[:5]:
        pool.put(name, trees[name])
    stop, failures = threading.Event(), []

    def swap(seed):
        rng = np.random.default_rng(seed)
        for _ in range(1000):
            name = f"adapter {rng.integers(9)}"
            pool.put(name, trees[name])

    def serve():
        rng = np.random.default_rng(9)
        while not stop.is_set():
            try:
                names = [*rng.choice(list(pool), 3), None]
                tree, ids = pool.take(names)
            except KeyError:  # it has just made way
                continue
            y = np.asarray(step(tree, ids, X))
            if not all(np.allclose(y[i], want[name][i], atol=1e-5) for i, name in enumerate(names)):
                failures.append(names)

    server = threading.Thread(target=serve)
    swappers = [threading.Thread(target=swap, args=(seed,)) for seed in range(2)]
    for thread in (server, *swappers):
        thread.start()
    for thread in swappers:
        thread.join()
    stop.set()
    server.join()
    assert not failures and step._cache_size() == 1 and len(pool) == 5


def test_the_one_longest_unused_makes_way():
    trees = some(5)
    pool = adapters.Pool(PARAMS, capacity=3, rank=4, spec=SPEC)
    for name in list(trees)[:3]:
        pool.put(name, trees[name])
    pool.ids(["adapter 0"])
    pool.put("adapter 3", trees["adapter 3"])
    assert list(pool) == ["adapter 2", "adapter 0", "adapter 3"]
    pool.remove("adapter 0")
    assert "adapter 0" not in pool and len(pool) == 2
    pool.put("adapter 4", trees["adapter 4"])
    assert list(pool) == ["adapter 2", "adapter 3", "adapter 4"]
    with pytest.raises(KeyError, match="there is no adapter 'adapter 0'; it holds 'adapter 2', "):
        pool.ids(["adapter 4", "adapter 0"])
    with pytest.raises(KeyError, match="no adapter 'adapter 0'"):
        pool.remove("adapter 0")
    with pytest.raises(TypeError, match="names are a list, one for each row of a batch, found the string 'adapter 4'"):
        pool.take("adapter 4")
    with pytest.raises(TypeError, match="names is for files, and 'adapter 4' is a tree"):
        pool.put("adapter 4", trees["adapter 4"], names="llama")
    assert repr(pool) == "Pool('adapter 2', 'adapter 3', 'adapter 4'; 3 of 3, rank 4)"


def test_a_step_on_an_earlier_tree_is_not_disturbed():
    trees = some(2)
    pool = adapters.Pool(PARAMS, capacity=1, rank=4, spec=SPEC)
    pool.put("adapter 0", trees["adapter 0"])
    before, ids = pool.take(["adapter 0"] * 4)
    pool.put("adapter 1", trees["adapter 1"])
    run = adapters.batched(forward)
    assert error(run(before, ids, X), wanted(trees)["adapter 0"]) < 1e-5
    assert error(run(pool.tree, ids, X), wanted(trees)["adapter 1"]) < 1e-5


def test_files(tmp_path):
    """An adapter of PEFT's comes from its directory."""
    params = {"head": {"weight": PARAMS["head"]["kernel"].T}}
    spec = jlora.LoraSpec(targets="head", rank=2, axes={"head/weight": jlora.Axes((1,), (0,))})
    fn = lambda p, x: x @ p["head"]["weight"].T
    tree = jax.tree.map(lambda x: x + 0.1 if x.ndim == 2 and 2 in x.shape else x, jlora.wrap(params, spec))
    jlora.peft.save(tmp_path / "one", tree)
    pool = adapters.Pool(params, capacity=2, rank=4, spec=spec)
    pool.put("one", tmp_path / "one")
    tree, ids = pool.take(["one", None, "one", None])
    want = jlora.apply(fn)(jlora.peft.load(tmp_path / "one", params), X)
    found = adapters.batched(fn)(tree, ids, X)
    assert error(found[::2], want[::2]) < 1e-5 and error(found[1], fn(params, X)[1]) < 1e-6
    with pytest.raises(FileNotFoundError):
        pool.put("two", tmp_path / "two")
    assert list(pool) == ["one"]


def test_of_other_variants_and_leaves_in_full():
    spec = jlora.LoraSpec(targets=("layers/*/kernel", "head/kernel"), axes=AXES, variant="dora", train=("head/bias",))
    pool = adapters.Pool(PARAMS, capacity=2, rank=3, spec=spec)
    trees = {name: adapter(PARAMS, i, variant="dora", rank=2, train=train)
             for i, (name, train) in enumerate({"with": ("head/bias",), "without": ()}.items())}  # fmt: skip
    for name, tree in trees.items():
        pool.put(name, tree)
    tree, ids = pool.take(["with", "without", None, "with"])
    found, want = adapters.batched(forward)(tree, ids, X), wanted(trees)
    for i, name in enumerate(["with", "without", None, "with"]):
        assert error(found[i], want[name][i]) < 1e-5, name


def test_adapters_that_start_from_their_kernel():
    trees = {"pissa": adapter(PARAMS, 0, rank=2, init="pissa")}
    pool = adapters.Pool(PARAMS, capacity=1, rank=4, spec=SPEC)
    pool.put("pissa", trees["pissa"])
    tree, ids = pool.take(["pissa"] * 4)
    assert error(adapters.batched(forward)(tree, ids, X), wanted(trees)["pissa"]) < 1e-5


def test_all_linear_layers_have_room_unless_it_is_said():
    params = {"a": {"kernel": jnp.eye(8, 3)}, "b": {"kernel": jnp.eye(3, 8)}, "norm": {"scale": jnp.ones(8)}}
    pool = adapters.Pool(params, capacity=2, rank=5)  # of a kernel that is smaller as much as it has
    assert [x.shape for x in jax.tree.leaves(jlora.partition(pool.tree)[0])] == [
        (2, 3, 8),
        (2, 3, 3),
        (2, 3, 3),
        (2, 3, 8),
    ]


REFUSED = {
    "rank": (lambda: adapter(PARAMS, 0, rank=5), "has rank 5 at .*, and there is room for 4: .*resize"),
    "place": (lambda: adapter(PARAMS, 0, rank=1, train=("head/bias",)), "adapts head/bias, for which there is no room"),
    "variant": (
        lambda: adapter(PARAMS, 0, rank=1, variant="dora"),
        "has a DoraParam at .*, and there is room for a LoraParam: make the pool with",
    ),
    "base": (lambda: adapter(base(1), 0, rank=1), "stands on another base than this pool's, as at head/bias"),
    "plain": (lambda: PARAMS, "is no wrapped tree"),
    "several": (lambda: adapters.stack([adapter(PARAMS, 0, rank=1)]), "is no single adapter: this tree holds 1"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_room(make, message):
    pool = adapters.Pool(PARAMS, capacity=2, rank=4, spec=SPEC)
    pool.put("adapter 0", some(1)["adapter 0"])
    before = pool.tree
    with pytest.raises((ValueError, TypeError), match=f"Pool.put: .*{message}"):
        pool.put("other", make())
    assert pool.tree is before and list(pool) == ["adapter 0"]


@pytest.mark.parametrize(
    ("settings", "message"), [({"capacity": 0, "rank": 1}, "capacity"), ({"capacity": 1, "rank": 1.5}, "rank")]
)
def test_rooms_that_are_none(settings, message):
    with pytest.raises(ValueError, match=f"Pool: {message} must be a whole number from 1 on"):
        adapters.Pool(PARAMS, **settings)
    with pytest.raises(TypeError, match="takes the plain base"):
        adapters.Pool(some(1)["adapter 0"], 1, 1)


def test_on_a_mesh_everything_lies_where_the_base_lies():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"w": {"kernel": jax.device_put(jnp.eye(8, 16), jax.sharding.NamedSharding(mesh, jax.P(None, "model")))}}
    pool = adapters.Pool(params, capacity=2, rank=2)
    places = lambda: [x.sharding.spec for x in jax.tree.leaves(jlora.partition(pool.tree)[0])]
    assert places() == [jax.P(None, None, None), jax.P(None, None, "model")]
    pool.put("one", jlora.wrap(params, jlora.LoraSpec(rank=2)))
    assert places() == [jax.P(None, None, None), jax.P(None, None, "model")]
