"""How another position scheme comes: before the first step, or layer by layer over steps."""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from ..model.configuration_relpos import RelPosConfig
from ..model.modeling_relpos import RelPosForCausalLM
from ..model.scheme_registry import (
    PositionEmbeddings,
    build_position_embeddings,
    layer_groups,
    position_embedding_classes,
)
from .run import TrainingRun


FIELDS = ("pos_embedding_type", "pos_embedding_kwargs", "rope_parameters")


@dataclass
class SchemeSchedule(TrainerCallback):
    """Another scheme, from the last layer to the first.

    Layer l of L takes the new scheme after step floor((L − 1 − l) · num_steps / L): the last one before the first step,
    the first one before step `num_steps` is done.

    Attributes:
        model: whose layers change; its weights stay as they are.
        before, after: its configurations with the old scheme and with the new one.
        num_steps: after so many steps the model is that of `after`.
    """

    model: RelPosForCausalLM
    before: RelPosConfig
    after: RelPosConfig
    num_steps: int
    num_changed: int | None = field(default=None, init=False)

    def apply(self, step: int) -> None:
        """Makes the model, in place, what it is after `step` steps."""
        num_layers = self.after.num_hidden_layers
        num_changed = min(num_layers, math.ceil((step + 1) * num_layers / self.num_steps))
        if num_changed != self.num_changed:
            self.num_changed = num_changed
            _set_schemes(self.model, self.config(num_changed))

    def config(self, num_changed: int) -> RelPosConfig:
        """The configuration whose last `num_changed` layers have the new scheme."""
        num_layers = self.after.num_hidden_layers
        if num_changed == num_layers:
            return self.after
        parts = [["+".join(group.schemes) for group in layer_groups(config)] for config in (self.before, self.after)]
        kept = num_layers - num_changed
        fields = self.after.to_dict()
        fields["pos_embedding_type"] = "/".join(parts[0][:kept] + parts[1][kept:])
        fields["pos_embedding_kwargs"] = (self.before.pos_embedding_kwargs or {}) | (
            self.after.pos_embedding_kwargs or {}
        )
        fields["rope_parameters"] = fields.get("rope_parameters") or getattr(self.before, "rope_parameters", None)
        return RelPosConfig.from_dict(fields)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.apply(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.apply(state.global_step)


def make_schedule(run: TrainingRun) -> SchemeSchedule | None:
    """The schedule that the flags of a run ask for, `None` for a change at once.

    Raises:
        ValueError: for a run without another scheme, schemes that cannot come layer by layer, or more steps than the
            run has.
    """
    args, changes, how = run.args, run.changes, getattr(run.args, "scheme_schedule", "at_once")
    if how == "at_once":
        return None
    if "pos_embedding_type" not in changes.get("fields", {}):
        raise ValueError(f"`scheme_schedule` {how!r} needs another `pos_embedding_type`.")
    old, new = (position_embedding_classes(name) for name in changes["fields"]["pos_embedding_type"])
    own = [*changes["reinitialized"], *changes["dropped"]]
    own += [name for name, cls in (old | new).items() if "embed" in cls.hooks and (name in old) != (name in new)]
    if own:
        raise ValueError(
            f"`scheme_schedule` {how!r} is for schemes without weights that act within layers, got {own[0]!r}; "
            "--start_at_zero true is for those that are added with weights."
        )
    if args.load_best_model_at_end:
        raise ValueError("`load_best_model_at_end` must be false with `scheme_schedule`: the best may lie on the way.")
    steps = args.scheme_schedule_steps or max(1, args.max_steps // 2)
    if steps > args.max_steps:
        raise ValueError(f"`scheme_schedule_steps` must be at most `max_steps` {args.max_steps}, got {steps}.")
    before, after = (RelPosConfig.from_dict(run.model.config.to_dict()) for _ in range(2))
    for name in FIELDS:
        setattr(before, name, changes["fields"].get(name, [getattr(before, name, None)])[0])
    return SchemeSchedule(run.model, before, after, steps)


def _set_schemes(model: RelPosForCausalLM, config: RelPosConfig) -> None:
    """Gives a model the schemes of a configuration, in place; modules of schemes that it has already stay."""
    for name in FIELDS:
        if hasattr(config, name):
            setattr(model.config, name, getattr(config, name))
        elif hasattr(model.config, name):
            delattr(model.config, name)
    base = model.model
    base.position_embeddings = _kept(base.position_embeddings, build_position_embeddings(model.config))
    for index, (layer, group) in enumerate(zip(base.layers, layer_groups(model.config))):
        attention = layer.self_attn
        attention.group = group
        attention.position_embeddings = _kept(
            attention.position_embeddings, build_position_embeddings(model.config, index)
        )


def _kept(old: PositionEmbeddings, new: PositionEmbeddings) -> PositionEmbeddings:
    for name in new:
        if name in old:
            new[name] = old[name]
    return new
