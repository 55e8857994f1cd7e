"""The checkpoints of a run: what is saved comes back to the bit, what is kept, and what is refused."""

import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora
from jlora.checkpoint import Checkpoints, backend
from tests.checkpoint.support import APIS
from tests.optim.support import noisy
from tests.support import same_bits

KERNEL = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
HOST = {
    "a": {"kernel": KERNEL, "bias": np.zeros(16, np.float32)},
    "table": {"embedding": np.ones((8, 4), np.float32)},
    "head": {"kernel": np.ones((8, 8), np.float32)},
}
PARAMS = jax.device_put(HOST)
SPEC = jlora.LoraSpec(targets="a", rank=2, train=("head",), train_tokens={"table": [1, 4]})
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2, mu_dtype=jnp.bfloat16))


@pytest.fixture(params=APIS)
def api(request, monkeypatch):
    monkeypatch.setattr(backend, "newest", lambda: request.param)


@functools.cache
def numbers():
    """A wrapped tree, on the host."""
    return jax.device_get(noisy(PARAMS, SPEC))


def tree_of(params=PARAMS, step=0):
    """The tree with the step added to what trains, as `jlora.wrap` lays it on this base; nothing is compiled for it."""
    plan = jlora.wrap(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params), SPEC)
    add = lambda x, label, at: jax.device_put(x + np.float32(step) if label == "trainable" else x, at.sharding)
    return jax.tree.map(add, numbers(), jlora.labels(plan), plan)


def plan_of_state(tree):
    return jax.eval_shape(jlora.optimizer(TX, tree).init, tree)


def state_of(tree, step=0):
    """The state with the step in place of each number: a count, and moments that lie as what they are of."""
    (count, *moments), treedef = jax.tree.flatten(plan_of_state(tree))
    places = [x.sharding for x in jax.tree.leaves(jlora.partition(tree)[0])] * 2
    put = lambda x, at=None: jax.device_put(np.full(x.shape, step, x.dtype), at)
    return treedef.unflatten([put(count), *map(put, moments, places)])


