"""What a scheme's class may not say: hooks that nobody would call, or that differ between kernels."""

import pytest
import torch
from conftest import make_model, make_tokens

from hf_relpos import PositionEmbedding, RelPosConfig, register_position_embedding
from hf_relpos.evaluation.evaluate import bias_curves
from hf_relpos.model import attention_planner
from hf_relpos.model.scheme_base import HOOKS, LAYER_HOOKS, POSITION_EMBEDDINGS, SHARED_HOOKS
from hf_relpos.model.scheme_registry import LayerGroup


def hook(self, *args):
    return None


@pytest.mark.parametrize(
    ("is_shared", "hooks", "message"),
    [
        (
            False,
            ["embed"],
            "`embed` is only called on schemes that all layers share, not one for each: set `shared_across_layers",
        ),
        (False, ["rotation", "rotate"], "`rotate` is only called on schemes that all layers share"),
        (
            True,
            ["key_bias"],
            "`key_bias` is only called on schemes that each layer has: set `shared_across_l",
        ),
        (True, ["score_bias"], "`score_bias` is only called on schemes that each layer has"),
        (True, ["max_table_position", "distance_bias", "dense_bias"], "`max_table_position` is only called on schemes"),
        (True, ["rotation"], "`rotation` does nothing without `rotate`: override both"),
        (True, ["rotate"], "`rotate` does nothing without `rotation`: override both"),
        (False, ["max_table_position", "distance_bias"], "`max_table_position` does nothing without `dense_bias`"),
        (False, ["max_table_position", "dense_bias"], "`max_table_position` does nothing without `distance_bias`"),
        (True, ["distance_bias", "dense_bias"], "`distance_bias` would be ignored beside `dense_bias`"),
        (True, ["bias"], "`bias` is called `dense_bias`: rename it"),
        (False, ["key_state"], "`key_state` is called `key_bias`: rename it"),
        (True, ["distance_bais"], "`distance_bais` is not part of a scheme; did you mean `distance_bias`?"),
    ],
)
def test_hooks_that_would_be_lost_are_refused_at_class_creation(is_shared, hooks, message):
    with pytest.raises(TypeError, match="position scheme 'Wrong': ") as refused:
        type("Wrong", (PositionEmbedding,), {"shared_across_layers": is_shared, **dict.fromkeys(hooks, hook)})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "relativ"}, "`kind` must be one of ['none', 'absolute', 'relative'], got 'relativ'."),
        ({"shared_accross_layers": False}, "`shared_accross_layers` is not part of a scheme; did you mean `shared_a"),
        ({"key_bias": hook, "embed": hook}, "`key_bias` and `embed` cannot be in one class: make two schemes"),
    ],
)
def test_fields_that_would_be_lost_are_refused(fields, message):
    with pytest.raises(TypeError) as refused:
        type("Wrong", (PositionEmbedding,), fields)
    assert message in str(refused.value)


def test_a_learned_rotation_learns_under_both_kinds_of_checkpointing():
    @register_position_embedding("test_learned_rotation")
    class LearnedRotation(PositionEmbedding):
        """Queries are scaled by a learned power of the position."""

        kind = "absolute"

        def __init__(self, config):
            super().__init__(config)
            self.power = torch.nn.Parameter(torch.tensor([0.3]))

        def reset_parameters(self):
            torch.nn.init.constant_(self.power, 0.3)

        def rotation(self, positions, dtype):
            return {"factor": ((positions + 1).float() ** self.power)[:, None, :, None].to(dtype)}

        @staticmethod
        def rotate(query, key, rotation):
            return query * rotation["factor"], key

    try:
        model, tokens, found = make_model("test_learned_rotation").train(), make_tokens(2, 9), []
        for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
            if options:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            found.append(model.model.position_embeddings["test_learned_rotation"].power.grad.clone())
        assert found[0].abs() > 1e-4
        torch.testing.assert_close(found[1], found[0])
        torch.testing.assert_close(found[2], found[0])
    finally:
        del POSITION_EMBEDDINGS["test_learned_rotation"]


