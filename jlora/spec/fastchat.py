"""FastChat's settings of an adapter, among those of a whole training run.

Names and defaults are those of the ``LoraArguments`` of ``fastchat/train/train_lora.py``,
https://github.com/lm-sys/FastChat. What FastChat hands to PEFT's ``LoraConfig`` is converted as PEFT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jlora.spec.peft import converted
from jlora.spec.reader import Settings, mapping, refuse_others

NAMES = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "bias": "lora_bias",
}
DEFAULTS = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
BIASES = ("none", "all", "lora_only")
REFUSED = {
    "lora_weight_path": "that adapter's own adapter_config.json has its settings; give that to LoraSpec.from_peft",
}
ADAPTER = frozenset((*NAMES.values(), *REFUSED, "q_lora"))
# Of an adapter, as the names below: what other tools have, and FastChat has not
PREFIXES = tuple(
    "lora_ loraplus_ peft_ qlora q_lora use_dora use_rslora use_peft bias modules_to_save rank_pattern alpha_pattern"
    " init_lora_weights exclude_modules target_parameters layers_to_transform layers_pattern"
    " trainable_token_indices".split()
)


def from_fastchat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `jlora.LoraSpec` for FastChat's settings; see `jlora.LoraSpec.from_fastchat`."""
    where = "LoraSpec.from_fastchat"
    settings = mapping(where, settings)
    refuse_others(where, settings)
    given = Settings(where, settings)
    given.refuse_unknown(ADAPTER, PREFIXES)
    given.refuse_set(REFUSED)
    if all(given.get(name) is None for name in ADAPTER):
        raise ValueError(
            f"{where}: there is nothing of an adapter in it, not one of {', '.join(sorted(ADAPTER))}; for FastChat's "
            "defaults give lora_r=8"
        )
    if given.get("lora_bias", "none") not in BIASES:
        given.refuse("lora_bias", f"it must be one of {', '.join(map(repr, BIASES))}")
    given.flag("q_lora")  # whether the base is quantised
    values = {name: given.get(theirs, DEFAULTS[name]) for name, theirs in NAMES.items()}
    return converted(Settings(where, values, NAMES))
