"""`LoraSpec.from_peft` and those beside it: other tools' settings, and PEFT's rules of matching."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora import LoraSpec
from jlora.nodes.node import is_node
from jlora.targets.paths import flatten
from jlora.targets.patterns import MAX_PATTERN, matcher
from jlora.targets.select import select

NAMES = [
    *(f"model.layers.{i}.{name}" for i in (0, 1, 10) for name in ("attn.q_proj", "attn.v_proj", "mlp.up_proj")),
    "model.layers.0.attn.xq_proj",
    "model.embed_tokens",
    "model.attn_norm",
    "q_proj",
    "lm_head",
]
KERNEL = jax.ShapeDtypeStruct((4, 4), jnp.float32)
PEFT = {"target_modules": ["q_proj"]}
AXOLOTL = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_modules": ["q_proj"]}
random_settings = settings(max_examples=5 * settings.default.max_examples)  # they compile nothing


def tree_of(names, leaf=KERNEL):
    tree = {}
    for name in names:
        module = tree
        for part in name.split("."):
            module = module.setdefault(part, {})
        module["kernel"] = leaf
    return tree


def modules(paths):
    return {path.removesuffix("/kernel").replace("/", ".") for path in paths}


def selected(spec, names=NAMES):
    tree = tree_of(names)
    paths, leaves, _ = flatten(tree)
    return select(tree, dict(zip(paths, leaves, strict=True)), spec, None)


def targets(config):
    return modules(selected(LoraSpec.from_peft(config)).targets)


def wrapped(spec, tree):
    """The nodes of a wrapped tree, by path."""
    paths, leaves, _ = flatten(jlora.wrap(tree, spec), lambda x: isinstance(x, jlora.AdaptedParam))
    return {path: leaf for path, leaf in zip(paths, leaves, strict=True) if isinstance(leaf, jlora.AdaptedParam)}


# -------------------------------------------------------------------------------- PEFT's rule for names


def is_named(given, name):
    """PEFT's rule: a string is a regular expression for the whole name, a list has names and ends of names."""
    if isinstance(given, str):
        return re.fullmatch(given, name) is not None
    return name in given or any(name.endswith("." + end) for end in given)


entries = st.sampled_from(["q_proj", "attn.q_proj", "proj", "0.mlp.up_proj", "model.layers.1.attn.v_proj", "lm_head",
                           "v.proj", "(q|v)_proj", "nowhere", "attn", "layers.0.attn"])  # fmt: skip
texts = st.sampled_from([r".*\.(q|v)_proj", "q_proj", r".*layers\.1?0\..*", r"model\.(?!layers\.0).*",
                         "lm_head|q_proj"])  # fmt: skip
givens = st.one_of(st.lists(entries, min_size=1, max_size=4), texts)


@random_settings
@given(givens, st.one_of(st.just([]), givens))
def test_targets_and_exclusions_are_those_of_pefts_rule(target, exclude):
    config = {"target_modules": target, "exclude_modules": exclude}
    excluded = {name for name in NAMES if is_named(exclude, name)}
    expected = {name for name in NAMES if is_named(target, name)} - excluded
    if expected and (excluded or not exclude):
        assert targets(config) == expected
    else:
        with pytest.raises(ValueError, match=r"matches no leaf|no leaf is a kernel of"):
            targets(config)


def test_names_in_a_list_are_no_regular_expressions():
    assert targets({"target_modules": ["q.proj", "v_proj"]}) == {name for name in NAMES if name.endswith("v_proj")}


def test_a_long_list_makes_patterns_of_bounded_length():
    names = [f"model.layers.{i}.self_attention.query_projection" for i in range(200)]
    spec = LoraSpec.from_peft({"target_modules": names})
    assert len(spec.targets) > 1 and max(map(len, spec.targets)) <= MAX_PATTERN
    assert modules(selected(spec, [*names, "other"]).targets) == {*names}


@pytest.mark.parametrize("text", ["all-linear", "ALL-LINEAR"])
def test_all_linear_leaves_the_output_layer_out(text):
    assert LoraSpec.from_peft({"target_modules": text}).targets == "all-linear"
    assert targets({"target_modules": text}) == {*NAMES} - {"lm_head"}


def test_a_set_of_names_is_a_list():
    assert LoraSpec.from_peft({"target_modules": {"b", "a"}}) == LoraSpec.from_peft({"target_modules": ["a", "b"]})


def test_a_parameter_without_a_module_is_a_target():
    tree = {"mlp": {"experts": {"gate_up_proj": KERNEL, "xgate_up_proj": KERNEL}}, "q_proj": {"kernel": KERNEL}}
    spec = LoraSpec.from_peft(PEFT | {"target_parameters": ["experts.gate_up_proj"], "r": 2})
    assert {*wrapped(spec, tree)} == {"mlp/experts/gate_up_proj", "q_proj/kernel"}
    spec = LoraSpec.from_peft({"target_parameters": ["gate_up_proj", "nowhere"], "r": 2})
    assert {*wrapped(spec, tree)} == {"mlp/experts/gate_up_proj"}


# -------------------------------------------------------------------------------- ranks and alphas by name


