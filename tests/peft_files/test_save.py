"""What is written for each kind of node, and that it is written whole or not at all."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import jlora
from jlora.peft import tensors
from jlora.peft.tensors import TensorFile
from tests.optim.support import noisy
from tests.peft_files.trees import LINEAR, assert_same, lora, merged, nested, noise

STATE = {f"layers.{i}.{p}.weight": noise(8, 8) for i in range(3) for p in ("attn.q_proj", "attn.dense", "mlp.dense")}
STATE |= {name.replace("weight", "bias"): noise(8) for name in STATE}
STATE |= {"embed_tokens.weight": noise(10, 8), "pooler.dense.weight": noise(8, 8), "norm.weight": noise(8)}


OBLONG = {"q_proj.weight": noise(16, 8), "dense.weight": noise(8, 16), "k_proj.weight": noise(8, 8)}


def wrapped(targets, state=STATE, **settings):
    axes = {name: LINEAR for name in ("q_proj", "k_proj", "dense") if any(name in key for key in state)}
    return noisy(nested(state), jlora.LoraSpec(targets=targets, axes=axes, **settings))


def saved(directory, tree):
    jlora.peft.save(directory, tree)
    return json.loads((directory / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("settings", "rank"),
    [({}, 2), ({"init": "pissa"}, 4), ({"variant": "lora_fa"}, 2), ({"variant": "adalora"}, 2),
     ({"variant": "vera"}, 2), ({"variant": "loha"}, 4), ({"variant": "lokr", "options": {"factor": -1}}, 4)],
    ids=str,
)  # fmt: skip
def test_each_low_rank_variant_has_a_portable_form_of_the_same_function(settings, rank, tmp_path):
    tree = wrapped(["q_proj"], rank=2, **settings)
    jlora.peft.save(tmp_path, tree, portable=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", rank)
    assert_same(merged(jlora.peft.load(tmp_path, nested(STATE))), merged(tree))


VARIANTS = {
    "lora": ({}, "LORA"),
    "dora": ({"variant": "dora"}, "LORA"),
    "dora+olora": ({"variant": "dora", "init": "olora"}, "LORA"),
    "adalora": ({"variant": "adalora"}, "ADALORA"),
    "vera": ({"variant": "vera"}, "VERA"),
    "loha": ({"variant": "loha"}, "LOHA"),
    "lokr": ({"variant": "lokr", "options": {"factor": -1}}, "LOKR"),
    "lokr, whole": ({"variant": "lokr", "rank": 3, "options": {"factor": -1, "whole": True}}, "LOKR"),
    "lokr, both": ({"variant": "lokr", "rank": 1, "options": {"factor": 4, "decompose_both": True}}, "LOKR"),
    "ia3": ({"variant": "ia3"}, "IA3"),
    "ia3, in": ({"variant": "ia3", "options": {"on": "in"}}, "IA3"),
    "oft": ({"variant": "oft", "options": {"block_size": 4}}, "OFT"),
    "oft, series": ({"variant": "oft", "options": {"block_size": 2, "cayley": "neumann", "terms": 4}}, "OFT"),
    "boft": ({"variant": "boft", "options": {"block_size": 4, "factors": 1}}, "BOFT"),
    "boft, halves": (
        {"variant": "boft", "options": {"block_size": 2, "factors": 3, "butterfly": "halves", "gain": True}}, "BOFT"
    ),
    "miss": ({"variant": "miss"}, "MISS"),
    "miss, mini": ({"variant": "miss", "options": {"mini": 4}}, "MISS"),
    "hra": ({"variant": "hra"}, "HRA"),
    "road": ({"variant": "road"}, "ROAD"),
    "road_4": ({"variant": "road", "options": {"kind": "road_4", "group_size": 4}}, "ROAD"),
    "c3a": ({"variant": "c3a", "options": {"block_size": 4}}, "C3A"),
    "gralora": ({"variant": "gralora"}, "GRALORA"),
    "gralora, hybrid": ({"variant": "gralora", "options": {"k": 1, "hybrid": 1}}, "GRALORA"),
    "fourierft": ({"variant": "fourierft", "options": {"frequencies": 9, "seed": 3}}, "FOURIERFT"),
    "waveft": ({"variant": "waveft"}, "WAVEFT"),
    "waveft, entries": ({"variant": "waveft", "options": {"frequencies": 9, "wavelet": False}}, "WAVEFT"),
    "shira": ({"variant": "shira"}, "SHIRA"),
    "randlora": ({"variant": "randlora"}, "RANDLORA"),
    "randlora, a rest": ({"variant": "randlora", "rank": 3}, "RANDLORA"),
    "pvera": ({"variant": "pvera"}, "PVERA"),
    "hira": ({"variant": "hira"}, "HIRA"),
    "delora": ({"variant": "delora"}, "DELORA"),
}  # fmt: skip


# The update of twice the rank; what PEFT has whole at such ranks; output scales, which PEFT always has.
OTHER_ARRAYS = {"dora+olora", "lokr", "lokr, both", "boft"}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_written_as_what_it_is(name, tmp_path):
    """Its settings and its arrays come back, not its function alone."""
    settings, method = VARIANTS[name]
    rank = {} if method in ("IA3", "OFT", "BOFT", "ROAD", "C3A", "FOURIERFT", "WAVEFT") else {"rank": 2}
    is_bare = name == "ia3" or method == "ROAD"
    state = {key: x for key, x in STATE.items() if not is_bare or not key.endswith("bias")}
    tree = wrapped(["q_proj"], state, **rank | settings)
    assert saved(tmp_path, tree)["peft_type"] == method
    again = jlora.peft.load(tmp_path, nested(state))
    assert_same(merged(again), merged(tree))
    ours, theirs = (t["layers"]["1"]["attn"]["q_proj"]["weight"] for t in (tree, again))
    if name not in OTHER_ARRAYS:
        assert type(ours) is type(theirs)
        for one, other in zip(
            *(jax.tree.leaves(jlora.partition({"w": node})[0]) for node in (theirs, ours)), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_kernels_of_several_sizes_are_in_one_file(name, tmp_path):
    settings, method = VARIANTS[name]
    rank = {} if method in ("IA3", "OFT", "BOFT", "ROAD", "C3A", "FOURIERFT", "WAVEFT") else {"rank": 2}
    settings = {"options": {"group_size": 8}} | settings if method == "ROAD" else settings
    tree = wrapped(["*"], OBLONG, **rank | settings)
    assert saved(tmp_path, tree)["peft_type"] == method
    assert_same(merged(jlora.peft.load(tmp_path, nested(OBLONG))), merged(tree))


@pytest.mark.parametrize("variant", ["vera", "pvera", "randlora"])
def test_bases_that_are_not_the_same_are_written_as_plain_lora(variant, tmp_path):
    trees = [
        wrapped([name], OBLONG, rank=2, variant=variant, options={seed: i})
        for i, name in enumerate(("q_proj", "dense"))
        for seed in ("seed" if variant == "randlora" else "projection_seed",)
    ]
    tree = {**trees[0], "dense": trees[1]["dense"]}
    assert saved(tmp_path, tree)["peft_type"] == "LORA"
    assert_same(merged(jlora.peft.load(tmp_path, nested(OBLONG))), merged(tree))


def test_ia3_scales_biases_in_peft(tmp_path):
    """Loaded, the two have one vector; where they have two, as in training here, there is no such file."""
    tree = wrapped(["q_proj"], variant="ia3")
    with pytest.raises(ValueError, match="other gains than its kernel"):
        jlora.peft.save(tmp_path, tree)
    state = {key: x for key, x in STATE.items() if not key.endswith("bias")}
    jlora.peft.save(tmp_path, wrapped(["q_proj"], state, variant="ia3"))
    again = jlora.peft.load(tmp_path, nested(STATE))
    layer = again["layers"]["2"]["attn"]["q_proj"]
    np.testing.assert_array_equal(layer["bias"].gain, layer["weight"].ia3_l)
    jlora.peft.save(tmp_path / "again", again)
    assert_same(merged(jlora.peft.load(tmp_path / "again", nested(STATE))), merged(again))


def test_norms_alone_are_ln_tuning(tmp_path):
    tree = noisy(nested(STATE), jlora.LoraSpec(targets=(), train="norm"))
    assert saved(tmp_path, tree) == {
        "peft_type": "LN_TUNING", "base_model_name_or_path": None, "inference_mode": True, "target_modules": ["norm"],
        "modules_to_save": None, "task_type": None,
    }  # fmt: skip
    assert [*TensorFile(tmp_path / "adapter_model.safetensors")] == ["base_model.model.norm.ln_tuning_layers.weight"]
    again = jlora.peft.load(tmp_path, nested(STATE))
    assert isinstance(again["norm"]["weight"], jlora.TrainableParam)
    assert_same(merged(again), merged(tree))
    biases = noisy(nested(STATE), jlora.LoraSpec(targets=(), bias="all"))
    with pytest.raises(ValueError, match="the bias alone trains"):
        jlora.peft.save(tmp_path / "biases", biases)


def test_a_bias_that_peft_turns_too_is_refused_both_ways(tmp_path):
    bare = {n: x for n, x in STATE.items() if not n.endswith("bias")}
    with pytest.raises(ValueError, match=r"ROAD changes layers\.\d\.attn\.q_proj\.bias with its kernel"):
        jlora.peft.save(tmp_path / "ours", wrapped(["q_proj"], variant="road"))
    jlora.peft.save(tmp_path / "bare", wrapped(["q_proj"], bare, variant="road"))
    with pytest.raises(ValueError, match=r"ROAD changes layers/./attn/q_proj/bias with its kernel"):
        jlora.peft.load(tmp_path / "bare", nested(STATE))


def test_what_no_method_of_pefts_is_is_refused(tmp_path):
    tree = wrapped(["q_proj"], variant="boft", options={"block_size": 2, "factors": 3})
    with pytest.raises(ValueError, match=r"another butterfly.*halves"):
        jlora.peft.save(tmp_path, tree)
    assert not list(tmp_path.iterdir())


def test_two_variants_in_one_tree_are_written_as_lora_where_both_are_low_rank(tmp_path):
    tree = wrapped(["q_proj"], rank=2, overrides={"layers/1/*/*": {"variant": "loha"}})
    assert saved(tmp_path, tree)["peft_type"] == "LORA"
    assert_same(merged(jlora.peft.load(tmp_path, nested(STATE))), merged(tree))


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


def _file_without(directory, settings, change):
    """The file of an adapter, with its tensors changed."""
    rank = {} if settings["variant"] == "fourierft" else {"rank": 2}
    jlora.peft.save(directory, wrapped(["q_proj"], **rank | settings))
    path = directory / "adapter_model.safetensors"
    file = TensorFile(path)
    metadata, arrays = dict(file.metadata), {name: np.array(file[name]) for name in file}
    save_file(change(arrays), path, metadata)


BROKEN = {
    "randlora": (lambda of: {n: x for n, x in of.items() if "_B" not in n}, "lacks RandLoRA's bases"),
    "pvera": (lambda of: {n: x for n, x in of.items() if "pvera_A" not in n}, "lacks pVeRA's A and B"),
    "shira": (lambda of: {n: x + 8 if "indices" in n else x for n, x in of.items()}, "values for places that"),
    "fourierft": (lambda of: {n: np.tile(x, 2) for n, x in of.items()}, "has 64 numbers, and 128 coefficients"),
    "miss": (lambda of: {n: x[:, :3] for n, x in of.items()}, "size"),
    "gralora": (lambda of: {n: x for n, x in of.items() if "gralora_A" not in n}, "they come in pairs"),
}


@pytest.mark.parametrize("variant", BROKEN)
def test_files_that_are_not_whole_are_refused(variant, tmp_path):
    change, message = BROKEN[variant]
    _file_without(tmp_path, {"variant": variant}, change)
    with pytest.raises(ValueError, match=message):
        jlora.peft.load(tmp_path, nested(STATE))
