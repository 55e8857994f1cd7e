"""The methods of PEFT that are variants here: their settings as those of a `jlora.LoraSpec`.

Names and defaults are those of PEFT 0.21, https://huggingface.co/docs/peft/package_reference/lora and the pages beside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jlora.spec import modules
from jlora.spec.reader import Settings
from jlora.variants import VARIANTS

INITS = ("gaussian", "orthogonal", "olora", "pissa")

_AFTER = "wrap with init_lora_weights=true, then call jlora.init.{} with the wrapped tree and batches of data"
LOFTQ = "wrap jlora.quant.quantize(params) without it, then call jlora.quant.loftq with the wrapped tree and params"
_OTHER = "{} is another method, which is not implemented; leave it out"
_DROPOUT = "there is no such dropout; set it to 0"
_START = "what starts here stands for the kernel itself; give true"
_RANDOM = "only the initialisation that PEFT takes by default is implemented; leave it out"
REFUSED = {
    "layer_replication": "a tree has the layers it has; repeat them in the tree before wrap",
    "megatron_config": "it is of Megatron's own layers; shard the parameters and leave it out",
    "loftq_config": LOFTQ,
    "eva_config": _AFTER.format("eva"),
    "lora_ga_config": _AFTER.format("lora_ga"),
    "corda_config": _AFTER.format("corda"),
    "velora_config": _OTHER.format("VeLoRA"),
    "monteclora_config": _OTHER.format("MonteCLoRA"),
    "arrow_config": _OTHER.format("Arrow"),
    "kasa_config": _OTHER.format("KaSA"),
    "use_bdlora": _OTHER.format("BD-LoRA"),
    "use_qalora": _OTHER.format("QA-LoRA"),
    "alora_invocation_tokens": "wrap without it; jlora.adapters.activated runs the tree, and peft.save writes it",
    "rank_dropout": _DROPOUT,
    "module_dropout": _DROPOUT,
    "boft_dropout": _DROPOUT,
    "proportional_parameters": "the number of coefficients is a kernel's own; give n_frequency_pattern",
    "hira_dropout": "the kernel is computed, so that there is no path to drop; set it to 0",
    "use_effective_conv2d": "a convolution's window is one of its in axes here; leave it out",
    "decompose_both": "the small factor stays whole; leave it out",
    "coft": "the rotation is not bounded; leave it out",
    "block_share": "each block has entries of its own; leave it out",
    "boft_block_num": "the size of a block is set, not their number; give boft_block_size",
}


def _lora(settings: Settings) -> dict[str, Any]:
    return {
        "rank": settings.get("r", 8),
        "alpha": settings.get("lora_alpha", 8),
        "dropout": settings.get("lora_dropout", 0.0),
        "scaling": "rslora" if settings.flag("use_rslora") else "alpha/r",
        "variant": "dora" if settings.flag("use_dora") else "lora",
        "init": _init(settings),
        "bias": _bias(settings),
        "lora_bias": settings.flag("lora_bias"),
        "overrides": _overrides(settings),
    }


def _adalora(settings: Settings) -> dict[str, Any]:
    settings.refuse_set({"rank_pattern": "it says what is left of a trained adapter; leave it out"})
    settings.refuse_set(dict.fromkeys(LORA_ONLY.split(), "PEFT's AdaLoRA does not use it; leave it out"))
    if settings.get("r", 8) != 8:
        settings.refuse("r", "AdaLoRA does not use it; its rank at the start is init_r")
    _default_init(settings, "init_lora_weights")
    alpha, dropout = settings.get("lora_alpha", 8), settings.get("lora_dropout", 0.0)
    rank = settings.get("init_r", 12)
    return {"variant": "adalora", "rank": rank, "alpha": alpha, "dropout": dropout, "bias": _bias(settings)}


def _loha(settings: Settings) -> dict[str, Any]:
    _default_init(settings, "init_weights")
    rank, alpha = settings.get("r", 8), settings.get("alpha", 8)
    return {"variant": "loha", "rank": rank, "alpha": alpha, "overrides": _overrides(settings)}


def _lokr(settings: Settings) -> dict[str, Any]:
    factor = settings.get("decompose_factor", -1)
    if type(factor) is not int or (factor < 1 and factor != -1):
        settings.refuse("decompose_factor", "it must be an integer of at least 1, or -1 for factors near the root")
    return _loha(settings) | {"variant": "lokr", "options": {"factor": factor}}


def _ia3(settings: Settings) -> dict[str, Any]:
    _default_init(settings, "init_ia3_weights")
    given = settings.get("feedforward_modules")
    if given is None:
        settings.refuse("feedforward_modules", "PEFT's tables by architecture are not here; name them, or give []")
    if isinstance(given, str):
        patterns = (modules.matching(given),)
    else:
        patterns = modules.ending(names := settings.listed("feedforward_modules"))
        _within_targets(settings, names)
    return {"variant": "ia3", "overrides": {pattern: {"options": {"on": "in"}} for pattern in patterns}}


def _within_targets(settings: Settings, names: tuple[str, ...]) -> None:
    is_list = not isinstance(settings.get("target_modules"), str)
    if is_list and (missing := sorted({*names} - {*settings.listed("target_modules")})):
        settings.refuse("feedforward_modules", f"target_modules must have them too, but lack {missing}")


def _oft(settings: Settings) -> dict[str, Any]:
    _default_init(settings, "init_weights")
    if settings.is_set("r"):
        settings.refuse("r", "the size of a block is set, not their number; give oft_block_size, and r=0")
    return {
        "variant": "oft",
        "bias": _bias(settings),
        "options": {"block_size": settings.number("oft_block_size", 32), **_series(settings)},
    }


def _series(settings: Settings) -> dict[str, Any]:
    """How OFT makes its rotations: by a series, unless that is switched off."""
    if settings.get("use_cayley_neumann", True) is not True:
        return {"cayley": "exact"}
    return {"cayley": "neumann", "terms": settings.number("num_cayley_neumann_terms", 5)}


def _boft(settings: Settings) -> dict[str, Any]:
    _default_init(settings, "init_weights")
    size, factors = settings.number("boft_block_size", 4), settings.number("boft_n_butterfly_factor", 1)
    options = {"block_size": size, "factors": factors, "butterfly": "halves", "gain": True}
    return {"variant": "boft", "bias": _bias(settings), "options": options}


def _vera(settings: Settings) -> dict[str, Any]:
    _default_init(settings, "init_weights")
    d_initial, seed = settings.number("d_initial", 0.1), settings.number("projection_prng_key", 0)
    return {
        "variant": "vera",
        "rank": settings.get("r", 256),
        "dropout": settings.get("vera_dropout", 0.0),
        "bias": _bias(settings),
        "options": {"d_initial": d_initial, "projection_seed": seed},
    }


def _ln_tuning(settings: Settings) -> dict[str, Any]:
    given = settings.get("target_modules")
    named = (modules.matching(given),) if isinstance(given, str) else modules.named(settings.listed("target_modules"))
    return {"targets": (), "exclude": (), "train": named + modules.within(settings.listed("modules_to_save"))}


def _miss(settings: Settings) -> dict[str, Any]:
    given = settings.get("init_weights", True)
    if given == "bat":
        settings.refuse("init_weights", "its update has no factors: each block of outputs turns the inputs on its own")
    if given != "mini":
        _default_init(settings, "init_weights")
    mini = settings.number("mini_r", 1) if given == "mini" else None
    return _of_form("miss")(settings) | {"options": {"mini": mini}}


def _of_form(variant: str, init: str = "init_weights") -> Callable[[Settings], dict[str, Any]]:
    """The conversion of a method whose settings `Form.settings` tells.

    Args:
      variant: its name here.
      init: PEFT's name of the setting of its start.
    """
    form: Any = VARIANTS[variant].FORM

    def convert(settings: Settings) -> dict[str, Any]:
        if variant != "miss" and settings.get(init, True) is not True:
            settings.refuse(init, _START)
        made: dict[str, Any] = {"variant": variant, "options": {}}
        for name, (what, default) in form.settings.items():
            value = _typed(settings, name, default)
            made |= {} if what.startswith("options.") else {what: value}
            made["options"] |= {what.removeprefix("options."): value} if what.startswith("options.") else {}
        bias = {"bias": _bias(settings)} if form.bias else {}
        return made | bias | _patterned(settings, form, made["options"])

    return convert


def _patterned(settings: Settings, form: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that patterns of modules' names have for themselves."""
    made: dict[str, Any] = {}
    for name, pattern in form.patterns.items():
        what, option = form.settings[name][0], form.settings[name][0].removeprefix("options.")
        of = lambda x, what=what, option=option: {what: x} if what == option else {"options": {**options, option: x}}
        found = modules.overrides(settings.keyed(pattern), {})
        made |= {key: of(value["rank"]) for key, value in found.items()}
    return {"overrides": made} if made else {}


