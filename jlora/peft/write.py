"""Writes an adapter as PEFT does."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.nodes.form import Form
from jlora.peft.adapter import CONV, EMBEDDING, EXPERTS, Adapter, Filed, Update
from jlora.peft.attention import owner, together
from jlora.peft.build import told_bias
from jlora.peft.card import checked_task, write_card
from jlora.peft.collect import Collected
from jlora.peft.config import Scale
from jlora.peft.files import locked
from jlora.peft.invocation import Tokens, settings_with
from jlora.peft.keys import PREFIX, SHARED, TOKENS, WHOLE
from jlora.peft.names import HEAD, TABLES
from jlora.peft.read import nesting
from jlora.peft.settings import CONFIG, WEIGHTS, header
from jlora.peft.tensors import TensorInfo, write_json, write_tensors


def write(
    directory: Path,
    collected: Collected,
    base_model: str | None = None,
    task_type: str | None = None,
    invocation: Tokens = None,
) -> None:
    """Writes ``adapter_model.safetensors``, ``adapter_config.json`` and a card, each whole or not at all.

    Raises:
      ValueError: if PEFT has no settings for such an adapter, or no such task.
    """
    task_type = checked_task(task_type)
    adapter, known = together(_with_head(collected.adapter, collected.known), collected.known)
    frozen = dict(collected.frozen)
    settings = _settings(_outermost(adapter), known, frozen, base_model) | {"task_type": task_type}
    if not collected.is_all_known:  # of the model: a short name might be another module's too
        settings["target_modules"] = sorted(
            n for n, update in _outermost(adapter).updates.items() if update.kind != EXPERTS
        )
    settings = settings_with(settings, {getattr(x, "kind", "linear") for x in adapter.updates.values()}, invocation)
    saved = {name: x for name, x in frozen.items() if _is_of(name, settings["modules_to_save"] or ())}
    if _is_of_norms(adapter):
        saved = frozen
        if wide := next((name for name, x in frozen.items() if x.ndim > 1), None):
            raise ValueError(
                f"peft.save: of {wide.rpartition('.')[0]} the bias alone trains, and PEFT has no files of such; "
                "adapt a kernel beside (bias='all'), or merge it"
            )
    tensors = dict(_tensors(adapter, saved))
    infos = {name: TensorInfo(x.shape, x.dtype) for name, x in sorted(tensors.items())}
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        write_tensors(directory / WEIGHTS, infos, tensors.__getitem__, header(directory, settings))
        write_json(directory / CONFIG, settings)
        write_card(directory, settings)


def _outermost(adapter: Adapter) -> Adapter:
    """Without the modules that stand within another, whose settings are theirs."""
    kept = {name: update for name, update in adapter.updates.items() if owner(name) == name}
    return dataclasses.replace(adapter, updates=kept)


def _with_head(adapter: Adapter, known: Mapping[str, bool]) -> Adapter:
    """With the update of the head, where a language model's table is its head: there PEFT has both."""
    table = tied_table(known)
    if table is None or table not in adapter.updates:
        return adapter
    update = adapter.updates[table]
    if update.magnitude is not None:
        raise ValueError(f"peft.save: {table} is the head too, which PEFT has not with DoRA; merge it")
    head = Update("linear", update.b.T, update.a.T, update.scale)
    return dataclasses.replace(adapter, updates={**adapter.updates, HEAD: head})


def tied_table(known: Mapping[str, bool]) -> str | None:
    """The table of a language model without a head of its own."""
    if HEAD in known:
        return None
    return next((name for name in known if re.fullmatch(rf"(model|transformer)\.({'|'.join(TABLES)})", name)), None)


def _tensors(adapter: Adapter, saved: Mapping[str, np.ndarray]) -> Iterable[tuple[str, np.ndarray]]:
    names = _wrapped(adapter)
    for tensor, x in adapter.shared.items():
        yield f"{SHARED}{tensor}", x
    for name, update in adapter.updates.items():
        for role, array in _roles(update).items():
            yield f"{PREFIX}{names[name]}.{role}", array
    for name, array in {**adapter.full, **saved}.items():
        module, _, leaf = name.rpartition(".")
        is_beside = leaf == "bias" and module in adapter.updates
        inner = f"{module}.{WHOLE}.{leaf}" if _is_of_norms(adapter) else name
        yield f"{PREFIX}{module}.base_layer.bias" if is_beside else PREFIX + inner, array
    for name, (_, rows) in adapter.tokens.items():
        yield f"{PREFIX}{name}.{TOKENS}", rows


def _roles(update: Update | Filed) -> Mapping[str, np.ndarray]:
    if isinstance(update, Filed):
        return update.tensors
    a, b = update.a, update.b
    extra = {"lora_magnitude_vector": update.magnitude, "lora_B.bias": update.bias}
    if update.kind == CONV and update.magnitude is not None:
        extra["lora_magnitude_vector"] = update.magnitude.reshape(1, -1, *[1] * (a.ndim - 2))
    if update.kind == EMBEDDING:
        pair = {"lora_embedding_A": a, "lora_embedding_B": b}
    else:
        if update.kind == CONV:
            b = b.reshape(*b.shape, *[1] * (a.ndim - 2))
        if update.kind == EXPERTS:
            a, b = a.reshape(-1, a.shape[-1]), np.moveaxis(b, 0, -1).reshape(b.shape[1], -1)
        pair = {"lora_A.weight": a, "lora_B.weight": b}
    return pair | {name: x for name, x in extra.items() if x is not None}