def first(pattern, name, default):
    """PEFT's rule: the first key that matches an end of the name."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


keys = st.sampled_from(["q_proj", "v_proj", "attn.q_proj", "0.attn.q_proj", "model.layers.0.attn.q_proj", "a.tn.q_proj",
                        "layers.1.mlp.up_proj", ".*up_proj", "[qv]_proj", "^model.layers.1.mlp.up_proj", "none",
                        r"attn\.q_proj", r"^model\.attn_norm", r"0\.attn.q_proj",
                        "attn.(q|v)_proj", "v_proj|up_proj", r"layers\.\d\..*", "proj", ".q_proj", "at+n"])  # fmt: skip
patterns = st.dictionaries(keys, st.integers(1, 50), max_size=5)


@random_settings
@given(patterns, patterns)
def test_ranks_and_alphas_are_those_of_pefts_rule(ranks, alphas):
    config = {"target_modules": ".*_proj", "rank_pattern": ranks, "alpha_pattern": alphas, "r": 99, "lora_alpha": 77}
    spec = LoraSpec.from_peft(config)
    for name in NAMES:
        at = spec.at(name.replace(".", "/") + "/kernel")
        assert (at.rank, at.alpha) == (first(ranks, name, 99), first(alphas, name, 77))
    selected(spec)


def test_equal_keys_make_one_override_each():
    names = {f"model.layers.{i}.attn.q_proj": i + 1 for i in range(200)}
    assert len(LoraSpec.from_peft(PEFT | {"rank_pattern": names, "alpha_pattern": names}).overrides) == 200


def test_the_patterns_of_ranks_survive_a_file():
    spec = LoraSpec.from_peft(PEFT | {"rank_pattern": {"0.attn.q_proj": 4}, "alpha_pattern": {".*q_proj": 2}})
    assert LoraSpec.from_dict(spec.to_dict()) == spec


# -------------------------------------------------------------------------------- PEFT's other settings


def test_defaults_are_pefts():
    assert LoraSpec.from_peft(PEFT) == LoraSpec(targets=(r"module:(?:.*\.)?(?:q_proj)",), rank=8, alpha=8)


def test_an_adapter_config_as_peft_writes_it():
    config = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "base_model_name_or_path": "meta-llama/Llama-3.2-1B", "bias": "none", "corda_config": None,
        "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
        "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 32, "lora_bias": False, "lora_dropout": 0.05,
        "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": ["lm_head"],
        "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4, "rank_pattern": {"v_proj": 2},
        "revision": None, "target_modules": ["q_proj", "v_proj"], "target_parameters": None, "task_type": "CAUSAL_LM",
        "trainable_token_indices": [0, 3], "use_dora": True, "use_qalora": False, "use_rslora": True,
        "a_setting_of_a_newer_version": None,
    }  # fmt: skip
    spec = LoraSpec.from_peft(config)
    assert (spec.rank, spec.alpha, spec.dropout, spec.scaling, spec.variant) == (4, 32, 0.05, "rslora", "dora")
    chosen = selected(spec)
    assert modules(chosen.targets) == {name for name in NAMES if is_named(["q_proj", "v_proj"], name)}
    assert (modules(chosen.full), modules(chosen.tokens)) == ({"lm_head"}, {"model.embed_tokens"})
    assert [*chosen.tokens.values()] == [(0, 3)]


def test_a_spec_from_peft_wraps_a_tree():
    tree = tree_of(NAMES, jnp.ones((4, 4)))
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 10],
              "layers_pattern": "layers", "modules_to_save": ["lm_head"], "trainable_token_indices": [1],
              "rank_pattern": {"10.attn.v_proj": 2, "not_there": 1}, "alpha_pattern": {"v_proj": 8}}  # fmt: skip
    nodes = wrapped(LoraSpec.from_peft(config), tree)
    loras = {path: node for path, node in nodes.items() if isinstance(node, jlora.LoraParam)}
    found = {name: (loras[f"{name.replace('.', '/')}/kernel"].lora_a.shape[-1], node.scale)
             for name, node in zip(sorted(modules(loras)), [loras[p] for p in sorted(loras)], strict=True)}  # fmt: skip
    assert found == {
        "model.layers.0.attn.q_proj": (3, 2.0),
        "model.layers.0.attn.v_proj": (3, 8 / 3),
        "model.layers.10.attn.q_proj": (3, 2.0),
        "model.layers.10.attn.v_proj": (2, 4.0),
    }
    assert isinstance(nodes["lm_head/kernel"], jlora.TrainableParam)
    assert nodes["model/embed_tokens/kernel"].tokens == (1,)


@pytest.mark.parametrize("layers, expected", [(1, (1,)), (0, (0,)), ([0, 10], (0, 10)), ([], None), (None, None)])
def test_layers(layers, expected):
    assert LoraSpec.from_peft(PEFT | {"layers_to_transform": layers}).layers == expected


@pytest.mark.parametrize("name", ["h", ["h"], ("h",)])
def test_the_name_of_the_list_of_layers(name):
    assert LoraSpec.from_peft(PEFT | {"layers_to_transform": [0], "layers_pattern": name}).layers_name == "h"


LISTS = [("encoder.layer", "encoder.layer"), (["h", "encoder.layer"], ("h", "encoder.layer"))]


@pytest.mark.parametrize("given, expected", LISTS)
def test_lists_of_layers_by_what_is_before_them_and_several(given, expected):
    spec = LoraSpec.from_peft(PEFT | {"layers_to_transform": [1], "layers_pattern": given})
    assert spec.layers_name == expected and LoraSpec.from_dict(spec.to_dict()) == spec
    tree = {"encoder": {"layer": {str(i): {"q_proj": {"kernel": jnp.ones((32, 32))}} for i in range(3)}}}
    tree["decoder"] = {"layer": {str(i): {"q_proj": {"kernel": jnp.ones((32, 32))}} for i in range(3)}}
    wrapped = jlora.wrap(tree, spec)
    nodes = [path for path, leaf in zip(*flatten(wrapped, is_node)[:2], strict=True) if is_node(leaf)]
    assert nodes == ["encoder/layer/1/q_proj/kernel"]


def test_modules_to_save_match_ends_of_names_and_all_within():
    """As in PEFT, where they are compared without a dot before them, and are no targets."""
    names = [*NAMES, "model.score.dense", "q_proj.score"]
    chosen = selected(LoraSpec.from_peft({"target_modules": ".*", "modules_to_save": ["norm", "score"]}), names)
    expected = {"model.attn_norm", "model.score.dense", "q_proj.score"}
    assert modules(chosen.full) == expected and modules(chosen.targets) == {*names} - expected


@pytest.mark.parametrize(
    "task, head", [("SEQ_CLS", "score"), ("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")]
)
def test_a_tasks_head_is_trained_as_peft_does(task, head):
    chosen = selected(LoraSpec.from_peft(PEFT | {"task_type": task}), [*NAMES, head])
    assert modules(chosen.full) == {head}


def test_tokens_of_a_named_table():
    spec = LoraSpec.from_peft(PEFT | {"trainable_token_indices": {"lm_head": [1], "embed_tokens": [0, 2]}})
    assert {**selected(spec).tokens} == {"lm_head/kernel": (1,), "model/embed_tokens/kernel": (0, 2)}


@pytest.mark.parametrize("name", ["embed", "embedding", "wte", "token_embedder", "word_embeddings", "shared"])
def test_the_table_of_tokens_is_found_by_its_usual_names(name):
    spec = LoraSpec.from_peft(PEFT | {"trainable_token_indices": [1]})
    tokens = selected(spec, [*(n for n in NAMES if "embed" not in n), f"model.{name}", "model.pos_embed"]).tokens
    assert modules(tokens) == {f"model.{name}"}


@pytest.mark.parametrize(
    "given, expected",
    [(True, "kaiming"), *((name, name) for name in ("gaussian", "orthogonal", "olora", "pissa", "pissa_niter_16"))],
)
def test_init(given, expected):
    assert LoraSpec.from_peft(PEFT | {"init_lora_weights": given}).init == expected


@pytest.mark.parametrize("bias, lora_bias", [("none", True), ("all", False), ("lora_only", False)])
def test_biases(bias, lora_bias):
    spec = LoraSpec.from_peft(PEFT | {"bias": bias, "lora_bias": lora_bias})
    assert (spec.bias, spec.lora_bias) == (bias, lora_bias)


def test_a_methods_own_biases_are_those_beside_its_kernels():
    assert LoraSpec.from_peft({"peft_type": "OFT", "bias": "oft_only"} | PEFT).bias == "lora_only"


# -------------------------------------------------------------------------------- PEFT's other methods


def test_ln_tuning_trains_modules_whole():
    spec = LoraSpec.from_peft({"peft_type": "LN_TUNING", "target_modules": ["norm"], "modules_to_save": ["head"]})
    assert spec.targets == () and len(spec.train) == 2
    assert LoraSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(ValueError, match="nothing would train"):
        LoraSpec(targets=())


SERIES = {"cayley": "neumann", "terms": 5}  # PEFT's default
METHODS = {
    "ADALORA": ({"init_r": 6, "target_r": 2, "total_step": 9, "r": 8}, {"variant": "adalora", "rank": 6, "alpha": 8}),
    "LOHA": ({"r": 3, "alpha": 5}, {"variant": "loha", "rank": 3, "alpha": 5}),
    "LOKR": ({"decompose_factor": 2}, {"variant": "lokr", "rank": 8, "alpha": 8, "options": {"factor": 2}}),
    "OFT": ({"oft_block_size": 2, "use_cayley_neumann": True}, {"options": {"block_size": 2} | SERIES}),
    "BOFT": (
        {"boft_block_size": 2},
        {"variant": "boft", "options": {"block_size": 2, "factors": 1, "butterfly": "halves", "gain": True}},
    ),
    "VERA": ({"vera_dropout": 0.1, "d_initial": 0.2}, {"variant": "vera", "rank": 256, "dropout": 0.1,
             "options": {"d_initial": 0.2, "projection_seed": 0}}),
    "MISS": ({"r": 2, "miss_dropout": 0.1, "init_weights": "mini", "mini_r": 2},
             {"variant": "miss", "rank": 2, "dropout": 0.1, "options": {"mini": 2}}),
    "HRA": ({"r": 4}, {"variant": "hra", "rank": 4, "options": {"gram_schmidt": False}}),
    "C3A": ({"block_size": 2, "init_weights": True, "bias": "none"}, {"options": {"block_size": 2}}),
    "FOURIERFT": ({"n_frequency": 5, "n_frequency_pattern": {"q_proj": 3}},
                  {"options": {"frequencies": 5, "scaling": 150.0, "seed": 777}}),
    "WAVEFT": ({"n_frequency": 5, "use_idwt": False, "wavelet_family": "db1"},
               {"options": {"frequencies": 5, "scaling": 25.0, "seed": 777, "wavelet": False}}),
    "SHIRA": ({"r": 2, "random_seed": 3}, {"rank": 2, "options": {"seed": 3}}),
    "RANDLORA": ({"r": 2, "projection_prng_key": 3}, {"rank": 2, "alpha": 640, "options": {"seed": 3}}),
    "PVERA": ({"r": 2, "d_initial": 0.2}, {"rank": 2, "options": {"d_initial": 0.2, "projection_seed": 0}}),
    "GRALORA": ({"r": 2, "hybrid_r": 2, "alpha": 6},
                {"rank": 2, "scaling": 1.5, "options": {"k": 2, "hybrid": 2}}),
    "HIRA": ({"r": 2, "rank_pattern": {"q": 3}}, {"variant": "hira", "rank": 2}),
    "DELORA": ({"r": 2, "delora_lambda": 3}, {"rank": 2, "options": {"strength": 3}}),
    "ROAD": ({"variant": "road_4", "group_size": 2}, {"options": {"kind": "road_4", "group_size": 2}}),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_methods(method):
    config, expected = METHODS[method]
    spec = LoraSpec.from_peft({"peft_type": method} | PEFT | config)
    assert {name: getattr(spec, name) for name in expected} == expected
    nodes = wrapped(spec, tree_of(NAMES, jnp.ones((4, 4))))
    assert modules(nodes) == {name for name in NAMES if is_named(["q_proj"], name)}
    assert {type(node) for node in nodes.values()} == {spec.node}


@pytest.mark.parametrize(
    "method, expected",
    [("ADALORA", 12), ("LOHA", 8), ("VERA", 256), ("MISS", 64), ("HRA", 8), ("GRALORA", 32), ("HIRA", 32)],
)
def test_default_ranks_are_pefts(method, expected):
    assert LoraSpec.from_peft({"peft_type": method} | PEFT).rank == expected


@pytest.mark.parametrize("feedforward", [["up_proj"], r".*\.up_proj"])
def test_ia3_scales_the_inputs_of_feedforward_modules(feedforward):
    config = {"peft_type": "IA3", "target_modules": ["q_proj", "up_proj"], "feedforward_modules": feedforward}
    nodes = wrapped(LoraSpec.from_peft(config), tree_of(NAMES, jnp.ones((4, 4))))
    kinds = {name.split(".")[-1]: type(nodes[name.replace(".", "/") + "/kernel"]).__name__ for name in modules(nodes)}
    assert kinds == {"q_proj": "Ia3Param", "up_proj": "Ia3InParam"}


# -------------------------------------------------------------------------------- what PEFT's settings can't be

REFUSED = {
    "name tables": ({"target_modules": None}, "tables by architecture"),
    "no targets": ({"target_modules": []}, "tables by architecture"),
    "number as name": ({"target_modules": [1]}, "must be a list of names, found"),
    "text as list": ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names"),
    "unknown": ({"lora_alhpa": 1}, "knows no setting 'lora_alhpa' (found 1); did you mean 'lora_alpha'?"),
    "of another method": ({"init_r": 4}, "knows no setting 'init_r'"),
    "method": ({"peft_type": "XLORA"}, "LORA, ADALORA, LOHA, LOKR, IA3, OFT, BOFT, LN_TUNING, VERA"),
    "rank": ({"r": "16"}, "from_peft: rank must be an integer of at least 1, found '16'"),
    "alpha": ({"lora_alpha": 0}, "alpha must be a positive"),
    "dropout": ({"lora_dropout": 1.0}, "dropout must be a rate"),
    "bias": ({"bias": "some"}, "bias must be one of"),
    "flag": ({"use_dora": "yes"}, "use_dora must be true or false, found 'yes'"),
    "rank by name": ({"rank_pattern": {"q_proj": 0}}, "rank must be an integer of at least 1, found 0"),
    "random B": ({"init_lora_weights": False}, "no such initialisation"),
    "unknown init": ({"init_lora_weights": "pisa"}, "no such initialisation"),
    "eva": ({"init_lora_weights": "eva"}, "jlora.init.eva"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "jlora.init.lora_ga"),
    "corda": ({"init_lora_weights": "corda"}, "jlora.init.corda"),
    "loftq": ({"init_lora_weights": "loftq"}, "jlora.quant.loftq"),
    "loftq_config": ({"loftq_config": {"loftq_bits": 4}}, "jlora.quant.loftq"),
    "eva_config": ({"corda_config": {}, "eva_config": {"rho": 2.0}}, "jlora.init.eva"),
    "replication": ({"layer_replication": [[0, 4], [2, 6]]}, "repeat them in the tree"),
    "megatron": ({"megatron_config": {"a": 1}}, "can't be honoured: it is of Megatron's own layers"),
    "alora": ({"alora_invocation_tokens": [1]}, "jlora.adapters.activated runs the tree"),
    "qalora": ({"use_qalora": True}, "QA-LoRA is another method"),
    "bdlora": ({"use_bdlora": True}, "BD-LoRA is another method"),
    "corda's": ({"corda_config": {"a": 1}}, "jlora.init.corda"),
    "velora": ({"velora_config": {"a": 1}}, "VeLoRA is another method"),
    "monteclora": ({"monteclora_config": {"a": 1}}, "MonteCLoRA is another method"),
    "arrow": ({"arrow_config": {"a": 1}}, "Arrow is another method"),
    "kasa": ({"kasa_config": {"a": 1}}, "KaSA is another method"),
    "layers of text": ({"target_modules": "q_proj", "layers_to_transform": 0}, "a list of target_modules only"),
    "layers name of text": ({"target_modules": "q_proj", "layers_pattern": "h"}, "a list of target_modules only"),
    "layers alone": ({"layers_pattern": "h"}, "needs layers_to_transform"),
    "regex of layers": ({"layers_to_transform": [0], "layers_pattern": "h.*"}, "a plain name of a list of layers"),
    "layers": ({"layers_to_transform": "3"}, "layers must be a sequence"),
    "layers twice": ({"target_modules": ["0.q_proj"], "layers_to_transform": [1]}, "name layers too, ['0.q_proj']"),
    "parameters": ({"target_modules": "all-linear", "target_parameters": ["a"]}, "target_parameters=['a'] can't be"),
    "ranks of parameters": ({"target_parameters": ["a"], "rank_pattern": {"a": 1}}, "beside target_parameters"),
    "not a pattern": ({"rank_pattern": [1]}, "rank_pattern=[1] can't be honoured: it must map"),
    "no names": ({"rank_pattern": {1: 2}}, "rank_pattern={1: 2} can't be honoured: it must map"),
    "no tables": ({"trainable_token_indices": {1: [2]}}, "trainable_token_indices={1: [2]} can't be honoured"),
    "task": ({"task_type": ["SEQ_CLS"]}, "task_type=['SEQ_CLS'] can't be honoured"),
    "block": ({"peft_type": "OFT", "oft_block_size": [8]}, "from_peft: oft_block_size must be a number, found [8]"),
    "endless block": ({"peft_type": "BOFT", "boft_block_size": float("inf")}, "boft_block_size must be a number"),
    "start": ({"peft_type": "VERA", "d_initial": "x"}, "d_initial must be a number, found 'x'"),
    "not a regex": ({"target_modules": "q("}, "no valid regular expression"),
    "adalora r": ({"peft_type": "ADALORA", "r": 4}, "rank at the start is init_r"),
    "adalora dora": ({"peft_type": "ADALORA", "use_dora": True}, "AdaLoRA does not use it"),
    "adalora ranks": ({"peft_type": "ADALORA", "rank_pattern": {"a": [True]}}, "left of a trained adapter"),
    "loha dropout": ({"peft_type": "LOHA", "rank_dropout": 0.1}, "no such dropout"),
    "loha init": ({"peft_type": "LOHA", "init_weights": False}, "initialisation that PEFT takes by default"),
    "lokr factor": ({"peft_type": "LOKR", "decompose_factor": 0}, "at least 1, or -1"),
    "ia3": ({"peft_type": "IA3"}, "tables by architecture"),
    "ia3 subset": ({"peft_type": "IA3", "feedforward_modules": ["w0"]}, "target_modules must have them too"),
    "oft blocks": ({"peft_type": "OFT", "r": 4, "oft_block_size": 0}, "give oft_block_size"),
    "oft bound": ({"peft_type": "OFT", "coft": True}, "not bounded"),
    "miss bat": ({"peft_type": "MISS", "init_weights": "bat"}, "its update has no factors"),
    "hra flag": ({"peft_type": "HRA", "apply_GS": 1}, "apply_GS must be true or false"),
    "c3a start": ({"peft_type": "C3A", "init_weights": "xavier_uniform"}, "stands for the kernel itself; give true"),
    "hira dropout": ({"peft_type": "HIRA", "hira_dropout": 0.1}, "no path to drop"),
    "wavelet": ({"peft_type": "WAVEFT", "wavelet_family": "db2"}, "give 'db1'"),
    "coefficients": ({"peft_type": "WAVEFT", "proportional_parameters": True}, "give n_frequency_pattern"),
    "mask": ({"peft_type": "SHIRA", "mask_type": "mine"}, "give 'random'"),
    "sparse bases": ({"peft_type": "RANDLORA", "sparse": True}, "drawn uniformly"),
    "samples": ({"peft_type": "PVERA", "sample_at_inference": True}, "the means are taken"),
    "road bias": ({"peft_type": "ROAD", "bias": "all"}, "knows no setting 'bias'"),
    "boft blocks": ({"peft_type": "BOFT", "boft_block_num": 4}, "give boft_block_size"),
}  # fmt: skip


@pytest.mark.parametrize("config, message", REFUSED.values(), ids=REFUSED)
def test_what_cant_be_honoured_is_an_error(config, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        LoraSpec.from_peft(PEFT | config)
    assert "LoraSpec.from_peft" in str(error.value)


@pytest.mark.parametrize(
    "build", [LoraSpec.from_peft, LoraSpec.from_axolotl, LoraSpec.from_llamafactory, LoraSpec.from_fastchat]
)
@pytest.mark.parametrize("config", [None, 3, b"adapter_config.json", ["r"], {1: 2}])
def test_settings_are_a_mapping_from_names(build, config):
    with pytest.raises(ValueError, match="expected a mapping from settings to values"):
        build(config)


# -------------------------------------------------------------------------------- Axolotl


def test_an_axolotl_configuration():
    config = {
        "base_model": "NousResearch/Llama-3.2-1B", "load_in_8bit": False, "load_in_4bit": True, "val_set_size": 0.1,
        "datasets": [{"path": "a", "type": "alpaca"}], "adapter": "qlora", "lora_model_dir": None, "sequence_len": 2048,
        "sample_packing": True, "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "lora_mlp_kernel": True,
        "lora_target_modules": ["gate_proj", "q_proj"], "wandb_project": None, "optimizer": "adamw_bnb_8bit",
        "learning_rate": 2e-4, "bf16": "auto", "special_tokens": {"pad_token": "<|end_of_text|>"}, "lora_on_cpu": True,
        "loraplus_lr_ratio": 16, "lora_fan_in_fan_out": None, "lora_target_linear": False, "relora_steps": 10,
    }  # fmt: skip
    expected = LoraSpec(targets=(r"module:(?:.*\.)?(?:gate_proj|q_proj)",), rank=32, alpha=16, dropout=0.05)
    assert LoraSpec.from_axolotl(config) == expected


@pytest.mark.parametrize(
    "theirs, peft",
    [
        ({"lora_exclude_modules": ["k"]}, {"exclude_modules": ["k"]}),
        ({"lora_modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
        ({"lora_target_modules": ".*q"}, {"target_modules": ".*q"}),
        ({"lora_target_parameters": "experts.up"}, {"target_parameters": ["experts.up"]}),
        ({"lora_rank_pattern": {"a": 2}, "lora_alpha_pattern": {"b": 3}},
         {"rank_pattern": {"a": 2}, "alpha_pattern": {"b": 3}}),
        ({"peft_use_dora": True, "peft_use_rslora": True}, {"use_dora": True, "use_rslora": True}),
        ({"peft_init_lora_weights": "pissa"}, {"init_lora_weights": "pissa"}),
        ({"peft_trainable_token_indices": {"e": [1]}}, {"trainable_token_indices": {"e": [1]}}),
        ({"peft_layers_to_transform": [1, 2], "peft_layers_pattern": ["h"]},
         {"layers_to_transform": [1, 2], "layers_pattern": "h"}),
        ({"lora_dropout": None, "peft_ensure_weight_tying": True}, {}),
    ],
)  # fmt: skip
def test_axolotls_names_are_pefts_under_others(theirs, peft):
    same = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]}
    assert LoraSpec.from_axolotl(AXOLOTL | theirs) == LoraSpec.from_peft(same | peft)


def test_axolotls_linear_layers_may_be_of_some_layers():
    config = AXOLOTL | {"lora_target_modules": None, "lora_target_linear": True, "peft_layers_to_transform": [1]}
    spec = LoraSpec.from_axolotl(config)
    assert (spec.targets, spec.layers) == ("all-linear", (1,))


@pytest.mark.parametrize("more", ["lm_head", ["lm_head", "embed_tokens"], ["q_proj"]])
def test_axolotls_linear_layers_and_named_modules_are_their_union(more):
    """As 19 of its examples have them."""
    config = AXOLOTL | {"lora_target_modules": more, "lora_target_linear": True}
    named = LoraSpec.from_axolotl(AXOLOTL | {"lora_target_modules": more})
    spec = LoraSpec.from_axolotl(config)
    assert spec == dataclasses.replace(named, targets=("all-linear", *named.targets))
    tree = {name: {"weight": jnp.ones((8, 8))} for name in ("q_proj", "up_proj", "lm_head", "embed_tokens", "norm")}
    tree["norm"] = {"scale": jnp.ones(8)}
    axes = {"*": jlora.Axes((1,), (0,))}
    wrapped = jlora.wrap(tree, dataclasses.replace(spec, axes=axes, rank=2))
    adapted = {name for name in tree if isinstance(next(iter(wrapped[name].values())), jlora.LoraParam)}
    assert {*adapted} == {"q_proj", "up_proj", "embed_tokens", *([more] if isinstance(more, str) else more)}


def test_axolotls_false_is_its_default_init():
    assert LoraSpec.from_axolotl(AXOLOTL | {"peft_init_lora_weights": False}).init == "kaiming"


AXOLOTL_REFUSED = {
    "none": ({"adapter": None}, "it must be 'lora' or 'qlora'"),
    "plugin": ({"adapter": "llama-adapter"}, "adapter='llama-adapter' can't be honoured"),
    "rank": ({"lora_r": None}, "lora_r=None can't be honoured"),
    "alpha": ({"lora_alpha": None}, "lora_alpha=None can't be honoured"),
    "text": ({"lora_r": "16"}, "from_axolotl: rank must be an integer of at least 1, found '16'"),
    "no targets": ({"lora_target_modules": None}, "lora_target_modules=[] can't be honoured"),
    "layers": ({"lora_target_modules": "q", "peft_layers_to_transform": [1]}, "peft_layers_to_transform=[1] can't"),
    "replication": ({"peft_layer_replication": [[0, 4]]}, "peft_layer_replication=[[0, 4]] can't"),
    "saved": ({"lora_model_dir": "out"}, "LoraSpec.from_peft"),
    "relora": ({"relora": True}, "jlora.fold_and_restart"),
    "unfrozen": ({"unfrozen_parameters": ["a"]}, "lora_modules_to_save"),
    "loftq": ({"peft": {"loftq_config": {"loftq_bits": 4}}}, "jlora.quant.loftq"),
    "dtype": ({"peft_autocast_adapter_dtype": False}, "dtype"),
    "unknown": ({"lora_rnk_pattern": {"a": 1}}, "did you mean 'lora_rank_pattern'?"),
    "slip": ({"adaptor": "lora"}, "did you mean 'adapter'?"),
    "of peft": ({"peft_use_qalora": True}, "knows no setting 'peft_use_qalora'"),
}


@pytest.mark.parametrize("config, message", AXOLOTL_REFUSED.values(), ids=AXOLOTL_REFUSED)
def test_what_axolotls_settings_cant_be(config, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        LoraSpec.from_axolotl(AXOLOTL | config)
    assert "LoraSpec.from_axolotl" in str(error.value)


# -------------------------------------------------------------------------------- LLaMA-Factory


def test_a_llamafactory_configuration():
    config = {
        "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "trust_remote_code": True, "stage": "sft",
        "do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all", "dataset": "identity",
        "template": "llama3", "cutoff_len": 2048, "overwrite_cache": True, "output_dir": "saves", "plot_loss": True,
        "per_device_train_batch_size": 1, "learning_rate": 1e-4, "num_train_epochs": 3.0, "bf16": True,
        "use_unsloth": False, "use_swanlab": True, "galore_target": "all", "galore_rank": 16, "loraplus_lr_ratio": 16.0,
        "quantization_bit": 4, "freeze_trainable_layers": 2, "create_new_adapter": True, "pissa_convert": True,
    }  # fmt: skip
    spec = LoraSpec.from_llamafactory(config)
    assert dataclasses.replace(spec, exclude=()) == LoraSpec(targets="all-linear", rank=8, alpha=16)


def test_llamafactorys_defaults():
    spec = LoraSpec.from_llamafactory({"finetuning_type": "lora"})
    assert dataclasses.replace(spec, exclude=()) == LoraSpec(targets="all-linear", rank=8, alpha=16)
    assert LoraSpec.from_llamafactory({"lora_rank": 5}).alpha == 10
    assert LoraSpec.from_llamafactory({"lora_rank": 5, "lora_alpha": 3}).alpha == 3


def without_towers(spec):
    """A spec without the last of what it excludes."""
    assert spec.exclude[-1].startswith("module?:")
    return dataclasses.replace(spec, exclude=spec.exclude[:-1])


VISION_LANGUAGE = [
    "model.visual.patch_embed.proj", "model.visual.blocks.0.attn.qkv", "model.visual.blocks.0.mlp.linear_fc1",
    "model.visual.merger.linear_fc1", "model.visual.deepstack_merger_list.0.linear_fc1",
    "model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.0.mlp.up_proj",
    "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", "model.multi_modal_projector.linear_1",
    "model.audio_tower.layers.0.self_attn.q_proj", "vpm.encoder.layers.0.self_attn.q_proj", "resampler.kv_proj",
    "lm_head",
]  # fmt: skip
TEXT = {"model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.0.mlp.up_proj"}
PROJECTORS = {"model.visual.merger.linear_fc1", "model.multi_modal_projector.linear_1", "resampler.kv_proj"}
TOWERS = {*VISION_LANGUAGE} - TEXT - PROJECTORS - {"lm_head", "model.visual.patch_embed.proj"}
FREEZE = {name: f"freeze_{name}" for name in ("vision_tower", "multi_modal_projector", "language_model")}


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"lora_target": "all"}, TEXT),
        ({"lora_target": "all", FREEZE["vision_tower"]: True, FREEZE["multi_modal_projector"]: True}, TEXT),
        ({"lora_target": "all", FREEZE["vision_tower"]: False}, TEXT | TOWERS),
        ({"lora_target": "all", FREEZE["multi_modal_projector"]: False}, TEXT),  # "all" never names the projector
        ({"lora_target": "all", FREEZE["vision_tower"]: False, FREEZE["language_model"]: True}, TOWERS),
        ({"lora_target": "q_proj"}, {name for name in TEXT if name.endswith("q_proj")}),
        ({"lora_target": "q_proj", FREEZE["vision_tower"]: False},
         {name for name in TEXT | TOWERS if name.endswith("q_proj")}),
        ({"lora_target": "q_proj,linear_fc1,kv_proj,linear_1", FREEZE["multi_modal_projector"]: False},
         {"model.language_model.layers.0.self_attn.q_proj"} | PROJECTORS),
        ({"finetuning_type": "oft", "oft_target": "all"}, TEXT),
    ],
)  # fmt: skip
def test_llamafactory_freezes_what_is_not_the_language_model(settings, expected):
    assert modules(selected(LoraSpec.from_llamafactory(settings), VISION_LANGUAGE).targets) == expected


def test_what_is_frozen_need_not_be_there():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    for frozen in ({}, {FREEZE["language_model"]: True}):
        spec = LoraSpec.from_llamafactory({"lora_target": "all"} | frozen)
        assert modules(selected(spec, names).targets) == {*names}
        assert LoraSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize("is_frozen, expected", [(True, TEXT), (False, {*VISION_LANGUAGE} - {"lm_head"}), (None, None)])
def test_axolotl_freezes_what_is_not_the_language_model(is_frozen, expected):
    names = [name for name in VISION_LANGUAGE if not name.startswith(("vpm", "resampler"))]
    expected = {*VISION_LANGUAGE} - {"lm_head"} if expected is None else expected
    settings = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
    spec = LoraSpec.from_axolotl(settings | {"freeze_mm_modules": is_frozen})
    assert modules(selected(spec, names).targets) == expected & {*names}
    named = settings | {"lora_target_linear": False, "lora_target_modules": ["q_proj"], "freeze_mm_modules": is_frozen}
    wanted = {name for name in expected & {*names} if name.endswith("q_proj")}
    assert modules(selected(LoraSpec.from_axolotl(named), names).targets) == wanted


def test_llamafactorys_names_stand_between_commas():
    config = {"lora_target": "q_proj, v_proj", "additional_target": "embed_tokens,lm_head", "use_dora": True}
    peft = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True}
    expected = LoraSpec.from_peft(peft | {"lora_alpha": 16})
    assert without_towers(LoraSpec.from_llamafactory(config)) == expected


@pytest.mark.parametrize(
    "rounds, init", [({}, "pissa_niter_16"), ({"pissa_iter": 4}, "pissa_niter_4"), ({"pissa_iter": -1}, "pissa")]
)
def test_llamafactorys_pissa(rounds, init):
    assert LoraSpec.from_llamafactory({"pissa_init": True} | rounds).init == init
    assert LoraSpec.from_llamafactory({"finetuning_type": "lora"} | rounds).init == "kaiming"


def test_llamafactorys_oft():
    config = {"finetuning_type": "oft", "oft_block_size": 8, "oft_target": "q_proj", "additional_target": "lm_head"}
    peft = {"peft_type": "OFT", "oft_block_size": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    assert without_towers(LoraSpec.from_llamafactory(config)) == LoraSpec.from_peft(peft)
    plain = LoraSpec.from_llamafactory({"finetuning_type": "oft"})
    assert (plain.targets, plain.options) == ("all-linear", {"block_size": 32} | SERIES)


FACTORY_REFUSED = {
    "full": ({"finetuning_type": "full"}, "it trains no adapter"),
    "freeze": ({"finetuning_type": "freeze"}, "it trains no adapter"),
    "rank": ({"lora_rank": "16"}, "from_llamafactory: rank must be an integer of at least 1, found '16'"),
    "ranks": ({"lora_rank": {"a": 1}}, "from_llamafactory: rank must be an integer of at least 1, found {'a': 1}"),
    "resume": ({"adapter_name_or_path": "saves"}, "LoraSpec.from_peft"),
    "blocks": ({"use_llama_pro": True}, "use_llama_pro=True can't"),
    "galore": ({"use_galore": True}, "without LoRA only"),
    "tower": ({"lora_rank": 8, "freeze_vision_tower": "yes"}, "freeze_vision_tower must be true or false"),
    "vocabulary": ({"resize_vocab": True}, "additional_target"),
    "iterations": ({"pissa_init": True, "pissa_iter": "16"}, "pissa_iter='16' can't"),
    "dora of oft": ({"finetuning_type": "oft", "use_dora": True}, "finetuning_type='lora' only"),
    "dropout of oft": ({"finetuning_type": "oft", "module_dropout": 0.1}, "module_dropout=0.1 can't"),
    "rank of oft": ({"finetuning_type": "oft", "oft_rank": 4}, "oft_rank=4 can't"),
    "unknown": ({"lora_ranks": 8}, "did you mean 'lora_rank'?"),
    "slip": ({"use_rs_lora": True}, "did you mean 'use_rslora'?"),
}  # fmt: skip


@pytest.mark.parametrize("config, message", FACTORY_REFUSED.values(), ids=FACTORY_REFUSED)
def test_what_llamafactorys_settings_cant_be(config, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        LoraSpec.from_llamafactory(config)
    assert "LoraSpec.from_llamafactory" in str(error.value)


V1 = {"model": "Qwen/Qwen3-4B", "template": "qwen3_nothink", "learning_rate": 1e-4, "bf16": True}


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}),
        ({"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all", "export_dir": "out"},
         {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}),
        ({"target_modules": "q_proj", "use_dora": True, "modules_to_save": ["lm_head"]},
         {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj"], "use_dora": True,
          "modules_to_save": ["lm_head"]}),
    ],
    ids=["defaults", "all", "some"],
)  # fmt: skip
def test_llamafactorys_v1(settings, expected):
    config = V1 | {"peft_config": {"name": "lora"} | settings}
    assert LoraSpec.from_llamafactory(config) == LoraSpec.from_peft(expected)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"name": "freeze", "freeze_trainable_layers": 2}, "peft_config.name='freeze' can't be honoured"),
        ({"r": 16}, "peft_config.name=None can't be honoured"),
        ({"name": "lora", "rank": 16}, "knows no setting 'rank'"),
        ({"name": "lora", "adapter_name_or_path": "saves"}, "LoraSpec.from_peft"),
        ("lora", "peft_config must be a mapping"),
    ],
)
def test_what_llamafactorys_v1_cant_be(settings, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        LoraSpec.from_llamafactory(V1 | {"peft_config": settings})


def test_settings_that_are_not_known_and_switch_nothing_on_are_no_matter():
    """As PEFT 0.2 wrote them, and as later versions will."""
    old = {
        "merge_weights": False,
        "enable_lora": None,
        "fan_in_fan_out": False,
        "some_config": {},
        "some_list": [],
        "some_dropout": 0.0,
        "some_name": "",
    }
    assert LoraSpec.from_peft(PEFT | old) == LoraSpec.from_peft(PEFT)
    for value in (True, 1, "x", [1]):
        with pytest.raises(ValueError, match="knows no setting 'merge_weights'"):
            LoraSpec.from_peft(PEFT | {"merge_weights": value})


def test_a_run_without_an_adapter_is_no_adapter_of_defaults():
    for config in ({}, V1, {"stage": "sft", "do_train": True, "model_name_or_path": "m", "learning_rate": 1e-5}):
        with pytest.raises(ValueError, match="from_llamafactory: there is nothing of an adapter in it"):
            LoraSpec.from_llamafactory(config)
    with pytest.raises(ValueError, match="from_axolotl: adapter=None can't be honoured"):
        LoraSpec.from_axolotl({"base_model": "m", "learning_rate": 1e-5})


OTHERS = {
    "from_peft": {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]},
    "from_axolotl": {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True},
    "from_llamafactory": {"finetuning_type": "lora", "lora_rank": 16, "lora_target": "all"},
    "from_fastchat": {"lora_r": 16, "lora_alpha": 32, "lora_target_modules": ["q_proj"], "q_lora": False},
}


@pytest.mark.parametrize("build", OTHERS)
@pytest.mark.parametrize("theirs", [*OTHERS, "v1"])
def test_a_configuration_is_read_by_its_own_function(build, theirs):
    config = OTHERS.get(theirs, V1 | {"peft_config": {"name": "lora", "r": 16}})
    reader = "from_llamafactory" if theirs == "v1" else theirs
    if build == reader:
        assert getattr(LoraSpec, build)(config).rank == 16
        return
    with pytest.raises(ValueError, match=rf"LoraSpec.{build}: this is .*; LoraSpec.{reader} reads it"):
        getattr(LoraSpec, build)(config)


def test_names_that_two_tools_share_are_read_by_either_and_by_no_third():
    shared = {"lora_r": 16, "lora_alpha": 32, "lora_target_modules": ["q_proj"]}
    assert LoraSpec.from_fastchat(shared).rank == LoraSpec.from_axolotl(shared | {"adapter": "lora"}).rank == 16
    told = "Axolotl's or a configuration of FastChat's, since it has 'lora_r'; LoraSpec.from_axolotl or LoraSpec.from_f"
    for build in (LoraSpec.from_peft, LoraSpec.from_llamafactory):
        with pytest.raises(ValueError, match=told):
            build(shared)


@pytest.mark.parametrize("name", ["adapter", "base_model", "lora_target_linear"])
def test_a_name_of_axolotls_alone_makes_shared_ones_axolotls(name):
    with pytest.raises(ValueError, match=f"this is a configuration of Axolotl's, since it has {name!r}"):
        LoraSpec.from_fastchat({"lora_r": 16, "lora_alpha": 32, name: "lora"})


# -------------------------------------------------------------------------------- FastChat

RUN = {
    "model_name_or_path": "lmsys/vicuna-7b-v1.5", "trust_remote_code": False, "padding_side": "right",
    "data_path": "data.json", "eval_data_path": None, "lazy_preprocess": True, "cache_dir": None,
    "optim": "adamw_torch", "model_max_length": 2048, "flash_attn": True, "output_dir": "out", "bf16": True,
    "num_train_epochs": 3, "per_device_train_batch_size": 2, "learning_rate": 2e-5, "weight_decay": 0.0,
    "warmup_ratio": 0.03, "lr_scheduler_type": "cosine", "tf32": True, "deepspeed": "zero2.json", "seed": 42,
    "gradient_checkpointing": True, "use_liger_kernel": False, "neftune_noise_alpha": 5.0, "use_cpu": True,
}  # fmt: skip
CHAT = {"lora_r": 8}


def test_a_fastchat_run():
    given = {"lora_r": 64, "lora_alpha": 32, "lora_dropout": 0.1, "lora_target_modules": ["q_proj", "o_proj"],
             "lora_weight_path": "", "lora_bias": "lora_only", "q_lora": True}  # fmt: skip
    target = r"module:(?:.*\.)?(?:q_proj|o_proj)"
    expected = LoraSpec(targets=(target,), rank=64, alpha=32, dropout=0.1, bias="lora_only")
    assert LoraSpec.from_fastchat(RUN | given) == expected
    peft = {"r": 64, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}
    assert LoraSpec.from_fastchat(given) == LoraSpec.from_peft(peft | {"task_type": "CAUSAL_LM"})


@pytest.mark.parametrize(
    "config", [{"lora_r": 8}, RUN | {"q_lora": False}, {"lora_alpha": 16}, {"lora_dropout": 0.05, "lora_r": None}]
)
def test_fastchats_defaults(config):
    target = r"module:(?:.*\.)?(?:q_proj|v_proj)"
    assert LoraSpec.from_fastchat(config) == LoraSpec(targets=(target,), rank=8, alpha=16, dropout=0.05)


def test_no_dropout_of_fastchats_is_none_and_no_default():
    assert LoraSpec.from_fastchat({"lora_dropout": 0}).dropout == 0


FASTCHAT_REFUSED = {
    "rank": ({"lora_r": "16"}, "from_fastchat: rank must be an integer of at least 1, found '16'"),
    "saved": ({"lora_weight_path": "out"}, "lora_weight_path='out' can't be honoured: that adapter's own"),
    "bias": ({"lora_bias": True}, "lora_bias=True can't be honoured: it must be one of 'none', 'all', 'lora_only'"),
    "another bias": ({"lora_bias": "oft_only"}, "lora_bias='oft_only' can't be honoured"),
    "no targets": ({"lora_target_modules": []}, "lora_target_modules=[] can't be honoured"),
    "quantised": ({"q_lora": "yes"}, "q_lora must be true or false, found 'yes'"),
    "unknown": ({"lora_module": ["q"]}, "knows no setting 'lora_module'"),
    "slip": ({"lora_alhpa": 4}, "did you mean 'lora_alpha'?"),
    "slip of qlora": ({"qlora": True}, "did you mean 'q_lora'?"),
    "of peft": ({"use_dora": True}, "knows no setting 'use_dora'"),
    "of trl": ({"use_peft": True}, "knows no setting 'use_peft'"),
}


@pytest.mark.parametrize("config, message", FASTCHAT_REFUSED.values(), ids=FASTCHAT_REFUSED)
def test_what_fastchats_settings_cant_be(config, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        LoraSpec.from_fastchat(CHAT | config)
    assert "LoraSpec.from_fastchat" in str(error.value)


def test_a_run_of_fastchats_without_an_adapter_is_no_adapter_of_defaults():
    for config in ({}, RUN, {"lora_weight_path": None}):
        with pytest.raises(ValueError, match="from_fastchat: there is nothing of an adapter in it"):
            LoraSpec.from_fastchat(config)


def test_every_pattern_that_is_made_is_one_of_modules_or_a_regex():
    spec = LoraSpec.from_peft(PEFT | {"exclude_modules": ["a"], "modules_to_save": ["b"], "rank_pattern": {"c": 1}})
    for pattern in (*spec.targets, *spec.exclude, *spec.train, *spec.overrides):
        assert pattern.startswith("module:") and matcher(pattern)


# -------------------------------------------------------------------------------- sizes


REGEX = {rf".*layers\.{i}\.q_proj": 3 for i in range(300)}
PLAIN = {f"layers.{i}.q_proj": 2 for i in range(600)}
OFF = {rf"^layers\.{i}\.attn\.v_proj": 2 for i in range(700)}


@pytest.mark.parametrize(
    "settings, count",
    [({"rank_pattern": PLAIN, "alpha_pattern": PLAIN}, 600), ({"rank_pattern": PLAIN, "alpha_pattern": OFF}, 1300),
     ({"rank_pattern": REGEX}, 300)],
    ids=["same", "other names", "regular expressions"],
)  # fmt: skip
def test_many_patterns_are_read(settings, count):
    assert len(LoraSpec.from_peft(PEFT | settings).overrides) == count


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"rank_pattern": REGEX, "alpha_pattern": dict(list(REGEX.items())[:200])}, "at most 5000 are read"),
        ({"rank_pattern": {f"{i}.q": 2 for i in range(20_000)}}, "which makes 20000 cases; at most 5000 are read"),
        (
            {"rank_pattern": {f"y{i}": 2 for i in range(3000)}, "alpha_pattern": {f"x{i}": 2 for i in range(3000)}},
            "at most 5000 are read",
        ),
        (
            {"target_modules": [f"layers.{i}.q_proj" for i in range(100_000)]},
            "has 100000 names; at most 10000 are read",
        ),
        ({"modules_to_save": ["x"] * 10_001}, "modules_to_save has 10001 names"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_more_than_can_be_told_apart_in_a_moment_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        LoraSpec.from_peft(PEFT | settings)


def test_whole_names_and_written_dots_are_plain():
    """As jlora and PEFT write them: two of such names are not taken for ones that may meet."""
    ranks, alphas = {r"^layers\.0\.q": 4, "layers.1.q": 5}, {"^model.layers.0.q": 7, r"s\.1\.q": 8, "q": 9}
    spec = LoraSpec.from_peft({"target_modules": ["q"], "rank_pattern": ranks, "alpha_pattern": alphas})
    for name in ("layers.0.q", "model.layers.0.q", "layers.1.q", "layersX1Xq", "x.s.1.q", "s.1.q", "q"):
        at = spec.at(name.replace(".", "/") + "/kernel")
        assert (at.rank, at.alpha) == (first(ranks, name, 8), first(alphas, name, 8)), name
