"""What is written for each kind of node, and that it is written whole or not at all."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from jlora.peft import tensors
from jlora.peft.tensors import TensorFile
from tests.optim.support import noisy
from tests.peft_files.trees import LINEAR, assert_same, lora, merged, nested, noise

STATE = {f"layers.{i}.{p}.weight": noise(8, 8) for i in range(3) for p in ("attn.q_proj", "attn.dense", "mlp.dense")}
STATE |= {name.replace("weight", "bias"): noise(8) for name in STATE}
STATE |= {"embed_tokens.weight": noise(10, 8), "pooler.dense.weight": noise(8, 8), "norm.weight": noise(8)}


def wrapped(targets, **settings):
    axes = dict.fromkeys(("q_proj", "dense"), LINEAR)
    return noisy(nested(STATE), jlora.LoraSpec(targets=targets, axes=axes, **settings))


def saved(directory, tree):
    jlora.peft.save(directory, tree)
    return json.loads((directory / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("settings", "rank"),
    [({}, 2), ({"init": "pissa"}, 4), ({"variant": "lora_fa"}, 2), ({"variant": "adalora"}, 2),
     ({"variant": "vera"}, 2), ({"variant": "loha"}, 4), ({"variant": "dora"}, 2),
     ({"variant": "dora", "init": "olora"}, 4)],
    ids=str,
)  # fmt: skip
def test_each_low_rank_variant_is_written_as_the_same_function(settings, rank, tmp_path):
    tree = wrapped(["q_proj"], rank=2, **settings)
    assert saved(tmp_path, tree)["r"] == rank
    assert_same(merged(jlora.peft.load(tmp_path, nested(STATE))), merged(tree))


@pytest.mark.parametrize("variant", [pytest.param("oft", marks=pytest.mark.slow), "ia3"])
def test_what_is_no_low_rank_update_is_refused(variant, tmp_path):
    with pytest.raises(ValueError, match=r"layers/0/attn/q_proj/weight is a \w+, which is no low-rank update.*merge"):
        jlora.peft.save(tmp_path, wrapped(["q_proj"], variant=variant))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["q_proj"], ["q_proj"]),
        (["attn/*", "mlp/*"], ["attn.dense", "mlp.dense", "q_proj"]),
        (["layers/0/attn/q_proj"], ["layers.0.attn.q_proj"]),
        (["mlp/dense"], ["mlp.dense"]),
        (["*_proj", "*dense"], ["attn.dense", "mlp.dense", "pooler.dense", "q_proj"]),
    ],
)
def test_the_targets_are_short_and_exact(targets, named, tmp_path):
    names = saved(tmp_path, wrapped(targets, rank=2))["target_modules"]
    assert names == named
    kernels = {n.removesuffix(".weight") for n, x in STATE.items() if x.ndim == 2}
    meant = {n for n in kernels if any(n == t or n.endswith(f".{t}") for t in names)}
    file = TensorFile(tmp_path / "adapter_model.safetensors")
    assert meant == {n.removeprefix("base_model.model.").rpartition(".lora_")[0] for n in file}


def test_ranks_and_scales_that_differ_are_patterns(tmp_path):
    values = {"layers.0.attn.q_proj": (2, 2.0), "layers.1.attn.q_proj": (2, 2.0), "layers.2.attn.q_proj": (4, 0.5)}
    values |= {f"layers.{i}.mlp.dense": (3, 4.0) for i in range(3)}
    nodes = {f"{name}.weight": lora(STATE[f"{name}.weight"], *value) for name, value in values.items()}
    tree = nested(STATE | nodes)
    config = saved(tmp_path, tree)
    assert (config["r"], config["lora_alpha"]) == (3, 12)
    assert config["rank_pattern"] == {
        "layers.0.attn.q_proj": 2, "layers.1.attn.q_proj": 2, "layers.2.attn.q_proj": 4
    }  # fmt: skip
    assert config["alpha_pattern"] == {
        "layers.0.attn.q_proj": 4, "layers.1.attn.q_proj": 4, "layers.2.attn.q_proj": 2
    }  # fmt: skip
    again = jlora.peft.load(tmp_path, nested(STATE))
    assert_same(merged(again), merged(tree))


def test_a_scale_of_rslora_stays_one(tmp_path):
    config = saved(tmp_path, wrapped(["q_proj"], rank=8, alpha=16, scaling="rslora"))
    assert config["use_rslora"] and config["lora_alpha"] == 16


@pytest.mark.parametrize(("bias", "expected"), [("none", "none"), ("lora_only", "lora_only"), ("all", "all")])
def test_biases_are_pefts_modes(bias, expected, tmp_path):
    tree = wrapped(["q_proj"], rank=2, bias=bias)
    config = saved(tmp_path, tree)
    assert config["bias"] == expected and not config["modules_to_save"]
    assert_same(merged(jlora.peft.load(tmp_path, nested(STATE))), merged(tree))


def test_other_biases_are_modules_saved_whole(tmp_path):
    tree = wrapped(["q_proj"], rank=2, train=("0/mlp/dense/bias", "norm"))
    config = saved(tmp_path, tree)
    assert config["bias"] == "none" and config["modules_to_save"] == ["layers.0.mlp.dense", "norm"]
    assert_same(merged(jlora.peft.load(tmp_path, nested(STATE))), merged(tree))


def test_some_of_the_biases_beside_kernels_have_no_form(tmp_path):
    with pytest.raises(ValueError, match="PEFT has all of them"):
        jlora.peft.save(tmp_path, wrapped(["q_proj"], rank=2, train=("0/attn/q_proj/bias",)))


def test_what_is_not_wrapped_or_has_no_name_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"jlora\.wrap"):
        jlora.peft.save(tmp_path, nested(STATE))
    tree = wrapped(["q_proj"], rank=2)
    with pytest.raises(ValueError, match="no name for layers/"):
        jlora.peft.save(tmp_path, tree, names=[("embed_tokens", "embed_tokens/weight")])
    with pytest.raises(ValueError, match="there is no map 'lama'"):
        jlora.peft.save(tmp_path, tree, names="lama")


def test_a_flax_stack_needs_names(tmp_path):
    params = {"layers": {"q": {"kernel": np.ones((3, 8, 8), np.float32)}}}
    tree = noisy(params, jlora.LoraSpec(targets="q", rank=2, axes={"q": jlora.Axes(1, 2, 0)}))
    with pytest.raises(ValueError, match=r"layers/q/kernel of shape \(3, 8, 8\) stacks kernels.*names="):
        jlora.peft.save(tmp_path, tree)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    first = wrapped(["q_proj"], rank=2)
    jlora.peft.save(tmp_path, first)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(tensors, "flush", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        jlora.peft.save(tmp_path, wrapped(["q_proj"], rank=4))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_adapter_of_an_abstract_base_is_loaded_and_saved(tmp_path):
    tree = wrapped(["q_proj"], rank=2, variant="dora")
    jlora.peft.save(tmp_path / "a", tree)
    planned = jlora.peft.load(tmp_path / "a", jax.eval_shape(lambda: nested(STATE)))
    assert isinstance(planned["layers"]["0"]["attn"]["q_proj"]["weight"].base, jax.ShapeDtypeStruct)
    jlora.peft.save(tmp_path / "b", planned)
    assert_same(merged(jlora.peft.load(tmp_path / "b", nested(STATE))), merged(tree))


@pytest.mark.parametrize("settings", [{}, {"variant": "dora"}, {"init": "pissa"}], ids=str)
def test_factors_lie_as_the_base_lies(settings, tmp_path):
    jlora.peft.save(tmp_path, wrapped(["q_proj"], rank=2, **settings))
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    place = NamedSharding(mesh, PartitionSpec("model", "data"))
    params = nested({n: jax.device_put(x, place) if n.endswith("q_proj.weight") else x for n, x in STATE.items()})
    node = jlora.peft.load(tmp_path, params)["layers"]["1"]["attn"]["q_proj"]["weight"]
    assert node.base.sharding == place
    assert node.lora_a.sharding.spec[0] == "data" and node.lora_b.sharding.spec[1] == "model"
    if "variant" in settings:
        assert node.magnitude.sharding.spec[0] == "model" and node.norm2.sharding.spec[0] == "model"
    np.testing.assert_array_equal(node.base, STATE["layers.1.attn.q_proj.weight"])


def test_a_target_is_no_end_of_a_module_that_holds_others(tmp_path):
    """A number is one, where layers lie in lists: PEFT would take the list's first block."""
    state = {f"blocks.{i}.attn.{name}.weight": noise(4, 4) for i in range(2) for name in ("to_q", "to_out.0")}
    tree = nested({name: lora(x) if "to_out" in name else x for name, x in state.items()})
    jlora.peft.save(tmp_path, tree)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["attn.to_out.0"]
    assert_same(merged(jlora.peft.load(tmp_path, nested(state))), merged(tree))
