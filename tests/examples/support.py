"""Numbers for the parameters of small models: nothing is drawn or compiled for them."""

import jax
import numpy as np


def weights(init, *args):
    """The variables that a module's `init` makes: noise in kernels, values near one in vectors."""
    rng = np.random.default_rng(0)
    noise = lambda x: 0.4 * rng.normal(size=x.shape) if x.ndim > 1 else rng.uniform(0.5, 1.5, x.shape)
    return jax.tree.map(lambda x: noise(x).astype(x.dtype), jax.eval_shape(init, jax.random.key(0), *args))
