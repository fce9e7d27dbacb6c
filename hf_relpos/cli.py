"""What all scripts share: flags from dataclasses with a YAML file under them, and one line for a user's error."""

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser


class ArgumentParser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def parse_arguments(
    types: Sequence[type], description: str, argv: Sequence[str] | None = None, positional: str | None = None
) -> tuple[Any, ...]:
    """Command line → one instance of each dataclass, and after them the list of `positional`, if it is given.

    `--config FILE` reads flags from a YAML file first (`learning_rate: 1e-3`, lists and dictionaries as YAML has them);
    flags on the command line win. `positional` names words that need no flag and of which at least one is required.

    Raises:
        ValueError: for an unknown flag, a value of the wrong type, or a file that is missing or no YAML dictionary.
    """
    parser = ArgumentParser(types, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="A YAML file of flags; those on the command line win.")
    if positional:
        parser.add_argument("words", nargs="+", metavar=positional)
    argv = list(sys.argv[1:] if argv is None else argv)
    path = _pop_config(argv)
    if path is not None:
        argv = _flags_of(path, {action.dest for action in parser._actions if action.option_strings}) + argv
    *parsed, others, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"unknown flag: {unknown[0]!r}; --help lists those that exist.")
    return (*parsed, others.words) if positional else tuple(parsed)


def parse_values(types: Sequence[type], values: dict[str, Any]) -> tuple[Any, ...]:
    """Flags as a YAML file has them → one instance of each dataclass; raises `ValueError` as `parse_arguments` does."""
    parsed, unknown = ArgumentParser(types, allow_abbrev=False), set(values)
    for action in parsed._actions:
        unknown.discard(action.dest)
    if unknown:
        raise ValueError(f"unknown flag: {sorted(unknown)[0]!r}.")
    return parsed.parse_args_into_dataclasses(_words(values))


def _pop_config(argv: list[str]) -> str | None:
    """Takes `--config FILE` or `--config=FILE` out of the command line."""
    found = [index for index, word in enumerate(argv) if word.partition("=")[0] == "--config"]
    if not found:
        return None
    _, equals, path = argv.pop(found[0]).partition("=")
    if len(found) > 1 or not (equals or argv[found[0] :]):
        raise ValueError("--config takes one file, once.")
    return path if equals else argv.pop(found[0])


def _flags_of(path: str, known: set[str]) -> list[str]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path!r} must hold a dictionary of flags.")
    for name in values:
        if name not in known:
            raise ValueError(f"--config {path!r} holds an unknown flag: {name!r}.")
    return _words(values)


def _words(values: dict[str, Any]) -> list[str]:
    """→ the command line that says the same."""
    flags = []
    for name, value in values.items():
        if value is None:
            continue
        words = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *(str(word) for word in words)]
    return flags


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorator of a script's `main`: a user's error becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except (ValueError, OSError) as error:
            if os.environ.get("RANK", "0") == "0":
                message = " ".join(str(error).split())
                print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            if torch.distributed.is_initialized():  # its threads abort a process that ends while they run
                torch.distributed.destroy_process_group()

    return wrapped
