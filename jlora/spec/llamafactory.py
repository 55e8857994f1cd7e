"""LLaMA-Factory's settings of an adapter, in the configuration of a whole training run.

Names and defaults are those of its ``FinetuningArguments``, https://llamafactory.readthedocs.io/en/latest/. What
LLaMA-Factory hands to PEFT's ``LoraConfig`` or ``OFTConfig`` is converted as PEFT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jlora.spec import modules
from jlora.spec.peft import ALL_LINEAR, converted
from jlora.spec.reader import Settings, mapping, refuse_others

PREFIXES = ("lora_", "loraplus_", "pissa_", "oft_")
LORA = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target",
    "modules_to_save": "additional_target",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "init_lora_weights": "pissa_iter",
}
OFT = {
    "r": "oft_rank",
    "oft_block_size": "oft_block_size",
    "module_dropout": "module_dropout",
    "target_modules": "oft_target",
    "modules_to_save": "additional_target",
}
V1 = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": "all",
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
}
V1_IGNORED = "export_dir export_size export_hub_model_id infer_dtype export_legacy_format".split()  # of what is written
LORA_ONLY = ("use_rslora", "use_dora", "pissa_init", "loraplus_lr_ratio")
_OPTIMIZER = "LLaMA-Factory allows it without LoRA only; leave it out"
# What it freezes, by parts of modules' names, which are those of the model types that it registers; and what can't be
# adapted in any. https://github.com/hiyouga/LLaMA-Factory, model/model_utils/visual.py
VISION = (
    "vision_tower vision_model visual.pos_embed visual.patch_embed visual.blocks visual.deepstack_merger_list"
    " visual.vision_model audio_tower audio_invert_tower vpm apm audio_avg_pooler audio_projection_layer tts"
).split()
PROJECTOR = "multi_modal_projector visual.merger resampler mlp_AR".split()
LANGUAGE = "language_model lm_head llm".split()
CONFLICTS = "patch_embed timm_model subsample_conv_projection audio_projection_layer".split()
FROZEN = {  # the parts, and whether they are frozen by default
    "freeze_vision_tower": (VISION, True),
    "freeze_multi_modal_projector": (PROJECTOR, True),
    "freeze_language_model": (LANGUAGE, False),
}
REFUSED = {
    "adapter_name_or_path": "that adapter's own adapter_config.json has its settings; give that to LoraSpec.from_peft",
    "use_llama_pro": "it adds layers to the model; add them to the tree, and name them in LoraSpec's layers",
    "use_galore": _OPTIMIZER,
    "use_apollo": _OPTIMIZER,
    "use_badam": _OPTIMIZER,
}
# of the optimizer: jlora.optimizer(b_lr_ratio=...); of saving; a spec is always of a new adapter
IGNORED = "loraplus_lr_ratio loraplus_lr_embedding pissa_convert create_new_adapter"
OWN = "finetuning_type pissa_init resize_vocab"
ADAPTER = frozenset((*LORA.values(), *OFT.values(), *REFUSED, *FROZEN, *OWN.split()))
V1_ADAPTER = frozenset(("name", "adapter_name_or_path", *V1))


def from_llamafactory(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `jlora.LoraSpec` for LLaMA-Factory's settings; see `jlora.LoraSpec.from_llamafactory`."""
    where = "LoraSpec.from_llamafactory"
    config = mapping(where, config)
    refuse_others(where, config)
    if config.get("peft_config") is not None:
        return _from_v1(where, config["peft_config"])
    given = Settings(where, config)
    given.refuse_unknown({*ADAPTER, *IGNORED.split()}, PREFIXES)
    given.refuse_set(REFUSED)
    if given.is_set("resize_vocab") and not given.is_set("additional_target"):
        given.refuse("resize_vocab", "it trains the embeddings in full; name them in additional_target")
    if all(given.get(name) is None for name in ("finetuning_type", "pissa_init", *LORA.values(), *OFT.values())):
        raise ValueError(
            f"{where}: there is nothing of an adapter in it, neither finetuning_type nor a setting of lora or oft; for "
            "LLaMA-Factory's defaults give finetuning_type='lora'"
        )
    kind = given.get("finetuning_type", "lora")
    if kind == "lora":
        return _without_towers(given, converted(Settings(where, _lora(given), LORA)))
    if kind != "oft":
        given.refuse("finetuning_type", "it trains no adapter; the types known here are 'lora' and 'oft'")
    given.refuse_set(dict.fromkeys(LORA_ONLY, "it is valid for finetuning_type='lora' only; leave it out"))
    return _without_towers(given, converted(Settings(where, _oft(given), OFT)))


