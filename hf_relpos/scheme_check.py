"""What must hold for a position scheme, tried on a tiny model: `hf-relpos check my_scheme.py`."""

import inspect
import json
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from .model.configuration_relpos import RelPosConfig
from .model.saved_code import foreign_schemes
from .model.scheme_base import HOOKS, POSITION_EMBEDDINGS, PositionEmbedding
from .model.scheme_registry import build_position_embeddings, position_embedding_classes
from .scheme_docs import lacking_in_card
from .scheme_files import imported_schemes
from .scheme_trials import CHECKS, QUICK, Subject, Wrong


FUNCTIONS = (FunctionType, staticmethod, classmethod)


@dataclass(frozen=True)
class Finding:
    """What a check found: its name, whether the scheme passed, what was compared, hooks of which one is at fault."""

    check: str
    passed: bool
    text: str
    hooks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{'ok' if self.passed else 'refused':<8} {self.check:<14} {self.text}"


@dataclass(frozen=True)
class SchemeReport:
    """The findings of all checks of a scheme, or of several together, and notes; `str` makes a table of them."""

    pos_embedding_type: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(finding.passed for finding in self.findings)

    @property
    def refusal(self) -> str | None:
        """The first check that did not pass, in one line, or `None`."""
        for finding in self.findings:
            if not finding.passed:
                hooks = " or ".join(f"`{hook}`" for hook in finding.hooks) or "the class"
                said = f"the check {finding.check!r} refuses {hooks}: {finding.text}"
                return f"position embedding {self.pos_embedding_type!r}: {said}"
        return None

    def __str__(self) -> str:
        lines: list[str] = []
        for index, finding in enumerate(self.findings):
            same = [each.check for each in self.findings[:index] if each.text == finding.text and not finding.passed]
            lines.append(str(replace(finding, text=f"as {same[0]!r}") if same else finding))
        notes = (f"note     {note}" for note in self.notes)
        return "\n".join([self.pos_embedding_type, *lines, *notes])

    __repr__ = __str__


def check_position_embedding(pos_embedding_type: str, only: Sequence[str] = (), **fields: Any) -> SchemeReport:
    """Tries a scheme, built in or of one's own, on a tiny model: 4 heads, 2 layers, fp32, on the CPU, in seconds.

    Args:
        pos_embedding_type: its name, or several as a configuration takes them.
        only: names of `CHECKS`, or one; all by default.
        **fields: of `RelPosConfig`, such as `pos_embedding_kwargs`.

    Returns: the report; print it, or read `passed`.

    Raises:
        ValueError: for a scheme that is not registered, a check that there is not, or fields that the configuration
            refuses.
    """
    only = [only] if isinstance(only, str) else [*only]
    if unknown := [name for name in only if name not in CHECKS]:
        raise ValueError(f"`only` must name some of {list(CHECKS)}, got {unknown[0]!r}.")
    classes = position_embedding_classes(pos_embedding_type)
    subject, findings = Subject(pos_embedding_type, fields), []
    RelPosConfig(**subject.fields)
    hooks = tuple(hook for hook in HOOKS if any(hook in cls.hooks for cls in classes.values()))
    for name in only or CHECKS:
        with _undisturbed():
            findings.append(_find(name, subject, hooks))
        if not findings[-1].passed and name == "start":  # nothing else can be tried
            break
    notes = [note for cls in classes.values() for note in _unheard(cls)]
    notes += [note for name, cls in classes.items() if (note := lacking_in_card(name, cls))]
    unsaved = foreign_schemes(pos_embedding_type).items()
    notes += [f"{name!r} is not saved with models, since {reason}." for name, (_, reason) in unsaved]
    return SchemeReport(pos_embedding_type, tuple(findings), tuple(notes))


