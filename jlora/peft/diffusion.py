"""Adapters of image models: the files of kohya's scripts (and LyCORIS' LoRA), and those of diffusers.

Both are one file, with the adapters of one component or of several: the denoiser, the text encoders. An update is
``alpha / rank * up @ down``. A rank that has no alpha is its own, but in files of diffusers only where all ranks are
one: diffusers has a single alpha for all that have none.

References:
  ``networks/lora.py`` in https://github.com/kohya-ss/sd-scripts: ``LoRAModule``, ``merge_to``.
  ``loaders/lora_conversion_utils.py``, ``loaders/peft.py``, ``utils/state_dict_utils.py`` and ``utils/peft_utils.py``
  under ``src/diffusers`` in https://github.com/huggingface/diffusers: the names, alphas and settings.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jlora.peft.adapter import Adapter, Update
from jlora.peft.config import Config
from jlora.peft.flat import FlatAdapter
from jlora.peft.keys import NAME, PREFIX
from jlora.peft.read import check_types, pair
from jlora.peft.tensors import TensorFile, parsed

KOHYA, DIFFUSERS = "kohya", "diffusers"
METADATA = "lora_adapter_metadata"
_KOHYA = {
    "lora_unet_": "unet", "lora_transformer_": "transformer", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3",
}  # fmt: skip
_COMPONENT = re.compile(r"(unet|transformer(?:_2)?|text_encoder(?:_[23])?)\.(?!\d)(.+)")
_KOHYA_ROLES = {"lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha"}
_ROLES = _KOHYA_ROLES | {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora.down.weight": "a", "lora.up.weight": "b",
    "lora_linear_layer.down.weight": "a", "lora_linear_layer.up.weight": "b", "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
_ROLE = re.compile(rf"(.+?)\.({'|'.join(sorted(map(re.escape, _ROLES), key=len, reverse=True))})")
_OLD = re.compile(r"(.+)\.to_(q|k|v|out)_lora\.(down|up)\.weight")  # of attention processors
# What other methods write into such files, by the ends of names.
_REFUSED = {
    "lora_mid.weight": "a Tucker decomposition of a convolution (lora_mid)",
    "dora_scale": "DoRA's magnitudes by LyCORIS (dora_scale), whose norms are over other axes than PEFT's",
    "scalar": "a trained scalar of LyCORIS",
    "diff": "a whole difference of weights (diff)",
    "diff_b": "a difference of biases (diff_b)",
}
_REFUSED_STARTS = {"hada": "LoHa (hada_)", "lokr": "LoKr (lokr_)", "oft": "OFT (oft_)", "boft": "BOFT (boft_)"}


class Part(NamedTuple):
    """A tensor: of which component, of which module, and what it is there."""

    component: str
    name: str
    role: str


def kind_of_names(names: Iterable[str]) -> str | None:
    """Whose file has tensors of these names: kohya's, diffusers', or None for neither."""
    names = list(names)
    if any(name.startswith(tuple(_KOHYA)) for name in names):
        return KOHYA
    is_theirs = lambda name: (
        not name.startswith(PREFIX)
        and (_OLD.fullmatch(name) or ((match := _ROLE.fullmatch(name)) and _ROLES[match[2]] in ("a", "b")))
    )
    return DIFFUSERS if any(is_theirs(name[:1000]) for name in names) else None


def read_diffusion(file: TensorFile, kind: str, component: str | None = None) -> Adapter:
    """The adapter of one component in a file of kohya's scripts, or of diffusers.

    Args:
      file: with the tensors.
      kind: ``"kohya"`` or ``"diffusers"``.
      component: such as ``"unet"``; None: the only one.

    Raises:
      ValueError: if a tensor is none of a low-rank update, if the file has several components, or not that one.
    """
    found: dict[str, dict[str, dict[str, str]]] = collections.defaultdict(lambda: collections.defaultdict(dict))
    for key in file:
        part = (_of_kohya if kind == KOHYA else _of_diffusers)(file, key)
        keys = found[part.component][part.name]
        if part.role in keys:
            raise ValueError(f"{file.path}: {part.name} has two tensors for one thing, {keys[part.role]!r} and {key!r}")
        keys[part.role] = key
    component = _chosen(file, found, component)
    modules = found[component]
    check_types(file, (key for keys in modules.values() for role, key in keys.items() if role != "alpha"))
    config = _config(file, component) if kind == DIFFUSERS else None
    alphas = {name: _alpha(file, keys["alpha"]) for name, keys in modules.items() if "alpha" in keys}
    if kind == DIFFUSERS:
        _check_alphas(file, modules, alphas, config)
    updates = {name: _update(file, name, keys, alphas.get(name), config) for name, keys in modules.items()}
    made = FlatAdapter if kind == KOHYA else Adapter
    return made(updates, dropout=float(config.spec.dropout) if config else 0.0, config=_as_peft(updates, config))


def _of_kohya(file: TensorFile, key: str) -> Part:
    prefix = next((start for start in _KOHYA if key.startswith(start)), "")
    name, _, role = key.removeprefix(prefix).partition(".")
    if not prefix or role not in _KOHYA_ROLES or not re.fullmatch(r"[\w-]{1,1000}", name):
        raise ValueError(_unread(file, key, role))
    return Part(_KOHYA[prefix], name, _KOHYA_ROLES[role])


def _of_diffusers(file: TensorFile, key: str) -> Part:
    match = _COMPONENT.fullmatch(key)
    component, rest = (match[1], match[2]) if match else ("", key)
    rest = rest.replace(".processor.", ".")
    if old := _OLD.fullmatch(rest[:1000]):
        name, role = f"{old[1]}.{_attention(component, old[2])}", {"down": "a", "up": "b"}[old[3]]
    elif given := _ROLE.fullmatch(rest[:1000]):
        name, role = given[1], _ROLES[given[2]]
    else:
        raise ValueError(_unread(file, key, rest.rpartition(".")[2]))
    if not NAME.fullmatch(name) or key.startswith(PREFIX):
        raise ValueError(_unread(file, key, ""))
    return Part(component, name, role)


def _attention(component: str, which: str) -> str:
    """The name that a projection of an attention has, by that which its processor had for it."""
    if component.startswith("text_encoder"):
        return f"{which}_proj"
    return "to_out.0" if which == "out" else f"to_{which}"


def _unread(file: TensorFile, key: str, role: str) -> str:
    last = role.rpartition(".")[2]
    what = _REFUSED.get(role) or _REFUSED.get(last)
    what = what or next((told for start, told in _REFUSED_STARTS.items() if last.startswith(f"{start}_")), None)
    because = f"is {what}" if what else "is of no kind that jlora knows"
    return (
        f"{file.path}: the tensor {key[:200]!r} {because}; low-rank updates of linear layers and convolutions are read"
    )


def _chosen(file: TensorFile, found: Mapping[str, Any], component: str | None) -> str:
    names = sorted(found)
    shown = ", ".join(repr(name) for name in names)
    if not names:
        raise ValueError(f"{file.path} has no tensors of an adapter")
    if component is not None and component not in found:
        raise ValueError(
            f"{file.path} has no component {component!r}; it has {shown if names != [''] else 'a single one'}"
        )
    if component is None and len(names) > 1:
        raise ValueError(
            f"{file.path} has the adapters of several components, {shown}: say which is that of the tree, "
            f"component={next(filter(None, names))!r}"
        )
    return names[0] if component is None else component


def _alpha(file: TensorFile, key: str) -> float:
    array = file[key]
    alpha = float(array.reshape(-1)[0]) if array.size == 1 and array.dtype.kind != "b" else math.nan
    if not 0 < alpha < 1e30:
        raise ValueError(f"{file.path}: {key} must be one number above 0, found {alpha} of shape {array.shape}")
    return alpha


def _check_alphas(
    file: TensorFile, modules: Mapping[str, Mapping[str, str]], alphas: Mapping[str, float], config: Config | None
) -> None:
    """Refuses a file that does not tell each module's alpha."""
    if config is not None and alphas:
        raise ValueError(
            f"{file.path} has alphas twice, as tensors and in {METADATA!r} of its header; take one of them out"
        )
    if config is not None or len(alphas) == len(modules):
        return
    if alphas:
        lone = min({*modules} - {*alphas})
        raise ValueError(f"{file.path} has alphas, but none of {lone}; add {lone}.alpha, a number")
    ranks = {name: file.infos[keys["a"]].shape[:1] for name, keys in modules.items() if "a" in keys}
    if len({*ranks.values()}) > 1:
        some = ", ".join(f"{shape[0] if shape else 0} of {name}" for name, shape in list(ranks.items())[:2])
        raise ValueError(
            f"{file.path} has several ranks (such as {some}), and neither alphas nor {METADATA!r} in its header: "
            "diffusers takes one alpha for all of them, others each rank for its own. Add the alphas, as tensors"
        )


