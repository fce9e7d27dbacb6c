"""What the benchmark runs: attention kernels, training steps and cached steps of this family and of others.

Shape letters: B batch, H heads, N tokens of a row, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoXConfig, LlamaConfig, MptConfig, PreTrainedModel

from hf_relpos.evaluation.loss_by_length import evaluation_mode, token_losses
from hf_relpos.model.attention_distance_bias import distance_bias_attention
from hf_relpos.model.attention_kernel import TableCall
from hf_relpos.model.attention_torch import BlockKernel
from hf_relpos.model.attention_triton import TritonKernel, triton_backward, triton_forward
from hf_relpos.model.configuration_relpos import MODEL_SIZES, RelPosConfig
from hf_relpos.model.modeling_relpos import RelPosForCausalLM
from hf_relpos.model.scheme_distance_bias import AlibiBias
from hf_relpos.model.scheme_registry import distance_table, list_position_embeddings


NUM_HEADS, HEAD_DIM, VOCAB_SIZE = 4, 64, 8192
# the largest (H, N, N) tensor that a kernel with a dense bias is tried with
MAX_DENSE_MIB = 256


class Unsupported(Exception):
    """A case that cannot run here, with the reason."""


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        part: "attention", "step", "compiled_step", "decode" or "evaluate".
        name: of the kernel or the model.
        length: N; of a cached step, the number of cached tokens.
        batch_size: B.
        mode: "forward" or "forward_backward", of an attention kernel.
        device, dtype: where and in what the inputs are.
        num_heads, head_dim: H and D, of an attention kernel.
        model_size: of a model, as `RelPosConfig.from_size` takes it.
    """

    part: str
    name: str
    length: int
    batch_size: int
    mode: str = ""
    device: str = "cpu"
    dtype: str = "float32"
    num_heads: int = NUM_HEADS
    head_dim: int = HEAD_DIM
    model_size: str = "xsmall"

    def build(self) -> Callable[[], None]:
        """→ a function that runs the case once.

        Raises:
            Unsupported: if it cannot run here.
        """
        builders = {
            "attention": _build_attention,
            "step": _build_step,
            "compiled_step": _build_step,
            "decode": _build_decode,
            "evaluate": _build_evaluation,
        }
        return builders[self.part](self)


# --- attention kernels: (B, H, N, D) query, key and value and (H, N) table → (B, H, N, D)


def sdpa_causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def rotary_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    angle = torch.arange(query.shape[2], device=query.device)[:, None] * 10000.0 ** -torch.linspace(
        0, 1, query.shape[3] // 2, device=query.device
    )
    cos, sin = (torch.cat((x, x), dim=-1).to(query.dtype) for x in (angle.cos(), angle.sin()))

    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return sdpa_causal(turn(query), turn(key), value, table)


def sdpa_dense_bias(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    num_heads, length = query.shape[1:3]
    if num_heads * length**2 * 4 > MAX_DENSE_MIB * 2**20:
        raise Unsupported(f"the bias alone would take {num_heads * length**2 * 4 // 2**20} MiB")
    slots = torch.arange(length, device=query.device)
    distance = slots[:, None] - slots
    bias = table[:, distance.clamp(min=0)].masked_fill(distance < 0, torch.finfo(table.dtype).min)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None].to(query.dtype))


