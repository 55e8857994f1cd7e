"""The card of an adapter, ``README.md``: what the Hub's search reads, the settings, and how to load it.

Its last line has a digest of the lines before. A card that is as jlora wrote it is written anew with the adapter; one
that somebody has edited, or written, is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora.peft.files import write_text
from jlora.peft.hub import is_name
from jlora.peft.invocation import SETTING

CARD = "README.md"
_MARK = "<!-- jlora writes this card anew with the adapter, unless it is edited: {} -->\n"
_OWN = re.compile(re.escape(_MARK).replace(r"\{\}", "([0-9a-f]{64})").encode())
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes


_NAMES = {
    "ADALORA": "AdaLoRA",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "IA3": "IA3",
    "VERA": "VeRA",
}  # as their papers have them
_PATTERNS = {"r": "rank_pattern", "alpha": "alpha_pattern"}


class Task(NamedTuple):
    """What an adapter is for: Transformers' class of such models, and the Hub's name of such pipelines."""

    model: str
    pipeline: str | None


TASKS = {
    "CAUSAL_LM": Task("AutoModelForCausalLM", "text-generation"),
    "FEATURE_EXTRACTION": Task("AutoModel", "feature-extraction"),
    "QUESTION_ANS": Task("AutoModelForQuestionAnswering", "question-answering"),
    "SEQ_2_SEQ_LM": Task("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": Task("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": Task("AutoModelForTokenClassification", "token-classification"),
}
_OTHER = Task("AutoModel", None)


def checked_task(task_type: Any) -> str | None:
    """One of PEFT's task types, or None.

    Raises:
      ValueError: if it is another.
    """
    found = next((task for task in TASKS if task == task_type), None)
    if found is None and task_type is not None:
        raise ValueError(f"task_type must be one of PEFT's, {', '.join(TASKS)}, or None, found {task_type!r}")
    return found


def write_card(directory: Path, settings: Mapping[str, Any]) -> None:
    """Writes an adapter's card beside it, unless somebody else's is there."""
    if is_own(directory / CARD):
        write_text(directory / CARD, card(settings))


def is_own(path: Path) -> bool:
    """Whether there is no card, or one that is as jlora wrote it."""
    if not os.path.lexists(path):
        return True
    if path.is_symlink() or not path.is_file():
        return False
    *lines, last = path.read_bytes().splitlines(keepends=True) or [b""]
    found = _OWN.fullmatch(last)
    return found is not None and found[1].decode() == hashlib.sha256(b"".join(lines)).hexdigest()


def card(settings: Mapping[str, Any]) -> str:
    """The card of an adapter with PEFT's settings.

    Names that are not those of repositories, such as a base's path on some machine, are left out.
    """
    text = "\n".join([*_front(settings), "", *_settings(settings), "", *_loading(settings), ""]) + "\n"
    return text + _MARK.format(hashlib.sha256(text.encode()).hexdigest())


def _base(settings: Mapping[str, Any]) -> str | None:
    """The base's name, where it is one of the Hub's, of which older ones have no owner."""
    name = settings.get("base_model_name_or_path")
    return name if isinstance(name, str) and (is_name(name) or is_name(f"org/{name}")) else None


def _task(settings: Mapping[str, Any]) -> Task:
    return TASKS.get(settings.get("task_type") or "", _OTHER)


def _front(settings: Mapping[str, Any]) -> list[str]:
    """The metadata, in YAML, whose strings may be JSON's."""
    base, pipeline = _base(settings), _task(settings).pipeline
    tags = [*([f"base_model:adapter:{base}"] if base else []), settings["peft_type"].lower()]
    return [
        "---",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        "library_name: peft",
        *([f"pipeline_tag: {pipeline}"] if pipeline else []),
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
        "---",
    ]


def _settings(settings: Mapping[str, Any]) -> list[str]:
    base = _base(settings)
    method = _method(settings)
    told = {
        "Method": f"{method} with rsLoRA's scale" if settings.get("use_rslora") else method,
        **(_of_lora(settings) if settings["peft_type"] == "LORA" else _of_others(settings)),
        "Targets": _named(settings["target_modules"]),
        "Target parameters": _named(settings.get("target_parameters")),
        "Biases": None if settings.get("bias", "none") == "none" else _named([settings["bias"]]),
        "Trained in full": _named(settings["modules_to_save"]),
        "Acts from the last of these tokens on": ", ".join(map(str, settings.get(SETTING) or ())),
        "Tables with trained rows": _named(settings.get("trainable_token_indices")),
        "Task": _named([settings["task_type"]] if settings["task_type"] else None),
    }
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    return [f"# {method} adapter{of}", "", *(f"- {name}: {text}" for name, text in told.items() if text)]


