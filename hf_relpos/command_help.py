"""The parser of all programs: what it says of a wrong flag, and the pages of `--help`, the usual flags first, then the
others by purpose, those of transformers last."""

import argparse
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any


MOST_CHOICES = 60  # characters of them that a flag shows before its help
VALUES = {"?": "[{}]", "*": "[{} ...]", "+": "{} [{} ...]"}  # by the number that a flag takes
TYPES = {"int": "N", "float": "X", "str": "TEXT", "string_to_bool": "true|false"}
# names of flags that mean the same, ours and those of other programs; where several are known the first one is meant
SAME = [
    group.split()
    for group in (
        "train_file validation_file text data corpus dataset input input_file train_data train_text data_file "
        "data_path data_dir train_files train dataset_path text_file texts files file source folder path dataset_name",
        "prompt text input message query question",
        "prompt_file prompts prompts_file file input_file",
        "output_dir output out o save_dir save_to save output_folder out_dir outdir output_path dir folder "
        "destination target",
        "output_file output out o save save_to",
        "validation_file eval_file valid_file val_file dev_file eval_data val_data eval_text validation_text "
        "eval_dataset",
        "test_file test test_data test_text",
        "model_name_or_path model model_path model_name model_dir model_id checkpoint pretrained base_model from name",
        "model_size size model",
        "learning_rate lr rate max_lr peak_lr base_lr",
        "max_steps steps num_steps n_steps nsteps train_steps num_train_steps total_steps iterations iters max_iters "
        "num_iterations updates max_updates",
        "num_train_epochs epochs epoch num_epochs n_epochs max_epochs passes",
        "seed seeds random_seed random_state rng_seed num_seeds n_seeds",
        "pos_embedding_type schemes scheme position_embedding position_embedding_type pos_embedding pos_emb pe "
        "position_scheme positional_encoding position_encoding position_type embedding positions encoding pos_encoding",
        "block_size train_length context_length seq_len seq_length sequence_length max_length max_seq_length "
        "max_seq_len max_len context context_size ctx n_ctx ctx_len length training_length window",
        "run_length eval_lengths eval_length lengths length max_length test_length context_length seq_len block_size",
        "per_device_train_batch_size batch_size batch bs train_batch_size micro_batch_size per_device_batch_size",
        "per_device_eval_batch_size eval_batch_size batch_size",
        "gradient_accumulation_steps accumulation grad_accum accumulate gradient_accumulation",
        "config_overrides hidden_size num_hidden_layers num_attention_heads intermediate_size num_layers n_layers "
        "n_layer layers depth num_heads n_heads n_head heads d_model dim width n_embd hidden_dim dropout",
        "vocab_size vocab vocabulary vocabulary_size n_vocab",
        "tokenizer_name tokenizer tokenizer_path tokenizer_name_or_path",
        "weight_decay wd decay",
        "warmup_steps warmup num_warmup_steps warmup_iters",
        "lr_scheduler_type scheduler schedule lr_scheduler lr_schedule",
        "optim optimizer",
        "max_grad_norm clip grad_clip gradient_clipping clip_grad",
        "resume_from_checkpoint resume continue continue_from",
        "use_cpu cpu no_cuda no_gpu device",
        "attn_implementation attention attn",
        "bf16 precision mixed_precision dtype",
        "dtype torch_dtype precision",
        "max_new_tokens max_tokens num_tokens n_tokens tokens length max_length new_tokens n",
        "max_windows windows num_windows n_windows limit max_samples num_samples max_eval_samples",
        "max_eval_samples limit max_samples",
        "eval_split split",
        "num_parallel parallel jobs num_jobs n_jobs j workers num_workers processes num_processes",
        "preprocessing_num_workers num_workers workers num_proc",
        "budget time max_time time_limit time_budget minutes",
        "experiment grid yaml experiment_file file sweep config_file",
        "config config_file yaml",
        "results result result_file result_files input files file",
        "sweep sweep_dir folder input runs",
        "import_file scheme_file import plugin",
        "report_to tracker wandb",
        "num_beams beams beam_size",
        "private is_private",
    )
]
FOOT = """\
A flag may be written with - for _. One that takes true or false means true alone. --debug shows the traceback
of an error."""


def make_parser(
    types: Sequence[type], description: str | None = None, usual: Sequence[str] = (), required: Sequence[str] = ()
) -> Any:
    """An `HfArgumentParser` whose errors are a `ValueError` of one line; `usual` and `required` as in `help_page`."""
    from transformers import HfArgumentParser

    class ArgumentParser(HfArgumentParser):
        given: Sequence[str] = ()

        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            self.given = list(args or ())
            found, unknown = super().parse_known_args(args, namespace)
            if unknown:
                self._refuse(unknown[0])
            return found, []

        def error(self, message: str) -> None:
            if "are required" in message:  # maybe since it was misspelt
                for word in self.given:
                    if word.startswith("--") and word.partition("=")[0] not in self._option_string_actions:
                        self._refuse(word)
                message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)
            if wrong := re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
                message += nearest(wrong[1], re.findall(r"[\w-]+", wrong[2]))
            raise ValueError(message)

        def _refuse(self, word: str) -> None:
            hint = flag_hint(word, self._option_string_actions, usual)
            raise ValueError(f"unknown flag: {word!r}{hint}; --help lists those that exist.")

        def format_help(self) -> str:
            return help_page(self, types, usual, required)

    return ArgumentParser(types, description=description, allow_abbrev=False, formatter_class=HelpFormatter)


