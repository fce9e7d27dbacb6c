"""The checks of a scheme: each finds what it is for, and all schemes of the family pass."""

import functools
import sys

import pytest
import torch
from conftest import MIXES, SCHEMES, save_with_tokenizer
from torch import nn

from hf_relpos import PositionEmbedding, RelPosConfig, check_position_embedding, register_position_embedding
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS
from hf_relpos.scheme_check import CHECKS, QUICK, Subject


class Bias(PositionEmbedding):
    """A bias that is as it should be, from a parameter."""

    kind = "relative"

    def __init__(self, config):
        super().__init__(config)
        self.slope = nn.Parameter(torch.ones(config.num_attention_heads))

    def reset_parameters(self):
        nn.init.ones_(self.slope)

    def distance_bias(self, distance):
        return -self.slope.float()[:, None] * distance.float().sqrt()


class Next(PositionEmbedding):
    """Sees the token that it shall predict."""

    def embed(self, inputs_embeds, positions):
        return inputs_embeds + inputs_embeds.roll(-1, 1)


class Next5(Next):
    """Sees a later one, in training alone, and hardly."""

    def embed(self, inputs_embeds, positions):
        return inputs_embeds + 1e-6 * inputs_embeds.roll(-5, 1) * self.training


class Mean(Next):
    def embed(self, inputs_embeds, positions):
        return inputs_embeds + 0.1 * inputs_embeds.mean(1, keepdim=True)


class LastKey(PositionEmbedding):
    """Depends on how many tokens there are."""

    kind = "relative"

    def dense_bias(self, positions):
        last = positions.key.amax(-1)[:, None, None] + 1.0
        wave = (last * positions.key[:, None, :]).sin()[:, None]
        return wave.expand(-1, self.num_table_heads, positions.query.shape[1], -1)


class Slots(PositionEmbedding):
    """A bias by the slot of a key, padding among them."""

    kind = "absolute"

    def dense_bias(self, positions):
        size = positions.query.shape[1], positions.key.shape[1]
        return torch.arange(size[1]).float().sin().expand(1, self.num_table_heads, *size)


