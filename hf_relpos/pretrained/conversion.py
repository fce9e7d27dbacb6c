"""Which weight of a model of another family becomes which here, and that all fit."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..file_reading import reading
from .families import BUFFERS, Family, converters, our_name
from .folders import DTYPE_NAMES


EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Conversion:
    """How the weights of a model become ours.

    Attributes:
        targets: name here → a tensor on the meta device, for shape and dtype.
        sources: name here → name there, and the function that makes the one of the other.
        is_tied: whether input and output embeddings are one matrix.
    """

    targets: dict[str, torch.Tensor]
    sources: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]]
    is_tied: bool

    def check(self, expected: Mapping[str, torch.Tensor]) -> None:
        """Raises `ValueError` unless these are the weights of a model here."""
        shapes = {name: tuple(weight.shape) for name, weight in expected.items() if name != HEAD or not self.is_tied}
        made = {name: tuple(weight.shape) for name, weight in self.targets.items()}
        if differing := sorted(name for name in shapes | made if shapes.get(name) != made.get(name)):
            raise ValueError(
                f"{differing[0]!r} of the imported model would have shape {made.get(differing[0])}, "
                f"must have {shapes.get(differing[0])}."
            )

    def weight(self, name: str, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight of a name here, made of `weights`, which have the names there."""
        source, convert = self.sources[name]
        return convert(weights[source]).contiguous()


def plan_conversion(
    family: Family,
    config: PreTrainedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    weights: Mapping[str, torch.Tensor],
    where: str,
) -> Conversion:
    """How the weights of a model become ours.

    Args:
        family: of the model.
        config: of the model.
        shapes, dtypes: of its weights, by their names.
        weights: read only to see whether two embeddings are the same.
        where: the name of the model, for errors.

    Raises:
        ValueError: for a weight that is missing, left over, or of another shape or kind than its configuration says.
    """
    with reading(f"{where!r}: no model can be made of its configuration"), torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).state_dict()
    theirs = {our_name(family, name): (name, tuple(weight.shape)) for name, weight in expected.items()}
    found = {our_name(family, name): name for name in shapes if not re.search(BUFFERS, f".{name}")}
    is_tied = _resolve_head(found, config.tie_word_embeddings, weights)
    for ours, name in sorted(found.items()):
        if ours not in theirs:
            raise ValueError(f"{where!r} holds a weight that its configuration has no place for: {name!r}.")
        if shapes[name] != theirs[ours][1]:
            raise ValueError(
                f"{where!r} holds {name!r} in shape {shapes[name]}, its configuration says {theirs[ours][1]}."
            )
        if dtypes[name] not in DTYPE_NAMES:
            raise ValueError(f"{where!r} holds {name!r} in a dtype that cannot be imported, such as a quantised one.")
    if missing := [name for ours, (name, _) in theirs.items() if ours not in found and (ours != HEAD or not is_tied)]:
        raise ValueError(f"{where!r} lacks the weight {missing[0]!r}.")
    targets, sources = {}, {}
    for ours, name in found.items():
        for target, convert in converters(family, ours, config.num_attention_heads).items():
            sources[target] = (name, convert)
            targets[target] = convert(torch.empty(shapes[name], dtype=dtypes[name], device="meta"))
    return Conversion(targets, sources, is_tied)


def _resolve_head(found: dict[str, str], is_tied: bool, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether there is one matrix of embeddings, as transformers decides; leaves one of two that are equal."""
    if is_tied and HEAD in found:
        head = found[HEAD]
        if EMBEDDINGS not in found:
            found[EMBEDDINGS] = head
        elif not torch.equal(weights[found[EMBEDDINGS]], weights[head]):
            return False
        del found[HEAD]
    return is_tied
