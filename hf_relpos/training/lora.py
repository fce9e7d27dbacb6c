"""LoRA through PEFT: few weights are trained beside those of the model, and merged into them wherever it is saved."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..model.modeling_relpos import RelPosForCausalLM


# in a checkpoint, beside the merged weights: what was trained, to go on with
TRAINED_WEIGHTS = "lora.safetensors"


def add_lora(model: RelPosForCausalLM, rank: int, alpha: float, seed: int) -> None:
    """Adds LoRA to all matrices of attention and MLP, in place; all else is frozen but the parameters of the position
    schemes, which may be new.

    Args:
        model: with fp32 weights.
        rank: of each pair of matrices.
        alpha: the product of a pair is multiplied by alpha / rank.
        seed: of their first weights; the product is 0 at first.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _is_adapted(name)]
    model.frozen_digest = _digest(model)
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), model)
    for name, parameter in model.named_parameters():
        if ".position_embeddings." in f".{name}":
            parameter.requires_grad_(True)


def has_lora(model: nn.Module) -> bool:
    """Whether `add_lora` was called."""
    return hasattr(model, "frozen_digest")


def merged_weights(model: RelPosForCausalLM) -> dict[str, torch.Tensor]:
    """The weights of the model without LoRA that computes the same, by the names of an ordinary model."""
    from peft.tuners.lora import LoraLayer

    weights = {name.replace(".base_layer.", "."): weight for name, weight in model.state_dict().items()}
    weights = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            with torch.no_grad():
                weights[f"{name}.weight"] = module.get_base_layer().weight + module.get_delta_weight("default")
    return weights


def save_trained_weights(model: RelPosForCausalLM, folder: str | Path) -> None:
    """Writes what is trained, and which frozen weights it belongs to."""
    trained = {name: weight.detach().contiguous() for name, weight in _trained(model).items()}
    save_file(trained, Path(folder) / TRAINED_WEIGHTS, {"format": "pt", "frozen": model.frozen_digest})


def load_trained_weights(model: RelPosForCausalLM, folder: str | Path) -> None:
    """Loads what `save_trained_weights` wrote; raises `ValueError` if it belongs to another model."""
    expected = _trained(model)
    with safe_open(Path(folder) / TRAINED_WEIGHTS, "pt") as file, torch.no_grad():
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        if shapes != {name: [*weight.shape] for name, weight in expected.items()}:
            raise ValueError(f"{str(folder)!r}: {TRAINED_WEIGHTS} holds the weights of another model or rank.")
        if (file.metadata() or {}).get("frozen") != model.frozen_digest:
            raise ValueError(
                f"{str(folder)!r}: {TRAINED_WEIGHTS} belongs to other weights than those of `model_name_or_path`."
            )
        for name, weight in expected.items():
            weight.copy_(file.get_tensor(name))


def num_plain_parameters(model: nn.Module) -> int:
    """The parameters of the model without LoRA."""
    return sum(weight.numel() for name, weight in model.named_parameters() if ".lora_" not in name)


def _is_adapted(name: str) -> bool:
    return ".layers." in name and ".position_embeddings." not in name


def _trained(model: nn.Module) -> dict[str, Any]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _digest(model: nn.Module) -> str:
    """A hash of all weights that LoRA freezes."""
    hashed = hashlib.sha256()
    for name, weight in model.named_parameters():
        if ".position_embeddings." not in f".{name}":
            hashed.update(name.encode())
            hashed.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()
