"""Groups of runs that differ in their seed alone, and what they are called."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .comparable import check_comparable, comparable_facts, training_of
from .result_file import MAX_DOCUMENT_GROUPS, SLIDING, labels, other_corpus_mark, rounded, score_cells


# What may differ between the groups of one report, as it stands in a label; a recipe's fields may if they are asked for
VARIED: dict[str, Callable[[Any], str]] = {
    "pos_embedding_type": str,
    "pos_embedding_kwargs": lambda value: _pairs(value, {}),
    "rope_parameters": lambda value: _pairs(value, ROPE_DEFAULTS),
    "position_start_augmentation": lambda value: "augmented" if value else "",
    "position_sampling": lambda value: f"{value} positions" if value else "",
    "position_gates": lambda value: f"{'+'.join(value)} from zero" if value else "",
    "layer_types": lambda value: _pattern(value) if value else "",
    "sliding_window": lambda value: f"window {value}" if value else "",
    "train_length": lambda value: f"trained at {value}",
    "shape": lambda value: f"{value['num_hidden_layers']}×{value['hidden_size']}" if value else "",
    "num_steps": lambda value: f"{value} steps",
    "changes": lambda value: _before(value) if value else "",
    "base_train_length": lambda value: f"from {value}" if value else "",
}
ROPE_DEFAULTS = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}


# stands for the record of a training where evaluations alone are compared
EVALUATION_ONLY = {"recipe": {}}


@dataclass
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        label: what sets it apart from the other groups.
        by_seed: seed → result.
        words: field → what it adds to the label.
        by_document: whether losses per document are used, where they are known.
    """

    label: str
    by_seed: dict[int, dict[str, Any]]
    words: dict[str, str] = field(default_factory=dict)
    by_document: bool = True

    @property
    def first(self) -> dict[str, Any]:
        """The result of the first seed, for what all seeds have in common."""
        return next(iter(self.by_seed.values()))

    @property
    def train_length(self) -> int:
        return self.first["train_length"]

    @property
    def score_name(self) -> str | None:
        """What is scored, or `None` for results on text, which have losses."""
        return self.first.get("score_name")

    @property
    def document_weights(self) -> list[int]:
        """Targets of each document; a single weight where losses per document are not known."""
        documents = [result.get("documents") for result in self.by_seed.values()]
        return documents[0]["num_tokens"] if self.by_document and all(documents) else [1]

    @property
    def num_documents(self) -> int:
        """Documents that were read, of which many are put together in `document_weights`; 1 where losses per document
        are not known."""
        number = len(self.document_weights)
        return number if number < MAX_DOCUMENT_GROUPS else self.first["corpus"].get("num_documents", number)

    def lengths(self) -> list[int]:
        """Evaluation lengths, sorted; the same for all seeds."""
        return sorted(int(length) for length in self.first["lengths"])

    def conditions(self) -> list[str]:
        """Evaluation lengths, each with the kinds of rows of a task that has several: "512 sparse"."""
        return list(score_cells(self.first))

    def values(self, condition: str, key: str) -> dict[int, float]:
        """seed → `key` under a condition: `perplexity` or `loss` of a text, `score` or `loss` of a task."""
        return {seed: score_cells(result)[condition][key] for seed, result in self.by_seed.items()}

    @property
    def has_sliding_baseline(self) -> bool:
        """Whether the windows were read by a sliding window of the training length too."""
        return self.document_weights != [1] and all(SLIDING in result for result in self.by_seed.values())

    def losses(self, length: int | str) -> dict[int, np.ndarray]:
        """seed → the mean loss of each document, in nats, see `document_weights`; also of the sliding baseline."""
        if self.document_weights == [1]:
            values = self.values(str(length), "loss")
            return {seed: np.array([value]) for seed, value in values.items()}
        return {seed: np.array(result["documents"]["loss"][str(length)]) for seed, result in self.by_seed.items()}

    def slopes(self) -> dict[int, float]:
        """seed → nats per 1000 tokens past the training length, of the runs that have it."""
        return {seed: 1000 * result["slope"]["slope"] for seed, result in self.by_seed.items() if result.get("slope")}

    def in_context_scores(self) -> tuple[int, dict[int, float]] | None:
        """The latest token that the windows reach, and seed → in-context score there."""
        reached = {
            seed: {int(token): score["score"] for token, score in result.get("in_context_score", {}).items() if score}
            for seed, result in self.by_seed.items()
        }
        if not all(reached.values()):
            return None
        token = max(next(iter(reached.values())))
        return token, {seed: scores[token] for seed, scores in reached.items()}