def _config(file: TensorFile, component: str) -> Config | None:
    """PEFT's settings of a component, where the header has them."""
    text = file.metadata.get(METADATA)
    if text is None:
        return None
    where = f"{file.path}, {METADATA!r} of its header"
    start = f"{component}." if component else ""
    data = {key[len(start) :]: value for key, value in parsed(where, text).items() if key.startswith(start)}
    if not data:
        return None
    try:
        return Config({"peft_type": "LORA"} | data)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('LoraSpec.from_peft: ')}") from None


def _update(file: TensorFile, name: str, keys: Mapping[str, str], alpha: float | None, config: Config | None) -> Update:
    a, b, kind = pair(file, name, keys, {})
    rank = len(a)
    if b.shape[1] != rank:
        raise ValueError(
            f"{file.path}: the factors of {name} are {a.shape} and {b.shape}, of ranks {rank} and {b.shape[1]}"
        )
    given = {role: file[keys[role]].reshape(-1) for role in ("magnitude", "bias") if role in keys}
    for role, array in given.items():
        if array.size != len(b):
            raise ValueError(f"{file.path}: the {role} of {name} has {array.size} elements; expected are {len(b)}")
    scale = (rank if alpha is None else alpha) / rank
    if config is not None:
        scale = _scale(file, name, rank, given, config)
    return Update(kind, a, b, scale, given.get("magnitude"), given.get("bias"))


