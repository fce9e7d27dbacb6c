"""The checks of a position scheme, each on tiny models: what `check_position_embedding` runs.

Shape letters: B batch, H heads, Q queries, V vocabulary.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from .model.configuration_relpos import RelPosConfig
from .model.modeling_relpos import RelPosForCausalLM
from .model.scheme_base import PositionEmbedding
from .model.scheme_registry import held_tensors, position_embedding_classes


# weights large enough that every part of the model matters; no dropout, so that a forward can be repeated
TINY = dict(vocab_size=97, num_attention_heads=4, head_dim=8, max_position_embeddings=160, pad_token_id=0)
TINY |= dict(train_length=16, initializer_range=0.15, embedding_multiplier=2.0, hidden_dropout=0.0, eos_token_id=1)
LENGTH, LONG = 40, 160  # tokens, past the training length of 16, and ten times that
CLOSE, PART = 2e-5, 1e-4  # fp32 logits of magnitude 1..10 in another order of operations
SHIFTED = 2e-4  # rotations take their angles in fp32 from the positions themselves
HALF = 0.05  # 8 bits of mantissa through two layers; what breaks in bf16 is off by the logits' own size


class Wrong(Exception):
    """What a check found wrong."""


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
    """A scheme under test, and the tiny models that have it.

    Attributes:
        name: its `pos_embedding_type`.
        given: the fields that the caller set.
        drawn: parameters that start at 0 and were given other numbers.
    """

    def __init__(self, pos_embedding_type: str, fields: dict[str, Any]) -> None:
        num_layers = max(2, pos_embedding_type.count("/") + 1)
        self.given, self.drawn = fields, set()
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
                self.drawn.add(name)
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
        again = _difference(_logits(model, tokens), before)
        if again != 0:
            raise Wrong(
                f"two equal calls give logits that differ by {again:.2g}: the scheme keeps something from one call to "
                "the next"
            )
        for cut in cuts:
            changed = tokens.clone()
            changed[:, cut:] = (tokens[:, cut:] - 1) % 95 + 2
            moved = _difference(_logits(model, changed)[:, :cut], before[:, :cut])
            if moved != 0:
                reads = "the model sees what it shall predict"
                if moved < CLOSE:
                    reads += ", or computes with it what cancels: steps with a cache cannot"
                raise Wrong(
                    f"other tokens from position {cut} on change the logits of earlier positions by {moved:.2g}, "
                    f"allowed 0: {reads}"
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
    """Eager and fused attention have the same logits."""
    return _same(*_of_both(subject), "logits of eager and sdpa")


def check_sizes(subject: Subject) -> str:
    """Heads of another number and size work, also where several share a key."""
    for name in ("num_attention_heads", "head_dim", "hidden_size", "pos_embedding_kwargs"):
        if subject.given.get(name):
            return f"not tried: `{name}` is given"
    said, sizes = "", dict(num_attention_heads=6, head_dim=16, hidden_size=96)
    for num_keys, words in ((6, "6 heads of 16 channels"), (3, "6 heads of 16 channels that share 3 keys")):
        try:
            found, expected = _of_both(subject, num_key_value_heads=num_keys, **sizes)
        except (ValueError, RuntimeError, IndexError) as error:
            raise Wrong(f"{words}: {' '.join(str(error).split())}") from error
        said = _same(found, expected, f"logits of eager and sdpa, with {words},")
    return said


def _of_both(subject: Subject, **sizes: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """→ the logits of eager and of fused attention."""
    models = (subject.model(attn_implementation=name, **sizes) for name in ("eager", "sdpa"))
    eager, fused = (_logits(model, subject.tokens(2, LENGTH)) for model in models)
    return [eager], [fused]


def check_effect(subject: Subject) -> str:
    """Logits are others than those of a model with the same weights and no positions."""
    model, tokens = subject.model(), subject.tokens(1, LONG)
    own = ("pos_embedding_kwargs", "rope_parameters", "position_gates", "position_sampling")
    changes = {"pos_embedding_type": "none", "position_start_augmentation": False} | dict.fromkeys(own)
    plain = subject.fresh(**changes)
    plain.load_state_dict(model.state_dict(), strict=False)
    expected = _logits(plain, tokens)
    moved = _difference(_logits(model, tokens), expected)
    if not moved <= CLOSE + PART * expected.abs().max().item() or subject.name == "none":  # NaN is another check's
        return f"logits differ by {moved:.2g} from those of 'none' with the same weights"
    if not any("position_embeddings" in name for name, _ in model.named_parameters()):
        raise Wrong("logits are those of 'none' with the same weights, but for rounding: the scheme changes nothing")
    return "none yet: with its first parameters the logits are those of 'none', but for rounding"


def check_shift(subject: Subject) -> str:
    """What is called relative does not change if all positions move."""
    if not subject.is_relative:
        return "not relative: nothing to check"
    model, tokens = subject.model(), subject.tokens(2, LENGTH)
    moved = _logits(model, tokens, position_ids=torch.arange(LENGTH)[None] + 70)
    return _same([moved], [_logits(model, tokens)], "logits at positions from 0 and from 70 on", SHIFTED)


def check_gradients(subject: Subject) -> str:
    """Each parameter of the scheme gets a finite gradient that is not 0, in each of two steps, after a forward without
    gradients: nothing is kept from one forward to the next."""
    model, tokens = subject.model().train(), subject.tokens(4, LONG)
    _logits(model, tokens)
    parameters = {name: each for name, each in model.named_parameters() if "position_embeddings" in name}
    for _ in range(2):
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        for name, parameter in parameters.items():
            if parameter.grad is None or not parameter.grad.any():
                drawn = ", drawn at random since it starts at 0" if name in subject.drawn else ""
                raise Wrong(f"no gradient reaches the parameter {_own_name(name)!r}{drawn}{_kept(model)}")
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            raise Wrong(f"the gradient of {name!r} is missing or not finite")
    if not parameters:
        return "the scheme has no parameters"
    said = f"finite, and not 0 for {len(parameters)} parameter{'s' * (len(parameters) > 1)} of the scheme"
    for name, parameter in parameters.items():
        heads = parameter.grad.reshape(len(parameter) if parameter.ndim else 1, -1)
        idle = int((heads == 0).all(1).sum())
        if idle and len(heads) == subject.num_heads:  # units of a network may well be idle
            said += f"; of {_own_name(name)!r} {idle} of {len(heads)} heads get none"
    return said


def _own_name(name: str) -> str:
    """The name of a parameter within its scheme."""
    return name.partition("position_embeddings.")[2]


def _kept(model: RelPosForCausalLM) -> str:
    """What is known of the reason: a tensor that a forward left in an attribute of a scheme."""
    schemes = (module for module in model.modules() if isinstance(module, PositionEmbedding))
    names = [name for scheme in schemes for part in scheme.modules() for name in held_tensors(part)]
    return f"; the scheme keeps `{names[0]}` from one forward to the next: compute it anew in each" if names else ""


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
    "sizes": check_sizes,
    "effect": check_effect,
    "shift": check_shift,
    "gradients": check_gradients,
    "length": check_length,
    "bf16": check_bf16,
    "saving": check_saving,
}
QUICK = ("start", "causality", "left padding", "batch")  # what training runs for files of the user's
