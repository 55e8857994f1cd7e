"""Axolotl's settings of an adapter, in the configuration of a whole training run.

Names and defaults are those of its schema, https://docs.axolotl.ai/docs/config-reference.html. What Axolotl hands to
PEFT's ``LoraConfig`` is converted as PEFT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jlora.spec import modules
from jlora.spec.methods import LOFTQ
from jlora.spec.peft import ALL_LINEAR, converted, refuse_layers_of_text
from jlora.spec.reader import Settings, mapping, refuse_others

PREFIXES = ("lora_", "peft_", "loraplus_", "qlora_", "relora")
NAMES = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "exclude_modules": "lora_exclude_modules",
    "modules_to_save": "lora_modules_to_save",
    "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern",
    "layers_to_transform": "peft_layers_to_transform",
    "layers_pattern": "peft_layers_pattern",
    "use_dora": "peft_use_dora",
    "use_rslora": "peft_use_rslora",
    "init_lora_weights": "peft_init_lora_weights",
    "layer_replication": "peft_layer_replication",
    "trainable_token_indices": "peft_trainable_token_indices",
}
# What freeze_mm_modules freezes, by parts of modules' names: encoders of other modalities, and what leads from them
TOWERS = (
    "vision_tower vision_model vision_encoder visual embed_vision audio_tower audio_model audio_encoder embed_audio"
    " multi_modal_projector mm_projector"
).split()
REFUSED = {
    "lora_model_dir": "that adapter's own adapter_config.json has its settings; give that to LoraSpec.from_peft",
    "relora": "it merges and starts again while it trains; call jlora.fold_and_restart in your loop",
    "unfrozen_parameters": "it says what trains in place of an adapter; give lora_modules_to_save",
}
# of the optimizer: jlora.optimizer(b_lr_ratio=...); of speed and memory; or so by construction, as in PEFT's
IGNORED = (
    "loraplus_lr_ratio loraplus_lr_embedding lora_on_cpu lora_mlp_kernel lora_qkv_kernel lora_o_kernel"
    " lora_embedding_kernel qlora_sharded_model_loading lora_fan_in_fan_out peft_ensure_weight_tying relora_prune_ratio"
    " relora_prune_method relora_cpu_offload relora_steps relora_warmup_steps relora_anneal_steps"
)
OWN = "adapter lora_target_linear peft_autocast_adapter_dtype peft freeze_mm_modules"
ADAPTER = frozenset((*NAMES.values(), *REFUSED, *OWN.split()))


def from_axolotl(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `jlora.LoraSpec` for Axolotl's settings; see `jlora.LoraSpec.from_axolotl`."""
    where = "LoraSpec.from_axolotl"
    config = mapping(where, config)
    refuse_others(where, config)
    given = Settings(where, config)
    given.refuse_unknown({*ADAPTER, *IGNORED.split()}, PREFIXES)
    _refuse(given)
    is_linear = given.flag("lora_target_linear")
    values = {name: given.get(theirs) for name, theirs in NAMES.items()}
    settings = Settings(where, values | _normal(given, is_linear), NAMES)
    if not is_linear:
        refuse_layers_of_text(settings)
    if is_linear and given.is_set("lora_target_modules"):
        named = converted(Settings(where, values | _normal(given, False), NAMES))  # beside all linear layers
        made = named | {"targets": (ALL_LINEAR, *named["targets"])}
    else:
        made = converted(settings)
    towers = modules.below(TOWERS) if given.flag("freeze_mm_modules") else ()
    return made | {"exclude": (*made["exclude"], *towers)}


def _normal(given: Settings, is_linear: bool) -> dict[str, Any]:
    """Where Axolotl's meaning is not PEFT's: false stands for the default, and a name for a list of it."""
    parameters = given.get("lora_target_parameters")
    targets = ALL_LINEAR if is_linear else given.get("lora_target_modules") or []
    return {
        "target_modules": targets,
        "target_parameters": [parameters] if isinstance(parameters, str) else parameters,
        "init_lora_weights": given.get("peft_init_lora_weights") or None,
    }


def _refuse(given: Settings) -> None:
    if given.get("adapter") not in ("lora", "qlora"):
        given.refuse("adapter", "it must be 'lora' or 'qlora' (whose base is quantised before wrap)")
    for name in ("lora_r", "lora_alpha"):
        if given.get(name) is None:
            given.refuse(name, "Axolotl has no default for it; give a number")
    given.refuse_set(REFUSED)
    if given.get("peft_autocast_adapter_dtype") is False:
        given.refuse("peft_autocast_adapter_dtype", "factors are float32; set LoraSpec's dtype afterwards")
    more = given.get("peft", {})
    if isinstance(more, Mapping) and more.get("loftq_config"):
        given.refuse("peft", f"{LOFTQ} (loftq_config)")
