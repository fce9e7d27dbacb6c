"""Which files are read: by content, unpacked, without what is hidden; and what is said of the rest."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow
import pytest
from conftest import make_text

from hf_relpos.data.arguments import TextArguments
from hf_relpos.data.corpus import load_corpus


def pack_zst(content):
    codec = pyarrow.CompressedOutputStream
    sink = pyarrow.BufferOutputStream()
    with codec(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda content: lzma.compress(content, lzma.FORMAT_ALONE),
    "zst": pack_zst,
}
TEXTS = {
    "txt": "one\n<|endoftext|>two\n",
    "jsonl": '{"text": "one\\n"}\n{"text": "two\\n"}\n',
    "csv": 'text\n"one\n"\n"two\n"\n',
}


def load(path, **fields):
    return load_corpus(TextArguments(validation_file=str(path), **fields))


def read(path, **fields):
    return [row["text"] for row in load(path, **fields).splits["validation"]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("compression", PACKERS)
@pytest.mark.parametrize("kind", TEXTS)
def test_compressed_files_are_unpacked(kind, compression, streaming, tmp_path):
    pack, content = PACKERS[compression], TEXTS[kind].encode()
    path = tmp_path / f"a.{kind}.{compression}"
    path.write_bytes(pack(content))
    assert read(path, streaming=streaming) == read(tmp_path, streaming=streaming) == ["one\n", "two\n"]
    path.write_bytes(pack(content[:5]) + pack(content[5:]))  # as `cat` joins them
    assert read(path, streaming=streaming) == ["one\n", "two\n"]
    for damaged in (pack(content)[:-7], content):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"a.{kind}.{compression}' is no whole .{compression} file"):
            read(path, streaming=streaming)


@pytest.mark.parametrize(
    "name", ["b.zip", "b.tar.gz", "b.jsonl.7z", "b.gz", "b.parquet.gz", "b.jsonl.lz4", "b.csv.snappy", "b.txt.lzo"]
)
def test_what_cannot_be_unpacked_is_refused_by_name(name, tmp_path):
    (tmp_path / "a.jsonl").write_text(TEXTS["jsonl"])
    (tmp_path / name).write_bytes(b"some bytes")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=rf"`validation_file`: .*{name}' cannot be read: .*unpack it"):
            load(path)


def test_a_folder_without_what_is_hidden_and_checkpoints(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt.gz"):
        content = f"text of {name}".encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    left_out = [".git", ".ipynb_checkpoints", "__MACOSX", "checkpoint-500", "checkpoints", "sub/model_checkpoint"]
    for name in left_out:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text that is no part of the corpus")
    for name in (".hidden.txt", "._a.txt", "README.md", "notes"):
        (tmp_path / name).write_text("no part either")
    (tmp_path / "none.txt").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    corpus = load(tmp_path)
    assert corpus.splits["validation"]["text"] == [f"text of {name}" for name in ("a.txt", "b.txt", "sub/c.txt.gz")]
    others = [".hidden.txt", "._a.txt", "README.md", "notes", "none.txt (empty)", "link/"]
    assert sorted(corpus.read.skipped) == sorted([f"{name}/" for name in left_out] + others)
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("corpus "))
    assert "files: 3" in line and ".ipynb_checkpoints/" in line and "README.md" in line
    assert corpus.read.to_dict()["num_files"] == 3
    assert load(tmp_path / ".git").splits["validation"]["text"], "what is named itself is read"


def test_names_that_are_not_utf_8(tmp_path, capsys):
    """What is left out is recorded all the same; what is read could not be found again by its record."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / os.fsdecode(b".caf\xe9")).write_text("hidden")
    corpus = load(tmp_path)
    assert corpus.read.skipped == [".caf\ufffd"]
    json.dumps(corpus.read.to_dict(), ensure_ascii=False).encode()
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    with pytest.raises(ValueError, match="the name '.*caf.udce9.txt' is not UTF-8: rename"):
        load(tmp_path)


