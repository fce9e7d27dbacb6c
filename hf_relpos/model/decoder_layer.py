"""The blocks of the RelPos decoder. No scheme and no kernel is named in this file: `scheme_base.py` has the interface
of the ones, `attention_plan.py` chooses the others.

Shape letters: B batch, H query heads, G key and value heads, Q query length, K key length, D head size, C hidden size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_mask import eager_attention_forward
from .attention_plan import AttentionInputs, AttentionPlan
from .cached_beside import add_with_beside
from .configuration_relpos import RelPosConfig
from .feed_forward import RelPosMLP
from .norms import RelPosDropout, RelPosRMSNorm, build_norm, drop
from .scheme_base import Positions
from .scheme_registry import Rotates, Rotation, build_position_embeddings, layer_groups
from .transformers_versions import add_to_cache, takes_cache


class RelPosAttention(nn.Module):
    """Causal multi-head attention: schemes transform q and k, and a plan adds what they add to the scores."""

    def __init__(self, config: RelPosConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        # a configuration takes long to read an attribute
        self.num_heads, self.qk_norm = config.num_attention_heads, config.qk_norm
        self.is_causal = True
        width, bias = config.hidden_size, config.attention_bias
        query_width, key_width = (
            num_heads * self.head_dim for num_heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(width, query_width, bias=bias)
        self.k_proj = nn.Linear(width, key_width, bias=bias)
        self.v_proj = nn.Linear(width, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, width, bias=config.attention_out_bias)
        if self.qk_norm is not None:
            widths = (query_width, key_width) if self.qk_norm == "layer" else (self.head_dim, self.head_dim)
            self.q_norm, self.k_norm = (RelPosRMSNorm(each, config.rms_norm_eps) for each in widths)
        self.group = layer_groups(config)[layer_idx]
        self.sliding_window = self.group.window  # where attention functions of transformers look for it
        self.position_embeddings = build_position_embeddings(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, Q, C)
        shared_bias: torch.Tensor | None,  # of the schemes that layers share, from the plan
        plan: AttentionPlan,
        rotations: Sequence[Rotation] = (),
        cache: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        if self.qk_norm is not None:
            query, key = self._norm_queries_and_keys(query, key)
        query = query.view(head_shape).transpose(1, 2)  # (B, H, Q, D)
        key = key.view(head_shape).transpose(1, 2)  # (B, G, Q, D)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, G, Q, D)
        for rotate, rotation in rotations:
            query, key = rotate(query, key, rotation)
        shard_heads = self._head_slicer(query)
        key_bias = None  # or (B, H, Q)
        if self.group.has_key_bias:
            key_bias = self.position_embeddings.key_bias(hidden_states)
        if key_bias is not None:
            key_bias = shard_heads(key_bias.transpose(0, 1)).transpose(0, 1)
        if cache is not None:
            key, value, key_bias = self._update(cache, key, value, key_bias, kwargs)
        if query.shape[-1] > self.head_dim:  # attention functions want heads of one width
            value = F.pad(value, (0, query.shape[-1] - self.head_dim))
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(plan.implementation, eager_attention_forward)

        # vLLM reads the source of this function, and wants to find this call in it
        def attend(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            return attention_interface(self, *args, scaling=self.scaling, **kwargs)

        inputs = AttentionInputs(query, key, value, key_bias, shard_heads, attend)
        output, weights = plan.attend(self, inputs, shared_bias, **kwargs)
        if output.shape[-1] != self.head_dim:  # some plans widen the heads, and vLLM's function lays them end to end
            output = output.reshape(*input_shape, query.shape[1], -1)[..., : self.head_dim]
        return self.o_proj(output.reshape(*input_shape, -1)), weights

    def score_bias(
        self, query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, positions: Positions
    ) -> torch.Tensor | None:
        """(B, H, Q, D), (B, G, K, D), all other biases → (B, H, Q, K) fp32 or `None`. The scores are computed here, and
        in the attention function once more."""
        if query.shape[1] != self.config.num_attention_heads:
            num_ranks = self.config.num_attention_heads // query.shape[1]
            raise ValueError(
                f"`tp_plan` must be None for pos_embedding_type {self.config.pos_embedding_type!r}, whose bias by the "
                f"scores needs all heads in one place, got {num_ranks} ranks."
            )
        key = key.repeat_interleave(self.num_key_value_groups, dim=1)
        with torch.autocast(query.device.type, enabled=False):
            query = query.float()
            scores = query @ key.float().transpose(2, 3) * self.scaling
            return self.position_embeddings.score_bias(scores, bias, query, positions)

    def _norm_queries_and_keys(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, Q, H·D), (B, Q, G·D) → the same shapes, normed over each head or over all of them."""
        if self.qk_norm == "head":
            heads = (each.unflatten(-1, (-1, self.head_dim)) for each in (query, key))
            query, key = (norm(each).flatten(-2) for norm, each in zip((self.q_norm, self.k_norm), heads))
            return query, key
        if query.shape[-1] != self.q_norm.weight.shape[0]:
            num_ranks = self.q_norm.weight.shape[0] // query.shape[-1]
            raise ValueError(
                f"`tp_plan` must be None with `qk_norm` 'layer', which needs all heads in one place, got {num_ranks} "
                "ranks."
            )
        return self.q_norm(query), self.k_norm(key)

    def _update(
        self,
        cache: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        key_bias: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Adds to the cache and returns what it holds. Key biases, and channels of the keys past D, lie beside the
        keys, whose shape is that of any model."""
        beside = [] if key_bias is None else [key_bias.unsqueeze(-1)]
        is_wide = key.shape[-1] > self.head_dim and isinstance(cache, Cache)
        if is_wide:
            key, channels = key.split((self.head_dim, key.shape[-1] - self.head_dim), dim=-1)
            beside.append(channels)
        if not beside:
            return *add_to_cache(cache, key, value, self.layer_idx, kwargs), None
        key, value, beside = add_with_beside(cache, key, value, beside, self.layer_idx)
        if is_wide:
            key = torch.cat((key, beside.pop()), dim=-1)
        return key, value, None if key_bias is None else beside[0].squeeze(-1)

    def _head_slicer(self, query: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """→ a function from (H, ..) values of all heads to those of this rank; the gradient is that of all heads."""
        if not self.group.has_bias or query.shape[1] == self.num_heads:
            return _all_heads
        mesh = self._mesh(query)
        return lambda values: _LocalHeads.apply(values, mesh)

    def _mesh(self, query: torch.Tensor) -> Any:
        """The device mesh whose ranks share the heads out among them (tensor parallelism)."""
        mesh = getattr(self.q_proj.weight, "device_mesh", None)
        if mesh is not None:
            return mesh
        # a quantised weight does not say: then it must be all ranks that there are
        num_ranks = self.config.num_attention_heads // query.shape[1]
        if torch.distributed.get_world_size() != num_ranks:
            raise ValueError(
                f"`pos_embedding_type` {self.config.pos_embedding_type!r} supports quantised weights under tensor "
                f"parallelism over all ranks, {torch.distributed.get_world_size()}, got it over {num_ranks}."
            )
        return DeviceMesh.from_group(torch.distributed.group.WORLD, query.device.type)


def _all_heads(values: torch.Tensor) -> torch.Tensor:
    return values


class _LocalHeads(torch.autograd.Function):
    """Forward: a rank's slice of the first dimension. Backward: the slices of all ranks, so that parameters that every
    rank holds whole get the same whole gradient everywhere."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, mesh: Any) -> torch.Tensor:
        ctx.mesh = mesh
        return values.tensor_split(mesh.size())[mesh.get_local_rank()].clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gathered = [torch.empty_like(gradient) for _ in range(ctx.mesh.size())]
        torch.distributed.all_gather(gathered, gradient.contiguous(), group=ctx.mesh.get_group())
        return torch.cat(gathered), None


class RelPosDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: RelPosConfig, layer_idx: int) -> None:
        super().__init__()
        self.norms_before, self.is_parallel = config.norm_placement == "before", config.use_parallel_residual
        # named as in Llama and OLMo2: the second norm is that before the MLP, or that of what attention returns
        self.input_layernorm = build_norm(config) if self.norms_before else None
        self.self_attn = RelPosAttention(config, layer_idx)
        self.post_attention_layernorm = build_norm(config)
        self.post_feedforward_layernorm = None if self.norms_before else build_norm(config)
        self.mlp = RelPosMLP(config)
        for projection in (self.self_attn.o_proj, self.mlp.down_proj):  # as in GPT-2: all add to one residual stream
            projection.initial_scale = (2 * config.num_hidden_layers) ** -0.5
        self.dropout = RelPosDropout(config.hidden_dropout)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        # positional, as hidden_states: reentrant checkpointing only differentiates positional arguments
        shared_bias: torch.Tensor | None = None,
        *factors: torch.Tensor,  # what the schemes computed for their rotations
        plan: AttentionPlan | None = None,
        rotates: Rotates | None = None,  # of the schemes
        cache: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states) if self.norms_before else hidden_states,
            shared_bias,
            plan,
            () if rotates is None else rotates.join(factors),
            cache=cache,
            **kwargs,
        )
        if not self.norms_before:
            hidden_states = hidden_states + drop(self.dropout, self.post_attention_layernorm(attended))
            return hidden_states + drop(self.dropout, self.post_feedforward_layernorm(self.mlp(hidden_states)))
        if self.is_parallel:
            fed = drop(self.dropout, self.mlp(self.post_attention_layernorm(hidden_states)))
            return fed + drop(self.dropout, attended) + hidden_states
        hidden_states = hidden_states + drop(self.dropout, attended)
        return hidden_states + drop(self.dropout, self.mlp(self.post_attention_layernorm(hidden_states)))
