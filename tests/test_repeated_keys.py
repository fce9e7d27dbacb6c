"""A key that is given twice has no right value, nor has 010: refused in YAML, in JSON and in `config_overrides`."""

import pytest
import yaml

from hf_relpos.cli import parse_arguments
from hf_relpos.experiments.grid import load_experiment
from hf_relpos.file_reading import read_yaml
from hf_relpos.training.model_setup import ModelArguments, new_config


@pytest.mark.parametrize(
    "text, place",
    [
        ("model_size: small\nvocab_size: 9\nmodel_size: large", "'model_size' stands there twice, in lines 1 and 3"),
        ("'a': 1\na: 1", "'a' stands there twice, in lines 1 and 2"),
        ("{a: 1, a: 2}", "'a' stands there twice"),
        ("x: [{a: {b: 1, c: 2, b: 3}}]", "'b' stands there twice"),
        ("1: a\n1: b", "'1' stands there twice"),
        ("seed: 1\nmax_steps: 010", "'010' in line 2 would be read as octal"),
        ("grid: {max_steps: [1:30]}", "'1:30' in line 1 would be read as octal or in sixties"),
    ],
)
def test_yaml(text, place, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=place):
        read_yaml(str(path))
    with pytest.raises(ValueError, match=f"--config '.*' cannot be read: .*{place}"):
        parse_arguments((ModelArguments,), "", ["--config", str(path)])
    with pytest.raises(ValueError, match=f"experiment '.*' cannot be read: .*{place}"):
        load_experiment(str(path))


def test_yaml_that_repeats_nothing(tmp_path):
    """The same key in two dictionaries, and what a merge brings and a key replaces."""
    text = (
        "a: &base {x: 1, y: 2}\nb: {<<: *base, x: 3}\nc: [{x: 1}, {x: 2}]\nd: {<<: *base}\n1: a\n'1': b\n? [1, 2]\n: z"
    )
    (tmp_path / "c.yaml").write_text(text.replace("\n? [1, 2]\n: z", ""))
    assert read_yaml(str(tmp_path / "c.yaml")) == yaml.safe_load(text.replace("\n? [1, 2]\n: z", ""))
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match="unhashable"):
        read_yaml(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    "field, value",
    [
        ("pos_embedding_kwargs", '{"mlp_width": 4, "mlp_width": 8}'),
        ("rope_parameters", '{"rope_theta": 1.0, "rope_theta": 2.0}'),
        ("config_overrides", "hidden_dropout=0,hidden_dropout=0.1"),
    ],
)
def test_flags(field, value):
    with pytest.raises(ValueError, match=f"`{field}` .*'.*' (stands there )?twice"):
        new_config(ModelArguments(**{field: value}), 16)
