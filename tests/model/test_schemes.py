"""Each scheme against its formula in float64, written here a second time, and against transformers' own code."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import COMBINATIONS, SCHEMES, make_config, make_model, make_tokens
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from hf_relpos import (
    PositionEmbedding,
    RelPosConfig,
    RelPosForCausalLM,
    RelPosModel,
    list_position_embeddings,
    register_position_embedding,
)
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS


# --- the formulas, one number at a time


def sinusoid(position: int, hidden_size: int) -> np.ndarray:
    vector = np.zeros(hidden_size)
    for k in range(hidden_size // 2):
        angle = position * 10000 ** (-2 * k / hidden_size)
        vector[2 * k], vector[2 * k + 1] = math.sin(angle), math.cos(angle)
    return vector


def mlp(features: list[float], state: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    hidden, index = np.array(features, dtype=np.float64), 0
    while f"{prefix}.mlp.{index}.weight" in state:
        hidden = np.maximum(hidden, 0) if index else hidden
        hidden = state[f"{prefix}.mlp.{index}.weight"] @ hidden + state.get(f"{prefix}.mlp.{index}.bias", 0.0)
        index += 1
    return hidden


def alibi_slopes(num_heads: int) -> list[float]:
    """The recursion of the paper's reference code."""
    if math.log2(num_heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(num_heads) - 3)))
        return [start * start**index for index in range(num_heads)]
    power = 2 ** math.floor(math.log2(num_heads))
    return alibi_slopes(power) + alibi_slopes(2 * power)[0::2][: num_heads - power]


def turned(vector: np.ndarray, position: int, factor: float, theta: float) -> np.ndarray:
    """Rotation as a product of complex numbers, channel k with channel k + R/2."""
    size = int(len(vector) * factor)
    half = size // 2
    numbers = vector[:half] + 1j * vector[half:size]
    numbers = numbers * np.exp(1j * position * np.array([theta ** (-2 * k / size) for k in range(half)]))
    return np.concatenate([numbers.real, numbers.imag, vector[size:]])


BIAS_FEATURES = {
    "linear_cpb": lambda d: [d],
    "linear_cpb_large": lambda d: [d],
    "log_cpb": lambda d: [math.log(1 + d)],
    "fourier_cpb": lambda d: [f(d * 20000 ** (-k / 8)) for f in (math.sin, math.cos) for k in range(8)],
}


def t5_bucket(distance: int) -> int:
    return distance if distance < 16 else min(31, 16 + math.floor(math.log(distance / 16) / math.log(8) * 16 + 1e-9))


def sandwich(distance: int, num_heads: int) -> np.ndarray:
    total = sum(math.cos(distance * 10000 ** (-2 * k / 128)) for k in range(1, 65))
    return np.array([(total - 64) / (8 * h / num_heads) for h in range(1, num_heads + 1)])


# scheme → bias by distance, number of heads, and the parameters that all layers share
SHARED_BIASES = {
    "alibi": lambda d, heads, _: -np.array(alibi_slopes(heads)) * d,
    "t5": lambda d, heads, own: own["weight"][t5_bucket(d)],
    "kerple_log": lambda d, heads, own: -own["p"].clip(0.01) * np.log(1 + own["a"].clip(0.01) * d),
    "kerple_power": lambda d, heads, own: -own["a"].clip(0.01) * d ** own["p"].clip(0.01, 2),
    "sandwich": lambda d, heads, _: sandwich(d, heads),
}
BIASES = [*SHARED_BIASES, *BIAS_FEATURES]


def reference_bias(scheme: str, distance: int, state: dict[str, np.ndarray], layer: int, num_heads: int) -> np.ndarray:
    if scheme in SHARED_BIASES:
        prefix = f"model.position_embeddings.{scheme}."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        return SHARED_BIASES[scheme](distance, num_heads, own)
    prefix = f"model.layers.{layer}.self_attn.position_embeddings.{scheme}"
    return mlp(BIAS_FEATURES[scheme](distance), state, prefix)


