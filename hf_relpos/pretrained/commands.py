"""`hf-relpos import` and `hf-relpos export`: their flags. The rest is imported when the flags were read, so that
`--help` does not wait for it."""

from dataclasses import dataclass, field
from pathlib import Path

from ..cli import command, parse_arguments, say_next
from ..origin import known_origin, missing_flags


IMPORT_DESCRIPTION = """\
Makes a pretrained model of another family into one of this: the same weights and logits, with the position scheme a
field. MODEL is a folder, a repository of the Hub or a GGUF file.

hf-relpos import HuggingFaceTB/SmolLM2-135M output/smollm2
"""
EXPORT_DESCRIPTION = """\
Writes a model of the family as a LlamaForCausalLM with the same logits, which vLLM, llama.cpp and other programs serve.
Its position scheme must be rotary, plain or scaled, and its layers those of a Llama: `hf-relpos train` makes
them with --config_overrides use_gated_mlp=true.

hf-relpos export output/yarn output/yarn-llama
"""


@dataclass
class ImportArguments:
    """Where the model comes from."""

    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a repository of the Hub."})
    base_model: str | None = field(
        default=None,
        metadata={
            "help": "The repository that a folder or file comes from, for record and card; none: it was never on the "
            "Hub."
        },
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the weights, by the Hub's name; by default that of its card."}
    )


@command
def import_main() -> None:
    """The command line of scripts/import_model.py."""
    args, words = parse_arguments((ImportArguments,), IMPORT_DESCRIPTION, positional="MODEL OUT")
    if len(words) != 2:
        raise ValueError(f"two words are needed, the model and the folder to write, got {words}.")
    from .importing import describe_import, import_pretrained

    name, folder = words
    config = import_pretrained(name, folder, args.revision, args.base_model, args.license)
    print(describe_import(config, name))
    print(f"wrote {folder}")
    if flags := missing_flags(known_origin(config.imported_from)):
        print(f"a push of it will need {flags}")
    _say_generation(folder)


@command
def export_main() -> None:
    """The command line of scripts/export_model.py."""
    (words,) = parse_arguments((), EXPORT_DESCRIPTION, positional="DIR OUT")
    if len(words) != 2:
        raise ValueError(f"two words are needed, the saved model and the folder to write, got {words}.")
    from .exporting import export_pretrained

    export_pretrained(*words)
    print(f"wrote {words[1]}, a LlamaForCausalLM")
    _say_generation(words[1])


def _say_generation(folder: str) -> None:
    """The next command for a model that was written with its tokenizer."""
    if any(Path(folder).glob("tokenizer*")):
        say_next("generate", model_name_or_path=folder, prompt="Once upon a time")
