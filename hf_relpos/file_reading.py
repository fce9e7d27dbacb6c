"""Files that come in: JSON and YAML, read whole and within limits, and one clear error for what is wrong in them."""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


MAX_BYTES = 2**29  # of a file: the largest tokenizers have some 2^25
MAX_DEPTH = 100  # dictionaries and lists in one another
MAX_DIGITS = 300  # of a number: a float holds no more
MAX_VALUES = 100_000  # of a YAML file, with each alias written out
ODD = re.compile(r"[-+]?0+[_0]*[1-7][\d_]*\d$|.*:")  # numbers that YAML reads as 8 for 010, as 90 for 1:30
MAX_REASON = 300  # characters of a library's message
TRAINING_RECORD = "training.json"  # what a run leaves beside its weights
# what a folder of a model may hold besides weights and code, each a dictionary
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
# of which a folder with a tokenizer holds at least one
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


def no_model(folder: str | Path) -> str:
    """What a folder without config.json is, to end an error with: "not a model: it holds no config.json"."""
    if (Path(folder) / "adapter_config.json").is_file():
        return (
            "not a model but an adapter of PEFT: merge it (`merge_and_unload`) and save the whole model with its "
            "tokenizer; the adapter alone is published by PEFT's own `push_to_hub`"
        )
    return "not a model: it holds no config.json"


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever a library raises in the body becomes a `ValueError` that says `what` and, in short, why.

    It is for bodies that read what a user gave and do nothing else: the errors that a damaged file can cause in other
    libraries are without number.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of an error, with its type where the message says little without it."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if not line or not isinstance(error, (ValueError, OSError, RuntimeError)):
        line = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]} .."


def read_text_file(path: str | Path, name: str) -> str:
    """The text of a regular file of at most `MAX_BYTES`, without a byte order mark.

    Args:
        path: the file.
        name: what to call it in an error, such as "result file".

    Raises:
        ValueError: naming the file, if it is missing, no regular file, too large, or no UTF-8.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise ValueError(f"{name} {str(path)!r} does not exist.")
    with reading(f"{name} {str(path)!r} cannot be read"):
        if not path.is_file():
            raise ValueError("it is no regular file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
        return path.read_text(encoding="utf-8-sig")


def read_json(path: str | Path, name: str = "file", allow_nan: bool = False) -> dict[str, Any]:
    """The dictionary of a JSON file.

    Args:
        path, name: as `read_text_file` takes them.
        allow_nan: whether NaN and infinity are numbers.

    Raises:
        ValueError: as `read_text_file` and `parse_json`, or if it holds no dictionary.
    """
    where = f"{name} {str(path)!r}"
    content = parse_json(read_text_file(path, name), where, allow_nan)
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold a dictionary, got {_kind(content)}.")
    return content


def parse_json(text: str, where: str, allow_nan: bool = False) -> Any:
    """The value that JSON holds.

    Raises:
        ValueError: beginning with `where`, for what is no JSON, for a key that a dictionary has twice, for NaN,
            infinity and longer numbers than floats are, or for more than `MAX_DEPTH` levels.
    """

    def make(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
        return made

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    hooks: dict[str, Any] = {} if allow_nan else {"parse_constant": refuse, "parse_float": _parse_float}
    with reading(f"{where} cannot be read"):
        content = json.loads(text, object_pairs_hook=make, parse_int=_parse_int, **hooks)
        _check_depth(content)
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    return content


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _parse_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _check_depth(content: Any) -> None:
    level, depth = [content], 0
    while nodes := [each for each in level if isinstance(each, (dict, list))]:
        level = [child for each in nodes for child in (each.values() if isinstance(each, dict) else each)]
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")


def _kind(value: Any) -> str:
    names = {type(None): "null", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


# --- YAML


def read_yaml(path: str | Path, name: str = "file") -> Any:
    """The content of a YAML file; raises `ValueError` as `read_text_file` and `parse_yaml`."""
    return parse_yaml(read_text_file(path, name), f"{name} {str(path)!r}")


def parse_yaml(text: str, where: str) -> Any:
    """The value that YAML holds: dictionaries, lists, text, numbers, true, false and null.

    Raises:
        ValueError: beginning with `where`, for what is no YAML, for a key that a dictionary has twice (naming the
            lines), for more than `MAX_DEPTH` levels or `MAX_VALUES` values once aliases are written out, for an alias
            of what it stands in, and for values of other types.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Of two values under one key it would take the last, in silence; and it has no limits."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > MAX_DEPTH and not self.check_event(yaml.ScalarEvent, yaml.AliasEvent):
                raise ValueError("it is nested too deeply")
            node = super().compose_node(parent, index)
            self.depth -= 1
            if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and ODD.match(node.value):
                line = node.start_mark.line + 1
                raise ValueError(f"{node.value!r} in line {line} would be read as octal or in sixties: write a decimal")
            return node

        def compose_mapping_node(self, anchor: Any) -> Any:
            node, seen = super().compose_mapping_node(anchor), {}
            for key, _ in node.value:
                name = str(key.value) if isinstance(key, yaml.ScalarNode) else None
                if name is not None and (first := seen.setdefault((key.tag, name), key)) is not key:
                    lines = f"lines {first.start_mark.line + 1} and {key.start_mark.line + 1}"
                    raise ValueError(f"{name!r} stands there twice, in {lines}")
            return node

        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if node is not None:
                _measure(node, {}, set())
            return node

    with reading(f"{where} cannot be read"):
        try:
            content = yaml.load(text, Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f" (line {mark.line + 1})" if mark else ""
            raise ValueError(f"{error.problem or error.context}{place}") from error
        _check_plain(content)
    return content


def _measure(node: Any, sizes: dict[int, tuple[int, int]], inside: set[int]) -> tuple[int, int]:
    """→ values and levels of a YAML node with each alias written out; raises `ValueError` past the limits."""
    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in inside:
        raise ValueError("an alias names what it stands in")
    inside.add(id(node))
    size, depth = 1, int(isinstance(node.value, list))
    for child in node.value if isinstance(node.value, list) else ():
        for each in child if isinstance(child, tuple) else (child,):
            more, levels = _measure(each, sizes, inside)
            size, depth = size + more, max(depth, levels + 1)
    inside.remove(id(node))
    if size > MAX_VALUES or depth > MAX_DEPTH:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values or {MAX_DEPTH} levels, its aliases written out")
    return sizes.setdefault(id(node), (size, depth))


def _check_plain(content: Any) -> None:
    values = [content]
    while values:
        value = values.pop()
        if isinstance(value, (dict, list)):
            values += [*value, *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is no finite number")
        elif isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
            raise ValueError(f"a number has more than {MAX_DIGITS} digits")
        elif not isinstance(value, (str, int, float, type(None))):
            raise ValueError(f"{str(value)[:40]!r} is of type {type(value).__name__}: put it into quotes")