def test_a_file_that_lies_beside_its_archive_is_read_once(tmp_path):
    rows = "".join(json.dumps({"text": f"text {index}"}) + "\n" for index in range(3))
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(rows.encode()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "~$a.jsonl").write_text("what an editor leaves")
    corpus = load(tmp_path)
    assert corpus.splits["validation"]["text"] == [f"text {index}" for index in range(3)] * 2
    left_out = ["~$a.jsonl", "a.jsonl.gz (the same as a.jsonl)", "a.jsonl.xz (the same as a.jsonl)"]
    assert sorted(corpus.read.skipped) == sorted(left_out)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "another"}'))
    assert "another" in load(tmp_path).splits["validation"]["text"]


def test_a_folder_with_nothing_but_hidden_files_is_refused(tmp_path):
    (tmp_path / ".a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"must be a file or folder of .*left out: .a.txt"):
        load(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "named", "named txt"])
def test_other_content_under_the_same_name_and_time_is_read(kind, streaming, tmp_path):
    path = tmp_path / {"named": "validation.jsonl", "named txt": "validation.txt"}.get(kind, f"a.{kind}")
    named = {"dataset_name": str(tmp_path)} if "named" in kind else {"validation_file": str(path)}
    found = []
    for word in ("one", "two"):
        rows = {".txt": word, ".csv": f"text\n{word}", ".jsonl": json.dumps({"text": word})}
        path.write_text(rows[path.suffix])
        os.utime(path, ns=(10**18, 10**18))
        corpus = load_corpus(TextArguments(streaming=streaming, **named))
        found.append(([row["text"] for row in corpus.splits["validation"]], corpus.fingerprint))
    assert [texts for texts, _ in found] == [["one"], ["two"]]
    assert found[0][1] != found[1][1] or (streaming and kind == "named txt" and not found[0][1])


def test_documents_in_training_and_validation_are_counted_and_said(tmp_path, capsys):
    texts = [make_text(9, index) for index in range(5)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "validation.csv").write_text("text\n" + "\n".join([texts[1], "another", f"{texts[3]} "]))
    files = {"train_file": str(tmp_path / "train.jsonl"), "validation_file": str(tmp_path / "validation.csv")}
    corpus = load_corpus(TextArguments(**files))
    assert corpus.read.num_shared == 2 and corpus.read.num_documents == {"train": 5, "validation": 3}
    assert "warning: 2 of the 3 documents to evaluate on are in the training split too" in capsys.readouterr().err
    (tmp_path / "twice.jsonl").write_text("\n".join([json.dumps({"text": "the same"})] * 4))
    load_corpus(TextArguments(train_file=str(tmp_path / "twice.jsonl")))
    assert "warning: 1 of the 1 documents" in capsys.readouterr().err


@pytest.mark.parametrize("streaming", [False, True])
def test_one_file_for_both_splits_is_refused(streaming, tmp_path):
    (tmp_path / "all").mkdir()
    path = tmp_path / "all" / "a.txt"
    path.write_text("text")
    (tmp_path / "all" / "b.txt").write_text("more text")
    (tmp_path / "soft.txt").symlink_to(path)
    (tmp_path / "hard.txt").hardlink_to(path)
    for train in (path, tmp_path / "all", tmp_path / "soft.txt", tmp_path / "hard.txt"):
        with pytest.raises(
            ValueError, match="`validation_file` must hold other files than `train_file`, got .*a.txt' in both"
        ):
            load(path, train_file=str(train), streaming=streaming)


