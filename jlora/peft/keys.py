"""The names of tensors in an adapter's file: which module, and which part of its adapter."""

from __future__ import annotations

import re
from typing import NamedTuple

from jlora.nodes.form import Form

PREFIX = "base_model.model."
SHARED = "base_model."  # before tensors that all modules have in common
WHOLE = "ln_tuning_layers"  # before the parameters of modules that LN tuning trains whole
TOKENS = "token_adapter.trainable_tokens_delta"
_ROLES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "bias",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    TOKENS: "tokens",
    "base_layer.weight": "base",
    "token_adapter.base_layer.weight": "base",
}
ECHOES = ("echo of modules_to_save", "echo of original_module")
_SUFFIX = re.compile(r"(.+?)\.(" + "|".join(map(re.escape, sorted(_ROLES, key=len, reverse=True))) + ")")
NAME = re.compile(r"[\w-]+(?:\.[\w-]+)*")
_ECHO = re.compile(r"(.+)\.(modules_to_save|original_module)\.([\w-]+)")


_NAMED = re.compile(r".+\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\.([\w-]+?)(?:\.weight|\.bias)?")
# Other tools' names of the same arrays, in a file with the name of PEFT's.
_OTHERS = {
    "one of kohya's scripts, whose files hold all that they need: give the file itself": re.compile(
        r"lora_(?:unet|te\d?|transformer)_\w+\.(?:alpha|lora_(?:down|up)\.weight)"
    ),
    "one of diffusers', whose files hold all that they need: give the file itself": re.compile(
        r"(?:unet|transformer|text_encoder\w*)\..+\.lora(?:_[AB]|\.(?:down|up)|_(?:down|up))\.weight"
    ),
    "one of MLX-LM's, whose weights are in adapters.safetensors": re.compile(r".+\.lora_[ab]"),
    "one of torchtune's": re.compile(r".+\.lora_[ab]\.weight"),
    "one of the model's own: the file has weights, and no adapter": re.compile(r"(?!.*lora).+\.(?:weight|bias)"),
}


# What names of tensors begin with, by the methods.
_OWN = (
    "lora|ia3|hada|lokr|oft|vera|boft|randlora|fourierft|waveft|shira|miss|c3a|hra|road|delora|hira|gralora|vblora"
    "|pvera"
)


def _whose(form: Form | None) -> str:
    return "" if form is None else f" of {form.method}, whose tensors are {', '.join([*form.tensors, *form.shared])}"


class Key(NamedTuple):
    """A tensor of an adapter's file.

    Args:
      name: of the module; of the parameter where the role is ``"full"`` or an echo.
      role: ``"a"``, ``"b"``, ``"bias"``, ``"embedding_a"``, ``"embedding_b"``, ``"magnitude"``, ``"tokens"``,
        ``"base"``, ``"full"``, or one of `ECHOES`: copies that PEFT writes besides of a bias in a module that is saved.
    """

    name: str
    role: str


def parse(key: str, form: Form | None = None) -> Key:
    """Reads a tensor's name.

    Args:
      key: the name.
      form: of the file, if it is that of another method than LoRA: then the roles are the ends of the names.

    Raises:
      ValueError: if it is none that PEFT writes.

    Example:
      >>> parse("base_model.model.layers.0.q_proj.lora_A.weight")
      Key(name='layers.0.q_proj', role='a')
    """
    name = key.removeprefix(PREFIX)
    if name == key or len(key) > 1000 or not NAME.fullmatch(name):
        whose = next((f": it is {tool}" for tool, pattern in _OTHERS.items() if pattern.fullmatch(key[:1000])), "")
        raise ValueError(f"the tensor {key[:200]!r} is none of PEFT's, whose names begin with {PREFIX!r}{whose}")
    if form is not None:
        if found := next((end for end in form.tensors if name.endswith(f".{end}")), None):
            return Key(name.removesuffix(f".{found}"), found)
    elif match := _SUFFIX.fullmatch(name):
        return Key(match[1], _ROLES[match[2]])
    if match := _ECHO.fullmatch(name):
        return Key(f"{match[1]}.{match[3]}", f"echo of {match[2]}")
    if match := _NAMED.fullmatch(name):
        raise ValueError(
            f"the tensor {key[:200]!r} has the adapter's name {match[1]!r} in it, as a model's own state_dict has; "
            "write the adapter by model.save_pretrained, or take that name out of the keys"
        )
    if re.search(rf"(^|\.)({_OWN})_", name):
        raise ValueError(f"the tensor {key[:200]!r} is of no kind that jlora knows{_whose(form)}")
    return Key(name.replace(".base_layer.", ".").replace(f".{WHOLE}.", "."), "full")