def saved(directory, steps, **settings):
    with Checkpoints(directory, **settings) as checkpoints:
        for step in steps:
            tree = tree_of(step=step)
            checkpoints.save(step, tree, state=state_of(tree, step), extra={"at": step})
    return checkpoints


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The directory of a run with steps 1 and 2, to be copied."""
    directory = tmp_path_factory.mktemp("runs") / "two"
    saved(directory, [1, 2])
    return directory


@pytest.fixture
def run(two_steps, tmp_path):
    """A copy of that directory, to be changed."""
    return shutil.copytree(two_steps, tmp_path / "run")


def assert_step(found, step, params=PARAMS):
    tree = tree_of(params, step)
    assert (found.step, found.extra) == (step, {"at": step})
    assert same_bits(found.tree, tree) and same_bits(found.state, state_of(tree, step))


def placed(shape, names=("data", "model"), kind=AxisType.Auto):
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * 2, devices=jax.devices()[: math.prod(shape)])
    specs = {"kernel": ("data", "model"), "bias": ("model",), "embedding": (None, "data")}
    put = lambda keys, x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*specs[keys[-1].key])))
    return jax.tree_util.tree_map_with_path(put, HOST)


def test_what_is_saved_comes_back_to_the_bit(api, tmp_path):
    checkpoints = saved(tmp_path / "run", [1, 20, 300])
    assert checkpoints.steps == [20, 300] and checkpoints.latest == 300 and checkpoints.best is None
    tree = tree_of()
    assert_step(checkpoints.load(PARAMS, state=state_of(tree)), 300)
    assert_step(Checkpoints(tmp_path / "run").load(PARAMS, state=plan_of_state(tree), step=20), 20)
    assert Checkpoints(tmp_path / "run").load(PARAMS).state is None
    assert same_bits(jlora.checkpoint.load(tmp_path / "run" / "300", PARAMS), tree_of(step=300))
    assert jlora.checkpoint.describe(tmp_path / "run" / "20")["nodes"]["a/kernel"]["class"] == "LoraParam"


@pytest.mark.parametrize("writes,reads", [(0, -1), (-1, 0)])
def test_one_back_end_reads_what_another_wrote(writes, reads, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "newest", lambda: APIS[writes])
    saved(tmp_path, [7])
    monkeypatch.setattr(backend, "newest", lambda: APIS[reads])
    assert_step(Checkpoints(tmp_path).load(PARAMS, state=state_of(tree_of())), 7)


def test_the_files_are_the_same(tmp_path, monkeypatch):
    names = []
    for name in APIS:
        monkeypatch.setattr(backend, "newest", lambda name=name: name)
        saved(tmp_path / name, [7])
        items = {path.name for path in (tmp_path / name / "7").iterdir() if path.is_dir()}
        texts = [json.loads((tmp_path / name / "7" / item / "metadata").read_text()) for item in ("about", "run")]
        names.append((items, texts))
    assert all(name == names[0] for name in names)


@pytest.mark.parametrize(
    "api, kind",
    [
        pytest.param(APIS[0], AxisType.Auto, marks=pytest.mark.slow),
        (APIS[-1], AxisType.Explicit),
        pytest.param(APIS[0], AxisType.Explicit, marks=pytest.mark.slow),
        pytest.param(APIS[-1], AxisType.Auto, marks=pytest.mark.slow),
    ],
    indirect=["api"],
)
def test_it_loads_on_another_mesh(api, kind, tmp_path):
    with Checkpoints(tmp_path / "1x4") as checkpoints:
        tree = tree_of(placed((1, 4), kind=kind), 5)
        checkpoints.save(5, tree, state=state_of(tree, 5), extra={"at": 5})
    for directory, shape in [("1x4", (2, 2)), ("2x2", (4, 2)), ("2x2", None)]:
        params = PARAMS if shape is None else placed(shape, kind=kind)
        tree = tree_of(params)
        state = state_of(tree)
        for asked in (state, plan_of_state(tree)):
            found = Checkpoints(tmp_path / directory).load(params, state=asked)
            assert_step(found, 5)
            moments = jax.tree.leaves(found.state)[1:3], jax.tree.leaves(found.tree["a"]["kernel"])[1:]
            assert [x.sharding for x in moments[0]] == [x.sharding for x in moments[1]]
        alike = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert jax.tree.all(jax.tree.map(alike, found.tree["a"], tree["a"]))
        if directory == "1x4":
            with Checkpoints(tmp_path / "2x2") as checkpoints:
                checkpoints.save(5, found.tree, state=found.state, extra=found.extra)


def test_arrays_of_the_state_lie_where_they_are_asked_for(tmp_path):
    mesh = jax.make_mesh((8,), ("x",))
    there = NamedSharding(mesh, PartitionSpec("x"))
    put = lambda x, device=None: jax.device_put(np.asarray(x, np.float32), device)
    state = {"m": put(np.arange(16)), "here": put(np.ones(3), jax.devices()[2]), "host": np.arange(3)}
    state |= {"f8": jax.device_put(np.ones(4, jnp.float8_e4m3fn)), "none": None, "nan": put(np.nan)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree_of(), state=state)
    asked = state | {"m": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=there)}
    found = checkpoints.load(PARAMS, state=asked).state
    assert found["m"].sharding == there and found["here"].devices() == {jax.devices()[2]}
    assert isinstance(found["host"], np.ndarray) and same_bits(found, state)


def test_the_arrays_may_be_donated_at_once(api, tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = {"up": {"kernel": np.zeros((512, 512), np.float32)}}
    tree = noisy(params, jlora.LoraSpec(rank=256))
    half, frozen = jlora.partition(tree)
    want = {}
    with Checkpoints(tmp_path, keep_last=None) as checkpoints:
        for i in range(4):
            want[i] = jax.tree.map(np.array, half)
            checkpoints.save(i, jlora.combine(half, frozen), state=half)
            half = step(half)
    for i in checkpoints.steps:
        found = checkpoints.load(params, state=half, step=i)
        assert same_bits(found.state, want[i]) and same_bits(jlora.partition(found.tree)[0], want[i])
    assert checkpoints.steps == [0, 1, 2, 3]


@pytest.mark.parametrize("api, mode, best", [(APIS[0], "min", [3, 5]), (APIS[-1], "max", [2, 4])], indirect=["api"])
def test_the_last_and_the_best_are_kept(api, mode, best, tmp_path):
    losses = {1: 3.0, 2: 9.0, 3: 1.0, 4: 5.0, 5: 2.0, 6: float("nan"), 7: 4.0}
    settings = {"keep_last": 1, "keep_best": 2, "metric": "loss", "mode": mode}
    with Checkpoints(tmp_path, **settings) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, tree_of(), metrics={"loss": jax.device_put(np.float32(loss)), "other": 0})
            assert checkpoints.latest == (step - 1 or None)  # the one before; this one is being written
        checkpoints.save(8, tree_of())
    first = {"min": 3, "max": 2}[mode]
    assert checkpoints.steps == [*best, 8] and checkpoints.best == first
    again = Checkpoints(tmp_path, **settings)
    assert again.steps == [*best, 8] and again.best == first
    assert sorted(path.name for path in tmp_path.iterdir()) == [*map(str, best), "8"]


def test_an_older_step_written_last_is_kept_too(tmp_path):
    saved(tmp_path, [5, 6])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.load(PARAMS, step=5)
        checkpoints.save(3, tree_of())
    assert checkpoints.steps == [3, 5, 6]


def test_only_the_adapter_is_on_disk(tmp_path):
    params = {"big": {"kernel": np.ones((1024, 1024), np.float32)}}
    tree = noisy(params, jlora.LoraSpec(rank=4))
    state = jax.jit(jlora.optimizer(optax.adam(1e-3), tree).init)(tree)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, state=state)
    adapter, base = 4 * 2 * 1024 * 4, 1024 * 1024 * 4
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert base > 100 * adapter and size < 3 * adapter + 60_000


def test_what_goes_wrong_in_the_background_is_raised(api, tmp_path, monkeypatch):
    begin = backend.write

    def broken(directory, arrays, texts, overwrite=False):
        wait = begin(directory, arrays, texts, overwrite)

        def fail():
            wait()
            raise OSError("no space left")

        return fail

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(backend, "write", broken)
    for call in (checkpoints.wait, lambda: checkpoints.save(2, tree_of()), lambda: checkpoints.load(PARAMS)):
        checkpoints.save(1, tree_of())
        with pytest.raises(OSError, match="no space"):
            call()
        assert checkpoints.steps == []
        shutil.rmtree(tmp_path / "1")
    with pytest.raises(OSError, match="no space"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree_of())
    shutil.rmtree(tmp_path / "1")
    with pytest.raises(OSError, match="no space"):
        Checkpoints(tmp_path, background=False).save(1, tree_of())


def test_a_disk_that_refuses_is_told(api, run):
    checkpoints = Checkpoints(run)
    shutil.rmtree(run)
    run.write_text("a file where the directory was")
    with pytest.raises(OSError, match="FileExistsError"):
        checkpoints.save(3, tree_of())


def damaged(directory, what):
    """A step, broken in one of the ways in which files break."""
    about = directory / "about" / "metadata"
    if what == "about is cut":
        about.write_text(about.read_text()[:100])
    elif what == "about is gone":
        shutil.rmtree(about.parent)
    elif what == "about is another":
        about.write_text("[]")
    elif what == "the adapter is gone":
        shutil.rmtree(directory / "adapter")
    elif what == "nothing is there":
        shutil.rmtree(directory)
        directory.mkdir()
    elif what == "the run is gone":
        shutil.rmtree(directory / "run")


WAYS = [
    "about is cut",
    "about is gone",
    "about is another",
    "the adapter is gone",
    "nothing is there",
    "the run is gone",
]


@pytest.mark.parametrize("what", WAYS)
def test_a_step_that_is_not_whole_is_passed_over(what, run):
    damaged(run / "2", what)
    with pytest.warns(UserWarning, match="2 is no whole checkpoint: .*passed over"):
        checkpoints = Checkpoints(run)
    assert checkpoints.steps == [1]
    assert_step(checkpoints.load(PARAMS, state=state_of(tree_of())), 1)
    with checkpoints:
        checkpoints.save(2, tree_of(step=2), state=state_of(tree_of(), 2), extra={"at": 2})
    assert_step(Checkpoints(run).load(PARAMS, state=state_of(tree_of())), 2)


def test_half_written_steps_are_no_steps_and_are_cleaned_away(run):
    (run / "2").rename(run / "3.orbax-checkpoint-tmp")
    (run / "notes").mkdir()
    checkpoints = Checkpoints(run)
    assert checkpoints.steps == [1] and (run / "3.orbax-checkpoint-tmp").exists()
    checkpoints.save(3, tree_of())
    checkpoints.wait()
    assert sorted(path.name for path in run.iterdir()) == ["1", "3", "notes"]


def test_what_was_said_is_read_without_arrays(run):
    for item in ("adapter", "state"):
        shutil.rmtree(run / "2" / item / "d")
    checkpoints = Checkpoints(run)
    assert checkpoints.extra() == {"at": 2} and checkpoints.extra(1) == {"at": 1}
    with pytest.raises(FileNotFoundError, match="no whole step 3"):
        checkpoints.extra(3)


def test_refusals(run, tmp_path):
    checkpoints = Checkpoints(run)
    with pytest.raises(FileExistsError, match="2 is there already"):
        checkpoints.save(2, tree_of())
    (run / "3").mkdir()
    (run / "3" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no checkpoint of a step"):
        checkpoints.save(3, tree_of())
    with pytest.raises(FileNotFoundError, match=r"no whole step 9; it has \[1, 2\]"):
        checkpoints.load(PARAMS, step=9)
    with pytest.raises(FileNotFoundError, match=r"no whole step$"):
        Checkpoints(tmp_path / "none").load(PARAMS)
    with pytest.raises(TypeError, match=r"jlora\.wrap"):
        checkpoints.save(4, PARAMS)
    with pytest.raises(TypeError, match=r"state\['step'\] is no array but 3"):
        checkpoints.save(4, tree_of(), state={"step": 3})
    with pytest.raises(TypeError, match=r"state\['key'\] is a random key"):
        checkpoints.save(4, tree_of(), state={"key": jax.random.key(0)})
    with pytest.raises(TypeError, match="JSON"):
        checkpoints.save(4, tree_of(), extra={"data": b"bytes"})
    with pytest.raises(ValueError, match="a number from 0 on"):
        checkpoints.save(-1, tree_of())
    with pytest.raises(ValueError, match="metrics has no 'loss'; it has lose"):
        Checkpoints(tmp_path / "none", metric="loss").save(1, tree_of(), metrics={"lose": 1})
    with pytest.raises(TypeError, match=r"metrics\['loss'\] must be a number"):
        Checkpoints(tmp_path / "none").save(1, tree_of(), metrics={"loss": np.ones(2)})
    with pytest.raises(TypeError, match=r"extra must be JSON: .*int64.*int\(x\)"):
        Checkpoints(tmp_path / "none").save(1, tree_of(), extra={"row": np.int64(3)})
    with pytest.raises(TypeError, match=r"extra must be JSON: .*key 1 twice"):
        Checkpoints(tmp_path / "none").save(1, tree_of(), extra={1: "a", "1": "b"})
    with pytest.raises(FileNotFoundError, match="it is a run; load one of its steps"):
        jlora.checkpoint.load(run, PARAMS)
    for settings in ({"keep_last": 0}, {"keep_best": 1}, {"mode": "least"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Checkpoints(run, **settings)


def test_another_base_or_state_is_refused(two_steps):
    checkpoints = Checkpoints(two_steps)
    with_a = lambda **leaves: PARAMS | {"a": PARAMS["a"] | leaves}
    other = with_a(kernel=2 * HOST["a"]["kernel"])
    with pytest.raises(ValueError, match="a/kernel has other values"):
        checkpoints.load(other)
    assert checkpoints.load(other, check_base=False).step == 2
    with pytest.raises(ValueError, match=r"a/bias has shape \(3,\) here and \(16,\) there"):
        checkpoints.load(with_a(bias=np.zeros(3, np.float32)))
    for tx in (optax.sgd(1e-2), optax.adam(1e-2)):
        with pytest.raises(ValueError, match="the state is not the one"):
            checkpoints.load(PARAMS, state=jax.eval_shape(jlora.optimizer(tx, tree_of()).init, tree_of()))


def test_a_state_without_arrays(tmp_path):
    state = jlora.optimizer(optax.sgd(1e-2), tree_of()).init(tree_of())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree_of(), state=state)
    assert jax.tree.structure(checkpoints.load(PARAMS, state=state).state) == jax.tree.structure(state)


def test_a_train_state_is_no_state(tmp_path):
    """It has the base, which would be written with each step."""
    tree = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
    state = TrainState.create(apply_fn=None, params=tree, tx=jlora.optimizer(optax.adam(1e-3), tree))
    with jlora.checkpoint.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match=r"state is a TrainState.*state=ts\.opt_state"):
            checkpoints.save(1, state.params, state=state)
        checkpoints.save(1, state.params, state=state.opt_state)
    assert checkpoints.latest == 1
