"""Text → documents: separators, long documents, byte order marks; tables are text as it stands in the file."""

import json
import random
import time

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from conftest import make_text

from hf_relpos.data.arguments import TextArguments
from hf_relpos.data.corpus import load_corpus
from hf_relpos.data.documents import Tally, split_text


def write(folder, kind, texts, column="text"):
    """→ a file with a text per row, or one text."""
    path = folder / f"texts.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({column: text}) for text in texts), encoding="utf-8")
    elif kind == "csv":
        pandas.DataFrame({column: texts}).to_csv(path, index=False)
    elif kind == "parquet":
        pandas.DataFrame({column: texts}).to_parquet(path)
    else:
        path.write_text("".join(texts), encoding="utf-8", newline="")
    return path


def load(path, **fields):
    return load_corpus(TextArguments(validation_file=str(path), **fields))


def read(path, **fields):
    """→ the documents."""
    return [row["text"] for row in load(path, **fields).splits["validation"]]


def reference_split(text, separator, limit):
    """Character by character what `split_text` does at once."""
    for document in text.split(separator):
        document = document.lstrip("\ufeff")
        while len(document) > limit:
            head = document[:limit]
            head = head[: head.rfind("\n") + 1] or head
            document = document[len(head) :]
            yield head
        yield document


@pytest.mark.parametrize("seed", range(20))
def test_splitting_does_not_depend_on_the_pieces_that_come(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice(["a", "bb ", "\n", "<|", "end|>", "<|end|>", "\ufeff", "\r\n"]) for _ in range(400))
    pieces, rest = [], text
    while rest:
        size = rng.randint(0, 9)
        pieces.append(rest[:size])
        rest = rest[size:]
    found = list(split_text(pieces, "<|end|>", 12, Tally()))
    assert found == [part for part in reference_split(text, "<|end|>", 12) if part.strip()]


