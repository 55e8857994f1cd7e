"""SmolLM2 as a directory that Transformers, vLLM and llama.cpp's converter open as it is.

The numbers are those of the 4-bit file that ships in a package, not those that were published: between the two are the
errors of rounding to 4 bits, and an adapter trained here fits the published model as well as it fits these.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import jlora
from jlora.examples.gguf import read_gguf
from jlora.examples.smollm2 import FILE, load_config, load_params, tokenizer_from

CARD = """---
license: {license}
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, of 4 bits

The weights are the numbers of a Q4_1 GGUF file, written out in {dtype}. They are not those that were published as
HuggingFaceTB/SmolLM2-135M-Instruct: those have no error of rounding to 4 bits.
"""


def write_base(folder: Path, out: Path, dtype: str = "float32") -> None:
    """Writes weights, settings, tokenizer, chat template and a card.

    Args:
      folder: where `fetch(SMOLLM2)` put the GGUF file.
      out: the directory.
      dtype: of the weights, ``"float32"`` (exact) or ``"bfloat16"``.
    """
    metadata = read_gguf(folder / FILE).metadata
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    settings = config(folder, metadata, dtype)
    jlora.peft.to_safetensors(load_params(folder), out, names="llama", dtype=kind, config=settings)
    tokenizer_from(metadata).save(str(out / "tokenizer.json"))
    for name, data in beside(metadata).items():
        (out / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    card = CARD.format(license=metadata["general.license"], dtype=dtype)
    (out / "README.md").write_text(card, encoding="utf-8")


def config(folder: Path, metadata: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The settings as Transformers' ``config.json`` has them."""
    fixed = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    return load_config(folder) | fixed | ids(metadata)


def ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """The tokens that begin, end and fill a text."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: int(metadata[f"tokenizer.ggml.{key}_token_id"]) for name, key in names.items()}


def beside(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the tokenizer and of generation, by file."""
    token = lambda name: metadata["tokenizer.ggml.tokens"][ids(metadata)[f"{name}_token_id"]]
    special = {f"{name}_token": token(name) for name in ("bos", "eos", "pad")}
    unknown = metadata["tokenizer.ggml.tokens"][int(metadata["tokenizer.ggml.unknown_token_id"])]
    special |= {"unk_token": unknown}
    settings = {
        "tokenizer_class": "GPT2TokenizerFast",
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(metadata["llama.context_length"]),
        "chat_template": metadata["tokenizer.chat_template"],
    }
    return {
        "tokenizer_config.json": settings | special,
        "special_tokens_map.json": special,
        "generation_config.json": {"_from_model_config": True} | ids(metadata),
    }
