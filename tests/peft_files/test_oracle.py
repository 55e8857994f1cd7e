"""jlora's adapter files against PEFT itself; runs where torch, peft and transformers are installed."""

import jax.numpy as jnp
import numpy as np
import pytest

import jlora

torch = pytest.importorskip("torch", reason="the oracle needs torch, peft and transformers")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from tests.peft_files.torch_models import CASES, Case, inputs, llama, merged_weights  # noqa: E402

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


BINS = {
    "float32": ("patterns", torch.float32),
    "float16": ("plain", torch.float16),
    "bfloat16": ("alpha", torch.bfloat16),
    "dora": ("dora", torch.float32),
    "saved": ("save-norms", torch.float32),
    "conv": ("conv", torch.float16),
    "rows": ("tokens", torch.bfloat16),
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name, dtype", BINS.values(), ids=BINS)
def test_a_bin_of_torch_gives_pefts_merged_weights(name, dtype, is_zip, tmp_path):
    """As PEFT before 0.5 wrote it, with parameters among the tensors, and views of others."""
    case = CASES[name]
    _, base, directory = files(case, tmp_path)
    weights = directory / "adapter_model.safetensors"
    state = {key: value.to(dtype) for key, value in load_file(weights).items()}
    stored = {key: value.T.contiguous().T if i % 2 else torch.nn.Parameter(value)
              for i, (key, value) in enumerate(state.items())}  # fmt: skip
    torch.save(stored, directory / "adapter_model.bin", _use_new_zipfile_serialization=is_zip)
    weights.unlink()
    model = PeftModel.from_pretrained(base_of(case), directory)
    wanted = merged_weights(model)
    for weight, value in flat(jlora.merge(jlora.peft.load(directory, nested(base)))).items():
        np.testing.assert_allclose(value, wanted[weight], atol=2e-6, rtol=1e-5, err_msg=weight)


def base_of(case):
    torch.manual_seed(0)
    return case.model()


QUERY = {"r": 2, "target_modules": ["q_proj"]}
BOTH, TIED = {"modules_to_save": ["embed_tokens", "lm_head"]}, {"ensure_weight_tying": True}
# A model whose vocabulary grew from 50 to 53: whether it is tied, its adapter, and whether PEFT saves all tables.
GROWN = {
    "tables beside": (False, QUERY, True),
    "tables beside, tied": (True, QUERY, True),
    "saved modules": (False, QUERY | BOTH, False),
    "saved modules and tables": (False, QUERY | BOTH, True),
    "one saved module": (False, QUERY | {"modules_to_save": ["embed_tokens"]}, True),
    "tied table": (True, QUERY | TIED | {"modules_to_save": ["embed_tokens"]}, False),
    "tied head": (True, QUERY | TIED | {"modules_to_save": ["lm_head"]}, False),
    "tied both": (True, QUERY | TIED | BOTH, False),
    "adapted table": (False, {"r": 2, "target_modules": ["q_proj", "embed_tokens"]}, True),
    "adapted tables": (False, {"r": 2, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}, True),
    "adapted head": (False, {"r": 2, "target_modules": ["q_proj", "lm_head"]}, True),
    "tokens and tables, tied": (True, QUERY | {"trainable_token_indices": [50, 51, 52]}, True),
    "tokens and tables": (False, QUERY | {"trainable_token_indices": [50, 51, 52]}, True),
}


@pytest.mark.parametrize("name", GROWN)
def test_an_adapter_with_added_tokens(name, tmp_path):
    """Onto the model as it was resized, and onto the one before, whose new rows are then the adapter's."""
    is_tied, settings, with_tables = GROWN[name]
    torch.manual_seed(0)
    small = base_state(llama(is_tied))

    def grown():
        torch.manual_seed(0)
        base = llama(is_tied)
        base.resize_token_embeddings(53)
        return base

    case = Case(grown, settings)
    large = base_state(grown())
    model = case.make()
    state = {
        name.replace(".base_layer", ""): x.detach().numpy() for name, x in model.get_base_model().named_parameters()
    }
    large |= {name: state[name].copy() for name in large if name in state}
    model.save_pretrained(tmp_path, save_embedding_layers=with_tables)
    wanted = merged_weights(model)
    for before in (large, small):
        tree = nested(before)
        if before is small:
            with pytest.raises(ValueError, match=r"53 rows of .*resize_tables"):
                jlora.peft.load(tmp_path, tree)
            if name in ("adapted table", "adapted head"):
                with pytest.raises(ValueError, match=r"no values of (lm_head|model.embed_tokens), which has as many"):
                    jlora.peft.resize_tables(tree, tmp_path)
                continue
            tree = jlora.peft.resize_tables(tree, tmp_path)
        found = flat(jlora.merge(jlora.peft.load(tmp_path, tree)))
        assert found.keys() == before.keys()
        for weight, value in found.items():
            np.testing.assert_allclose(value, wanted[weight], atol=2e-6, rtol=1e-5, err_msg=weight)


class Tabled(torch.nn.Module):
    """A model whose table has a name that tells little, beside a linear layer with one that tells a table."""

    def __init__(self):
        super().__init__()
        self.emb, self.patch_embed = torch.nn.Embedding(9, 6), torch.nn.Linear(6, 6, bias=False)

    def forward(self, ids):
        return self.patch_embed(self.emb(ids))


@pytest.mark.parametrize("targets", [["emb"], ["patch_embed"], ["emb", "patch_embed"]])
def test_a_table_of_any_name_comes_back(targets, tmp_path):
    """PEFT's file, loaded and saved again, is PEFT's file of the same function."""
    case = Case(Tabled, {"r": 2, "target_modules": targets})
    torch.manual_seed(0)
    base = {name: x.detach().numpy().copy() for name, x in Tabled().state_dict().items()}
    model = case.make()
    model.save_pretrained(tmp_path / "theirs")
    jlora.peft.save(tmp_path / "ours", jlora.peft.load(tmp_path / "theirs", nested(base)))
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Tabled(), tmp_path / "ours")
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.arange(9)).numpy(), model(torch.arange(9)).numpy(), atol=1e-6)
    wanted = merged_weights(model)
    for name, value in flat(jlora.merge(jlora.peft.load(tmp_path / "ours", nested(base)))).items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-6)
