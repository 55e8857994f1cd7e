"""Files that nobody should trust: refused by a clear ValueError, or read as what they were, and never at a cost."""

import copy
import json
import os
import time
import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as read_tensors
from safetensors.numpy import save as tensors_bytes

import jlora
from jlora.peft import tensors as files
from jlora.targets import patterns
from tests.optim.support import noisy
from tests.peft_files.pickles import FORMATS, state
from tests.peft_files.trees import TABLE, flat, lora, nested, noise
from tests.support import same_bits

PREFIX = "base_model.model."
Q, HEAD = f"{PREFIX}layers.0.q_proj", f"{PREFIX}lm_head.weight"
STATE = {
    "embed_tokens.weight": noise(10, 4), "layers.0.q_proj.weight": noise(6, 4), "layers.0.q_proj.bias": noise(6),
    "layers.1.q_proj.weight": noise(6, 4), "layers.1.q_proj.bias": noise(6), "layers.1.norm.weight": noise(4),
    "lm_head.weight": noise(10, 4),
}  # fmt: skip
fuzzed = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def base():
    return jax.device_put(nested(STATE))


def trained(name):
    return jlora.TrainableParam(jax.device_put(noise(*STATE[name].shape)))


def plain():
    """Linear layers, a table, a head trained in full, and the biases beside the linear layers."""
    table = lora(STATE["embed_tokens.weight"], axes=TABLE)
    kernels = {name: lora(STATE[name]) for name in STATE if "q_proj.weight" in name}
    full = {name: trained(name) for name in STATE if name.endswith("bias") or "head" in name}
    return nested({**flat(base()), "embed_tokens.weight": table, **kernels, **full})


def wrapped(targets="q_proj/weight", **settings):
    return noisy(base(), jlora.LoraSpec(targets, rank=2, axes={"q_proj": jlora.Axes((1,), (0,))}, **settings))


def dora():
    return wrapped(variant="dora")


def with_rows():
    return wrapped("layers/*/q_proj/weight", train_tokens={"embed_tokens": [3, 1]})


def with_lora_bias():
    return wrapped(lora_bias=True)


ADAPTERS = {"plain": plain, "dora": dora, "rows": with_rows, "lora_bias": with_lora_bias}


class Files:
    """An adapter's files, to be changed and loaded."""

    def __init__(self, directory, kind):
        self.directory, self.params = directory, base()
        jlora.peft.save(directory, ADAPTERS[kind]())
        self.config = json.loads((directory / "adapter_config.json").read_text())
        self.data = (directory / "adapter_model.safetensors").read_bytes()
        self.tensors = read_tensors(self.data)
        self.tree = self.load()

    def copied(self, directory):
        """The same files in another directory."""
        other = copy.copy(self)
        other.directory = directory
        other.write()
        return other

    @property
    def header(self):
        return json.loads(self.data[8 : 8 + int.from_bytes(self.data[:8], "little")])

    @property
    def body(self):
        return self.data[8 + int.from_bytes(self.data[:8], "little") :]

    def load(self, **kwargs):
        before = copy.copy(self.params)
        try:
            return jlora.peft.load(self.directory, self.params, **kwargs)
        finally:
            assert same_bits(self.params, before)
            assert same_bits(self.params, nested(STATE))

    def write(self, data=None, config=None, **settings):
        """Bytes, a header or tensors in place of the weights; text or settings in place of the configuration."""
        if isinstance(data, dict):
            data = tensors_bytes(data)
        (self.directory / "adapter_model.safetensors").write_bytes(self.data if data is None else data)
        text = json.dumps(self.config | settings) if config is None else config
        (self.directory / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    def with_header(self, text):
        text = (text if isinstance(text, str) else json.dumps(text)).encode()
        self.write(len(text).to_bytes(8, "little") + text + self.body)

    def refused(self, match=".", error=ValueError, peak=20 << 20):
        """Loading is that error, of that very type, with nothing large made on the way."""
        tracemalloc.start()
        try:
            with pytest.raises(error, match=match) as info:
                self.load()
            assert tracemalloc.get_traced_memory()[1] < peak
        finally:
            tracemalloc.stop()
        assert info.type is error
        assert len(str(info.value)) < 3000
        return str(info.value)

    def same_or_refused(self):
        """Refused, or of the same structure and shapes with finite values, on the same base."""
        try:
            found = self.load()
        except ValueError as error:
            assert type(error) is ValueError, type(error)
            return
        assert flat(found).keys() == flat(self.tree).keys()
        for x in jax.tree.leaves(found):
            assert np.isfinite(np.asarray(x)).all()
        for name, leaf in flat(found).items():
            assert leaf.shape == STATE[name].shape
            if isinstance(leaf, jlora.LoraParam):
                assert np.asarray(leaf.base).tobytes() == STATE[name].tobytes()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return {kind: Files(tmp_path_factory.mktemp(kind), kind) for kind in ADAPTERS}


@pytest.fixture(params=["plain", "dora"])
def both(request, shared, tmp_path):
    return shared[request.param].copied(tmp_path)


@pytest.fixture
def adapter(shared, tmp_path):
    return shared["plain"].copied(tmp_path)


def test_files_are_read_as_they_were_written(both):
    both.write()
    assert same_bits(both.load(), both.tree)
    kinds = {type(x).__name__ for x in flat(both.tree).values()}
    assert kinds >= ({"LoraParam", "TrainableParam"} if both.config["use_dora"] is False else {"DoraParam"})


# -------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("kind", ["plain", "dora"])
@settings(fuzzed, max_examples=100)
@given(st.data())
def test_flipped_bytes_are_other_numbers_or_refused(shared, kind, data):
    adapter = shared[kind]
    size = len(adapter.data) - len(adapter.body)
    places = st.one_of(st.integers(0, 7), st.integers(8, size - 1), st.integers(size, len(adapter.data) - 1))
    changed = bytearray(adapter.data)
    for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=3)):
        changed[place] = byte
    adapter.write(bytes(changed))
    adapter.same_or_refused()


