"""Which way a matrix of a tree lies: told by evidence, or asked for."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jlora
from jlora.nodes.axes import of_use
from tests.peft_files.trees import assert_same, flat, lora, merged, nested, noise

D, F, V = 6, 10, 14
IN_OUT, OUT_IN = jlora.Axes(0, 1), jlora.Axes(1, 0)
SHAPES = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
BLOCK = "transformer.h.0"
FLAG = "adapter_config.json"


def gpt2(in_first: bool, bias: bool = True, leaf: str = "weight") -> dict[str, np.ndarray]:
    """A block of GPT-2: of Transformers' `Conv1D`, (in, out), or as nanoGPT's linear layers."""
    state = {}
    for name, (ins, outs) in SHAPES.items():
        state[f"{BLOCK}.{name}.{leaf}"] = noise(ins, outs) if in_first else noise(outs, ins)
        if bias:
            state[f"{BLOCK}.{name}.bias"] = noise(outs)
    return state | {"lm_head.weight": noise(V, D), "query.weight": noise(D, D)}


def saved(directory, state: dict, adapted: dict[str, jlora.Axes], flag: bool | None = None, **fields) -> Any:
    """An adapter of some leaves of a tree, under PyTorch's names, and the tree merged with it."""
    tree = dict(state)
    for name, axes in adapted.items():
        tree[name] = lora(state[name], axes=axes, **fields)
    tree = nested(tree)
    is_flax = any(name.endswith("kernel") for name in state)
    names = [(n.rpartition(".")[0], n.replace(".", "/")) for n in state if not n.endswith("bias")]
    jlora.peft.save(directory, tree, names=names if is_flax else None)
    if flag is not None:
        settings = json.loads((directory / FLAG).read_text())
        (directory / FLAG).write_text(json.dumps(settings | {"fan_in_fan_out": flag}))
    return merged(tree)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("in_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("others", [{}, {"lm_head.weight": OUT_IN, "query.weight": OUT_IN}], ids=["alone", "others"])
def test_a_square_weight_of_gpt2_lies_as_its_siblings(in_first, bias, flag, others, tmp_path):
    """Those are not adapted; the file's flag is that of whichever module PEFT met last."""
    state = gpt2(in_first, bias)
    axes = IN_OUT if in_first else OUT_IN
    expected = saved(tmp_path, state, {f"{BLOCK}.attn.c_proj.weight": axes, **others}, flag)
    assert_same(merged(jlora.peft.load(tmp_path, nested(state))), expected, 1e-6)


@pytest.mark.parametrize("in_first", [True, False])
def test_a_square_kernel_of_gpt2_lies_as_its_siblings(in_first, tmp_path):
    """Transformers' Flax models have theirs as (out, in), others (in, out)."""
    state = gpt2(in_first, leaf="kernel")
    axes = IN_OUT if in_first else OUT_IN
    expected = saved(tmp_path, state, {f"{BLOCK}.attn.c_proj.kernel": axes})
    assert_same(merged(jlora.peft.load(tmp_path, nested(state))), expected, 1e-6)


def test_towers_of_either_kind_are_told_apart(tmp_path):
    """A decoder of `Conv1D` and one of linear layers in one tree: the nearest siblings tell."""
    state = {f"one.{n}": x for n, x in gpt2(True).items()} | {f"two.{n}": x for n, x in gpt2(False).items()}
    square = f"{BLOCK}.attn.c_proj.weight"
    expected = saved(tmp_path, state, {f"one.{square}": IN_OUT, f"two.{square}": OUT_IN})
    assert_same(merged(jlora.peft.load(tmp_path, nested(state))), expected, 1e-6)


def test_adapted_siblings_tell_where_the_tree_does_not(tmp_path):
    state = {"a.c_proj.weight": noise(D, D), "b.c_proj.weight": noise(F, D)}
    expected = saved(tmp_path, state, dict.fromkeys(state, IN_OUT), False)
    assert_same(merged(jlora.peft.load(tmp_path, nested(state))), expected, 1e-6)


def test_name_and_flag_together_tell(tmp_path):
    state = {"h.0.c_proj.weight": noise(D, D)}
    expected = saved(tmp_path, state, {"h.0.c_proj.weight": IN_OUT}, True)
    assert_same(merged(jlora.peft.load(tmp_path, nested(state))), expected, 1e-6)


@pytest.mark.parametrize(
    "name, flag",
    [
        ("h.0.c_proj.weight", False),
        ("h.0.c_proj.kernel", True),
        ("h.0.c_proj.kernel", False),
        ("h.0.dense.weight", True),
    ],
)
def test_where_nothing_tells_it_is_asked(name, flag, tmp_path):
    """A name of Conv1D's without its flag, or the flag without such a name, is no evidence."""
    state = {name: noise(D, D)}
    turned = saved(tmp_path, state, {name: IN_OUT}, flag)
    with pytest.raises(ValueError, match=r"do not tell its axes: in out or out in.* fan_in_fan_out=\('\w+',\) says"):
        jlora.peft.load(tmp_path, nested(state))
    module = name.split(".")[2]
    for said in (True, [module], f"0.{module}"):
        assert_same(merged(jlora.peft.load(tmp_path, nested(state), fan_in_fan_out=said)), turned, 1e-6)
    straight = flat(jlora.peft.load(tmp_path, nested(state), fan_in_fan_out=False))[name]
    assert straight.axes == OUT_IN


@pytest.mark.parametrize("name, axes", [("q_proj.weight", OUT_IN), ("q_proj.kernel", IN_OUT)])
@pytest.mark.parametrize("flag", [True, False])
def test_other_names_lie_as_their_leaf_says(name, axes, flag, tmp_path):
    """Beside a module of Conv1D's, which explains the flag."""
    state = gpt2(True) | {name: noise(D, D)}
    adapted = {f"{BLOCK}.attn.c_attn.weight": IN_OUT, name: axes}
    if name.endswith("kernel"):
        adapted = {name: axes}
    expected = saved(tmp_path, state, adapted, flag)
    assert_same(merged(jlora.peft.load(tmp_path, nested(state))), expected, 1e-6)


@pytest.mark.parametrize("leaf", ["weight", "kernel"])
@pytest.mark.parametrize("module", ["proj", "layers.0.q_proj"])
def test_a_matrix_is_not_taken_the_other_way_round(module, leaf, tmp_path):
    """A layer of 4 to 6 onto one of 6 to 4."""
    state = {f"{module}.{leaf}": noise(6, 4)}
    straight = OUT_IN if leaf == "weight" else IN_OUT
    turned = IN_OUT if leaf == "weight" else OUT_IN
    expected = saved(tmp_path / "straight", state, {f"{module}.{leaf}": straight}, False)
    assert_same(merged(jlora.peft.load(tmp_path / "straight", nested(state))), expected, 1e-6)
    saved(tmp_path, state, {f"{module}.{leaf}": turned}, False)
    told = rf"do not fit {module.replace('.', '/')}/{leaf} of shape \(6, 4\) but the other way round"
    with pytest.raises(ValueError, match=told):
        jlora.peft.load(tmp_path, nested(state))


def test_a_matrix_whose_bias_tells_is_taken_so(tmp_path):
    """A layer of another name that keeps its weight as (in, out)."""
    state = {"proj.weight": noise(6, 4), "proj.bias": noise(4)}
    expected = saved(tmp_path, state, {"proj.weight": IN_OUT}, False)
    assert_same(merged(jlora.peft.load(tmp_path, nested(state))), expected, 1e-6)
    saved(tmp_path, {"proj.weight": state["proj.weight"]}, {"proj.weight": OUT_IN})
    with pytest.raises(ValueError, match="do not fit proj/weight"):
        jlora.peft.load(tmp_path, nested(state))


def test_siblings_that_disagree_tell_nothing(tmp_path):
    state = gpt2(True) | {f"{BLOCK}.attn.c_fc.weight": noise(F, D), f"{BLOCK}.attn.c_fc.bias": noise(F)}
    saved(tmp_path, state, {f"{BLOCK}.attn.c_proj.weight": IN_OUT}, False)
    with pytest.raises(ValueError, match="do not tell its axes"):
        jlora.peft.load(tmp_path, nested(state))


def test_magnitudes_go_along(tmp_path):
    state = gpt2(True)
    name = f"{BLOCK}.attn.c_proj.weight"
    spec = jlora.LoraSpec(targets=["attn/c_proj"], rank=2, variant="dora", axes={"attn/c_proj": IN_OUT})
    tree = jlora.wrap(nested(state), spec)
    node = dataclasses.replace(flat(tree)[name], lora_b=noise(2, D), magnitude=np.abs(noise(D)) + 1)
    tree["transformer"]["h"]["0"]["attn"]["c_proj"]["weight"] = node
    jlora.peft.save(tmp_path, tree)
    settings = json.loads((tmp_path / FLAG).read_text())
    (tmp_path / FLAG).write_text(json.dumps(settings | {"fan_in_fan_out": False}))
    assert_same(merged(jlora.peft.load(tmp_path, nested(state))), merged(tree), 1e-5)


@pytest.mark.parametrize("said", [("c_fc",), ["lm_head", 3], 1, "proj"])
def test_what_is_said_is_of_the_adapter(said, tmp_path):
    state = gpt2(True)
    saved(tmp_path, state, {f"{BLOCK}.attn.c_proj.weight": IN_OUT, "lm_head.weight": OUT_IN})
    with pytest.raises(ValueError, match=r"fan_in_fan_out is True, False, or the names of modules"):
        jlora.peft.load(tmp_path, nested(state), fan_in_fan_out=said)


@pytest.mark.parametrize("names, in_first", [("gpt2", True), ("transformers-gpt2", False)])
def test_whole_models_of_gpt2_keep_their_layout(names, in_first, tmp_path):
    """In the files `Conv1D`'s weights are (in, out), square or not, in trees either."""
    state = {name: x for name, x in gpt2(True).items() if name != "query.weight"}
    turn = lambda name, x: x.T if name.startswith(BLOCK) and x.ndim == 2 and not in_first else x
    leaf = lambda name: name.replace("weight", "kernel")
    ours = nested({leaf(n): x.T if n == "lm_head.weight" else turn(n, x) for n, x in state.items()})
    jlora.peft.to_safetensors(nested(state), tmp_path / "theirs")
    found = jlora.peft.from_safetensors(tmp_path / "theirs", like=ours, names=names)
    assert_same(flat(found), flat(ours), 0)
    jlora.peft.to_safetensors(ours, tmp_path / "ours", names=names)
    assert_same(flat(jlora.peft.from_safetensors(tmp_path / "ours")), state, 0)


def test_a_module_saved_whole_keeps_its_layout_by_a_map(tmp_path):
    state = gpt2(True)
    square = f"{BLOCK}.attn.c_proj.weight"
    tree = nested(state | {"lm_head.weight": lora(state["lm_head.weight"])})
    tree["transformer"]["h"]["0"]["attn"]["c_proj"]["weight"] = jlora.TrainableParam(noise(D, D))
    jlora.peft.save(tmp_path, tree)
    beside = f"{BLOCK}.attn.c_proj.bias"
    kernels = {f"{BLOCK}.attn.c_proj.kernel": state[square], "lm_head.kernel": state["lm_head.weight"].T}
    ours = kernels | {beside: state[beside]}
    found = flat(jlora.peft.load(tmp_path, nested(ours), names="gpt2"))
    expected = flat(tree)[square].base
    np.testing.assert_array_equal(found[f"{BLOCK}.attn.c_proj.kernel"].base, expected)
    names = [(f"{BLOCK}.attn.c_proj", f"{BLOCK}.attn.c_proj.kernel".replace(".", "/")), ("lm_head", "lm_head/kernel")]
    with pytest.raises(ValueError, match="or in several ways: in out or out in"):
        jlora.peft.load(tmp_path, nested(ours), names=names)


# ------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("module", ["emb", "tok_emb", "wte", "codebook", "lookup", "patch_embed"])
@pytest.mark.parametrize("kind", ["table", "linear"])
def test_what_a_file_has_as_a_table_is_written_as_one(module, kind, tmp_path):
    """Whatever it is called; and what is none is not."""
    state = {f"{module}.weight": noise(V, D)}
    lookup = kind == "table"
    axes = of_use(IN_OUT, True) if lookup else OUT_IN
    expected = saved(tmp_path / "first", state, {f"{module}.weight": axes})
    loaded = jlora.peft.load(tmp_path / "first", nested(state))
    assert_same(merged(loaded), expected, 1e-6)
    jlora.peft.save(tmp_path / "second", loaded)
    keys = [
        {*safetensors.numpy.load_file(tmp_path / which / "adapter_model.safetensors")} for which in ("first", "second")
    ]
    stem = f"base_model.model.{module}"
    pair = ("lora_embedding_A", "lora_embedding_B") if lookup else ("lora_A.weight", "lora_B.weight")
    assert keys == [{f"{stem}.{name}" for name in pair}] * 2


def test_sites_tell_a_table_of_any_name(tmp_path):
    params = {"codebook": {"weight": noise(V, D)}, "patch_embed": {"weight": noise(D, D)}}
    use = lambda p, ids: jnp.take(p["codebook"]["weight"], ids, axis=0) @ p["patch_embed"]["weight"]
    sites = jlora.sites(use, params, np.array([1, 2]))
    tree = jlora.wrap(params, jlora.LoraSpec(targets=["codebook", "patch_embed"], rank=2), sites=sites)
    tree = jax.tree.map(lambda x: x, tree)
    jlora.peft.save(tmp_path, tree)
    assert {*safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")} == {
        *(f"base_model.model.codebook.lora_embedding_{x}" for x in "AB"),
        *(f"base_model.model.patch_embed.lora_{x}.weight" for x in "AB"),
    }
    jlora.checkpoint.save(tmp_path / "orbax", tree)
    again = jlora.checkpoint.load(tmp_path / "orbax", params)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
