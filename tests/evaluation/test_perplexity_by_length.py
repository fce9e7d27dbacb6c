"""The metric of the `evaluate` library: what its users pass, and what bad input gets."""

import evaluate
import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, make_text, make_tokenizer
from transformers import PreTrainedTokenizerFast

from hf_relpos.data.arguments import TextArguments
from hf_relpos.data.corpus import load_corpus
from hf_relpos.data.tokens import train_tokenizer
from hf_relpos.evaluation.loss_by_length import evaluate_lengths


def test_metric_of_the_evaluate_library(corpus_files, tmp_path):
    path = str(corpus_files / "valid.txt")
    corpus = load_corpus(TextArguments(train_file=str(corpus_files / "train"), validation_file=path))
    tokenizer = train_tokenizer(corpus, 300)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    model = make_model("log_cpb", vocab_size=300)
    metric = evaluate.load(str(ROOT / "hf_relpos" / "evaluation" / "perplexity_by_length.py"))
    texts = corpus.splits["train"]["text"][:3]
    scores = metric.compute(predictions=texts, model=model, tokenizer=tokenizer, lengths=[32, 128])
    documents = tokenizer(list(texts))["input_ids"]
    expected = evaluate_lengths(model, documents, [32, 128])["lengths"]
    assert scores["perplexity_128"] == pytest.approx(expected["128"]["perplexity"])
    assert scores["loss_32"] == pytest.approx(expected["32"]["loss"])
    assert scores["num_tokens"] == expected["32"]["num_tokens"]
    given = {"model": model, "tokenizer": tokenizer}
    for predictions in (tuple(texts), np.array(texts), [np.str_(text) for text in texts], (t for t in texts)):
        assert metric.compute(predictions=predictions, lengths=(128, 32), **given) == scores
    alone = metric.compute(predictions=texts, lengths=[128], **given)
    for lengths in (128, np.int64(128), np.array([128]), np.array(128), torch.tensor(128), range(128, 129), {128}):
        assert metric.compute(predictions=texts, lengths=lengths, **given) == alone
    metric.add(prediction=texts[0])
    metric.add_batch(predictions=np.array(texts[1:]))
    metric.add_batch(predictions=[])
    assert metric.compute(lengths=[32, 128], **given) == scores
    for name in ("model", "tokenizer"):
        given[name].save_pretrained(tmp_path)
    assert metric.compute(predictions=texts, lengths=[32, 128], model=tmp_path) == scores


BAD_METRIC = {
    "no document": ({"predictions": []}, "`predictions` must hold at least one document, got none."),
    "a string": (
        {"predictions": "the people"},
        "`predictions` must be a list of documents, each a string, got 'the people'.",
    ),
    "an array of none": (
        {"predictions": np.array("a")},
        "`predictions` must be a list of documents, each a string, got 'a'.",
    ),
    "a number": ({"predictions": 3}, "`predictions` must be a list of documents, each a string, got 3."),
    "a dictionary": (
        {"predictions": {"a": "b"}},
        "`predictions` must be a list of documents, each a string, got {'a': 'b'}.",
    ),
    "tokens": ({"predictions": [[1, 2]]}, "`predictions` must be strings, got [1, 2] at index 0."),
    "nothing": ({"predictions": ["a", None]}, "`predictions` must be strings, got None at index 1."),
    "text as a length": ({"lengths": "64"}, "`lengths` must be a whole number of tokens or a list of them, got '64'."),
    "a fraction": (
        {"lengths": [8, 64.0]},
        "`lengths` must be a whole number of tokens or a list of them, got [8, 64.0].",
    ),
    "no length": ({"lengths": []}, "`lengths` must be a whole number of tokens or a list of them, got []."),
    "lengths left out": ({"lengths": None}, "`lengths` must be a whole number of tokens or a list of them, got None."),
    "true": ({"lengths": True}, "`lengths` must be a whole number of tokens or a list of them, got True."),
    "one token": ({"lengths": [1, 8]}, "`lengths` must be at least 2 tokens each, got [1, 8]."),
    "too long": ({"lengths": 99}, "`lengths` must be at most 27, the tokens of the longest document, got 99."),
    "no model": ({"model": None}, "`model` must be a causal language model or the name of one, got None."),
    "no tokenizer": ({"tokenizer": None}, "`tokenizer` must be the model's, unless `model` is a name; got None."),
    "batches": ({"tokens_per_batch": 0}, "`tokens_per_batch` must be at least 1, got 0."),
}


@pytest.mark.parametrize("change, message", BAD_METRIC.values(), ids=BAD_METRIC)
def test_metric_refuses_in_its_own_words(change, message):
    tokenizer = make_tokenizer()
    metric = evaluate.load(str(ROOT / "hf_relpos" / "evaluation" / "perplexity_by_length.py"))
    given = {"predictions": [make_text(12, 0)], "lengths": 8, "tokenizer": tokenizer}
    given |= {"model": make_model("none", vocab_size=len(tokenizer))}
    with pytest.raises(ValueError) as refused:
        metric.compute(**{**given, **change})
    assert str(refused.value) == message
    assert metric.compute(**given)["num_tokens"] == 21  # it can go on: three windows of 8