def _method(settings: Mapping[str, Any]) -> str:
    if settings["peft_type"] == "LORA":
        return "DoRA" if settings["use_dora"] else "Activated LoRA" if settings.get(SETTING) else "LoRA"
    return str(_NAMES.get(settings["peft_type"], settings["peft_type"]))


def _of_lora(settings: Mapping[str, Any]) -> dict[str, str]:
    return {
        "Rank": f"{settings['r']}{_some(settings['rank_pattern'])}",
        "Alpha": f"{settings['lora_alpha']:g}{_some(settings['alpha_pattern'])}",
        "Dropout at training": f"{settings['lora_dropout']:g}",
    }


def _of_others(settings: Mapping[str, Any]) -> dict[str, str]:
    """The numbers among the settings of another method, by PEFT's names."""
    numbers = {name: x for name, x in settings.items() if type(x) in (int, float)}
    return {f"`{name}`": f"{x:g}{_some(settings.get(_PATTERNS.get(name, ''), {}))}" for name, x in numbers.items()}


def _some(pattern: Mapping[str, Any]) -> str:
    values = sorted({*pattern.values()})
    return f"; of some modules {', '.join(f'{value:g}' for value in values[:8])}" if values else ""


def _named(names: str | Iterable[str] | None, count: int = 24) -> str:
    """Names, or a regular expression, as code."""
    given = [names] if isinstance(names, str) else [*(names or ())]
    shown = [re.sub(r"[`\s]", " ", name) for name in given[:count]]
    cut = [f"`{name if len(name) <= 200 else name[:200] + ' ...'}`" for name in shown]
    return ", ".join(cut) + (f" and {len(given) - count} more" if len(given) > count else "")


def _loading(settings: Mapping[str, Any]) -> list[str]:
    base, model = _base(settings) or "BASE", _task(settings).model
    told = "" if _base(settings) else ", `BASE` the model that it was trained on"
    return [
        "## Use",
        "",
        f"`ADAPTER` is this directory, or its name on the Hub{told}.",
        "In [PEFT](https://github.com/huggingface/peft):",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {model}",
        "",
        f'model = PeftModel.from_pretrained({model}.from_pretrained("{base}"), "ADAPTER")',
        "```",
        "",
        *(_in_jlora_activated(settings[SETTING]) if settings.get(SETTING) else _merged_or_not(settings, base)),
    ]


def _in_jlora_activated(tokens: list[int]) -> list[str]:
    """It has no merged form, and acts at some tokens only."""
    return [
        "In jlora, onto the parameters of the base in JAX:",
        "",
        "```python",
        "import jlora",
        "",
        f'params = jlora.peft.load("ADAPTER", params, invocation_tokens={tokens})',
        f"active = jlora.adapters.invoked(ids, {tokens})",
        "logits = jlora.adapters.activated(model)(params, active, ids)",
        "```",
    ]


def _merged_or_not(settings: Mapping[str, Any], base: str) -> list[str]:
    return [
        *_serving(settings, base),
        "",
        "In jlora, onto the parameters of the base in JAX, or merged into its safetensors:",
        "",
        "```python",
        "import jlora",
        "",
        'params = jlora.peft.load("ADAPTER", params)',
        "```",
        "",
        "```sh",
        f"jlora merge {base} ADAPTER OUT",
        "```",
    ]


def _serving(settings: Mapping[str, Any], base: str) -> list[str]:
    """How vLLM serves the adapter, which takes low-rank updates of one rank and one scale."""
    is_lora = settings["peft_type"] == "LORA"
    rank = next((rank for rank in _VLLM_RANKS if is_lora and rank >= settings["r"]), None)
    others = "use_dora lora_bias rank_pattern alpha_pattern target_parameters modules_to_save trainable_token_indices"
    if rank is None or settings["bias"] != "none" or any(settings[name] for name in others.split()):
        return [
            "[vLLM](https://docs.vllm.ai) takes plain adapters of one rank alone: it serves this one merged.",
            "",
            "```sh",
            f"jlora merge {base} ADAPTER OUT && vllm serve OUT",
            "```",
        ]
    return [
        "In [vLLM](https://docs.vllm.ai):",
        "",
        "```sh",
        f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules name=ADAPTER",
        "```",
    ]
