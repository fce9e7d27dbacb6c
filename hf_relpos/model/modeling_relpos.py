"""The RelPos models: a decoder in which the position scheme is the one thing that changes.

Shape letters: B batch, H query heads, Q query length, K key length, C hidden size, V vocabulary. No scheme is named in
this file: `scheme_base.py` has the interface, `scheme_registry.py` the choice.
"""

import inspect
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_mask import check_continuous_batching, check_implementation
from .attention_plan import AttentionPlan
from .attention_planner import example_embeds, plan_layers
from .configuration_relpos import RelPosConfig
from .decoder_layer import RelPosAttention, RelPosDecoderLayer
from .kept_steps import kept_steps
from .key_positions import pad_to_cache
from .norms import RelPosDropout, build_norm, drop
from .position_augmentation import augment_starts
from .saved_code import SelfContainedModel
from .scheme_base import SelfInitialized
from .scheme_registry import LayerGroup, Rotates, add_biases, build_position_embeddings
from .token_positions import TokenPositions, locate_tokens, simplify_mask
from .transformers_versions import (
    CACHE_NAME,
    CACHE_NAMES,
    FORWARD_KEYWORDS,
    CausalLMOutput,
    ModelOutput,
    check_keywords,
    takes_cache,
)
from .unread_logits import loss_and_logits, output_class


