"""Groups of runs that differ in their seed alone, what they are called, and which of them may be compared."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
# fields of the architecture that older records do not hold → their defaults
ARCHITECTURE = {
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
    "layer_norm_eps": 1e-5,
    "imported_from": None,
}
# fields of a recipe that stand elsewhere in a result, or differ between seeds
UNCOMPARED = {"seed", "data_seed", "corpus", "corpus_fingerprint", "max_steps", "block_size", "changes", "base_model"}
UNCOMPARED |= {"per_device_train_batch_size", "gradient_accumulation_steps"}  # in tokens_per_step
# fields of a configuration that belong to the scheme or the size, which stand in `VARIED`
POSITION_FIELDS = set(
    "pos_embedding_type pos_embedding_kwargs rope_parameters position_start_augmentation position_gates "
    "position_sampling layer_types sliding_window train_length max_position_embeddings num_hidden_layers hidden_size "
    "intermediate_size num_attention_heads num_key_value_heads".split()
)
VARIED_ON_PURPOSE = ("tokens_per_step", "training.corpus")  # and the fields of the recipe
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
    names = [group.label for group in groups]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two settings are both called {repeated!r}: a report cannot tell them apart.")
    if any(group.document_weights == [1] for group in groups):  # all are averaged in one way
        for group in groups:
            group.by_document = False
    return groups


def check_comparable(results: Sequence[dict[str, Any]], varied: Sequence[str] = ()) -> None:
    """Raises `ValueError`, naming the fields, unless results differ in nothing but what `group_results` groups by."""
    first, *others = _facts_of_all(results)
    allowed = sorted(filter(_may_vary, first))
    for name in varied:
        if name not in allowed:
            raise ValueError(f"`varied` must name some of {allowed}, got {name!r}.")
    for result, facts in zip(results[1:], others, strict=True):
        pairs = {name: (first.get(name), facts.get(name)) for name in {**first, **facts} if name not in varied}
        if _same_split(results[0]["corpus"], result["corpus"]):
            pairs = {name: pair for name, pair in pairs.items() if name not in ("corpus.name", "corpus.fingerprint")}
        if _trained_on_the_same(results[0], result):
            pairs.pop("training.corpus", None)
        differing = [name for name, (one, other) in pairs.items() if one != other]
        if differing:
            pairs = "; ".join(f"`{name}` is {first.get(name)!r} and {facts.get(name)!r}" for name in differing)
            raise ValueError(f"results of different experiments are not compared: {pairs}.")
    _check_data_seeds(results)


def fields_to_vary(results: Sequence[dict[str, Any]]) -> list[str]:
    """What `varied` must name so that results may be compared; raises `ValueError` if that is not enough, or without
    any."""
    if not results:
        raise ValueError("there are no results to compare.")
    first, *others = _facts_of_all(results)
    differing = {name for each in others for name in {**first, **each} if first.get(name) != each.get(name)}
    found = sorted(filter(_may_vary, differing))
    check_comparable(results, found)
    return found


def _may_vary(name: str) -> bool:
    """Whether an experiment may vary a field on purpose."""
    return name.startswith(("recipe.", "config.")) or name in VARIED_ON_PURPOSE


def _check_data_seeds(results: Sequence[dict[str, Any]]) -> None:
    """Runs of one seed read the data in one order, whatever their scheme: they are paired."""
    orders: dict[Any, Any] = {}
    for result in results:
        order = (result.get("training") or {}).get("data_seed")
        if orders.setdefault(result["seed"], order) != order:
            pair = f"{orders[result['seed']]!r} and {order!r}"
            raise ValueError(f"results of different experiments are not compared: `data_seed` is {pair} with one seed.")


def _same_split(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two results say that they are on the same text, whatever splits were named beside it."""
    known = first.get("split_fingerprint")
    return bool(known) and known == second.get("split_fingerprint")


