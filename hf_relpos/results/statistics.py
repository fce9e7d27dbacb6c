"""Statistics over seeds: groups of runs that differ in the seed alone, their intervals, and paired comparisons."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .result_file import score_cells


CONFIDENCE = 0.95
# What may differ between the groups of one report, as it stands in a label; a recipe's fields may if they are asked for
VARIED: dict[str, Callable[[Any], str]] = {
    "pos_embedding_type": str,
    "pos_embedding_kwargs": lambda value: _pairs(value, {}),
    "rope_parameters": lambda value: _pairs(value, ROPE_DEFAULTS),
    "position_start_augmentation": lambda value: "augmented" if value else "",
    "position_sampling": lambda value: f"{value} positions" if value else "",
    "layer_types": lambda value: _pattern(value) if value else "",
    "sliding_window": lambda value: f"window {value}" if value else "",
    "train_length": lambda value: f"trained at {value}",
    "shape": lambda value: f"{value['num_hidden_layers']}×{value['hidden_size']}" if value else "",
    "architecture": lambda value: _pairs(value, {}),
    "num_steps": lambda value: f"{value} steps",
    "changes": lambda value: _before(value) if value else "",
    "base_train_length": lambda value: f"from {value}" if value else "",
}
# fields of the configuration that shape the model, beside its sizes and its scheme → their defaults
ARCHITECTURE = {
    "hidden_act": "relu2",
    "use_gated_mlp": False,
    "mlp_bias": False,
    "attention_bias": False,
    "attention_out_bias": False,
    "qk_norm": None,
    "norm_type": "rms_norm",
    "norm_bias": True,
    "norm_placement": "before",
    "use_parallel_residual": False,
    "embed_norm": False,
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
ROPE_DEFAULTS = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}


# stands for the record of a training where evaluations alone are compared
EVALUATION_ONLY = {"recipe": {}}


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Attributes:
        mean, std: of the values; the standard deviation with n − 1, NaN for one value.
        low, high: ends of the 95 % interval of the mean by Student's t; NaN for one value.
        n: number of values.
    """

    mean: float
    std: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """From one value per seed; raises `ValueError` without any."""
        from scipy import stats

        values, n = np.asarray(values, dtype=np.float64), len(values)
        if not n:
            raise ValueError("an interval needs at least one value.")
        mean = float(values.mean())
        if n == 1:
            return cls(mean, math.nan, math.nan, math.nan, 1)
        std = float(values.std(ddof=1))
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n)
        return cls(mean, std, mean - half, mean + half, n)


@dataclass(frozen=True)
class Comparison:
    """A group against the baseline, under one condition, over the seeds that both have.

    Attributes:
        label, condition: the group, and the evaluation length with the kind of row of a task.
        difference: of the loss in nats per token or of a task's score, group − baseline, paired by seed.
        is_score: whether more is better.
        p_value: of Student's paired test; NaN for fewer than two seeds.
        corrected: the same, corrected for all comparisons of the report by Holm's method.
    """

    label: str
    condition: str
    difference: Interval
    is_score: bool
    p_value: float
    corrected: float

    @property
    def significant(self) -> bool:
        """Whether the difference is significant at 5 %, over all comparisons of the report together."""
        return self.corrected < 1 - CONFIDENCE


