#!/usr/bin/env python
"""Writes docs/reference.md: every flag of every sub-command and every field of the configuration, from the code.

python scripts/reference.py
"""

import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import TrainingArguments

from hf_relpos import RelPosConfig, cli
from hf_relpos.environment import write_text


PAGE = Path(__file__).parent.parent / "docs" / "reference.md"
INTRODUCTION = """# Flags and fields

Every flag of every sub-command and every field of the configuration, made by `python scripts/reference.py` from the
code. `--config run.yaml` holds flags in a file, those on the command line win; `--import_file my_scheme.py` registers
[schemes of your own](own_scheme.md); both are taken by every sub-command. A default of – is none.
"""
SERVED = "The options of `transformers serve`, which it starts: `hf-relpos serve --help` lists them.\n"


class Taken(Exception):
    """What a program asks of its command line: `args` are the dataclasses, the description, what it calls its words."""


def asked(name: str) -> tuple[tuple[type, ...], str, str | None]:
    """→ dataclasses of flags, description and name of the words without a flag, of a sub-command."""

    def take(types: Any, description: str, positional: str | None = None, **_: Any) -> None:
        raise Taken(tuple(types), description, positional)

    module, _, function = cli.COMMANDS[name][0].partition(":")
    module = importlib.import_module(module, "hf_relpos")
    with mock.patch.object(module, "parse_arguments", take), mock.patch.object(sys, "argv", [f"hf-relpos {name}"]):
        try:
            inspect.unwrap(getattr(module, function or "main"))()
        except Taken as taken:
            return taken.args
    raise RuntimeError(f"{name} reads no command line.")


def default_text(field: dataclasses.Field) -> str:
    """The default of a flag, as a table shows it."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    value = getattr(value, "value", value)
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return "–" if value in (None, "") else f"`{value}`"


def flag_rows(fields: list[dataclasses.Field]) -> list[str]:
    """A row for each flag."""
    rows = ["| flag | default | what |", "| --- | --- | --- |"]
    for field in fields:
        text = " ".join(str(field.metadata.get("help") or "").replace("|", "\\|").split())
        rows.append(f"| `--{field.name}` | {default_text(field)} | {text} |")
    return rows


def command_section(name: str, purpose: str) -> str:
    """The section of a sub-command: its own flags, and a line about those of transformers."""
    if name == "serve":
        return f"## hf-relpos {name}\n\n{SERVED}"
    types, description, words = asked(name)
    inherited = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    own, more = [], False
    for field in (field for each in types for field in dataclasses.fields(each)):
        same = inherited.get(field.name)
        if field.init and (same is None or default_text(field) != default_text(same)):
            own.append(field)
        else:
            more |= field.init
    parts = [f"## hf-relpos {name}", f"{purpose[0].upper()}{purpose[1:]}."]
    parts += [f"`hf-relpos {name} {words} [flags]`"] if words else []
    parts += ["\n".join(flag_rows(own))] if own else ["It takes no flags."]
    if more:
        address = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
        parts.append(f"And the other flags of [TrainingArguments]({address}), with their own defaults.")
    return "\n\n".join(parts) + "\n"


def config_rows() -> list[str]:
    """A row for each field of the configuration, from its docstring."""
    text = inspect.cleandoc(RelPosConfig.__doc__)
    arguments = text[text.index("Args:") : text.index("Raises:")]
    found = re.findall(r"^    (\w[\w, ]*): (.*?)(?=^    \w|\Z)", arguments, re.MULTILINE | re.DOTALL)
    defaults = {name: p.default for name, p in inspect.signature(RelPosConfig.__init__).parameters.items()}
    rows = ["| field | default | what |", "| --- | --- | --- |"]
    for names, words in found:
        default = defaults.get(names, getattr(RelPosConfig, names, None))
        shown = "–" if default in (None, inspect.Parameter.empty) else f"`{default}`"
        rows.append(f"| `{names}` | {shown} | {' '.join(words.replace('|', chr(92) + '|').split())} |")
    return rows


def reference_page() -> str:
    """The text of docs/reference.md."""
    parts = [INTRODUCTION, "## RelPosConfig\n", "\n".join(config_rows()) + "\n"]
    parts += [command_section(name, purpose) for name, (_, purpose) in cli.COMMANDS.items()]
    return "\n".join(parts)


@cli.command
def main() -> None:
    cli.parse_arguments((), "Writes docs/reference.md from the code.")
    write_text(PAGE, reference_page())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
