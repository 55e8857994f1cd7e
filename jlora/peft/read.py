"""Reads an adapter's directory. Nothing in it is trusted: each name, shape and number is checked before it is used."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.peft.adapter import CONV, EMBEDDING, EXPERTS, LINEAR, Adapter, Filed, Update
from jlora.peft.attention import owner
from jlora.peft.config import Config
from jlora.peft.files import locked
from jlora.peft.invocation import Tokens, check_given
from jlora.peft.keys import ECHOES, SHARED, parse
from jlora.peft.names import HEAD, TABLES
from jlora.peft.pickled import PickledFile
from jlora.peft.settings import CONFIG, WEIGHTS, beside, of_save
from jlora.peft.tensors import TensorFile, are_finite

PICKLE = "adapter_model.bin"  # what most adapters of PEFT before 0.5 have
Roles = dict[str, str]


def read(
    directory: str | Path, *, allow_nonfinite: bool = False, allow_edited: bool = False, invocation: Tokens = None
) -> Adapter:
    """Reads the adapter that PEFT, or `jlora.peft.save`, wrote into a directory.

    Args:
      directory: with ``adapter_config.json`` and ``adapter_model.safetensors``, or where that is not there
        ``adapter_model.bin``, of which the pickle is not run.
      allow_nonfinite: take NaN and infinite values as they are.
      allow_edited: take settings that are not those of the save of the weights.
      invocation: the tokens after which the adapter acts, as the caller knows them; None: it acts at all.

    Raises:
      FileNotFoundError: if one of the files is missing.
      ValueError: if a file is not what PEFT writes; the message says which part, what was expected and found.
    """
    directory = Path(directory)
    check_there(directory)
    with locked(directory, shared=True):
        has_weights = (directory / WEIGHTS).is_file()
        file = TensorFile(directory / WEIGHTS) if has_weights else PickledFile(directory / PICKLE)
        settings = beside(file, allow_edited)
    config = _config(directory / CONFIG, settings)
    check_given(directory / CONFIG, config.invocation, invocation)
    integers = () if config.form is None else config.form.integers
    check_types(file, [name for name in file if name.rpartition(".")[2] not in integers])
    adapter = _adapter(file, config)
    if not allow_edited:
        _check_edited(file, adapter)
    if not allow_nonfinite:
        check_finite(file.path, adapter)
    return adapter


def _config(path: Path, settings: Mapping[str, Any]) -> Config:
    try:
        return Config(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('LoraSpec.from_peft: ')}") from None


def _check_edited(file: TensorFile, adapter: Adapter) -> None:
    """Refuses settings under which the weights mean something else than when they were saved."""
    own = of_save(file)
    if own is None or own == adapter.config:
        return
    saved = _adapter(file, _config(file.path, own))
    scale_of = lambda name: _meaning(saved.updates.get(name))
    pairs: dict[str, Any] = {f"the scale of {n}": (scale_of(n), _meaning(x)) for n, x in adapter.updates.items()}
    pairs |= {f"the rows of {n}": (saved.tokens.get(n, (None,))[0], ids) for n, (ids, _) in adapter.tokens.items()}
    for name, (then, now) in pairs.items():
        if then != now:
            raise ValueError(
                f"{file.path} was saved with other settings than those in {CONFIG} beside it: {name} was "
                f"{_short(then)}, and is {_short(now)} by the file. They are of two saves, or were edited; save the "
                "adapter again, or if the edit is meant, allow_edited=True"
            )


def _meaning(update: Any) -> Any:
    """What settings say of a module's tensors: the scale, and the options of a variant."""
    if isinstance(update, Filed) and update.spec is not None:
        return (update.spec.scale, *sorted(update.spec.options.items()))
    return getattr(update, "scale", None)


def check_types(file: TensorFile, names: Iterable[str]) -> None:
    """Refuses tensors that are empty, or no floating numbers."""
    for name in names:
        info = file.infos[name]
        if 0 in info.shape:
            raise ValueError(
                f"{file.path}: {name} is empty, of shape {info.shape}: it was written while its parts were spread over "
                "processes, as DeepSpeed's ZeRO-3 does; gather them when you save "
                "(stage3_gather_16bit_weights_on_model_save), or make the file of the checkpoint by zero_to_fp32.py"
            )
        if info.dtype.kind in "iub":
            raise ValueError(f"{file.path}: {name} is {info.shape} of {info.dtype.name}; expected are floating numbers")


