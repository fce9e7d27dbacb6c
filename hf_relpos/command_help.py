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
            hint = nearest(word.partition("=")[0], self._option_string_actions)
            raise ValueError(f"unknown flag: {word!r}{hint}; --help lists those that exist.")

        def format_help(self) -> str:
            return help_page(self, types, usual, required)

    return ArgumentParser(types, description=description, allow_abbrev=False, formatter_class=HelpFormatter)


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
        if (
            action.default not in (None, False, "", argparse.SUPPRESS)
            and action.default != []
            and "default" not in text
        ):
            text = f"{text} (default: %(default)s)".strip()
        return text


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
