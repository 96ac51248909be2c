"""The tensors that a model of a config has: names and shapes. Knows no file."""

from __future__ import annotations

from linker_core.weights.architecture import Architecture, ModelConfig
from linker_core.weights.keys import EMBED_NAME, FINAL_NORM_NAME, LM_HEAD_NAME, block_name


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of every stored tensor, in the order of a forward pass.

    Shapes are [out, in] for products, [rows, hidden] for embedding and head, [width] for norms and
    biases. A tied head is left out: it is the embedding.
    """
    H = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBED_NAME: (config.vocab_size, H)}
    block = _block_tensors(config)
    for layer in range(config.num_layers):
        shapes |= {block_name(layer, parameter): shape for parameter, shape in block.items()}
    shapes[FINAL_NORM_NAME] = (H,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD_NAME] = (config.vocab_size, H)
    return shapes


def _block_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns sub-parameter -> shape of one block."""
    H, M = config.hidden_size, config.intermediate_size
    Q, KV = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qwen2 = config.architecture is Architecture.QWEN2
    products: list[tuple[str, int, int, bool]] = [
        ("self_attn.q_proj", Q, H, config.attention_bias),
        ("self_attn.k_proj", KV, H, config.attention_bias),
        ("self_attn.v_proj", KV, H, config.attention_bias),
        ("self_attn.o_proj", H, Q, config.attention_bias and not qwen2),
        ("mlp.gate_proj", M, H, config.mlp_bias),
        ("mlp.up_proj", M, H, config.mlp_bias),
        ("mlp.down_proj", H, M, config.mlp_bias),
    ]
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (H,)}
    for name, out_width, in_width, has_bias in products:
        shapes[f"{name}.weight"] = (out_width, in_width)
        if has_bias:
            shapes[f"{name}.bias"] = (out_width,)
    if config.architecture is Architecture.QWEN3:
        shapes |= dict.fromkeys(
            ("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (config.head_dim,)
        )
    shapes["post_attention_layernorm.weight"] = (H,)
    if config.architecture is Architecture.GEMMA2:
        shapes |= dict.fromkeys(
            ("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"), (H,)
        )
    return shapes