def xpos_decay(distance: int, config: RelPosConfig) -> np.ndarray:
    """The factor of each channel's share of the score."""
    size = int(config.head_dim * config.rope_parameters["partial_rotary_factor"])
    zeta = np.array([(k + 0.2 * size) / (0.7 * size) for k in range(size // 2)])
    scale_base = config.pos_embedding_kwargs.get("scale_base", 512)
    return np.concatenate([zeta ** (distance / scale_base)] * 2 + [np.ones(config.head_dim - size)])


def fire_bias(i: int, j: int, state: dict[str, np.ndarray], layer: int, threshold: int) -> np.ndarray:
    own = {name.rpartition("fire.")[2]: value for name, value in state.items() if f"layers.{layer}.self_attn" in name}

    def psi(x):
        return math.log(abs(own["scale"].item()) * x + 1)

    x = psi(i - j) / (psi(max(i, abs(own["multiplier"].item()) * threshold)) + 1e-6)
    return own["out.weight"] @ np.maximum(own["hidden.weight"][:, 0] * x + own["hidden.bias"], 0)


def cope_bias(scores: np.ndarray, query: np.ndarray, table: np.ndarray) -> np.ndarray:
    """(H, i + 1) scores of one query, (H, D), (N, D) → (H, i + 1)."""
    bias = np.zeros_like(scores)
    for h, j in np.ndindex(*scores.shape):
        count = min(sum(1 / (1 + math.exp(-score)) for score in scores[h, j:]), len(table) - 1)
        below = int(count)
        above = min(below + 1, len(table) - 1)
        bias[h, j] = query[h] @ ((1 - count + below) * table[below] + (count - below) * table[above])
    return bias


def dape_bias(scores: np.ndarray, bias: np.ndarray, state: dict[str, np.ndarray], own: str) -> np.ndarray:
    """(H, i + 1) scores and other biases of one query → KERPLE's and the MLP's, (H, i + 1)."""
    distance = np.arange(scores.shape[1])[::-1]
    p, a = (np.maximum(state[f"{own}.{name}"], 0.01)[:, None] for name in "pa")
    kerple = -p * np.log(1 + a * distance)
    hidden = state[f"{own}.hidden.weight"] @ np.concatenate((scores, bias + kerple))
    hidden = hidden + state[f"{own}.hidden.bias"][:, None]
    return kerple + state[f"{own}.out.weight"] @ np.where(hidden > 0, hidden, 0.01 * hidden)


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def polar(x: np.ndarray, position: int, phase: np.ndarray | float = 0.0) -> np.ndarray:
    """(D,) → (2D,): magnitudes from the content, phases from the position."""
    angle = position * 10000.0 ** (-np.arange(len(x)) / len(x)) + np.clip(phase, 0.0, 2 * math.pi)
    return np.concatenate((np.log1p(np.exp(x)) * np.cos(angle), np.log1p(np.exp(x)) * np.sin(angle)))


def reference_logits(model, tokens: list[int]) -> np.ndarray:
    """The whole model in numpy float64, from the formulas: (N,) tokens → (N, V)."""
    config, state = model.config, {k: v.double().numpy() for k, v in model.state_dict().items()}
    parts, heads, dim = config.pos_embedding_type.split("/"), config.num_attention_heads, config.head_dim
    schemes = parts[0].split("+")
    x = state["model.embed_tokens.weight"][tokens] * config.embedding_multiplier
    for p in range(len(tokens)):
        for scheme in schemes:
            if scheme == "sinusoidal":
                x[p] += sinusoid(p, config.hidden_size)
            elif scheme == "scaled_sinusoidal":
                x[p] += state["model.position_embeddings.scaled_sinusoidal.scale"] * sinusoid(p, config.hidden_size)
            elif scheme == "learned":
                x[p] += state["model.position_embeddings.learned.embedding.weight"][p]
    for layer in range(config.num_hidden_layers):
        name, schemes = f"model.layers.{layer}", parts[layer % len(parts)].split("+")
        slides = getattr(config, "layer_types", [""] * 9)[layer] == "sliding_attention"
        normed = rms_norm(x, state[f"{name}.input_layernorm.weight"])
        q, k, v = (
            (normed @ state[f"{name}.self_attn.{part}_proj.weight"].T).reshape(len(tokens), -1, dim) for part in "qkv"
        )
        group = heads // config.num_key_value_heads
        own, kept = f"{name}.self_attn.position_embeddings", np.zeros((len(tokens), heads))
        if "fox" in schemes:
            kept = -np.log1p(np.exp(-normed @ state[f"{own}.fox.weight"].T - state[f"{own}.fox.gate_bias"]))
        mixed = np.zeros((len(tokens), heads, dim))
        for i in range(len(tokens)):
            scores, bias = np.zeros((2, heads, i + 1))
            for h, j in itertools.product(range(heads), range(i + 1)):
                query, key = q[i, h], k[j, h // group]
                if {"rotary", "xpos"} & set(schemes):
                    rope = config.rope_parameters
                    options = (rope["partial_rotary_factor"], rope["rope_theta"])
                    query, key = turned(query, i, *options), turned(key, j, *options)
                if "xpos" in schemes:
                    key = key * xpos_decay(i - j, config)
                if "temperature" in schemes and i >= config.train_length:
                    query = query * (1 + 0.1 * math.log((i + 1) / config.train_length))
                if "pope" in schemes:
                    query, key = polar(query, i, -state["model.position_embeddings.pope.phase"][h]), polar(key, j)
                scores[h, j] = query @ key / math.sqrt(dim)
                bias[h, j] = kept[j + 1 : i + 1, h].sum()
                for scheme in set(BIASES) & set(schemes):
                    bias[h, j] += reference_bias(scheme, i - j, state, layer, heads)[h]
                if "fire" in schemes:
                    bias[h, j] += fire_bias(i, j, state, layer, config.pos_embedding_kwargs["threshold"])[h]
            if "cope" in schemes:
                bias += cope_bias(scores, q[i], state[f"{own}.cope.weight"])
            if "dape" in schemes:
                bias += dape_bias(scores, bias, state, f"{own}.dape")
            if slides:
                scores[:, : max(i + 1 - config.sliding_window, 0)] = -np.inf
            weights = np.exp(scores + bias - (scores + bias).max(-1, keepdims=True))
            for h in range(heads):
                mixed[i, h] = weights[h] / weights[h].sum() @ v[: i + 1, h // group]
        x = x + mixed.reshape(len(tokens), -1) @ state[f"{name}.self_attn.o_proj.weight"].T
        hidden = rms_norm(x, state[f"{name}.post_attention_layernorm.weight"]) @ state[f"{name}.mlp.up_proj.weight"].T
        x = x + np.maximum(hidden, 0) ** 2 @ state[f"{name}.mlp.down_proj.weight"].T
    return rms_norm(x, state["model.norm.weight"]) @ state["lm_head.weight"].T


@pytest.mark.parametrize("scheme", [*SCHEMES, "rotary-half", "xpos-half"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_model_equals_the_formulas_in_float64(scheme, implementation):
    overrides = {"num_key_value_heads": 2}
    if "half" in scheme:
        scheme = scheme.removesuffix("-half")
        overrides["rope_parameters"] = {"partial_rotary_factor": 0.5, "rope_theta": 500.0}
    if scheme == "xpos":
        overrides["pos_embedding_kwargs"] = {"scale_base": 9}  # else hardly any decay in so few tokens
    model = make_model(scheme, attn_implementation=implementation, **overrides)
    tokens = make_tokens(1, 19)
    expected = torch.from_numpy(reference_logits(model, tokens[0].tolist()))
    # fp32 against float64 on logits of magnitude 1..10
    torch.testing.assert_close(model(tokens).logits[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", BIASES)
def test_distance_bias_is_what_the_formula_adds(scheme):
    model = make_model(scheme)
    table = model.model.distance_bias(300)
    assert table.shape == (2, 6, 300) and table.dtype == torch.float32
    state = {k: v.double().numpy() for k, v in model.state_dict().items()}
    for layer in range(2):
        for distance in (0, 1, 2, 17, 128, 299):
            expected = reference_bias(scheme, distance, state, layer, 6)
            np.testing.assert_allclose(table[layer, :, distance].double().detach(), expected, rtol=1e-5, atol=1e-4)
    assert (table != table[..., :1]).any(dim=-1).all(), "a head's bias must not be constant"


def test_distance_bias_adds_up_and_refuses_schemes_without_one():
    model = make_model("sinusoidal+linear_cpb").model
    own = model.layers[1].self_attn.position_embeddings.table(9, torch.device("cpu"))
    assert torch.equal(model.distance_bias(9)[1], own)
    for scheme in ("none", "rotary", "learned"):
        with pytest.raises(ValueError, match="pos_embedding_type.*" + scheme):
            make_model(scheme).model.distance_bias(9)
    with pytest.raises(ValueError, match="`length` must be at least 1, got 0"):
        model.distance_bias(0)


# --- initialisation


def test_scaled_sinusoidal_starts_at_the_inverse_root_of_the_width():
    scale = make_model("scaled_sinusoidal", hidden_size=96).model.position_embeddings["scaled_sinusoidal"].scale
    assert scale.item() == pytest.approx(96**-0.5)


@pytest.mark.parametrize("scheme", list(BIAS_FEATURES))
def test_cpb_starts_as_torch_linear(scheme):
    """U(±1/sqrt(fan_in)) for weights and biases, whatever `initializer_range` says."""
    layers = make_model(scheme, initializer_range=0.5).model.layers
    for linear in layers[0].self_attn.position_embeddings[scheme].mlp:
        bound = linear.weight.shape[1] ** -0.5
        for parameter in linear.parameters():
            assert 0.5 * bound < parameter.abs().max() <= bound  # the smallest has 6 entries
    first = [layer.self_attn.position_embeddings[scheme].mlp[0].weight for layer in layers]
    assert not torch.equal(*first), "each layer has an MLP of its own"
    widths = [linear.weight.shape[0] for linear in layers[0].self_attn.position_embeddings[scheme].mlp]
    assert widths == ([256, 256, 6] if scheme == "linear_cpb_large" else [256, 6])


def test_fire_starts_at_the_papers_values():
    """c = 0.1, m = 1, the MLP as `torch.nn.Linear`; T0 is the training length, and stays when that changes."""
    model = make_model("fire", initializer_range=0.5, train_length=None)
    assert model.config.pos_embedding_kwargs == {"threshold": 512}
    own = model.model.layers[1].self_attn.position_embeddings["fire"]
    assert own.scale.item() == pytest.approx(0.1) and own.multiplier.item() == 1
    for linear, bound in ((own.hidden, 1.0), (own.out, 32**-0.5)):
        assert all(0.5 * bound < parameter.abs().max() <= bound for parameter in linear.parameters())
    assert own.hidden.weight.shape == (32, 1) and own.out.weight.shape == (6, 32) and own.out.bias is None
    config = make_config("fire", train_length=128)
    assert config.pos_embedding_kwargs == {"threshold": 128}
    again = RelPosConfig.from_dict({**config.to_dict(), "train_length": 512})
    assert again.pos_embedding_kwargs == {"threshold": 128}


def test_fox_starts_half_open():
    """The gate's weights have the model's initialisation, its bias is 0, as in the reference code."""
    model = RelPosForCausalLM(make_config("fox", hidden_size=96))
    own = [layer.self_attn.position_embeddings["fox"] for layer in model.model.layers]
    assert own[0].weight.shape == (6, 96) and own[0].weight.std().item() == pytest.approx(0.15, rel=0.1)
    assert not own[0].gate_bias.any() and not torch.equal(own[0].weight, own[1].weight)
    assert torch.equal(own[0].key_bias(torch.zeros(1, 2, 96)), torch.full((1, 6, 2), 0.5).log())


def test_cope_starts_at_nothing():
    """Embeddings of 0, as in the paper's code: the first step moves them, and the gates from then on."""
    model, plain = (RelPosForCausalLM(make_config(scheme)) for scheme in ("cope", "none"))
    own = model.model.layers[0].self_attn.position_embeddings["cope"]
    assert own.weight.shape == (64, 8) and not own.weight.any()
    plain.load_state_dict(model.state_dict(), strict=False)
    tokens = make_tokens(2, 9)
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=2e-5)


def test_dape_starts_as_kerple_and_torch_linear():
    own = [layer.self_attn.position_embeddings["dape"] for layer in make_model("dape").model.layers]
    assert own[0].hidden.weight.shape == (32, 12) and own[0].out.weight.shape == (6, 32) and own[0].out.bias is None
    for linear, bound in ((own[0].hidden, 12**-0.5), (own[0].out, 32**-0.5)):
        assert all(0.8 * bound < parameter.abs().max() <= bound for parameter in linear.parameters())
    p, a = (torch.cat([getattr(each, name) for each in own]) for name in "pa")
    assert 0 <= p.min() and 1 < p.max() <= 2 and 0 <= a.min() and 0.5 < a.max() <= 1 and len(p.unique()) == 12


def test_learned_table_has_the_models_initialisation():
    table = make_model("learned", hidden_size=96).model.position_embeddings["learned"].embedding.weight
    assert table.shape == (160, 96) and table.std().item() == pytest.approx(0.15, rel=0.05)


HEADS = 600  # many, to see a distribution


def test_t5_starts_at_a_standard_deviation_of_002():
    model = make_model("t5", hidden_size=HEADS, num_attention_heads=HEADS, initializer_range=0.5)
    weight = model.model.position_embeddings["t5"].weight
    assert weight.shape == (32, HEADS)
    assert weight.std().item() == pytest.approx(0.02, rel=0.03) and abs(weight.mean().item()) < 5e-4


@pytest.mark.parametrize("scheme", ["kerple_log", "kerple_power"])
def test_kerple_starts_uniform(scheme):
    kerple = make_model(scheme, hidden_size=HEADS, num_attention_heads=HEADS).model.position_embeddings[scheme]
    for parameter, top in ((kerple.p, 2), (kerple.a, 1)):
        assert 0 <= parameter.min() < 0.02 * top and 0.98 * top < parameter.max() <= top
        assert parameter.mean().item() == pytest.approx(top / 2, rel=0.1)
        assert parameter.std().item() == pytest.approx(top / 12**0.5, rel=0.1)


# --- transformers' own code


def llama_twin(model) -> LlamaForCausalLM:
    """Llama with the weights of a RelPos model, its rotation and its MLP."""
    config = model.config
    rope = dict(getattr(config, "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}))
    fields = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "pad_token_id",
    )
    fields += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
    twin = LlamaForCausalLM(
        LlamaConfig(rope_parameters=rope, **{name: getattr(config, name) for name in fields})
    ).eval()
    for theirs, ours in zip(twin.model.layers, model.model.layers):
        theirs.mlp = ours.mlp
    twin.load_state_dict(model.state_dict())
    twin.model.embed_tokens.weight.data *= config.embedding_multiplier
    return twin


def test_rotary_is_llama():
    model = make_model("rotary", num_key_value_heads=3)
    tokens = make_tokens(2, 40)
    torch.testing.assert_close(model(tokens).logits, llama_twin(model)(tokens).logits, rtol=0, atol=2e-6)


ROPE = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 40, "beta_fast": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 5.0, 9.0],
        "original_max_position_embeddings": 50,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("rope_type", ROPE)
def test_scaled_rotary_is_llamas(rope_type, tmp_path):
    """Below and above the original length, in training and from a saved folder."""
    rope = {"rope_type": rope_type, **ROPE[rope_type]}
    model = make_model("rotary", rope_parameters=rope, max_position_embeddings=64)
    twin = llama_twin(model)
    model.save_pretrained(tmp_path)
    loaded = RelPosForCausalLM.from_pretrained(tmp_path).eval()
    plain = make_model("rotary", max_position_embeddings=64)
    for length in (30, 90):
        tokens = make_tokens(2, length)
        logits = model(tokens).logits
        torch.testing.assert_close(logits, twin(tokens).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(loaded(tokens).logits, logits)
        same = torch.allclose(plain(tokens).logits, logits, atol=1e-3)
        assert same == (rope_type == "dynamic" and length == 30)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_angles_that_follow_the_length(rope_type):
    """A row's angles are those of its own length, and keys cached at a shorter length are refused."""
    rope = {"rope_type": rope_type, **ROPE[rope_type]}
    model = make_model("rotary", rope_parameters=rope, max_position_embeddings=50)
    long, short = make_tokens(1, 70), make_tokens(1, 20, seed=1)
    padded = torch.cat((torch.zeros(1, 50, dtype=torch.long), short), dim=1)
    mask = torch.cat((torch.ones(1, 70), torch.cat((torch.zeros(1, 50), torch.ones(1, 20)), dim=1))).long()
    logits = model(torch.cat((long, padded)), attention_mask=mask).logits
    torch.testing.assert_close(logits[1, 50:], model(short).logits[0], rtol=1e-4, atol=2e-5)

    below = model.generate(short, max_new_tokens=9, do_sample=False)
    assert torch.equal(below, model.generate(short, max_new_tokens=9, do_sample=False, use_cache=False))
    tokens = make_tokens(1, 48, seed=2)
    with pytest.raises(ValueError, match=f"`use_cache` must be False past 50 tokens with rope_type '{rope_type}'"):
        model.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert model.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=False).shape == (1, 53)
    if rope_type == "longrope":  # from the first token on at the long angles: nothing changes any more
        cached = model.generate(long, max_new_tokens=5, do_sample=False)
        assert torch.equal(cached, model.generate(long, max_new_tokens=5, do_sample=False, use_cache=False))


@pytest.mark.parametrize("scheme", ["rotary", "xpos"])
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_angles_that_follow_the_length_of_a_document(rope_type, scheme):
    """In packed rows too, with padding in them and without."""
    rope = {"rope_type": rope_type, **ROPE[rope_type]}
    model = make_model(scheme, rope_parameters=rope, max_position_embeddings=50)
    tokens, lengths = make_tokens(2, 100), (20, 70, 10)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    alone = torch.cat([model(piece).logits for piece in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(model(tokens, position_ids=positions).logits, alone, rtol=1e-4, atol=5e-5)
    mask = torch.ones_like(tokens)
    mask[1, 60:65] = 0
    row = torch.cat(
        (torch.arange(20), (mask[1, 20:90].cumsum(-1) - 1).masked_fill(mask[1, 20:90] == 0, 1), positions[0, 90:])
    )
    packed = model(tokens, position_ids=torch.stack((positions[0], row)), attention_mask=mask).logits
    torch.testing.assert_close(packed[0], alone[0], rtol=1e-4, atol=5e-5)
    real = mask[1, 20:90].bool()
    expected = model(tokens[1:, 20:90][:, real]).logits[0]
    torch.testing.assert_close(packed[1, 20:90][real], expected, rtol=1e-4, atol=5e-5)


def test_none_is_llama_without_the_rotation():
    model = make_model("none", num_key_value_heads=3)
    twin, tokens = llama_twin(model), make_tokens(2, 40)
    twin.model.rotary_emb.inv_freq.zero_()
    torch.testing.assert_close(model(tokens).logits, twin(tokens).logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize("num_heads", [8, 12])
def test_alibi_slopes_are_blooms(num_heads):
    theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    ours = RelPosModel(make_config("alibi", hidden_size=96, num_attention_heads=num_heads)).position_embeddings["alibi"]
    torch.testing.assert_close(ours.slopes(), theirs, rtol=1e-6, atol=0)


# --- the registry


def test_the_schemes_of_the_mission_are_there():
    mission = "none sinusoidal scaled_sinusoidal learned linear_cpb linear_cpb_large log_cpb fourier_cpb alibi rotary"
    assert set(mission.split()) <= set(list_position_embeddings())


@pytest.mark.parametrize("scheme", list_position_embeddings())
def test_docstring_says_equation_parameters_behaviour_and_source(scheme):
    doc = POSITION_EMBEDDINGS[scheme].__doc__
    for part in ("Parameters", "Past the training length:"):
        assert part in doc, f"{scheme} lacks {part!r}"
    assert "Paper:" in doc or "Source:" in doc or "as `" in doc
    assert set("=←") & set(doc.split("\n\n")[1]), "the second paragraph is the equation"


def test_a_new_scheme_is_one_class():
    """Registered here, it works in the model, in the config's checks, in caching and with options of its own."""

    @register_position_embedding("test_window")
    class Window(PositionEmbedding):
        defaults = {"width": 3}
        kind = "relative"

        def __init__(self, config, width):
            super().__init__(config)
            self.num_heads, self.width = config.num_attention_heads, width

        def distance_bias(self, distance):
            return torch.where(distance < self.width, 0.0, -1e4).expand(self.num_heads, -1)

    try:
        model = make_model("test_window", pos_embedding_kwargs={"width": 2}, num_hidden_layers=1)
        tokens = make_tokens(1, 12)
        changed = tokens.clone()
        changed[0, 4] += 1
        moved = (model(tokens).logits != model(changed).logits).any(-1)[0]
        assert moved.nonzero().flatten().tolist() == [4, 5]
        greedy = model.generate(tokens, max_new_tokens=4, do_sample=False)
        assert torch.equal(greedy, model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False))
    finally:
        del POSITION_EMBEDDINGS["test_window"]


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'alibi' is taken by AlibiBias"):
        register_position_embedding("alibi")(PositionEmbedding)


def test_combinations_cover_both_kinds():
    for combination in COMBINATIONS:
        make_config(combination)


def test_pope_is_that_of_x_transformers():
    module = pytest.importorskip("x_transformers.x_transformers", reason="an independent implementation")
    ours = make_model("pope").model.position_embeddings["pope"]
    heads, dim = ours.phase.shape
    theirs = module.PolarEmbedding(dim, heads)
    theirs.learned_bias.data.copy_(ours.phase.data[:, None])
    query, key = torch.randn(2, 2, heads, 19, dim, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(19)[None]
    rotated = ours.rotate(query, key, ours.rotation(positions, torch.float32))
    angles, bias = theirs(positions)
    expected = module.apply_polar_pos_emb(query, angles), module.apply_polar_pos_emb(key, angles + bias)
    scores, expected = ((q @ k.transpose(2, 3)).tril() for q, k in (rotated, expected))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_pope_stands_alone():
    for name in ("pope+rotary", "temperature+pope"):
        with pytest.raises(ValueError, match="must not join 'pope' with"):
            make_config(name)
    assert make_config("pope+alibi") and make_config("pope/rotary")
