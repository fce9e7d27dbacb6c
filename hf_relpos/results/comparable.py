"""What must agree in results that are compared, and what may differ on purpose."""

import math
from collections.abc import Sequence
from typing import Any

from .result_file import rounded


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
# fields of a configuration that belong to the scheme or the size, which `groups.VARIED` tells apart
POSITION_FIELDS = set(
    "pos_embedding_type pos_embedding_kwargs rope_parameters position_start_augmentation position_gates "
    "position_sampling layer_types sliding_window train_length max_position_embeddings num_hidden_layers hidden_size "
    "intermediate_size num_attention_heads num_key_value_heads".split()
)
VARIED_ON_PURPOSE = ("tokens_per_step", "training.corpus")  # and the fields of the recipe


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
            told = "; ".join(f"`{name}` is {first.get(name)!r} and {facts.get(name)!r}" for name in differing)
            raise ValueError(f"results of different experiments are not compared: {told}.")
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
    corpora = [[training_of(each).get(name) for name in ("corpus", "base_corpus")] for each in (first, second)]
    known = [[corpus.get("fingerprint") for corpus in each if corpus] for each in corpora]
    return all(known[0]) and known[0] == known[1] != []


def comparable_facts(result: dict[str, Any]) -> dict[str, Any]:
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
    training, corpus = training_of(result), result["corpus"]
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
    found = [comparable_facts(result) for result in results]
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


def training_of(result: dict[str, Any]) -> dict[str, Any]:
    """→ the record of its training; raises `ValueError` for a result without one."""
    if not result.get("training"):
        raise ValueError(f"the result of {result.get('model')!r} has no record of its training: it cannot be averaged.")
    return result["training"]
