"""Adapters of stacked experts onto models' own files, against Transformers and PEFT; runs where they are installed."""

import numpy as np
import pytest

import jlora

torch = pytest.importorskip("torch", reason="the oracle needs torch, peft and transformers")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
import safetensors.numpy  # noqa: E402

from tests.peft_files.torch_models import SMALL, TEXT, Case, merged_weights, mixtral  # noqa: E402
from tests.peft_files.trees import assert_same, flat, nested  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
FEW = SMALL | TEXT | {"num_key_value_heads": 2, "num_experts_per_tok": 2}


def qwen3_moe():
    sizes = {"num_experts": 4, "moe_intermediate_size": 12, "head_dim": 4}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**FEW, **sizes))


def deepseek():
    heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    sizes = {
        "n_routed_experts": 4,
        "moe_intermediate_size": 12,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    settings = FEW | {"num_key_value_heads": 4} | heads | sizes
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**settings))


def gpt_oss():
    settings = FEW | {"num_local_experts": 4, "head_dim": 4}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**settings))


MODELS = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "deepseek": deepseek, "gpt_oss": gpt_oss}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
TARGETS = {"both": BOTH, "one": BOTH[1:], "with the router": [*BOTH, "gate.weight"]}


def file_of(model, directory):
    """A model's own file, as Transformers writes it."""
    model.save_pretrained(directory)
    return safetensors.numpy.load_file(directory / "model.safetensors")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_of_stacked_experts_goes_onto_the_models_own_file(name, targets, tmp_path):
    """And onto the model as Transformers has it in memory: what is merged is what PEFT merges."""
    parameters = TARGETS[targets]
    if name == "gpt_oss":
        parameters = [x.replace("gate.weight", "router.weight") for x in parameters]
    attention = "o_proj" if name == "deepseek" else "q_proj"
    case = Case(MODELS[name], {"r": 2, "target_modules": [attention], "target_parameters": parameters})
    torch.manual_seed(0)
    base = MODELS[name]()
    in_memory = {key: x.numpy().copy() for key, x in base.state_dict().items()}
    on_disk = file_of(base, tmp_path / "base")
    model = case.make()
    model.save_pretrained(tmp_path / "adapter")
    wanted = merged_weights(model)
    found = flat(jlora.merge(jlora.peft.load(tmp_path / "adapter", nested(in_memory))))
    assert_same(found, wanted, 2e-6)
    torch.manual_seed(0)
    reference = MODELS[name]()
    reference.load_state_dict({key: torch.tensor(x) for key, x in wanted.items()})
    found = flat(jlora.merge(jlora.peft.load(tmp_path / "adapter", nested(on_disk))))
    assert_same(found, file_of(reference, tmp_path / "reference"), 2e-6)
    assert any(not np.allclose(found[key], x) for key, x in on_disk.items() if "experts" in key)