def distance_bias(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return distance_bias_attention(query, key, value, table)


class _Kernel(torch.autograd.Function):
    """Two functions in the form of `TableKernel.forward` and `backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        forward: Callable,
        backward: Callable,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        table: torch.Tensor,
    ) -> Any:
        ctx.run_backward, ctx.call = backward, TableCall(query.shape[3] ** -0.5)
        out, lse = forward(query, key, value, table, ctx.call)
        ctx.save_for_backward(query, key, value, out, lse, table)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> Any:
        return None, None, *ctx.run_backward(grad_out, *ctx.saved_tensors, ctx.call)


def distance_bias_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """Without the kernels in C++ or Triton: in operations of torch."""
    return _Kernel.apply(BlockKernel.forward, BlockKernel.backward, query, key, value, table)


def zero_table(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """What attention without a bias costs by the kernel for tables."""
    return distance_bias(query, key, value, torch.zeros_like(table))


def distance_bias_fast(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    if not TritonKernel.supports(query, key, table, TableCall(1.0)):
        raise Unsupported("needs a GPU and Triton")
    backward = partial(triton_backward, is_deterministic=False)  # the table's gradient by atomic additions
    return _Kernel.apply(triton_forward, backward, query, key, value, table)


def alibi_key_mask(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """ALiBi as a value per key, −m · (N − 1 − j): the same row after the softmax."""
    if query.device.type != "cpu":
        raise Unsupported("the kernel that takes a mask beside is_causal is the CPU's")
    mask = table.flip(1)[None, :, None].expand(-1, -1, query.shape[2], -1)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, attn_mask=mask)[0]


def flex_table(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if query.device.type == "cpu" and query.requires_grad:
        raise Unsupported("FlexAttention has no backward pass on CPUs")
    length = query.shape[2]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=query.device.type)

    def add_bias(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score + table[h, (i - j).clamp(min=0)]

    return _compiled(flex_attention)(query, key, value, score_mod=add_bias, block_mask=mask)


def _compiled(function: Callable, cache: dict[Callable, Callable] = {}) -> Callable:  # noqa: B006
    return cache.setdefault(function, torch.compile(function, dynamic=False))


def flash_attn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise Unsupported("flash-attn is not installed") from error
    return flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), causal=True).transpose(1, 2)


# name → kernel, and whether its table is "learned", "alibi" or None
KERNELS: dict[str, tuple[Callable, str | None]] = {
    "sdpa_causal": (sdpa_causal, None),
    "rotary_sdpa": (rotary_sdpa, None),
    "distance_bias": (distance_bias, "learned"),
    "distance_bias_blocks": (distance_bias_blocks, "learned"),
    "distance_bias_fast": (distance_bias_fast, "learned"),
    "zero_table": (zero_table, None),
    "distance_bias_alibi": (distance_bias, "alibi"),
    "alibi_key_mask": (alibi_key_mask, "alibi"),
    "sdpa_dense_bias": (sdpa_dense_bias, "learned"),
    "sdpa_dense_alibi": (sdpa_dense_bias, "alibi"),
    "flex_table": (flex_table, "learned"),
    "flash_attn": (flash_attn, None),
}


def _build_attention(case: Case) -> Callable[[], None]:
    kernel, kind = KERNELS[case.name]
    shape = (case.batch_size, case.length, case.num_heads, case.head_dim)
    options = {"device": case.device, "dtype": getattr(torch, case.dtype)}
    # as the layers lay them out
    inputs = [torch.randn(shape, **options).transpose(1, 2) for _ in range(3)]
    grad_out = torch.randn(shape, **options).transpose(1, 2)
    with torch.device(case.device):
        sizes = {"hidden_size": case.num_heads * case.head_dim, "num_attention_heads": case.num_heads}
        scheme = AlibiBias(RelPosConfig(pos_embedding_type="alibi", **sizes))
        # a learned table that has come to look like ALiBi's, where most weights underflow
        table = distance_table(scheme, case.length, torch.device(case.device))
    has_gradient = case.mode == "forward_backward"
    for x in inputs:
        x.requires_grad_(has_gradient)
    table.requires_grad_(has_gradient and kind == "learned")
    differentiated = [x for x in (*inputs, table) if x.requires_grad]

    def run() -> None:
        with torch.set_grad_enabled(has_gradient):
            out = kernel(*inputs, table)
        if has_gradient:
            torch.autograd.grad(out, differentiated, grad_out)

    return run


# --- whole models


def _relpos(name: str, size: str, attn_implementation: str = "sdpa") -> RelPosForCausalLM:
    config = RelPosConfig.from_size(size, vocab_size=VOCAB_SIZE, pos_embedding_type=name, hidden_dropout=0.0)
    return RelPosForCausalLM._from_config(config, attn_implementation=attn_implementation)


def _peer(config: Any, attn_implementation: str = "sdpa") -> Any:
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)


class _XTransformers(torch.nn.Module):
    """A decoder of x-transformers whose bias is an MLP of the distance, as `linear_cpb` is, with its own loss."""

    def __init__(self, hidden_size: int, num_hidden_layers: int, num_attention_heads: int) -> None:
        super().__init__()
        try:
            from x_transformers import Decoder, TransformerWrapper
        except ImportError as error:
            raise Unsupported("x-transformers is not installed") from error
        heads = {"heads": num_attention_heads, "attn_dim_head": hidden_size // num_attention_heads}
        layers = Decoder(dim=hidden_size, depth=num_hidden_layers, dynamic_pos_bias=True, **heads)
        options = {"max_seq_len": 8192, "use_abs_pos_emb": False}
        self.model = TransformerWrapper(num_tokens=VOCAB_SIZE, attn_layers=layers, **options)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool = False) -> Any:
        logits = self.model(input_ids)[:, :-1]
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))


def _llama(**sizes: int) -> Any:
    inner = round(sizes["hidden_size"] * 8 / 3 / 16) * 16  # three matrices of as many numbers as two of width × 4
    return _peer(LlamaConfig(**sizes, intermediate_size=inner, vocab_size=VOCAB_SIZE, max_position_embeddings=8192))


def _gpt_neox(**sizes: int) -> Any:
    inner = 4 * sizes["hidden_size"]
    return _peer(GPTNeoXConfig(**sizes, intermediate_size=inner, vocab_size=VOCAB_SIZE, max_position_embeddings=8192))


def _bloom(hidden_size: int, num_hidden_layers: int, num_attention_heads: int) -> Any:
    sizes = {"hidden_size": hidden_size, "n_layer": num_hidden_layers, "n_head": num_attention_heads}
    return _peer(BloomConfig(**sizes, vocab_size=VOCAB_SIZE, tie_word_embeddings=False), "eager")


def _mpt(hidden_size: int, num_hidden_layers: int, num_attention_heads: int) -> Any:
    sizes = {"d_model": hidden_size, "n_layers": num_hidden_layers, "n_heads": num_attention_heads}
    return _peer(MptConfig(**sizes, vocab_size=VOCAB_SIZE, max_seq_len=8192, tie_word_embeddings=False), "eager")


# of the same width, depth, heads and floating point operations, the output embedding apart from the input's
PEERS: dict[str, Callable[..., Any]] = {
    "llama": _llama,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
    "mpt": _mpt,
    "x-transformers with dynamic_pos_bias": _XTransformers,
}
DENSE = "linear_cpb with a dense bias"


def model_names() -> list[str]:
    """Every scheme, then the models of others."""
    return [*list_position_embeddings(), *PEERS, DENSE]


def _model(case: Case) -> Any:
    torch.manual_seed(0)
    if case.name in PEERS:
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads")
        model = PEERS[case.name](**dict(zip(sizes, MODEL_SIZES[case.model_size], strict=True)))
    elif case.name == DENSE:
        model = _relpos("linear_cpb", case.model_size, "eager")
    else:
        model = _relpos(case.name, case.model_size)
    return model.to(case.device, getattr(torch, case.dtype))


def _build_step(case: Case) -> Callable[[], None]:
    """A step as everybody writes it, with no switch set."""
    model = _model(case).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, VOCAB_SIZE, (case.batch_size, case.length), device=case.device)
    if case.part == "compiled_step":
        model = torch.compile(model)

    def run() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _build_decode(case: Case) -> Callable[[], None]:
    model = _model(case).eval()
    tokens = torch.randint(0, VOCAB_SIZE, (case.batch_size, case.length), device=case.device)
    step = tokens[:, -1:]
    if not isinstance(model, PreTrainedModel):
        raise Unsupported("its cache has another interface")
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def run() -> None:
        model(input_ids=step, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return run


def _build_evaluation(case: Case) -> Callable[[], None]:
    """The loss of each token of a row, as evaluate.py computes it."""
    model = _model(case)
    if not isinstance(model, PreTrainedModel):
        raise Unsupported("it gives its loss alone")
    tokens = torch.randint(0, VOCAB_SIZE, (case.batch_size, case.length), device=case.device)

    def run() -> None:
        with evaluation_mode(model):
            token_losses(model, tokens)

    return run
