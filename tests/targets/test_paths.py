"""Names of leaves, and the patterns over them: globs, regular expressions, the nearest names."""

import contextlib
import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.targets import patterns
from jlora.targets.paths import flatten, module_of
from jlora.targets.patterns import MAX_PATTERN, is_of_modules, is_regex, matcher, nearest

QUERY = "encoder/layer_0/query/kernel"
PATHS = [QUERY, "encoder/layer_0/key/kernel", "encoder/layer_1/query/kernel", "decoder/mlp/up/kernel", "lm_head/kernel"]


@contextlib.contextmanager
def in_bounded_time():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 20


# -------------------------------------------------------------------------------- globs


@pytest.mark.parametrize("glob", ["kernel", "query/kernel", "layer_0/query/kernel", QUERY, "*/kernel", "ker*", "**"])
def test_a_glob_matches_the_end_of_a_leafs_path(glob):
    assert matcher(glob)(QUERY) == "leaf"


@pytest.mark.parametrize("glob", ["query", "layer_0/query", "encoder/layer_0/query", "que*", "encoder/*/query"])
def test_a_glob_matches_the_end_of_a_modules_path(glob):
    assert matcher(glob)(QUERY) == "module"


@pytest.mark.parametrize("glob", ["uery", "quer", "Query", "bias", "key/kernel", "x/" + QUERY])
def test_a_glob_matches_whole_names_to_the_end(glob):
    assert matcher(glob)(QUERY) is None


@pytest.mark.parametrize("pattern", ["encoder", "layer_0", "enc*", "encoder/*", "re:encoder/layer_[01]", "encoder/**"])
def test_a_module_is_all_that_is_within_it(pattern):
    assert matcher(pattern)(QUERY) in ("module", "leaf")


def test_a_star_stays_within_one_name():
    assert matcher("encoder/*/kernel")(QUERY) is None
    assert matcher("encoder/*/*/kernel")(QUERY) == "leaf"


def test_a_question_mark_is_one_character():
    assert matcher("layer_?/kernel")("layer_1/kernel") == "leaf"
    assert matcher("layer_?/kernel")("layer_10/kernel") is None


def test_brackets_are_a_set_of_characters():
    chosen = [matcher("layer_[02]")(f"layer_{i}/kernel") for i in range(3)]
    assert chosen == ["module", None, "module"]


def test_two_stars_span_any_number_of_names():
    assert [matcher("encoder/**/kernel")(path) for path in PATHS] == ["leaf", "leaf", "leaf", None, None]
    assert matcher("encoder/**/layer_0/**/kernel")(QUERY) == "leaf"


def test_a_dot_in_a_glob_is_a_dot():
    assert matcher("h.0/kernel")("h.0/kernel") == "leaf"
    assert matcher("h.0/kernel")("hx0/kernel") is None


def matches(names: list[str], wanted: list[str]) -> bool:
    """What a glob means, written as its definition."""
    if not wanted:
        return not names
    if wanted[0] == "**":
        return any(matches(names[i:], wanted[1:]) for i in range(len(names) + 1))
    star = wanted[0].replace("*", ".*").replace("?", ".")
    return bool(names) and re.fullmatch(star, names[0]) is not None and matches(names[1:], wanted[1:])


@settings(max_examples=5 * settings.default.max_examples)
@given(
    st.lists(st.sampled_from(["a", "b", "ab", "ba"]), min_size=1, max_size=6),
    st.lists(st.sampled_from(["a", "b", "a*", "*b", "?", "*", "**"]), min_size=1, max_size=5),
)
def test_globs_mean_what_their_definition_says(names, wanted):
    expected = "leaf" if matches(names, ["**", *wanted]) else None
    if expected is None and any(matches(names[:n], ["**", *wanted]) for n in range(1, len(names))):
        expected = "module"
    assert matcher("/".join(wanted))("/".join(names)) == expected


# -------------------------------------------------------------------------------- regular expressions


def test_a_regex_must_match_a_whole_path():
    assert matcher("re:.*/query/kernel")(QUERY) == "leaf"
    assert matcher("re:query/kernel")(QUERY) is None


def test_a_regex_may_match_a_whole_modules_path():
    assert matcher("re:encoder/layer_[0-9]/query")(QUERY) == "module"


