"""Tiny random models of other families, in which every norm and every bias matters."""

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    Olmo2Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)


TOKENS = dict(vocab_size=101, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIZES = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)
SIZES |= dict(max_position_embeddings=256, **TOKENS)
GROUPED = dict(num_key_value_heads=2, **SIZES)


def rope(**parameters):
    return dict(rope_parameters=dict(rope_theta=1e4, **parameters))


CONFIGS = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "llama, biases, tied": lambda: LlamaConfig(
        **GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=24
    ),
    "llama, llama3": lambda: LlamaConfig(
        **GROUPED,
        **rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama, yarn": lambda: LlamaConfig(
        **GROUPED, **rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    ),
    "llama, linear": lambda: LlamaConfig(**GROUPED, **rope(rope_type="linear", factor=2.0)),
    "llama, longrope": lambda: LlamaConfig(
        **GROUPED,
        **rope(
            rope_type="longrope",
            short_factor=[1.0] * 8,
            long_factor=[1.0 + index for index in range(8)],
            factor=2.0,
            original_max_position_embeddings=128,
        ),
    ),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=None, head_dim=32),
    "mistral, windows": lambda: MistralConfig(**GROUPED, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen2, windows": lambda: Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=32, tie_word_embeddings=True),
    "qwen3, biases": lambda: Qwen3Config(**GROUPED, head_dim=16, attention_bias=True),
    "smollm3": lambda: SmolLM3Config(**GROUPED, no_rope_layer_interval=3),
    "smollm3, windows": lambda: SmolLM3Config(
        **GROUPED, no_rope_layers=[0, 1, 1], use_sliding_window=True, sliding_window=16
    ),
    "olmo2": lambda: Olmo2Config(**GROUPED),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, **rope(rope_type="default", partial_rotary_factor=0.25)),
    "gpt_neox, sequential": lambda: GPTNeoXConfig(**SIZES, use_parallel_residual=False, layer_norm_eps=1e-3),
    "gpt_neox, no biases": lambda: GPTNeoXConfig(**SIZES, attention_bias=False, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(**TOKENS, n_embd=64, n_layer=3, n_head=4, n_positions=256),
    "gpt2, narrow": lambda: GPT2Config(
        **TOKENS, n_embd=64, n_layer=2, n_head=4, n_positions=256, n_inner=80, tie_word_embeddings=False
    ),
    "bloom": lambda: BloomConfig(**TOKENS, hidden_size=64, n_layer=3, n_head=4),
    "bloom, 6 heads": lambda: BloomConfig(**TOKENS, hidden_size=96, n_layer=2, n_head=6),
    "mpt": lambda: MptConfig(**TOKENS, d_model=64, n_layers=3, n_heads=4, max_seq_len=256),
}
# whose logits are the same to rounding only
ROUNDED = {
    "olmo2": "its norms multiply before they cast",
    "bloom": "its bias is rounded to the dtype of the model, and added by the kernel of a matrix product",
    "mpt": "its bias is rounded to the dtype of the model",
}
# whose original has no attention but its own, no static cache, and no positions as an argument
EAGER_ONLY = ("bloom", "mpt")


def make_original(name: str, dtype=torch.float32, attn_implementation: str = "eager") -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(4)
    return model.eval()


def padded_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """→ (3, 96) tokens and their mask, of which two rows have padding to the left."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, TOKENS["vocab_size"], (3, 96), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, :40] = mask[1, :7] = 0
    return tokens * mask, mask
