"""Files for llama.cpp, by the rules of its converters: a base in float32, and an adapter from PEFT's files."""

import re

import numpy as np

from jlora.examples.gguf import read_gguf
from jlora.peft.tensors import TensorFile, read_json

MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_base(source, out):
    """The model of a GGUF file with its numbers in float32."""
    import gguf

    file, writer = read_gguf(source), gguf.GGUFWriter(out, "llama")
    for name, value in file.metadata.items():
        if name not in ("general.architecture", "general.file_type", "general.quantization_version"):
            _add(writer, name, value)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in file.tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.dequantise()))
    _finish(writer)


def _add(writer, name, value):
    match value:
        case bool():
            writer.add_bool(name, value)
        case str():
            writer.add_string(name, value)
        case list() | tuple():
            writer.add_array(name, list(value))
        case float() | np.floating():
            writer.add_float32(name, float(value))
        case _:
            writer.add_uint32(name, int(value))


def write_adapter(directory, out, heads):
    """The adapter of a directory of PEFT's; rows of queries and keys change places as those of the model's do.

    Args:
      directory, out: of PEFT, and the file.
      heads: how many of queries, and of keys.
    """
    import gguf

    writer = gguf.GGUFWriter(out, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(read_json(directory / "adapter_config.json")["lora_alpha"]))
    file = TensorFile(directory / "adapter_model.safetensors")
    for name in file:
        layer, module, half = re.search(r"layers\.(\d+)\.(.+)\.lora_([AB])\.weight", name).groups()
        array = np.asarray(file[name], np.float32)
        count = {"self_attn.q_proj": heads[0], "self_attn.k_proj": heads[1]}.get(module)
        if half == "B" and count:
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"blk.{layer}.{MODULES[module]}.weight.lora_{half.lower()}", np.ascontiguousarray(array))
    _finish(writer)


def _finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
