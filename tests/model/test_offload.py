"""Models whose parameters accelerate keeps on the CPU or on disk and loads for each `forward`: their results are those
of the model in memory, for every scheme and for those of users."""

import copy
from dataclasses import fields

import pytest
import torch
from conftest import SCHEMES, make_model, make_tokens
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.accelerate import infer_auto_device_map

from hf_relpos import PositionEmbedding, register_position_embedding
from hf_relpos.model.attention_planner import plan_layers
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS
from hf_relpos.model.token_positions import locate_tokens


accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")
TOKENS = make_tokens(2, 15)  # past the threshold of fire
MASK = torch.ones_like(TOKENS).index_put((torch.tensor(1), torch.arange(4)), torch.tensor(0))


class Own(PositionEmbedding):
    """Reads its parameters in all ways: its own, those of modules that it calls, that it never calls, and both."""

    kind = "relative"

    def __init__(self, config):
        super().__init__(config)
        num_heads = config.num_attention_heads
        self.scale = nn.Parameter(torch.full((num_heads,), 0.3))
        self.table = nn.Embedding(160, num_heads)
        self.more = nn.ParameterList([nn.Parameter(torch.ones(num_heads))])
        self.line = nn.Linear(1, num_heads)
        self.nothing = None

    def reset_parameters(self):
        nn.init.constant_(self.scale, 0.3)
        nn.init.ones_(self.more[0])

    def distance_bias(self, distance):
        line = self.line(distance[:, None].float() / 10) + self.line.bias
        return self.scale[:, None] * self.table.weight[distance].T + self.more[0][:, None] * line.T


class OwnOfLayer(Own):
    shared_across_layers = False


class OwnRotation(PositionEmbedding):
    """Reads a parameter in each layer."""

    kind = "relative"

    def __init__(self, config):
        super().__init__(config)
        self.factor = nn.Parameter(torch.ones(1))

    def reset_parameters(self):
        nn.init.ones_(self.factor)

    def rotation(self, positions, dtype):
        return positions.to(dtype)[:, None, :, None] * self.factor

    def rotate(self, query, key, rotation):
        return query * (1 + self.factor * rotation), key


OWN = {"own": Own, "own_of_layer": OwnOfLayer, "own_rotation": OwnRotation}
ALL = [*SCHEMES, *OWN, "own+own_of_layer", "own/alibi"]


@pytest.fixture(autouse=True, scope="module")
def own_schemes():
    for name, cls in OWN.items():
        register_position_embedding(name)(cls)
    yield
    for name in OWN:
        del POSITION_EMBEDDINGS[name]


def num_bytes(model) -> int:
    return sum(4 * parameter.numel() for parameter in model.parameters())


def offload(kind: str, model, folder):
    if kind == "cpu_offload":
        return accelerate.cpu_offload(copy.deepcopy(model), CPU)
    if kind == "disk_offload":
        return accelerate.disk_offload(copy.deepcopy(model), folder, CPU)
    model.save_pretrained(folder / "model")
    limits = {"cpu": int(float(kind.removeprefix("auto ")) * num_bytes(model))}
    given = {"device_map": "auto", "max_memory": limits, "offload_folder": folder / "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(folder / "model", **given)
    assert "disk" in offloaded.hf_device_map.values()
    return offloaded


def results(model):
    """The whole row, padding, and generation from a cache: mask, table, row and dense plans."""
    given = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    return [
        model(TOKENS).logits,
        model(TOKENS, attention_mask=MASK).logits[1, 4:],
        model.generate(TOKENS[:, :5], **given),
        model.generate(TOKENS[:, :5], attention_mask=MASK[:, :5], **given),
    ]


@pytest.mark.parametrize(
    "kind, scheme",
    [(kind, scheme) for kind in ("cpu_offload", "disk_offload", "auto 0.3") for scheme in ALL]
    + [("auto 0.7", scheme) for scheme in ("linear_cpb", "rotary", "fire", "fox", "own+own_of_layer")],
)
def test_offloaded_models_give_what_models_in_memory_give(kind, scheme, tmp_path):
    model = make_model(scheme)
    expected, path = results(model), model.attention_path()
    offloaded = offload(kind, model, tmp_path).eval()
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    for found, wanted in zip(results(offloaded), expected):
        torch.testing.assert_close(found, wanted)
    assert all(p.is_meta for p in offloaded.parameters()) or "auto" in kind  # put away again
    assert offloaded.attention_path() == path
    try:
        bias = model.model.distance_bias(9)
    except ValueError:
        return
    torch.testing.assert_close(offloaded.model.distance_bias(9), bias)


@pytest.mark.parametrize("infer", [accelerate.infer_auto_device_map, infer_auto_device_map], ids=["accelerate", "hf"])
@pytest.mark.parametrize("scheme", ALL)
def test_a_map_of_devices_ends_between_modules_that_can_be_apart(scheme, infer):
    model = make_model(scheme)
    names = dict(model.named_modules())
    for limit in range(0, num_bytes(model), num_bytes(model) // 100):
        found = infer(model, max_memory={"cpu": limit}, no_split_module_classes=model._no_split_modules)
        for name in found:
            assert name in names, name  # no parameter without its module
            assert not name.startswith("model.layers.") or name.count(".") == 2


@pytest.mark.parametrize("scheme", ["rotary", "alibi", "t5", "fire", "fox", "rotary/none"])
def test_a_plan_moves_with_all_its_tensors(scheme):
    """As accelerate moves it to a layer on another device."""
    model = make_model(scheme).model
    packed = torch.arange(15).remainder(8)[None].expand(2, -1)
    for given in ({}, {"attention_mask": MASK}, {"position_ids": packed}):
        embeds = model.embed_tokens(TOKENS)
        groups = [layer.self_attn.group for layer in model.layers]
        mask, position_ids = given.get("attention_mask"), given.get("position_ids")
        tokens = locate_tokens(model.config, embeds, mask, position_ids, None, groups, model.training)
        for plan in plan_layers(model, groups, tokens, embeds).values():
            moved = plan.to("meta", non_blocking=True)
            assert type(moved) is type(plan) and moved.schemes is plan.schemes
            tensors = list(tensors_of(moved))
            assert len(tensors) == len(list(tensors_of(plan))) and all(x.is_meta for x in tensors)
            assert getattr(moved, "device", torch.device("meta")).type == "meta"


def tensors_of(value):
    """→ the tensors in an object and in the objects that it holds, modules aside."""
    if isinstance(value, torch.Tensor):
        yield value
    elif hasattr(value, "__dataclass_fields__"):
        for item in fields(value):
            yield from tensors_of(getattr(value, item.name))


def test_a_scheme_may_not_hide_how_it_is_called():
    with pytest.raises(TypeError, match="'Hiding': `forward` is how the hooks of a scheme are called: give the method"):

        class Hiding(PositionEmbedding):
            def forward(self, distance):
                return distance
