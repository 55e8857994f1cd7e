"""Ready maps from PyTorch's names, those of Hugging Face's models, to the paths of common JAX implementations.

A map may name leaves that a tree lacks. Trees whose modules have PyTorch's names, such as those of Transformers' Flax
models (``model/layers/0/self_attn/q_proj/kernel``), need none.

References:
  MaxText's ``param_mapping.py`` (AI-Hypercomputer/maxtext), Gemma's ``gm/nn`` (google-deepmind/gemma), Tunix's
  ``models/*/params.py`` (google/tunix), ``big_vision/models/vit.py`` (google-research/big_vision).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jlora.peft.names import Entry, Layout

OUT_HEADS, IN_HEADS = Layout("in out out"), Layout("in in out")
Q_EINSUM, EXPERTS = Layout("out in out"), Layout("batch in out")
QUERY_SCALED = Layout("in out out", scale="rsqrt_head")
QUERY_ROPE, KEY_ROPE = Layout("in out out", rope=True, scale="rsqrt_head"), Layout("in out out", rope=True)


def _within(theirs: str, ours: str, entries: Iterable[Entry], index: str = "") -> list[Entry]:
    """Entries under prefixes on both sides, with an index behind each path."""
    return [(theirs + e[0], ours + e[1] + index, *e[2:]) for e in entries]  # type: ignore[misc]


_ATTENTION = "(self_attn|self_attention|attention|attn)/"
_LLAMA_LAYER: list[Entry] = [
    ("self_attn.q_proj", _ATTENTION + "(q_proj|query|query_proj|q|wq)/(kernel|w)"),
    ("self_attn.k_proj", _ATTENTION + "(k_proj|key|key_proj|k|wk)/(kernel|w)"),
    ("self_attn.v_proj", _ATTENTION + "(v_proj|value|value_proj|v|wv)/(kernel|w)"),
    ("self_attn.o_proj", _ATTENTION + "(o_proj|out|out_proj|output|o|wo)/(kernel|w)"),
    ("self_attn.q_norm", _ATTENTION + "(q_norm|query_norm)/(scale|weight|w)"),
    ("self_attn.k_norm", _ATTENTION + "(k_norm|key_norm)/(scale|weight|w)"),
    ("mlp.gate_proj", "(mlp|feed_forward|ffn)/(gate_proj|gate|wi_0|w1)/(kernel|w)"),
    ("mlp.up_proj", "(mlp|feed_forward|ffn)/(up_proj|up|wi_1|w3)/(kernel|w)"),
    ("mlp.down_proj", "(mlp|feed_forward|ffn)/(down_proj|down|wo|w2)/(kernel|w)"),
    ("input_layernorm", "(input_layernorm|attention_norm|pre_attention_norm|attn_norm|norm1)/(scale|weight|w)"),
    ("post_attention_layernorm", "(post_attention_layernorm|mlp_norm|ffn_norm|pre_ffw_norm|norm2)/(scale|weight|w)"),
]
_EXPERT_LAYER: list[Entry] = [
    ("mlp.gate", "(moe|mlp|block_sparse_moe)/(gate|router)/(kernel|w)"),
    ("mlp.experts.gate_up_proj[0/2]", "(moe|mlp|block_sparse_moe)/(experts/|)(wi_0|w1|gate_proj)(/kernel|)", EXPERTS),
    ("mlp.experts.gate_up_proj[1/2]", "(moe|mlp|block_sparse_moe)/(experts/|)(wi_1|w3|up_proj)(/kernel|)", EXPERTS),
    ("mlp.experts.down_proj", "(moe|mlp|block_sparse_moe)/(experts/|)(wo|w2|down_proj)(/kernel|)", EXPERTS),
]
_ROOTS, _STACKS = "(model/|transformer/|decoder/|)", "(layers|layer|blocks|block|h)/"
_NUMBERED = "(layers_|layers/|layer_|blocks_|blocks/|block_|h_|h/){i}/"


def _decoder(entries: Iterable[Entry]) -> list[Entry]:
    """A decoder with numbered layers, or with layers stacked on the first axis."""
    entries = list(entries)
    return [
        *_within("model.layers.{i}.", _ROOTS + _NUMBERED, entries),
        *_within("model.layers.{i}.", _ROOTS + _STACKS, entries, "[{i}]"),
        ("model.embed_tokens", _ROOTS + "(embed_tokens|embed|embedder|embedding|tok_embeddings|wte)/embedding"),
        ("model.norm", _ROOTS + "(norm|final_norm|ln_f)/(scale|weight|w)"),
        ("lm_head", "(model/|transformer/|decoder/|)(lm_head|output|head)/(kernel|w)"),
    ]


def _maxtext(attention: Mapping[str, Layout], mlp: Iterable[Entry], norms: bool = True) -> list[Entry]:
    """MaxText's decoder: numbered layers, or layers stacked on the second axis.

    Gemma's norms are left out, since their scales are PyTorch's plus one there.
    """
    layer: list[Entry] = [
        ("self_attn.q_proj", "self_attention/query/kernel", attention["query"]),
        ("self_attn.k_proj", "self_attention/key/kernel", attention["key"]),
        ("self_attn.v_proj", "self_attention/value/kernel", OUT_HEADS),
        ("self_attn.o_proj", "self_attention/out/kernel", IN_HEADS),
        *mlp,
    ]
    if norms:
        layer += [
            ("self_attn.q_norm", "self_attention/query_norm/scale"),
            ("self_attn.k_norm", "self_attention/key_norm/scale"),
            ("input_layernorm", "pre_self_attention_layer_norm/scale"),
            ("post_attention_layernorm", "post_self_attention_layer_norm/scale"),
        ]
    return [
        *_within("model.layers.{i}.", "decoder/layers_{i}/", layer),
        *_within("model.layers.{i}.", "decoder/layers/", layer, "[:, {i}]"),
        ("lm_head", "decoder/logits_dense/kernel"),
        *([("model.norm", "decoder/decoder_norm/scale")] if norms else []),
    ]


_MAXTEXT_TABLE: Entry = ("model.embed_tokens", "token_embedder/embedding")
_MAXTEXT_GEMMA_TABLE: Entry = ("model.embed_tokens", "token_embedder/embedding", Layout(scale="sqrt_features"))
_MAXTEXT_MLP: list[Entry] = [
    ("mlp.gate_proj", "mlp/wi_0/kernel"),
    ("mlp.up_proj", "mlp/wi_1/kernel"),
    ("mlp.down_proj", "mlp/wo/kernel"),
]
_PLAIN = {"query": OUT_HEADS, "key": OUT_HEADS}
_SCALED = {"query": QUERY_SCALED, "key": OUT_HEADS}
_ROPE = {"query": QUERY_ROPE, "key": KEY_ROPE}


def _maxtext_experts(block: str) -> list[Entry]:
    return [
        ("mlp.gate", f"{block}/gate/kernel"),
        ("mlp.experts.gate_up_proj[0/2]", f"{block}/wi_0", EXPERTS),
        ("mlp.experts.gate_up_proj[1/2]", f"{block}/wi_1", EXPERTS),
        ("mlp.experts.down_proj", f"{block}/wo", EXPERTS),
    ]


def _maxtext_gemma2() -> list[Entry]:
    """Of Gemma 2 each of MaxText's layers is two: one with local attention, one with global."""
    entries: list[Entry] = [_MAXTEXT_GEMMA_TABLE]
    for kind, which in (("local", 0), ("global", 1)):
        layer: list[Entry] = [
            ("self_attn.q_proj", f"self_attention_{kind}/query/kernel", QUERY_SCALED),
            ("self_attn.k_proj", f"self_attention_{kind}/key/kernel", OUT_HEADS),
            ("self_attn.v_proj", f"self_attention_{kind}/value/kernel", OUT_HEADS),
            ("self_attn.o_proj", f"self_attention_{kind}/out/kernel", IN_HEADS),
            ("mlp.gate_proj", f"mlp_{kind}/wi_0/kernel"),
            ("mlp.up_proj", f"mlp_{kind}/wi_1/kernel"),
            ("mlp.down_proj", f"mlp_{kind}/wo/kernel"),
        ]
        for pair in range(32):
            theirs = f"model.layers.{2 * pair + which}."
            entries += _within(theirs, f"decoder/layers_{pair}/", layer)
            entries += _within(theirs, "decoder/layers/", layer, f"[:, {pair}]")
    return entries


