"""The checkpoints of a run: what is saved comes back to the bit, what is kept, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora
from jlora.checkpoint import Checkpoints, backend
from tests.checkpoint.support import APIS
from tests.support import same_bits

PARAMS = {
    "a": {"kernel": jax.random.normal(jax.random.key(0), (8, 16)), "bias": jnp.zeros(16)},
    "table": {"embedding": jnp.ones((8, 4))},
    "head": {"kernel": jnp.ones((8, 8))},
}
SPEC = jlora.LoraSpec(targets="a", rank=2, train=("head",), train_tokens={"table": [1, 4]})
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2, mu_dtype=jnp.bfloat16))


@pytest.fixture(params=APIS)
def api(request, monkeypatch):
    monkeypatch.setattr(backend, "newest", lambda: request.param)


def tree_of(params=PARAMS, step=0):
    tree = jlora.wrap(params, SPEC)
    return jax.tree.map(lambda x, label: x + step if label == "trainable" else x, tree, jlora.labels(tree))


def state_of(tree, step=0):
    return jax.tree.map(lambda x: x + step, jlora.optimizer(TX, tree).init(tree))


def saved(directory, steps, **settings):
    with Checkpoints(directory, **settings) as checkpoints:
        for step in steps:
            tree = tree_of(step=step)
            checkpoints.save(step, tree, state=state_of(tree, step), extra={"at": step})
    return checkpoints


def assert_step(found, step, params=PARAMS):
    tree = tree_of(params, step)
    assert (found.step, found.extra) == (step, {"at": step})
    assert same_bits(found.tree, tree) and same_bits(found.state, state_of(tree, step))


def placed(shape, names=("data", "model"), kind=AxisType.Auto):
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * 2)
    specs = {"kernel": ("data", "model"), "bias": ("model",), "embedding": (None, "data")}
    put = lambda keys, x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*specs[keys[-1].key])))
    return jax.tree_util.tree_map_with_path(put, PARAMS)


def test_what_is_saved_comes_back_to_the_bit(api, tmp_path):
    checkpoints = saved(tmp_path / "run", [1, 20, 300])
    assert checkpoints.steps == [20, 300] and checkpoints.latest == 300 and checkpoints.best is None
    tree = tree_of()
    assert_step(checkpoints.load(PARAMS, state=state_of(tree)), 300)
    assert_step(Checkpoints(tmp_path / "run").load(PARAMS, state=jax.eval_shape(state_of, tree), step=20), 20)
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


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_it_loads_on_another_mesh(api, kind, tmp_path):
    with Checkpoints(tmp_path / "1x8") as checkpoints:
        tree = tree_of(placed((1, 8), kind=kind), 5)
        checkpoints.save(5, tree, state=state_of(tree, 5), extra={"at": 5})
    for directory, shape in [("1x8", (2, 4)), ("2x4", (4, 2)), ("4x2", None)]:
        params = PARAMS if shape is None else placed(shape, kind=kind)
        tree = tree_of(params)
        state = state_of(tree)
        for asked in (state, jax.eval_shape(state_of, tree)):
            found = Checkpoints(tmp_path / directory).load(params, state=asked)
            assert_step(found, 5)
            moments = jax.tree.leaves(found.state)[1:3], jax.tree.leaves(found.tree["a"]["kernel"])[1:]
            assert [x.sharding for x in moments[0]] == [x.sharding for x in moments[1]]
        alike = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert jax.tree.all(jax.tree.map(alike, found.tree["a"], tree["a"]))
        with Checkpoints(tmp_path / "x".join(map(str, shape or ("one",)))) as checkpoints:
            checkpoints.save(5, found.tree, state=found.state, extra=found.extra)


def test_arrays_of_the_state_lie_where_they_are_asked_for(tmp_path):
    mesh = jax.make_mesh((8,), ("x",))
    there = NamedSharding(mesh, PartitionSpec("x"))
    state = {"m": jnp.arange(16.0), "here": jax.device_put(jnp.ones(3), jax.devices()[2]), "host": np.arange(3)}
    state |= {"f8": jnp.ones(4, jnp.float8_e4m3fn), "none": None, "nan": jnp.float32("nan")}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree_of(), state=state)
    asked = state | {"m": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=there)}
    found = checkpoints.load(PARAMS, state=asked).state
    assert found["m"].sharding == there and found["here"].devices() == {jax.devices()[2]}
    assert isinstance(found["host"], np.ndarray) and same_bits(found, state)


def test_the_arrays_may_be_donated_at_once(api, tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = jlora.wrap({"up": {"kernel": jnp.zeros((512, 512))}}, jlora.LoraSpec(rank=256))
    params = {"up": {"kernel": np.zeros((512, 512), np.float32)}}
    half, frozen = jlora.partition(tree)
    want = {}
    with Checkpoints(tmp_path, keep_last=None) as checkpoints:
        for i in range(5):
            want[i] = jax.tree.map(np.array, half)
            checkpoints.save(i, jlora.combine(half, frozen), state=half)
            half = step(half)
    for i in checkpoints.steps:
        found = checkpoints.load(params, state=half, step=i)
        assert same_bits(found.state, want[i]) and same_bits(jlora.partition(found.tree)[0], want[i])
    assert checkpoints.steps == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("mode,best", [("min", [3, 5]), ("max", [2, 4])])
def test_the_last_and_the_best_are_kept(api, mode, best, tmp_path):
    losses = {1: 3.0, 2: 9.0, 3: 1.0, 4: 5.0, 5: 2.0, 6: float("nan"), 7: 4.0}
    settings = {"keep_last": 1, "keep_best": 2, "metric": "loss", "mode": mode}
    with Checkpoints(tmp_path, **settings) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, tree_of(), metrics={"loss": jnp.float32(loss), "other": 0})
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
    params = {"big": {"kernel": jnp.ones((2048, 2048))}}
    tree = jlora.wrap(params, jlora.LoraSpec(rank=8))
    state = jlora.optimizer(optax.adam(1e-3), tree).init(tree)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, state=state)
    adapter, base = 8 * 2 * 2048 * 4, 2048 * 2048 * 4
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


def test_a_disk_that_refuses_is_told(api, tmp_path):
    checkpoints = saved(tmp_path / "run", [1])
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file where the directory was")
    with pytest.raises(OSError, match="FileExistsError"):
        checkpoints.save(2, tree_of())


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
def test_a_step_that_is_not_whole_is_passed_over(what, tmp_path):
    saved(tmp_path, [1, 2])
    damaged(tmp_path / "2", what)
    with pytest.warns(UserWarning, match="2 is no whole checkpoint: .*passed over"):
        checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [1]
    assert_step(checkpoints.load(PARAMS, state=state_of(tree_of())), 1)
    with checkpoints:
        checkpoints.save(2, tree_of(step=2), state=state_of(tree_of(), 2), extra={"at": 2})
    assert_step(Checkpoints(tmp_path).load(PARAMS, state=state_of(tree_of())), 2)


def test_half_written_steps_are_no_steps_and_are_cleaned_away(tmp_path):
    saved(tmp_path, [1])
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    (tmp_path / "notes").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [1] and (tmp_path / "2.orbax-checkpoint-tmp").exists()
    checkpoints.save(2, tree_of())
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "notes"]


def test_what_was_said_is_read_without_arrays(tmp_path):
    checkpoints = saved(tmp_path, [1, 2])
    for item in ("adapter", "state"):
        shutil.rmtree(tmp_path / "2" / item / "d")
    assert checkpoints.extra() == {"at": 2} and checkpoints.extra(1) == {"at": 1}
    with pytest.raises(FileNotFoundError, match="no whole step 3"):
        checkpoints.extra(3)


def test_refusals(tmp_path):
    checkpoints = saved(tmp_path, [1, 2])
    with pytest.raises(FileExistsError, match="2 is there already"):
        checkpoints.save(2, tree_of())
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "notes.txt").write_text("mine")
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
    with pytest.raises(FileNotFoundError, match="it is a run; load one of its steps"):
        jlora.checkpoint.load(tmp_path, PARAMS)
    for settings in ({"keep_last": 0}, {"keep_best": 1}, {"mode": "least"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Checkpoints(tmp_path, **settings)


def test_another_base_or_state_is_refused(tmp_path):
    checkpoints = saved(tmp_path, [1])
    other = PARAMS | {"a": PARAMS["a"] | {"kernel": PARAMS["a"]["kernel"] * 2}}
    with pytest.raises(ValueError, match="a/kernel has other values"):
        checkpoints.load(other)
    assert checkpoints.load(other, check_base=False).step == 1
    with pytest.raises(ValueError, match=r"a/bias has shape \(3,\) here and \(16,\) there"):
        checkpoints.load(PARAMS | {"a": PARAMS["a"] | {"bias": jnp.zeros(3)}})
    for state in (optax.sgd(1e-2), optax.adam(1e-2)):
        with pytest.raises(ValueError, match="the state is not the one"):
            checkpoints.load(PARAMS, state=jlora.optimizer(state, tree_of()).init(tree_of()))


def test_a_state_without_arrays(tmp_path):
    state = jlora.optimizer(optax.sgd(1e-2), tree_of()).init(tree_of())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree_of(), state=state)
    assert jax.tree.structure(checkpoints.load(PARAMS, state=state).state) == jax.tree.structure(state)