def test_every_hook_is_for_shared_schemes_or_for_those_of_a_layer_or_for_both():
    both = set(HOOKS) - SHARED_HOOKS - LAYER_HOOKS
    assert both == {"distance_bias", "dense_bias"} and not SHARED_HOOKS & LAYER_HOOKS
    public = {name for name in vars(PositionEmbedding) if not name.startswith("_") and name != "hooks"}
    methods = {name for name in public if callable(getattr(PositionEmbedding, name))}
    assert methods == {*HOOKS, "configure", "reset_parameters", "forward"} and len(public - methods) <= 6


@pytest.mark.parametrize("scheme", POSITION_EMBEDDINGS)
def test_hooks_are_those_that_a_class_overrides(scheme):
    cls = POSITION_EMBEDDINGS[scheme]
    assert cls.hooks == {name for name in HOOKS if getattr(cls, name) is not getattr(PositionEmbedding, name)}
    assert bool(cls.hooks) == (scheme != "none") == (cls.kind != "none")


def test_a_class_without_hooks_is_not_registered():
    class Nothing(PositionEmbedding):
        """Helpers and parameters, and no hook."""

        def slopes(self):
            return torch.ones(4)

    with pytest.raises(TypeError, match="position scheme 'nothing' would act as 'none': it must override one of"):
        register_position_embedding("nothing")(Nothing)
    with pytest.raises(TypeError, match="position scheme 'nothing' must be a subclass of PositionEmbedding"):
        register_position_embedding("nothing")(torch.nn.Linear)
    with pytest.raises(ValueError, match="position embedding name 'alibi' is taken by AlibiBias: choose another"):
        register_position_embedding("alibi")(POSITION_EMBEDDINGS["t5"])
    assert "nothing" not in POSITION_EMBEDDINGS


def test_an_unknown_scheme_names_the_nearest():
    with pytest.raises(
        ValueError, match=r"^`pos_embedding_type` .* 'linear_cbp'. Did you mean 'linear_cpb'\? It must be one of "
    ):
        RelPosConfig(pos_embedding_type="linear_cbp")


@pytest.mark.parametrize(
    ("scheme", "has_table"),
    [
        ("alibi", True),
        ("alibi/cope", True),
        ("cope/dape", False),
        ("alibi+cope", False),
        ("fire/none", True),
        ("fox", False),
    ],
)
def test_in_mixes_the_config_says_what_the_layers_say(scheme, has_table, monkeypatch):
    told = []
    monkeypatch.setattr(attention_planner.logger, "warning_once", told.append)
    model, tokens = make_model(scheme), make_tokens(1, 16)
    groups = [layer.self_attn.group for layer in model.model.layers]
    assert model.config.has_distance_table == any(group.has_distance_table for group in groups) == has_table
    assert model.config.has_position_bias == any(group.has_bias for group in groups)
    model(tokens, position_ids=torch.arange(16)[None] * 3)
    assert bool(told) == has_table, "a warning of the dense bias"
    assert (bias_curves(model, 8) is not None) == has_table


def test_a_group_is_told_by_its_schemes_and_its_window():
    assert LayerGroup(("alibi",), None) == LayerGroup(("alibi",), None) != LayerGroup(("alibi",), 4)
    assert LayerGroup(("alibi", "fox"), None).hooks == {"distance_bias", "key_bias"}


def of_config(**members):
    """→ a scheme with what `make` adds to an instance."""
    make = members.pop("make")

    def __init__(self, config):
        super(cls, self).__init__(config)
        make(self)

    bias = {"distance_bias": lambda self, distance: -distance.float().expand(6, -1)}
    cls = type("Own", (PositionEmbedding,), {"__init__": __init__, **bias, **members})
    return cls


