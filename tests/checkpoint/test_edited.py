"""The JSON of a checkpoint, edited or damaged: it loads as it was, or its place is named; no other error comes out."""

import copy
import dataclasses
import functools
import json
import math
import random
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import checkpoint
from jlora.checkpoint import Checkpoints
from jlora.nodes.axes import of_use
from jlora.variants import AdaptedParam, frozen, static, trained
from tests.optim.support import noisy
from tests.support import same_bits

RNG = np.random.default_rng(0)
SHAPES = {"q": (3, 8, 16), "a": (8, 16), "d": (6, 4), "turn": (8, 4), "head": (8, 3)}
PARAMS = {name: {"kernel": RNG.normal(size=shape).astype(np.float32)} for name, shape in SHAPES.items()}
PARAMS["table"] = {"embedding": np.ones((6, 4), np.float32)}
SPECS = {
    ("q",): {"layers": [0, 2], "axes": {"q": jlora.Axes((1,), (2,), (0,))}},
    ("a", "head", "table"): {"dropout": 0.25, "train": ("head",), "train_tokens": {"table": [1, 4]}},
    ("d",): {"variant": "dora", "init": "pissa"},
    ("turn",): {"variant": "oft", "options": {"block_size": 4}},
}
STEP, HUGE = 7, 10**400
REMOVED, RENAMED = object(), object()


@functools.cache
def wrapped():
    parts = [(names, jlora.LoraSpec(targets=names[0], rank=2, **given)) for names, given in SPECS.items()]
    trees = [noisy({name: PARAMS[name] for name in names}, spec) for names, spec in parts]
    return {name: leaf for tree in trees for name, leaf in tree.items()}


