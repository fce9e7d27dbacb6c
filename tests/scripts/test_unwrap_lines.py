"""Paragraphs of hard-wrapped books on one line each."""

import json

import pytest
from conftest import load_script


PROSE = "It was the best of times, it was the worst of times, it was the age\n"
PROSE += "of wisdom, it was the age of foolishness, it was\nthe epoch."
VERSE = "Tiger, tiger, burning bright\nIn the forests of the night,\nWhat immortal hand or eye"
TABLE = "  apples      12   a long line of a table that is indented for its columns\n  pears        7"


def test_prose_is_joined_and_verse_is_left():
    unwrap = load_script("unwrap_lines").unwrap
    assert unwrap(PROSE) == PROSE.replace("\n", " ")
    assert unwrap(f"{PROSE}\n\n\n{VERSE}\n\n{TABLE}\n") == f"{PROSE.replace(chr(10), ' ')}\n\n{VERSE}\n\n{TABLE}"


def test_files_are_written_once(tmp_path, run_script, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (PROSE, VERSE)))
    run_script("unwrap_lines", "--files", tmp_path / "a.jsonl", "--output_dir", tmp_path / "out")
    rows = [json.loads(line)["text"] for line in (tmp_path / "out" / "a.jsonl").read_text().splitlines()]
    assert rows == [PROSE.replace("\n", " "), VERSE]
    with pytest.raises(SystemExit):
        run_script("unwrap_lines", "--files", tmp_path / "a.jsonl", "--output_dir", tmp_path / "out")
    assert "`output_dir` holds 'a.jsonl' already" in capsys.readouterr().err