class Part(torch.nn.Module):
    """Of a scheme: parameters that nobody else initialises."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda self: self.register_buffer("m", torch.ones(6)), "the buffer `m` would not come back from"),
        (lambda self: self.register_buffer("m", torch.ones(6), persistent=False), "the buffer `m` would not"),
        (lambda self: setattr(self, "part", torch.nn.BatchNorm1d(3)), "the buffer `part.running_mean` would not"),
        (lambda self: setattr(self, "slopes", torch.ones(6)), "the tensor `slopes` would not come back"),
        (lambda self: setattr(self, "kept", {"a": [torch.ones(6)]}), "the tensor `kept` would not come back"),
        (
            lambda self: setattr(self, "a", torch.nn.Parameter(torch.empty(6))),
            "`reset_parameters` must initialise the parameter `a`",
        ),
        (
            lambda self: setattr(self, "a", torch.nn.ParameterList([torch.nn.Parameter(torch.empty(6))])),
            "`reset_parameters` must initialise the parameter `a.0`",
        ),
        (lambda self: setattr(self, "part", Part()), "`reset_parameters` must initialise the parameter `part.weight`"),
    ],
)
def test_what_would_not_come_back_is_refused_where_a_model_is_built(make, message):
    register_position_embedding("own")(of_config(make=make))
    try:
        with pytest.raises(ValueError) as refused:
            make_model("own")
    finally:
        del POSITION_EMBEDDINGS["own"]
    assert str(refused.value).startswith(f"position embedding 'own': {message}")


def test_layers_of_torch_and_numbers_of_python_are_no_fault():
    def make(self):
        self.line, self.table, self.none = torch.nn.Linear(1, 6), torch.nn.Embedding(9, 6), None
        self.slopes, self.names = [0.5] * 6, {"a": (1, 2)}

    register_position_embedding("own")(of_config(make=make))
    try:
        assert make_model("own").model.position_embeddings["own"].slopes == [0.5] * 6
    finally:
        del POSITION_EMBEDDINGS["own"]


@pytest.mark.parametrize(
    ("hooks", "kind"),
    [
        (["embed"], "absolute"),
        (["embed", "dense_bias"], "absolute"),
        (["distance_bias"], "relative"),
        (["key_bias"], "relative"),
        (["rotation", "rotate"], "`rotate` may be of either kind."),
        (["dense_bias"], "`dense_bias` may be of either kind."),
        (["score_bias"], "`score_bias` may be of either kind."),
    ],
)
@pytest.mark.parametrize("said", [{}, {"kind": "none"}], ids=["forgotten", "none"])
def test_the_kind_follows_from_the_hooks_or_must_be_said(hooks, kind, said):
    fields = {"shared_across_layers": hooks[0] not in ("key_bias", "score_bias"), **dict.fromkeys(hooks, hook), **said}
    if kind in ("absolute", "relative"):
        assert type("Own", (PositionEmbedding,), fields).kind == kind
    else:
        with pytest.raises(TypeError) as refused:
            type("Own", (PositionEmbedding,), fields)
        assert str(refused.value).startswith("position scheme 'Own': `kind` must be 'relative' (it depends on dist")
        assert str(refused.value).endswith(kind)


def test_a_class_that_is_defined_again_takes_its_place(caplog):
    def define(name="Again", factor=1):
        return type(name, (PositionEmbedding,), {"distance_bias": lambda self, d: -factor * d.float().expand(6, -1)})

    try:
        register_position_embedding("again")(define())
        first, tokens = make_model("again"), make_tokens(1, 9)
        before = first(tokens).logits
        with caplog.at_level("WARNING", logger="transformers"):
            for factor in (2, 3):
                register_position_embedding("again")(define(factor=factor))
        assert caplog.text.count("'again' is defined again: new models have the new class") == 1
        assert not torch.equal(make_model("again")(tokens).logits, before)
        assert torch.equal(first(tokens).logits, before)
        with pytest.raises(ValueError, match="^position embedding name 'again' is taken by Again: choose another.$"):
            register_position_embedding("again")(define("Other"))
    finally:
        POSITION_EMBEDDINGS.pop("again", None)


@pytest.mark.parametrize("name", ["", "a+b", "a/b", "a b", "a\n", " a", 3, None])
def test_a_name_that_is_no_word_is_refused(name):
    with pytest.raises(ValueError, match="^position embedding name must be a word without '\\+' and '/', got "):
        register_position_embedding(name)(of_config(make=lambda self: None))