@pytest.mark.parametrize("text", ["a|b", "(a)", "^a", "a$", "a.*", "a\\d", "a+", "[^a]", "re:a"])
def test_what_only_a_regex_has_makes_a_regex(text):
    assert is_regex(text)


@pytest.mark.parametrize("text", ["a", "h.0", "a*", "a?", "[ab]", "**/a", "layer_0/query-1"])
def test_what_a_glob_has_makes_a_glob(text):
    assert not is_regex(text)


def test_a_detected_regex_matches_as_one():
    assert [matcher(".*/(query|up)")(path) for path in PATHS] == ["module", None, "module", "module", None]


def test_a_compiled_regex_keeps_its_case():
    assert matcher(re.compile(".*/QUERY", re.IGNORECASE))(QUERY) == "module"
    assert matcher(re.compile(".*/QUERY"))(QUERY) is None


def test_a_compiled_regex_keeps_its_other_flags():
    assert matcher(re.compile(".* / query", re.VERBOSE))(QUERY) == "module"


@pytest.mark.parametrize("text", ["re:(", "a(", "re:[", "re:*a", "re:a{99999999999}"])
def test_an_invalid_regex_is_shown(text):
    with pytest.raises(ValueError, match="no valid regular expression") as error:
        matcher(text)
    assert repr(text.removeprefix("re:")) in str(error.value)


@pytest.mark.parametrize("pattern", ["", re.compile(""), "a" * (MAX_PATTERN + 1)])
def test_the_length_of_a_pattern_is_bounded(pattern):
    with pytest.raises(ValueError, match=f"between 1 and {MAX_PATTERN} characters"):
        matcher(pattern)


# -------------------------------------------------------------------------------- names of modules


def test_a_modules_pattern_matches_the_whole_dotted_name_of_a_leafs_module():
    assert matcher(r"module:.*layer_\d\.query")(QUERY) == "module"
    assert matcher("module:query")(QUERY) is None
    assert matcher("module:encoder.layer_0.query.kernel")(QUERY) is None


def test_a_modules_pattern_does_not_reach_into_modules_within():
    assert matcher(r"module:encoder\.layer_0")(QUERY) is None
    assert matcher(r"module:encoder\.layer_0")("encoder/layer_0/bias") == "module"


def test_a_leaf_outside_of_modules_has_no_modules_name():
    assert matcher("module:.*")("kernel") is None


def test_a_modules_pattern_is_a_regex_of_its_own_mark():
    assert is_regex("module:query") and is_of_modules("module:query")
    assert not is_of_modules("re:module:query") and not is_of_modules(re.compile("module:query"))


def test_an_invalid_modules_pattern_is_shown_without_its_mark():
    with pytest.raises(ValueError, match=re.escape("'(' is no valid regular expression")):
        matcher("module:(")


@pytest.fixture
def little_time(monkeypatch):
    """A tenth of the time that a pattern has."""
    monkeypatch.setattr(patterns, "MATCH_SECONDS", patterns.MATCH_SECONDS / 10)


def test_an_exponential_modules_pattern_is_given_up(little_time):
    with in_bounded_time(), pytest.raises(ValueError, match="simplify it"):
        matcher("module:(a|aa)+b")("a" * 200 + "/kernel")


def test_the_nearest_name_of_a_modules_pattern():
    assert module_of(QUERY) in nearest("module:qurey", PATHS)


# -------------------------------------------------------------------------------- hostile patterns


@pytest.mark.parametrize("glob", ["*a" * 60 + "b", "*" * 1900 + "b", "[a-z]*" * 300 + "!", "?*" * 500 + "b"])
def test_a_hostile_name_ends(glob):
    with in_bounded_time():
        assert matcher(glob)("a" * 3000) is None


@pytest.mark.parametrize("glob", ["**/a/" * 100 + "b", "**/" * 600 + "b", "**/*/" * 150 + "b"])
def test_a_hostile_chain_of_names_ends(glob):
    with in_bounded_time():
        assert matcher(glob)("/".join(["a"] * 400)) is None


