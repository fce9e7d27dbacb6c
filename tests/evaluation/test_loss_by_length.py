"""Evaluation against plain loops, on this family and on others."""

import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokens
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_relpos.data.arguments import TextArguments
from hf_relpos.data.corpus import load_corpus
from hf_relpos.data.tokens import TokenizedDocuments, evaluation_documents, train_tokenizer
from hf_relpos.evaluation.loss_by_length import (
    evaluate_lengths,
    evaluate_sliding,
    token_losses,
)
from hf_relpos.evaluation.loss_sums import ClusteredMean, DocumentLosses, RunningLoss


DOCUMENTS = [make_tokens(length, seed=length).tolist() for length in (130, 64, 20, 257)]


def loss_of(model, context: list[int], token: int) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([context])).logits[0, -1].double()
    return float(torch.logsumexp(logits, 0) - logits[token])


def reference_losses(model, lengths):
    """For each window of the longest length and each length: position → loss, token by token."""
    longest = max(lengths)
    for index, document in enumerate(DOCUMENTS):
        for start in range(0, len(document) - longest + 1, longest):
            window = document[start : start + longest]
            losses = {
                length: {p: loss_of(model, window[p - p % length : p], window[p]) for p in range(longest) if p % length}
                for length in lengths
            }
            yield index, losses


