"""Which model: the flags of training and finetuning. Nothing here imports the models, for which `--help` would wait."""

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass
class SavedModelArguments:
    """A saved model of the family to continue with."""

    about: ClassVar[str] = "the model"

    model_name_or_path: str | None = field(default=None, metadata={"help": "A saved model of the family."})
    pos_embedding_type: str | None = field(
        default=None,
        metadata={
            "help": "Position scheme, or several joined by '+'; linear_cpb by default. A saved model keeps its scheme."
        },
    )
    position_sampling: str | None = field(
        default=None,
        metadata={
            "help": "Positions of training sequences: randomized, pose, drawn below max_position_embeddings, or "
            "none; none by default, and as saved for a saved model."
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager or sdpa; sdpa by default."})


@dataclass
class ModelArguments(SavedModelArguments):
    """A new model of a named size, or a saved one to start from."""

    model_size: str | None = field(
        default=None, metadata={"help": "One of xsmall, small, medium, large, xlarge; xsmall by default."}
    )
    vocab_size: int | None = field(default=None, metadata={"help": "Entries of the tokenizer; 8192 by default."})
    pos_embedding_kwargs: str | None = field(
        default=None, metadata={"help": "Options of the scheme as JSON: '{\"partial_rotary_factor\": 0.5}'."}
    )
    rope_parameters: str | None = field(
        default=None,
        metadata={"help": 'The rotation as JSON: \'{"rope_type": "proportional", "partial_rotary_factor": 0.5}\'.'},
    )
    position_start_augmentation: bool = field(
        default=False, metadata={"help": "Start the positions of each training sequence at random."}
    )
    layer_types: str | None = field(
        default=None,
        metadata={
            "help": "Which layers see --sliding_window keys only, repeated over the layers: 'sliding/sliding/full'."
        },
    )
    sliding_window: int | None = field(
        default=None, metadata={"help": "Keys that a sliding layer sees; all layers slide without --layer_types."}
    )
    max_position_embeddings: int | None = field(
        default=None,
        metadata={
            "help": "Rows of a learned table and range of augmentation and sampling. 2048 by default; a learned table "
            "that is trained without them gets as many rows as a block has tokens."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Further fields of the configuration: 'num_key_value_heads=2,hidden_dropout=0'."},
    )


@dataclass
class ChangeArguments(SavedModelArguments):
    """A saved model of the family to continue with, and what changes in its position scheme."""

    pos_embedding_type: str | None = field(
        default=None,
        metadata={
            "help": "Another position scheme than that of the saved model: its parameters are initialized, all others "
            "are copied. 'none' for a rotary model is DroPE."
        },
    )
    pos_embedding_kwargs: str | None = field(default=None, metadata={"help": "Options of the scheme as JSON."})
    rope_parameters: str | None = field(
        default=None,
        metadata={
            "help": 'Another rotation as JSON: \'{"rope_type": "yarn", "factor": 4}\'; linear is interpolation. '
            "The original length is the training length, unless given."
        },
    )
    start_at_zero: bool | None = field(
        default=None,
        metadata={
            "help": "Multiply what new schemes add by learned factors that start at 0, so that the model begins as it "
            "was; by default for imported models that keep their schemes beside the new ones."
        },
    )
    layer_types: str | None = field(
        default=None,
        metadata={"help": "Layers that see --sliding_window keys only, repeated: 'sliding/sliding/full'; or 'full'."},
    )
    sliding_window: int | None = field(default=None, metadata={"help": "Keys that a sliding layer sees."})
    max_position_embeddings: int | None = field(
        default=None, metadata={"help": "Range of --position_sampling: the length that PoSE prepares for."}
    )
