"""Experts with a module each, and stacked: an adapter of either goes onto a tree of either, and a model's file too."""

import json
from typing import Any

import numpy as np
import pytest

import jlora
from jlora.__main__ import main
from tests.peft_files.trees import assert_same, flat, lora, merged, nested, noise

D, WIDE, E = 6, 5, 3  # features, an expert's width, experts
ALONE = {"qwen": ("mlp", ("gate_proj", "up_proj", "down_proj")), "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"))}
STYLES = [*ALONE, "stacked"]


def stacked(layers: int = 2) -> dict[str, np.ndarray]:
    """A model's weights as Transformers 5 has them."""
    state = {"model.embed_tokens.weight": noise(9, D)}
    for i in range(layers):
        at = f"model.layers.{i}"
        state |= {f"{at}.self_attn.q_proj.weight": noise(D, D), f"{at}.mlp.gate.weight": noise(E, D)}
        state |= {
            f"{at}.mlp.experts.gate_up_proj": noise(E, 2 * WIDE, D),
            f"{at}.mlp.experts.down_proj": noise(E, D, WIDE),
        }
    return state


def in_style(state: dict[str, np.ndarray], style: str) -> dict[str, np.ndarray]:
    """The same with a tensor for each expert."""
    if style == "stacked":
        return state
    block, (gate, up, down) = ALONE[style]
    found = {}
    for name, x in state.items():
        stem = name.replace(".mlp.", f".{block}.").rpartition(".")[0]
        if name.endswith("gate_up_proj"):
            for i in range(E):
                found[f"{stem}.{i}.{gate}.weight"], found[f"{stem}.{i}.{up}.weight"] = np.split(x[i], 2)
        elif name.endswith("experts.down_proj"):
            found |= {f"{stem}.{i}.{down}.weight": x[i] for i in range(E)}
        else:
            found[name.replace(".mlp.gate.", f".{block}.gate.")] = x
    return found


STATE = stacked()


def adapted(style: str, only: str = "", **fields: Any) -> dict[str, Any]:
    """A tree of a style with factors at its experts, its routers and its queries, of other ranks and scales."""
    state = in_style(STATE, style)
    is_one = lambda name, x: x.ndim > 1 and "embed" not in name and only in name
    count = iter(range(10_000))
    of = lambda x: lora(x, rank=1 + next(count) % 2, scale=(0.5, 2.0)[next(count) % 2], **fields)
    return nested({name: of(x) if is_one(name, x) else x for name, x in state.items()})


@pytest.mark.parametrize("theirs", STYLES)
@pytest.mark.parametrize("ours", STYLES)
def test_an_adapter_goes_onto_either(theirs, ours, tmp_path):
    tree = adapted(theirs)
    jlora.peft.save(tmp_path, tree)
    found = merged(jlora.peft.load(tmp_path, nested(in_style(STATE, ours))))
    assert_same(found, in_style(as_stacked(merged(tree), theirs), ours), 1e-5)


def as_stacked(state: dict[str, np.ndarray], style: str) -> dict[str, np.ndarray]:
    """The inverse of `in_style`: each element to where `in_style` takes it from."""
    numbers = {name: np.arange(x.size).reshape(x.shape) + 10_000 * i for i, (name, x) in enumerate(STATE.items())}
    whole = np.zeros(10_000 * len(STATE), np.float32)
    for name, places in in_style(numbers, style).items():
        whole[places] = state[name]
    return {name: whole[places] for name, places in numbers.items()}


@pytest.mark.parametrize("style", STYLES)
def test_a_map_of_stacked_experts_takes_each_of_them(style, tmp_path):
    """The Flax tree of a ready map, whose layers and experts are on two axes of one leaf."""
    jlora.peft.save(tmp_path / "adapter", adapted(style))
    jlora.peft.to_safetensors(nested(in_style(STATE, style)), tmp_path / "model")
    expected = merged(jlora.peft.load(tmp_path / "adapter", nested(STATE)))
    stack = lambda name: np.stack([STATE[f"model.layers.{i}.{name}"] for i in range(2)])
    turned = lambda x: x.swapaxes(-1, -2)
    gate, up = np.split(stack("mlp.experts.gate_up_proj"), 2, axis=2)
    experts = {"wi_0": turned(gate), "wi_1": turned(up), "wo": turned(stack("mlp.experts.down_proj"))}
    flax = {
        "layers": {
            "attn": {"query": {"kernel": turned(stack("self_attn.q_proj.weight"))}},
            "moe": {"gate": {"kernel": turned(stack("mlp.gate.weight"))}, **experts},
        },
        "embed": {"embedding": STATE["model.embed_tokens.weight"]},
    }
    read = jlora.peft.from_safetensors(tmp_path / "model", like=flax, names="mixtral")
    assert_same(flat(read), flat(flax), 0)
    found = merged(jlora.peft.load(tmp_path / "adapter", flax, names="mixtral"))
    both = [turned(found[f"layers.moe.wi_{i}"])[1] for i in range(2)]
    np.testing.assert_allclose(
        np.concatenate(both, axis=1), expected["model.layers.1.mlp.experts.gate_up_proj"], atol=1e-5
    )
    np.testing.assert_allclose(
        turned(found["layers.moe.wo"])[0], expected["model.layers.0.mlp.experts.down_proj"], atol=1e-5
    )