def _wrapped(adapter: Adapter) -> dict[str, str]:
    """The names of the updates in the file: parameters of one module stand within each other."""
    names = {name: name for name in adapter.updates}
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name, update in adapter.updates.items():
        if update.kind == EXPERTS:
            groups[name.rpartition(".")[0]].append(name)
    for module, found in groups.items():
        for depth, name in enumerate(sorted(found, key=lambda name: nesting(name.rpartition(".")[2]), reverse=True)):
            names[name] = module + ".base_layer" * depth
    return names


def _settings(
    adapter: Adapter, known: Mapping[str, bool], frozen: Mapping[str, np.ndarray], base_model: str | None
) -> dict[str, Any]:
    if adapter.form is not None:
        return _settings_of_form(adapter.form, adapter, known, frozen, base_model)
    if _is_of_norms(adapter):
        whole = {name.rpartition(".")[0] for name in adapter.full}
        every = {name.removesuffix(".bias") for name in known}
        shared = {"peft_type": "LN_TUNING", "base_model_name_or_path": base_model, "inference_mode": True}
        return shared | {"target_modules": named(whole, every), "modules_to_save": None}
    scales = {name: Scale.of(update.rank, update.scale) for name, update in adapter.updates.items()}
    rslora = bool(scales) and all(scale.rslora for scale in scales.values())
    alphas = {
        name: scale.alpha if scale.rslora == rslora else adapter.updates[name].scale * scale.rank
        for name, scale in scales.items()
    }
    ranks = {name: scale.rank for name, scale in scales.items()}
    rank, alpha = _most(ranks.values(), 8), _most(alphas.values(), 8)
    experts = [name for name, update in adapter.updates.items() if update.kind == EXPERTS]
    modules = [name for name in adapter.updates if name not in experts]
    bias, saved = _saved(adapter, known, frozen)
    tied = tied_table(known)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": rslora,
        "use_dora": adapter.is_dora,
        "lora_bias": any(update.bias is not None for update in adapter.updates.values()),
        "bias": bias,
        "fan_in_fan_out": bool(adapter.conv1d),
        "init_lora_weights": True,
        "target_modules": _targets(modules, [name for name, is_kernel in known.items() if is_kernel]),
        "target_parameters": named(experts, experts, 2) or None,
        "exclude_modules": None,
        "modules_to_save": saved or None,
        "trainable_token_indices": {name: list(ids) for name, (ids, _) in adapter.tokens.items()} or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": _with_routers(pattern(ranks, rank)),
        "alpha_pattern": _with_routers(pattern(alphas, alpha)),
        "ensure_weight_tying": tied is not None and tied in adapter.updates,
    }


def _is_of_norms(adapter: Adapter) -> bool:
    """Whether all that trains is norms, whole: PEFT's LN tuning."""
    return not adapter.updates and not adapter.tokens and all(x.ndim < 2 for x in adapter.full.values())


def _settings_of_form(
    form: Form, adapter: Adapter, known: Mapping[str, bool], frozen: Mapping[str, np.ndarray], base_model: str | None
) -> dict[str, Any]:
    """The settings of another method than LoRA."""
    bias, saved = _saved(adapter, known, frozen)
    if bias != "none" and not form.bias:
        raise ValueError(f"peft.save: biases train, which {form.method} has no setting for in PEFT; merge them")
    turned = (f"{name}.bias" for name in adapter.updates if form.turns_bias and f"{name}.bias" in known)
    if found := next(turned, None):
        raise ValueError(f"peft.save: {told_bias(form, found)}")
    told = {"bias": form.bias if bias == "lora_only" else bias} if form.bias else {}
    kernels = [name for name, is_kernel in known.items() if is_kernel]
    return {
        "peft_type": form.method,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": _targets([*adapter.updates], kernels),
        "modules_to_save": saved or None,
        **({"fan_in_fan_out": True} if adapter.conv1d else {}),
        **told,
        **form.fixed,
        **_of_modules(form, {name: dict(update.settings) for name, update in adapter.updates.items()}),
    }


