"""Files that come in: what JSON and YAML may hold, and that all else is one line that names the file."""

import os

import pytest

from hf_relpos.file_reading import MAX_DEPTH, parse_json, parse_yaml, read_json, read_text_file, read_yaml, reason


DEEP = 100_000
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 2000))

BAD_JSON = {
    "nothing": (b"", "Expecting value"),
    "half": (b'{"a": [1, 2', "Expecting"),
    "a list": (b"[1]", "must hold a dictionary, got a list"),
    "null": (b"null", "must hold a dictionary, got null"),
    "a number": (b"3", "must hold a dictionary, got a number"),
    "text": (b'"x"', "must hold a dictionary, got text"),
    "an open nest": (b"[" * DEEP, "nested too deeply"),
    "a nest of lists": (b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}", "nested too deeply"),
    "a nest of dictionaries": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "nested too deeply"),
    "a nest that Python could hold": (b'{"a":' * 200 + b"1" + b"}" * 200, "nested too deeply"),
    "NaN": (b'{"a": NaN}', "NaN is not a JSON number"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
    "a float past all floats": (b'{"a": 1e999}', "1e999 is too large"),
    "an integer past all floats": (b'{"a": ' + b"9" * 400 + b"}", "a number has 400 digits"),
    "an integer that Python refuses": (b'{"a": ' + b"9" * 6000 + b"}", "a number has 6000 digits"),
    "a key twice": (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' stands there twice"),
    "bytes": (bytes(range(256)), "codec can't decode"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "codec can't decode"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "codec can't decode"),
    "zeros": (b"\0" * 50, "Expecting value"),
    "half of a surrogate pair": (b'{"a": "\\ud800"}', "surrogates not allowed"),
}
BAD_YAML = {
    "an alias bomb": (LAUGHS, "more than 100,000 values"),
    "a chain of aliases": (CHAIN, "100 levels"),
    "an alias of itself": ("a: &a [1, *a]", "an alias names what it stands in"),
    "a merge of itself": ("a: &a {b: {<<: *a}}", "an alias names what it stands in"),
    "a nest of lists": ("[" * DEEP, "nested too deeply"),
    "a nest of dictionaries": ("{a: " * 500 + "1" + "}" * 500, "nested too deeply"),
    "a nest of blocks": ("".join(" " * n + "a:\n" for n in range(300)) + " " * 300 + "b", "nested too deeply"),
    "a huge integer": ("a: " + "9" * 6000, "digits"),
    "a huge hexadecimal": ("a: 0x" + "f" * 6000, "digits"),
    "not a number": ("a: .nan", "nan is no finite number"),
    "infinity": ("a: [-.inf]", "-inf is no finite number"),
    "a date": ("a: 2020-01-01", "of type date: put it into quotes"),
    "a set": ("a: !!set {x, y}", "of type set"),
    "bytes": ("a: !!binary aGk=", "of type bytes"),
    "code": ("a: !!python/object/apply:os.system [ls]", r"could not determine a constructor .* \(line 1\)"),
    "a tag of its own": ("a: !x 1", r"could not determine a constructor .* \(line 1\)"),
    "two documents": ("a: 1\n---\nb: 2", "another document"),
    "an unknown alias": ("a: *b", r"undefined alias 'b' \(line 1\)"),
    "an open quote": ("a: 'x", "unexpected end of stream"),
    "a tab": ("a:\n\t- 1", r"\(line 2\)"),
    "a control character": ("a: \x01", "special characters are not allowed"),
}


@pytest.mark.parametrize("content, message", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_is_refused(content, message, tmp_path):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^record '.*c.json' .*{message}") as refused:
        read_json(tmp_path / "c.json", "record")
    assert len(str(refused.value)) < 600 and "\n" not in str(refused.value)


@pytest.mark.parametrize("content, message", BAD_YAML.values(), ids=BAD_YAML)
def test_yaml_that_is_refused(content, message, tmp_path):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ValueError, match=f"^experiment '.*c.yaml' cannot be read: .*{message}") as refused:
        read_yaml(tmp_path / "c.yaml", "experiment")
    assert len(str(refused.value)) < 600 and "\n" not in str(refused.value)


def test_what_is_read():
    """Up to the limits, and what only looks like a fault."""
    for depth, fits in ((MAX_DEPTH, True), (MAX_DEPTH + 1, False)):
        for read, text in ((parse_json, "[" * depth + "]" * depth), (parse_yaml, "[" * depth + "]" * depth)):
            if fits:
                assert read(text, "x") is not None
            else:
                with pytest.raises(ValueError, match="nested too deeply"):
                    read(text, "x")
    assert parse_json('{"a": {"b": 1}, "b": {"a": "\\ud83d\\ude00"}, "c": 1e300}', "x")["b"] == {"a": "😀"}
    assert str(parse_json('{"a": NaN}', "x", allow_nan=True)["a"]) == "nan"
    assert parse_json('{"a": 1000000000000000019884624838656}', "x")["a"] == int(1e30)  # of every tokenizer
    text = "a: &base {x: 1, y: [1, 2]}\nb: {<<: *base, x: 3}\nc: *base\nd: 1e-3\ne: 007\n1: yes"
    base = {"x": 1, "y": [1, 2]}
    assert parse_yaml(text, "x") == {"a": base, "b": base | {"x": 3}, "c": base, "d": "1e-3", "e": 7, 1: True}
    assert parse_yaml("", "x") is None


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for path, message in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "is no regular file"),
        (tmp_path / "pipe", "is no regular file"),
        ("/dev/zero", "is no regular file"),
        (tmp_path / ("x" * 300), "does not exist"),
        ("a\0b", "does not exist"),
    ):
        with pytest.raises(ValueError, match=f"^prompts '.*' .*{message}"):
            read_text_file(path, "prompts")


def test_a_large_file_is_refused_unread(tmp_path):
    with open(tmp_path / "c.json", "wb") as file:
        file.truncate(2**40)  # takes no room
    with pytest.raises(ValueError, match="it has more than 512 MiB"):
        read_json(tmp_path / "c.json")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "c").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "c") == read_yaml(tmp_path / "c") == {"a": 1}


def test_reasons_are_short_and_say_their_type():
    assert reason(ValueError("one\ntwo")) == "one" and reason(KeyError("x")) == "KeyError: 'x'"
    assert reason(TypeError()) == "TypeError" and reason(RecursionError("deep")) == "it is nested too deeply"
    assert len(reason(ValueError("x" * 10**6))) < 400
