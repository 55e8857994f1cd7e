"""Tests of the sentiment job: its parts on a tiny model, and the whole of it in a process of its own."""

import functools
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import load_file

import jlora
from jlora.examples import plots, probe, sentiment, training
from jlora.examples.fetch import MINILM, MOVIES, FetchError, fetch
from jlora.examples.minilm import Classifier, MiniLM, load_params
from tests.examples.support import weights
from tests.optim.support import noisy

MODEL = Classifier(MiniLM(vocab=50, positions=16, width=8, heads=2, hidden=12, layers=2))
ONE_LAYER = Classifier(MODEL.encoder.clone(layers=1))
SPEC = jlora.LoraSpec(targets="all-linear", rank=2, alpha=4, train=("head",))
ROOT = Path(__file__).parents[2]


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 50, (70, 8), np.int32)
    return {"ids": ids, "mask": np.ones((70, 8), bool), "labels": (ids[:, 0] > 25).astype(np.int32)}


@pytest.fixture
def params():
    return noisy(parameters(MODEL), SPEC)


@pytest.fixture
def start():
    """A model of one layer with fresh adapters; training takes its arrays."""
    return jax.device_put(fresh())


@functools.cache
def fresh():
    return jax.device_get(jax.jit(lambda params: jlora.wrap(params, SPEC))(parameters(ONE_LAYER)))


def parameters(model):
    return weights(model.init, np.ones((1, 8), np.int32), np.ones((1, 8), bool))["params"]


@pytest.fixture
def adam_promotes():
    with jax.numpy_dtype_promotion("standard"):  # optax's bias correction raises a float to an integer count
        yield


def settings(*argv):
    return sentiment.parse(list(argv))


@pytest.mark.slow
@pytest.mark.usefixtures("adam_promotes")
def test_training_lowers_the_loss_and_moves_only_what_trains(start, data):
    frozen = jax.tree.map(np.array, jlora.partition(start)[1])
    with training.interrupt_flag() as stop:
        args = settings("--steps", "60", "--lr", "0.02")
        trained, history = training.train(ONE_LAYER, start, data, args, stop, lambda p: 0.5)
    assert np.mean(history.loss[-10:]) < np.mean(history.loss[:10])
    assert len(history.loss) == len(history.accuracy) == 60
    assert [step for step, _ in history.subset] == [10, 20, 30, 40, 50]
    jax.tree.map(np.testing.assert_array_equal, jlora.partition(trained)[1], frozen)
    assert training.accuracy(jax.jit(jlora.apply(ONE_LAYER.apply)), trained, data) > 0.6


@pytest.mark.slow
@pytest.mark.usefixtures("adam_promotes")
def test_ctrl_c_ends_training_after_the_step_under_way(start, data):
    before = signal.getsignal(signal.SIGINT)
    with training.interrupt_flag() as stop:
        signal.raise_signal(signal.SIGINT)
        args = settings("--steps", "60")
        trained, history = training.train(ONE_LAYER, start, data, args, stop, lambda p: 0.5)
    assert len(history.loss) == 1
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(trained))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts():
    with pytest.raises(KeyboardInterrupt), training.interrupt_flag():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_batches_take_each_row_once_an_epoch(data):
    rows = {name: np.arange(70) for name in data}
    epoch = np.concatenate([batch["ids"] for batch in training.batches(rows, 2, seed=0)])
    assert len(epoch) == len(set(epoch)) == 64
    assert len(list(training.batches(rows, 7, seed=0))) == 7


def test_in_batches_gives_every_row_once(data):
    shapes = set()

    def fn(variables, ids, mask):
        shapes.add(ids.shape)
        return ids[:, :1] * variables["params"]

    np.testing.assert_array_equal(training.in_batches(fn, 2, data), data["ids"][:, :1] * 2)
    few = {name: values[:3] for name, values in data.items()}
    np.testing.assert_array_equal(training.in_batches(fn, 2, few), few["ids"][:, :1] * 2)
    assert shapes == {(32, 8)}


@pytest.mark.parametrize("steps", [0, 1, 2, 30, 186])
def test_learning_rate(steps):
    rates = [float(training.learning_rate(1e-3, steps)(step)) for step in range(steps)]
    assert all(0 <= rate <= 1.001e-3 for rate in rates)
    assert steps < 30 or max(rates) == pytest.approx(1e-3, rel=0.1)


def test_an_adapter_is_resumed_from_its_files(params, tmp_path):
    jlora.peft.save(tmp_path / "adapter", params, names=sentiment.NAMES)
    plain = jlora.unwrap(params)
    plain["head"] = jax.tree.map(np.zeros_like, plain["head"])
    loaded = sentiment.adapt(plain, settings("--resume", str(tmp_path / "adapter")))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_an_adapter_that_does_not_fit(params, tmp_path):
    jlora.peft.save(tmp_path / "adapter", params, names=sentiment.NAMES)
    wider = Classifier(MiniLM(vocab=50, positions=16, width=16, heads=2, hidden=12, layers=2))
    with pytest.raises(sentiment.AdapterError, match="do not fit encoder/layer_0"):
        sentiment.adapt(parameters(wider), settings("--resume", str(tmp_path / "adapter")))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("no adapter")
    with pytest.raises(sentiment.AdapterError, match="safetensors"):
        sentiment.adapt(jlora.unwrap(params), settings("--resume", str(tmp_path / "adapter")))


