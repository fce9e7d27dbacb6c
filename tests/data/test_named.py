"""Data sets by name: what a folder says of its files, their content, and the caches of `datasets`."""

import json
import os
import shutil
from pathlib import Path

import datasets
import pytest
from conftest import make_text

from hf_relpos.data import cache
from hf_relpos.data.arguments import TextArguments
from hf_relpos.data.corpus import load_corpus


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def texts(corpus):
    return sorted(text for split in corpus.splits.values() for text in split["text"])


def lines(word):
    return [f"{word} {make_text(9, index)}" for index in range(4)]


def write(path, word):
    """Other content of the same size under the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines(word)))
    os.utime(path, ns=(10**18, 10**18))


def describe(folder, text):
    folder.mkdir(exist_ok=True)
    options = "".join(f"  {line}\n" for line in text.splitlines())
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n{options}---\n")


@pytest.mark.parametrize("place", ["../elsewhere/train.txt", "absolute", "inner/train.txt"])
def test_files_that_a_folder_names_are_known_by_their_content(place, tmp_path, own_cache):
    folder = tmp_path / "set"
    path = tmp_path / "elsewhere" / "train.txt" if place == "absolute" else Path(os.path.normpath(folder / place))
    describe(folder, f"data_files: {path if place == 'absolute' else place}")
    found = []
    for word in ("one", "two"):
        write(path, word)
        found.append(load_corpus(TextArguments(dataset_name=str(folder))))
    assert [texts(corpus) for corpus in found] == [sorted(lines("one")), sorted(lines("two"))]
    assert found[0].fingerprint != found[1].fingerprint and found[0].files != found[1].files


def test_what_a_folder_says_of_its_files_is_heeded(tmp_path, own_cache):
    """Read by this package, the first column would be "text;x"."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("text;x\n" + "\n".join(f"{text};1" for text in ["NA", *lines("a")]))
    describe(tmp_path / "set", "data_files: train.csv\nsep: ;")
    assert texts(load_corpus(TextArguments(dataset_name=str(tmp_path / "set")))) == sorted(["NA", *lines("a")])


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = [cut, empty, flip, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_caches_of_a_folder_are_made_anew(damage, tmp_path, own_cache, capsys):
    write(tmp_path / "set" / "train.txt", "one")
    args = TextArguments(dataset_name=str(tmp_path / "set"))
    expected = texts(load_corpus(args))
    files = [path for path in own_cache.rglob("*") if path.suffix in (".arrow", ".json")]
    assert len(files) == 1, "`datasets` keeps nothing that nobody checks"
    capsys.readouterr()
    damage(files[0])
    assert texts(load_corpus(args)) == expected
    assert f"damaged cache, made anew: {files[0].parent}: " in capsys.readouterr().err


@pytest.fixture
def on_the_hub(tmp_path, own_cache, monkeypatch):
    """A data set whose name is no folder here; `datasets` keeps it in its own cache."""
    write(tmp_path / "set" / "train.txt", "one")

    def elsewhere(function):
        return lambda name, *args, **kwargs: function(str(tmp_path / "set"), *args, **kwargs)

    for name in ("load_dataset", "load_dataset_builder"):
        monkeypatch.setattr(datasets, name, elsewhere(getattr(datasets, name)))
    return TextArguments(dataset_name="somebody/set")


@pytest.mark.parametrize("damage", [cut, empty, Path.unlink])
@pytest.mark.parametrize("suffix", [".arrow", ".json"])
def test_damaged_caches_of_datasets_are_made_anew(damage, suffix, on_the_hub, own_cache, capsys):
    expected = texts(load_corpus(on_the_hub))
    assert expected == sorted(lines("one"))
    (file,) = (path for path in own_cache.glob(f"*/default/**/*{suffix}") if "hf_relpos" not in path.parts)
    shutil.rmtree(own_cache / "hf_relpos")
    capsys.readouterr()
    damage(file)
    assert texts(load_corpus(on_the_hub)) == expected
    printed = capsys.readouterr().err
    assert damage is Path.unlink or f"damaged cache, made anew: {file.parent}: " in printed


@pytest.mark.parametrize("kind", ["folder", "files"])
def test_a_text_that_is_written_to_while_it_is_read_is_refused(kind, tmp_path, own_cache, monkeypatch):
    """Its name would be the hash of what it was, for ever."""
    path = tmp_path / "set" / "train.txt"
    write(path, "one")
    args = (
        TextArguments(dataset_name=str(path.parent)) if kind == "folder" else TextArguments(validation_file=str(path))
    )
    place = "hf_relpos.data.named._split_column" if kind == "folder" else "hf_relpos.data.corpus.read_documents"
    with monkeypatch.context() as patch:

        def read(*arguments):
            yield "one"
            write(path, "two")

        patch.setattr(place, read)
        with pytest.raises(ValueError, match="set.* was written to while it was read"):
            load_corpus(args)
    assert all("two" in text for text in texts(load_corpus(args)))


# --- the cache of this package, with what is no file of its own


def a_file(entry):
    shutil.rmtree(entry)
    entry.write_text("")


def a_link_to_nothing(entry):
    shutil.rmtree(entry)
    entry.symlink_to("nowhere")


def a_link_to_itself(entry):
    shutil.rmtree(entry)
    entry.symlink_to(entry.name)


def a_link_to_a_damaged_one(entry):
    shutil.move(entry, other := entry.with_name("other"))
    entry.symlink_to(other)
    (other / "x.bin").write_bytes(b"")


def an_empty_folder(entry):
    shutil.rmtree(entry)
    entry.mkdir()


def a_folder_for_a_file(entry):
    (entry / "x.bin").unlink()
    (entry / "x.bin").mkdir()


def a_pipe(entry):
    (entry / "x.bin").unlink()
    os.mkfifo(entry / "x.bin")


def a_pipe_for_the_entry(entry):
    (entry / "entry.txt").unlink()
    os.mkfifo(entry / "entry.txt")


def bytes_that_are_no_text(entry):
    (entry / "entry.txt").write_bytes(b"\xff\x00" * 90)


def facts_of_another(entry):
    content = (entry / "entry.txt").read_text()
    (entry / "entry.txt").write_text(content.replace('"facts": 7', '"facts": 8'))


def longer(entry):
    with (entry / "x.bin").open("ab") as file:
        file.write(b"more")


KINDS = [a_file, a_link_to_nothing, a_link_to_itself, a_link_to_a_damaged_one, an_empty_folder, a_folder_for_a_file]
KINDS += [a_pipe, a_pipe_for_the_entry, bytes_that_are_no_text, facts_of_another, longer]


def make(folder):
    (folder / "x.bin").write_bytes(b"content")
    return 7


@pytest.mark.parametrize("damage", KINDS)
def test_an_entry_may_have_become_anything(damage, own_cache, capsys):
    entry, _ = cache.cached("kind", [1], make)
    damage(entry)
    assert cache.cached("kind", [1], make) == (entry, 7) and (entry / "x.bin").read_bytes() == b"content"
    assert capsys.readouterr().err.count(f"damaged cache, made anew: {entry}: ") == 1
    assert not list(own_cache.rglob("making-*"))


def test_a_strange_file_is_damage_where_the_folder_is_read_whole(own_cache, capsys):
    for is_read_whole in (False, True):
        entry, _ = cache.cached("kind", [2], make, is_read_whole)
        (entry / "added_tokens.json").write_text('{"the": 5}')
        cache.cached("kind", [2], make, is_read_whole)
        assert (entry / "added_tokens.json").exists() != is_read_whole
    assert "added_tokens.json was not written there" in capsys.readouterr().err


def test_another_process_that_takes_the_new_entry_away(own_cache, monkeypatch):
    """It had found the damaged one when this one did."""
    discard, calls = cache._discard, []

    def twice(target):
        discard(target)
        calls.append(target)

    def made(folder):
        if len(calls) == 1:  # the other one is late
            monkeypatch.setattr(cache, "_checked_facts", late)
        return make(folder)

    def late(folder, *args):
        monkeypatch.setattr(cache, "_checked_facts", checked)
        discard(folder)
        return checked(folder, *args)

    checked = cache._checked_facts
    monkeypatch.setattr(cache, "_discard", twice)
    entry, _ = cache.cached("kind", [3], make)
    a_pipe(entry)
    assert cache.cached("kind", [3], made) == (entry, 7)


def test_a_damaged_entry_that_cannot_be_taken_away_is_named(own_cache, monkeypatch):
    entry, _ = cache.cached("kind", [4], make)
    longer(entry)

    def rename(*arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match=f"the cache '{own_cache}/hf_relpos' cannot be written: .*Read-only"):
        cache.cached("kind", [4], make)


def test_records_of_a_data_set_hold_hashes(tmp_path, own_cache):
    write(tmp_path / "set" / "train.txt", "one")
    files = load_corpus(TextArguments(dataset_name=str(tmp_path / "set"))).files
    assert list(files["dataset_name"]) == ["train.txt"] and str(tmp_path) not in json.dumps(files)
