"""The configuration of the RelPos family."""

import math
from typing import Any

from transformers import PreTrainedConfig

from .adapters import KnownToAdapters
from .configuration_checks import (
    ROPE_KEYWORDS,
    check_gates,
    check_heads,
    check_keywords,
    check_ranges,
    check_sizes,
    constructor_fields,
    drop_options_of_others,
    is_near_miss,
    join_rope_keywords,
    refuse_near_miss,
    replaced_rotation,
    warn_of_unknown,
)
from .scheme_registry import layer_groups, position_embedding_classes
from .scheme_rotary import LENGTH_DEPENDENT_ROPE_TYPES


MODEL_SIZES = {
    # name: layers, width, heads (3.1M, 10.6M, 25.2M, 84.9M and 201.3M weights besides the embeddings)
    "xsmall": (4, 256, 4),
    "small": (6, 384, 6),
    "medium": (8, 512, 8),
    "large": (12, 768, 12),
    "xlarge": (16, 1024, 16),
}


class RelPosConfig(KnownToAdapters, PreTrainedConfig):
    r"""Configuration of a RelPos model: a decoder whose position scheme is one field.

    The fields of the architecture have the names of transformers; with them the models of other families can be
    imported (`hf_relpos.import_model`).

    Args:
        vocab_size: number of tokens.
        hidden_size: width C.
        intermediate_size: width of the MLP; 4 · hidden_size by default.
        num_hidden_layers: number of layers.
        num_attention_heads: number of query heads H.
        num_key_value_heads: number of key and value heads, a divisor of H (grouped-query attention); H by default.
        head_dim: width of a head, D; hidden_size / num_attention_heads by default.
        hidden_act: activation of the MLP, a key of `transformers.activations.ACT2FN`.
        use_gated_mlp: whether the activation of a second matrix, `gate_proj`, multiplies `up_proj`, as in Llama.
        mlp_bias: whether the matrices of the MLP have biases.
        attention_bias: whether the projections to queries, keys and values have biases, as in Qwen2.
        attention_out_bias: whether the projection of what attention returns has one; as `attention_bias` by default.
        qk_norm: RMSNorm of queries and keys: "head" for one over each head, as in Qwen3, "layer" for one over all
            heads, as in OLMo2, or `None`.
        norm_type: "rms_norm", or "layer_norm" as in GPT-2.
        norm_bias: whether LayerNorms have a bias.
        norm_placement: where the norms of a layer are: "before" attention and MLP, or "after" them, before their sum
            with the residual, as in OLMo2.
        use_parallel_residual: whether attention and MLP of a layer read the same residual, as in GPT-NeoX.
        embed_norm: whether the embeddings pass a norm before the first layer, as in Bloom.
        max_position_embeddings: rows of a learned table, range of position-start augmentation and of position sampling,
            and what tools take as the model's window. Only a learned table refuses longer input.
        train_length: the length in tokens that the model was trained at; written by training, read by evaluation
            and by schemes that go by it.
        pos_embedding_type: the position scheme, one of `list_position_embeddings()` or several joined by "+"; joined
            by "/", the schemes of successive layers, repeated until there is one for each layer.
        layer_types: for each layer "full_attention" or "sliding_attention", as in transformers; all full by default,
            all sliding if only `sliding_window` is given.
        sliding_window: how many keys a query sees at most in layers that slide, its own among them.
        pos_embedding_kwargs: options of the scheme; only the keys of its `defaults` are accepted.
        position_gates: names of the schemes of which a learned factor, from 0, multiplies what they add to the scores,
            for each head, or to the embeddings: laid over trained weights, they change nothing at first.
        rope_parameters: for schemes that rotate, as in transformers: `rope_type` ("default", "linear", "dynamic",
            "yarn", "llama3", "longrope" or "proportional"), `rope_theta`, `partial_rotary_factor` and what the type
            takes. `rope_theta`, `partial_rotary_factor` and `rope_scaling` as keywords, as Llama takes them, are moved
            there.
        position_start_augmentation: in training, the positions of each sequence start at
            k ~ U{0 .. max_position_embeddings − length} (SHAPE, arXiv 2109.05644).
        position_sampling: in training, the positions of each document leave numbers out, below
            `max_position_embeddings`: "randomized" (as many distinct ones as it has tokens, arXiv 2305.16843), "pose"
            (two parts with a skip between them, arXiv 2309.10400) or `None`. Distances change too.
        hidden_dropout: dropout of the embeddings and of each residual branch.
        attention_dropout: dropout of the attention weights; above 0 it rules out the fused kernels.
        embedding_multiplier: factor of the token embeddings where they enter the first layer, and of `inputs_embeds`,
            as in Granite; sqrt(C) by default, with which embeddings from N(0, 1/C) enter at a scale of 1.
        initializer: initial weights of linear layers and embeddings: "fan_in" for N(0, 1/inputs), divided by
            sqrt(2 · layers) in the output projections of attention and MLP, and N(0, 1/C) for embeddings, or "normal"
            for N(0, initializer_range²); "normal" by default if `initializer_range` is given, else "fan_in".
        initializer_range: standard deviation of initial weights, 0.02 by default; with `initializer` "fan_in" only
            that of what is neither a linear layer nor an embedding (the gates of `fox`).
        rms_norm_eps: epsilon of the RMSNorms.
        layer_norm_eps: epsilon of the LayerNorms.
        use_cache: whether the model returns its keys and values.
        tie_word_embeddings: whether input and output embeddings are one matrix.
        pad_token_id, bos_token_id, eos_token_id: ids of the tokenizer's special tokens.
        imported_from: of a model that another family's was made into: its `base_model`, `revision`, `license` and
            `model_type`, and `changes`, field → value there and here; written by the import, `None` otherwise.

    Raises:
        ValueError: for an unknown scheme or option, for heads that do not divide the width, for sizes below 1, for a
            keyword that is no field but resembles one; other unknown keywords are kept and warned of.
    """

    model_type = "relpos"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    ignore_keys_at_rope_validation = {"partial_rotary_factor"}
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int | None = None
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "relu2"
    use_gated_mlp: bool = False
    mlp_bias: bool = False
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    qk_norm: str | None = None
    norm_type: str = "rms_norm"
    norm_bias: bool = True
    norm_placement: str = "before"
    use_parallel_residual: bool = False
    embed_norm: bool = False
    max_position_embeddings: int = 2048
    train_length: int | None = None
    pos_embedding_type: str = "linear_cpb"
    pos_embedding_kwargs: dict | None = None
    position_gates: list | None = None
    sliding_window: int | None = None
    position_start_augmentation: bool = False
    position_sampling: str | None = None
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.0
    embedding_multiplier: float | None = None
    initializer: str | None = None
    initializer_range: float | None = None
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    imported_from: dict | None = None

    def __post_init__(
        self, rope_parameters: dict | None = None, layer_types: list[str] | None = None, **kwargs: Any
    ) -> None:
        given = {name: kwargs.pop(name, None) for name in ROPE_KEYWORDS}
        rope_parameters = join_rope_keywords(self.pos_embedding_type, rope_parameters, given)
        check_keywords(type(self), kwargs)
        check_sizes(self)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        self._choose_scales()
        check_heads(self)
        check_ranges(self)
        check_gates(self)
        self._configure_positions(rope_parameters)
        self._configure_layers(layer_types)
        self._plan_tensor_parallelism()
        super().__post_init__(**kwargs)

    @classmethod
    def from_size(cls, model_size: str, **overrides: Any) -> "RelPosConfig":
        """The configuration of a named size: "xsmall", "small", "medium", "large" or "xlarge".

        Args:
            model_size: the name.
            **overrides: any field of the configuration.

        Raises:
            ValueError: for an unknown size or an invalid field.
        """
        if model_size not in MODEL_SIZES:
            raise ValueError(f"`model_size` must be one of {list(MODEL_SIZES)}, got {model_size!r}.")
        fields = zip(("num_hidden_layers", "hidden_size", "num_attention_heads"), MODEL_SIZES[model_size])
        return cls(**{**dict(fields), **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; keywords are checked and followed as those of the constructor, those of the rotation join
        what is saved, and of another scheme than the saved one the saved options that it does not take are dropped.

        Args:
            config_dict: fields, as config.json holds them.
            **kwargs: fields that replace saved ones, and what is left to the caller.

        Raises:
            ValueError: as the constructor, and for a keyword that is no field but resembles one.
        """
        for name in kwargs:
            refuse_near_miss(cls, name, words=False)  # options of loading are among them
        config_dict = dict(config_dict)
        # set on what is made, as transformers does, a field would be neither checked nor followed
        given = {name: kwargs.pop(name) for name in constructor_fields(cls) if name in kwargs}
        drop_options_of_others(config_dict, given)
        config_dict |= given
        given = {name: kwargs.pop(name) for name in ("rope_parameters", *ROPE_KEYWORDS) if name in kwargs}
        if given:
            config_dict |= given | {"rope_parameters": replaced_rotation(config_dict.get("rope_parameters"), given)}
        # a file may hold what other tools put there: it is kept and warned of, not refused
        others = {name: config_dict.pop(name) for name in [*config_dict] if is_near_miss(cls, name)}
        made = super().from_dict(config_dict, **kwargs)
        for name, value in others.items():
            warn_of_unknown(cls, name)
            setattr(made[0] if isinstance(made, tuple) else made, name, value)
        return made

    @property
    def max_positions(self) -> int | None:
        """The number of positions that the model can serve; `None` for no limit."""
        classes = position_embedding_classes(self.pos_embedding_type).values()
        return self.max_position_embeddings if any(cls.has_position_limit for cls in classes) else None

    @property
    def has_position_bias(self) -> bool:
        """Whether any layer adds a bias to the attention scores."""
        return any(group.has_bias for group in layer_groups(self))

    @property
    def has_distance_table(self) -> bool:
        """Whether any layer adds a bias that is a function of the head and the distance alone."""
        return any(group.has_distance_table for group in layer_groups(self))

    @property
    def requires_unpacked(self) -> bool:
        """Whether each sequence must have a row of its own, since the angles of the rotation depend on its length."""
        rope_parameters = getattr(self, "rope_parameters", None) or {}
        return rope_parameters.get("rope_type") in LENGTH_DEPENDENT_ROPE_TYPES

    def _choose_scales(self) -> None:
        # what was saved before these fields existed has the scales of that time
        saved_without = self.transformers_version is not None and self.initializer is None
        if self.initializer is None:
            self.initializer = "normal" if saved_without or self.initializer_range is not None else "fan_in"
        if self.embedding_multiplier is None:
            self.embedding_multiplier = 1.0 if saved_without else math.sqrt(self.hidden_size)
        if self.initializer_range is None:
            self.initializer_range = 0.02

    def _plan_tensor_parallelism(self) -> None:
        """Adds what only some architectures have; transformers warns of a plan for modules that are not there."""
        plan = dict(type(self).base_model_tp_plan)
        if self.use_gated_mlp:
            plan["layers.*.mlp.gate_proj"] = "colwise"
        if self.qk_norm == "head":
            plan |= {f"layers.*.self_attn.{name}": "replicated_with_grad_allreduce" for name in ("q_norm", "k_norm")}
        if plan != self.base_model_tp_plan:
            self.base_model_tp_plan = plan

    def _configure_positions(self, rope_parameters: dict | None) -> None:
        """Checks the scheme and its options and lets each scheme put them where they belong."""
        given = self.pos_embedding_kwargs if self.pos_embedding_kwargs is not None else {}
        if not isinstance(given, dict):
            raise ValueError(f"`pos_embedding_kwargs` must be a dictionary, got {given!r}.")
        classes = position_embedding_classes(self.pos_embedding_type)
        allowed = {name: value for cls in classes.values() for name, value in cls.defaults.items()}
        for name, value in given.items():
            if name not in allowed:
                raise ValueError(
                    f"`pos_embedding_kwargs` of {self.pos_embedding_type!r} may hold {sorted(allowed)}, got {name!r}."
                )
            number = int if isinstance(allowed[name], int) else (int, float)
            if not isinstance(value, number) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(
                    f"`pos_embedding_kwargs` {name!r} must be a positive number like {allowed[name]!r}, got {value!r}."
                )
        kept = {}
        self.rope_parameters = rope_parameters
        for cls in classes.values():
            kept |= cls.configure(self, {name: value for name, value in given.items() if name in cls.defaults})
        if self.rope_parameters is None:
            # transformers completes and saves the field of any config that has it
            del self.rope_parameters
        self.pos_embedding_kwargs = kept

    def _configure_layers(self, layer_types: list[str] | None) -> None:
        num_layers, allowed = self.num_hidden_layers, ("full_attention", "sliding_attention")
        num_parts = self.pos_embedding_type.count("/") + 1
        if num_parts > num_layers:
            raise ValueError(
                f"`pos_embedding_type` must have at most `num_hidden_layers`={num_layers} parts between '/', "
                f"got {self.pos_embedding_type!r}."
            )
        if layer_types is None and self.sliding_window is not None:
            layer_types = ["sliding_attention"] * num_layers
        if layer_types is None:
            return  # transformers takes a field that is there for a list
        fits = isinstance(layer_types, (list, tuple)) and len(layer_types) == num_layers
        if not fits or any(layer_type not in allowed for layer_type in layer_types):
            raise ValueError(
                f"`layer_types` must be a list of `num_hidden_layers`={num_layers} of {list(allowed)}, "
                f"got {layer_types!r}."
            )
        if self.sliding_window == 1:  # a query would see itself alone, and caches of transformers keep no keys then
            raise ValueError("`sliding_window` must be at least 2, got 1.")
        if ("sliding_attention" in layer_types) != (self.sliding_window is not None):
            raise ValueError(
                "`sliding_window` must be given if, and only if, `layer_types` has 'sliding_attention', "
                f"got {self.sliding_window} with {layer_types}."
            )
        self.layer_types = list(layer_types)


# a configuration that is saved alone carries its code too
RelPosConfig.register_for_auto_class()
