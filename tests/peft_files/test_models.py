"""Whole models as safetensors: what is written is what is read, merged and one tensor at a time."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.peft import from_safetensors, parts, to_safetensors
from jlora.peft.models import files_of
from jlora.peft.tensors import read_json
from tests.optim.support import noisy
from tests.peft_files.trees import adapted, assert_same, flat, merged, nested, noise

STATE = {
    "model.embed_tokens.weight": noise(10, 4),
    **{f"model.layers.{i}.q_proj.weight": noise(6, 4) for i in range(3)},
    **{f"model.layers.{i}.q_proj.bias": noise(6) for i in range(3)},
    "model.norm.weight": noise(4).astype(ml_dtypes.bfloat16),
    "model.steps": np.arange(3),
}
STACKED = {
    "embed": {"embedding": STATE["model.embed_tokens.weight"]},
    "layers": {
        "attention": {
            "query": {
                "kernel": np.stack([STATE[f"model.layers.{i}.q_proj.weight"].T.reshape(4, 2, 3) for i in range(3)], 1),
                "bias": np.stack([STATE[f"model.layers.{i}.q_proj.bias"].reshape(2, 3) for i in range(3)], 1),
            }
        }
    },
    "norm": {"scale": STATE["model.norm.weight"]},
}
NAMES = [
    (
        "model.layers.{i}.q_proj",
        "layers/attention/query/kernel[:, {i}]",
        jlora.peft.Layout("in out out"),
    ),
    ("model.embed_tokens", "embed/embedding"),
    ("model.norm", "norm/scale"),
]
AXES = {"query/kernel": jlora.Axes((0,), (2, 3), (1,))}


def state_of(directory):
    return {name: file[name] for file in files_of(directory).values() for name in file}


@pytest.mark.parametrize("shard_bytes", [1 << 30, 200], ids=["one", "shards"])
def test_a_plain_tree_comes_back(shard_bytes, tmp_path):
    to_safetensors(nested(STATE), tmp_path, shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes == 200)
    tree = flat(from_safetensors(tmp_path))
    assert_same(tree, STATE)
    assert tree["model.norm.weight"].dtype == jnp.bfloat16


def test_no_shard_is_larger_than_asked_unless_by_one_tensor(tmp_path):
    to_safetensors(nested(STATE), tmp_path, shard_bytes=200)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"]} == {*STATE}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in STATE.values())
    assert all(file.nbytes <= 200 or len(file.infos) == 1 for file in files_of(tmp_path).values())


def test_a_wrapped_tree_is_written_merged(tmp_path):
    tree = adapted({name: x for name, x in STATE.items() if name != "model.steps"}, embed_tokens=jlora.Axes(0, 1))
    to_safetensors(tree, tmp_path)
    assert_same(state_of(tmp_path), merged(tree))


@pytest.mark.parametrize(
    "settings",
    [{}, {"layers": [0, 2]}, {"variant": "dora"}, pytest.param({"variant": "oft"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_stacked_tree_is_written_by_a_map_layer_by_layer(settings, tmp_path, monkeypatch):
    spec = jlora.LoraSpec(targets="query", rank=2, axes=AXES, train=("norm",), **settings)
    tree = noisy(jax.device_put(STACKED), spec)
    sizes = []
    real = parts.merge
    monkeypatch.setattr(parts, "merge", lambda t: sizes.extend(x.base.size for x in t.values()) or real(t))
    to_safetensors(tree, tmp_path, names=NAMES)
    assert max(sizes) <= STATE["model.embed_tokens.weight"].size  # a layer, never the stack
    expected = jax.jit(jlora.merge)(tree)
    found = from_safetensors(tmp_path, like=jax.eval_shape(lambda: expected), names=NAMES)
    assert_same(flat(found), flat(expected))
    kernel = np.asarray(expected["layers"]["attention"]["query"]["kernel"])
    np.testing.assert_allclose(
        state_of(tmp_path)["model.layers.1.q_proj.weight"], kernel[:, 1].reshape(4, 6).T, rtol=1e-6
    )


def test_a_file_is_read_as_another_tree_placed_as_that(tmp_path):
    state = {name: x for name, x in STATE.items() if name != "model.steps"}
    to_safetensors(nested(state), tmp_path)
    mesh = jax.make_mesh((2,), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), STACKED)
    like["embed"]["embedding"] = jax.ShapeDtypeStruct((10, 4), jnp.float32, sharding=place)
    tree = from_safetensors(tmp_path, like=like, names=NAMES)
    assert_same(flat(tree), flat(STACKED))
    assert tree["embed"]["embedding"].sharding == place and tree["norm"]["scale"].dtype == jnp.float32


def test_types_are_cast_on_request(tmp_path):
    state = {name: x for name, x in STATE.items() if name != "model.steps"}
    to_safetensors(nested(state), tmp_path, dtype=jnp.bfloat16)
    assert {x.dtype for x in state_of(tmp_path).values()} == {np.dtype(ml_dtypes.bfloat16)}
    tree = from_safetensors(tmp_path, dtype=jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(tree)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", ".hidden", 3, None]
)
def test_an_index_names_files_beside_it_and_nothing_else(file, tmp_path):
    to_safetensors(nested(STATE), tmp_path, shard_bytes=200)
    index = {"weight_map": {"model.steps": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="files beside it"):
        from_safetensors(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        from_safetensors(tmp_path)
    to_safetensors(nested(STATE), tmp_path)
    with pytest.raises(ValueError, match="no name for head/kernel"):
        from_safetensors(tmp_path, like={**STACKED, "head": {"kernel": np.ones((4, 2))}}, names=NAMES)
    with pytest.raises(ValueError, match=r"has no model\.layers\.3\.q_proj"):
        wide = jax.tree.map(lambda x: np.concatenate([x, x[:, :1]], 1) if x.ndim > 2 else x, STACKED)
        from_safetensors(tmp_path, like=wide, names=NAMES)
    with pytest.raises(ValueError, match="no name for layers/attention"):
        to_safetensors(STACKED, tmp_path, names=NAMES[1:])


def test_a_plain_tree_is_written_with_the_axes_of_sites(tmp_path):
    fn = lambda p, x: jnp.einsum("bd,dnh->bnh", x, p["mixer"]["q"]["kernel"]) @ p["mixer"]["o"]["kernel"]
    params = {"mixer": {"q": {"kernel": noise(4, 2, 3)}, "o": {"kernel": noise(3, 5)}}}
    names = [("q_proj", "mixer/q/kernel"), ("o_proj", "mixer/o/kernel")]
    with pytest.raises(ValueError, match=r"axes of mixer/q/kernel.*sites=jlora\.sites"):
        to_safetensors(params, tmp_path, names=names)
    to_safetensors(params, tmp_path, names=names, sites=jlora.sites(fn, params, np.ones((2, 4), np.float32)))
    expected = params["mixer"]["q"]["kernel"].reshape(4, 6).T
    np.testing.assert_array_equal(state_of(tmp_path)["q_proj.weight"], expected)
    again = from_safetensors(tmp_path, like=params, names=names)
    assert_same(flat(again), flat(params))


def test_what_stands_beside_the_weights(tmp_path):
    """Settings that are given, or those of a model's directory, with its tokenizer and texts."""
    tree = {"dense": {"kernel": jnp.ones((4, 3))}}
    settings = {"model_type": "llama", "dtype": "float32", "vocab_size": 3}
    jlora.peft.to_safetensors(tree, tmp_path / "one", config=settings, dtype=jnp.bfloat16)
    assert read_json(tmp_path / "one" / "config.json") == settings | {"dtype": "bfloat16"}
    (tmp_path / "one" / "tokenizer.json").write_text("{}")
    (tmp_path / "one" / "pytorch_model.bin").write_bytes(b"0")
    jlora.peft.to_safetensors(tree, tmp_path / "two", config=tmp_path / "one", dtype=jnp.float16)
    assert read_json(tmp_path / "two" / "config.json")["dtype"] == "float16"
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"config is .*nothing, which is no directory with a config.json"):
        jlora.peft.to_safetensors(tree, tmp_path / "three", config=tmp_path / "nothing")
    assert not (tmp_path / "three").exists()
