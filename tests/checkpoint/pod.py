"""What each process of a job does in the tests: ``python -m tests.checkpoint.pod save directory api``, and so on."""

import itertools
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from jlora.checkpoint import backend, base
from tests.processes import join

SPEC = jlora.LoraSpec(targets=("up", "down"), rank=2, train=("head",), train_tokens={"table": [1, 4]})
SPECS = {"up": ("data", "model"), "down": ("model", None), "head": (None, "model"), "table": (("data", "model"), None)}
TX = optax.adam(1e-2)


def values(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"up": (16, 32), "down": (32, 16), "head": (16, 8), "table": (8, 16)}
    names = {"table": "embedding"}
    return {path: {names.get(path, "kernel"): rng.normal(size=x).astype(np.float32)} for path, x in shapes.items()}


def params(seed=0):
    """The base over all devices of the job: no process has it all."""
    devices = jax.device_count()
    mesh = jax.make_mesh((2, devices // 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(path, x):
        at = NamedSharding(mesh, PartitionSpec(*SPECS[path[0].key]))
        return jax.make_array_from_callback(x.shape, at, lambda index: x[index])

    return jax.tree_util.tree_map_with_path(place, values(seed))


def trained(tree, step):
    """The tree and the optimizer's state, as after some training: the same whatever the mesh."""
    numbered = lambda x, label, i: x + step + i if label == "trainable" else x
    leaves, treedef = jax.tree.flatten(tree)
    marks = jax.tree.leaves(jlora.labels(tree))
    numbers = [numbered(x, label, i) for i, (x, label) in enumerate(zip(leaves, marks, strict=True))]
    tree = treedef.unflatten(numbers)
    state = jlora.optimizer(TX, tree).init(tree)
    return tree, jax.tree.map(lambda x: x + step, state)


def whole(tree):
    """Every array of a tree, on each process."""
    gathered = lambda x: x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
    return [np.asarray(gathered(x)) for x in jax.tree.leaves(tree)]


def lies_alike(ours, theirs):
    """Whether two trees lie on the same devices in the same way."""
    alike = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim)
    return all(map(alike, jax.tree.leaves(ours), jax.tree.leaves(theirs)))


def save(directory):
    tree = jlora.wrap(params(), SPEC)
    assert jax.process_count() == 1 or not tree["up"]["kernel"].base.is_fully_addressable
    with jlora.checkpoint.Checkpoints(f"{directory}/run", keep_last=2, keep_best=1, metric="loss") as checkpoints:
        for step, loss in [(1, 5.0), (2, 1.0), (3, 4.0), (4, 3.0)]:
            now, state = trained(tree, step)
            extra = {"data": jlora.checkpoint.gather(f"of {jax.process_index()}")}
            checkpoints.save(step, now, state=state, extra=extra, metrics={"loss": loss})
    assert checkpoints.steps == [2, 3, 4] and (checkpoints.latest, checkpoints.best) == (4, 2)
    jlora.checkpoint.save(f"{directory}/one", now)
    jlora.checkpoint.save(f"{directory}/one", now, overwrite=True)


def load(directory, saved_by):
    checkpoints = jlora.checkpoint.Checkpoints(f"{directory}/run")
    assert checkpoints.steps == [2, 3, 4]
    for step in (None, 2):
        tree, state = trained(jlora.wrap(params(), SPEC), step or 4)
        for asked in (state, jax.eval_shape(lambda tree: jlora.optimizer(TX, tree).init(tree), tree)):
            found = checkpoints.load(params(), state=asked, step=step)
            assert found.extra == {"data": [f"of {i}" for i in range(int(saved_by))]}
            assert all(lies_alike(found.tree[path], tree[path]) for path in ("up", "down", "head"))
            for ours, theirs in [(found.tree, tree), (found.state, state)]:
                assert jax.tree.structure(ours) == jax.tree.structure(theirs)
                jax.tree.map(np.testing.assert_array_equal, whole(ours), whole(theirs))
    one = jlora.checkpoint.load(f"{directory}/one", params())
    jax.tree.map(np.testing.assert_array_equal, whole(one), whole(trained(jlora.wrap(params(), SPEC), 4)[0]))
    try:
        jlora.checkpoint.load(f"{directory}/one", params(seed=1))
    except ValueError as error:
        assert "has other values" in str(error)
    else:
        raise AssertionError("another base was taken")


def agree(directory):
    """Both of what follows, in one start of the processes."""
    differ(directory)
    few_bytes()


def differ(directory):
    """Processes that don't agree are told so, all of them."""
    checkpoints = jlora.checkpoint.Checkpoints(f"{directory}/run")
    try:
        checkpoints.save(9, jlora.wrap(params(), SPEC), extra=jax.process_index())
    except ValueError as error:
        assert "gather" in str(error)
    else:
        raise AssertionError("different extras were taken")


def endless(directory):
    """Loads the last step, compares it with what was saved, and goes on saving until it is killed."""
    checkpoints = jlora.checkpoint.Checkpoints(f"{directory}/run", keep_last=2)
    first, wrapped = 0, jlora.wrap(params(), SPEC)
    if checkpoints.latest is not None:
        found = checkpoints.load(params(), state=trained(wrapped, 0)[1])
        first = found.extra + 1
        for ours, theirs in zip((found.tree, found.state), trained(wrapped, found.step), strict=True):
            jax.tree.map(np.testing.assert_array_equal, whole(ours), whole(theirs))
    print("loaded", first - 1, flush=True)
    for step in itertools.count(first):
        tree, state = trained(wrapped, step)
        checkpoints.save(step, tree, state=state, extra=step)
        print("saved", step, flush=True)


def cut(directory):
    """A step whose files end too early is refused, or passed over. (Orbax's threads report them late, all over.)"""
    for item, keep in itertools.product(("adapter", "state"), (0, 0.5)):
        run = Path(directory, f"{item} {keep}")
        wrapped = jlora.wrap(params(), SPEC)
        with jlora.checkpoint.Checkpoints(run) as checkpoints:
            for step in (1, 2):
                tree, state = trained(wrapped, step)
                checkpoints.save(step, tree, state=state)
        for path in (run / "2" / item).rglob("d/*"):
            path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        try:
            checkpoints.load(params(), state=state, step=2)
        except ValueError as error:
            assert f"{item} can't be read" in str(error)
        else:
            raise AssertionError("what was cut was taken")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = checkpoints.load(params(), state=state)
        assert any("this step is passed over" in str(warning.message) for warning in caught)
        assert found.step == checkpoints.latest == 1
        jax.tree.map(np.testing.assert_array_equal, whole(found.tree), whole(trained(wrapped, 1)[0]))


def few_bytes():
    """The program that samples the base exchanges some bytes of each leaf, in one exchange."""
    leaves = jax.tree.leaves(params())
    program = base._of_mesh(
        leaves[0].sharding.mesh, tuple(x.sharding.spec for x in leaves), tuple(x.shape for x in leaves)
    )
    text = program.lower(leaves).compile().as_text()
    exchanges = [line for line in text.splitlines() if any(f" {name}(" in line for name in EXCHANGES)]
    assert len(exchanges) == 1 and f"u32[{len(leaves) * base.SAMPLES * 4}]" in exchanges[0], exchanges


EXCHANGES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "all-reduce-start", "all-gather-start")

if __name__ == "__main__":
    join()
    command, directory, api, *more = sys.argv[1:]
    backend.newest = lambda: api
    {f.__name__: f for f in (save, load, agree, endless, cut)}[command](directory, *more)
    print("done", jax.process_index(), "of", jax.process_count())
