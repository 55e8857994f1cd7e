"""Tests of the MiniLM port: shapes and padding on random weights, and the pretrained model's known cosines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.examples import minilm
from jlora.examples.fetch import MINILM, FetchError, fetch
from tests.examples.support import weights

TINY = minilm.MiniLM(vocab=50, positions=16, width=8, heads=2, hidden=12, layers=2)


def inputs(lengths, padded):
    ids = np.random.default_rng(0).integers(1, 50, (len(lengths), padded), np.int32)
    mask = np.arange(padded) < np.array(lengths)[:, None]
    return ids * mask, mask


@pytest.fixture(scope="module")
def tiny_params():
    return weights(TINY.init, *inputs([3, 4], 8))["params"]


@pytest.fixture(scope="module")
def folder():
    try:
        return fetch(MINILM)
    except FetchError as error:
        pytest.skip(f"the model could not be downloaded: {error}")


def test_encoder_gives_a_vector_a_text(tiny_params):
    vectors = jax.eval_shape(TINY.apply, {"params": tiny_params}, *inputs([8, 3, 5], 8))
    assert vectors.shape == (3, 8) and vectors.dtype == jnp.float32


def test_padding_changes_nothing(tiny_params):
    ids, mask = inputs([5, 5], 8)
    encode = jax.jit(TINY.apply)
    short = encode({"params": tiny_params}, ids[:, :5], mask[:, :5])
    long = encode({"params": tiny_params}, np.where(mask, ids, 7), mask)
    np.testing.assert_allclose(short, long, atol=1e-5)


def test_classifier_gives_logits():
    model = minilm.Classifier(TINY, classes=3)
    variables = weights(model.init, *inputs([3, 4], 8))
    assert jax.eval_shape(model.apply, variables, *inputs([3, 4], 8)).shape == (2, 3)
    assert set(variables["params"]) == {"encoder", "head"}


def test_parameter_count_of_the_real_sizes():
    shapes = jax.eval_shape(minilm.MiniLM().init, jax.random.key(0), *inputs([3], 8))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 22_565_376


def test_weights_land_where_the_module_has_them(tiny_params):
    params = minilm.params_from_bert(bert_tensors(), layers=2)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, tiny_params)
    kernel = params["layer_1"]["intermediate"]["kernel"]
    np.testing.assert_array_equal(kernel, bert_tensors()["encoder.layer.1.intermediate.dense.weight"].T)


def bert_tensors(width=8, hidden=12):
    rng = np.random.default_rng(0)
    linears = {f"attention.self.{part}": (width, width) for part in ("query", "key", "value")} | {
        "attention.output.dense": (width, width),
        "intermediate.dense": (hidden, width),
        "output.dense": (width, hidden),
    }
    shapes = {f"encoder.layer.{i}.{name}.weight": shape for i in range(2) for name, shape in linears.items()}
    norms = ["embeddings.LayerNorm"]
    norms += [f"encoder.layer.{i}.{part}.LayerNorm" for i in range(2) for part in ("attention.output", "output")]
    shapes |= {f"{name}.weight": (width,) for name in norms}
    shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    tables = {"word": 50, "position": 16, "token_type": 2}
    shapes |= {f"embeddings.{name}_embeddings.weight": (rows, width) for name, rows in tables.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "sentences, cosines",
    [
        (
            ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."],
            {(0, 1): 0.6660, (0, 2): 0.1046, (1, 2): 0.1411},
        ),
        (
            ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"],
            {(0, 1): 0.6946, (0, 2): 0.9429, (0, 3): 0.2569},
        ),
    ],
)
def test_cosines_of_the_pretrained_model(folder, sentences, cosines):
    vectors = minilm.embed(minilm.load_params(folder), minilm.load_tokenizer(folder), sentences)
    found = vectors @ vectors.T
    assert {pair: round(float(found[pair]), 4) for pair in cosines} == cosines
