"""Names that are no scheme's: the refusal names the scheme that is called so elsewhere."""

import pytest

from hf_relpos import RelPosConfig, list_position_embeddings
from hf_relpos.model.scheme_names import SCALINGS, USUAL_NAMES, scheme_hint


@pytest.mark.parametrize(
    "given, meant",
    [
        ("rope", "rotary"),
        ("RoPE", "rotary"),
        ("roformer", "rotary"),
        ("rotary_embedding", "rotary"),
        ("rope+alibi", "rotary"),
        ("alibi/rope", "rotary"),
        ("nope", "none"),
        ("no_position", "none"),
        ("absolute", "learned"),
        ("learnable", "learned"),
        ("learned_positional_embeddings", "learned"),
        ("sin", "sinusoidal"),
        ("sine", "sinusoidal"),
        ("sinusoidal-encoding", "sinusoidal"),
        ("relative", "t5"),
        ("relative_position_bias", "t5"),
        ("t5_bias", "t5"),
        ("T5", "t5"),
        ("cpb", "linear_cpb"),
        ("Linear-CPB", "linear_cpb"),
        ("swinv2", "log_cpb"),
        ("ALiBi", "alibi"),
        ("linear_bias", "alibi"),
        ("kerple", "kerple_log"),
        ("forgetting_transformer", "fox"),
        ("alibbi", "alibi"),  # spelt alike
    ],
)
def test_the_usual_names_are_known(given, meant):
    with pytest.raises(ValueError, match=f"no scheme: '.*'. Did you mean '{meant}'\\? It must"):
        RelPosConfig(pos_embedding_type=given)


@pytest.mark.parametrize("given", [*SCALINGS, "rope_yarn", "YaRN", "dynamic-ntk", "ntk_rope"])
def test_scalings_are_no_schemes(given):
    assert scheme_hint(given, list_position_embeddings()) == "Did you mean 'rotary', scaled by `rope_parameters`?"


def test_the_table_names_schemes_that_exist_and_each_name_once():
    assert {*USUAL_NAMES} <= {*list_position_embeddings()}
    names = [name for line in USUAL_NAMES.values() for name in line.split()]
    assert len(names) == len({*names}) and not {*names} & {*SCALINGS}
    assert not {*names} & {name.replace("_", "") for name in list_position_embeddings()}


def test_what_nobody_calls_a_scheme_gets_no_name():
    assert scheme_hint("zzzz", ["alibi"]).startswith("A scheme of your own must be imported first")
    assert scheme_hint("rope", ["alibi", "pope"]) == "Did you mean 'pope'?"  # where no rotary exists
