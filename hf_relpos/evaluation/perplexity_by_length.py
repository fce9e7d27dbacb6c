"""Metric of the `evaluate` library: perplexity by evaluation length, over the same target tokens at every length."""

from typing import Any

import datasets
import evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_relpos.evaluation.loss_by_length import evaluate_lengths
from hf_relpos.special_tokens import document_start


class PerplexityByLength(evaluate.Metric):
    """`evaluate.load("<path of this file>")`.

    `compute(predictions=texts, model=…, tokenizer=…, lengths=[128, 512])` scores each text as one document.

    Args:
        predictions: the documents.
        model: a causal language model, or the name of one.
        tokenizer: its tokenizer; by default the one saved with the named model.
        lengths: evaluation lengths in tokens; no length may exceed the longest document.
        tokens_per_batch: tokens of one forward.

    Returns:
        `perplexity_<length>` and `loss_<length>` for each length, and `num_tokens`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=self.__class__.__doc__,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: list[str],
        model: Any,
        lengths: list[int],
        tokenizer: Any = None,
        tokens_per_batch: int = 8192,
    ) -> dict[str, float]:
        if isinstance(model, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model)
        if tokenizer is None:
            raise ValueError("`tokenizer` is needed unless `model` is a name.")
        start = document_start(tokenizer)
        rows = tokenizer(list(predictions), add_special_tokens=False, verbose=False)["input_ids"]
        documents = [start + row for row in rows]
        by_length = evaluate_lengths(model, documents, lengths, tokens_per_batch=tokens_per_batch)["lengths"]
        scores = {f"perplexity_{length}": score["perplexity"] for length, score in by_length.items()}
        scores |= {f"loss_{length}": score["loss"] for length, score in by_length.items()}
        return scores | {"num_tokens": next(iter(by_length.values()))["num_tokens"]}