def _gemma(mlp: Iterable[Entry], layer: str) -> list[Entry]:
    """Gemma's own attention, whose keys and values are one leaf."""
    entries: list[Entry] = [
        ("self_attn.q_proj", "attn/q_einsum/w", Q_EINSUM),
        ("self_attn.k_proj", "attn/kv_einsum/w[0]", Q_EINSUM),
        ("self_attn.v_proj", "attn/kv_einsum/w[1]", Q_EINSUM),
        ("self_attn.q_proj", "attn/qkv_einsum/w[0]", Q_EINSUM),
        ("self_attn.k_proj", "attn/qkv_einsum/w[1]", Q_EINSUM),
        ("self_attn.v_proj", "attn/qkv_einsum/w[2]", Q_EINSUM),
        ("self_attn.o_proj", "attn/attn_vec_einsum/w", IN_HEADS),
        ("self_attn.q_norm", "attn/_query_norm/scale"),
        ("self_attn.k_norm", "attn/_key_norm/scale"),
        ("input_layernorm", "pre_attention_norm/scale"),
        *mlp,
    ]
    return [
        *_within("model.layers.{i}.", f"(transformer/|){layer}", entries),
        ("model.embed_tokens", "(transformer/|)embedder/input_embedding"),
        ("model.norm", "(transformer/|)final_norm/scale"),
    ]


