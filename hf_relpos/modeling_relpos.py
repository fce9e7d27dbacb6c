"""The RelPos models: a pre-norm decoder in which the position scheme is the one thing that changes.

Shape letters: B batch, H query heads, Q query length, K key length, C hidden size, V vocabulary. No scheme is named in
this file: `position_base.py` has the interface, `positions.py` the choice.
"""

import math
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .attention_keys import check_cache
from .attention_relpos import check_implementation, table_kernel
from .configuration_relpos import RelPosConfig
from .layers_relpos import RelPosAttention, RelPosDecoderLayer, RelPosRMSNorm
from .loss_relpos import linear_cross_entropy
from .position_base import Positions, SelfInitialized
from .position_ids import (
    augment_starts,
    build_positions,
    cached_length,
    check_mask,
    count_positions,
    flash_lengths,
    inspect_positions,
    is_exported,
    keep_tables,
    same_document,
    simplify_mask,
)
from .position_sampling import sample_positions
from .positions import LayerKind, add_biases, build_position_embeddings
from .sharing_relpos import SelfContainedModel


try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # transformers < 5.19

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept]


logger = logging.get_logger(__name__)


class RelPosPreTrainedModel(SelfContainedModel, PreTrainedModel):
    config_class = RelPosConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RelPosDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": RelPosDecoderLayer, "attentions": RelPosAttention}

    def __init__(self, config: RelPosConfig, *args: Any, **kwargs: Any) -> None:
        if config.has_position_bias:  # these keep nothing of a mask but causality and padding
            self._supports_flash_attn = False
            self._supports_attention_backend = False
            self._supports_context_parallel = False
        super().__init__(config, *args, **kwargs)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        known = attn_implementation in ALL_ATTENTION_FUNCTIONS.valid_keys()
        if known or any(mark in str(attn_implementation) for mark in ("paged", "/")):  # "/": a kernel from the Hub
            check_implementation(self.config, attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def attention_path(self) -> str:
        """What computes the attention over rows without gaps in their positions, on this device and in this mode.

        Returns:
            "eager", "sdpa", "flex_attention", ..: the implementation of transformers of that name, without a bias;
            "sdpa" hides the future by `is_causal` where no row has padding. With a position bias:
            "distance_bias:triton" or "distance_bias:blocks": `distance_bias_attention`, on a table of the distances,
            by a Triton kernel or in torch operations; "distance_bias:key_bias": the same for a fixed line in bf16, as a
            value per key, where a CPU is fast in bf16;
            "flex_attention:table": FlexAttention, which reads the table;
            "sdpa:key_bias": "sdpa" with further channels, in which the keys hold their bias, as they do beside a table;
            "eager:dense_bias", "sdpa:dense_bias", ..: that implementation, with a bias for each pair of tokens.
            Where layers differ, what they have, in the order of the layers, joined by "/".
        """
        return "/".join(dict.fromkeys(self._kind_path(kind) for kind in self._kinds()))

    def _kinds(self) -> dict[LayerKind, list[int]]:
        """The kinds of layers that there are → the indices of those layers."""
        kinds: dict[LayerKind, list[int]] = {}
        for index, layer in enumerate(self.base_model.layers[: self.config.num_hidden_layers]):
            kinds.setdefault(layer.self_attn.kind, []).append(index)
        return kinds

    def _kind_path(self, kind: LayerKind) -> str:
        implementation = self.config._attn_implementation
        if not kind.has_bias:
            return implementation
        if self._table_limit(kind) < 0:
            by_keys = implementation == "sdpa" and not kind.has_pair_bias
            return f"{implementation}:key_bias" if by_keys else f"{implementation}:dense_bias"
        if implementation == "flex_attention":
            return "flex_attention:table"
        is_autocast = torch.is_autocast_enabled(self.device.type)
        dtype = torch.get_autocast_dtype(self.device.type) if is_autocast else self.dtype
        query, layer = torch.empty(0, device=self.device, dtype=dtype), self._kinds()[kind][0]
        table = self.base_model.distance_bias(64)[layer] if kind.has_table else query.new_zeros(1, 64)
        kernel = table_kernel(query, table)
        return "distance_bias:blocks" if kernel == "key_bias" and kind.window else f"distance_bias:{kernel}"

    def _table_limit(self, kind: LayerKind) -> float:
        """The largest position of a query that is served by a table of the distances; −1 if none is."""
        implementation, drops = self.config._attn_implementation, self.training and self.config.attention_dropout > 0
        readers = ("sdpa",) if kind.has_key_state else ("sdpa", "flex_attention")
        # weights below 2^−126, of which a bias in the keys makes many, take torch's kernel for CPUs several times as
        # long, and ours not: a table of zeros
        has_table = kind.has_table or (not kind.has_pair_bias and self.device.type == "cpu")
        if not kind.has_bias or not has_table or implementation not in readers or drops:
            return -1.0
        layers = [self.base_model.layers[index] for index in self._kinds()[kind]]
        schemes = chain(*(layer.self_attn.position_embeddings.values() for layer in layers))
        limits = [limit for limit in (scheme.table_limit() for scheme in schemes) if limit is not None]
        if not limits:
            return math.inf
        # one look at the device for all layers; a graph cannot look, and FlexAttention takes all queries at once
        return -1.0 if implementation == "flex_attention" or is_tracing(limits[0]) else float(torch.stack(limits).min())

    def _needs_pairs(self, kind: LayerKind, attention_mask: torch.Tensor | None) -> bool:
        """Whether the scores need something for each pair of a query and a key, where no table serves them."""
        in_channels = self.config._attn_implementation == "sdpa" and not (
            attention_mask is not None and attention_mask.ndim == 4
        )
        return kind.has_pair_bias or (kind.has_key_state and not in_channels)

    def _tell_of_dense_bias(
        self, attention_mask: torch.Tensor | None, positions: Positions, table_limit: float
    ) -> None:
        if not self.config.has_distance_table or is_tracing(positions.query):
            return
        if self.training and self.config.attention_dropout > 0:
            reason = f"`attention_dropout` is {self.config.attention_dropout}"
        elif attention_mask is not None and attention_mask.ndim == 4:
            reason = "`attention_mask` has 4 dimensions"
        elif positions.tail is not None or positions.span > table_limit + 1:
            reason = "it is no function of the distance alone at all of these positions"
        else:
            reason = "the positions leave numbers out, or padding stands between tokens"
        logger.warning_once(
            f"The position bias is computed for each pair of tokens, which takes more time and memory: {reason}."
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; its paged attention has no place for a position bias, so bias schemes are refused."""
        check_implementation(self.config, f"paged|{self.config._attn_implementation}")
        return super().init_continuous_batching(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SelfInitialized):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "RelPosPreTrainedModel":
        """As in transformers, from safetensors alone, and under the scheme that the checkpoint was trained with.

        Raises:
            ValueError: if the requested `pos_embedding_type` is not that of the checkpoint, or for pickled weights.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError("`use_safetensors` must be True, got False: pickled weights run code when they are read.")
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
        self.position_embeddings = build_position_embeddings(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(RelPosDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RelPosRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def distance_bias(self, length: int) -> torch.Tensor:
        """What the attention adds to the scaled scores at each distance.

        Args:
            length: number of distances, 0..length−1, in tokens.

        Returns:
            (layers, heads, length) fp32; 0 in layers without such a bias.

        Raises:
            ValueError: if `length` is below 1, or if no scheme of the model is a function of the distance.
        """
        if length < 1:
            raise ValueError(f"`length` must be at least 1, got {length}.")
        device, tables = self.embed_tokens.weight.device, []
        for attention in (layer.self_attn for layer in self.layers):
            shared = self.position_embeddings.table(length, device, attention.kind.schemes)
            tables.append(add_biases((shared, attention.position_embeddings.table(length, device))))
        if all(table is None for table in tables):
            raise ValueError(
                f"`pos_embedding_type` must have a bias that is a function of the distance, "
                f"got {self.config.pos_embedding_type!r}."
            )
        nothing = torch.zeros(self.config.num_attention_heads, length, device=device)
        return torch.stack([nothing if table is None else table for table in tables])

    def _place(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        past_length: int | torch.Tensor,
    ) -> tuple[dict[LayerKind, Positions], bool]:
        """→ where queries and keys stand in each kind of layers, and whether a cache may hold these tokens."""
        config, (batch_size, query_length, _), ready = self.config, inputs_embeds.shape, attention_mask
        check_cache(config, past_key_values)
        if isinstance(attention_mask, dict):  # ready masks of several kinds, which say nothing about positions
            attention_mask = next(iter(attention_mask.values()))
        elif isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4 and config.sliding_window:
            raise ValueError(
                "`attention_mask` of 4 dimensions must be a dictionary with a mask for each of `layer_types` where "
                f"some layers have a `sliding_window`, got a tensor of shape {tuple(attention_mask.shape)}."
            )
        documents, cacheable, is_counted, span = None, True, position_ids is None, None
        if is_counted:
            position_ids = count_positions(attention_mask, past_length, query_length, inputs_embeds.device)
        elif attention_mask is None or attention_mask.ndim == 2:
            documents, cacheable = inspect_positions(
                position_ids, attention_mask, past_length, past_key_values is not None, config.reads_distance
            )
        if self.training and config.position_sampling is not None and past_key_values is None:
            span, is_counted, cacheable = config.max_position_embeddings, False, False
            drawing = (attention_mask, documents, batch_size, span)
            position_ids = sample_positions(config.position_sampling, position_ids, *drawing)
        placed = {}
        for kind, layers in self._kinds().items():
            table_limit = self._table_limit(kind)
            positions = placed[kind] = build_positions(
                position_ids,
                ready.get(kind.layer_type) if isinstance(ready, dict) else ready,
                documents,
                past_key_values,
                past_length,
                needs_pairs=self._needs_pairs(kind, attention_mask),
                table_limit=-1.0 if is_exported(inputs_embeds) else table_limit,
                is_counted=is_counted,
                span=span,
                layer_idx=layers[0],
                window=kind.window,
            )
            if (positions.visible is not None or positions.tail is not None) and config._attn_implementation == "sdpa":
                self._tell_of_dense_bias(attention_mask, positions, table_limit)
        return placed, cacheable

    def _mask(
        self,
        kind: LayerKind,
        positions: Positions,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None,
        past_key_values: Cache | None,
    ) -> Any:
        """→ the mask of a kind of layers, as their attention implementation takes it; `None` where it needs none."""
        if positions.offset is not None and self.config._attn_implementation != "flex_attention":
            return None
        create = create_causal_mask if kind.window is None else create_sliding_window_causal_mask
        return create(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask.get(kind.layer_type) if isinstance(attention_mask, dict) else attention_mask,
            past_key_values=past_key_values,
            and_mask_function=None if positions.documents is None else same_document(positions.documents),
            allow_is_causal_skip=positions.visible is None,
        )

    def _shared_bias(self, kind: LayerKind, positions: Positions, layer_idx: int) -> torch.Tensor | None:
        """→ what the schemes that layers share add to the scores: (H, span), or (B or 1, H, Q, K), or `None`."""
        if positions.offset is None:
            return self.position_embeddings.bias(positions, kind.schemes)
        if positions.kept_table(layer_idx) is not None:
            return None
        return self.position_embeddings.table(positions.span, positions.query.device, kind.schemes)

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
            attention_mask: (B, K), 0 on padding, or a ready (B, 1, Q, K) mask; with a `sliding_window`, a dictionary of
                ready masks by the `layer_types`.
            position_ids: (B, Q); counted over the real tokens of `attention_mask` by default. Where they do not
                increase from one token to the next, a new document starts: packed rows attend within documents only.
            past_key_values: keys and values of the tokens before these, or an empty cache.
                A position bias needs positions that go on by one from token to token then.
            use_cache: whether to return a cache. A packed row cannot be continued: it returns none, nor do positions
                that `position_sampling` drew.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given, if packed rows come with a
                cache, or if a position lies past a learned table.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        past_length = cached_length(past_key_values)
        check_mask(attention_mask, *inputs_embeds.shape[:2], past_length)
        attention_mask = simplify_mask(attention_mask)
        placed, cacheable = self._place(inputs_embeds, attention_mask, position_ids, past_key_values, past_length)
        masks = {
            kind: self._mask(kind, positions, inputs_embeds, attention_mask, past_key_values)
            for kind, positions in placed.items()
        }
        first = next(iter(placed.values()))
        position_ids, documents, batch_size = first.query, first.documents, inputs_embeds.shape[0]
        if documents is not None and "flash" in self.config._attn_implementation and "cu_seq_lens_q" not in kwargs:
            kwargs |= flash_lengths(documents, next(iter(masks.values())), batch_size)
        if self.training and self.config.position_start_augmentation and past_key_values is None:
            # distances stay: only what acts on absolute positions sees the shift
            position_ids = augment_starts(position_ids, documents, batch_size, self.config.max_position_embeddings)
        rotations = self.position_embeddings.rotations(position_ids, inputs_embeds.dtype)
        own = (layer.self_attn.position_embeddings.parameters() for layer in self.layers)
        parameters = [*self.position_embeddings.parameters(), *chain(*own)]
        biases = {}
        for kind, positions in placed.items():
            positions.query = position_ids
            positions.rotations = tuple(rotations[name] for name in kind.schemes if name in rotations)
            if past_key_values is not None and not torch.is_grad_enabled():
                keep_tables(positions, past_key_values, parameters)
            biases[kind] = self._shared_bias(kind, positions, self._kinds()[kind][0])
        if use_cache and past_key_values is None and cacheable:
            past_key_values = DynamicCache(config=self.config)

        hidden_states = self.dropout(self.position_embeddings.embed(inputs_embeds, position_ids))
        for layer in self.layers[: self.config.num_hidden_layers]:
            kind = layer.self_attn.kind
            hidden_states = layer(
                hidden_states,
                biases[kind],
                positions=placed[kind],
                attention_mask=masks[kind],
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class RelPosForCausalLM(RelPosPreTrainedModel, GenerationMixin):
    """The decoder with a language modelling head.

    Attributes:
        skip_logits: whether a forward with labels computes the loss a few rows at a time and returns no logits: the
            (B·N, V) matrix takes most of the memory of a small model's step and a good part of its time. Off by
            default, for callers that read the logits beside the loss; the training scripts set it.
    """

    skip_logits = False
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

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
            the mean loss in nats, if there are labels, and (B, Q, V) logits, unless `skip_logits` leaves them out.
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
        loss, logits = None, None
        if labels is not None and self.skip_logits and self._has_plain_head(outputs.last_hidden_state):
            given = {name: kwargs.get(name) for name in ("num_items_in_batch", "shift_labels")}
            loss = linear_cross_entropy(outputs.last_hidden_state, self.lm_head.weight, labels, **given)
        else:
            logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _has_plain_head(self, hidden_states: torch.Tensor) -> bool:
        """Whether the head is a plain matrix that lies here whole, of no adapter or quantiser, with the usual loss."""
        head = self.lm_head
        plain = type(head) is nn.Linear and type(head.weight) in (nn.Parameter, torch.Tensor) and head.bias is None
        whole = plain and head.weight.shape == (self.config.vocab_size, hidden_states.shape[-1])
        return whole and head.weight.device == hidden_states.device and self.loss_function is ForCausalLMLoss


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


class RelPosForQuestionAnswering(GenericForQuestionAnswering, RelPosPreTrainedModel):
    """The decoder with a score for each token to be the start or the end of the answer."""

    def __init__(self, config: RelPosConfig) -> None:
        RelPosPreTrainedModel.__init__(self, config)
        self.model = RelPosModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()
