"""Tiny random PyTorch models of Hugging Face's, and PEFT's adapters on them: what `test_oracle` compares with."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def llama(tied: bool = False, **settings: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **TEXT, num_key_value_heads=2, tie_word_embeddings=tied, **settings))


def mixtral() -> Any:
    small = SMALL | {"num_hidden_layers": 2}
    return MixtralForCausalLM(MixtralConfig(**small, **TEXT, num_key_value_heads=2, num_local_experts=4))


def bert() -> Any:
    return BertForSequenceClassification(BertConfig(**SMALL, vocab_size=50))


def vit() -> Any:
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4))


def gpt2() -> Any:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**TEXT, **sizes, tie_word_embeddings=False))


def captioner() -> Any:
    """A vision tower of linear layers before a decoder of `Conv1D`, both with square weights of one size."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "add_cross_attention": True}
    decoder = GPT2LMHeadModel(GPT2Config(**TEXT, **sizes, is_decoder=True, tie_word_embeddings=False))
    encoder = ViTModel(ViTConfig(**SMALL, image_size=8, patch_size=4), add_pooling_layer=False)
    return VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)


@dataclasses.dataclass(frozen=True)
class Case:
    """An adapter: a model and the settings of ``LoraConfig``."""

    model: Callable[[], Any]
    settings: dict[str, Any]

    def make(self, seed: int = 0) -> Any:
        """PEFT's model with trained-looking values in all that trains."""
        torch.manual_seed(seed)
        base = self.model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(base, LoraConfig(**self.settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_magnitude" not in name:
                    parameter += 0.1 * torch.randn_like(parameter)
                elif parameter.requires_grad:
                    parameter *= 1 + 0.1 * torch.rand_like(parameter)
        return model


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "plain": Case(llama, {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    "alpha": Case(llama, {"r": 3, "lora_alpha": 7, "target_modules": LINEAR}),
    "all-linear": Case(llama, {"r": 2, "target_modules": "all-linear"}),
    "rslora": Case(llama, {"r": 4, "use_rslora": True, "lora_alpha": 3, "target_modules": LINEAR}),
    "dora": Case(llama, {"r": 4, "use_dora": True, "target_modules": LINEAR}),
    "dora-rslora": Case(llama, {"r": 2, "use_dora": True, "use_rslora": True, "target_modules": ["v_proj"]}),
    "patterns": Case(
        llama,
        {"r": 4, "target_modules": LINEAR, "rank_pattern": {r"layers\.[01]\.self_attn.q_proj": 2, "up_proj": 3},
         "alpha_pattern": {"v_proj": 5, "model.layers.2.mlp.up_proj": 1}},
    ),
    "patterns-rslora": Case(
        llama, {"r": 4, "target_modules": LINEAR, "rank_pattern": {"q_proj": 2}, "use_rslora": True}
    ),
    "regex": Case(llama, {"r": 2, "target_modules": r".*\.layers\.[02]\.(self_attn|mlp)\.(q|up)_proj"}),
    "exclude": Case(llama, {"r": 2, "target_modules": LINEAR, "exclude_modules": r".*\.0\..*|.*up_proj"}),
    "layers": Case(llama, {"r": 2, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]}),
    "layers-pattern": Case(
        llama, {"r": 2, "target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    ),
    "save": Case(llama, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
    "save-norms": Case(llama, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm", "embed_tokens"]}),
    "tables": Case(llama, {"r": 2, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied": Case(
        lambda: llama(True), {"r": 2, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    ),
    "tokens": Case(llama, {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 1, 40]}),
    "tokens-tied": Case(
        lambda: llama(True), {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 1, 40]}
    ),
    "tokens-two": Case(
        llama,
        {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [2]}},
    ),
    "experts": Case(
        mixtral,
        {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "experts-one": Case(mixtral, {"r": 2, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
    "router": Case(mixtral, {"r": 2, "target_modules": ["o_proj"], "target_parameters": ["gate.weight"]}),
    "router-patterns": Case(
        mixtral,
        {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "gate.weight"],
         "rank_pattern": {"gate": 3, "q_proj": 4, "gate.weight": 5}, "alpha_pattern": {"gate.weight": 3}},
    ),
    "bert": Case(bert, {"r": 2, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "bias-all": Case(bert, {"r": 2, "target_modules": ["query", "value"], "bias": "all", "task_type": "SEQ_CLS"}),
    "bias-lora-only": Case(bert, {"r": 2, "target_modules": ["query", "dense"], "bias": "lora_only"}),
    "lora-bias": Case(bert, {"r": 2, "target_modules": ["query"], "lora_bias": True, "task_type": "SEQ_CLS"}),
    "dora-table": Case(bert, {"r": 2, "target_modules": ["query", "word_embeddings"], "use_dora": True}),
    "conv": Case(vit, {"r": 2, "target_modules": ["projection", "q_proj"]}),
    "conv-dora": Case(vit, {"r": 2, "target_modules": ["projection", "fc1"], "use_dora": True}),
    "conv1d": Case(gpt2, {"r": 2, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-mixed": Case(gpt2, {"r": 2, "target_modules": ["c_attn", "c_proj", "lm_head", "wte"]}),
    "conv1d-dora": Case(gpt2, {"r": 2, "target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "conv1d-square": Case(gpt2, {"r": 2, "target_modules": ["attn.c_proj", "lm_head"]}),
    "conv1d-square-dora": Case(gpt2, {"r": 2, "target_modules": ["attn.c_proj", "lm_head"], "use_dora": True}),
    "conv1d-square-alone": Case(gpt2, {"r": 2, "target_modules": ["attn.c_proj"]}),
    "captioner": Case(captioner, {"r": 2, "target_modules": ["q_proj", "fc1", "c_proj", "q_attn"]}),
    "captioner-dora": Case(captioner, {"r": 2, "target_modules": ["v_proj", "attn.c_proj"], "use_dora": True}),
    "captioner-all": Case(captioner, {"r": 2, "target_modules": "all-linear"}),
    "pissa": Case(llama, {"r": 2, "target_modules": LINEAR, "init_lora_weights": "pissa"}),
    "olora": Case(llama, {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "olora"}),
}  # fmt: skip


def inputs(model: Any) -> dict[str, Any]:
    """Arguments for a model's forward pass."""
    torch.manual_seed(1)
    if hasattr(model.config, "encoder"):
        return {"pixel_values": torch.randn(2, 3, 8, 8), "decoder_input_ids": torch.randint(0, 50, (2, 7))}
    if hasattr(model.config, "image_size"):
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    return {"input_ids": torch.randint(0, 50, (2, 7))}


def merged_weights(model: Any) -> dict[str, Any]:
    """The weights of PEFT's model, merged, as float32 arrays by name."""
    merged = model.merge_and_unload()
    return {name: value.detach().float().numpy() for name, value in merged.state_dict().items()}
