"""jlora's adapter files against PEFT itself; runs where torch, peft and transformers are installed."""

import jax.numpy as jnp
import numpy as np
import pytest

import jlora

torch = pytest.importorskip("torch", reason="the oracle needs torch, peft and transformers")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft import PeftModel  # noqa: E402

from tests.peft_files.torch_models import CASES, inputs, merged_weights  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def nested(state: dict) -> dict:
    """A state dict as a tree nested by '.'."""
    tree: dict = {}
    for name, value in state.items():
        *names, last = name.split(".")
        node = tree
        for part in names:
            node = node.setdefault(part, {})
        node[last] = jnp.asarray(value)
    return tree


def flat(tree: dict) -> dict:
    paths, leaves, _ = jlora.targets.paths.flatten(tree)
    return {path.replace("/", "."): np.asarray(leaf) for path, leaf in zip(paths, leaves, strict=True)}


def base_state(model) -> dict:
    """The weights of the model without its adapter, by their names; a tied head is left out."""
    state = {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False) and hasattr(model, "lm_head"):
        state.pop("lm_head.weight", None)
    return state


def files(case, tmp_path):
    """PEFT's model, its base's weights, and the directory that it was saved to."""
    torch.manual_seed(0)
    base = base_state(case.model())
    model = case.make()
    model.save_pretrained(tmp_path / "theirs")
    return model, base, tmp_path / "theirs"


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_peft_gives_its_merged_weights(name, tmp_path):
    model, base, directory = files(CASES[name], tmp_path)
    tree = jlora.peft.load(directory, nested(base))
    wanted = merged_weights(model)
    if name == "tied":  # PEFT adds the update of a table that is the head too twice
        table = "model.embed_tokens.weight"
        wanted[table] = (wanted[table] + base[table]) / 2
    for weight, value in flat(jlora.merge(tree)).items():
        np.testing.assert_allclose(value, wanted[weight], atol=2e-6, rtol=1e-5, err_msg=weight)


@pytest.mark.parametrize("name", CASES)
def test_peft_reads_our_files(name, tmp_path):
    case = CASES[name]
    model, base, directory = files(case, tmp_path)
    tree = jlora.peft.load(directory, nested(base))
    jlora.peft.save(tmp_path / "ours", tree)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(case.model(), tmp_path / "ours")
    model.eval(), again.eval()
    given = inputs(model)
    with torch.no_grad():
        np.testing.assert_allclose(again(**given).logits.numpy(), model(**given).logits.numpy(), atol=2e-5)
