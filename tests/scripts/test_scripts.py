"""The scripts in a process of their own, and what the report refuses."""

import subprocess
import sys

from conftest import ROOT
from helpers import refusal, run_in_shell


def test_report_refuses(tmp_path, run_script, capsys):
    (tmp_path / "bad.json").write_text('{"lengths": {}}')
    for path, message in (
        (tmp_path / "bad.json", "lacks ['pos_embedding_type'"),
        (tmp_path / "no.json", "does not exist"),
    ):
        flags = ["--results", path, "--output_dir", tmp_path / "x"]
        assert message in refusal(run_script, capsys, "report", flags)


def test_help_of_a_real_process():
    process = run_in_shell("train", ["--help"])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "--pos_embedding_type" in output


def test_help_imports_no_library_for_data_statistics_plots_or_pages():
    """What the entry points of these modules import before they read their flags."""
    code = (
        "import sys\nimport hf_relpos.demo.app, hf_relpos.evaluation.evaluate, hf_relpos.inference.generate\n"
        "import hf_relpos.inference.serve\n"
        "names = ('datasets', 'pyarrow', 'scipy.stats', 'matplotlib', 'evaluate', 'gradio', 'fastapi')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
