"""Scikit-learn's handwritten digits and its two photographs, without scikit-learn.

References:
  Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

import gzip
from pathlib import Path

import jax
import numpy as np


def load_digits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the 1,797 images (n, 8, 8), values 0 to 1, and their labels (n,)."""
    with gzip.open(folder / "digits.csv.gz", "rt") as file:
        rows = np.loadtxt(file, np.float32, delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8) / 16, rows[:, -1].astype(np.int32)


def enlarged(images: np.ndarray, size: int = 64) -> np.ndarray:
    """Returns grey images (n, height, width) from 0 to 1 as a photo model's input: (n, size, size, 3) from -1 to 1."""
    large = jax.image.resize(images, (len(images), size, size), "linear")
    return np.repeat(np.asarray(2 * large - 1)[..., None], 3, axis=-1)


def shifted(images: np.ndarray, seed: int, most: int = 5) -> np.ndarray:
    """Returns the images (n, size, size, 3), each moved by up to `most` pixels along each side, on black."""
    moves = np.random.default_rng(seed).integers(0, 2 * most + 1, (len(images), 2))
    framed = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), constant_values=-1)
    height, width = images.shape[1:3]
    return np.stack([x[i : i + height, j : j + width] for x, (i, j) in zip(framed, moves, strict=True)])