@settings(fuzzed, max_examples=60)
@given(st.data())
def test_truncated_and_longer_files_are_refused(shared, data):
    adapter = shared["plain"]
    size = len(adapter.data)
    cut = st.one_of(st.sampled_from([0, 1, 7, 8, 9, size - len(adapter.body), size - 1]), st.integers(0, size - 1))
    changed = data.draw(st.one_of(cut.map(lambda n: adapter.data[:n]),
                                  st.binary(min_size=1, max_size=9).map(lambda more: adapter.data + more)))  # fmt: skip
    adapter.write(changed)
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        adapter.load()


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([2**31, 2**63, 2**64, -(2**64), 10**400]),
              st.floats(width=32), st.text(max_size=5), st.sampled_from(["I32", "F16", "BF16", "F8_E4M3", "q_proj"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)  # fmt: skip


@settings(fuzzed, max_examples=150)
@given(st.data())
def test_headers_of_any_values_are_read_or_refused(shared, data):
    adapter = shared["plain"]
    header = adapter.header
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from([None, "dtype", "shape", "data_offsets", "other"]))
    if field is None:
        header[name] = data.draw(json_values)
    else:
        header[name][field] = data.draw(json_values)
    adapter.with_header(header)
    adapter.same_or_refused()


SETTINGS = (
    "alpha_pattern bias ensure_weight_tying exclude_modules fan_in_fan_out init_lora_weights layers_pattern"
    " layers_to_transform lora_alpha lora_bias lora_dropout modules_to_save peft_type r rank_pattern target_modules"
    " target_parameters task_type trainable_token_indices use_dora use_rslora other"
).split()


@pytest.mark.parametrize("kind", ADAPTERS)
@settings(fuzzed, max_examples=100)
@given(st.sampled_from(SETTINGS), json_values)
def test_settings_of_any_values_are_read_or_refused(shared, kind, name, value):
    adapter = shared[kind]
    adapter.write(**{name: value})
    adapter.same_or_refused()


@settings(fuzzed, max_examples=60)
@given(st.data())
def test_flipped_bytes_of_settings_are_read_or_refused(shared, data):
    adapter = shared["plain"]
    changed = bytearray(json.dumps(adapter.config).encode())
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(changed) - 1), st.integers(0, 255)), min_size=1, max_size=2)
    ):
        changed[place] = byte
    adapter.write(config=bytes(changed))
    adapter.same_or_refused()


# -------------------------------------------------------------------------------- headers


def test_a_name_twice_is_refused(adapter):
    name = json.dumps(f"{Q}.lora_A.weight")
    text, entry = json.dumps(adapter.header), json.dumps(adapter.header[f"{Q}.lora_A.weight"])
    adapter.with_header(text[:-1] + f", {name}: {entry}}}")
    adapter.refused("twice|duplicate")


