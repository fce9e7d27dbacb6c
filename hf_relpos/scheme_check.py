"""What must hold for a position scheme, tried on a tiny model: `hf-relpos check my_scheme.py`.

Shape letters: B batch, H heads, Q queries, V vocabulary.
"""

import json
import logging
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from .model.configuration_relpos import RelPosConfig
from .model.modeling_relpos import RelPosForCausalLM
from .model.saved_code import foreign_schemes
from .model.scheme_base import HOOKS, POSITION_EMBEDDINGS
from .model.scheme_registry import build_position_embeddings, position_embedding_classes
from .scheme_docs import lacking_in_card
from .scheme_files import imported_schemes


# weights large enough that every part of the model matters; no dropout, so that a forward can be repeated
TINY = dict(vocab_size=97, num_attention_heads=4, head_dim=8, max_position_embeddings=160, pad_token_id=0)
TINY |= dict(train_length=16, initializer_range=0.15, embedding_multiplier=2.0, hidden_dropout=0.0, eos_token_id=1)
LENGTH, LONG = 40, 160  # tokens, past the training length of 16, and ten times that
CLOSE, PART = 2e-5, 1e-4  # fp32 logits of magnitude 1..10 in another order of operations
SHIFTED = 2e-4  # rotations take their angles in fp32 from the positions themselves
HALF = 0.05  # 8 bits of mantissa through two layers; what breaks in bf16 is off by the logits' own size


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
        notes = (f"note     {note}" for note in self.notes)
        return "\n".join([self.pos_embedding_type, *map(str, self.findings), *notes])

    __repr__ = __str__


class Wrong(Exception):
    """What a check found wrong."""


def check_position_embedding(pos_embedding_type: str, only: Sequence[str] = (), **fields: Any) -> SchemeReport:
    """Tries a scheme, built in or of one's own, on a tiny model: 4 heads, 2 layers, fp32, on the CPU, in seconds.

    Args:
        pos_embedding_type: its name, or several as a configuration takes them.
        only: names of `CHECKS`; all by default.
        **fields: of `RelPosConfig`, such as `pos_embedding_kwargs`.

    Returns: the report; print it, or read `passed`.

    Raises:
        ValueError: for a scheme that is not registered, or fields that the configuration refuses.
    """
    classes = position_embedding_classes(pos_embedding_type)
    subject, findings = Subject(pos_embedding_type, fields), []
    RelPosConfig(**subject.fields)
    hooks = tuple(hook for hook in HOOKS if any(hook in cls.hooks for cls in classes.values()))
    for name in only or CHECKS:
        with _undisturbed():
            findings.append(_find(name, subject, hooks))
        if not findings[-1].passed and name == "start":  # nothing else can be tried
            break
    notes = [note for name, cls in classes.items() if (note := lacking_in_card(name, cls))]
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
        return Finding(name, False, text, _hook_of(error) or (() if name == "start" else hooks))


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