def _scale(file: TensorFile, name: str, rank: int, given: Mapping[str, Any], config: Config) -> float:
    """The scale by the settings, which must be of this update."""
    spec = config.at(name)
    wanted = {"magnitude": config.spec.variant == "dora", "bias": bool(config.spec.lora_bias)}
    if not config.is_target(name) or spec.rank != rank or wanted != {role: role in given for role in wanted}:
        raise ValueError(
            f"{file.path}: {name} has rank {rank} and {' and '.join(given) or 'neither magnitude nor bias'}, but by "
            f"{METADATA!r} of the header {f'rank {spec.rank}' if config.is_target(name) else 'it is no target'}, with "
            f"use_dora={wanted['magnitude']} and lora_bias={wanted['bias']}"
        )
    return spec.scale


def _as_peft(updates: Mapping[str, Update], config: Config | None) -> dict[str, Any]:
    """Settings as PEFT's; which modules of the model are adapted the file alone tells."""
    first = next(iter(updates.values()))
    return {
        "peft_type": "LORA", "r": first.rank, "lora_alpha": first.scale * first.rank, "target_modules": "all-linear",
        "lora_dropout": float(config.spec.dropout) if config else 0.0,
        "use_dora": any(update.magnitude is not None for update in updates.values()),
        "lora_bias": any(update.bias is not None for update in updates.values()),
        "base_model_name_or_path": config.data.get("base_model_name_or_path") if config else None,
    }  # fmt: skip