@pytest.mark.parametrize(
    "name",
    ["../../evil", "/etc/passwd", f"{PREFIX}../x.lora_A.weight", f"{PREFIX}a/b.lora_A.weight", PREFIX, "",
     pytest.param("x" * 5000, id="long"), f"{PREFIX}a..b", f"{PREFIX}\u0000", f"{PREFIX}\n"],
)  # fmt: skip
def test_names_that_are_none_of_pefts_are_refused(adapter, name):
    adapter.write(adapter.tensors | {name: np.ones((2, 4), np.float32)})
    adapter.refused("is none of PEFT's")


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "C64", "F128"])
def test_unknown_types_are_refused(adapter, dtype):
    header = adapter.header
    header[HEAD]["dtype"] = dtype
    adapter.with_header(header)
    adapter.refused("no whole safetensors file|has the type")


@pytest.mark.parametrize("shape", [(0, 2**60), (2**60, 0), (0,), (0, 4)])
@pytest.mark.parametrize("name", [f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", HEAD, f"{Q}.base_layer.bias"])
def test_empty_tensors_are_refused(adapter, name, shape):
    values = {key: x for key, x in adapter.tensors.items() if key != name}
    written = tensors_bytes(values)
    size = int.from_bytes(written[:8], "little")
    header = json.loads(written[8 : 8 + size])
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(written) - 8 - size] * 2}
    text = json.dumps(header).encode()
    adapter.write(len(text).to_bytes(8, "little") + text + written[8 + size :])
    adapter.refused()


# -------------------------------------------------------------------------------- tensors


def test_values_that_are_not_finite_are_refused(both):
    for name, bad in zip(both.tensors, [np.nan, np.inf, -np.inf] * 9, strict=False):
        wrong = both.tensors[name].copy()
        wrong.flat[-1] = bad
        both.write(both.tensors | {name: wrong})
        both.refused("NaN or infinite")


def test_values_that_are_not_finite_are_taken_on_request(adapter):
    wrong = adapter.tensors[f"{Q}.lora_A.weight"].copy()
    wrong[0, 0] = np.nan
    adapter.write(adapter.tensors | {f"{Q}.lora_A.weight": wrong})
    tree = adapter.load(allow_nonfinite=True)
    np.testing.assert_array_equal(tree["layers"]["0"]["q_proj"]["weight"].lora_a, wrong.T)


def reshaped(x):
    """Other shapes: with more elements, with fewer, and with the same number in another order."""
    yield np.concatenate([x, x])
    yield x[..., :-1]
    if x.ndim == 2:
        yield x.T
        yield x.reshape(-1)


def test_wrong_shapes_and_ranks_are_refused(both):
    for name, x in both.tensors.items():
        for wrong in reshaped(x):
            if wrong.size != x.size or (x.ndim > 1 and wrong.shape != x.shape):
                both.write(both.tensors | {name: np.ascontiguousarray(wrong)})
                both.refused()


def test_both_factors_of_another_rank_are_refused(adapter):
    factors = {f"{Q}.lora_A.weight": noise(3, 4), f"{Q}.lora_B.weight": noise(6, 3)}
    adapter.write(adapter.tensors | factors)
    adapter.refused("has rank 2, but its factors are")
    adapter.write(r=10**12)
    adapter.refused("has rank 1000000000000, but its factors")
    adapter.write(rank_pattern={"q_proj": 2**40})
    adapter.refused("has rank 1099511627776, but its factors")


def taken(adapter, change):
    """The tensors of which a change is not refused."""
    found = []
    for name in adapter.tensors:
        adapter.write(change(name))
        try:
            adapter.load()
            found.append(name)
        except ValueError as error:
            assert type(error) is ValueError
    return found


@pytest.mark.parametrize("kind", ADAPTERS)
def test_integers_are_refused(kind, shared, tmp_path):
    adapter = shared[kind].copied(tmp_path)
    integers = lambda name: adapter.tensors | {name: np.ones(adapter.tensors[name].shape, np.int64)}
    assert not taken(adapter, integers)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_missing_tensors_are_refused(kind, shared, tmp_path):
    adapter = shared[kind].copied(tmp_path)
    assert not taken(adapter, lambda name: {key: x for key, x in adapter.tensors.items() if key != name})