def test_a_place_that_cannot_be_read_is_no_empty_place(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(ValueError, match="b.txt' is no regular file"):
        load(tmp_path)


def test_what_was_read_is_printed_once_by_the_first_process(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.csv").write_text("text,y\nNA,1\n  ,2\n")
    load(tmp_path)
    assert capsys.readouterr().err == "corpus " + tmp_path.name + (
        ": documents: validation 1; files: 1 (.csv); dropped: 1 without text\n"
    )
    monkeypatch.setenv("RANK", "1")
    load(tmp_path)
    assert not capsys.readouterr().err


SOURCES = {
    "lib/Pod.pod": b"=head1 NAME\n",
    "lib/a.py": b"x = 1\n",
    "b.MD": "# Stra\u00dfe\n".encode(),
    "Makefile": b"all:\n",
    "page.html.gz": gzip.compress(b"<p>one</p>\n"),
}
NO_SOURCES = {
    "image.png": b"\x89PNG\r\n\0",
    "lib/nul.dat": b"text and \0",
    "latin.tex": "Stra\u00dfe".encode("latin-1"),
    "utf16.md": "text".encode("utf-16"),
    "late.c": b"a" * 5_000_000 + b"\xff",
    "lib/__pycache__/a.pyc": b"x",
    ".git/config": b"[core]",
    ".hidden": b"x",
    "empty.py": b"",
}


def write_all(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_text_of_any_suffix_is_read(streaming, tmp_path, capsys):
    """Source code and markup are text; what is binary, hidden or empty is listed."""
    write_all(tmp_path, SOURCES | NO_SOURCES)
    found = read(tmp_path, streaming=streaming)
    assert sorted(found) == sorted(["=head1 NAME\n", "x = 1\n", "# Stra\u00dfe\n", "all:\n", "<p>one</p>\n"])
    line = capsys.readouterr().err
    assert "files: 5 (" in line
    kinds = line.partition("files: 5 (")[2].partition(")")[0].split(", ")
    assert sorted(kinds) == ["1 .html.gz", "1 .md", "1 .pod", "1 .py", "1 no suffix"]
    for name in ("image.png (no text)", "lib/nul.dat (no text)", "latin.tex (no text)", "utf16.md (no text)"):
        assert name in line
    for name in ("late.c (no text)", "lib/__pycache__/", ".git/", ".hidden", "empty.py (empty)"):
        assert name in line


@pytest.mark.parametrize("name", SOURCES)
def test_a_single_file_of_any_suffix_is_read(name, tmp_path):
    write_all(tmp_path, SOURCES)
    assert len(read(tmp_path / name)) == 1


@pytest.mark.parametrize("name", ["image.png", "lib/nul.dat", "latin.tex", "utf16.md", "late.c"])
def test_a_single_binary_file_is_refused_by_name(name, tmp_path):
    write_all(tmp_path, NO_SOURCES)
    where = "it holds a NUL byte|it is not UTF-8 .near byte"
    with pytest.raises(
        ValueError, match=f"`validation_file` must be a file or folder of text, got .*{name}': ({where})"
    ):
        read(tmp_path / name)


def test_a_folder_of_nothing_but_binary_files_is_refused(tmp_path):
    write_all(tmp_path, {name: NO_SOURCES[name] for name in ("image.png", "lib/nul.dat")})
    with pytest.raises(ValueError, match="which holds none; left out: image.png .no text., lib/nul.dat .no text."):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.py.zst.gz"])
def test_archives_are_not_left_out_in_silence(name, tmp_path):
    write_all(tmp_path, SOURCES | {name: b"PK"})
    with pytest.raises(ValueError, match=f"{name}' cannot be read: only text and .*; unpack it or move it away"):
        read(tmp_path)


def test_a_folder_with_text_files_reads_what_it_always_read(tmp_path, capsys):
    """Recorded corpora stay the same; where that leaves out more than it reads, a line says so."""
    write_all(tmp_path, {"a.txt": b"one\n", "b.txt": b"two\n"})
    before = load(tmp_path).fingerprint
    assert "files: 2 (.txt)" in capsys.readouterr().err
    write_all(tmp_path, {"lib/a.py": b"x = 1\n", "b.md": b"# two\n"})
    assert load(tmp_path).fingerprint == before
    printed = capsys.readouterr().err
    assert "left out: b.md, lib/a.py" in printed and "warning" not in printed
    write_all(tmp_path, {"c.py": b"x = 2\n"})
    assert load(tmp_path).fingerprint == before
    warned = "only 2 files of .txt are read, and 3 others are left out (.py, .md): a folder without .txt/.jsonl/"
    assert warned in capsys.readouterr().err
