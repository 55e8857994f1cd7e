"""The pod job in one process, on eight virtual devices: what it trains, resumes, refuses and writes."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

import jlora
from jlora.examples.pod import __main__ as job
from jlora.examples.pod import data, loop, mesh, metrics, step
from jlora.examples.pod.processes import PodError
from tests.support import same_bits

FLAGS = "--tiny --distributed off --steps 12 --length 32 --lr 1e-2 --dtype float32 --base-dtype float32 --save-every 5"


def run(out, *flags):
    return job.main([*FLAGS.split(), "--mesh", "fsdp=4,tensor=2", "--out", str(out), *flags])


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [line["loss"] for line in lines(out)]


@dataclass
class Whole:
    """A job that nothing has interrupted: its directory, its parameters, and what it took the perplexities of."""

    out: Path
    params: Any
    measured: list


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out, exported, measured = tmp_path_factory.mktemp("whole"), [], []
    export = job.export
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "export", lambda params, *rest: (exported.append(params), export(params, *rest)))
        patch.setattr(job, "perplexity", lambda _, params, batches: measured.append((params, [*batches])) or 1.0)
        assert run(out, "--evaluate") == 0
    return Whole(out, exported[0], measured)


LOGITS = jax.jit(lambda params, ids: jlora.apply(job.TINY.apply)({"params": params}, ids))


def held_out():
    return job.split(job.windows(job.tiny(job.TINY)[1], 32))[1]


@pytest.mark.slow
def test_the_loss_falls_and_each_step_has_its_line(whole):
    out = whole.out
    assert [line["step"] for line in lines(out)] == list(range(1, 13))
    assert np.mean(losses(out)[-3:]) < np.mean(losses(out)[:3]) - 0.2
    rates = [line["learning_rate"] for line in lines(out)]
    assert max(rates) == rates[1] == pytest.approx(1e-2)
    assert rates[0] == pytest.approx(1e-3) and rates[-1] < 1e-3


@pytest.mark.slow
def test_the_base_keeps_its_bits(whole):
    host, _ = job.tiny(job.TINY)
    base = jax.tree.map(lambda x: x.astype(np.float32), host)
    assert same_bits(jax.device_get(jlora.unwrap(whole.params)), base)


@pytest.mark.slow
def test_everything_lies_where_its_kernel_lies(whole):
    params = whole.params
    node = params["layers"]["attention"]["q_proj"]["kernel"]
    assert node.base.sharding.spec == jax.P(None, "fsdp", "tensor")
    assert node.lora_a.sharding.spec[:2] == (None, "fsdp") and node.lora_b.sharding.spec[2] == "tensor"
    tx = step.optimizer(params, lambda count: 1e-3)
    state, places = step.first_state(tx, params), step.abstract_state(tx, params)
    where = lambda tree: [x.sharding for x in jax.tree.leaves(tree) if x.ndim]
    assert where(state) == where(places) == where(jlora.partition(params)[0]) * 2


@pytest.mark.slow
def test_the_adapter_that_is_written_is_the_one_that_was_trained(whole):
    host = jax.device_get(whole.params)
    read = jlora.peft.load(whole.out / "adapter", jlora.unwrap(host), names="llama")
    np.testing.assert_allclose(LOGITS(read, held_out()), LOGITS(host, held_out()), atol=1e-4)


@pytest.mark.slow
def test_an_interrupted_job_goes_on_to_the_bit(whole, tmp_path, monkeypatch, capsys):
    add = metrics.Recorder.add

    def interrupted(self, done, told):
        if done == 7:
            signal.raise_signal(signal.SIGINT)
        return add(self, done, told)

    monkeypatch.setattr(metrics.Recorder, "add", interrupted)
    assert run(tmp_path) == 130
    said = capsys.readouterr()
    assert "step 7 of 12 is saved" in said.out
    assert len(losses(tmp_path)) == 7
    monkeypatch.undo()
    assert run(tmp_path) == 0
    assert "going on from step 7 of 12" in capsys.readouterr().out
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 13))
    assert losses(tmp_path) == losses(whole.out)
    weights = [(out / "adapter" / "adapter_model.safetensors").read_bytes() for out in (tmp_path, whole.out)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_job_that_dies_does_the_steps_after_its_checkpoint_again(whole, tmp_path, monkeypatch):
    add = metrics.Recorder.add

    def dying(self, done, told):
        if done == 8:
            raise OSError("no space left")
        return add(self, done, told)

    monkeypatch.setattr(metrics.Recorder, "add", dying)
    assert run(tmp_path) == 1
    assert len(losses(tmp_path)) == 7
    monkeypatch.undo()
    assert run(tmp_path, "--mesh", "data=2,fsdp=2,tensor=2") == 0
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 13))
    assert losses(tmp_path)[:5] == losses(whole.out)[:5]
    np.testing.assert_allclose(losses(tmp_path), losses(whole.out), rtol=1e-5)


@pytest.mark.slow
def test_a_finished_job_only_writes_its_adapter_again(whole):
    out = whole.out
    before = (out / "metrics.jsonl").read_text()
    assert run(out) == 0
    assert (out / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_other_settings_do_not_go_on_with_a_job(whole, capsys, monkeypatch):
    shapes = lambda host, *_: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32"), host)
    monkeypatch.setattr(job, "place", shapes)  # it is refused before the base is needed
    assert run(whole.out, "--rank", "4") == 1
    assert "holds a job with --rank 8" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--accumulate 2 --remat full", "--mesh data=2,fsdp=2,tensor=2 --remat outputs"])
def test_what_must_not_change_the_losses(whole, tmp_path, flags):
    assert run(tmp_path, *flags.split()) == 0
    np.testing.assert_allclose(losses(tmp_path), losses(whole.out), rtol=1e-5)


@pytest.mark.slow
def test_bfloat16_is_near(whole, tmp_path):
    assert run(tmp_path, "--dtype", "bfloat16", "--base-dtype", "bfloat16") == 0
    np.testing.assert_allclose(losses(tmp_path), losses(whole.out), rtol=1e-2)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_read_the_parts_of_one_batch(processes):
    rows = np.arange(20)[:, None] * np.ones(3, int)
    read = lambda columns, number: data.local_rows(data.shuffled(rows, 7), number, (2, 4, 3), columns)
    columns = np.array_split(np.arange(4), processes)
    for number in range(5):
        parts = np.concatenate([read(mine, number) for mine in columns], axis=1)
        np.testing.assert_array_equal(parts, read(np.arange(4), number))


def test_each_epoch_has_each_row_once_in_another_order():
    rows = np.arange(16)[:, None]
    read = lambda number: data.local_rows(data.shuffled(rows, 0), number, (2, 4, 1), np.arange(4)).ravel()
    epochs = [np.concatenate([read(number), read(number + 1)]) for number in (0, 2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(16))
    assert list(epochs[0]) != list(epochs[1]) and list(epochs[0]) != list(range(16))


def test_batches_start_at_any_step():
    here = mesh.make_mesh(mesh.read_mesh("fsdp=2,tensor"))
    stream = data.shuffled(np.arange(60).reshape(20, 3), 0)
    every = [np.asarray(x) for x in data.batches(stream, here, 8, 3, 2, 0, 5)]
    later = [np.asarray(x) for x in data.batches(stream, here, 8, 3, 2, 3, 5)]
    assert [x.shape for x in every] == [(2, 4, 3)] * 5
    np.testing.assert_array_equal(every[3:], later)


@pytest.mark.slow
def test_held_out_rows_count_once(whole):
    """Those of the last batch too, which has places left."""
    (base, _), (params, batches) = whole.measured
    assert not jlora.tree.has_nodes(base) and params is whole.params
    rows = held_out()
    assert len(rows) == 47 and len(batches) == 6
    log_probs = np.asarray(jax.nn.log_softmax(LOGITS(jax.device_get(params), rows)[:, :-1]))
    picked = np.take_along_axis(log_probs, rows[:, 1:, None], axis=-1)
    found = step.perplexity(job.TINY, params, batches)
    assert found == pytest.approx(float(np.exp(-picked.mean())), rel=1e-4)


@pytest.mark.parametrize(
    "text, sizes",
    [
        ("fsdp", (1, 8, 1)),
        ("data=-1,tensor=2", (4, 1, 2)),
        ("data=2,fsdp=2,tensor=2", (2, 2, 2)),
        ("tensor=8", (1, 1, 8)),
    ],
)
def test_a_mesh_takes_the_rest_where_no_size_is_given(text, sizes):
    here = mesh.make_mesh(mesh.read_mesh(text))
    assert tuple(here.shape.values()) == sizes


@pytest.mark.parametrize(
    "text, told",
    [
        ("model=2", "'model' is no axis of the mesh; its axes are data, fsdp, tensor"),
        ("fsdp=0", "a number from 1, or -1"),
        ("fsdp=two", "a number from 1, or -1"),
        ("fsdp=-1,data=-1", "one axis can take the rest"),
    ],
)
def test_a_mesh_that_is_none(text, told, capsys):
    with pytest.raises(SystemExit):
        job.parse(["--mesh", text])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, told",
    [
        (
            ["--mesh", "fsdp=4,tensor=3"],
            "does not fit 8 devices (1 processes of 8): the product of its sizes must be 8",
        ),
        (["--mesh", "fsdp=3"], "--virtual-devices 3 makes 3 of one CPU"),
        (["--mesh", "fsdp=2,tensor=4"], "tensor=4 does not divide the model's kv_heads = 2; tensor can be one of 1, 2"),
        (["--mesh", "fsdp=8", "--batch", "12"], "--batch 12 is not a multiple of 8"),
        (["--mesh", "fsdp=8", "--accumulate", "2"], "--batch 8 is not a multiple of 16"),
    ],
)
def test_what_does_not_fit_the_mesh_is_an_error(tmp_path, capsys, flags, told):
    assert run(tmp_path, *flags) == 1
    assert told in capsys.readouterr().err


def test_the_pretrained_model_splits_into_three_by_heads():
    devices = np.array(jax.devices()[:6]).reshape(1, 2, 3)
    mesh.check_model(job.PRETRAINED, Mesh(devices, mesh.AXES))
    with pytest.raises(PodError, match="tensor can be one of 1, 3, and data takes what is left"):
        mesh.check_model(job.PRETRAINED, Mesh(devices.reshape(1, 3, 2), mesh.AXES))


def test_every_leaf_of_the_model_has_one_place():
    model = job.PRETRAINED.clone(layers=2)  # the layers are one stack
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 8), int)))["params"]
    here = mesh.make_mesh(mesh.read_mesh("fsdp=8"))
    sizes = {path: x.size for path, x in jax.tree.leaves_with_path(shapes)}
    split = mesh.place(jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes), here, "bfloat16")
    for path, x in jax.tree.leaves_with_path(split):
        part = x.addressable_shards[0].data.size
        assert part == sizes[path] if "scale" in str(path[-1]) else part * 8 == sizes[path]


def test_flops_are_those_that_xla_counts():
    """Of one layer without a scan's loop, as XLA counts a loop's body once."""
    model = job.TINY.clone(layers=1)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 8), int)))["params"]
    args = job.parse(["--batch", "2", "--length", "128", "--rank", "4"])
    params = job.adapt(model, params, args)
    ids = jax.ShapeDtypeStruct((2, 128), "int32")
    loss = lambda params, ids: step.next_token_losses(jlora.apply(model.apply)({"params": params}, ids), ids).mean()
    counted = jax.jit(jlora.value_and_grad(loss)).lower(params, ids).cost_analysis()["flops"]
    assert metrics.flops_per_token(model, params, 128) * 2 * 128 == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(
    "kind, peak",
    [("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
     ("NVIDIA H200", 989e12), ("TPU v4 lite", None), ("cpu", None)],
)  # fmt: skip
def test_peaks(kind, peak):
    assert metrics.peak_flops(kind) == peak


def test_lines_of_steps_to_come_and_lines_cut_off_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    metrics.keep_steps(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_stop_of_any_device_is_seen():
    here = mesh.make_mesh(mesh.read_mesh("fsdp=4,tensor=2"))
    assert set(np.asarray(loop.flags(loop.Stop(15), here))) == {15}
    mixed = jax.device_put(np.array([0, 0, 0, 15, 0, 0, 0, 0], np.int32), NamedSharding(here, jax.P(mesh.AXES)))
    assert mixed.max() == 15


@pytest.mark.parametrize("flags", [["--coordinator", "here:1"], ["--process", "0", "--processes", "2"]])
def test_a_process_by_hand_is_told_in_whole(flags, capsys):
    with pytest.raises(SystemExit):
        job.parse(flags)
    assert "--coordinator, --processes and --process go together" in capsys.readouterr().err


@pytest.mark.slow
def test_a_laptop_is_no_cluster_and_one_that_is_asked_for_is_an_error():
    code = """
import jax, runpy, sys
from jlora.examples.pod import processes
from jlora.examples.pod.__main__ import parse
processes.start(parse([]))
print(jax.distributed.is_initialized())
sys.argv = ["pod", "--tiny", "--distributed"]
del sys.modules["jlora.examples.pod.__main__"]
try:
    runpy.run_module("jlora.examples.pod", run_name="__main__")
finally:
    print(jax.process_count())
"""
    env = {name: x for name, x in os.environ.items() if not name.startswith(("SLURM", "OMPI", "KUBERNETES", "JAX_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "1"], done.stderr
    assert done.returncode == 1 and "--distributed off runs this process by itself" in done.stderr