def _gemma_mlp(turned: bool) -> list[Entry]:
    gating = Layout("out in") if turned else Layout("in out")
    return [
        ("mlp.gate_proj", "mlp/gating_einsum(/w|)[0]", gating),
        ("mlp.up_proj", "mlp/gating_einsum(/w|)[1]", gating),
        ("mlp.down_proj", "mlp/linear(/w|)", Layout("in out")),
    ]


_TUNIX_LAYER: list[Entry] = [
    ("self_attn.q_proj", "attn/q_proj/w", OUT_HEADS),
    ("self_attn.k_proj", "attn/k_proj/w", OUT_HEADS),
    ("self_attn.v_proj", "attn/v_proj/w", OUT_HEADS),
    ("self_attn.o_proj", "attn/o_proj/w", IN_HEADS),
    ("self_attn.q_norm", "attn/q_norm/w"),
    ("self_attn.k_norm", "attn/k_norm/w"),
    ("mlp.gate_proj", "mlp/gate_proj/kernel"),
    ("mlp.up_proj", "mlp/up_proj/kernel"),
    ("mlp.down_proj", "mlp/down_proj/kernel"),
    ("mlp.gate", "mlp/router/kernel"),
    ("mlp.experts.gate_up_proj[0/2]", "mlp/gate_proj", EXPERTS),
    ("mlp.experts.gate_up_proj[1/2]", "mlp/up_proj", EXPERTS),
    ("mlp.experts.down_proj", "mlp/down_proj", EXPERTS),
    ("input_layernorm", "input_layernorm/w"),
    ("post_attention_layernorm", "post_attention_layernorm/w"),
]
_TUNIX: list[Entry] = [
    *_within("model.layers.{i}.", "layers/{i}/", _TUNIX_LAYER),
    ("model.embed_tokens", "embedder/input_embedding"),
    ("model.norm", "final_norm/w"),
    ("lm_head", "lm_head/w"),
]

_BERT_LAYER: list[Entry] = [
    ("attention.self.query", "attention/(self/|)query/kernel"),
    ("attention.self.key", "attention/(self/|)key/kernel"),
    ("attention.self.value", "attention/(self/|)value/kernel"),
    ("attention.output.dense", "attention/(output/dense|output|out)/kernel"),
    ("attention.output.LayerNorm", "(attention/output/LayerNorm|attention_norm|attention_layer_norm)/scale"),
    ("intermediate.dense", "(intermediate/dense|intermediate|mlp/Dense_0|mlp/up)/kernel"),
    ("output.dense", "(output/dense|output|mlp/Dense_1|mlp/down)/kernel"),
    ("output.LayerNorm", "(output/LayerNorm|output_norm|output_layer_norm)/scale"),
]


def _bert(prefix: str = "") -> list[Entry]:
    roots, layers = "(bert/|encoder/|)(encoder/|)", "(layer_|layers_|layer/|layers/)"
    tables = "(bert/|encoder/|)(embeddings/|)"
    return [
        *_within(f"{prefix}encoder.layer.{{i}}.", roots + layers + "{i}/", _BERT_LAYER),
        *_within(f"{prefix}encoder.layer.{{i}}.", roots + "(layers|layer)/", _BERT_LAYER, "[{i}]"),
        (f"{prefix}embeddings.word_embeddings", tables + "(word_embeddings|words|word)/embedding"),
        (f"{prefix}embeddings.position_embeddings", tables + "(position_embeddings|positions|position)/embedding"),
        (f"{prefix}embeddings.token_type_embeddings", tables + "(token_type_embeddings|types|type)/embedding"),
        (f"{prefix}embeddings.LayerNorm", tables + "(LayerNorm|norm|layer_norm)/scale"),
        (f"{prefix}pooler.dense", "(bert/|encoder/|)pooler(/dense|)/kernel"),
        *([("classifier", "(classifier|head)/kernel")] if prefix else []),
    ]


_VIT_BLOCK = "(MultiHeadDotProductAttention_0|MultiHeadDotProductAttention_1|attention|attn|self_attention)"
_VIT_LAYER: list[Entry] = [
    ("attention.q_proj", _VIT_BLOCK + "/query/kernel"),
    ("attention.k_proj", _VIT_BLOCK + "/key/kernel"),
    ("attention.v_proj", _VIT_BLOCK + "/value/kernel"),
    ("attention.o_proj", _VIT_BLOCK + "/out/kernel"),
    ("mlp.fc1", "(MlpBlock_0|MlpBlock_3|mlp)/(Dense_0|fc1|up)/kernel"),
    ("mlp.fc2", "(MlpBlock_0|MlpBlock_3|mlp)/(Dense_1|fc2|down)/kernel"),
    ("layernorm_before", "(LayerNorm_0|layernorm_before|norm1)/scale"),
    ("layernorm_after", "(LayerNorm_1|LayerNorm_2|layernorm_after|norm2)/scale"),
]