def _without_towers(given: Settings, settings: dict[str, Any]) -> dict[str, Any]:
    """The same without the parts of a model of several modalities that are frozen."""
    is_frozen = {
        name: by_default if given.get(name) is None else given.flag(name) for name, (_, by_default) in FROZEN.items()
    }
    is_all = settings["targets"] == ALL_LINEAR  # of which the projector is none
    parts = [part for name, (names, _) in FROZEN.items() if is_frozen[name] for part in names]
    parts += CONFLICTS + (PROJECTOR if is_all else [])
    return settings | {"exclude": (*settings["exclude"], *modules.below(parts))}


def _from_v1(where: str, config: Any) -> dict[str, Any]:
    """The settings below ``peft_config``, as LLaMA-Factory's v1 has them: PEFT's names, with defaults of its own."""
    if not isinstance(config, Mapping):
        raise ValueError(
            f"{where}: peft_config must be a mapping, such as {{'name': 'lora', 'r': 8}}, found {config!r}"
        )
    given = Settings(where, mapping(where, config), {name: f"peft_config.{name}" for name in ("name", *config)})
    if given.get("name") != "lora":
        given.refuse("name", "it trains layers in full, or it is not known; the adapters of v1 are 'lora'")
    given.refuse_unknown({*V1_ADAPTER, *V1_IGNORED})
    given.refuse_set({"adapter_name_or_path": REFUSED["adapter_name_or_path"]})
    values = V1 | {name: value for name, value in given.values.items() if name in V1 and value is not None}
    targets = values["target_modules"]
    values["target_modules"] = ALL_LINEAR if targets == "all" else [targets] if isinstance(targets, str) else targets
    return converted(Settings(where, values))


def _lora(given: Settings) -> dict[str, Any]:
    rank = given.get("lora_rank", 8)
    alpha = given.get("lora_alpha") or (rank * 2 if type(rank) is int else 16)
    return _values(given, LORA) | {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _targets(given.get("lora_target", "all")),
        "modules_to_save": _split(given.get("additional_target")),
        "init_lora_weights": _init(given) if given.flag("pissa_init") else True,
    }


def _oft(given: Settings) -> dict[str, Any]:
    return _values(given, OFT) | {
        "peft_type": "OFT",
        "target_modules": _targets(given.get("oft_target", "all")),
        "modules_to_save": _split(given.get("additional_target")),
    }


def _values(given: Settings, names: Mapping[str, str]) -> dict[str, Any]:
    return {name: given.get(theirs) for name, theirs in names.items()}


def _init(given: Settings) -> str:
    rounds = given.get("pissa_iter", 16)
    if type(rounds) is not int or rounds < -1:
        given.refuse("pissa_iter", "it must be a number of rounds, or -1 for the exact decomposition")
    return "pissa" if rounds == -1 else f"pissa_niter_{rounds}"


def _targets(given: Any) -> Any:
    names = _split(given)
    return ALL_LINEAR if names == ["all"] else names


def _split(given: Any) -> Any:
    """Names with commas between them, as a list."""
    return [name.strip() for name in given.split(",")] if isinstance(given, str) else given
