"""Files of activated adapters: the tokens are written, asked for, and never passed over."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.cli import main
from tests.peft_files.trees import lora, nested, noise
from tests.support import same_bits

STATE = {f"layers.{i}.{p}.weight": noise(6, 6) for i in range(2) for p in ("q_proj", "v_proj")}
TREE = nested({name: lora(x, rank=2, scale=2.0) for name, x in STATE.items()})
TOKENS = [4, 0, 9]


@pytest.fixture
def directory(tmp_path):
    jlora.peft.save(tmp_path / "a", TREE, invocation_tokens=TOKENS)
    return tmp_path / "a"


def settings_of(directory):
    return json.loads((directory / "adapter_config.json").read_text())


@pytest.mark.parametrize("given", [TOKENS, tuple(TOKENS), np.array(TOKENS), jnp.array(TOKENS)])
def test_round_trip(directory, given):
    settings = settings_of(directory)
    assert settings["alora_invocation_tokens"] == TOKENS and settings["task_type"] == "CAUSAL_LM"
    again = jlora.peft.load(directory, nested(STATE), invocation_tokens=given)
    assert same_bits(jlora.merge(again), jlora.merge(TREE))


def test_the_tokens_are_asked_for(directory, tmp_path):
    told = r"is activated \(aLoRA\): it acts from the last \[4, 0, 9\] .*load\(\.\.\., invocation_tokens=\[4, 0, 9\]\)"
    with pytest.raises(ValueError, match=told):
        jlora.peft.load(directory, nested(STATE))
    with pytest.raises(ValueError, match=told):
        jlora.peft.resize_tables(nested(STATE), directory)
    with pytest.raises(ValueError, match=told):
        kernels = {
            "layers": {str(i): {p: {"kernel": jnp.ones((6, 6))} for p in ("q_proj", "v_proj")} for i in range(2)}
        }
        jlora.adapters.Pool(kernels, capacity=1, rank=2).put("a", directory)
    with pytest.raises(ValueError, match=r"acts from the tokens \[4, 0, 9\] on, and invocation_tokens are \[4, 9\]"):
        jlora.peft.load(directory, nested(STATE), invocation_tokens=[4, 9])
    jlora.peft.save(tmp_path / "b", TREE)
    with pytest.raises(ValueError, match="its adapter acts at all tokens; leave out invocation_tokens"):
        jlora.peft.load(tmp_path / "b", nested(STATE), invocation_tokens=TOKENS)


def test_commands_do_not_merge_it(directory, tmp_path, capsys):
    jlora.peft.to_safetensors(nested(STATE), tmp_path / "base.safetensors")
    assert main(["merge", str(tmp_path / "base.safetensors"), str(directory), str(tmp_path / "out")]) != 0
    assert "is activated (aLoRA)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_card_says_so(directory):
    card = (directory / "README.md").read_text()
    assert "# Activated LoRA adapter" in card and "Acts from the last of these tokens on: 4, 0, 9" in card
    assert "invocation_tokens=[4, 0, 9]" in card and "jlora.adapters.invoked(ids, [4, 0, 9])" in card
    assert "jlora merge" not in card and "vllm" not in card


@pytest.mark.parametrize("tokens", [[], [1.5], ["a"], [[1]], [-1], 3, [True]])
def test_invocations_are_token_ids(directory, tmp_path, tokens):
    with pytest.raises(ValueError, match="invocation_tokens are the ids of an invocation"):
        jlora.peft.save(tmp_path / "b", TREE, invocation_tokens=tokens)
    assert not (tmp_path / "b").exists()
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(settings_of(directory) | {"alora_invocation_tokens": tokens}))
    with pytest.raises(ValueError, match="alora_invocation_tokens must be a list of token ids"):
        jlora.peft.load(directory, nested(STATE), invocation_tokens=TOKENS, allow_edited=True)
    jlora.peft.save(directory, TREE, invocation_tokens=TOKENS)
    with pytest.raises(ValueError, match=r"peft.load: invocation_tokens are the ids"):
        jlora.peft.load(directory, nested(STATE), invocation_tokens=tokens)


def tree_of(**settings):
    params = nested(STATE) | {"norm": {"weight": jnp.ones(6)}, "embed_tokens": {"weight": noise(9, 6)}}
    axes = {"*_proj/weight": jlora.Axes((1,), (0,)), "embed_tokens/weight": jlora.Axes((0,), (1,))}
    return jlora.wrap(params, jlora.LoraSpec(**({"targets": "*_proj/weight", "rank": 2, "axes": axes} | settings)))


REFUSED = {
    "DoRA": {"variant": "dora"},
    "another method": {"variant": "hra"},
    "trained in full": {"train": ("norm",)},
    "trained rows": {"train_tokens": {"embed_tokens/weight": (1, 2)}},
    "other kernels": {"targets": ("*_proj/weight", "embed_tokens/weight")},
}


@pytest.mark.parametrize("what", REFUSED)
def test_peft_takes_lora_of_linear_layers_alone(what, tmp_path):
    with pytest.raises(ValueError, match=f"with invocation_tokens, PEFT takes LoRA of linear layers alone.*{what}"):
        jlora.peft.save(tmp_path / "b", tree_of(**REFUSED[what]), invocation_tokens=TOKENS)
    assert not (tmp_path / "b").exists()


def test_it_is_no_portable_file_and_of_one_task(tmp_path):
    with pytest.raises(ValueError, match="not all readers of portable files know invocation_tokens"):
        jlora.peft.save(tmp_path / "b", TREE, invocation_tokens=TOKENS, portable=True)
    with pytest.raises(ValueError, match="the task SEQ_CLS"):
        jlora.peft.save(tmp_path / "b", TREE, invocation_tokens=TOKENS, task_type="SEQ_CLS")