class Turn(PositionEmbedding):
    """A rotation without a dimension for the heads: a batch of H rows is taken for it."""

    kind = "relative"

    def rotation(self, positions, dtype):
        angle = positions[..., None].float() * torch.linspace(0.1, 1, 4)
        return angle.cos(), angle.sin()

    @staticmethod
    def rotate(query, key, rotation):
        cos, sin = rotation

        def turn(x):
            first, second = x.chunk(2, -1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

        return turn(query), turn(key)


class Rows(Next):
    """A row sees the others."""

    def embed(self, inputs_embeds, positions):
        return inputs_embeds + inputs_embeds.mean(0, keepdim=True)


class Places(Next):
    """By the place in the call: other in a step with a cache."""

    def embed(self, inputs_embeds, positions):
        return inputs_embeds + torch.arange(inputs_embeds.shape[1])[:, None].float().cos()


class Doubled(Bias):
    """What a kernel without gradients for tables would not see."""

    def distance_bias(self, distance):
        return super().distance_bias(distance).detach()


class Absolute(PositionEmbedding):
    """Called relative, and is not."""

    kind = "relative"

    def dense_bias(self, positions):
        wave = (positions.query[:, :, None] * positions.key[:, None] / 50.0).sin()[:, None]
        return wave.expand(-1, self.num_table_heads, -1, -1)


class Short(Bias):
    """Infinite past the training length."""

    def distance_bias(self, distance):
        return super().distance_bias(distance) - 1 / (distance < 100).float() + 1


class Endless(Bias):
    def distance_bias(self, distance):
        return super().distance_bias(distance) + (torch.nan if len(distance) > 2000 else 0)


class Coarse(Bias):
    """Positions in bf16, of 8 bits."""

    def distance_bias(self, distance):
        exact = 2000 + distance.to(self.slope.dtype)
        return (super().distance_bias(distance) + (exact.float() - 2000 - distance.float())).float()


class Forgotten(Bias):
    """`reset_parameters` leaves one out."""

    def __init__(self, config):
        super().__init__(config)
        self.offset = nn.Parameter(torch.empty(config.num_attention_heads))

    def distance_bias(self, distance):
        return super().distance_bias(distance) + self.offset[:, None]


class Drawn(Bias):
    """A number that a saved model does not hold."""

    def __init__(self, config):
        super().__init__(config)
        self.factor = next(NUMBERS)

    def distance_bias(self, distance):
        return super().distance_bias(distance) * self.factor


class Lazy(Bias):
    """Keeps the bias of the first forward."""

    table = None

    def distance_bias(self, distance):
        if self.table is None:
            self.table = super().distance_bias(torch.arange(4096))
        return self.table[:, distance]


class FourHeads(Bias):
    def distance_bias(self, distance):
        return super().distance_bias(distance) * torch.linspace(1, 2, 4)[:, None]


class Idle(PositionEmbedding):
    def distance_bias(self, distance):
        return torch.zeros(self.num_table_heads, len(distance))


class Counts(Bias):
    """Another bias at each call."""

    calls = 0

    def distance_bias(self, distance):
        self.calls += 1
        return super().distance_bias(distance) * self.calls


NUMBERS = iter(range(1, 1000))
WRONG = {
    Lazy: ("gradients", "`distance_bias`"),
    FourHeads: ("sizes", "`distance_bias`"),
    Idle: ("effect", "`distance_bias`"),
    Counts: ("causality", "`distance_bias`"),
    Next: ("causality", "`embed`"),
    Next5: ("causality", "`embed`"),
    Mean: ("causality", "`embed`"),
    LastKey: ("causality", "`dense_bias`"),
    Slots: ("left padding", "`dense_bias`"),
    Turn: ("left padding", "`rotation` or `rotate`"),
    Rows: ("batch", "`embed`"),
    Places: ("cached steps", "`embed`"),
    Doubled: ("gradients", "`distance_bias`"),
    Absolute: ("shift", "`dense_bias`"),
    Short: ("length", "`distance_bias`"),
    Endless: ("length", "`distance_bias`"),
    Coarse: ("bf16", "`distance_bias`"),
    Forgotten: ("start", "the class"),
    Drawn: ("saving", "`distance_bias`"),
}


@pytest.fixture(autouse=True)
def registry():
    """What a test registers is gone after it."""
    schemes = dict(POSITION_EMBEDDINGS)
    yield
    POSITION_EMBEDDINGS.clear()
    POSITION_EMBEDDINGS.update(schemes)


@pytest.mark.parametrize("scheme", [*SCHEMES, "own"])
def test_what_is_right_passes(scheme):
    register_position_embedding("own")(Bias)
    fields = {} if scheme not in MIXES or MIXES[scheme][0] is None else {"sliding_window": None}
    state = torch.get_rng_state()
    report = check_position_embedding(scheme, **fields)
    assert report.passed and report.refusal is None, report
    assert [finding.check for finding in report.findings] == [*CHECKS]
    assert torch.equal(torch.get_rng_state(), state) and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("cls", WRONG, ids=lambda cls: cls.__name__)
def test_each_check_finds_what_it_is_for(cls):
    check, hook = WRONG[cls]
    register_position_embedding("wrong")(cls)
    (finding,) = check_position_embedding("wrong", only=[check]).findings
    assert not finding.passed, finding
    refusal = check_position_embedding("wrong", only=[check]).refusal
    assert refusal.startswith(f"position embedding 'wrong': the check {check!r} refuses {hook}: ")
    assert "\n" not in refusal


def test_heads_that_share_a_key_are_tried():
    """A rotation with the heads of the queries, where the keys have fewer."""

    class PerHead(Turn):
        def rotation(self, positions, dtype):
            angle = positions[:, None, :, None] * torch.linspace(0.1, 1, self.size)
            return tuple(x.expand(-1, self.num_table_heads, -1, -1) for x in (angle.cos(), angle.sin()))

        def __init__(self, config):
            super().__init__(config)
            self.size = config.head_dim // 2

    register_position_embedding("wrong")(PerHead)
    report = check_position_embedding("wrong", only=["batch", "eager and sdpa", "sizes"])
    assert [finding.passed for finding in report.findings] == [True, True, False]
    assert report.findings[2].text.startswith("6 heads of 16 channels that share 3 keys: The size of tensor")


def test_eager_and_sdpa_are_compared(monkeypatch):
    class Fused(Bias):
        """Knows which attention it is for."""

        def __init__(self, config):
            super().__init__(config)
            self.power = 1 + (config._attn_implementation == "sdpa")

        def distance_bias(self, distance):
            return super().distance_bias(distance) * self.power

    register_position_embedding("wrong")(Fused)
    assert not check_position_embedding("wrong", only=["eager and sdpa"]).passed


def test_a_refusal_says_what_is_the_matter():
    def text(cls, check):
        register_position_embedding("wrong")(cls)
        (finding,) = check_position_embedding("wrong", only=[check]).findings
        del POSITION_EMBEDDINGS["wrong"]
        return finding.text

    assert text(Lazy, "gradients").endswith(
        "; the scheme keeps `table` from one forward to the next: compute it anew in each"
    )
    assert text(Counts, "causality").startswith("two equal calls give logits that differ by ")

    class Dead(Bias):
        def reset_parameters(self):
            nn.init.zeros_(self.slope)

        def distance_bias(self, distance):
            return self.slope.float().clamp(max=-9.0)[:, None] * distance.float()

    assert (
        text(Dead, "gradients")
        == "no gradient reaches the parameter 'wrong.slope', drawn at random since it starts at 0"
    )

    class Cancels(Turn):
        def rotation(self, positions, dtype):
            return True

        @staticmethod
        def rotate(query, key, rotation):
            return query, key - key.mean(2, keepdim=True)

    assert text(Cancels, "causality").endswith("or computes with it what cancels: steps with a cache cannot")


def test_what_a_class_holds_in_vain_is_noted():
    class Own(Bias):
        def __init__(self, config, base=2.0):
            super().__init__(config)

        def bias_score(self, scores):
            return scores

        def used(self):
            return 1.0

        @staticmethod
        @functools.cache
        def used_again(number):
            return 1.0

        @property
        def factor(self):
            return self.used() * self.used_again(0)

        def distance_bias(self, distance):
            return -self.slope[:1, None].float().expand(self.num_table_heads, 1) * distance.float() * self.factor

    register_position_embedding("own")(Own)
    report = check_position_embedding("own", only=["gradients"])
    assert report.passed and report.findings[0].text.endswith("; of 'own.slope' 3 of 4 heads get none")
    assert [note.partition(",")[0] for note in report.notes[:2]] == [
        "`bias_score` is no hook",
        "`base` of `__init__` cannot be given as an option: it needs an entry in `defaults`.",
    ]
    assert not check_position_embedding("linear_cpb+kerple_log", only=["start"]).notes


def test_a_check_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="`only` must name some of .*'left padding'.*, got 'padding'"):
        check_position_embedding("alibi", only=["start", "padding"])
    assert [finding.check for finding in check_position_embedding("alibi", only="start").findings] == ["start"]