def check_there(directory: Path) -> None:
    """Refuses a directory without an adapter's files."""
    has_weights = (directory / WEIGHTS).is_file() or (directory / PICKLE).is_file()
    missing = [name for name, there in ((CONFIG, (directory / CONFIG).is_file()), (WEIGHTS, has_weights)) if not there]
    if missing:
        within = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}")) if directory.is_dir() else []
        hint = f"; the adapters in it are {', '.join(within[:5])}: give one of these folders" if within else ""
        if directory.is_file() or (directory / "adapters.safetensors").is_file():
            hint = "; if it is one of another tool's, jlora convert makes PEFT's files of it"
        raise FileNotFoundError(f"{directory} is no adapter of PEFT's: it has no {' and no '.join(missing)}{hint}")


def _adapter(file: TensorFile, config: Config) -> Adapter:
    roles: dict[str, Roles] = collections.defaultdict(dict)
    shared = _shared(file, config)
    for key in file:
        if key in shared.values() or _is_copy(file, key, shared):
            continue
        try:
            name, role = parse(key, config.form)
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from None
        if role in roles[name]:
            raise ValueError(f"{file.path}: {name} has two tensors for one thing, {roles[name][role]!r} and {key!r}")
        roles[name][role] = key
    parameters = _experts(file, roles, config) if config.is_lora else {}
    of_role = lambda role: {name: file[keys[role]] for name, keys in roles.items() if role in keys}
    whole = of_role("full")
    full = {name: array for name, array in whole.items() if _is_trained(name, whole, config)}
    copies = {name: array for name, array in whole.items() if name not in full}
    rows = of_role("tokens")
    tokens = {name: _rows(file, name, x, config) for name, x in rows.items() if not _is_tied_copy(name, rows, config)}
    saved, originals = (of_role(role) for role in ECHOES)
    copies |= _echoes(file, saved, originals, full, config)
    if config.form is None:
        names = [name for name, keys in roles.items() if {*keys} & {"a", "b", "embedding_a", "embedding_b"}]
        updates = {parameters.get(name, name): _update(file, name, roles[name], parameters, config) for name in names}
    else:
        names = [name for name, keys in roles.items() if {*keys} & {*config.form.tensors}]
        common = {tensor: file[key] for tensor, key in shared.items()}
        updates = {name: _filed(file, name, roles[name], config, common) for name in names}
    _check_left(file, {*names}, roles)
    if not updates and not full and not tokens:
        raise ValueError(f"{file.path} has no tensors of an adapter")
    return Adapter(
        updates,
        full,
        tokens,
        copies | {f"{name}.weight": array for name, array in of_role("base").items()},
        dropout=float(config.spec.dropout),
        conv1d=config.conv1d,
        start=config.start,
        config=config.data,
        form=config.form,
    )


def _shared(file: TensorFile, config: Config) -> dict[str, str]:
    """The keys of the tensors that all modules have in common."""
    tensors = () if config.form is None else config.form.shared
    there = {*file}
    return {tensor: f"{SHARED}{tensor}" for tensor in tensors if f"{SHARED}{tensor}" in there}


def _is_copy(file: TensorFile, key: str, shared: Mapping[str, str]) -> bool:
    """Whether a tensor of a module is a copy of one that all have in common, as PEFT writes RandLoRA's."""
    name = key.rpartition(".")[2]
    if name in shared and not np.array_equal(file[key], file[shared[name]]):
        raise ValueError(f"{file.path}: {key} is not {shared[name]}, of which it should be a copy")
    return name in shared


def _filed(file: TensorFile, name: str, keys: Roles, config: Config, shared: Mapping[str, np.ndarray]) -> Filed:
    """A module of another method than LoRA."""
    form = config.form
    assert form is not None
    if not config.is_target(name):
        raise ValueError(
            f"{file.path} has {next(iter(keys.values()))}, but its settings do not name {name} (target_modules="
            f"{_short(config.data.get('target_modules'))})"
        )
    if (missing := [tensor for tensor in form.tensors if tensor not in keys]) and not form.optional:
        raise ValueError(f"{file.path}: {name} has {sorted(keys.values())}, but no {' and no '.join(missing)}")
    tensors = {tensor: file[keys[tensor]] for tensor in form.tensors if tensor in keys}
    for tensor, x in {**tensors, **shared}.items():
        if (words := form.field(tensor)[1]) and x.ndim != len(words):
            raise ValueError(f"{file.path}: {tensor} of {name} is {x.shape}; expected is ({', '.join(words)})")
    spec = config.at(name)
    return Filed(tensors, form.class_of(spec.node, spec.kernel), spec.kernel, shared=shared)


