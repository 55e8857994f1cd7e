"""Portable files: what vLLM, SGLang, llama.cpp and TGI read alike; and the nearest low-rank update."""

import functools
import json

import jax
import numpy as np
import pytest

import jlora
from jlora.peft.tensors import TensorFile
from tests.optim.support import noisy
from tests.peft_files.trees import assert_same, lora, merged, multiplied, nested, noise

STATE = {f"model.layers.{i}.attn.{p}_proj.weight": noise(6, 4) for i in range(3) for p in "qv"}
STATE |= {"model.embed_tokens.weight": noise(10, 4), "lm_head.weight": noise(10, 4), "model.norm.weight": noise(4)}
ALLOWED = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


def tree(**settings):
    ranks = {"model.layers.0.attn.q_proj.weight": (2, 0.5), "model.layers.2.attn.q_proj.weight": (3, 1.7)}
    nodes = {name: lora(STATE[name], rank, scale) for name, (rank, scale) in ranks.items()}
    return nested(jax.device_put(STATE) | nodes | settings)


def saved(directory, wrapped, **settings):
    jlora.peft.save(directory, wrapped, portable=True, **settings)
    return json.loads((directory / "adapter_config.json").read_text())


def test_one_rank_and_a_scale_of_one(tmp_path):
    config = saved(tmp_path, tree())
    assert config["r"] == config["lora_alpha"] == 3 and config["peft_type"] == "LORA"
    assert config["target_modules"] == ["q_proj"] and not config["use_rslora"] and not config["use_dora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["bias"] == "none"
    assert not config["modules_to_save"] and not config["lora_bias"] and not config["target_parameters"]


def test_only_factors_and_a_pair_in_every_layer(tmp_path):
    saved(tmp_path, tree())
    file = TensorFile(tmp_path / "adapter_model.safetensors")
    assert all(name.endswith(ALLOWED) for name in file)
    pairs = {name.rpartition(".lora_")[0] for name in file}
    assert pairs == {f"base_model.model.model.layers.{i}.attn.q_proj" for i in range(3)}
    assert all(3 in info.shape for info in file.infos.values())


def test_nothing_is_lost(tmp_path):
    wrapped = tree()
    saved(tmp_path, wrapped)
    again = jlora.peft.load(tmp_path, nested(STATE))
    assert_same(merged(again), merged(wrapped))


FULL = {
    f"model.layers.{i}.{name}.weight": noise(*sizes)
    for i in range(2)
    for name, sizes in {"self_attn.q_proj": (8, 4), "self_attn.k_proj": (2, 4), "self_attn.v_proj": (2, 4),
                        "self_attn.o_proj": (4, 8), "mlp.gate_proj": (6, 4), "mlp.up_proj": (6, 4)}.items()
}  # fmt: skip


@pytest.mark.parametrize(
    "adapted, expected",
    [
        (["self_attn.v_proj"], {"q_proj", "k_proj", "v_proj"}),
        (["self_attn.q_proj", "mlp.up_proj"], {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}),
        (["self_attn.o_proj"], {"o_proj"}),
    ],
)
@pytest.mark.parametrize("is_flax", [False, True])
def test_what_servers_fuse_is_whole(adapted, expected, is_flax, tmp_path):
    """SGLang takes q, k and v together, and gate and up: those that are not adapted get zeros, of their sizes."""
    first = {f"model.layers.0.{name}.weight": lora(FULL[f"model.layers.0.{name}.weight"]) for name in adapted}
    wrapped = nested(FULL | first)
    if is_flax:
        of = lambda name: f"{name.removesuffix('.weight')}.kernel"
        axes = jlora.Axes(0, 1)
        wrapped = nested({of(n): lora(x.base.T, axes=axes) if n in first else x.T for n, x in (FULL | first).items()})
    config = saved(tmp_path, wrapped)
    assert {*config["target_modules"]} == expected
    file = TensorFile(tmp_path / "adapter_model.safetensors")
    for name, x in FULL.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        assert (f"{module}.lora_A.weight" in file) == (name.split(".")[-2] in expected)
        if f"{module}.lora_A.weight" in file:
            a, b = (file[f"{module}.lora_{which}.weight"] for which in "AB")
            assert (a.shape, b.shape) == ((2, x.shape[1]), (x.shape[0], 2))
            assert name in first or (not a.any() and not b.any())
    again = jlora.peft.load(tmp_path, nested(FULL))
    assert all(np.array_equal(merged(again)[name], x) for name, x in FULL.items() if name not in first)


@pytest.mark.parametrize(
    ("what", "settings"),
    [
        ("DoRA", {"variant": "dora"}),
        ("biases", {"lora_bias": True}),
        ("in full", {"train": ("norm",)}),
        ("trained rows", {"train_tokens": {"embed_tokens": [1]}}),
    ],
)
def test_the_rest_is_refused_with_the_ways_out(what, settings, tmp_path):
    params = nested({**STATE, "model.layers.0.attn.q_proj.bias": noise(6)})
    spec = jlora.LoraSpec(targets="0/attn/q_proj", rank=2, axes={"q_proj": jlora.Axes(1, 0)}, **settings)
    other = "low_rank" if what == "DoRA" else "jlora merge"
    with pytest.raises(ValueError, match=rf"{what}.*to_safetensors.*{other}.*PEFT itself"):
        jlora.peft.save(tmp_path, noisy(params, spec), portable=True)
    assert not list(tmp_path.iterdir())


def test_a_table_that_is_the_head_too_is_refused(tmp_path):
    state = {name: x for name, x in STATE.items() if name != "lm_head.weight"}
    table = lora(state["model.embed_tokens.weight"], axes=jlora.Axes(0, 1))
    with pytest.raises(ValueError, match="the head too"):
        jlora.peft.save(tmp_path, nested({**state, "model.embed_tokens.weight": table}), portable=True)


@functools.cache
def kernels():
    """A DoRA kernel and a stack of them, and what they are merged to."""
    params = {"kernel": noise(6, 8), "other": {"kernel": noise(3, 5, 7)}}
    axes = {"other/kernel": jlora.Axes(1, 2, 0)}
    wrapped = noisy(params, jlora.LoraSpec(targets=["kernel"], rank=4, variant="dora", axes=axes))
    return params, wrapped, jax.device_get(jax.jit(jlora.merge)(wrapped))


@pytest.mark.parametrize("rank", [pytest.param(1, marks=pytest.mark.slow), 3, 50])
def test_the_nearest_low_rank_update_tells_what_it_loses(rank):
    params, wrapped, whole = kernels()
    nearest, errors = jlora.peft.low_rank(wrapped, rank)
    assert {*errors} == {"kernel", "other/kernel"} and nearest["kernel"].rank == min(rank, 6)
    nodes = {"kernel": (nearest["kernel"], lambda tree: tree["kernel"])}
    nodes["other/kernel"] = nearest["other"]["kernel"], lambda tree: tree["other"]["kernel"]
    for path, (node, of) in nodes.items():
        delta = of(whole) - of(params)
        s = np.linalg.svd(delta, compute_uv=False)
        np.testing.assert_allclose(errors[path], np.linalg.norm(s[..., rank:]) / np.linalg.norm(s), atol=1e-5)
        left = np.linalg.norm(multiplied(node) - of(whole)) / np.linalg.norm(delta)
        np.testing.assert_allclose(left, errors[path], atol=1e-5)


def test_an_approximation_can_be_saved_where_the_adapter_can_not(tmp_path):
    spec = jlora.LoraSpec(targets="q_proj", variant="dora", rank=2, axes={"q_proj": jlora.Axes(1, 0)})
    wrapped = noisy(nested(STATE), spec)
    nearest, errors = jlora.peft.low_rank(wrapped, 4)
    assert max(errors.values()) < 1e-5
    saved(tmp_path, nearest)
    assert_same(merged(jlora.peft.load(tmp_path, nested(STATE))), merged(wrapped))


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, None])
def test_a_rank_is_a_positive_integer(rank):
    with pytest.raises(ValueError, match="positive integer"):
        jlora.peft.low_rank(tree(), rank)