def test_packing_is_compared():
    class Row(Bias):
        """By the distance from the first token of the row, not of the document."""

        dense_bias = Slots.dense_bias
        distance_bias = PositionEmbedding.distance_bias

    register_position_embedding("wrong")(Row)
    assert not check_position_embedding("wrong", only=["packing"]).passed


@pytest.mark.parametrize(
    ("hook", "value", "wrong"),
    [
        ("distance_bias", "torch.zeros(40, 4)", "(heads, distances) = (4, 40), got (40, 4)"),
        ("distance_bias", "torch.zeros(1, 40)", "(heads, distances) = (4, 40), got (1, 40)"),
        ("distance_bias", "torch.zeros(4, 40).int()", "torch.float32, got torch.int32"),
        ("distance_bias", "torch.zeros(4, 40).half()", "torch.float32, got torch.float16"),
        ("distance_bias", "None", "(heads, distances) = (4, 40), got NoneType"),
        ("dense_bias", "torch.zeros(1, 40, 40, 4)", "(batch or 1, heads, queries, keys) = (1, 4, 40, 40), got (1, 40,"),
        ("dense_bias", "torch.zeros(1, 1, 40, 40)", "(batch or 1, heads, queries, keys) = (1, 4, 40, 40), got (1, 1,"),
        ("embed", "args[0][:, :-1]", "(batch, queries, channels) = (1, 40, 32), got (1, 39, 32)"),
        ("embed", "args[0].double()", "torch.float32 as it was given, got torch.float64"),
        ("key_bias", "torch.zeros(1, 40, 4)", "(batch, heads, queries) = (1, 4, 40), got (1, 40, 4)"),
        ("score_bias", "(args[0], args[0])", "(batch or 1, heads, queries, keys) = (1, 4, 40, 40), got tuple"),
    ],
)
def test_what_a_hook_returns_is_looked_at(hook, value, wrong):
    fields = {"kind": "relative", "shared_across_layers": hook not in ("key_bias", "score_bias")}
    cls = type("Wrong", (PositionEmbedding,), {**fields, hook: lambda self, *args: eval(value)})
    register_position_embedding("wrong")(cls)
    model = Subject("wrong", {}).model()
    with pytest.raises(ValueError) as refused:
        model(torch.arange(2, 42)[None])
    assert str(refused.value).startswith(f"position embedding 'wrong': `{hook}` must return {wrong}")