@pytest.mark.parametrize("pattern", ["(a|aa)+b", re.compile("(a|aa)+b")])
def test_an_exponential_regex_is_given_up(pattern, little_time):
    with in_bounded_time(), pytest.raises(ValueError, match="simplify it or write a glob"):
        matcher(pattern)("a" * 200)


@pytest.mark.parametrize("text", ["re:(?:x{900}){100}", "a|" * 900 + "b"])
def test_a_large_regex_ends(text):
    with in_bounded_time():
        assert matcher(text)("c" * 200) is None


@pytest.mark.parametrize("text", ["re:(?:x{1000}){1000}", "re:(?:a{0,5000}){0,5000}b"])
def test_a_large_count_is_refused(text):
    with in_bounded_time(), pytest.raises(ValueError, match="counts multiply"):
        matcher(text)


def test_a_regex_too_deep_for_the_engine_is_an_error_of_the_pattern():
    with pytest.raises(ValueError, match="regular expression"):
        matcher("re:" + "(" * 900 + ")" * 900)


# -------------------------------------------------------------------------------- nearest names


@pytest.mark.parametrize("typo", ["qurey", "QUERY", "querry", "re:qurey"])
def test_the_nearest_name_of_a_typo(typo):
    assert module_of(QUERY) in nearest(typo, PATHS)


def test_a_pattern_of_two_names_is_compared_with_two_names():
    assert nearest("qurey/kernel", PATHS)[0].endswith("query/kernel")


def test_without_a_near_name_there_are_examples():
    assert nearest("zzzz", PATHS, count=2) == [QUERY, module_of(QUERY)]


def test_there_are_at_most_as_many_names_as_asked_for():
    assert len(nearest("kernel", PATHS, count=2)) <= 2


# -------------------------------------------------------------------------------- names of leaves


def test_paths_join_keys_indices_and_fields():
    assert flatten({"a": [1, (2, 3)], "b": {"c": 4}})[0] == ["a/0", "a/1/0", "a/1/1", "b/c"]


def test_paths_go_with_leaves_and_structure():
    tree = {"a": [1, 2], "b": None, "c": 3}
    paths, leaves, treedef = flatten(tree)
    assert dict(zip(paths, leaves, strict=True)) == {"a/0": 1, "a/1": 2, "c": 3}
    assert treedef.unflatten(leaves) == tree


def nnx_state() -> nnx.State:
    return nnx.split(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.LayerNorm(3, rngs=nnx.Rngs(0))))[1]


def test_the_value_of_an_nnx_variable_is_not_named():
    assert flatten(nnx_state())[0] == ["layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/scale"]


def test_an_nnx_state_and_its_pure_dict_have_the_same_paths():
    assert flatten(nnx_state())[0] == flatten(nnx.to_pure_dict(nnx_state()))[0]


def test_the_value_of_a_linen_box_is_not_named():
    init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    params = jax.eval_shape(lambda: nn.Dense(3, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 2))))
    assert isinstance(params["params"]["kernel"], nn.Partitioned)
    assert flatten(params)[0] == ["params/bias", "params/kernel"]


def test_a_module_called_value_keeps_its_name():
    assert flatten({"attention": {"value": {"kernel": 1}, "query": {"kernel": 2}}})[0] == [
        "attention/query/kernel",
        "attention/value/kernel",
    ]


def test_a_dict_key_called_value_keeps_its_name():
    assert flatten({"attention": {"query": 1, "value": 2}})[0] == ["attention/query", "attention/value"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: Any
    key: Any
    value: Any


def test_a_field_called_value_keeps_its_name():
    assert flatten({"attention": Attention(1, 2, 3)})[0] == ["attention/query", "attention/key", "attention/value"]


ATTENTION = ["layers/attn/q/kernel", "layers/attn/k/kernel", "layers/mlp/up/kernel"]


@pytest.mark.parametrize("wanted", ["q_proj", "attn/q_proj", "self_attn/q_proj", "q.proj", "module:.*q_proj"])
def test_the_nearest_name_by_the_last_one(wanted):
    """A name that is the beginning of another, as one library's is of another's."""
    assert nearest(wanted, ATTENTION)[0].startswith("layers/attn/q")


def test_the_nearest_name_of_a_longer_path():
    assert nearest("attention/up_proj/kernel", ATTENTION)[0] == "layers/mlp/up/kernel"
