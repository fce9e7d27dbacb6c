"""The scripts in a process of their own, and what the report refuses."""

from helpers import refusal, run_in_shell


def test_report_refuses(tmp_path, run_script, capsys):
    (tmp_path / "bad.json").write_text('{"lengths": {}}')
    for path, message in (
        (tmp_path / "bad.json", "lacks ['pos_embedding_type'"),
        (tmp_path / "no.json", "cannot be read"),
    ):
        flags = ["--results", path, "--output_dir", tmp_path / "x"]
        assert message in refusal(run_script, capsys, "report", flags)


def test_help_of_a_real_process():
    process = run_in_shell("train", ["--help"])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "--pos_embedding_type" in output