def _pvera(settings: Settings) -> dict[str, Any]:
    settings.refuse_set({"sample_at_inference": "the means are taken; leave it out"})
    d_initial, seed = settings.number("d_initial", 0.1), settings.number("projection_prng_key", 0)
    return _of_form("pvera")(settings) | {"options": {"d_initial": d_initial, "projection_seed": seed}}


def _waveft(settings: Settings) -> dict[str, Any]:
    if settings.get("wavelet_family", "db1") not in ("db1", "haar"):
        settings.refuse("wavelet_family", "the one of two numbers is implemented; give 'db1'")
    return _of_form("waveft")(settings)


def _randlora(settings: Settings) -> dict[str, Any]:
    settings.refuse_set(dict.fromkeys(("sparse", "very_sparse"), "the bases are drawn uniformly; leave it out"))
    seed = settings.number("projection_prng_key", 0)
    return _of_form("randlora")(settings) | {"options": {"seed": seed}}


def _shira(settings: Settings) -> dict[str, Any]:
    if settings.get("mask_type", "random") != "random":
        settings.refuse("mask_type", "the places are drawn; give 'random'")
    seed = settings.get("random_seed")
    return _of_form("shira")(settings) | {"options": {"seed": seed}}


def _gralora(settings: Settings) -> dict[str, Any]:
    made = _of_form("gralora")(settings)
    return made | {"scaling": made.pop("alpha") / (made["rank"] + made["options"]["hybrid"])}


