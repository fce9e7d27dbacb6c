"""Metric of the `evaluate` library: perplexity by evaluation length, over the same target tokens at every length."""

import operator
import os
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_relpos.environment import check_at_least_1
from hf_relpos.evaluation.loss_by_length import check_lengths, evaluate_lengths
from hf_relpos.special_tokens import document_start


class PerplexityByLength(evaluate.Metric):
    """`evaluate.load("<path of this file>")`.

    `compute(predictions=texts, model=…, tokenizer=…, lengths=[128, 512])` scores each text as one document.

    Args:
        predictions: the documents: a list, tuple, array, column or generator of strings.
        model: a causal language model, or the name of one.
        tokenizer: its tokenizer, or the name of one; by default the one saved with the named model.
        lengths: evaluation lengths in tokens, or one; no length may exceed the longest document.
        tokens_per_batch: tokens of one forward.

    Returns:
        `perplexity_<length>` and `loss_<length>` for each length, and `num_tokens`.

    Raises:
        ValueError: for arguments that are none of these.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=self.__class__.__doc__,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float] | None:
        """As in `evaluate`, which adds the arguments here."""
        if predictions is not None:
            predictions = _documents(predictions)
            if not predictions:
                raise ValueError("`predictions` must hold at least one document, got none.")
        found = super().compute(predictions=predictions, references=references, **kwargs)
        if isinstance(found, Exception):
            raise found
        return found

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """As in `evaluate`: more documents."""
        documents = _documents(predictions)
        if documents:
            super().add_batch(predictions=documents, references=references, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """As in `evaluate`: one more document."""
        (document,) = _documents([prediction])
        super().add(prediction=document, reference=reference, **kwargs)

    def _compute(self, **kwargs: Any) -> dict[str, float] | Exception:
        try:
            return _scores(**kwargs)
        except Exception as error:  # raised once `evaluate` has put its files away, so that the metric can go on
            return error


def _scores(
    predictions: list[str],
    model: Any = None,
    lengths: Any = None,
    tokenizer: Any = None,
    tokens_per_batch: int = 8192,
) -> dict[str, float]:
    check_at_least_1("tokens_per_batch", tokens_per_batch)
    lengths = _whole_numbers(lengths)
    if isinstance(model, (str, os.PathLike)):
        tokenizer = model if tokenizer is None else tokenizer
        model = AutoModelForCausalLM.from_pretrained(model)
    if not (callable(model) and hasattr(model, "config") and hasattr(model, "device")):
        raise ValueError(f"`model` must be a causal language model or the name of one, got {model!r}.")
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if not callable(tokenizer):
        raise ValueError(f"`tokenizer` must be the model's, unless `model` is a name; got {tokenizer!r}.")
    lengths = check_lengths(lengths, model, "lengths")
    start = document_start(tokenizer)
    rows = tokenizer(list(predictions), add_special_tokens=False, verbose=False)["input_ids"]
    documents = [start + row for row in rows]
    longest = max(map(len, documents), default=0)
    if longest < lengths[-1]:
        raise ValueError(f"`lengths` must be at most {longest}, the tokens of the longest document, got {lengths[-1]}.")
    by_length = evaluate_lengths(model, documents, lengths, tokens_per_batch=tokens_per_batch)["lengths"]
    scores = {f"perplexity_{length}": score["perplexity"] for length, score in by_length.items()}
    scores |= {f"loss_{length}": score["loss"] for length, score in by_length.items()}
    return scores | {"num_tokens": next(iter(by_length.values()))["num_tokens"]}


def _documents(predictions: Any) -> list[str]:
    """Any collection of strings → a list of them; raises `ValueError` for anything else."""
    given = predictions.item() if getattr(predictions, "ndim", None) == 0 else predictions
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise ValueError(f"`predictions` must be a list of documents, each a string, got {_short(given)}.")
    documents = list(given)
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise ValueError(f"`predictions` must be strings, got {_short(document)} at index {index}.")
    return [str(document) for document in documents]


def _whole_numbers(lengths: Any) -> list[int]:
    """One whole number or any collection of them → a list; raises `ValueError` for anything else."""
    given = lengths.tolist() if hasattr(lengths, "tolist") else lengths
    given = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping)) else [given]
    if not given or any(isinstance(length, bool) or not hasattr(length, "__index__") for length in given):
        raise ValueError(f"`lengths` must be a whole number of tokens or a list of them, got {_short(lengths)}.")
    return [operator.index(length) for length in given]


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"