def _hook_of(error: BaseException) -> tuple[str, ...]:
    """The innermost hook in which an error was raised."""
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return next(((name,) for name in reversed(names) if name in HOOKS), ())


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


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that nobody initialises holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Subject:
    """A scheme under test, and the tiny models that have it."""

    def __init__(self, pos_embedding_type: str, fields: dict[str, Any]) -> None:
        num_layers = max(2, pos_embedding_type.count("/") + 1)
        self.fields = {**TINY, "num_hidden_layers": num_layers, "pos_embedding_type": pos_embedding_type, **fields}
        self.name, self.num_heads = pos_embedding_type, self.fields["num_attention_heads"]
        self.fields.setdefault("hidden_size", 8 * self.num_heads)
        self.is_relative = all(c.kind == "relative" for c in position_embedding_classes(pos_embedding_type).values())

    def fresh(self, seed: int = 0, **changes: Any) -> RelPosForCausalLM:
        """A model as it is before training."""
        torch.manual_seed(seed)
        return RelPosForCausalLM(RelPosConfig(**self.fields | changes)).eval()

    def model(self, **changes: Any) -> RelPosForCausalLM:
        """A model in which parameters of the scheme that start at 0 have other numbers: they must matter."""
        model = self.fresh(**changes)
        for name, parameter in model.named_parameters():
            if "position_embeddings" in name and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.5)
        return model

    def tokens(self, *shape: int, seed: int = 0) -> torch.Tensor:
        """Random ids other than the special ones."""
        return torch.randint(2, 97, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _logits(model: RelPosForCausalLM, tokens: torch.Tensor, **given: Any) -> torch.Tensor:
    """(B, Q) → (B, Q, V), with the random numbers of every other call."""
    torch.manual_seed(1)
    return model(tokens, **given).logits.float()


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """→ the largest difference; NaN if there is any NaN."""
    return (found - expected).abs().max().item()


def _same(
    found: list[torch.Tensor], expected: list[torch.Tensor], what: str, limit: float = CLOSE, part: float = PART
) -> str:
    """→ what was compared, in numbers; raises `Wrong` if logits differ by more than rounding."""
    difference = torch.tensor([_difference(*pair) for pair in zip(found, expected)]).max().item()
    limit += part * max(each.abs().max().item() for each in expected)
    said = f"{what} differ by {difference:.2g}, allowed {limit:.2g}"
    if not difference <= limit:  # also of NaN
        raise Wrong(said)
    return said


def _padded(subject: Subject) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """→ rows of several lengths, as many as heads; the same padded on the left to one width; their mask."""
    rows = [subject.tokens(24 - 5 * index % 9, seed=index) for index in range(subject.num_heads)]
    padded = torch.stack([torch.cat((torch.zeros(24 - len(row), dtype=torch.long), row)) for row in rows])
    return rows, padded, (padded > 0).long()


def _alone(model: RelPosForCausalLM, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [_logits(model, row[None])[0] for row in rows]


# --- the checks: each returns what it compared, or raises


def check_start(subject: Subject) -> str:
    """Two models from one seed are equal, and no parameter is left as memory happened to be."""
    with _poisoned():
        first, second = subject.fresh(seed=5).state_dict(), subject.fresh(seed=5).state_dict()
    for name, tensor in first.items():
        if not torch.equal(tensor, second[name]):
            reason = "is not initialised" if tensor.isnan().any() else "differs between two models from one seed"
            raise Wrong(f"the parameter {name!r} {reason}")
    return "two models from one seed are equal"


def check_causality(subject: Subject) -> str:
    """Later tokens, changed or appended, leave earlier logits as they were; changed ones bit for bit."""
    model, tokens, cuts = subject.model(), subject.tokens(1, LENGTH), (1, 12, LENGTH - 1)
    for is_training in (False, True):
        before = _logits(model.train(is_training), tokens)
        for cut in cuts:
            changed = tokens.clone()
            changed[:, cut:] = (tokens[:, cut:] - 1) % 95 + 2
            moved = _difference(_logits(model, changed)[:, :cut], before[:, :cut])
            if moved != 0:
                raise Wrong(
                    f"other tokens from position {cut} on change the logits of earlier positions by {moved:.2g}, "
                    "allowed 0: the model sees what it shall predict"
                )
    before = _logits(model.eval(), tokens)
    shorter = [_logits(model, tokens[:, :cut]) for cut in cuts]
    said = _same(shorter, [before[:, :cut] for cut in cuts], "logits without and with later tokens")
    return f"{said}; with other later tokens by 0"


def check_padding(subject: Subject) -> str:
    """A row that is padded on the left has the logits of the row alone."""
    model, (rows, padded, mask) = subject.model(), _padded(subject)
    logits = _logits(model, padded, attention_mask=mask)
    padded_rows = [logits[index, -len(row) :] for index, row in enumerate(rows)]
    return _same(padded_rows, _alone(model, rows), "logits with padding on the left and without")


def check_batch(subject: Subject) -> str:
    """A batch has the logits of its rows; with as many rows as heads, so that neither is taken for the other."""
    model, tokens = subject.model(), subject.tokens(subject.num_heads, LENGTH)
    return _same([*_logits(model, tokens)], _alone(model, tokens), f"logits of {len(tokens)} rows and of each alone")


@torch.no_grad()
def check_cache(subject: Subject) -> str:
    """A prompt, a chunk of three and single steps have the logits of one forward."""
    model, (rows, padded, mask) = subject.model(), _padded(subject)
    past, pieces, ends = DynamicCache(), [], (12, 15, *range(16, 25))
    for start, end in zip((0, *ends), ends):
        given = dict(attention_mask=mask[:, :end], past_key_values=past)
        pieces.append(model(padded[:, start:end], **given).logits)
    logits = torch.cat(pieces, 1)
    found = [logits[index, -len(row) :] for index, row in enumerate(rows)]
    return _same(found, _alone(model, rows), "logits of steps with a cache and of one forward")


def check_packing(subject: Subject) -> str:
    """Documents in one row have the logits of each alone."""
    model, tokens, lengths = subject.model(), subject.tokens(1, LENGTH), (5, 1, 20, 14)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = _logits(model, tokens, position_ids=positions)
    alone = torch.cat([_logits(model, piece) for piece in tokens.split(lengths, dim=1)], 1)
    return _same([packed], [alone], "logits of documents in one row and of each alone")


def check_backends(subject: Subject) -> str:
    """Eager and fused attention have the same logits, also where several heads share a key."""
    shared = 2 if subject.num_heads % 2 == 0 else subject.num_heads
    logits = []
    for name in ("eager", "sdpa"):
        model = subject.model(attn_implementation=name, num_key_value_heads=shared)
        logits.append(_logits(model, subject.tokens(2, LENGTH)))
    return _same(logits[:1], logits[1:], f"logits of eager and sdpa, with {shared} key heads,")


def check_shift(subject: Subject) -> str:
    """What is called relative does not change if all positions move."""
    if not subject.is_relative:
        return "not relative: nothing to check"
    model, tokens = subject.model(), subject.tokens(2, LENGTH)
    moved = _logits(model, tokens, position_ids=torch.arange(LENGTH)[None] + 70)
    return _same([moved], [_logits(model, tokens)], "logits at positions from 0 and from 70 on", SHIFTED)


def check_gradients(subject: Subject) -> str:
    """Each parameter of the scheme gets a finite gradient that is not 0."""
    model, tokens = subject.model().train(), subject.tokens(4, LONG)
    model(tokens, labels=tokens).loss.backward()
    found = {name: each.grad for name, each in model.named_parameters() if "position_embeddings" in name}
    for name, gradient in found.items():
        if gradient is None or not gradient.any():
            raise Wrong(f"no gradient reaches the parameter {name.partition('position_embeddings.')[2]!r}")
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            raise Wrong(f"the gradient of {name!r} is missing or not finite")
    return f"finite, and not 0 for {len(found)} parameters of the scheme" if found else "the scheme has no parameters"


def check_length(subject: Subject) -> str:
    """Logits and biases are finite at ten times the training length."""
    model = subject.model()
    if not _logits(model, subject.tokens(1, LONG)).isfinite().all():
        raise Wrong(f"logits at {LONG} tokens are not finite, after a training length of 16")
    if model.config.has_distance_table and not model.model.distance_bias(4096).isfinite().all():
        raise Wrong("the bias of distances up to 4096 is not finite")
    return f"finite at {LONG} tokens, ten times the training length"


def check_bf16(subject: Subject) -> str:
    """Weights in bf16 leave the logits as they were, but for rounding."""
    model, tokens = subject.model(initializer_range=0.05), subject.tokens(2, LENGTH)
    expected = _logits(model, tokens)
    return _same([_logits(model.to(torch.bfloat16), tokens)], [expected], "logits in bf16 and fp32", 0.0, HALF)


def check_saving(subject: Subject) -> str:
    """A model that is saved and loaded has the same logits."""
    model, tokens = subject.model(), subject.tokens(2, LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with _poisoned():
            loaded = RelPosForCausalLM.from_pretrained(folder).eval()
    return _same([_logits(loaded, tokens)], [_logits(model, tokens)], "logits before saving and after loading")


CHECKS: dict[str, Callable[[Subject], str]] = {
    "start": check_start,
    "causality": check_causality,
    "left padding": check_padding,
    "batch": check_batch,
    "cached steps": check_cache,
    "packing": check_packing,
    "eager and sdpa": check_backends,
    "shift": check_shift,
    "gradients": check_gradients,
    "length": check_length,
    "bf16": check_bf16,
    "saving": check_saving,
}
QUICK = ("start", "causality", "left padding", "batch")  # what training runs for files of the user's