def _update(file: TensorFile, name: str, keys: Roles, parameters: Mapping[str, str], config: Config) -> Update:
    a, b, kind = pair(file, name, keys, parameters)
    named = parameters.get(name, owner(name))
    is_tied_head = named == HEAD and config.data.get("ensure_weight_tying")
    if not config.is_target(named) and not is_tied_head:
        raise ValueError(
            f"{file.path} has factors for {named}, which its settings do not name (target_modules="
            f"{_short(config.data.get('target_modules'))}, target_parameters={_short(config.parameters)})"
        )
    spec = config.at(named)
    rank = spec.rank
    stacked = len(a) if kind == EXPERTS else rank
    if kind == CONV and b.shape[1] < rank == len(a) and rank % b.shape[1] == 0:
        raise ValueError(
            f"{file.path}: {named} is a grouped convolution, whose groups get ranks that see all inputs: that is "
            "no change of its kernel, and PEFT can't merge it either. Leave it out (exclude_modules), and train anew"
        )
    if stacked % rank or len(a) != stacked or b.shape[1] != stacked:
        raise ValueError(
            f"{file.path}: by its settings {named} has rank {rank}, but its factors are {a.shape} and {b.shape}, of "
            f"ranks {a.shape[0]} and {b.shape[1]}"
        )
    if kind == EXPERTS:
        count = stacked // rank
        a, b = a.reshape(count, rank, -1), np.moveaxis(b.reshape(-1, rank, count), -1, 0)
    given = {role: file[keys[role]] for role in ("magnitude", "bias") if role in keys}
    _check_parts(file, named, given, config, b.shape[-2])
    flat = {role: array.reshape(-1) for role, array in given.items()}
    return Update(kind, a, b, spec.scale, flat.get("magnitude"), flat.get("bias"))


def pair(
    file: TensorFile, name: str, keys: Mapping[str, str], parameters: Mapping[str, str]
) -> tuple[np.ndarray, np.ndarray, str]:
    """The two factors of a module, and its kind; `keys` are its tensors by their roles."""
    is_table = "embedding_a" in keys or "embedding_b" in keys
    roles = ("embedding_a", "embedding_b") if is_table else ("a", "b")
    if missing := [role for role in roles if role not in keys]:
        raise ValueError(f"{file.path}: {name} has {sorted(keys.values())}, but not the other factor, {missing[0]}")
    a, b = (file[keys[role]] for role in roles)
    kind = EMBEDDING if is_table else EXPERTS if name in parameters else CONV if a.ndim in (3, 4, 5) else LINEAR
    if kind == CONV and b.ndim == a.ndim and {*b.shape[2:]} == {1}:
        b = b.reshape(b.shape[:2])
    elif kind == CONV and a.ndim == 3:
        kind = LINEAR  # no convolution has factors of three axes and of two
    if (kind != CONV and a.ndim != 2) or b.ndim != 2:
        raise ValueError(
            f"{file.path}: the factors of {name} are {a.shape} and {b.shape}; expected are (r, in) and (out, r), or of "
            "a convolution (r, in, window...) and (out, r, 1...)"
        )
    return a, b, kind


def _experts(file: TensorFile, roles: dict[str, Roles], config: Config) -> dict[str, str]:
    """The parameters of stacked experts, by the name that their factors have in the file.

    PEFT puts one wrapper around the other, the first parameter innermost: its factors are under ``base_layer``.
    """
    found: dict[str, str] = {}
    wanted = [name for name in config.parameters if not name.endswith(".weight")]
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name, keys in roles.items():
        module = name.replace(".base_layer", "")
        if "a" in keys and any(f".{module}".endswith(f".{target.rpartition('.')[0]}") for target in wanted):
            groups[module].append(name)
    for module, names in groups.items():
        leaves = [
            target.rpartition(".")[2] for target in wanted if f".{module}".endswith(f".{target.rpartition('.')[0]}")
        ]
        leaves = sorted(dict.fromkeys(leaves), key=nesting)
        names = sorted(names, key=len, reverse=True)
        if len(names) != len(leaves):
            raise ValueError(
                f"{file.path}: {module} has the factors of {len(names)} parameters, but target_parameters names "
                f"{', '.join(leaves)} of it"
            )
        found |= {name: f"{module}.{leaf}" for name, leaf in zip(names, leaves, strict=True)}
    return found