def _vit() -> list[Entry]:
    roots = "(Transformer/|encoder/|vit/|)"
    return [
        *_within("vit.layers.{i}.", roots + "(encoderblock_|layers_|layers/|block_|blocks/){i}/", _VIT_LAYER),
        *_within("vit.layers.{i}.", roots + "(encoderblock|layers|blocks)/", _VIT_LAYER, "[{i}]"),
        ("vit.embeddings.patch_embeddings.projection", "(embedding|patch_embeddings/projection|patch_embed)/kernel"),
        ("vit.layernorm", roots + "(encoder_norm|layernorm|norm)/scale"),
        ("classifier", "(head|classifier)/kernel"),
    ]


_GPT2_LAYER: list[Entry] = [
    ("attn.c_attn", "attn/c_attn/kernel"),
    ("attn.c_proj", "attn/c_proj/kernel"),
    ("mlp.c_fc", "mlp/c_fc/kernel"),
    ("mlp.c_proj", "mlp/c_proj/kernel"),
    ("ln_1", "ln_1/scale"),
    ("ln_2", "ln_2/scale"),
]


def _gpt2(layout: Layout) -> list[Entry]:
    layer: list[Entry] = [(e[0], e[1], layout) if e[1].endswith("kernel") else e for e in _GPT2_LAYER]
    return [
        *_within("transformer.h.{i}.", "(transformer/|)(h/|h_|blocks/|block_){i}/", layer),
        *_within("transformer.h.{i}.", "(transformer/|)(h|blocks)/", layer, "[{i}]"),
        ("transformer.wte", "(transformer/|)wte/embedding"),
        ("transformer.wpe", "(transformer/|)wpe/embedding"),
        ("transformer.ln_f", "(transformer/|)ln_f/scale"),
        ("lm_head", "lm_head/kernel"),
    ]


_LLAMA = _decoder(_LLAMA_LAYER)
#: The ready maps by their names, such as ``"llama"``, which `load` and others take as `names`. Each is a list of pairs:
#: a name of PyTorch's, and the path of a leaf; a third entry is a `Layout`.
NAMES: dict[str, list[Entry]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen": _LLAMA,
    "gemma": _gemma(_gemma_mlp(False), "layer_{i}/"),
    "gemma3": _gemma(_gemma_mlp(True), "layer_{i}/"),
    "mixtral": _decoder([*_LLAMA_LAYER, *_EXPERT_LAYER]),
    "bert": _bert(),
    "bert-classifier": _bert("bert."),
    "vit": _vit(),
    "gpt2": _gpt2(Layout("in out", conv1d=True)),
    "transformers-gpt2": _gpt2(Layout("out in", conv1d=True)),
    "maxtext-llama": [_MAXTEXT_TABLE, *_maxtext(_SCALED, _MAXTEXT_MLP)],
    "maxtext-llama3.1": [_MAXTEXT_TABLE, *_maxtext(_ROPE, _MAXTEXT_MLP)],
    "maxtext-mistral": [_MAXTEXT_TABLE, *_maxtext(_SCALED, _MAXTEXT_MLP)],
    "maxtext-mixtral": [_MAXTEXT_TABLE, *_maxtext(_SCALED, _maxtext_experts("MoeBlock_0"))],
    "maxtext-qwen": [_MAXTEXT_TABLE, *_maxtext(_PLAIN, _MAXTEXT_MLP)],
    "maxtext-qwen3-moe": [_MAXTEXT_TABLE, *_maxtext(_PLAIN, _maxtext_experts("moe_block"))],
    "maxtext-gemma": [_MAXTEXT_GEMMA_TABLE, *_maxtext(_SCALED, _MAXTEXT_MLP, False)],
    "maxtext-gemma2": _maxtext_gemma2(),
    "maxtext-gemma3": [_MAXTEXT_GEMMA_TABLE, *_maxtext(_PLAIN, _MAXTEXT_MLP, False)],
    "tunix": _TUNIX,
    "tunix-gemma": _gemma(_TUNIX_LAYER[6:9], "layers/{i}/"),
}


def resolved(names: str | Iterable[Entry] | None) -> Iterable[Entry] | None:
    """A map: itself, or the ready one of a name.

    Raises:
      ValueError: if there is none of that name.
    """
    if not isinstance(names, str):
        return names
    if names not in NAMES:
        raise ValueError(f"names: there is no map {names!r}; there are {', '.join(NAMES)}, or give a list of pairs")
    return NAMES[names]