def test_the_merged_model_is_read_back_as_it_was(params, tmp_path):
    jax.tree.map(np.testing.assert_array_equal, sentiment.export(tmp_path, params), jlora.merge(params))
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"bert.encoder.layer.1.attention.self.query.weight", "classifier.bias"} < names


def test_a_failed_write_keeps_the_file_that_was(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(aside):
        aside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        sentiment.written_aside(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_movie_sentences(tmp_path):
    text = "1\t2.5\tA gem.\r\n2\t-0.4\tSo so.\r\n3\t-3.0\tDull, à la carte. \r\n4\t2.5\tA gem.\r\n".encode()
    with tarfile.open(tmp_path / "ratings.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo(sentiment.RATINGS)
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
    assert sentiment.movie_sentences(tmp_path / "ratings.tar.gz") == [("A gem.", 1), ("Dull, à la carte.", 0)]


@pytest.mark.slow
def test_the_probe_separates_what_is_separable():
    x = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    labels = (x[:, 2] > 0.3).astype(np.int32)
    head = probe.fit_probe(x, labels, classes=2)
    assert ((x @ head["kernel"] + head["bias"]).argmax(-1) == labels).mean() > 0.95


def test_settings():
    args = settings()
    assert (args.train, args.held_out, args.steps, args.rank, args.lr) == (2000, 1000, 124, 8, 2e-3)
    assert len(args.sentences) >= 2
    assert settings("--quick").steps == 30
    assert settings("--quick", "--steps", "5").steps == 5
    assert settings("--epochs", "3", "Fine.").steps == 186


@pytest.mark.parametrize("argv", [["--rank", "0"], ["--rank", "many"], ["--epochs", "-1"], ["--rank", "385"]])
def test_settings_out_of_range(argv, capsys):
    with pytest.raises(SystemExit):
        settings(*argv)
    assert f"argument {argv[0]}: invalid whole number from" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [0, 1, 40])
def test_curves_are_drawn(tmp_path, steps):
    values = list(np.linspace(0.8, 0.2, steps))
    history = training.History(values, values, [(steps, 0.8)] if steps > 1 else [])
    plots.save_curves(tmp_path / "curves.png", history, probe=0.77, final=0.85)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_tokens_are_drawn_letter_by_letter_on_their_values():
    axes = Figure().subplots()
    picture = plots.draw_tokens(axes, ["To", " be", "\n", "or"], [1, -2, 0, 3], limit=3, columns=8)
    nan = np.nan
    expected = [[1, 1, -2, -2, -2, 0], [3, 3, nan, nan, nan, nan]]
    np.testing.assert_array_equal(np.ma.filled(picture.get_array(), nan), expected)
    assert "".join(text.get_text() for text in axes.texts) == "To be↵or"
    broken = plots.draw_tokens(axes, ["abcde"], [1], limit=3, columns=2)
    assert broken.get_array().shape == (3, 2)


def test_offline_is_one_paragraph_and_no_traceback(tmp_path, monkeypatch, capsys):
    env = {"JLORA_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert sentiment.main([]) == 1
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err and "\n\n" not in err.strip()
    assert re.search(r"^error: model\.safetensors and tokenizer\.json could not be fetched", err, re.M)


@pytest.mark.slow
def test_quick_run_end_to_end(tmp_path, downloads):
    argv = ["--quick", "A triumph.", "Dreadful."]
    done = subprocess.run(command(*argv), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"probe \d\d\.\d%", lines[-2]) and re.fullmatch(r"LoRA \d\d\.\d%", lines[-1])
    assert float(lines[-1][5:-1]) > float(lines[-2][6:-1]) > 60
    assert "predictions identical on 256/256 held-out sentences" in done.stdout
    assert re.search(r"^(positive|negative) +\d+\.\d%  A triumph\.$", done.stdout, re.M)
    out = tmp_path / "runs" / "sentiment"
    assert {path.name for path in out.iterdir()} == {"adapter", "merged", "curves.png"}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_size < 1.5e6


@pytest.mark.slow
def test_ctrl_c_saves_a_loadable_adapter(tmp_path, downloads):
    log = tmp_path / "err"
    with log.open("w") as err:
        run = subprocess.Popen(
            command("--quick", "--out", "here"),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
        )
    try:
        wait_for(r"training: .*[2-9]/30", log, run)
        run.send_signal(signal.SIGINT)
        out, _ = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 130
    assert re.search(r"stopped after \d+ of 30 steps; the adapter so far is in here/adapter", out)
    assert "Traceback" not in log.read_text()
    tree = {
        "encoder": load_params(fetch(MINILM)),
        "head": {"kernel": np.zeros((384, 2), np.float32), "bias": np.zeros(2, np.float32)},
    }
    loaded = sentiment.adapt(tree, settings("--resume", str(tmp_path / "here" / "adapter")))
    assert optax.tree.norm(loaded["encoder"]["layer_0"]["output"]["kernel"].lora_b) > 0


@pytest.fixture(scope="module")
def downloads():
    try:
        fetch(MINILM), fetch(MOVIES)
    except FetchError as error:
        pytest.skip(f"model or data could not be downloaded: {error}")


def command(*argv):
    return [sys.executable, "-m", "jlora.examples.sentiment", *argv]


def environment(**changed):
    # Without the several devices that the test run may have asked JAX for.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | changed


def wait_for(pattern, log, run):
    deadline = time.monotonic() + 300
    while not re.search(pattern, log.read_text()):
        assert run.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