def test_a_module_without_its_factors_is_refused(adapter):
    adapter.write({key: x for key, x in adapter.tensors.items() if "layers.1.q_proj.lora" not in key})
    adapter.refused("layers.1.q_proj")


@pytest.mark.parametrize(
    "name, shape",
    [
        ("layers.1.norm.weight", (4,)),  # in PEFT it overwrites the base
        ("layers.0.q_proj.weight", (6, 4)),
        ("embed_tokens.weight", (10, 4)),
        ("layers.0.k_proj.lora_A.weight", (2, 4)),
        ("layers.0.q_proj.lora_A.other.weight", (2, 4)),
        ("layers.0.q_proj.lora_C.weight", (2, 4)),
        ("layers.0.q_proj.lora_magnitude_vector", (6,)),
        ("layers.0.q_proj.lora_B.bias", (6,)),
        ("layers.0.q_proj.lora_embedding_A", (2, 4)),
        ("layers.1.norm.lora_magnitude_vector", (4,)),
        ("lm_head.modules_to_save.weight", (10, 4)),
        ("lm_head.original_module.weight", (10, 4)),
        ("embed_tokens.token_adapter.trainable_tokens_delta", (1, 4)),
        ("layers.0.q_proj.hada_w1_a", (4, 2)),
        ("layers.0.q_proj.oft_r.weight", (2, 4)),
    ],
)
def test_tensors_that_no_setting_speaks_of_are_refused(adapter, name, shape):
    adapter.write(adapter.tensors | {PREFIX + name: noise(*shape)})
    assert len(adapter.refused()) > 30


@pytest.mark.parametrize("module", ["layers.0.q_proj", "embed_tokens", "layers.1.norm"])
def test_a_copy_of_a_base_weight_never_becomes_the_base(adapter, module):
    adapter.write(adapter.tensors | {f"{PREFIX}{module}.base_layer.weight": STATE[f"{module}.weight"] + 1})
    adapter.refused("trained on another base")
    adapter.write(adapter.tensors | {f"{PREFIX}{module}.base_layer.weight": STATE[f"{module}.weight"]})
    assert same_bits(adapter.load(), adapter.tree)


def test_the_settings_say_whether_there_are_magnitudes(shared):
    shared["dora"].write(use_dora=False)
    shared["dora"].refused("has a magnitude, but use_dora is false")
    shared["plain"].write(use_dora=True)
    shared["plain"].refused("lacks a magnitude, but use_dora is true")


def test_the_settings_say_whether_updates_have_biases(shared):
    shared["lora_bias"].write(lora_bias=False)
    shared["lora_bias"].refused("has a bias, but lora_bias is false")
    shared["plain"].write(lora_bias=True)
    shared["plain"].refused("lora_bias|bias")


@pytest.mark.parametrize(
    "tokens",
    [None, [], [3], [3, 1, 2], [3, 3], [3, 10], [3, -1], [3, 2**70], {"other": [3, 1]}, {"embed_tokens": [3]}, [3, 1.5],
     [3, "1"], "31", {"embed_tokens": None}, {"embed_tokens": "31"}, [[3, 1]], 31, True],
)  # fmt: skip
def test_the_settings_say_which_rows_there_are(shared, tokens):
    shared["rows"].write(trainable_token_indices=tokens)
    shared["rows"].refused()


# -------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "alpha",
    ["NaN", "Infinity", "-Infinity", '"16"', "null", "0", "-1", "[]", "1e999", "1e400", "true",
     pytest.param("1" + "0" * 400, id="huge"), pytest.param("1" * 5000, id="long")],
)  # fmt: skip
def test_alphas_that_are_no_positive_numbers_are_refused(adapter, alpha):
    text = json.dumps(adapter.config | {"lora_alpha": "ALPHA"}).replace('"ALPHA"', alpha)
    adapter.write(config=text)
    adapter.refused()
    adapter.write(config=json.dumps(adapter.config | {"alpha_pattern": {"q_proj": "A"}}).replace('"A"', alpha))
    adapter.refused()


@pytest.mark.parametrize("rank", [None, 0, -1, 2.5, "2", [2], True, pytest.param(10**400, id="huge"), 2.0])
def test_ranks_that_are_no_positive_integers_are_refused(adapter, rank):
    adapter.write(r=rank)
    adapter.refused()
    if rank is not None:
        adapter.write(rank_pattern={"q_proj": rank})
        adapter.refused()


