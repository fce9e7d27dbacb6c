"""Loading a saved model needs torch and transformers, none of the libraries for data, statistics and plots."""

import subprocess
import sys

from conftest import ROOT, save_with_tokenizer


LOAD = """
import sys
from transformers import PreTrainedModel

HEAVY = {"datasets", "pyarrow", "scipy", "matplotlib", "pandas", "evaluate", "gradio"}
before = HEAVY & set(sys.modules)  # transformers itself imports scipy where it is installed
from hf_relpos import RelPosForCausalLM
from hf_relpos.model_loading import load_model, load_model_tokenizer

model = load_model(sys.argv[1], RelPosForCausalLM)
load_model_tokenizer(sys.argv[1], model)
print(sorted(HEAVY & set(sys.modules) - before), "scipy.stats" in sys.modules)
"""


def test_loading_a_model_imports_no_library_of_data_or_plots(tmp_path):
    save_with_tokenizer(tmp_path, "alibi")
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[] False", done.stderr