def _find(name: str, subject: "Subject", hooks: tuple[str, ...]) -> Finding:
    try:
        return Finding(name, True, CHECKS[name](subject))
    except Wrong as wrong:
        return Finding(name, False, str(wrong), () if name == "start" else hooks)
    except Exception as error:
        text = " ".join(str(error).split()).removeprefix(f"position embedding {subject.name!r}: ").rstrip(".")
        text = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
        return Finding(name, False, text, _hook_of(error, hooks) or (() if name == "start" else hooks))


def _unheard(cls: type[PositionEmbedding]) -> Iterator[str]:
    """What the author of a class may think is used: public methods that nothing calls, options that cannot be given."""
    parts = cls.__mro__[: cls.__mro__.index(PositionEmbedding)]
    codes = [code for part in parts for value in vars(part).values() for code in _codes(value)]
    called = {word for code in codes for word in _names_in(code)}
    for name, value in vars(cls).items():
        is_new = isinstance(value, FUNCTIONS) and not any(hasattr(part, name) for part in cls.__mro__[1:])
        if is_new and name not in called and not name.startswith("_"):
            yield f"`{name}` is no hook, and nothing in the class calls it; the hooks are {', '.join(HOOKS)}."
    own = [*inspect.signature(cls).parameters.values()][1:]
    for option in own:
        if option.kind in (option.POSITIONAL_OR_KEYWORD, option.KEYWORD_ONLY) and option.name not in cls.defaults:
            yield f"`{option.name}` of `__init__` cannot be given as an option: it needs an entry in `defaults`."


def _codes(value: Any) -> Iterator[CodeType]:
    """Of what a class has by a name: that of its function, within decorators, or of the functions of a property."""
    parts = (value.fget, value.fset, value.fdel) if isinstance(value, property) else (value,)
    for part in parts:
        code = getattr(inspect.unwrap(getattr(part, "__func__", part)), "__code__", None)
        if code is not None:
            yield code


def _names_in(code: CodeType) -> Iterator[str]:
    """The names that a function looks up, in functions within it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def check_imported(config: RelPosConfig) -> None:
    """The quick checks for the schemes of a model that come out of files of the user's, once in a process.

    Raises:
        ValueError: if one of them does not pass, since a training would give numbers that mean nothing.
    """
    names = imported_schemes(config.pos_embedding_type)
    with _undisturbed():
        for layer in (None, *range(min(config.num_hidden_layers, 1 + config.pos_embedding_type.count("/")))):
            if names:
                build_position_embeddings(config, layer)
    for name in names:
        cls, fields = POSITION_EMBEDDINGS[name], {"num_attention_heads": config.num_attention_heads}
        fields["train_length"] = 64  # a scheme may be for the length of its training alone
        given = config.pos_embedding_kwargs or {}
        fields["pos_embedding_kwargs"] = {option: given[option] for option in cls.defaults if option in given}
        if cls.uses_rope_parameters:
            fields |= {"head_dim": config.head_dim, "rope_parameters": config.rope_parameters}
        if refusal := _quick_refusal(cls, name, json.dumps(fields, sort_keys=True, default=str)):
            raise ValueError(f"{refusal}; hf-relpos check shows all checks.")


@lru_cache
def _quick_refusal(cls: type, name: str, fields: str) -> str | None:
    fields = json.loads(fields)
    try:
        with _undisturbed():
            Subject(name, fields).model()
    except Exception:  # its options are for the sizes of its own model
        return None
    return check_position_embedding(name, QUICK, **fields).refusal


def _hook_of(error: BaseException, hooks: tuple[str, ...]) -> tuple[str, ...]:
    """The innermost of the scheme's hooks in which an error was raised."""
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return next(((name,) for name in reversed(names) if name in hooks), ())


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Random numbers are after it what they were before, and nothing is said, nor counted as said once."""
    disabled, warning_once = logging.root.manager.disable, logging.Logger.warning_once
    bars, logging.Logger.warning_once = transformers_logging.is_progress_bar_enabled(), logging.Logger.warning
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        logging.Logger.warning_once = warning_once
        if bars:
            transformers_logging.enable_progress_bar()
