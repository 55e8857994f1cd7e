"""What is said of files that are no adapter of PEFT's: what they are, and the way."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora

TREE = {"layers": {"0": {"q_proj": {"weight": jnp.ones((4, 4))}}}}
KEY = "base_model.model.layers.0.q_proj.lora_A.weight"


@pytest.fixture
def adapter(tmp_path):
    axes = {"q_proj": jlora.Axes((1,), (0,))}
    jlora.peft.save(tmp_path / "a", jlora.wrap(TREE, jlora.LoraSpec(targets="q_proj", rank=2, axes=axes)))
    return tmp_path / "a"


def renamed(adapter, names):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({names(key): value for key, value in tensors.items()}, path)


OTHERS = {
    "kohya": ("lora_unet_down_blocks_0_attn_to_q.lora_down.weight", "one of kohya's scripts.*give the file itself"),
    "kohya's alpha": ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "one of kohya's scripts"),
    "diffusers": ("unet.down_blocks.0.attn.to_q.lora.down.weight", "one of diffusers'.*give the file itself"),
    "diffusers, new": ("transformer.blocks.0.attn.to_q.lora_A.weight", "one of diffusers'"),
    "MLX-LM": ("model.layers.0.self_attn.q_proj.lora_a", "one of MLX-LM's, whose weights are in adapters.safetensors"),
    "torchtune": ("layers.0.attn.q_proj.lora_a.weight", "one of torchtune's"),
    "weights": ("model.layers.0.self_attn.q_proj.weight", "the file has weights, and no adapter"),
}


@pytest.mark.parametrize("key, told", OTHERS.values(), ids=OTHERS)
def test_names_of_other_tools_are_told_as_theirs(key, told, adapter):
    renamed(adapter, lambda name: key if name == KEY else name)
    with pytest.raises(ValueError, match=f"{key}' is none of PEFT's.*: it is .*{told}"):
        jlora.peft.load(adapter, TREE)


@pytest.mark.parametrize("name", ["default", "my-adapter"])
def test_an_adapters_name_in_the_keys(name, adapter):
    renamed(adapter, lambda key: key.replace(".weight", f".{name}.weight"))
    with pytest.raises(ValueError, match=f"has the adapter's name '{name}' in it.*save_pretrained"):
        jlora.peft.load(adapter, TREE)


def test_tensors_that_zero_3_has_left_empty(adapter):
    path = adapter / "adapter_model.safetensors"
    save_file({key: np.zeros(0, np.float32) for key in load_file(path)}, path)
    with pytest.raises(ValueError, match=r"is empty, of shape \(0,\).*ZeRO-3.*zero_to_fp32"):
        jlora.peft.load(adapter, TREE)


def test_a_folder_of_adapters_names_them(adapter, tmp_path):
    for name in ("french", "german"):
        shutil.copytree(adapter, tmp_path / "run" / name)
    with pytest.raises(FileNotFoundError, match=r"the adapters in it are french, german: give one of these folders"):
        jlora.peft.load(tmp_path / "run", TREE)


def test_a_setting_that_is_not_known_is_told_alone(adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantum_bits": {"x" * 300: 1}}))
    with pytest.raises(ValueError, match="knows no setting 'quantum_bits'") as error:
        jlora.peft.load(adapter, TREE)
    assert len(str(error.value)) < 400 and "did you mean" not in str(error.value)
