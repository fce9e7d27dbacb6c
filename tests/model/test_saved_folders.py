"""Folders that version 0.1.0 saved load and say the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_relpos import RelPosForCausalLM


FOLDERS = sorted(path for path in (Path(__file__).parent / "saved_by_0_1_0").iterdir() if path.is_dir())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_folder_of_0_1_0_gives_the_same_logits(folder, implementation):
    assert json.loads((folder / "config.json").read_text())["transformers_version"] < "5.24"
    model, loading = RelPosForCausalLM.from_pretrained(
        folder, attn_implementation=implementation, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    expected = load_file(folder / "expected.safetensors")
    tokens, mask = expected["input_ids"], expected["attention_mask"]
    with torch.no_grad():
        logits = model.eval()(tokens, attention_mask=mask).logits
    real = mask.bool()
    # fp32 logits of magnitude 1 to 10; another processor or version of torch sums in another order
    torch.testing.assert_close(logits[real], expected["logits"][real], rtol=1e-4, atol=1e-4)
    generated = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, expected["generated"])
