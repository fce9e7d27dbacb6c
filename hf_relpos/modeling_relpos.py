"""The RelPos models: a pre-norm decoder in which the position scheme is the one thing that changes.

Shape letters: B batch, H query heads, G key and value heads, Q query length, K key length, D head size, C hidden size,
V vocabulary. No scheme is named in this file: `position_base.py` has the interface, `positions.py` the choice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_relpos import eager_attention_forward, merge_position_bias
from .configuration_relpos import RelPosConfig
from .position_base import Positions, SelfInitialized
from .position_ids import (
    augment_starts,
    build_positions,
    count_positions,
    inspect_positions,
    same_document,
    simplify_mask,
)
from .positions import build_position_embeddings


try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # transformers < 5.19

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept]


# the implementations that take a dense additive mask, and so a position bias
BIAS_IMPLEMENTATIONS = ("eager", "sdpa")


class RelPosRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = hidden_states.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)


class RelPosMLP(nn.Module):
    """C → 4C → C, without a gate."""

    def __init__(self, config: RelPosConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class RelPosAttention(nn.Module):
    """Causal multi-head attention with whatever the position schemes do to q, k and the scores."""

    def __init__(self, config: RelPosConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.position_embeddings = build_position_embeddings(config, shared=False)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, Q, C)
        shared_bias: torch.Tensor | None,  # (B or 1, H, Q, K), from the schemes that all layers share
        positions: Positions,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, H, Q, D)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, G, Q, D)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, G, Q, D)
        for rotate, rotation in positions.rotations:
            query, key = rotate(query, key, rotation)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, G, K, D)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        bias = self.position_embeddings.bias(positions)
        if shared_bias is not None:
            bias = shared_bias if bias is None else shared_bias + bias
        if bias is not None:
            if self.config._attn_implementation not in BIAS_IMPLEMENTATIONS:
                raise ValueError(
                    f"`attn_implementation` must be one of {list(BIAS_IMPLEMENTATIONS)} for pos_embedding_type "
                    f"{self.config.pos_embedding_type!r}, got {self.config._attn_implementation!r}: it would drop the "
                    "position bias."
                )
            attention_mask = merge_position_bias(bias, attention_mask, query)
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1)), weights


class RelPosDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: RelPosConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RelPosRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = RelPosAttention(config, layer_idx)
        self.post_attention_layernorm = RelPosRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = RelPosMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        # positional, as hidden_states: reentrant checkpointing only differentiates positional arguments
        shared_bias: torch.Tensor | None = None,
        positions: Positions | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            shared_bias,
            positions,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class RelPosPreTrainedModel(PreTrainedModel):
    config_class = RelPosConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RelPosDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": RelPosDecoderLayer, "attentions": RelPosAttention}

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SelfInitialized):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "RelPosPreTrainedModel":
        """As in transformers; refuses to load a checkpoint under another scheme than the one it was trained with.

        Raises:
            ValueError: if the requested `pos_embedding_type` is not that of the checkpoint.
        """
        config = kwargs.get("config")
        wanted = getattr(config, "pos_embedding_type", kwargs.get("pos_embedding_type"))
        if wanted is not None and pretrained_model_name_or_path is not None:
            hub_names = "cache_dir force_download local_files_only proxies revision subfolder token".split()
            hub_kwargs = {name: kwargs[name] for name in hub_names if name in kwargs}
            try:
                saved, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_kwargs)
            except OSError:  # weights alone, beside a configuration from elsewhere
                saved = {}
            saved_type = saved.get("pos_embedding_type", wanted)
            if saved_type != wanted:
                raise ValueError(
                    f"`pos_embedding_type` of the checkpoint {str(pretrained_model_name_or_path)!r} is {saved_type!r}, "
                    f"got {wanted!r}."
                )
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


class RelPosModel(RelPosPreTrainedModel):
    """The decoder without a head: token ids → hidden states."""

    def __init__(self, config: RelPosConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.position_embeddings = build_position_embeddings(config, shared=True)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(RelPosDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RelPosRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        schemes = [*self.position_embeddings.values(), *self.layers[0].self_attn.position_embeddings.values()]
        self.has_position_bias = any(scheme.has_bias for scheme in schemes)
        self.post_init()

    def distance_bias(self, length: int) -> torch.Tensor:
        """What the attention adds to the scaled scores at each distance.

        Args:
            length: number of distances, 0..length−1, in tokens.

        Returns:
            (layers, heads, length) fp32.

        Raises:
            ValueError: if `length` is below 1, or if no scheme of the model is a function of the distance.
        """
        if length < 1:
            raise ValueError(f"`length` must be at least 1, got {length}.")
        device = self.embed_tokens.weight.device
        shared = self.position_embeddings.table(length, device)
        tables = [layer.self_attn.position_embeddings.table(length, device) for layer in self.layers]
        tables = [shared if own is None else own if shared is None else shared + own for own in tables]
        if any(table is None for table in tables):
            raise ValueError(
                f"`pos_embedding_type` must have a bias that is a function of the distance, "
                f"got {self.config.pos_embedding_type!r}."
            )
        return torch.stack(tables)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Runs the decoder.

        Args:
            input_ids: (B, Q) token ids; or `inputs_embeds`, (B, Q, C).
            attention_mask: (B, K), 0 on padding, or a ready (B, 1, Q, K) mask.
            position_ids: (B, Q); counted over the real tokens of `attention_mask` by default. Where they do not
                increase from one token to the next, a new document starts: packed rows attend within documents only.
            past_key_values: keys and values of the tokens before these, or an empty cache.
                A position bias needs positions that go on by one from token to token then.
            use_cache: whether to return a cache. A packed row cannot be continued: it returns none.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given, if packed rows come with a
                cache, or if a position lies past a learned table.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, query_length = inputs_embeds.shape[:2]
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if isinstance(past_length, torch.Tensor):
            past_length = past_length.clone()  # a static cache counts in place

        attention_mask = simplify_mask(attention_mask)
        documents, cacheable = None, True
        if position_ids is None:
            position_ids = count_positions(attention_mask, past_length, query_length, inputs_embeds.device)
        elif attention_mask is None or attention_mask.ndim == 2:
            documents, cacheable = inspect_positions(
                position_ids, attention_mask, past_length, past_key_values is not None, self.has_position_bias
            )

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            and_mask_function=None if documents is None else same_document(documents),
            allow_is_causal_skip=not self.has_position_bias,
        )
        positions = build_positions(
            position_ids, attention_mask, documents, past_key_values, past_length, self.has_position_bias
        )
        if self.training and self.config.position_start_augmentation and past_key_values is None:
            # distances stay: only what acts on absolute positions sees the shift
            positions.query = augment_starts(position_ids, documents, batch_size, self.config.max_position_embeddings)
        positions.rotations = self.position_embeddings.rotations(positions.query, inputs_embeds.dtype)
        if use_cache and past_key_values is None and cacheable:
            past_key_values = DynamicCache(config=self.config)

        hidden_states = self.dropout(self.position_embeddings.embed(inputs_embeds, positions.query))
        shared_bias = self.position_embeddings.bias(positions)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                shared_bias,
                positions=positions,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class RelPosForCausalLM(RelPosPreTrainedModel, GenerationMixin):
    """The decoder with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RelPosConfig) -> None:
        super().__init__(config)
        self.model = RelPosModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Runs the model; arguments as in `RelPosModel.forward`.

        Args:
            labels: (B, Q) token ids, −100 where there is no target; shifted here, as everywhere in transformers.
            logits_to_keep: compute the logits of the last n tokens only, or of the given indices; 0 for all.

        Returns:
            the mean loss in nats, if there are labels, and (B, Q, V) logits.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# The generic heads build their backbone through AutoModel, which asks for trust_remote_code a second time when this
# file was loaded from the Hub. So their `forward` is inherited and their `__init__` is written here


class RelPosForSequenceClassification(GenericForSequenceClassification, RelPosPreTrainedModel):
    """The decoder with a classifier on the last real token."""

    def __init__(self, config: RelPosConfig) -> None:
        RelPosPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = RelPosModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class RelPosForTokenClassification(GenericForTokenClassification, RelPosPreTrainedModel):
    """The decoder with a classifier on each token."""

    def __init__(self, config: RelPosConfig) -> None:
        RelPosPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = RelPosModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