def _of_modules(form: Form, settings: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings of all modules as those of the adapter: one for all, by patterns, or names of modules."""
    found: dict[str, Any] = {}
    settings = form.together(settings)
    for name in next(iter(settings.values()), {}):
        values = {module: of[name] for module, of in settings.items()}
        if name in form.listed:
            found[name] = named([module for module, is_so in values.items() if is_so], values)
            continue
        found[name] = _most(values.values(), None)
        if name in form.patterns:
            found[form.patterns[name]] = pattern(values, found[name])
        elif odd := next((module for module, value in values.items() if value != found[name]), None):
            raise ValueError(
                f"peft.save: {odd} has {name} {values[odd]}, and others have {found[name]}; {form.method} has one for "
                "all modules in PEFT. Save two adapters, or merge one of them"
            )
    return found


def _most(values: Iterable[Any], default: Any) -> Any:
    counted = collections.Counter(values).most_common(1)
    return counted[0][0] if counted else default


def within(name: str) -> str:
    """A name from behind its last number."""
    return re.sub(r"^.*\.\d+\.", "", name)


def named(wanted: Iterable[str], known: Iterable[str], least: int = 1) -> list[str]:
    """The shortest ends of names that are those of all that is wanted, and of nothing else that is known.

    Example:
      >>> known = ["layers.0.attn.q_proj", "layers.0.attn.out.dense", "layers.0.mlp.dense", "pooler.dense"]
      >>> named(known[:3], known)
      ['attn.out.dense', 'mlp.dense', 'q_proj']
    """
    wanted, found = {*wanted}, set()
    ends = _ends_of(known, wanted)
    forms: dict[str, set[str]] = collections.defaultdict(set)
    for name in wanted:
        forms[name.rpartition(".")[2]].add(within(name))
    for name in wanted:
        last = ".".join(name.split(".")[-least:])
        shorter = [last] if len(forms[name.rpartition(".")[2]]) == 1 else []
        found.add(next((end for end in [*shorter, within(name)] if end not in ends), name))
    return sorted(found)


def _ends_of(known: Iterable[str], wanted: set[str]) -> set[str]:
    """All ends of the names of other modules, and of the modules that hold any."""
    names = {".".join(parts[:n]) for name in known for parts in [name.split(".")] for n in range(1, len(parts) + 1)}
    return {".".join(parts[n:]) for name in names - wanted for parts in [name.split(".")] for n in range(len(parts))}


def pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Values by module as ``rank_pattern``: those that are not the default, under the shortest names."""
    groups: dict[Hashable, list[str]] = collections.defaultdict(list)
    for name, value in values.items():
        if value != default:
            groups[value].append(name)
    exact = lambda end: f"^{end}" if end in values and _is_end_of_others(end, values) else end
    return {exact(end): value for value, names in groups.items() for end in named(names, values)}


def _with_routers(values: dict[str, Any]) -> dict[str, Any]:
    """The same for the weights of routers, which are no linear layers in Transformers 5: there PEFT has parameters."""
    routers = {name: value for name, value in values.items() if name.rpartition(".")[2] in ("gate", "router")}
    return values | {f"{name}.weight": value for name, value in routers.items()}


def _is_end_of_others(name: str, names: Iterable[str]) -> bool:
    return any(other.endswith(f".{name}") for other in names)


def _targets(wanted: Sequence[str], known: Iterable[str]) -> list[str] | str:
    """``target_modules``: ends of names, or where one is the end of another that is not meant a regular expression."""
    ends, others = named(wanted, known), {*known} - {*wanted}
    if any(_is_end_of_others(end, others) for end in ends):
        return "|".join(map(re.escape, sorted(wanted)))
    return ends


def _saved(
    adapter: Adapter, known: Mapping[str, bool], frozen: Mapping[str, np.ndarray]
) -> tuple[str, list[str] | None]:
    """The mode of the biases, and the modules that are saved whole."""
    biases = {name for name in adapter.full if name.endswith(".bias")}
    whole = {name.rpartition(".")[0] for name in adapter.full if name not in biases}
    left = {name for name in biases if name.rpartition(".")[0] not in whole}
    every = {name for name in known if name.endswith(".bias")}
    beside = {name for name in every if name.removesuffix(".bias") in adapter.updates}
    if both := sorted(whole & {*adapter.updates}):
        raise ValueError(f"peft.save: {both[0]} has an update and trains in full, which PEFT has not; do one of them")
    if not left or left == beside or left == {name for name in every if name.rpartition(".")[0] not in whole}:
        mode = "none" if not left else "lora_only" if left == beside else "all"
        return mode, _modules(whole, known)
    if lone := sorted(left & beside):
        raise ValueError(
            f"peft.save: of the biases beside adapted kernels {lone} train and others do not; PEFT has all of them "
            "(bias='lora_only'), all of the model (bias='all'), or none"
        )
    return "none", _modules(whole | {name.rpartition(".")[0] for name in left}, known)


def _modules(whole: set[str], known: Mapping[str, bool]) -> list[str] | None:
    """Names of the modules to save: PEFT takes each module whose name ends so, be it within a word."""
    modules = {name.removesuffix(".bias") for name in known}
    ends: Callable[[str], set[str]] = lambda end: {module for module in modules if module.endswith(end)}
    short = {name: name.rpartition(".")[2] for name in whole}
    return sorted({end if ends(end) <= whole else name for name, end in short.items()}) or None


def _is_of(parameter: str, modules: Iterable[str]) -> bool:
    return any(parameter.rpartition(".")[0].endswith(module) for module in modules)
