"""What stands in a tool's settings beside the adapter's: names of the base's settings, and of the training run's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jlora.spec import axolotl, fastchat, llamafactory
from jlora.spec.methods import METHODS, REFUSED, SCHEDULE
from jlora.spec.peft import SHARED

TRAINER, BASE, PEFT = "the trainer's", "the base's", "PEFT's own"
_BASE = (
    "model model_name_or_path model_revision revision model_type revision_of_model trust_remote_code torch_dtype q_lora"
    " gptq double_quantization quant_config"
).split()
_BASE_PREFIXES = ("base_model", "load_in_", "bnb_", "quantization")
_RUNS = {
    "LoraSpec.from_axolotl": axolotl.ADAPTER,
    "LoraSpec.from_llamafactory": llamafactory.ADAPTER | {"peft_config"},
    "LoraSpec.from_fastchat": fastchat.ADAPTER,
}


def beside(reader: str, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names in some settings that a `jlora.LoraSpec` has no part in, by whose they are.

    Args:
      reader: the function that reads them, such as ``LoraSpec.from_axolotl``.
      config: the settings.

    Example:
      >>> beside("LoraSpec.from_axolotl", {"adapter": "qlora", "lora_r": 8, "load_in_4bit": True, "bf16": True})
      {"the trainer's": ['bf16'], "the base's": ['load_in_4bit']}
    """
    if reader == "LoraSpec.from_peft":
        groups = _groups(config, _of_method(config), PEFT)
        is_run = lambda name: name in SCHEDULE.split()
        groups = {TRAINER: [*filter(is_run, groups[PEFT])], BASE: groups[BASE],
                  PEFT: [name for name in groups[PEFT] if not is_run(name)]}  # fmt: skip
    else:
        groups = _groups(config, _RUNS[reader], TRAINER)
    if isinstance(nested := config.get("peft_config"), Mapping):
        groups[TRAINER] += [f"peft_config.{name}" for name in nested if name not in llamafactory.V1_ADAPTER]
    return {whose: sorted(names) for whose, names in groups.items() if names}


def _groups(config: Mapping[str, Any], adapter: Collection[str], other: str) -> dict[str, list[str]]:
    is_base = lambda name: name in _BASE or name.startswith(_BASE_PREFIXES)
    names = [name for name in config if is_base(name) or name not in adapter]
    return {other: [name for name in names if not is_base(name)], BASE: [*filter(is_base, names)]}


def _of_method(config: Mapping[str, Any]) -> set[str]:
    """The names that say what the adapter of a method of PEFT's is."""
    method = METHODS[config.get("peft_type") or "LORA"]
    return {*REFUSED, *f"{SHARED} {method.names}".split()} - {*SCHEDULE.split()}
