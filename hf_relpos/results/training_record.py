"""`training.json`, the record that a training run leaves with its weights: its flags, its command, and reading it."""

import json
import shlex
from contextlib import suppress
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from ..environment import place_name
from ..file_reading import TRAINING_RECORD, read_json
from .schema import check_schema


# flags that do not change the result
RESULT_NEUTRAL_FLAGS = {
    "attn_implementation",
    "disable_tqdm",
    "logging_steps",
    "preprocessing_num_workers",
    "report_to",
    "save_steps",
    "save_total_limit",
}
# those, and where the files and logs of a run go
UNRECORDED_FLAGS = RESULT_NEUTRAL_FLAGS | {
    "output_dir",
    "logging_dir",
    "run_name",
    "project",
    "push_to_hub",
    "resume_from_checkpoint",
    "override_recipe",
    "include_num_input_tokens_seen",
}


# flags of text that may be called as a folder is: "/" between documents, "rotary/none"
NO_PLACES = {"document_separator", "text_column", "pos_embedding_type", "layer_types"}


def given_flags(*arguments: Any) -> dict[str, Any]:
    """The flags that differ from their defaults, as a command line would have them, without paths and secrets.

    Args:
        arguments: instances of the scripts' dataclasses; some know in `given` what they were given.
    """
    flags = {}
    for instance in arguments:
        given = getattr(instance, "given", None)
        given = non_default_fields(instance) if given is None else given
        for name, value in given.items():
            if name in UNRECORDED_FLAGS or name.startswith(("hub_", "trackio_")) or name.endswith("_token"):
                continue
            if isinstance(value, str) and value and name not in NO_PLACES:
                with suppress(OSError, ValueError, RuntimeError):  # text that is too long for a path
                    # paths of this machine stay here
                    is_path = name.endswith("_file") or Path(value).expanduser().exists()
                    value = place_name(value) if is_path else value
            flags[name] = value.value if isinstance(value, Enum) else value
    return flags


def non_default_fields(instance: Any) -> dict[str, Any]:
    """Field name → value, for the fields of a dataclass instance whose value is not the default."""
    found = {}
    for each in fields(instance):
        default = each.default_factory() if callable(each.default_factory) else each.default
        value = getattr(instance, each.name, default)
        if each.init and value is not None and value != default:
            found[each.name] = value
    return found


def command_line(script: str, flags: dict[str, Any]) -> str:
    """→ `hf-relpos NAME --flag value ..`, over several lines where it is long, to be pasted into a shell."""
    words = [f"hf-relpos {script}"]
    for name, value in flags.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        values = [each if isinstance(each, str) else json.dumps(each) for each in values]
        words.append(" ".join([f"--{name}", *map(shlex.quote, values)]))
    return " ".join(words) if sum(map(len, words)) < 90 else " \\\n    ".join(words)


def read_record(name: str) -> dict[str, Any]:
    """The record of a saved model, of a folder or of the Hub; empty if there is none.

    Raises:
        ValueError: naming the file and the field, for what is no record.
    """
    from transformers.utils import cached_file

    path = cached_file(name, TRAINING_RECORD, _raise_exceptions_for_missing_entries=False)
    if not path:
        return {}
    record = read_json(path, "training record")
    check_schema(record, "TRAINING_FILE", f"training record {path!r}")
    return record


def passes_text(passes: float) -> str:
    """How often a text was read, in two digits: "0.14 passes", "12 passes"."""
    return f"{two_digits(passes)} passes"


def two_digits(number: float) -> str:
    """ "0.14", "1.5", "12", "340" """
    return f"{number:.2g}" if number < 99.5 else f"{number:.0f}"