class RelPosPreTrainedModel(SelfContainedModel, PreTrainedModel):
    config_class = RelPosConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RelPosDecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
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

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; its paged attention has no place for a position bias, so bias schemes are refused."""
        check_continuous_batching(self.config)
        return super().init_continuous_batching(*args, **kwargs)

    def attention_path(self) -> str:
        """What computes the attention over rows without gaps in their positions, on this device and in this mode.

        Returns:
            "eager", "sdpa", "flex_attention", ..: the implementation of transformers of that name, without a bias;
            "sdpa" hides the future by `is_causal` where no row has padding. With a position bias, and without one where
            a CPU trains in bf16:
            "distance_bias:triton", "distance_bias:native", "distance_bias:blocks", ..: `distance_bias_attention`, on a
            table of the distances, by the `TableKernel` of that name; "distance_bias:key_bias": the same for a fixed
            line in bf16, as a value per key, where a CPU is fast in bf16;
            "flex_attention:table": FlexAttention, which reads the table;
            "sdpa:key_bias": "sdpa" with extra dimensions, in which the keys hold their bias, as they do beside a table;
            "eager:dense_bias", "sdpa:dense_bias", ..: that implementation, with a bias for each pair of tokens.
            Where layers differ, what they have, in the order of the layers, joined by "/".
        """
        model, embeds = self.base_model, example_embeds(self.base_model.embed_tokens, 2)
        groups = [layer.self_attn.group for layer in islice(model.layers, model.config.num_hidden_layers)]
        tokens = locate_tokens(model.config, embeds, None, None, None, groups, model.training)
        plans = plan_layers(model, groups, tokens, embeds)
        return "/".join(dict.fromkeys(plan.name for plan in plans.values()))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SelfInitialized):
            module.reset_parameters()
        elif self.config.initializer == "fan_in" and isinstance(module, nn.Linear):
            std = module.in_features**-0.5 * getattr(module, "initial_scale", 1.0)
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif self.config.initializer == "fan_in" and isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
            # the row that padding reads; without the check, a loaded one would be overwritten too
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "RelPosPreTrainedModel":
        """As in transformers, from safetensors alone, and under the scheme that the checkpoint was trained with.

        Raises:
            ValueError: if the requested `pos_embedding_type` is not that of the checkpoint, or for pickled weights.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        if not kwargs["use_safetensors"]:
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
        self.dropout = RelPosDropout(config.hidden_dropout)
        self.layers = nn.ModuleList(RelPosDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.embed_norm = build_norm(config) if config.embed_norm else nn.Identity()
        self.norm = build_norm(config)
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
        device, tables = example_embeds(self.embed_tokens, 1).device, []
        for attention in (layer.self_attn for layer in self.layers):
            shared = self.position_embeddings.table(length, device, attention.group.schemes)
            terms = (shared, attention.position_embeddings.table(length, device))
            tables.append(add_biases(None if term is None else term.to(device) for term in terms))
        if all(table is None for table in tables):
            raise ValueError(
                f"`pos_embedding_type` must have a bias that is a function of the distance, "
                f"got {self.config.pos_embedding_type!r}."
            )
        nothing = torch.zeros(self.config.num_attention_heads, length, device=device)
        return torch.stack([nothing if table is None else table for table in tables])

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        """Runs the decoder.

        Args:
            input_ids: (B, Q) token ids; or `inputs_embeds`, (B, Q, C).
            attention_mask: (B, K), 0 on padding, or a ready (B, 1, Q, K) mask; with a `sliding_window`, a dictionary of
                ready masks by the `layer_types`.
            position_ids: (B, Q); counted over the real tokens of `attention_mask` by default. Where they do not
                increase from one token to the next, a new document starts: packed rows attend within documents only.
            cache: keys and values of the tokens before these, or an empty cache.
                With a position bias, positions must then increase by one from token to token.
            use_cache: whether to return a cache. A packed row cannot be continued: it returns none, nor do positions
                that were drawn at random.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given, if packed rows come with a
                cache, or if a position lies past a learned table.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.config.embedding_multiplier != 1:
            inputs_embeds = inputs_embeds * self.config.embedding_multiplier
        paged = None if cache is None or isinstance(cache, Cache) else cache
        if paged is None:
            check_keywords(kwargs, position_ids, self.config._attn_implementation)
        else:  # continuous batching says itself which tokens see which
            cache = None
        layers = [*islice(self.layers, self.config.num_hidden_layers)]
        groups = [layer.self_attn.group for layer in layers]
        tokens = locate_tokens(self.config, inputs_embeds, attention_mask, position_ids, cache, groups, self.training)
        position_ids = self._augment(tokens, inputs_embeds.shape[0])
        given = self._plan(groups, tokens, position_ids, inputs_embeds)
        if use_cache and cache is None and paged is None and tokens.cacheable:
            cache = DynamicCache(config=self.config)
        hidden_states = drop(self.dropout, self.embed_norm(self.position_embeddings.embed(inputs_embeds, position_ids)))
        for layer, group in zip(layers, groups):
            plan, shared_bias, rotates = given[group]
            hidden_states = layer(
                hidden_states,
                shared_bias,
                *rotates.factors,
                plan=plan,
                rotates=rotates,
                use_cache=use_cache,
                **{CACHE_NAME: cache if paged is None else paged},
                **kwargs,
            )
        return ModelOutput(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})

    def _plan(
        self, groups: list[LayerGroup], tokens: TokenPositions, position_ids: torch.Tensor, inputs_embeds: torch.Tensor
    ) -> dict[LayerGroup, tuple[AttentionPlan, torch.Tensor | None, Rotates]]:
        """→ what the layers of each group are given: how they attend, the bias that they share, their rotations."""
        kept = kept_steps(self, groups, tokens, inputs_embeds)
        kept_rotation = None if kept is None else partial(kept.rotation, tokens)
        lengths = tokens.lengths if self.config.requires_unpacked else None
        rotations = self.position_embeddings.rotations(position_ids, inputs_embeds.dtype, kept_rotation, lengths)
        plans, given = plan_layers(self, groups, tokens, inputs_embeds, kept), {}
        for group, plan in plans.items():
            rotates = Rotates([rotations[name] for name in group.schemes if name in rotations])
            given[group] = plan, plan.shared_bias(), rotates
        return given

    def _augment(self, tokens: TokenPositions, batch_size: int) -> torch.Tensor:
        """→ the positions that schemes see which act on positions themselves; distances stay as they are."""
        if not (self.training and self.config.position_start_augmentation) or tokens.cache is not None:
            return tokens.position_ids
        limit = self.config.max_position_embeddings
        return augment_starts(tokens.position_ids, tokens.documents, batch_size, limit)


class RelPosForCausalLM(RelPosPreTrainedModel, GenerationMixin):
    """The decoder with a language modelling head.

    Attributes:
        skip_logits: the (B·N, V) logits take most of the memory of a small model's step and a good part of its time.
            `None`, the default: a training step with labels computes the loss a few rows at a time, and the logits
            when something reads them. `True`: any forward with labels returns no logits, as the training scripts want
            it. `False`: logits are always computed.
    """

    skip_logits: bool | None = None
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

    generate = takes_cache(GenerationMixin.generate)

    def create_masks_for_generate(
        self, config: RelPosConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> Any:
        """The mask that `generate` gives `forward` beside a static cache: a ready one, as in transformers, or with a
        position bias (B, width of the cache), from which the positions of the keys are counted."""
        if not self.config.has_position_bias:
            return create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs)
        attention_mask = simplify_mask(attention_mask)
        if attention_mask is None or attention_mask.shape[1] == inputs_embeds.shape[1]:  # nothing is cached yet
            return attention_mask
        return pad_to_cache(attention_mask, kwargs[CACHE_NAME])

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutput:
        """Runs the model; arguments as in `RelPosModel.forward`.

        Args:
            labels: (B, Q) token ids, −100 where there is no target; shifted here, as everywhere in transformers.
            logits_to_keep: compute the logits of the last n tokens only, or of the given indices; 0 for all.
            skip_logits: instead of the attribute of this name.

        Returns:
            the mean loss in nats, if there are labels, and (B, Q, V) logits, unless `skip_logits` leaves them out.
        """
        of_model = kwargs
        if labels is not None and self.loss_function is not ForCausalLMLoss:  # a loss of the user's, with its keywords
            taken = inspect.signature(self.loss_function).parameters
            of_model = {name: value for name, value in kwargs.items() if name not in taken or name in FORWARD_KEYWORDS}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **of_model,
        )
        skip_logits = self.skip_logits if skip_logits is None else skip_logits
        loss, logits = loss_and_logits(self, outputs.last_hidden_state, labels, logits_to_keep, skip_logits, kwargs)
        return output_class(logits)(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.cache},
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
        self.dropout = RelPosDropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class RelPosForQuestionAnswering(GenericForQuestionAnswering, RelPosPreTrainedModel):
    """The decoder with a score for each token to be the start or the end of the answer."""

    def __init__(self, config: RelPosConfig) -> None:
        RelPosPreTrainedModel.__init__(self, config)
        self.model = RelPosModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()
