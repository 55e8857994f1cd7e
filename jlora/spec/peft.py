"""PEFT's ``LoraConfig`` and the configurations of its other methods: what is adapted, and by which method.

Names and defaults are those of PEFT 0.21, https://huggingface.co/docs/peft/package_reference/lora.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jlora.spec import modules
from jlora.spec.methods import METHODS, REFUSED
from jlora.spec.reader import Settings, mapping, refuse_others

ALL_LINEAR = "all-linear"
SHARED = "peft_type task_type target_modules modules_to_save"
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}

# what tells nothing of the adapter, or what is so by construction: the tree has the layouts, and a tied table once
IGNORED = (
    "base_model_name_or_path revision inference_mode auto_mapping peft_version runtime_config fan_in_fan_out"
    " megatron_core qalora_group_size ensure_weight_tying"
)


def from_peft(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `jlora.LoraSpec` for PEFT's settings; see `jlora.LoraSpec.from_peft`."""
    where = "LoraSpec.from_peft"
    config = mapping(where, config)
    refuse_others(where, config)
    settings = Settings(where, config)
    refuse_layers_of_text(settings)
    return converted(settings)


def refuse_layers_of_text(settings: Settings) -> None:
    """Refuses a choice of layers where the targets are one string, as PEFT does."""
    for name in ("layers_to_transform", "layers_pattern"):
        is_given = settings.is_set(name) or type(settings.get(name)) is int
        if is_given and isinstance(settings.get("target_modules"), str):
            settings.refuse(name, "PEFT allows it beside a list of target_modules only; give a list")


def converted(settings: Settings) -> dict[str, Any]:
    """The arguments of a `jlora.LoraSpec` for settings under PEFT's names."""
    name = settings.get("peft_type", "LORA")
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        settings.refuse("peft_type", f"the methods known here are {', '.join(METHODS)}")
    settings.refuse_unknown({*REFUSED, *f"{SHARED} {IGNORED} {method.names}".split()})
    settings.refuse_set(REFUSED)
    return _places(settings) | method.convert(settings)


def _places(settings: Settings) -> dict[str, Any]:
    task = settings.get("task_type", "")
    if not isinstance(task, str):
        settings.refuse("task_type", "it is a name of PEFT's, such as 'CAUSAL_LM'")
    saved = settings.listed("modules_to_save") + HEADS.get(task, ())
    targets, train = _targets(settings), modules.within(saved)
    return {
        "targets": targets,
        "exclude": _modules(settings, "exclude_modules") + (() if targets == ALL_LINEAR else train),
        "train": train,
        "train_tokens": _tokens(settings),
        **_layers(settings),
    }


def _targets(settings: Settings) -> str | tuple[str, ...]:
    given = settings.get("target_modules")
    leaves = modules.parameters(settings.listed("target_parameters"))
    if isinstance(given, str) and given.lower() == ALL_LINEAR:
        if leaves:
            settings.refuse("target_parameters", 'it does not go with "all-linear"; name the target_modules')
        return ALL_LINEAR
    if targets := _modules(settings, "target_modules") + leaves:
        return targets
    settings.refuse("target_modules", 'PEFT\'s tables by architecture are not here; name modules, or "all-linear"')


def _modules(settings: Settings, name: str) -> tuple[str, ...]:
    given = settings.get(name)
    if isinstance(given, str):
        return (modules.matching(given),) if given else ()
    return modules.named(settings.listed(name))


def _layers(settings: Settings) -> dict[str, Any]:
    given = settings.get("layers_to_transform")
    layers = [given] if type(given) is int else given or None
    targets = settings.get("target_modules", ())
    numbered = [] if isinstance(targets, str) else [name for name in targets if re.search(r"(^|\.)\d+(\.|$)", name)]
    if layers and numbered:
        settings.refuse("layers_to_transform", f"target_modules name layers too, {numbered}; leave one of them out")
    return {"layers": layers, "layers_name": _layers_name(settings, layers)}


def _layers_name(settings: Settings, layers: Any) -> str | tuple[str, ...] | None:
    if not settings.is_set("layers_pattern"):
        return None
    given = settings.get("layers_pattern")
    names = (given,) if isinstance(given, str) else settings.listed("layers_pattern")
    if not all(re.fullmatch(r"[\w-]+(\.[\w-]+)*", name) for name in names):
        settings.refuse("layers_pattern", "it is a plain name of a list of layers, or several, such as 'encoder.layer'")
    if not layers:
        settings.refuse("layers_pattern", "it needs layers_to_transform beside it")
    return names[0] if len(names) == 1 else names


def _tokens(settings: Settings) -> dict[str, Any]:
    given = settings.get("trainable_token_indices", ())
    if isinstance(given, Mapping):
        tables = settings.keyed("trainable_token_indices")
        return {pattern: ids for name, ids in tables.items() for pattern in modules.ending([name])}
    return {modules.EMBEDDING: given} if settings.is_set("trainable_token_indices") else {}
