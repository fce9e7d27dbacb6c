"""The tokenizer, and tokens cached by all that they depend on."""

import json

import pytest
from conftest import make_text

from hf_relpos.data.arguments import TextArguments
from hf_relpos.data.corpus import load_corpus
from hf_relpos.data.tokens import load_tokenizer, tokenize, train_tokenizer
from hf_relpos.model_loading import check_vocab_size


@pytest.fixture(scope="module")
def corpus(corpus_files):
    return load_corpus(
        TextArguments(train_file=str(corpus_files / "train"), validation_file=str(corpus_files / "valid.txt"))
    )


def test_tokenizer_has_its_size_and_gives_back_any_text(corpus):
    tokenizer = train_tokenizer(corpus, 300)
    assert len(tokenizer) == 300
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    for text in ("the state of union", "naïve  Ünïcode 🙂\n\ttabs", " leading"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (
        tokenizer(corpus.splits["train"][0]["text"])["input_ids"]
        == (train_tokenizer(corpus, 300)(corpus.splits["train"][0]["text"])["input_ids"])
    ), "the cached tokenizer is the trained one"


def test_tokenizer_refuses_sizes_that_it_cannot_have(corpus, tmp_path):
    with pytest.raises(ValueError, match="`vocab_size` must be at least 258 .* got 200"):
        train_tokenizer(corpus, 200)
    with pytest.raises(ValueError, match="`vocab_size` 8192 is more than this corpus gives"):
        train_tokenizer(corpus, 8192)
    with pytest.raises(ValueError, match="`vocab_size` of the model is 299, but the tokenizer has 300"):
        check_vocab_size(train_tokenizer(corpus, 300), 299)
    train_tokenizer(corpus, 300).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`vocab_size` of the model is 400, but the tokenizer has 300"):
        load_tokenizer(TextArguments(tokenizer_name=str(tmp_path)), corpus, 400)
    with pytest.raises(ValueError, match="`tokenizer_name` 'no/such' cannot be loaded"):
        load_tokenizer(TextArguments(tokenizer_name="no/such"), corpus, None)


class SlowTokenizer:
    """What is asked of a tokenizer that is not of the `tokenizers` library."""

    eos_token_id = None

    def __call__(self, texts, **kwargs):
        return {"input_ids": [[ord(character) % 97 for character in text] for text in texts]}

    def get_vocab(self):
        return {str(index): index for index in range(97)}


def test_any_tokenizer(corpus):
    rows = tokenize(corpus.splits["train"], SlowTokenizer(), "slow")["input_ids"]
    assert [len(row) for row in rows] == [len(text) for text in corpus.splits["train"]["text"]]


def test_a_stream_of_unknown_content_is_not_cached(tmp_path):
    for word, other in ((" zebra", " quokka"), (" quokka", " zebra")):
        text = make_text(3000, 0) + word * 500
        for split in ("train", "validation"):
            (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": text}))
        corpus = load_corpus(TextArguments(dataset_name=str(tmp_path), streaming=True))
        tokenizer = train_tokenizer(corpus, 300)
        assert len(tokenizer(word)["input_ids"]) == 1 < len(tokenizer(other)["input_ids"])


def test_tokens_end_with_the_end_of_text_and_are_cached_by_all_that_they_depend_on(corpus, monkeypatch):
    documents = corpus.splits["train"]
    tokenizer, other = train_tokenizer(corpus, 300), train_tokenizer(corpus, 290)
    rows = tokenize(documents, tokenizer, "one")["input_ids"]
    for text, ids in zip(documents["text"], rows):
        assert list(ids) == tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    assert tokenize(documents, other, "one")["input_ids"][0] != rows[0]

    def fail(*args, **kwargs):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(type(tokenizer), "__call__", fail)
    assert tokenize(documents, tokenizer, "one")["input_ids"][:] == rows[:]
    with pytest.raises(AssertionError, match="tokenised again"):
        tokenize(documents, tokenizer, "two")
