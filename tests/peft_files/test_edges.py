"""Files and trees at the edge of the format."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.peft_files.trees import adapted, assert_same, flat, lora, merged, nested, noise

WEIGHT = noise(6, 4)


def rewritten(directory, **settings):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_regular_expression_of_a_large_count_is_refused_at_once(tmp_path):
    params = {"q_proj": {"weight": WEIGHT}}
    jlora.peft.save(tmp_path, {"q_proj": {"weight": lora(WEIGHT)}})
    rewritten(tmp_path, target_modules=".*q_proj{200000}")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            jlora.peft.load(tmp_path, params)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("names", ["maxtext-gemma", "maxtext-gemma3"])
def test_scales_of_gemmas_norms_are_shifted_by_one_or_refused(names, tmp_path):
    tree = {"decoder": {"decoder_norm": {"scale": jnp.ones(4)}}}  # in PyTorch 0
    try:
        jlora.peft.to_safetensors(tree, tmp_path, names=names)
    except ValueError:
        return
    found = jlora.peft.from_safetensors(tmp_path)["model"]["norm"]["weight"]
    np.testing.assert_array_equal(found, np.zeros(4))


def test_half_of_a_module_is_refused(tmp_path):
    names = [("gate_up[0/2]", "gate/kernel"), ("gate_up[1/2]", "up/kernel")]
    with pytest.raises(ValueError, match="gate_up"):
        jlora.peft.to_safetensors({"up": {"kernel": jnp.ones((4, 3))}}, tmp_path, names=names)


def test_integers_keep_their_type(tmp_path):
    tree = {"ids": jnp.arange(1000), "a": {"weight": jnp.ones(3)}}
    jlora.peft.to_safetensors(tree, tmp_path, dtype="bfloat16")
    found = jlora.peft.from_safetensors(tmp_path)
    assert (found["ids"].dtype, found["a"]["weight"].dtype) == (jnp.int32, jnp.bfloat16)


def test_a_scalar_is_a_tensor(tmp_path):
    jlora.peft.to_safetensors({"logit_scale": jnp.float32(3)}, tmp_path)
    assert jlora.peft.from_safetensors(tmp_path)["logit_scale"] == 3


@pytest.mark.parametrize("first, second", [(40, 1 << 30), (1 << 30, 40)], ids=["shards first", "one first"])
def test_a_model_written_over_another_is_the_new_one(first, second, tmp_path):
    model = lambda value, n: {f"l{i}": {"weight": jnp.full(10, value)} for i in range(n)}
    jlora.peft.to_safetensors(model(1.0, 3), tmp_path, shard_bytes=first)
    jlora.peft.to_safetensors(model(2.0, 2), tmp_path, shard_bytes=second)
    assert_same(flat(jlora.peft.from_safetensors(tmp_path)), flat(model(2.0, 2)))
    one = (tmp_path / "model.safetensors").exists()
    assert one != (tmp_path / "model.safetensors.index.json").exists()  # Transformers reads the single file first


def test_an_abstract_adapter_has_nothing_to_save(tmp_path):
    params = {"q_proj": {"weight": jax.ShapeDtypeStruct((6, 4), jnp.float32)}}
    axes = {"q_proj": jlora.Axes((1,), (0,))}
    tree = jlora.wrap(params, jlora.LoraSpec(targets="q_proj", rank=2, axes=axes))
    with pytest.raises((TypeError, ValueError), match="q_proj"):
        jlora.peft.save(tmp_path, tree)
    assert not list(tmp_path.iterdir())


def test_what_is_not_finite_is_not_written(tmp_path):
    node = lora(WEIGHT)
    with pytest.raises(ValueError, match="q_proj"):
        jlora.peft.save(tmp_path, {"q_proj": {"weight": dataclasses.replace(node, lora_a=node.lora_a * jnp.nan)}})


def test_ranks_of_modules_whose_names_end_alike(tmp_path):
    ranks = {"a.q.weight": 3, "b.a.q.weight": 2, "c.q.weight": 2, "d.b.a.q.weight": 1}
    tree = nested({name: lora(noise(6, 4), rank) for name, rank in ranks.items()})
    jlora.peft.save(tmp_path, tree)
    again = jlora.peft.load(tmp_path, jlora.unwrap(tree))
    assert {name: node.rank for name, node in flat(again).items()} == ranks


def test_targets_whose_names_are_ends_of_others(tmp_path):
    tree = {"a": {"q": {"weight": lora(WEIGHT)}}, "b": {"a": {"q": {"weight": jnp.asarray(WEIGHT)}}}}
    jlora.peft.save(tmp_path, tree)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    is_named = lambda name: any(name == target or name.endswith(f".{target}") for target in targets)
    assert isinstance(targets, str) or (is_named("a.q") and not is_named("b.a.q"))


@pytest.mark.parametrize("seed", range(3))
def test_saving_is_deterministic_and_loading_is_its_inverse(seed, tmp_path):
    tree = adapted({f"layers.{i}.{name}.weight": noise(5, 4 + seed) for i in range(2) for name in "qkv"})
    for name in ("one", "two"):
        jlora.peft.save(tmp_path / name, tree)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    again = jlora.peft.load(tmp_path / "one", jlora.unwrap(tree))
    assert_same(merged(again), merged(tree), 0)