def flag_hint(word: str, flags: Iterable[str], usual: Sequence[str] = ()) -> str:
    """→ "", or the flag that was probably meant: what is called so elsewhere, else what is spelt alike.

    Args:
        word: what was given: "--text", "--lr=1e-3", or a name from a file.
        flags: those that exist, with or without dashes.
        usual: names of which one is meant rather than another.
    """
    known = {flag.lstrip("-").replace("-", "_"): flag for flag in reversed([*flags])}  # of two spellings the first
    name = word.partition("=")[0].lstrip("-").replace("-", "_").lower()
    found = [each for group in SAME if name in group for each in group if each in known and each != name]
    found.sort(key=lambda each: each not in usual)
    return f" (did you mean {known[found[0]]!r}?)" if found else nearest(word.partition("=")[0], flags)


def nearest(word: Any, words: Iterable[Any]) -> str:
    """→ "", or what was probably meant."""
    found = get_close_matches(str(word), list(map(str, words)), 1)
    return f" (did you mean {found[0]!r}?)" if found else ""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One spelling of each flag, what it takes in a word, and its default where it has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        word = metavar(action)
        return f"{action.option_strings[0]} {VALUES.get(action.nargs, '{}').format(word, word)}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.choices and metavar(action) == "NAME":
            text = f"{text.rstrip('. ')}{'. ' if text else ''}One of {', '.join(map(str, action.choices))}."
        if action.default is argparse.SUPPRESS or action.nargs == 0 or re.search("default|without it|without --", text):
            return text
        return f"{text} ({_default_text(action)})".strip()


def _default_text(action: argparse.Action) -> str:
    """What happens without a flag, in a word or two."""
    if action.required:
        return "required"
    if isinstance(action.default, bool):
        return f"default: {str(action.default).lower()}"
    if action.default is None or action.default == []:
        return "not set by default"
    return "empty by default" if action.default == "" else "default: %(default)s"


def metavar(action: argparse.Action) -> str:
    """What a flag takes, in a word."""
    if action.metavar:
        return str(action.metavar)
    if action.choices:
        shown = "{" + ",".join(map(str, action.choices)) + "}"
        return shown if len(shown) <= MOST_CHOICES else "NAME"
    name = action.dest
    if name.endswith(("_file", "_dir", "_folder")):
        return "PATH"
    return TYPES.get(getattr(action.type, "__name__", ""), "VALUE")


def help_page(
    parser: argparse.ArgumentParser, types: Sequence[type], usual: Sequence[str], required: Sequence[str]
) -> str:
    """The text of `--help`.

    Args:
        parser: with all flags.
        types: the dataclasses that they come from. A class may have `about`, a title for its flags, and `purposes`,
            title → pattern of names, for those that stand in groups of their own, behind all others.
        usual: the names of the flags that stand first, in this order; all of the classes by default.
        required: those that stand in the usage; those without a default by default.
    """
    actions = {action.dest: action for action in reversed(parser._actions) if action.help != argparse.SUPPRESS}
    actions = dict(reversed(actions.items()))  # of a flag and its --no_ twin the first
    for name, action in actions.items():
        action.help = action.help or _inherited_help(name, types)
    for name in required:
        actions[name].required = actions[name].default is None  # whatever checks it, and when
    words = [action for action in actions.values() if not action.option_strings]
    required = required or [action.dest for action in actions.values() if action.required and action.option_strings]
    named = [f"--{name} {metavar(actions[name])}" for name in required]
    formatter = parser._get_formatter()
    formatter.add_usage(" ".join([parser.prog, *(str(word.metavar) for word in words), *named, "[flags]"]), [], [])
    formatter.add_text(parser.description)
    for title, names in flag_groups([*actions], types, usual).items():
        formatter.start_section(title)
        formatter.add_arguments([actions[name] for name in names])
        formatter.end_section()
    formatter.add_text(FOOT)
    return formatter.format_help()


def flag_groups(names: Sequence[str], types: Sequence[type], usual: Sequence[str]) -> dict[str, list[str]]:
    """Title → the names of its flags, each name once."""
    usual = usual or [name for cls in types for name in cls.__dataclass_fields__]
    groups: dict[str, list[str]] = {"usual flags": [name for name in usual if name in names]}
    for cls in types:
        groups[getattr(cls, "about", "other flags")] = []
    by_purpose: dict[str, list[str]] = {title: [] for cls in types for title in getattr(cls, "purposes", {})}
    for name in names:
        cls = next((cls for cls in types if name in cls.__dataclass_fields__), None)
        if cls is not None and name not in usual:
            purposes = getattr(cls, "purposes", {})
            title = next((title for title, pattern in purposes.items() if re.fullmatch(pattern, name)), None)
            (by_purpose[title] if title else groups[getattr(cls, "about", "other flags")]).append(name)
    groups |= by_purpose
    told = {"words", *(name for group in groups.values() for name in group)}
    groups["of every sub-command"] = [name for name in names if name not in told]
    return {title: names for title, names in groups.items() if names}


def _inherited_help(name: str, types: Sequence[type]) -> str | None:
    """What a class of transformers says of a flag whose default alone is another here."""
    fields = (base.__dict__.get("__dataclass_fields__", {}).get(name) for cls in types for base in cls.__mro__)
    return next((each.metadata["help"] for each in fields if each is not None and "help" in each.metadata), None)