def _typed(settings: Settings, name: str, default: Any) -> Any:
    """A setting of the type of its default."""
    if isinstance(default, bool):
        return settings.flag(name) if settings.get(name) is not None else default
    return settings.number(name, default) if isinstance(default, (int, float)) else settings.get(name, default)


def _init(settings: Settings) -> str:
    given = settings.get("init_lora_weights", True)
    if given is True:
        return "kaiming"
    if isinstance(given, str) and (given in INITS or re.fullmatch(r"pissa_niter_\d+", given)):
        return given
    hints = {name: _AFTER.format(name) for name in ("eva", "corda", "lora_ga")} | {"loftq": LOFTQ}
    names = f"there is no such initialisation; give true, {', '.join(map(repr, INITS))} or 'pissa_niter_N'"
    settings.refuse("init_lora_weights", hints.get(given, names) if isinstance(given, str) else names)


def _default_init(settings: Settings, name: str) -> None:
    if settings.get(name, True) is not True:
        settings.refuse(name, _RANDOM)


def _bias(settings: Settings) -> Any:
    given = settings.get("bias", "none")
    return "lora_only" if isinstance(given, str) and given.endswith("_only") else given


def _overrides(settings: Settings) -> dict[str, dict[str, Any]]:
    patterns = [settings.keyed(name) for name in ("rank_pattern", "alpha_pattern")]
    for name, pattern in zip(("rank_pattern", "alpha_pattern"), patterns, strict=True):
        if pattern and settings.is_set("target_parameters"):
            settings.refuse(name, "beside target_parameters it does not tell which it means; give overrides of our own")
    return modules.overrides(*patterns)


class Method(NamedTuple):
    """A method of PEFT: how its settings are converted, and their names beside those that every method has."""

    convert: Callable[[Settings], dict[str, Any]]
    names: str


LAYERS = "layers_to_transform layers_pattern"
LORA_ONLY = "use_rslora use_dora lora_bias target_parameters rank_pattern alpha_pattern"
LORA = f"r lora_alpha lora_dropout bias init_lora_weights trainable_token_indices exclude_modules {LAYERS} {LORA_ONLY}"
SCHEDULE = "target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step"
LYCORIS = f"r alpha init_weights rank_pattern alpha_pattern exclude_modules {LAYERS}"
COMMON = f"init_weights bias exclude_modules {LAYERS}"
PVERA = "projection_prng_key save_projection sample_at_inference generator_seed"
BASES = "projection_prng_key save_projection sparse very_sparse"
SPECTRUM = "n_frequency scaling random_loc_seed n_frequency_pattern"
CAYLEY = "eps use_cayley_neumann num_cayley_neumann_terms"
METHODS = {
    "LORA": Method(_lora, LORA),
    "ADALORA": Method(_adalora, f"init_r {SCHEDULE} {LORA}"),
    "LOHA": Method(_loha, LYCORIS),
    "LOKR": Method(_lokr, f"decompose_factor rank_dropout_scale {LYCORIS}"),
    "IA3": Method(_ia3, "feedforward_modules init_ia3_weights exclude_modules"),
    "OFT": Method(_oft, f"r oft_block_size bias init_weights {CAYLEY} exclude_modules {LAYERS}"),
    "BOFT": Method(_boft, f"boft_block_size boft_n_butterfly_factor bias init_weights exclude_modules {LAYERS}"),
    "LN_TUNING": Method(_ln_tuning, ""),
    "VERA": Method(_vera, f"r d_initial projection_prng_key save_projection vera_dropout bias init_weights {LAYERS}"),
    "MISS": Method(_miss, f"r miss_dropout mini_r {COMMON}"),
    "HRA": Method(_of_form("hra"), f"r apply_GS {COMMON}"),
    "ROAD": Method(_of_form("road"), "variant group_size init_weights"),
    "C3A": Method(_of_form("c3a"), f"block_size block_size_pattern {COMMON}"),
    "GRALORA": Method(_gralora, f"r hybrid_r alpha gralora_dropout gralora_k {COMMON}"),
    "HIRA": Method(_of_form("hira"), f"r rank_pattern init_weights exclude_modules {LAYERS}"),
    "FOURIERFT": Method(_of_form("fourierft"), f"{SPECTRUM} {COMMON}"),
    "WAVEFT": Method(_waveft, f"wavelet_family use_idwt {SPECTRUM} {COMMON}"),
    "SHIRA": Method(_shira, "r mask_type random_seed init_weights"),
    "RANDLORA": Method(_randlora, f"r randlora_alpha randlora_dropout {BASES} {COMMON}"),
    "PVERA": Method(_pvera, f"r pvera_dropout d_initial {PVERA} {COMMON}"),
    "DELORA": Method(_of_form("delora"), f"r delora_lambda rank_pattern {COMMON}"),
}
