"""The tokenizer, and tokens cached by all that they depend on."""

import json
import time
from pathlib import Path

import pytest
from conftest import make_text
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_relpos.data.arguments import TextArguments
from hf_relpos.data.blocks import make_blocks
from hf_relpos.data.corpus import load_corpus
from hf_relpos.data.tokens import evaluation_documents, load_tokenizer, tokenize, tokenize_split, train_tokenizer
from hf_relpos.model_loading import check_vocab_size
from hf_relpos.special_tokens import document_end, document_start


@pytest.fixture(scope="module")
def corpus(corpus_files):
    return load_corpus(
        TextArguments(train_file=str(corpus_files / "train"), validation_file=str(corpus_files / "valid.txt"))
    )


def test_tokenizer_has_its_size_and_gives_back_any_text(corpus):
    tokenizer = train_tokenizer(corpus, 300)
    assert len(tokenizer) == 300
    special = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token
    assert special == ("<|startoftext|>", "<|endoftext|>", "<|pad|>") and len({*tokenizer.all_special_ids}) == 3
    for text in ("the state of union", "naïve  Ünïcode 🙂\n\ttabs", " leading"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert (
        tokenizer(corpus.splits["train"][0]["text"])["input_ids"]
        == (train_tokenizer(corpus, 300)(corpus.splits["train"][0]["text"])["input_ids"])
    ), "the cached tokenizer is the trained one"


def test_tokenizer_refuses_sizes_that_it_cannot_have(corpus, tmp_path):
    with pytest.raises(ValueError, match="`vocab_size` must be at least 259 .* got 200"):
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
        assert len(tokenizer(word)["input_ids"]) == 2 < len(tokenizer(other)["input_ids"])


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


@pytest.mark.parametrize("streaming", [False, True])
def test_control_tokens_in_text_are_text(streaming, tmp_path, capsys, corpus):
    text = "a b<|pad|> c<|endoftext|>d <|pad|>"
    (tmp_path / "a.txt").write_text(text)
    tokenizer = train_tokenizer(corpus, 300)
    args = TextArguments(validation_file=str(tmp_path / "a.txt"), streaming=streaming, document_separator="")
    for _ in range(2):  # the second time from the cache
        rows = tokenize_split(load_corpus(args), "validation", tokenizer, args)
        (ids,) = [list(row["input_ids"]) for row in rows]
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert not {*tokenizer.all_special_ids} & {*ids[1:-1]} and tokenizer.decode(ids[1:-1]) == text
        assert capsys.readouterr().err.count("control tokens in the text") == 1
    args.document_separator = "<|endoftext|>"
    rows = tokenize_split(load_corpus(args), "validation", tokenizer, args)
    assert [tokenizer.decode(row["input_ids"][1:-1]) for row in rows] == ["a b<|pad|> c", "d <|pad|>"]
    assert tokenizer("<|pad|>")["input_ids"][1:] == [tokenizer.pad_token_id], "prompts are read as before"


def test_a_control_token_that_cannot_be_text_is_refused():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")
    assert tokenize(Dataset.from_dict({"text": ["a b <unk>"]}), tokenizer)["input_ids"][:] == [[1, 2, 0, 0, 1]]
    with pytest.raises(
        ValueError, match="the text holds '<end>', which this tokenizer encodes as a control token only"
    ):
        tokenize(Dataset.from_dict({"text": ["a <end> a"]}), tokenizer)


def chat_tokenizer(bos: str | None, eos: str | None, *others: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with special tokens as published models have them."""
    names = [*dict.fromkeys(name for name in (bos, eos, *others) if name)]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(["<unk>", "a", *names])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(names)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


CONVENTIONS = {  # bos, eos, further tokens → how a document begins and ends in pretraining
    "SmolLM2-Instruct": (("<|im_start|>", "<|im_end|>", "<|endoftext|>"), ("<|endoftext|>", "<|endoftext|>")),
    "SmolLM2": (("<|endoftext|>", "<|endoftext|>", "<|im_end|>"), ("<|endoftext|>", "<|endoftext|>")),
    "Qwen2-Instruct": ((None, "<|im_end|>", "<|endoftext|>", "<|im_start|>"), ("<|endoftext|>", "<|endoftext|>")),
    "Llama-3-Instruct": (
        ("<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"),
        ("<|begin_of_text|>", "<|end_of_text|>"),
    ),
    "Llama-2": (("<s>", "</s>"), ("<s>", "</s>")),
    "Mistral tuned on ChatML": (("<s>", "<|im_end|>", "</s>", "<|im_start|>"), ("<s>", "</s>")),
    "gpt-oss": (("<|startoftext|>", "<|return|>", "<|endoftext|>"), ("<|startoftext|>", "<|endoftext|>")),
    "of one's own": (("[BOS]", "[EOS]"), ("[BOS]", "[EOS]")),
    "without a beginning": ((None, "[EOS]"), ("[EOS]", "[EOS]")),
    "with turns alone": (("<|im_start|>", "<|im_end|>"), ("<|im_start|>", "<|im_end|>")),
}


@pytest.mark.parametrize("names, expected", CONVENTIONS.values(), ids=CONVENTIONS)
def test_documents_begin_and_end_as_in_pretraining_never_as_turns(names, expected, tmp_path):
    tokenizer = chat_tokenizer(*names)
    assert tokenizer.convert_ids_to_tokens([*document_start(tokenizer), document_end(tokenizer)]) == [*expected]
    (tmp_path / "a.txt").write_text("a a")
    args = TextArguments(validation_file=str(tmp_path / "a.txt"))
    corpus = load_corpus(args)
    (row,) = tokenize_split(corpus, "validation", tokenizer, args)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == [expected[0], "a", "a", expected[1]]
    (document,) = evaluation_documents(corpus, args.filled(), tokenizer)[1]
    assert tokenizer.convert_ids_to_tokens(document) == [expected[0], "a", "a"]


def test_a_tokenizer_without_an_end_has_none():
    tokenizer = chat_tokenizer("<s>", None, "<|endoftext|>")
    assert document_end(tokenizer) is None and document_start(tokenizer) == [tokenizer.bos_token_id]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, empty, zero, flip, Path.unlink])
def test_damaged_caches_are_made_anew_and_named(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": make_text(400, index)}) for index in range(9)))
    args = TextArguments(train_file=str(tmp_path / "a.jsonl"))

    def prepare():
        corpus = load_corpus(args)
        tokenizer = load_tokenizer(args, corpus, 300)
        blocks = make_blocks(tokenize_split(corpus, "train", tokenizer, args), 16, False, "train")
        return tokenizer.backend_tokenizer.to_str(), blocks[:]

    expected = prepare()
    files = sorted(path for path in (tmp_path / "cache" / "hf_relpos").rglob("*") if path.is_file())
    assert {path.parent.name.partition("-")[0] for path in files} == {"documents", "tokenizer", "tokens", "blocks"}
    capsys.readouterr()
    assert prepare() == expected and "damaged" not in capsys.readouterr().err
    for path in files:
        damage(path)
        assert prepare() == expected
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("damaged cache, made anew: ")]
        assert len(lines) == 1 and str(path.parent) in lines[0] and path.name in lines[0]


def test_blocks_longer_than_the_split_are_refused_with_caches_too(corpus):
    tokenizer = train_tokenizer(corpus, 300)
    args = TextArguments()
    for _ in range(2):
        with pytest.raises(ValueError, match="`block_size` 100000 is more than the validation split holds: "):
            make_blocks(tokenize_split(corpus, "validation", tokenizer, args), 100000, False, "validation")


@pytest.mark.parametrize("num_workers", [None, 2])
def test_processes_do_not_change_the_tokens(num_workers, corpus):
    tokenizer = train_tokenizer(corpus, 300)
    rows = tokenize(corpus.splits["train"], tokenizer, f"workers {num_workers}", num_workers)["input_ids"]
    assert rows[:] == tokenize(corpus.splits["train"], tokenizer)["input_ids"][:]


@pytest.mark.parametrize("letters", ["a", "ab", "0123456789abcdef", "人"])
def test_words_without_end_train_a_tokenizer(letters, tmp_path):
    (tmp_path / "long.txt").write_text(letters * (600_000 // len(letters)), encoding="utf-8")
    (tmp_path / "valid.txt").write_text("a text")
    text = TextArguments(train_file=str(tmp_path / "long.txt"), validation_file=str(tmp_path / "valid.txt"))
    begun = time.process_time()
    tokenizer = train_tokenizer(load_corpus(text), 260)
    assert time.process_time() - begun < 10  # it took minutes
    assert tokenizer.decode(tokenizer(letters * 2000)["input_ids"], skip_special_tokens=True) == letters * 2000
