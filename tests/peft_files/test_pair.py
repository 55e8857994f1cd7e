"""The two files of an adapter belong to one save: mixed ones are read as the save that was cut off, or refused."""

import json
import os
import shutil
import sys
import threading

import numpy as np
import pytest
import safetensors.numpy

import jlora
from tests.peft_files.trees import flat, lora, merged, nested, noise

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "layers.0.q_proj.weight"
STATE = {NAME: noise(6, 5), "embed_tokens.weight": noise(9, 5)}


def tree(scale=0.5, **changes):
    return nested(STATE | {NAME: lora(STATE[NAME], scale=scale)} | changes)


def edit(directory, **settings):
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def same(found, expected):
    found, expected = merged(found), merged(expected)
    return all(np.array_equal(found[name], x) for name, x in expected.items())


@pytest.fixture
def two(tmp_path):
    """The directories of two adapters of other scales, and their trees."""
    trees = tree(0.5), tree(4.0)
    for i, each in enumerate(trees):
        jlora.peft.save(tmp_path / str(i), each)
    return tmp_path / "0", tmp_path / "1", *trees


def test_files_of_two_saves_are_refused(two):
    first, second, *_ = two
    shutil.copyfile(second / WEIGHTS, first / WEIGHTS)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors was saved with other settings than those in") as e:
        jlora.peft.load(first, nested(STATE))
    assert "the scale of layers.0.q_proj was 4.0, and is 0.5 by the file" in str(e.value)


def test_a_save_that_is_cut_off_between_its_files_is_whole(two, monkeypatch):
    """In place of an adapter; where none was there is none."""
    first, _, _, new = two
    monkeypatch.setattr(sys.modules["jlora.peft.write"], "write_json", lambda *_: 1 / 0)
    for directory in (first, first.parent / "third"):
        with pytest.raises(ZeroDivisionError):
            jlora.peft.save(directory, new)
    assert same(jlora.peft.load(first, nested(STATE)), new)
    with pytest.raises(FileNotFoundError, match=f"no {CONFIG}"):
        jlora.peft.load(first.parent / "third", nested(STATE))


def test_files_of_other_tools_have_no_such_mark(two):
    first, second, *_ = two
    for directory in (first, second):
        safetensors.numpy.save_file(safetensors.numpy.load_file(directory / WEIGHTS), directory / WEIGHTS)
    shutil.copyfile(second / WEIGHTS, first / WEIGHTS)
    found = flat(jlora.peft.load(first, nested(STATE)))[NAME]
    assert found.scale == 0.5


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"lora_alpha": 7}, "the scale of layers.0.q_proj was 0.5, and is 3.5"),
        ({"use_rslora": True}, "the scale of layers.0.q_proj was 0.5"),
        ({"alpha_pattern": {"q_proj": 3}}, "the scale of layers.0.q_proj was 0.5, and is 1.5"),
    ],
    ids=lambda x: "" if isinstance(x, str) else next(iter(x)),
)
def test_settings_that_were_edited_are_asked_about(two, settings, told):
    first, *_ = two
    edit(first, **settings)
    with pytest.raises(ValueError, match=f"{told}.*allow_edited=True"):
        jlora.peft.load(first, nested(STATE))
    jlora.peft.load(first, nested(STATE), allow_edited=True)


def test_an_edit_back_to_the_settings_before_is_one(two):
    """The file is then the one that lay there before a save, as where that was cut off; but it is newer."""
    first, _, _, new = two
    before = (first / CONFIG).read_bytes()
    jlora.peft.save(first, new)
    os.utime(first / WEIGHTS, ns=(0, 0))
    (first / CONFIG).write_bytes(before)
    with pytest.raises(ValueError, match=r"the scale of layers.0.q_proj was 4.0, and is 0.5"):
        jlora.peft.load(first, nested(STATE))
    found = flat(jlora.peft.load(first, nested(STATE), allow_edited=True))[NAME]
    assert found.scale == 0.5


def test_rows_in_another_order_are_asked_about(tmp_path):
    spec = jlora.LoraSpec(
        targets=["q_proj"], rank=2, axes={"q_proj": jlora.Axes(1, 0)}, train_tokens={"embed_tokens": [3, 1]}
    )
    jlora.peft.save(tmp_path, jlora.wrap(nested(STATE), spec))
    edit(tmp_path, trainable_token_indices={"embed_tokens": [1, 3]})
    with pytest.raises(ValueError, match=r"the rows of embed_tokens was \(3, 1\), and is \(1, 3\)"):
        jlora.peft.load(tmp_path, nested(STATE))


@pytest.mark.parametrize(
    "settings",
    [{"base_model_name_or_path": "mine"}, {"lora_dropout": 0.5},
     {"peft_version": "0.99"}, {"merge_weights": False}, {"inference_mode": False},
     {"target_modules": ["layers.0.q_proj"]}, {"task_type": "CAUSAL_LM"}],
    ids=str,
)  # fmt: skip
def test_an_edit_that_changes_nothing_is_no_matter(two, settings):
    first, _, expected, _ = two
    edit(first, **settings)
    assert same(jlora.peft.load(first, nested(STATE)), expected)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 1, "r": 2}', '{"r": NaN}', '{"peft_type": "IA3"}'])
def test_a_mark_that_is_none_is_refused(two, text):
    first, *_ = two
    arrays = safetensors.numpy.load_file(first / WEIGHTS)
    safetensors.numpy.save_file(arrays, first / WEIGHTS, {"jlora.settings": text, "format": "pt"})
    with pytest.raises(ValueError, match=WEIGHTS):
        jlora.peft.load(first, nested(STATE))


def test_a_mark_of_other_modules_is_refused(two):
    """Settings that make other names of the same tensors: of experts, say."""
    first, *_ = two
    arrays = safetensors.numpy.load_file(first / WEIGHTS)
    own = json.loads((first / CONFIG).read_text()) | {"target_parameters": ["layers.0.q_proj.gate_up_proj"]}
    safetensors.numpy.save_file(arrays, first / WEIGHTS, {"jlora.settings": json.dumps(own), "format": "pt"})
    with pytest.raises(ValueError, match=WEIGHTS):
        jlora.peft.load(first, nested(STATE))


def test_a_reader_beside_two_writers_meets_whole_adapters(two):
    """Of which each has a scale of its own; no file is left over."""
    first, _, *trees = two
    stop = threading.Event()

    def write(each):
        while not stop.is_set():
            jlora.peft.save(first, each)

    writers = [threading.Thread(target=write, args=(each,)) for each in trees]
    for writer in writers:
        writer.start()
    try:
        for _ in range(40):
            found = jlora.peft.load(first, nested(STATE))
            assert any(same(found, each) for each in trees)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert {path.name for path in first.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
