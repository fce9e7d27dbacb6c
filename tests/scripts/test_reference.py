"""docs/reference.md is what the code says, with every flag and every field."""

import dataclasses

from conftest import ROOT, load_script

from hf_relpos import RelPosConfig, cli
from hf_relpos.experiments.compare import CompareArguments


reference = load_script("reference")
PAGE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


def test_the_page_is_that_of_the_code():
    assert reference.reference_page() == PAGE, "run python scripts/reference.py"


def test_the_page_has_every_command_flag_and_field():
    assert all(f"\n## hf-relpos {name}\n" in PAGE for name in cli.COMMANDS)
    assert all(f"| `--{field.name}` |" in PAGE for field in dataclasses.fields(CompareArguments))
    own = [name for name, kind in RelPosConfig.__annotations__.items() if "ClassVar" not in str(kind)]
    missing = [name for name in own if f"`{name}" not in PAGE]
    assert len(own) > 20
    assert set(missing) <= {"bos_token_id", "eos_token_id"}  # in the row of pad_token_id
    assert "| `--train_length` | `128` |" in PAGE and "required" in PAGE