def nesting(leaf: str) -> tuple[bool, str]:
    """The order in which PEFT wraps the parameters of stacked experts: as Transformers' modules declare them."""
    return "down" in leaf or "w2" in leaf, leaf


def _is_tied_copy(name: str, rows: Mapping[str, np.ndarray], config: Config) -> bool:
    """Whether trained rows of a head are those of the table that it shares: then PEFT writes them twice."""
    others = [x for other, x in rows.items() if other != name]
    is_named = config.has_tables and bool(config.tokens(HEAD))
    return name == HEAD and not is_named and any(np.array_equal(x, rows[name]) for x in others)


def _rows(file: TensorFile, name: str, rows: np.ndarray, config: Config) -> tuple[tuple[int, ...], np.ndarray]:
    tokens = config.tokens(name)
    if rows.ndim != 2 or len(rows) != len(tokens) or min(tokens, default=0) < 0 or len({*tokens}) < len(tokens):
        raise ValueError(
            f"{file.path} has {rows.shape} for the trained rows of {name}, but trainable_token_indices names "
            f"{_short(tokens)}, {len(tokens)} of them"
        )
    return tokens, rows


def _is_trained(name: str, whole: Mapping[str, np.ndarray], config: Config) -> bool:
    """Whether a whole tensor is one that the settings name, or the head of a table that they name: the same, tied.

    Others are copies of the base, as PEFT saves the tables of a model with more tokens.
    """
    if config.is_saved(name) or (name.endswith(".bias") and config.spec.bias != "none"):
        return True
    tables = [other for other in whole if other.rpartition(".")[0].rpartition(".")[2] in TABLES]
    is_tied = config.data.get("ensure_weight_tying") and name == f"{HEAD}.weight"
    return bool(is_tied) and any(config.is_saved(x) and np.array_equal(whole[x], whole[name]) for x in tables)


def _echoes(
    file: TensorFile,
    saved: Mapping[str, np.ndarray],
    originals: Mapping[str, np.ndarray],
    full: Mapping[str, np.ndarray],
    config: Config,
) -> dict[str, np.ndarray]:
    """What PEFT writes twice: modules that are saved once more, and the originals, which are copies of the base."""
    for name in sorted({*saved, *originals} - {*full}):
        raise ValueError(f"{file.path} has a second copy of {name}, but not {name} itself")
    if config.spec.bias == "all":  # then biases have such, which are no copies to be relied on
        saved, originals = ({n: x for n, x in found.items() if not n.endswith(".bias")} for found in (saved, originals))
    for name, array in saved.items():
        if not np.array_equal(array, full[name]):
            raise ValueError(f"{file.path} has two copies of {name} that differ")
    return dict(originals)


def _check_parts(file: TensorFile, name: str, given: Mapping[str, np.ndarray], config: Config, out: int) -> None:
    wanted = {"magnitude": config.spec.variant == "dora", "bias": config.spec.lora_bias}
    setting = {"magnitude": "use_dora", "bias": "lora_bias"}
    for role, is_wanted in wanted.items():
        if is_wanted != (role in given):
            there = "lacks" if is_wanted else "has"
            raise ValueError(f"{file.path}: {name} {there} a {role}, but {setting[role]} is {str(is_wanted).lower()}")
        if role in given and given[role].size != out:
            raise ValueError(f"{file.path}: the {role} of {name} is {given[role].shape}; expected are {out} elements")


def _check_left(file: TensorFile, names: set[str], roles: dict[str, Roles]) -> None:
    """Refuses what belongs to factors that are not there."""
    for name, keys in roles.items():
        lone = [key for role, key in keys.items() if role in ("magnitude", "bias")]
        if lone and name not in names:
            raise ValueError(f"{file.path} has {lone[0]!r}, but no factors of {name}")


def check_finite(where: object, adapter: Adapter) -> None:
    """Refuses an adapter with values that are no numbers."""
    for name, array in adapter.arrays():
        if not are_finite(array):
            raise ValueError(
                f"{where}: {name} has values that are NaN or infinite; the training has failed. "
                "allow_nonfinite takes them as they are"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."