def _trained_on_the_same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two records say that they were trained on the same text, whatever it was called."""
    corpora = [[_training(each).get(name) for name in ("corpus", "base_corpus")] for each in (first, second)]
    known = [[corpus.get("fingerprint") for corpus in each if corpus] for each in corpora]
    return all(known[0]) and known[0] == known[1] != []


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


def _facts(result: dict[str, Any]) -> dict[str, Any]:
    """What must be equal in all results, flat, for a message that names one field.

    Raises:
        ValueError: for a result of a model whose scheme is not the one that its record says, or without a record.
    """
    if edits := result.get("edited_since_training"):
        name, (before, after) = next(iter(edits.items()))
        raise ValueError(
            f"the result of {result.get('model')!r} is of no trained scheme: its `{name}` is {after!r} in config.json, "
            f"{before!r} where it was trained: it cannot be compared."
        )
    training, corpus = _training(result), result["corpus"]
    longest = max(result["lengths"], key=int)
    recipe = {f"recipe.{name}": value for name, value in training.get("recipe", {}).items()}
    resume = training.get("resume") or {}
    values = resume.get("values", {})
    recipe["recipe.overrides"] = resume.get("overrides") or None
    recipe |= {f"recipe.{name}": value for name, value in values.items() if _is_compared(name)}
    config = dict(training.get("config") or {})
    config = ARCHITECTURE | config if config else config
    if config:  # these two follow from the size, unless they were given
        config["embedding_multiplier"] = round(config["embedding_multiplier"] / math.sqrt(config["hidden_size"]), 6)
        config["head_dim"] *= config["num_attention_heads"] / config["hidden_size"]
    recipe |= {f"config.{name}": value for name, value in config.items() if name not in POSITION_FIELDS}
    facts = {
        "corpus.name": corpus["name"],
        "corpus.fingerprint": corpus.get("fingerprint"),
        "corpus.split": corpus.get("split"),
        "corpus.num_windows": corpus.get("num_windows"),
        "cross_document_attention": _crosses_documents(result, training),
        "eval_lengths (longest)": int(longest),
        "training.corpus": _training_corpus(training),
        "tokens_per_step": training.get("tokens_per_step"),
        "dtype": result.get("dtype"),
        "score_name": result.get("score_name"),
        **recipe,
    }
    return rounded(facts)  # a stored result and that of a run, which is not rounded, are of one kind


def _facts_of_all(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """→ the facts of each. A hash that a result, of an earlier version, does not have tells nothing: it is that of the
    first one which has it."""
    found = [_facts(result) for result in results]
    hashes = {name: value for facts in reversed(found) for name, value in facts.items() if "/" in name and value}
    return [facts | {name: facts.get(name) or value for name, value in hashes.items()} for facts in found]


def _is_compared(name: str) -> bool:
    """Whether a field of a recipe must agree: each seed goes on from a model of its own, each scheme has a file."""
    return name not in UNCOMPARED and not name.startswith(("base_model/", "import_file/"))


def _crosses_documents(result: dict[str, Any], training: dict[str, Any]) -> bool:
    """Whether attention went over the ends of documents in an evaluation: as it was asked for, else as in training."""
    own = ((training.get("corpus") or {}).get("flags") or {}).get("cross_document_attention", False)
    return (result.get("flags") or {}).get("cross_document_attention", own)


def _training_corpus(training: dict[str, Any]) -> str | None:
    """→ the names of what a model, and the one that it started from, were trained on, with their fingerprints."""
    corpora = [training.get("corpus"), training.get("base_corpus")]
    names = [f"{corpus['name']} {(corpus.get('fingerprint') or '')[:8]}".strip() for corpus in corpora if corpus]
    return " after ".join(dict.fromkeys(names)) or None


def _varied(result: dict[str, Any]) -> dict[str, Any]:
    training = _training(result)
    return rounded({name: training.get(name, result.get(name)) for name in VARIED})


def _training(result: dict[str, Any]) -> dict[str, Any]:
    if not result.get("training"):
        raise ValueError(f"the result of {result.get('model')!r} has no record of its training: it cannot be averaged.")
    return result["training"]


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
