"""`LoraSpec`: its defaults, what it refuses, the scale, overrides, and the way through files."""

import dataclasses
import inspect
import json
import math
import re
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jlora import Axes, LoraSpec, wrap
from jlora.spec.validate import PEFT_NAMES
from jlora.targets.patterns import matcher

SPECS = {
    "default": LoraSpec(),
    "patterns": LoraSpec(targets=("query", "re:.*/(up|down)"), exclude="layer_0/*", train=("lm_head", "**/norm")),
    "numbers": LoraSpec(rank=4, alpha=0.5, dropout=0.1, scaling=2.0, seed=7),
    "names": LoraSpec(scaling="rslora", init="gaussian", bias="lora_only", dtype=jnp.bfloat16),
    "overrides": LoraSpec(overrides={"mlp/*": {"rank": 4, "alpha": 8}, "re:.*/query": {"scaling": "rslora"}}),
    "axes": LoraSpec(axes={"qkv": Axes((0,), (1, 2)), "experts/kernel": Axes((1,), (2,), (0,))}),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


# -------------------------------------------------------------------------------- defaults and scale


def test_defaults_are_those_of_the_documentation():
    assert LoraSpec().to_dict() == {
        "targets": "all-linear",
        "exclude": [],
        "rank": 8,
        "alpha": 16,
        "dropout": 0.0,
        "scaling": "alpha/r",
        "init": "kaiming",
        "variant": "lora",
        "options": {},
        "bias": "none",
        "lora_bias": False,
        "train": [],
        "train_tokens": {},
        "overrides": {},
        "axes": {},
        "seed": 0,
    }


def test_all_linear_may_stand_beside_patterns():
    assert LoraSpec(targets=["all-linear"]).targets == "all-linear"
    assert LoraSpec(targets=["all-linear", "lm_head"]).targets == ("all-linear", "lm_head")
    for targets in ("all_linear", ["q", "all_linear"]):
        with pytest.raises(ValueError, match='every linear layer is targets="all-linear"'):
            LoraSpec(targets=targets)


@pytest.mark.parametrize("name", ["linear", "all"])
def test_a_module_may_have_any_other_name(name):
    params = wrap({name: {"kernel": jnp.ones((4, 3))}, "head": {"kernel": jnp.ones((4, 3))}}, LoraSpec(name, rank=2))
    assert params[name]["kernel"].rank == 2 and params["head"]["kernel"].shape == (4, 3)
    assert not hasattr(params["head"]["kernel"], "rank")


@pytest.mark.parametrize(
    "settings, scale",
    [
        ({}, 2.0),
        ({"rank": 4, "alpha": 1}, 0.25),
        ({"scaling": "rslora"}, 16 / math.sqrt(8)),
        ({"scaling": 3}, 3.0),
        ({"scaling": 0.5, "rank": 2, "alpha": 99}, 0.5),
    ],
)
def test_scale(settings, scale):
    assert LoraSpec(**settings).scale == scale


def test_one_pattern_is_a_tuple_of_one():
    spec = LoraSpec(targets="query", exclude="mlp", train="head")
    assert (spec.targets, spec.exclude, spec.train) == (("query",), ("mlp",), ("head",))


def test_axes_take_single_numbers_and_lists():
    assert Axes(0, [1, 2]) == Axes((0,), (1, 2), ())


@pytest.mark.parametrize("axes", [Axes(0, 1), (0, 1), {"in_axis": [0], "out_axis": [1]}])
def test_a_specs_axes_may_be_written_in_three_ways(axes):
    assert LoraSpec(axes={"kernel": axes}).axes == {"kernel": Axes((0,), (1,))}


# -------------------------------------------------------------------------------- validation

NAN, INF = float("nan"), float("inf")
REFUSED = [
    *[("rank", rank) for rank in (0, -1, True, 2.0, "8", None)],
    *[("alpha", alpha) for alpha in (0, -1, NAN, INF, True, "16", None)],
    *[("dropout", rate) for rate in (1.0, 1, -0.1, NAN, "0.1", True)],
    *[("scaling", scaling) for scaling in ("alpha", "rs_lora", NAN, INF, None, True)],
    *[("init", init) for init in ("kaimin", "", None)],
    *[("variant", variant) for variant in ("lorra", "", None)],
    *[("bias", bias) for bias in ("lora", True, None)],
    *[("seed", seed) for seed in (1.5, True, None)],
    *[("dtype", dtype) for dtype in ("int32", jnp.uint8, bool)],
    *[("train", train) for train in ([3], ["head", None])],
    *[("exclude", exclude) for exclude in ([3], ["mlp", None])],
    ("targets", []),
    ("targets", ()),
]


@pytest.mark.parametrize("name, value", REFUSED)
def test_a_value_out_of_range_is_refused_by_the_name_of_its_field(name, value):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        LoraSpec(**{name: value})


@pytest.mark.parametrize("name, value", [("rank", 0), ("alpha", -1), ("dropout", 1.0), ("scaling", "rs"), ("bias", 3)])
def test_the_message_shows_what_was_found(name, value):
    with pytest.raises(ValueError, match=f"found {re.escape(repr(value))}"):
        LoraSpec(**{name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("init", ["kaiming"]),
        ("dtype", "flaot32"),
        ("dtype", 3),
        ("train", 3),
        ("exclude", None),
        ("overrides", {"mlp": 4}),
        ("axes", {"kernel": 3}),
        ("axes", {"kernel": {"in_axis": 0}}),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_the_name_of_its_field(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"LoraSpec.*\b{name}\b|^{name}\b"):
        LoraSpec(**{name: value})


@pytest.mark.parametrize("targets", [None, 3, b"query", ["query", 3], "", {"query": 1}, {}])
def test_targets_of_no_known_form_are_refused(targets):
    with pytest.raises((TypeError, ValueError), match="targets"):
        LoraSpec(targets=targets)


@pytest.mark.parametrize("setting", ["targets", "exclude", "train"])
def test_patterns_are_compiled_at_once(setting):
    with pytest.raises(ValueError, match=f"LoraSpec: {setting}: .* is no valid regular expression"):
        LoraSpec(**{setting: ["re:("]})


@pytest.mark.parametrize("setting", [{"overrides": {"re:(": {"rank": 2}}}, {"axes": {"re:(": Axes(0, 1)}}])
def test_patterns_of_mappings_are_compiled_at_once(setting):
    with pytest.raises(ValueError, match="no valid regular expression"):
        LoraSpec(**setting)


def test_an_unknown_override_names_the_nearest():
    with pytest.raises(ValueError, match=r"overrides\['mlp'\] has no setting 'rnak'; did you mean 'rank'\?"):
        LoraSpec(overrides={"mlp": {"rnak": 4}})


@pytest.mark.parametrize("name", ["targets", "bias", "seed", "overrides"])
def test_settings_of_the_whole_tree_are_no_overrides(name):
    with pytest.raises(ValueError, match=f"has no setting {name!r}"):
        LoraSpec(overrides={"mlp": {name: getattr(LoraSpec(), name)}})


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": NAN}, {"dropout": 1.0}, {"dtype": "int8"}])
def test_overrides_are_validated_at_once(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        LoraSpec(overrides={"mlp": settings})


def test_an_invalid_override_is_told_by_its_pattern():
    with pytest.raises(ValueError, match=r"overrides\['mlp'\]"):
        LoraSpec(overrides={"mlp": {"rank": 0}})


def test_unknown_axes_are_named():
    with pytest.raises(ValueError, match=r"axes\['kernel'\] has no setting 'in_axes'; did you mean 'in_axis'\?"):
        LoraSpec(axes={"kernel": {"in_axes": [0], "out_axis": [1]}})


def test_numbers_of_numpy_are_numbers():
    assert LoraSpec(alpha=np.float32(2), dropout=np.float64(0.5)) == LoraSpec(alpha=2.0, dropout=0.5)


# -------------------------------------------------------------------------------- overrides


def test_at_takes_the_first_override_that_matches():
    spec = LoraSpec(overrides={"layer_0/query": {"rank": 2}, "query": {"rank": 4, "alpha": 4}})
    assert [spec.at(f"layer_{i}/query/kernel").rank for i in range(2)] == [2, 4]
    assert [spec.at(f"layer_{i}/query/kernel").alpha for i in range(2)] == [16, 4]


@pytest.mark.parametrize("pattern", ["query", "layer_?/*/kernel", "re:layer_[0-9]/(query|key)"])
def test_at_takes_every_kind_of_pattern(pattern):
    spec = LoraSpec(overrides={pattern: {"rank": 4}})
    assert spec.at("layer_0/query/kernel").rank == 4
    assert spec.at("layers/mlp/kernel") is spec


def test_at_a_path_without_an_override_is_the_spec():
    spec = LoraSpec(overrides={"query": {"rank": 4}})
    assert spec.at("mlp/kernel") is spec


def test_at_keeps_every_other_setting():
    spec = LoraSpec(targets=["query"], dropout=0.1, bias="all", seed=3, overrides={"query": {"rank": 4}})
    assert spec.at("query/kernel") == dataclasses.replace(spec, rank=4, overrides={})


def test_an_override_of_the_rank_changes_the_scale():
    assert LoraSpec(alpha=16, overrides={"query": {"rank": 4}}).at("query/kernel").scale == 4


# -------------------------------------------------------------------------------- frozen, hashed


def test_a_spec_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoraSpec().rank = 4  # type: ignore[misc]


def test_a_spec_keeps_no_reference_to_what_it_was_given():
    settings = {"rank": 4}
    overrides, targets = {"mlp": settings}, ["query"]
    spec = LoraSpec(targets=targets, overrides=overrides)
    settings["rank"], overrides["query"] = 2, {"rank": 1}
    targets.append("value")
    assert spec == LoraSpec(targets=["query"], overrides={"mlp": {"rank": 4}})


@every_spec
def test_equal_specs_have_equal_hashes(spec):
    assert hash(dataclasses.replace(spec)) == hash(spec)


def test_specs_differ_by_each_setting():
    assert len({*SPECS.values()}) == len(SPECS)


def test_a_spec_is_a_static_argument_of_jit():
    jitted = jax.jit(wrap, static_argnums=1)
    assert jitted({"kernel": jnp.ones((4, 3))}, LoraSpec(rank=3))["kernel"].rank == 3
    assert jitted({"kernel": jnp.ones((4, 3))}, LoraSpec(rank=2))["kernel"].rank == 2


# -------------------------------------------------------------------------------- files


def as_toml(data: dict) -> str:
    return "\n".join(f"{json.dumps(key)} = {toml_value(value)}" for key, value in data.items())


def toml_value(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(inner)}" for key, inner in value.items()) + "}"
    return "[" + ", ".join(map(toml_value, value)) + "]" if isinstance(value, list) else json.dumps(value)


THROUGH = {
    "dict": lambda data: data,
    "json": lambda data: json.loads(json.dumps(data, allow_nan=False)),
    "yaml": lambda data: yaml.safe_load(yaml.safe_dump(data)),
    "toml": lambda data: tomllib.loads(as_toml(data)),
}


@every_spec
@pytest.mark.parametrize("through", THROUGH.values(), ids=THROUGH)
def test_a_spec_comes_back_from_a_file(spec, through):
    assert LoraSpec.from_dict(through(spec.to_dict())) == spec


def test_absent_settings_take_their_defaults():
    assert LoraSpec.from_dict({"rank": 4}) == LoraSpec(rank=4)


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(ValueError, match=r"LoraSpec has no setting 'tragets'; did you mean 'targets'\?"):
        LoraSpec.from_dict({"tragets": "query"})


def test_pefts_names_are_known():
    names = "r lora_alpha lora_dropout target_modules target_parameters exclude_modules modules_to_save rank_pattern"
    names += " layers_to_transform layers_pattern alpha_pattern trainable_token_indices init_lora_weights use_rslora"
    assert {*PEFT_NAMES} == {*names.split(), "use_dora"}


HINTS = {name: f"PEFT's {name} is {ours} here" for name, ours in PEFT_NAMES.items()} | {"rnk": "did you mean 'rank'"}


@pytest.mark.parametrize(("name", "hint"), HINTS.items())
def test_constructor_names_the_setting_that_was_meant(name, hint):
    with pytest.raises(TypeError, match=f"LoraSpec has no setting {name!r}; {hint}"):
        LoraSpec(**{name: 8})


def test_pefts_names_are_told_where_ours_are_known():
    with pytest.raises(ValueError, match=r"overrides\['mlp'\] has no setting 'r'; PEFT's r is rank here"):
        LoraSpec(overrides={"mlp": {"r": 4}})
    with pytest.raises(ValueError, match=r"overrides\['mlp'\] has no setting 'target_modules' \(it has rank"):
        LoraSpec(overrides={"mlp": {"target_modules": ["query"]}})


def test_constructor_shows_its_settings():
    assert list(inspect.signature(LoraSpec).parameters)[:3] == ["targets", "exclude", "rank"]


def test_a_compiled_regex_comes_back_as_its_text():
    data = LoraSpec(targets=re.compile(".*/(query|value)")).to_dict()
    assert data["targets"] == ["re:.*/(query|value)"]
    assert LoraSpec.from_dict(data).to_dict() == data


def test_a_compiled_regex_comes_back_with_its_flags():
    spec = LoraSpec(targets=re.compile("QUERY.*", re.IGNORECASE))
    (pattern,) = LoraSpec.from_dict(spec.to_dict()).targets
    assert matcher(pattern)("query/kernel") == "leaf"


def test_the_dtype_of_an_override_comes_back():
    spec = LoraSpec(overrides={"mlp": {"dtype": jnp.bfloat16}})
    assert LoraSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_an_override_back_to_the_default_dtype_comes_back():
    spec = LoraSpec(dtype="bfloat16", overrides={"mlp": {"dtype": None}})
    again = LoraSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again.at("mlp/kernel").dtype in (None, jnp.float32) and again.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "name, value", [("targets", lambda path, leaf: True), ("init", lambda *_: None), ("targets", [True, False])]
)
def test_what_no_file_holds_is_refused(name, value):
    with pytest.raises(TypeError, match=f"to_dict: {name} is"):
        LoraSpec(**{name: value}).to_dict()


def test_settings_take_their_forms():
    """Sequences become tuples, single patterns one of them; NumPy's numbers Python's."""
    spec = LoraSpec(targets="query", exclude="a", train=["b"], layers=range(2), train_tokens={"embed": [1, 2]})
    assert (spec.targets, spec.exclude, spec.train, spec.layers) == (("query",), ("a",), ("b",), (0, 1))
    assert spec.train_tokens == {"embed": (1, 2)}
    assert type(LoraSpec(rank=np.int64(4)).rank) is int
    assert LoraSpec(axes={"w": [0, [1, 2]]}).axes == {"w": Axes((0,), (1, 2))}
