"""The model as a folder holds it: of a dtype of its own, without what training adds."""

import copy
from collections.abc import Mapping

import torch

from ..model.modeling_relpos import RelPosForCausalLM


def plain_model(
    model: RelPosForCausalLM, weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> RelPosForCausalLM:
    """A model of the configuration of `model` with these weights, whose memory it shares where the dtype is theirs.

    Args:
        model: its configuration and generation configuration are taken.
        weights: by the names of an ordinary model.
        dtype: of the new one; that of the weights by default.
    """
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        made = RelPosForCausalLM._from_config(config, attn_implementation=model.config._attn_implementation)
    made.load_state_dict(
        {name: weight.detach().to(dtype or weight.dtype) for name, weight in weights.items()}, assign=True
    )
    made.tie_weights()
    made.generation_config = model.generation_config
    return made