def test_a_map_may_name_each_expert(tmp_path):
    """In PyTorch's name and in the path, where the tree stacks what its own file has one by one."""
    jlora.peft.save(tmp_path, adapted("stacked", only="experts"))
    expected = merged(jlora.peft.load(tmp_path, nested(STATE)))
    stack = lambda name: np.stack([STATE[f"model.layers.{i}.{name}"] for i in range(2)])
    tree = {
        "down": stack("mlp.experts.down_proj"),
        "gate_up": {str(i): x for i, x in enumerate(stack("mlp.experts.gate_up_proj"))},
    }
    names = [
        ("model.layers.{i}.mlp.experts.{e}.down_proj", "down[{i}, {e}]", jlora.peft.Layout("out in")),
        ("model.layers.{i}.mlp.experts.gate_up_proj", "gate_up/{i}", jlora.peft.Layout("batch out in")),
    ]
    with pytest.raises(ValueError, match=r"which the tree does not have"):  # two styles in one map tell none
        jlora.peft.load(tmp_path, tree, names=names)
    parts = {"gate_proj": slice(None, WIDE), "up_proj": slice(WIDE, None)}
    tree |= {name: stack("mlp.experts.gate_up_proj")[:, :, rows] for name, rows in parts.items()}
    names[1:] = [
        (f"model.layers.{{i}}.mlp.experts.{{e}}.{name}", f"{name}[{{i}}, {{e}}]", jlora.peft.Layout("out in"))
        for name in parts
    ]
    found = merged(jlora.peft.load(tmp_path, tree, names=names))
    np.testing.assert_allclose(found["down"][1], expected["model.layers.1.mlp.experts.down_proj"], atol=1e-5)
    both = np.concatenate([found["gate_proj"][1], found["up_proj"][1]], axis=1)
    np.testing.assert_allclose(both, expected["model.layers.1.mlp.experts.gate_up_proj"], atol=1e-5)


@pytest.mark.parametrize("theirs", STYLES)
@pytest.mark.parametrize("ours", STYLES)
def test_a_model_is_read_in_either_style(theirs, ours, tmp_path):
    jlora.peft.to_safetensors(nested(in_style(STATE, theirs)), tmp_path)
    like = in_style(STATE, ours)
    assert_same(flat(jlora.peft.from_safetensors(tmp_path, like=nested(like))), like, 0)


@pytest.mark.parametrize("theirs, ours", [("stacked", "mixtral"), ("qwen", "stacked"), ("mixtral", "qwen")])
def test_the_command_merges_either(theirs, ours, tmp_path):
    jlora.peft.save(tmp_path / "adapter", adapted(theirs))
    jlora.peft.to_safetensors(nested(in_style(STATE, ours)), tmp_path / "base")
    assert main(["merge", *(str(tmp_path / name) for name in ("base", "adapter", "out"))]) == 0
    expected = merged(jlora.peft.load(tmp_path / "adapter", nested(in_style(STATE, ours))))
    assert_same(flat(jlora.peft.from_safetensors(tmp_path / "out")), expected, 1e-5)


def test_a_stack_in_another_order_is_not_guessed(tmp_path):
    """GPT-OSS has the outputs of gate and up in turn, on the last axis."""
    jlora.peft.save(tmp_path, adapted("qwen", only="experts"))
    other = {n: x.swapaxes(1, 2).copy() if n.endswith("gate_up_proj") else x for n, x in STATE.items()}
    with pytest.raises(ValueError, match=r"of shape \(3, 6, 10\) does not stack them as \(experts, 10, 6\)"):
        jlora.peft.load(tmp_path, nested(other))
    jlora.peft.to_safetensors(nested(other), tmp_path / "model")
    with pytest.raises(ValueError, match=r"has no model.layers.0.mlp.experts.0.\w+_proj.weight"):
        jlora.peft.from_safetensors(tmp_path / "model", like=nested(in_style(STATE, "qwen")))


@pytest.mark.parametrize("targets, is_refused", [(None, True), (r".*experts\.[02]\..*", False)])
def test_an_expert_without_an_update(targets, is_refused, tmp_path):
    """Is zero where the settings do not name it, and missing where they do."""
    tree = adapted("qwen", only="experts")
    first = tree["model"]["layers"]["0"]["mlp"]["experts"]["1"]
    tree["model"]["layers"]["0"]["mlp"]["experts"]["1"] = {n: {"weight": x["weight"].base} for n, x in first.items()}
    second = tree["model"]["layers"]["1"]["mlp"]["experts"]["1"]
    tree["model"]["layers"]["1"]["mlp"]["experts"]["1"] = {n: {"weight": x["weight"].base} for n, x in second.items()}
    jlora.peft.save(tmp_path, tree)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"target_modules": targets or ["gate_proj", "up_proj", "down_proj"]}
    path.write_text(json.dumps(settings))
    if is_refused:
        with pytest.raises(ValueError, match=r"name gate_proj of expert 1 in model.layers.0.mlp.experts, but"):
            jlora.peft.load(tmp_path, nested(STATE))
        return
    found = merged(jlora.peft.load(tmp_path, nested(STATE)))["model.layers.0.mlp.experts.down_proj"]
    base = STATE["model.layers.0.mlp.experts.down_proj"]
    np.testing.assert_array_equal(found[1], base[1])
    assert not np.allclose(found[0], base[0])


def test_dora_of_single_experts_has_no_form_in_a_stack(tmp_path):
    state = in_style(STATE, "qwen")
    spec = jlora.LoraSpec(targets=["gate_proj"], variant="dora", rank=2, axes={"gate_proj": jlora.Axes(1, 0)})
    jlora.peft.save(tmp_path, jlora.wrap(nested(state), spec))
    jlora.peft.load(tmp_path, nested(in_style(STATE, "mixtral")))
    with pytest.raises(ValueError, match=r"stacks the experts of model.layers.0.mlp.experts, on which DoRA"):
        jlora.peft.load(tmp_path, nested(STATE))