@pytest.mark.parametrize(
    "wrong",
    [{"peft_type": "IA3"}, {"peft_type": "LOHA"}, {"peft_type": None}, {"peft_type": ["LORA"]}, {"unknown": 1},
     {"bias": "some"}, {"target_modules": "("}, {"target_modules": []}, {"target_modules": [1]}, {"target_modules": 1},
     {"target_modules": "a" * 5000}, {"modules_to_save": ["other"]}, {"modules_to_save": 1}, {"lora_dropout": 1},
     {"lora_dropout": -0.1}, {"use_dora": "yes"}, {"use_rslora": 1.5}, {"rank_pattern": ["q_proj"]},
     {"rank_pattern": {"(": 2}}, {"alpha_pattern": "q_proj"}, {"layers_to_transform": [0]},
     {"exclude_modules": ["q_proj"]},
     {"init_lora_weights": "loftq"}, {"init_lora_weights": {}}, {"layer_replication": [[0, 2], [1, 2]]},
     {"use_qalora": True}, {"target_parameters": ["q_proj.weight"], "target_modules": None}],
    ids=lambda wrong: str(wrong)[:50],
)  # fmt: skip
def test_settings_that_do_not_fit_the_file_are_refused(adapter, wrong):
    adapter.write(**wrong)
    assert len(adapter.refused()) > 30


PATTERNS = ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"]


@pytest.mark.parametrize("name", PATTERNS)
def test_a_regular_expression_that_never_ends_is_ended(tmp_path, name, monkeypatch):
    """After a second; here, after a twentieth of one."""
    assert patterns.MATCH_SECONDS == 1
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 0.05)
    module = f"model.language_model.decoder.{'x' * 200}.q_proj"
    params = nested({f"{module}.weight": STATE["layers.0.q_proj.weight"]})
    jlora.peft.save(tmp_path, nested({f"{module}.weight": lora(STATE["layers.0.q_proj.weight"])}))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for pattern in ("([a-z_.0-9]+)+!", "(.*.*.*.*.*.*)*!", "(.|.)*[A-Z]"):
        value = {pattern: 3} if name.endswith("pattern") else pattern
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {name: value}))
        started = time.monotonic()
        if "!" in pattern and name != "target_modules":  # ended by itself, without a match
            assert jlora.peft.load(tmp_path, params) is not None
        else:
            with pytest.raises(ValueError, match=r"took over 0.05 s .*simplify|settings do not name"):
                jlora.peft.load(tmp_path, params)
        assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", "3", "null", '"text"', "{", "{}", '{"peft_type": "LORA"}', "\ufeff{}",
     pytest.param("[" * 200_000, id="lists"), pytest.param('{"a":' * 100_000, id="objects"),
     pytest.param(b"\xff\xfe\x00{", id="bytes"), '{"r": 2, "r": 3}'],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(adapter, text):
    adapter.write(config=text)
    adapter.refused("adapter_config.json", peak=64 << 20)


def test_settings_of_any_length_are_not_read(adapter, monkeypatch):
    monkeypatch.setattr(files.read_json, "__defaults__", (1000,))
    adapter.write(other=" " * 1000)
    adapter.refused("over 1000 bytes")
    assert files.read_json.__defaults__ == (1000,)


@pytest.mark.parametrize("format", FORMATS)
def test_a_pickle_is_read_and_never_run(adapter, format):
    (adapter.directory / "adapter_model.safetensors").unlink()
    tensors, storages = state(adapter.tensors)
    pickled = adapter.directory / "adapter_model.bin"
    pickled.write_bytes(FORMATS[format](tensors, storages))
    assert same_bits(adapter.load(), adapter.tree)
    tensors["evil"] = Evil(adapter.directory / "evil")
    pickled.write_bytes(FORMATS[format](tensors, storages))
    told = adapter.refused(r"asks for '\w+\.mkdir', which may run any code; it was not run")
    assert str(pickled) in told and not (adapter.directory / "evil").exists()


class Evil:
    """What a pickle runs when it is loaded: here, a folder that should never come to be."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_directory_without_the_files_is_refused(adapter, name):
    (adapter.directory / name).unlink()
    adapter.refused(f"has no {name}", FileNotFoundError)


def test_no_directory_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter of PEFT's"):
        jlora.peft.load(tmp_path / "nothing", base())