def group_results(results: Sequence[dict[str, Any]], varied: Sequence[str] = ()) -> list[Group]:
    """Groups results that differ in the seed alone, in the order in which they first appear.

    Args:
        results: of scripts/evaluate.py.
        varied: fields beyond `VARIED` that an experiment varies on purpose, such as "recipe.learning_rate".

    Raises:
        ValueError: if results cannot be compared (another corpus, recipe, or other windows or lengths), naming the
            fields that differ; if one seed stands twice in a group; if two groups have one label; if a result has no
            record of its training; for a name in `varied` that is no field of a recipe, nor `training.corpus`.
    """
    if not results:
        raise ValueError("there are no results to compare.")
    check_comparable(results, varied)
    members: dict[str, tuple[dict[str, Any], dict[int, dict[str, Any]]]] = {}
    for result in results:
        fields = _varied(result) | {name: comparable_facts(result)[name] for name in varied}
        _, group = members.setdefault(json.dumps(fields, sort_keys=True), (fields, {}))
        if result["seed"] in group:
            raise ValueError(
                f"two results are of {result['pos_embedding_type']!r} with seed {result['seed']} and the same settings."
            )
        group[result["seed"]] = result
    groups = [Group("", dict(sorted(group.items()))) for _, group in members.values()]
    for group in groups:
        if len({tuple(sorted(result["lengths"])) for result in group.by_seed.values()}) > 1:
            raise ValueError("results of one group were evaluated at different `eval_lengths`.")
    _label(groups, [fields for fields, _ in members.values()])
    names = [group.label for group in groups]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two settings are both called {repeated!r}: a report cannot tell them apart.")
    if any(group.document_weights == [1] for group in groups):  # all are averaged in one way
        for group in groups:
            group.by_document = False
    return groups


def setting_label(result: dict[str, Any]) -> str:
    """What to call a run that stands alone: its scheme, what of its options is no default, and its seed; the model's
    name without a record of its training."""
    training = result.get("training")
    if not training:
        return labels([result])[0]
    fields = ("pos_embedding_type", "pos_embedding_kwargs", "rope_parameters", "layer_types", "sliding_window")
    edits = result.get("edited_since_training") or {}
    values = {name: training.get(name, result.get(name)) for name in fields}
    values |= {name: after for name, (_, after) in edits.items() if name in values}
    words = [VARIED[name](value) for name, value in values.items()] + (["edited after training"] if edits else [])
    return f"{' '.join(filter(None, words))} ({result['seed']})" + other_corpus_mark(result)


def run_labels(results: Sequence[dict[str, Any]], varied: Sequence[str] = ()) -> list[str]:
    """What to call each run: what sets its group apart, and its seed.

    Models without a record of their training, such as those of other families, go by their names.

    Raises:
        ValueError: as `group_results`; results without a record must agree in their corpus and evaluation.
    """
    recorded = [result for result in results if result.get("training")]
    others = [result for result in results if not result.get("training")]
    labels = {
        id(run): f"{group.label} ({seed})"
        for group in (group_results(recorded, varied) if recorded else ())
        for seed, run in group.by_seed.items()
    }
    labels |= {id(result): str(result.get("model") or result["pos_embedding_type"] or "model") for result in others}
    bare = [{**result, "training": EVALUATION_ONLY} for result in (*recorded[:1], *others)] if others else []
    check_comparable(bare or results, () if others else varied)
    names = [labels[id(result)] + other_corpus_mark(result) for result in results]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two results are of {repeated[0]!r}: a table cannot tell them apart.")
    return names


def _varied(result: dict[str, Any]) -> dict[str, Any]:
    training = training_of(result)
    return rounded({name: training.get(name, result.get(name)) for name in VARIED})


def _label(groups: list[Group], fields: list[dict[str, Any]]) -> None:
    """Names each group by its scheme and by what else varies between the groups."""
    for group, settings in zip(groups, fields):
        group.words = {
            name: VARIED[name](value)
            for name, value in settings.items()
            if name == "pos_embedding_type" or name in VARIED and any(o[name] != fields[0][name] for o in fields)
        }
        group.label = " ".join(filter(None, group.words.values()))
    # the rest where it is needed to tell groups apart: each scheme may have a learning rate of its own
    repeated = {label for label, count in Counter(group.label for group in groups).items() if count > 1}
    alike = [(group, settings) for group, settings in zip(groups, fields) if group.label in repeated]
    for group, settings in alike:
        for name, value in settings.items():
            others = [other[name] for _, other in alike]
            if name == "shape" and value:
                group.words["shape"] = " ".join([group.words.get("shape", ""), *_rest_of_shape(value, others)]).strip()
            elif name not in VARIED and any(other != others[0] for other in others):
                group.words[name] = f"{name.rpartition('.')[2]} {value}"
        group.label = " ".join(filter(None, group.words.values()))


def _rest_of_shape(shape: dict[str, Any], others: Sequence[dict[str, Any] | None]) -> list[str]:
    """The sizes that differ and that layers × width do not tell."""
    told = ("num_hidden_layers", "hidden_size")
    names = [name for name in shape if any(other and other.get(name) != shape[name] for other in others)]
    return [f"{name}={shape[name]}" for name in names if name not in told]


def _pattern(layer_types: Sequence[str]) -> str:
    """The shortest part of the list that the whole repeats: "sliding/sliding/full"."""
    names = [layer_type.removesuffix("_attention") for layer_type in layer_types]
    for length in range(1, len(names) + 1):
        if all(name == names[index % length] for index, name in enumerate(names)):
            break
    return "/".join(names[:length])


def _before(changes: dict[str, Any]) -> str:
    """The scheme of the model that a finetuned one started from, if it was another."""
    scheme = changes["fields"].get("pos_embedding_type")
    return f"from {scheme[0]}" if scheme else ""


def _pairs(options: dict[str, Any] | None, defaults: dict[str, Any]) -> str:
    """The options that are not at their defaults."""
    return ", ".join(f"{name}={value}" for name, value in (options or {}).items() if value != defaults.get(name))