@pytest.mark.parametrize(("number", "said"), [(torch.nan, "nan"), (-torch.inf, "-inf")])
def test_a_table_that_is_not_finite_is_named(number, said):
    class Wrong(Bias):
        def distance_bias(self, distance):
            return torch.where(distance == 7, number, super().distance_bias(distance))

    register_position_embedding("wrong")(Wrong)
    model = Subject("alibi+wrong", {}).model()
    expected = f"position embedding 'wrong': `distance_bias` must be finite, got {said} at distance 7."
    with pytest.raises(ValueError) as refused:
        model(torch.arange(2, 42)[None])
    assert str(refused.value) == expected


def test_a_hook_that_fails_is_named():
    class Eight(Bias):
        def distance_bias(self, distance):
            return self.slope[:, None] * torch.zeros(8)[distance]

    register_position_embedding("wrong")(Eight)
    refusal = check_position_embedding("wrong").refusal
    assert "refuses `distance_bias`: IndexError: " in refusal
    lines = str(check_position_embedding("wrong")).splitlines()
    assert sum("IndexError" in line for line in lines) < 4 and any(line.endswith(" as 'causality'") for line in lines)


def test_what_cannot_be_built_is_told_once():
    class Buffer(Bias):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("constants", torch.ones(4), persistent=False)

    register_position_embedding("wrong")(Buffer)
    report = check_position_embedding("wrong")
    assert len(report.findings) == 1
    assert report.refusal.startswith(
        "position embedding 'wrong': the check 'start' refuses the class: the buffer `constants` would not come back"
    )


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        (None, "'own' has no docstring: the card of a model will say nothing of it"),
        ("A title.", "lacks an equation, `Parameters: `, `Past the training length: `, `Paper: `"),
        ("A title.\n\nb = 0\n\nParameters: none. Past the training length: 0.", "lacks `Paper: `"),
        ("A title.\n\nb = 0\n\nParameters per layer: 1. Past the training length: 0. Source: me.", None),
    ],
)
def test_a_card_that_will_be_empty_is_told(text, lacks):
    register_position_embedding("own")(type("Own", (Bias,), {"__doc__": text}))
    report = check_position_embedding("own", only=["start"])
    notes = [note for note in report.notes if "is not saved" not in note]
    assert report.passed and [lacks in note for note in notes] == ([True] if lacks else [])
    assert (f"note     {lacks}" if text is None else str(lacks)) in f"{report}None"


FILE = """
from hf_relpos import PositionEmbedding, register_position_embedding

@register_position_embedding({name!r})
class Own(PositionEmbedding):
    {code}
"""
LEAK = """def embed(self, inputs_embeds, positions):
        return inputs_embeds + inputs_embeds.roll(-1, 1)"""
GOOD = """def embed(self, inputs_embeds, positions):
        return inputs_embeds + positions[..., None].sin().to(inputs_embeds.dtype)"""


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """→ a function that writes a scheme to a file and calls a sub-command: exit code, stdout, stderr."""
    from hf_relpos.cli import main
    from hf_relpos.scheme_files import _IMPORTED

    monkeypatch.chdir(tmp_path)
    imported, modules = dict(_IMPORTED), set(sys.modules)

    def call(name: str, code: str, *words: str):
        (tmp_path / f"{name}.py").write_text(FILE.format(name=name, code=code))
        monkeypatch.setattr(sys, "argv", ["hf-relpos", *words])
        try:
            main()
            status = 0
        except SystemExit as exit:
            status = exit.code
        return status, *capfd.readouterr()

    yield call
    _IMPORTED.clear()
    _IMPORTED.update(imported)
    for name in {"leaking", "honest"} & (sys.modules.keys() - modules):
        del sys.modules[name]


def test_the_command_prints_a_table_and_refuses(run):
    status, out, error = run("leaking", LEAK, "check", "leaking.py")
    assert status == 2 and "\nrefused  causality" in out and "\nok       batch" in out and "\nnote     " in out
    (line,) = [line for line in error.splitlines() if "error" in line]
    assert line.startswith(
        "hf-relpos check: error: position embedding 'leaking': the check 'causality' refuses `embed`: "
    )