@dataclass
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        label: what sets it apart from the other groups.
        by_seed: seed → result.
    """

    label: str
    by_seed: dict[int, dict[str, Any]]

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

    def lengths(self) -> list[int]:
        """Evaluation lengths, sorted; the same for all seeds."""
        return sorted(int(length) for length in self.first["lengths"])

    def conditions(self) -> list[str]:
        """Evaluation lengths, each with the kinds of rows of a task that has several: "512 sparse"."""
        return list(score_cells(self.first))

    def values(self, condition: str, key: str) -> dict[int, float]:
        """seed → `key` under a condition: `perplexity` or `loss` of a text, `score` or `loss` of a task."""
        return {seed: score_cells(result)[condition][key] for seed, result in self.by_seed.items()}

    def ratio(self) -> Interval | None:
        """Perplexity at the longest length / at the training length, or `None` if it was not evaluated past that."""
        longest = self.lengths()[-1]
        if self.train_length not in self.lengths() or longest <= self.train_length:
            return None
        base = self.values(str(self.train_length), "perplexity")
        return Interval.of([value / base[seed] for seed, value in self.values(str(longest), "perplexity").items()])

    def slope(self) -> Interval | None:
        """Nats per token past the training length."""
        found = [result["slope"]["slope"] for result in self.by_seed.values() if result.get("slope")]
        return Interval.of(found) if found else None

    def in_context_score(self) -> tuple[int, Interval] | None:
        """The latest token that the windows reach, and the in-context score there."""
        reached = [
            {int(token): score["score"] for token, score in result.get("in_context_score", {}).items() if score}
            for result in self.by_seed.values()
        ]
        if not all(reached):
            return None
        token = max(reached[0])
        return token, Interval.of([scores[token] for scores in reached])


def group_results(results: Sequence[dict[str, Any]], varied: Sequence[str] = ()) -> list[Group]:
    """Groups results that differ in the seed alone, in the order in which they first appear.

    Args:
        results: of scripts/evaluate.py.
        varied: fields beyond `VARIED` that an experiment varies on purpose, such as "recipe.learning_rate".

    Raises:
        ValueError: if results cannot be compared (another corpus, recipe, or other windows or lengths), naming the
            fields that differ; if one seed stands twice in a group; if a result has no record of its training; for a
            name in `varied` that is no field of a recipe.
    """
    if not results:
        raise ValueError("there are no results to compare.")
    check_comparable(results, varied)
    members: dict[str, tuple[dict[str, Any], dict[int, dict[str, Any]]]] = {}
    for result in results:
        fields = _varied(result) | {name: _facts(result)[name] for name in varied}
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
    return groups


def check_comparable(results: Sequence[dict[str, Any]], varied: Sequence[str] = ()) -> None:
    """Raises `ValueError`, naming the fields, unless results differ in nothing but what `group_results` groups by."""
    first = _facts(results[0])
    allowed = sorted(name for name in first if name.startswith("recipe.") or name == "tokens_per_step")
    for name in varied:
        if name not in allowed:
            raise ValueError(f"`varied` must name some of {allowed}, got {name!r}.")
    for result in results[1:]:
        facts = _facts(result)
        differing = [name for name in {**first, **facts} if name not in varied and facts.get(name) != first.get(name)]
        if differing:
            pairs = "; ".join(f"`{name}` is {first.get(name)!r} and {facts.get(name)!r}" for name in differing)
            raise ValueError(f"results of different experiments are not compared: {pairs}.")


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
    names = [labels[id(result)] for result in results]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two results are of {repeated[0]!r}: a table cannot tell them apart.")
    return names


def _facts(result: dict[str, Any]) -> dict[str, Any]:
    """What must be equal in all results, flat, for a message that names one field."""
    training, corpus = _training(result), result["corpus"]
    longest = max(result["lengths"], key=int)
    recipe = {f"recipe.{name}": value for name, value in training.get("recipe", {}).items()}
    return {
        "corpus.name": corpus["name"],
        "corpus.fingerprint": corpus.get("fingerprint"),
        "corpus.split": corpus.get("split"),
        "corpus.num_windows": corpus.get("num_windows"),
        "eval_lengths (longest)": int(longest),
        "tokens_per_step": training.get("tokens_per_step"),
        "data_seed": training.get("data_seed"),
        "dtype": result.get("dtype"),
        "score_name": result.get("score_name"),
        **recipe,
    }


def _varied(result: dict[str, Any]) -> dict[str, Any]:
    training = _training(result)
    varied = {name: training.get(name, result.get(name)) for name in VARIED}
    config = training.get("config") or {}
    other = {name: config.get(name, default) for name, default in ARCHITECTURE.items()}
    return varied | {"architecture": {name: value for name, value in other.items() if value != ARCHITECTURE[name]}}


def _training(result: dict[str, Any]) -> dict[str, Any]:
    if not result.get("training"):
        raise ValueError(f"the result of {result.get('model')!r} has no record of its training: it cannot be averaged.")
    return result["training"]


def _label(groups: list[Group], fields: list[dict[str, Any]]) -> None:
    """Names each group by its scheme and by what else varies between the groups."""
    for group, settings in zip(groups, fields):
        words = [str(settings["pos_embedding_type"])]
        for name, value in settings.items():
            if name != "pos_embedding_type" and any(other[name] != fields[0][name] for other in fields):
                words.append(VARIED[name](value) if name in VARIED else f"{name.rpartition('.')[2]} {value}")
        group.label = " ".join(filter(None, words))


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


def compare(groups: Sequence[Group], baseline: str) -> list[Comparison]:
    """Compares all groups to one, under each condition that both were evaluated under, paired by seed.

    Raises:
        ValueError: if no group has the label `baseline`.
    """
    by_label = {group.label: group for group in groups}
    if baseline not in by_label:
        raise ValueError(f"`baseline` must be one of {list(by_label)}, got {baseline!r}.")
    base, pairs = by_label[baseline], []
    key = "score" if base.score_name else "loss"
    for group in groups:
        if group is base:
            continue
        for condition in (condition for condition in group.conditions() if condition in base.conditions()):
            values, base_values = group.values(condition, key), base.values(condition, key)
            seeds = sorted({*values} & {*base_values})
            if seeds:
                pairs.append((group.label, condition, [values[seed] - base_values[seed] for seed in seeds]))
    p_values = [paired_p_value(differences) for _, _, differences in pairs]
    return [
        Comparison(label, condition, Interval.of(differences), key == "score", p_value, corrected)
        for (label, condition, differences), p_value, corrected in zip(pairs, p_values, holm(p_values))
    ]


def paired_p_value(differences: Sequence[float]) -> float:
    """Two-sided p-value of Student's paired test that the differences have mean 0; NaN for fewer than two."""
    from scipy import stats

    if len(differences) < 2:
        return math.nan
    if max(differences) == min(differences):  # no noise at all
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): step-down, holds the family-wise error; NaN entries stay and do not count."""
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def verdict(comparison: Comparison, baseline: str) -> str:
    """The comparison in words."""
    difference, name = comparison.difference, f"**{comparison.label}**"
    length, _, kind = comparison.condition.partition(" ")
    where = f"At {length} tokens" + (f" ({kind})" if kind else "")
    if difference.n < 2:
        return f"{where}, {name} has one seed in common with {baseline}: nothing can be said."
    size = f"{abs(difference.mean):.4f}" + ("" if comparison.is_score else f" nats ({_percent(difference.mean)})")
    details = f"{difference.n} seeds, 95 % interval {difference.low:+.4f} to {difference.high:+.4f}, "
    details += f"corrected p = {comparison.corrected:.2g}"
    if comparison.significant:
        word = "better" if (difference.mean > 0) == comparison.is_score else "worse"
        return f"{where}, {name} is {word} than {baseline} by {size}: significant ({details})."
    return f"{where}, {name} and {baseline} do not differ significantly: {size} ({details})."


def _percent(difference: float) -> str:
    return f"{100 * math.expm1(difference):+.1f} % in perplexity"
