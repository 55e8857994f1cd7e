"""LoRA for `flax.nnx`: a module that is called and trained as the model was, its adapters `nnx.LoRAParam` variables.

The training loop of the full fine-tune stays as it is, but for the variables that it names::

    model = jlora.nnx.wrap(model, jlora.LoraSpec(rank=8))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch)
    optimizer.update(model, grads)
"""

from jlora.nnx.module import Adapted, Part
from jlora.nnx.variables import FrozenParam
from jlora.nnx.verbs import merge, sites, tree, unwrap, update, wrap

__all__ = ["Adapted", "FrozenParam", "Part", "merge", "sites", "tree", "unwrap", "update", "wrap"]