@functools.cache
def state():
    return {"count": jnp.int32(3), "mu": jnp.ones((2, 3), jnp.bfloat16)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a run with one step, to be copied."""
    run = tmp_path_factory.mktemp("edited") / "run"
    with Checkpoints(run) as checkpoints:
        extra = {"epoch": 1, "rows": [1, 2]}
        checkpoints.save(STEP, wrapped(), state=state(), extra=extra, metrics={"loss": 0.5, "acc": math.nan})
    return run


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def file_of(run, item):
    return run / str(STEP) / item / "metadata"


def edited(told, place, value):
    """The JSON with another value at a place, or without it, or with it under another key."""
    told = copy.deepcopy(told)
    at = functools.reduce(lambda x, key: x[key], place[:-1], told)
    if value is RENAMED:
        at[f"{place[-1]}_"] = at.pop(place[-1])
    elif value is REMOVED:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    return told


def rewrite(run, item, place, value):
    file = file_of(run, item)
    file.write_text(json.dumps(edited(json.loads(file.read_text()), place, value)))


def fault(run):
    """What is said of the run's step: an error of the right kind, a warning, or nothing where it loads as it was."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            saved = Checkpoints(run).load(PARAMS, state=state())
            checkpoint.load_abstract(run / str(STEP))
        except (ValueError, FileNotFoundError) as error:
            return " ".join([str(error), *(str(w.message) for w in warned)])
    assert same_bits(saved.tree, wrapped()) and same_bits(saved.state, state())
    return None


A, D, Q, HEAD, TURN, TABLE = (
    ("nodes", path) for path in ("a/kernel", "d/kernel", "q/kernel", "head/kernel", "turn/kernel", "table/embedding")
)
AXES, BASE = (*Q, "settings", "axes"), ("base", "a/kernel")
WRONG = (None, [], {}, "text", -1, HUGE, math.nan, True, REMOVED, RENAMED)  # of no kind that any of these places takes
NEVER = [
    ("nodes",), ("base",), A, (*A, "class"), (*A, "arrays"), (*A, "settings"), (*A, "arrays", "lora_a"),
    (*A, "arrays", "lora_a", "shape"), (*A, "arrays", "lora_a", "dtype"), AXES, (*AXES, "in_axis"), (*AXES, "out_axis"),
    (*AXES, "batch_axis"), (*A, "settings", "dropout"), (*TURN, "settings", "size"), (*TABLE, "settings", "tokens"),
    BASE, (*BASE, "shape"), (*BASE, "dtype"), (*BASE, "sample"), ("format",),
]  # fmt: skip
CASES = {
    "layers": (
        (*Q, "settings", "layers"),
        (None, [], [0], [0, 0], [0, 3], [0, -1], [0, 1.0], [0, True], "02", 0, HUGE),
    ),
    "scale": ((*A, "settings", "scale"), (None, [2.0], "2.0", True, math.nan, math.inf, HUGE, REMOVED, RENAMED)),
    "dropout": ((*A, "settings", "dropout"), (1, 7, "0.25", [0.25], False)),
    "lookup": ((*AXES, "lookup"), (1, "true", [], {})),
    "in_axis": ((*AXES, "in_axis"), (1, [0], [2], [1, 2], [1, 1], [3], [1.0], [HUGE], ["1"])),
    "out_axis": ((*AXES, "out_axis"), ([1], [0, 2], [-1])),
    "batch_axis": ((*AXES, "batch_axis"), ([], [1], [0, 3])),
    "axes of a": ((*A, "settings", "axes", "in_axis"), ([], [1], [0, 1])),
    "an axis more": ((*AXES, "rank_axis"), ([0],)),
    "a setting more": ((*A, "settings", "rank"), (2,)),
    "layers of a": ((*A, "settings", "layers"), ([0], REMOVED)),
    "class": ((*A, "class"), ("Unknown", "os.system", "x" * 10**5, "Axes", "OftParam", "Ia3Param", "TokensParam")),
    "class of full": ((*HEAD, "class"), ("LoraParam", "LoraBiasParam", "TokensParam")),
    "class of oft": ((*TURN, "class"), ("LoraParam", "TrainableParam")),
    "shape": ((*A, "arrays", "lora_a", "shape"), ([8], [8, 3], [2, 8], [8, 2, 1], [8, 2.0], [HUGE, 2], [1] * 99)),
    "dtype": ((*A, "arrays", "lora_a", "dtype"), ("bfloat16", "float64", "object", "O", "int4", "float", "floaty")),
    "stored": ((*HEAD, "arrays", "base"), (REMOVED, RENAMED, {"shape": [8, 4], "dtype": "float32"})),
    "a start": ((*D, "arrays", "start.1"), (REMOVED, RENAMED)),
    "an array more": ((*A, "arrays", "lora_c"), ({"shape": [8, 2], "dtype": "float32"},)),
    "an entry more": ((*A, "note"), ("text",)),
    "size": ((*TURN, "settings", "size"), (2, 3, 8, 4.0, "4")),
    "tokens": ((*TABLE, "settings", "tokens"), ([1], [1, 1], [1, 6], [1, 4, 5], [1, "4"], [True, 4])),
    "a node elsewhere": (("nodes", "b/kernel"), ({"class": "TrainableParam", "arrays": {}, "settings": {}},)),
    "base shape": ((*BASE, "shape"), ([8], [16, 8], [8, 16.0], [8, HUGE])),
    "base dtype": ((*BASE, "dtype"), ("float16", "floaty")),
    "base of full": (("base", "head/kernel", "shape"), ([8, 4], [])),
    "sample": ((*BASE, "sample"), ("0" * 16, "0" * 15, 5)),
    "quantised": ((*BASE, "quantised"), ("nf4", None, 4, "")),
    "another leaf": (("base", "c/kernel"), ({"shape": [1], "dtype": "float32"},)),
    "format": (("format",), (2, 1.0, "1")),
    "the top": (("more",), (1,)),
}
RUN = {
    "metrics": (("metrics",), (None, [], "text", -1, REMOVED, RENAMED)),
    "a metric": (("metrics", "loss"), (None, [0.5], "0.5", True, HUGE)),
    "extra": (("extra",), (REMOVED, RENAMED)),
    "state": (("state",), (None, [], {}, "text", REMOVED, RENAMED)),
    "an array": (("state", "['mu']"), (None, [2, 3], "float32", REMOVED, RENAMED)),
    "its shape": (("state", "['mu']", "shape"), (None, [2], [3, 2], [2, 3.0], [2, HUGE], [2, -3], "23", REMOVED)),
    "its dtype": (("state", "['mu']", "dtype"), (None, "float32", "floaty", 16, REMOVED)),
    "the top": (("more",), (1,)),
}
EDITS = [("about", place, value) for place in NEVER for value in WRONG]
EDITS += [("about", place, value) for place, values in CASES.values() for value in values]
EDITS += [("run", place, value) for place, values in RUN.values() for value in values]
SAME = {(*BASE, "sample"): REMOVED}  # the leaf is not compared: so it is with one that was abstract


def shown(value):
    return {id(REMOVED): "removed", id(RENAMED): "renamed"}.get(id(value), repr(value)[:20])


def name_of(edit):
    return f"{edit[0]}: {'.'.join(edit[1])} {shown(edit[2])}"


@pytest.mark.parametrize("edit", EDITS, ids=name_of)
def test_an_edit_is_refused_by_its_place(edit, run):
    item, place, value = edit
    rewrite(run, item, place, value)
    found = fault(run)
    if any(place == at and value is same for at, same in SAME.items()):
        assert found is None
        return
    assert found is not None and str(run) in found and len(found) < 1500
    assert any(name in found for name in names_of(place, value)), found


def names_of(place, value):
    """What a message may call a place: by its keys, or by what it is part of where that does not fit together."""
    *before, last = place
    parts = {"shape", "dtype", "class", "arrays", "axes", "in_axis", "out_axis", "batch_axis", "layers"}
    yield ".".join(place)
    if value is RENAMED or last in parts:
        yield ".".join(before)
    if last in parts:
        yield ".".join(place[:2])
    if place[0] == "state":
        yield f"state{place[-1] if len(place) < 3 else place[1]}"
    if place[0] == "base":  # as the error of another base has it
        yield place[1] if len(place) > 1 else "a/kernel"


@pytest.mark.parametrize("place, value", [
    ((*A, "settings", "scale"), 8),
    ((*AXES, "lookup"), None),
    ((*BASE, "sample"), REMOVED),
])  # fmt: skip
def test_an_edit_that_changes_nothing_loads(place, value, run):
    rewrite(run, "about", place, value)
    assert fault(run) is None


@pytest.mark.parametrize("place, value, field", [
    ((*A, "settings", "scale"), 3.5, "scale"),
    ((*A, "settings", "dropout"), 0.5, "dropout"),
    ((*Q, "settings", "layers"), [1, 2], "layers"),
    ((*AXES, "lookup"), True, "axes"),
])  # fmt: skip
def test_another_setting_that_fits_is_taken_as_told(place, value, field, run):
    """It can't be known that it is another: all else is as it was."""
    rewrite(run, "about", place, value)
    found = checkpoint.load(run / str(STEP), PARAMS)
    name = place[1].split("/")[0]
    old = wrapped()[name]["kernel"]
    want = tuple(value) if field == "layers" else of_use(old.axes, True) if field == "axes" else value
    assert same_bits(found[name]["kernel"], dataclasses.replace(old, **{field: want}))
    others = lambda tree: {key: x for key, x in tree.items() if key != name}
    assert same_bits(others(found), others(wrapped()))


TEXTS = {
    "a list": ("[]", "an object"),
    "null": ("null", "an object"),
    "nothing": ("", "damaged"),
    "cut": ('{"format": 1, "nodes": ', "damaged"),
    "too deep": ("[" * 100_000 + "]" * 100_000, "deeper"),
    "a key twice": ('{"format": 1, "format": 1, "nodes": {}, "base": {}}', "key format twice"),
    "no text": (b"\xff\xfe\x00", "damaged"),
    "digits": ("9" * 10_000, "damaged"),
    "a number": ("NaN", "an object"),
}


@pytest.mark.parametrize("item", ["about", "run"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_says_nothing_is_named(name, item, run):
    text, says = TEXTS[name]
    file_of(run, item).write_bytes(text if isinstance(text, bytes) else text.encode())
    found = fault(run)
    assert found is not None and str(file_of(run, item)) in found and says in found


def places(told, at=()):
    """Every place of a JSON."""
    pairs = told.items() if isinstance(told, dict) else enumerate(told) if isinstance(told, list) else ()
    return [(*at, key) for key, _ in pairs] + [place for key, x in pairs for place in places(x, (*at, key))]


def test_random_edits_are_refused_or_load_finite(run):
    rng = random.Random(0)
    texts = {item: file_of(run, item).read_text() for item in ("about", "run")}
    values = [
        *WRONG[:-1],
        0,
        1,
        2,
        0.5,
        [0],
        [1, 2],
        "float32",
        "LoraParam",
        "é\ud800\n",
        {"shape": [2], "dtype": "int8"},
    ]
    refused = 0
    for _ in range(300):
        item = rng.choice(["about", "about", "run"])
        told = json.loads(texts[item])
        file_of(run, item).write_text(json.dumps(edited(told, rng.choice(places(told)), rng.choice(values))))
        refused += loads_finite_or_is_refused(run)
        file_of(run, item).write_text(texts[item])
    assert 200 < refused < 300


def loads_finite_or_is_refused(run):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            saved = Checkpoints(run).load(PARAMS, state=state())
        except (ValueError, FileNotFoundError) as error:
            assert str(run) in str(error)
            return True
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves((saved.tree, saved.state)))
    assert same_bits(jlora.unwrap(saved.tree), jlora.unwrap(wrapped()))
    return False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Mine(AdaptedParam):
    """A class of one's own, with settings of any JSON."""

    base: object = frozen()
    gain: object = trained("batch out")
    axes: jlora.Axes = static()
    layers: object = static(default=None)
    size: object = static(default="small")
    scale: float = static(default=2.0)
    others: object = static(default=((1, "x"), (None, 2.5)))

    @classmethod
    def create(cls, base, kernel, key):
        return cls(base, jnp.ones(kernel.sizes("batch out")), **kernel.place)

    def effective(self, name, key):
        return self.base * self.beside(self.gain, "batch out")[..., 0]


def test_a_class_of_ones_own_has_its_own_settings(tmp_path):
    tree = noisy({"a": PARAMS["a"]}, jlora.LoraSpec(targets="a", variant=Mine))
    checkpoint.save(tmp_path / "x", tree)
    load = lambda: checkpoint.load(tmp_path / "x", {"a": PARAMS["a"]}, variants=[Mine])
    assert same_bits(load(), tree)
    file = tmp_path / "x" / "about" / "metadata"
    text = file.read_text()
    for old, new, place in (
        ('"gain"', '"loss"', "nodes.a/kernel.arrays"),
        ('"scale": 2.0', '"scale": "2.0"', "nodes.a/kernel.settings.scale"),
        ('"size"', '"form"', "nodes.a/kernel.settings.size"),
        ('"small"', "[" * 50 + "]" * 50, "nodes.a/kernel.settings.size"),
        ('"in_axis": [0]', '"in_axis": [1]', "nodes.a/kernel.settings.axes"),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=place) as caught:
            load()
        assert str(tmp_path / "x") in str(caught.value)


def test_what_would_not_load_is_not_saved(tmp_path):
    tree = wrapped()["a"]["kernel"]
    for change, says in (({"scale": math.nan}, "settings.scale"), ({"axes": jlora.Axes((1,), (0,))}, "arrays.lora_a")):
        with pytest.raises(ValueError, match=rf"checkpoint\.save: .*nodes\.a\.{says}"):
            checkpoint.save(tmp_path / "x", {"a": dataclasses.replace(tree, **change)})
    assert not (tmp_path / "x").exists()


def test_stacked_adapters_are_saved_and_loaded(tmp_path):
    """Those of `jax.vmap`: beside a stack of bases, or beside one."""
    one = {"a": wrapped()["a"]["kernel"], "d": wrapped()["d"]["kernel"], "head": wrapped()["head"]["kernel"]}
    stack = jax.tree.map(lambda *xs: jnp.stack(xs), one, one, one)
    checkpoint.save(tmp_path / "x", stack)
    bases = {name: jnp.stack([PARAMS[name]["kernel"]] * 3) for name in one}
    assert same_bits(checkpoint.load(tmp_path / "x", bases | {"head": bases["head"]}), stack)
    shared = {"a": dataclasses.replace(stack["a"], base=jnp.asarray(PARAMS["a"]["kernel"]))}
    checkpoint.save(tmp_path / "y", shared)
    assert same_bits(checkpoint.load(tmp_path / "y", {"a": PARAMS["a"]["kernel"]}), shared)
