"""EfficientNet-Lite0, a small convolutional network, in plain Flax linen: the model, its weights, its input.

Every normalisation uses the statistics of pretraining: they are inputs of the model, which nothing here changes.

References:
  Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", arXiv:1905.11946;
  Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv:1801.04381: the blocks;
  https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite: ReLU6, no squeeze-and-excitation.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jlora.peft.pickled import state_dict

FILE = "efficientnet-lite0-57934424.pth"
SIZE = 224


class Stage(NamedTuple):
    """Blocks alike: of these, the first has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    features: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def conv(features: int, kernel: int, name: str, stride: int = 1) -> nn.Conv:
    """Returns a convolution without a bias, since a normalisation follows."""
    return nn.Conv(features, (kernel, kernel), stride, "SAME", use_bias=False, name=f"{name}_conv")


class Depthwise(nn.Module):
    """`nn.Conv(channels, (kernel, kernel), stride, "SAME", feature_group_count=channels, use_bias=False)`.

    A sum of shifted images: XLA on the CPU takes some thirty times as long for the grouped convolution.
    """

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, stride = self.kernel, self.stride
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (size, size, 1, x.shape[-1]))
        pads = jax.lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        rows, columns = (n - size + 1 for n in x.shape[1:3])
        shifted = lambda i, j: x[:, i : i + rows : stride, j : j + columns : stride] * kernel[i, j, 0]
        first, *more = (shifted(i, j) for i in range(size) for j in range(size))
        return sum(more, first)


def norm(name: str) -> nn.BatchNorm:
    """Returns a normalisation by the stored statistics."""
    return nn.BatchNorm(use_running_average=True, epsilon=1e-3, name=f"{name}_norm")


class Block(nn.Module):
    """An inverted residual over (batch, height, width, channels): 1x1 up, k x k on each channel alone, 1x1 down."""

    kernel: int
    stride: int
    expansion: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y, hidden = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            y = nn.relu6(norm("expand")(conv(hidden, 1, "expand")(y)))
        y = nn.relu6(norm("depthwise")(Depthwise(self.kernel, self.stride, name="depthwise_conv")(y)))
        y = norm("project")(conv(self.features, 1, "project")(y))
        return x + y if x.shape == y.shape else y


class Trunk(nn.Module):
    """Images (batch, height, width, 3) with values from -1 to 1, to features (batch, top)."""

    stages: tuple[Stage, ...] = STAGES
    stem: int = 32
    top: int = 1_280

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu6(norm("stem")(conv(self.stem, 3, "stem", stride=2)(x)))
        for i, (kernel, stride, expansion, features) in enumerate(blocks(self.stages)):
            x = Block(kernel, stride, expansion, features, name=f"block_{i}")(x)
        return nn.relu6(norm("top")(conv(self.top, 1, "top")(x))).mean((1, 2))


class EfficientNet(nn.Module):
    """The trunk with a linear head: images to logits (batch, classes)."""

    trunk: Trunk = Trunk()
    classes: int = 1_000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.classes, name="head")(self.trunk(x))


def blocks(stages: tuple[Stage, ...]) -> Iterator[tuple[int, int, int, int]]:
    """Yields kernel, stride, expansion and features of each block."""
    for stage in stages:
        for i in range(stage.blocks):
            yield stage.kernel, stage.stride if i == 0 else 1, stage.expansion, stage.features


def load_variables(folder: Path) -> dict[str, Any]:
    """Returns `params` and `batch_stats` of the pretrained `EfficientNet()`."""
    return variables_from_torch(state_dict(folder / FILE), STAGES)


def variables_from_torch(tensors: Mapping[str, np.ndarray], stages: tuple[Stage, ...]) -> dict[str, Any]:
    """Returns linen variables from tensors named as `efficientnet_lite_pytorch` names them.

    PyTorch keeps a convolution's weight as (out, in, height, width), Flax as (height, width, in, out).
    """

    def take(parts: Mapping[str, tuple[str, str]], prefix: str) -> tuple[dict, dict]:
        kernels = {f"{new}_conv": {"kernel": hwio(tensors[f"{prefix}{old}.weight"])} for new, (old, _) in parts.items()}
        of = lambda names: {
            f"{new}_norm": {name: tensors[f"{prefix}{bn}.{torch}"] for name, torch in names.items()}
            for new, (_, bn) in parts.items()
        }
        return kernels | of({"scale": "weight", "bias": "bias"}), of({"mean": "running_mean", "var": "running_var"})

    params, stats = take({"stem": ("_conv_stem", "_bn0"), "top": ("_conv_head", "_bn1")}, "")
    for i, (_, _, expansion, _) in enumerate(blocks(stages)):
        parts = {"depthwise": ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")}
        parts |= {"expand": ("_expand_conv", "_bn0")} if expansion > 1 else {}
        params[f"block_{i}"], stats[f"block_{i}"] = take(parts, f"_blocks.{i}.")
    head = {"kernel": np.ascontiguousarray(tensors["_fc.weight"].T), "bias": tensors["_fc.bias"]}
    return {"params": {"trunk": params, "head": head}, "batch_stats": {"trunk": stats}}


def hwio(weight: np.ndarray) -> np.ndarray:
    """Returns a convolution's kernel in Flax's layout from PyTorch's."""
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0))


def preprocess(photo: np.ndarray, size: int = SIZE) -> jax.Array:
    """Returns a photo (height, width, 3) of values 0 to 255 as the model's input (1, size, size, 3), squeezed whole."""
    resized = jax.image.resize(photo.astype(np.float32), (size, size, 3), "cubic")
    return (jnp.clip(resized, 0, 255)[None] - 127) / 128