def test_the_command_goes_on_with_what_passes(run):
    status, out, error = run("honest", GOOD, "check", "honest.py")
    assert status == 0 and "refused" not in out
    assert "next: hf-relpos train --pos_embedding_type honest" in error and "honest.py" in error
    status, out, error = run("honest", GOOD, "schemes", "--import_file", "honest.py")
    assert "next: hf-relpos train --pos_embedding_type honest" in error
    status, out, error = run("honest", GOOD, "check", "alibi", "--pos_embedding_kwargs", '{"x": 1}')
    assert status == 2 and "`pos_embedding_kwargs` of 'alibi' may hold [], got 'x'" in error
    status, out, error = run("honest", GOOD, "check", "alibi", "rotary+log_cpb")
    assert status == 0 and out.startswith("alibi\n") and "\nrotary+log_cpb\n" in out


@pytest.mark.parametrize("name", ["train", "finetune", "sweep", "compare"])
def test_no_training_begins_with_a_scheme_that_sees_the_future(name, run, tmp_path):
    flags = {
        "train": ["--pos_embedding_type", "leaking", "--train_file", "missing.txt", "--output_dir", "out"],
        "finetune": ["--model_name_or_path", "saved", "--pos_embedding_type", "leaking", "--output_dir", "out"],
        "sweep": ["--experiment", "experiment.yaml", "--output_dir", "out"],
        "compare": ["--text", "text.txt", "--schemes", "leaking", "alibi", "--output_dir", "out"],
    }[name]
    if name == "finetune":
        save_with_tokenizer(tmp_path / "saved", "alibi")
        flags += ["--train_file", "missing.txt", "--block_size", "16"]
    train = "train: {max_steps: 1}\ngrid: {pos_embedding_type: [leaking]}\nevaluate: {eval_lengths: [16]}\n"
    (tmp_path / "experiment.yaml").write_text(train)
    (tmp_path / "text.txt").write_text("too short\n")
    status, out, error = run("leaking", LEAK, name, "--import_file", "leaking.py", *flags)
    assert status == 2 and "position embedding 'leaking': the check 'causality' refuses `embed`: " in error
    assert not (tmp_path / "out").exists() or not [*(tmp_path / "out").rglob("*.safetensors")]


def test_the_quick_checks_run_once_in_a_process(run, monkeypatch):
    from hf_relpos import scheme_check

    run("honest", GOOD, "schemes", "--import_file", "honest.py")
    called, check = [], scheme_check.check_position_embedding
    monkeypatch.setattr(
        scheme_check, "check_position_embedding", lambda *args, **kwargs: called.append(args) or check(*args, **kwargs)
    )
    for scheme in ("honest", "honest", "honest+alibi", "alibi"):
        scheme_check.check_imported(RelPosConfig(pos_embedding_type=scheme))
    assert called == [("honest", QUICK)]


SIZED = """kind, defaults = "relative", {"width": 3}

    def __init__(self, config, width):
        super().__init__(config)
        self.length, self.num_heads = config.train_length, config.num_attention_heads
        if width > 1 and config.hidden_size != 52:
            raise ValueError("other sizes")

    def distance_bias(self, distance):
        assert len(distance) <= self.length
        return -distance.float().expand(self.num_heads, -1)"""


def test_a_scheme_for_the_sizes_of_its_model_is_not_refused(run):
    from hf_relpos.scheme_check import check_imported

    run("honest", SIZED, "schemes", "--import_file", "honest.py")
    fields = dict(pos_embedding_type="honest", num_attention_heads=13, train_length=16)
    check_imported(RelPosConfig(**fields, hidden_size=52, pos_embedding_kwargs={"width": 2}))
    check_imported(RelPosConfig(**fields, hidden_size=104, pos_embedding_kwargs={"width": 1}))
    with pytest.raises(ValueError, match="^other sizes$"):
        check_imported(RelPosConfig(**fields, hidden_size=104))


def test_what_cannot_be_built_is_refused_before_the_corpus_is_read(run):
    code = (
        GOOD
        + """

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("constants", __import__("torch").ones(4))"""
    )
    flags = ["--pos_embedding_type", "honest", "--train_file", "missing.txt", "--output_dir", "out"]
    status, out, error = run("honest", code, "train", "--import_file", "honest.py", *flags)
    assert status == 2 and "position embedding 'honest': the buffer `constants` would not come back" in error
