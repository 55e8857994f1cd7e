"""Orbax adapters: what is saved is what comes back, on the base that it belongs to, and no other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from jlora import checkpoint
from tests.optim.support import noisy

PARAMS = jax.device_put(
    {
        "a": {
            "kernel": np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32),
            "bias": np.zeros(16, np.float32),
        },
        "table": {"embedding": np.ones((6, 4), np.float32)},
        "head": {"kernel": np.ones((8, 3), np.float32)},
    }
)
SPECS = {
    **{name: jlora.LoraSpec(targets="a", rank=2, variant=name) for name in jlora.variants.VARIANTS},
    "start": jlora.LoraSpec(targets="a", rank=2, init="pissa", dropout=0.1),
    "full": jlora.LoraSpec(targets="a", rank=2, train=("head",), bias="lora_only", train_tokens={"table": [1, 4]}),
    "bias": jlora.LoraSpec(targets="a", rank=2, lora_bias=True),
    "ia3 in": jlora.LoraSpec(targets="a", variant="ia3", options={"on": "in"}),
}


@functools.cache
def trained(name):
    """A wrapped tree with noise in what trains."""
    return noisy(PARAMS, SPECS[name])


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("name", SPECS)
def test_what_is_saved_comes_back(name, tmp_path):
    tree = trained(name)
    checkpoint.save(tmp_path / "adapter", tree)
    assert_same(checkpoint.load(tmp_path / "adapter", PARAMS), tree)


def test_the_base_is_not_in_it(tmp_path):
    params = {"big": {"kernel": np.ones((1024, 1024), np.float32)}}
    checkpoint.save(tmp_path / "adapter", noisy(params, jlora.LoraSpec(rank=1)))
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").rglob("*") if path.is_file())
    assert size < 100_000


def test_another_base_is_refused(tmp_path):
    checkpoint.save(tmp_path / "adapter", trained("lora"))
    other = PARAMS | {"a": PARAMS["a"] | {"kernel": 2 * np.asarray(PARAMS["a"]["kernel"])}}
    with pytest.raises(ValueError, match=r"a/kernel has other values.*1 of 4 leaves"):
        checkpoint.load(tmp_path / "adapter", other)
    checkpoint.load(tmp_path / "adapter", other, check_base=False)
    with pytest.raises(ValueError, match="head/kernel has shape None here"):
        checkpoint.load(tmp_path / "adapter", {key: PARAMS[key] for key in ("a", "table")})
    with pytest.raises(TypeError, match="wrapped already"):
        checkpoint.load(tmp_path / "adapter", trained("lora"))


def test_a_leaf_trained_in_full_may_have_any_value_in_the_base(tmp_path):
    tree = trained("full")
    checkpoint.save(tmp_path / "adapter", tree)
    fresh = PARAMS | {"head": {"kernel": np.zeros((8, 3), np.float32)}}
    assert_same(checkpoint.load(tmp_path / "adapter", fresh), tree)


def test_an_abstract_base_will_do(tmp_path):
    tree = trained("dora")
    checkpoint.save(tmp_path / "adapter", tree)
    planned = checkpoint.load(tmp_path / "adapter", jax.eval_shape(lambda: PARAMS))
    np.testing.assert_array_equal(planned["a"]["kernel"].lora_b, tree["a"]["kernel"].lora_b)
    assert isinstance(planned["a"]["kernel"].base, jax.ShapeDtypeStruct)
    alone = checkpoint.load_abstract(tmp_path / "adapter")
    assert {*alone} == {"a/kernel", "a/bias", "table/embedding", "head/kernel"}


@pytest.mark.parametrize("name", ["lora", "dora", "oft", "full"])
def test_it_lies_as_the_base_lies_on_any_mesh(name, tmp_path):
    checkpoint.save(tmp_path / "adapter", trained(name))
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    put = lambda x, *spec: jax.device_put(np.asarray(x), NamedSharding(mesh, PartitionSpec(*spec)))
    placed = jax.tree.map(put, PARAMS)
    placed["a"]["kernel"] = put(PARAMS["a"]["kernel"], "data", "model")
    loaded = checkpoint.load(tmp_path / "adapter", placed)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed)
    ours, wanted = (
        jax.tree.map(lambda x: x.sharding, tree["a"]["kernel"]) for tree in (loaded, jlora.wrap(abstract, SPECS[name]))
    )
    assert jax.tree.leaves(ours) == jax.tree.leaves(wanted)
    assert_same(loaded, trained(name))


def test_a_class_of_ones_own_is_named(tmp_path):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True, eq=False)
    class Mine(jlora.variants.AdaptedParam):
        base: object = jlora.variants.frozen()
        gain: object = jlora.variants.trained("batch out")
        axes: jlora.Axes = jlora.variants.static()
        layers: object = jlora.variants.static(default=None)

        @classmethod
        def create(cls, base, kernel, key):
            return cls(base, jnp.ones(kernel.sizes("batch out")), **kernel.place)

        def effective(self, name, key):
            plain = jlora.variants.plain(self.base, name=name)
            return jlora.variants.gained(plain, self.beside(self.gain, "batch out", fill=1))

    tree = noisy(PARAMS, jlora.LoraSpec(targets="a", variant=Mine))
    checkpoint.save(tmp_path / "adapter", tree)
    with pytest.raises(ValueError, match=r"variants=\[Mine\]"):
        checkpoint.load(tmp_path / "adapter", PARAMS)
    assert_same(checkpoint.load(tmp_path / "adapter", PARAMS, variants=[Mine]), tree)


def test_nothing_is_replaced_unasked(tmp_path):
    checkpoint.save(tmp_path / "adapter", trained("lora"))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        checkpoint.save(tmp_path / "adapter", trained("dora"))
    checkpoint.save(tmp_path / "adapter", trained("dora"), overwrite=True)
    assert_same(checkpoint.load(tmp_path / "adapter", PARAMS), trained("dora"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="move it away"):
        checkpoint.save(tmp_path / "mine", trained("lora"), overwrite=True)
    with pytest.raises(FileNotFoundError, match="no adapter that"):
        checkpoint.load(tmp_path, PARAMS)
    with pytest.raises(TypeError, match=r"jlora\.wrap"):
        checkpoint.save(tmp_path / "plain", PARAMS)
    with pytest.raises(ValueError, match="partition"):
        checkpoint.save(tmp_path / "half", jlora.partition(trained("lora"))[0])