@pytest.mark.parametrize("lengths", [(16, 64), (24, 10, 64)], ids=["divisors", "no divisors"])
def test_lengths_are_scored_on_the_same_targets(lengths):
    model = make_model("linear_cpb")
    result = evaluate_lengths(model, DOCUMENTS, lengths, train_length=16)
    windows = list(reference_losses(model, lengths))
    assert result["num_windows"] == len(windows) == 7 and result["num_documents"] == 3
    common = [p for p in range(64) if all(p % length for length in lengths)]
    for length in lengths:
        losses = [losses[length][p] for _, losses in windows for p in common]
        row = result["lengths"][str(length)]
        assert row["num_tokens"] == len(losses)
        assert row["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["median_loss"] == pytest.approx(np.median(losses), abs=0.01)
    by_position = result["loss_by_position"]
    assert len(by_position) == 64 and by_position[0] is None
    for p in (1, 15, 16, 63):
        assert by_position[p] == pytest.approx(np.mean([losses[64][p] for _, losses in windows]), abs=1e-5)

    slopes = [np.polyfit(range(16, 64), [losses[64][p] for p in range(16, 64)], 1)[0] for _, losses in windows]
    assert result["slope"]["slope"] == pytest.approx(np.mean(slopes), abs=1e-6)
    clusters = [[s - np.mean(slopes) for s, (i, _) in zip(slopes, windows) if i == index] for index in (0, 1, 3)]
    error = math.sqrt(sum(sum(cluster) ** 2 for cluster in clusters) * 3 / 2) / 7
    assert result["slope"]["standard_error"] == pytest.approx(error, rel=1e-3)
    json.dumps(result, allow_nan=False)


def test_the_sliding_baseline_reads_the_same_targets_in_rows_of_the_training_length():
    """Rows of 10 that move by 5: a token has the last 5 to 9 tokens before it, or all where there are fewer."""
    model = make_model("rotary")
    result = evaluate_lengths(model, DOCUMENTS, (16, 64), 10, tokens_per_batch=100, sliding_baseline=True)
    targets = [p for p in range(64) if p % 16]
    by_document, numbers = {}, []
    for index, document in enumerate(DOCUMENTS):
        for start in range(0, len(document) - 63, 64):
            window = document[start : start + 64]
            for p in targets:
                end = min(64, 10 if p < 10 else p + 5 - (p - 10) % 5)  # of the first row that holds the token
                loss = loss_of(model, window[max(0, end - 10) : p], window[p])
                by_document.setdefault(index, []).append(loss)
                numbers.append(loss)
    row = result["sliding_baseline"]
    assert (row["length"], row["stride"], row["num_tokens"]) == (10, 5, len(numbers))
    assert row["num_tokens"] == result["lengths"]["16"]["num_tokens"]
    assert row["loss"] == pytest.approx(np.mean(numbers), abs=1e-5)
    means = [np.mean(losses) for losses in by_document.values()]
    assert result["documents"]["loss"]["sliding_baseline"] == pytest.approx(means, abs=1e-5)
    for train_length in (None, 64):
        with pytest.raises(ValueError, match="`sliding_baseline` needs a `train_length`"):
            evaluate_lengths(model, DOCUMENTS, (16, 64), train_length, sliding_baseline=True)


def test_nothing_depends_on_the_batch():
    model = make_model("alibi")
    results = [evaluate_lengths(model, DOCUMENTS, [16, 64], 16, tokens_per_batch=size) for size in (1, 100, 10**6)]
    for other in results[1:]:
        for length in ("16", "64"):
            assert other["lengths"][length] == pytest.approx(results[0]["lengths"][length], abs=1e-3)
        assert other["loss_by_position"][1:] == pytest.approx(results[0]["loss_by_position"][1:], abs=1e-5)


def test_some_windows_are_spread_over_the_corpus():
    model = make_model("none")
    some = evaluate_lengths(model, DOCUMENTS, [32], max_windows=4)
    assert (some["num_windows"], some["num_documents"]) == (4, 2)
    expected = [
        d[s : s + 32] for d, s in ((DOCUMENTS[0], 96), (DOCUMENTS[3], 0), (DOCUMENTS[3], 128), (DOCUMENTS[3], 224))
    ]
    assert some["lengths"] == evaluate_lengths(model, expected, [32])["lengths"]


def test_in_context_score_and_its_bands():
    """A model whose loss at position p is known: the score is the difference of two means over ±10 %."""
    model, document = make_model("none"), make_tokens(1100).tolist()
    result = evaluate_lengths(model, [document], [1100])
    losses = token_losses(model, torch.tensor([document]))[0].detach().double().numpy()
    base = losses[45:56].mean()
    for token, half in ((250, 25), (500, 50), (1000, 99)):
        score = result["in_context_score"][str(token)]
        assert score["score"] == pytest.approx(losses[token - half : token + half + 1].mean() - base, abs=1e-5)
        assert score["standard_error"] is None, "one document says nothing about the spread"
    assert evaluate_lengths(model, [document], [300])["in_context_score"]["500"] is None


class ManyDocuments:
    """`count` documents, made when they are asked for."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return (np.random.default_rng(index).integers(2, 97, 200) for index in range(self.count))


@pytest.mark.parametrize(
    "run",
    [
        lambda model, documents: evaluate_lengths(model, documents, [64, 16], 16, tokens_per_batch=256),
        lambda model, documents: evaluate_sliding(model, documents, 64, 32, tokens_per_batch=256),
    ],
    ids=["by length", "sliding"],
)
def test_memory_does_not_grow_with_the_corpus(run):
    """What Python and numpy allocate at most: forty times the text, the same peak (a document is 1.6 kB)."""
    model, peaks = make_model("none", num_hidden_layers=1), []
    run(model, ManyDocuments(2))
    for count in (5, 200):
        tracemalloc.start()
        run(model, ManyDocuments(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 50 * 1600


def test_joined_documents_are_one_text(corpus_files, monkeypatch):
    path = str(corpus_files / "valid.txt")
    args = TextArguments(train_file=str(corpus_files / "train"), validation_file=path, cross_document_attention=True)
    corpus = load_corpus(args)
    tokenizer = train_tokenizer(corpus, 300)
    monkeypatch.setattr(TokenizedDocuments, "piece_length", 1000)
    _, joined = evaluation_documents(corpus, args, tokenizer, "train")
    args.cross_document_attention = False
    _, apart = evaluation_documents(corpus, args, tokenizer, "train")
    pieces = list(joined)
    assert [len(piece) for piece in pieces[:-1]] == [1000] * (len(pieces) - 1)
    ended = [[*document, tokenizer.eos_token_id] for document in apart]  # which alone they are scored without
    assert np.array_equal(np.concatenate(pieces), np.concatenate(ended)) and len(ended) == 12


def test_dropout_is_off_and_the_mode_is_left_as_it_was():
    model = make_model("none", hidden_dropout=0.5).train()
    first, second = (evaluate_lengths(model, DOCUMENTS, [64])["lengths"] for _ in range(2))
    assert first == second and model.training


@pytest.mark.parametrize("length, stride", [(16, 5), (64, 63), (500, 100)])
def test_sliding_window_scores_each_token_once(length, stride):
    model = make_model("none")
    expected, context_sizes = [], []
    for document in DOCUMENTS:
        end, scored = min(length, len(document)), 1
        while True:
            start = max(0, end - length)
            for p in range(scored, end):
                expected.append(loss_of(model, document[start:p], document[p]))
                context_sizes.append((p - start, p))
            if end == len(document):
                break
            scored, end = end, min(end + stride, len(document))
    result = evaluate_sliding(model, DOCUMENTS, length, stride)
    assert result["num_tokens"] == len(expected) == sum(len(document) - 1 for document in DOCUMENTS)
    assert result["loss"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert all(size >= min(p, length - stride) for size, p in context_sizes)


def test_any_causal_language_model():
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    llama = LlamaForCausalLM(LlamaConfig(intermediate_size=32, **sizes))
    assert evaluate_lengths(llama, DOCUMENTS, [32, 64])["lengths"]["64"]["loss"] == pytest.approx(math.log(97), abs=0.3)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    assert evaluate_lengths(gpt2, DOCUMENTS, [32, 64])["lengths"]["64"]["loss"] == pytest.approx(math.log(97), abs=0.3)
    with pytest.raises(ValueError, match="does not support a length of 128 tokens"):
        evaluate_lengths(gpt2, DOCUMENTS, [128])


def test_a_broken_model_is_an_error_and_no_result():
    model = make_model("none")
    model.model.embed_tokens.weight.data[DOCUMENTS[0][40]] = float("nan")
    with pytest.raises(ValueError, match="loss is not finite at a length of 64"):
        evaluate_lengths(model, DOCUMENTS, [64])
    with pytest.raises(ValueError, match="loss is not finite"):
        evaluate_sliding(model, DOCUMENTS, 64, 32)


def test_refuses():
    model = make_model("learned")
    with pytest.raises(ValueError, match="`eval_lengths` must be at least 2 tokens each, got .0, 64."):
        evaluate_lengths(model, DOCUMENTS, [0, 64])
    with pytest.raises(ValueError, match="`eval_lengths` must be at most 160.* got 161"):
        evaluate_lengths(model, DOCUMENTS, [161])
    with pytest.raises(ValueError, match="no document has 300 tokens, the longest has 257"):
        evaluate_lengths(make_model("none"), DOCUMENTS, [300])
    with pytest.raises(ValueError, match="`stride` must lie between 1 and .* 63, got 64"):
        evaluate_sliding(model, DOCUMENTS, 64, 64)


def test_running_loss_and_clustered_mean_against_numpy():
    rng = np.random.default_rng(0)
    losses, running = rng.gamma(2.0, 2.0, 10001).astype(np.float32), RunningLoss()
    for piece in np.array_split(losses, 7):
        running.add(np.append(piece, np.nan))
    assert running.summary()["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert running.summary()["median_loss"] == pytest.approx(np.median(losses), abs=1e-3)
    assert running.summary()["num_tokens"] == 10001

    alone = ClusteredMean()  # one value per cluster: the textbook standard error
    for index, value in enumerate(losses[:50].tolist()):
        alone.add(value, index)
    assert alone.estimate() == pytest.approx((losses[:50].mean(), losses[:50].std(ddof=1) / math.sqrt(50)), rel=1e-5)
    repeated = ClusteredMean()  # a value counted three times in its cluster says no more than once
    for index, value in enumerate(losses[:50].tolist()):
        for _ in range(3):
            repeated.add(value, index)
    assert repeated.estimate() == pytest.approx(alone.estimate(), rel=1e-5)


def test_losses_of_documents_are_means_over_their_targets():
    sums = DocumentLosses([2, 4])
    for document, length, losses in ((0, 2, [1.0, 3.0]), (0, 4, [1.0, 1.0]), (5, 2, [4.0]), (5, 4, [2.0])):
        sums.add(document, length, np.array(losses))
    assert sums.summary() == {"num_tokens": [2, 1], "loss": {"2": [2.0, 4.0], "4": [1.0, 2.0]}}
    many = DocumentLosses([2])
    for document in range(1000):
        many.add(document, 2, np.array([document / 1000, document / 1000]))
    summary = many.summary()
    assert len(summary["num_tokens"]) == 256 and sum(summary["num_tokens"]) == 2000
    assert np.average(summary["loss"]["2"], weights=summary["num_tokens"]) == pytest.approx(0.4995)


def test_documents_and_unigrams_of_an_evaluation():
    model = make_model("alibi")
    documents = [make_tokens(40, seed=1).numpy(), make_tokens(70, seed=2).numpy()]
    found = evaluate_lengths(model, documents, [8, 16])
    losses, tokens = found["documents"]["loss"], found["documents"]["num_tokens"]
    assert tokens == [2 * 14, 4 * 14]
    for length in ("8", "16"):
        assert np.average(losses[length], weights=tokens) == pytest.approx(found["lengths"][length]["loss"], rel=1e-6)
        alone = evaluate_lengths(model, documents[1:], [8, 16])["lengths"][length]["loss"]
        assert losses[length][1] == pytest.approx(alone, rel=1e-6)
    targets = [
        token
        for d in documents
        for start in range(0, len(d) - 15, 16)
        for token in np.delete(d[start : start + 16], [0, 8])
    ]
    shares = np.unique(targets, return_counts=True)[1] / len(targets)
    assert found["unigram_loss"] == pytest.approx(-(shares * np.log(shares)).sum())