KINDS = ["txt", "jsonl", "csv", "parquet"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_split_at_the_separator(kind, streaming, tmp_path, capsys):
    path = write(tmp_path, kind, ["a b<|endoftext|>c\n<|endoftext|>\n"])
    assert read(path, streaming=streaming) == ["a b", "c\n"]
    assert "split at '<|endoftext|>'" in capsys.readouterr().err
    assert read(path, streaming=streaming, document_separator="") == ["a b<|endoftext|>c\n<|endoftext|>\n"]
    assert read(path, streaming=streaming, document_separator=" b") == ["a", "<|endoftext|>c\n<|endoftext|>\n"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_document_is_cut_at_line_ends(kind, streaming, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_relpos.data.corpus.MAX_DOCUMENT_CHARACTERS", 100)
    text = "\n".join(make_text(5, index) for index in range(40))
    path = write(tmp_path, kind, [text])
    texts = read(path, streaming=streaming)
    assert "".join(texts) == text and len(texts) > 10
    assert all(len(piece) <= 100 and piece.endswith("\n") for piece in texts[:-1])
    if not streaming:
        assert f"longer than 100 characters: 1, cut into {len(texts)}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_reading_takes_linear_time(kind, tmp_path):
    line = make_text(200, 3).replace('"', "") + "\n"
    started = time.perf_counter()
    texts = read(write(tmp_path, kind, [line * (30_000_000 // len(line))]))
    assert sum(map(len, texts)) > 29e6 and len(texts) > 25
    assert time.perf_counter() - started < 15  # 0.1 s per MB would be slow; it takes some hundredths


@pytest.mark.parametrize("kind", KINDS)
def test_byte_order_marks_are_no_text(kind, tmp_path):
    path = write(tmp_path, kind, ["\ufeffone", "two\ufeff"] if kind != "txt" else ["\ufeffonetwo\ufeff"])
    expected = ["one", "two\ufeff"] if kind != "txt" else ["onetwo\ufeff"]
    assert read(path) == expected
    if kind != "parquet":
        path.write_bytes("\ufeff".encode() + path.read_bytes())
        assert read(path) == read(path, streaming=True) == expected


AS_IT_STANDS = [
    "NA",
    "null",
    "None",
    "nan",
    "N/A",
    "NaN",
    "",
    "007",
    "1e5",
    "1.50",
    "True",
    "-inf",
    " a ",
    "2020-01-02",
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("texts", [AS_IT_STANDS, ["007", "1.50"], ["2020-01-02", "2021-01-02"]])
def test_text_is_text(kind, streaming, texts, tmp_path):
    path = write(tmp_path, kind, texts)
    if kind == "csv":
        assert "NA" not in texts or "\nNA\n" in path.read_text()
    assert read(path, streaming=streaming) == [text for text in texts if text.strip()]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_text_is_text_in_a_named_folder(kind, tmp_path):
    write(tmp_path, kind, AS_IT_STANDS).rename(tmp_path / f"train.{kind}")
    corpus = load_corpus(TextArguments(dataset_name=str(tmp_path)))
    found = [text for split in corpus.splits.values() for text in split["text"]]
    assert sorted(found) == sorted(text for text in AS_IT_STANDS if text.strip())


JSON = {
    "lines": '{"text": "a"}\n\n{"text": "b"}\r\n',
    "list": '[{"text": "a"}, {"text": "b"}]',
    "list over lines": '[\n {"text": "a"},\n {"text": "b"}\n]\n',
    "list of strings": '["a", "b"]',
    "objects over lines": '{\n "text": "a"\n}\n{\n "text": "b"\n}\n',
    "other columns": '{"text": "a", "x": [1]}\n{"x": {"y": 2}}\n{"x": 3, "text": null}\n{"text": "b"}',
    "a number of 5000 digits": '{"text": "a", "x": ' + "1" * 5000 + '}\n{"text": "b"}',
    "joined with marks": '\ufeff{"text": "a"}\n\ufeff{"text": "b"}',
}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_ways_to_write_json(text, tmp_path):
    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read(tmp_path / name) == ["a", "b"]


def test_separators_of_lines_in_text_end_no_row(tmp_path):
    texts = ["a\u2028b\x0bc\x85d", "e\nf\r\ng"]
    for kind in ("jsonl", "csv"):
        path = tmp_path / f"rows.{kind}"
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        rows = rows if kind == "jsonl" else ["text", *(f'"{text}"' for text in texts)]
        path.write_text("\n".join(rows), encoding="utf-8", newline="")
        assert read(path) == texts


def nested(folder):
    texts = [["a", "b"], ["c"]]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "nested.parquet")
    return folder / "nested.parquet"


def struct(folder):
    pyarrow.parquet.write_table(pyarrow.table({"text": [{"en": "a"}]}), folder / "struct.parquet")
    return folder / "struct.parquet"


def two_columns(folder):
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["text", "text"]), folder / "two.parquet")
    return folder / "two.parquet"


def bytes_of(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


WRONG = {
    "list of parquet": (nested, "`text_column` must hold text, got 'text' of type list<"),
    "struct of parquet": (struct, "`text_column` must hold text, got 'text' of type struct<"),
    "list": (bytes_of("a.jsonl", b'{"text": "a"}\n{"text": ["b"]}'), "got 'text' of type list in '.*a.jsonl', row 2"),
    "struct": (bytes_of("a.jsonl", b'{"text": {"en": "a"}}'), "got 'text' of type dict in '.*a.jsonl', row 1"),
    "number": (bytes_of("a.json", b'[{"text": 1}]'), "got 'text' of type int in '.*a.json', row 1"),
    "no object": (bytes_of("a.jsonl", b"[1]"), "a.jsonl' cannot be read as json: row 1 is no object but int"),
    "column twice": (bytes_of("a.jsonl", b'{"text": "a", "text": "b"}'), "a.jsonl' .*'text' stands twice"),
    "column twice in csv": (
        bytes_of("a.csv", b"text,y,text\na,1,b\n"),
        "a.csv' .*'text' stands twice in the first row",
    ),
    "column twice in parquet": (two_columns, "two.parquet' cannot be read as parquet: it has two columns 'text'"),
    "no header, and a long document": (
        bytes_of("a.csv", b'"' + b"x" * 200_000 + b'"\n'),
        "a.csv' cannot be read as csv: its first row must name the columns: field larger than",
    ),
    "no column": (bytes_of("a.jsonl", b'{"a": "x", "b": 1}'), r"`text_column` must be one of \['a', 'b'\], got 'text'"),
    "cut json": (
        bytes_of("a.jsonl", b'{"text": "a"}\n{"te'),
        "`validation_file` .*a.jsonl' cannot be read as json: line 2",
    ),
    "deep json": (bytes_of("a.jsonl", b"[" * 100000), "a.jsonl' cannot be read as json"),
    "lone surrogate": (bytes_of("a.jsonl", b'{"text": "\\ud800"}'), "a.jsonl' cannot be read as json: .*surrogates"),
    "open quote": (bytes_of("a.csv", b'text\n"abc\n'), "a.csv' cannot be read as csv: .*EOF inside string"),
    "long row": (bytes_of("a.csv", b"text,y\na,1\nb,2,3\n"), "a.csv' cannot be read as csv: .*line 3"),
    "long first row": (bytes_of("a.csv", b"text,y\na,1,2\n"), "a.csv' cannot be read as csv"),
    "csv in latin-1": (bytes_of("a.csv", "text\né\n".encode("latin-1")), "a.csv' is not UTF-8 text .near byte 5"),
    "json in latin-1": (bytes_of("a.jsonl", b'{"text": "\xe9"}'), "a.jsonl' is not UTF-8 text .near byte 10"),
    "no parquet": (bytes_of("a.parquet", b"PAR1" * 9), "a.parquet' cannot be read as parquet"),
}


@pytest.mark.parametrize("make, message", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("streaming", [False, True])
def test_refuses_in_one_line(make, message, streaming, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read(make(tmp_path), streaming=streaming)
    assert "\n" not in str(error.value).strip()
