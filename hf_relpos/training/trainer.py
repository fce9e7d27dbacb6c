"""The Trainer of transformers with this package's way of publishing."""

import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import CommitInfo, HfApi
from transformers import Trainer
from transformers.utils import PushInProgress

from ..environment import CannotWriteError, write_json, writing
from ..file_reading import reading
from ..hub.push import check_not_taken, check_token, hub_errors, push_folder
from ..hub.repository import repository_files, write_card, write_files
from ..model_corpus import UsedCorpus
from ..model_loading import is_finite
from ..results.training_record import TRAINING_RECORD
from .checkpoints import RECIPE, load_weights, newest_whole
from .interrupt import EvaluationInterrupted
from .lora import has_lora, merged_weights, save_trained_weights
from .plain_model import plain_model
from .recipe import Recipe, apply_overrides, reseed


logger = logging.getLogger(__name__)
# of two checkpoints within one second; they are then told apart by their numbers, which are right
logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime may not be" not in record.getMessage())

# what optimizers of torch keep in the shape of the weights
MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}


class RelPosTrainer(Trainer):
    """The Trainer of transformers, whose pushes are those of `hf_relpos.hub.push`: a complete repository in one commit.

    `hub_strategy` is "end" or "every_save"; the latter pushes the model of each checkpoint in the background. The
    optimizer's state and the pickled arguments are not pushed.

    Training stops with a `ValueError` at the first loss that is not finite, and weights that are not finite are never
    saved.

    Attributes:
        save_dtype: of the weights in the output folder; those of checkpoints are as they are trained.
        recipe: what each checkpoint says of its run, in recipe.json.
        changed: what the resumed run does otherwise than its checkpoint, as `check_recipe` returns it.
        corpus: what the model is trained on, which is noted beside it.
        make_record: → the record of the run so far, as `training.json` holds it, which a push in training takes along.
        step_loss: the last step, and its loss in this process as far as it was computed.
    """

    save_dtype: torch.dtype | None = None
    recipe: Recipe | None = None
    changed: dict[str, Any] | None = None
    corpus: UsedCorpus | None = None
    make_record: Callable[[], dict[str, Any]] | None = None
    step_loss: tuple[int, torch.Tensor | float] = (-1, 0.0)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._told_by_step("training"):
            loss = super().training_step(*args, **kwargs)
        if not self._everywhere(torch.isfinite(loss).all()):
            self._stop(f"the loss of step {self.state.global_step + 1} is {loss.item()}")
        step, before = self.step_loss
        self.step_loss = self.state.global_step, loss.detach() + (before if step == self.state.global_step else 0.0)
        return loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Of all blocks, also those at the end that fill no batch: `dataloader_drop_last` is for training."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            with self._told_by_step("evaluation"):
                metrics = super().evaluate(*args, **kwargs)
        except EvaluationInterrupted:
            self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            return {}
        for name, value in metrics.items():
            if name.endswith("_loss") and not math.isfinite(value):  # the same in all processes
                self._stop(f"{name} after step {self.state.global_step} is {value}")
        return metrics

    @contextmanager
    def _told_by_step(self, doing: str) -> Iterator[None]:
        """Kernels refuse tables that are not finite before there is a loss."""
        try:
            yield
        except ValueError as error:
            if "must be finite" not in str(error):
                raise
            self._stop(f"in {doing} after step {self.state.global_step} {str(error).partition(';')[0]}")

    def check_finite(self) -> None:
        """Raises `ValueError` if a weight of the model is not finite."""
        weights = [getattr(weight, "_local_tensor", weight) for weight in self.model.parameters()]
        finite = torch.stack([torch.isfinite(weight.detach()).all().to(self.args.device) for weight in weights])
        if not self._everywhere(finite.all()):
            self._stop(f"after step {self.state.global_step} weights are not finite")

    def _everywhere(self, fact: torch.Tensor) -> bool:
        """Whether it holds in all processes."""
        if self.args.world_size > 1:
            fact = fact.float()
            torch.distributed.all_reduce(fact, op=torch.distributed.ReduceOp.MIN)
        return bool(fact)

    def _stop(self, reason: str) -> NoReturn:
        last, _ = newest_whole(Path(self.args.output_dir))
        kept = f"the last finite checkpoint is {str(last)!r}" if last else "no finite checkpoint was saved"
        raise ValueError(f"training stopped: {reason}; {kept}. A lower `learning_rate` may help.")

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.check_finite()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:  # what a damaged one of the same step left would look whole when this one is cut off
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with writing("the checkpoint", folder):
                super()._save_checkpoint(model, trial)
        except CannotWriteError:  # half of one takes the room of a whole one
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=_internal_call)
        if self.corpus and self.args.should_save:
            self.corpus.save(output_dir or self.args.output_dir)
        # in a checkpoint the state comes last, so one that has it has the recipe
        if self.recipe and self.args.should_save and output_dir and Path(output_dir) != Path(self.args.output_dir):
            write_json(Path(output_dir) / RECIPE, self.recipe.to_dict())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes an ordinary model, with LoRA merged; a checkpoint also gets LoRA itself."""
        trained, is_end = self.model, Path(output_dir or self.args.output_dir) == Path(self.args.output_dir)
        plain = self.accelerator.unwrap_model(trained, keep_torch_compile=False)
        dtype = self.save_dtype if is_end else None
        if not self.args.should_save or not (has_lora(plain) or dtype not in (None, plain.dtype)):
            super()._save(output_dir, state_dict)
            return
        if has_lora(plain):
            state_dict = merged_weights(plain)
        self.model = plain_model(plain, state_dict or plain.state_dict(), dtype)
        try:
            super()._save(output_dir)
        finally:
            self.model = trained
        if has_lora(plain) and not is_end:
            save_trained_weights(plain, output_dir)

    def _load_from_checkpoint(self, checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if has_lora(model or self.model):
            load_weights(model or self.model, checkpoint)
            return
        with reading(f"`resume_from_checkpoint` {checkpoint!r}: its weights are not those of this model"):
            super()._load_from_checkpoint(checkpoint, model)

    def _load_best_model(self) -> None:
        if has_lora(self.model):
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        fresh = []
        if checkpoint and self.changed:
            groups = self.optimizer.param_groups
            fresh = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        if not checkpoint:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with reading(f"`resume_from_checkpoint` {checkpoint!r}: its optimizer is not that of this model"):
            super()._load_optimizer_and_scheduler(checkpoint)
            self._check_optimizer()
        if fresh:
            apply_overrides(self.changed, fresh, self.optimizer, self.lr_scheduler)

    def _check_optimizer(self) -> None:
        """Raises `ValueError` if what was loaded is empty, not finite, or of other shapes than the weights."""
        state = self.optimizer.state
        if "adam" in str(self.args.optim).lower() and not any(state.values()):
            raise ValueError("it is empty")
        for weight, numbers in state.items():
            for name in MOMENTS & numbers.keys():
                moment = numbers[name]
                if moment is not None and moment.shape != weight.shape:
                    raise ValueError(f"`{name}` has shape {[*moment.shape]} for weights of shape {[*weight.shape]}")
                if moment is not None and not is_finite(getattr(moment, "_local_tensor", moment)):
                    raise ValueError(f"`{name}` is not finite")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(f"`resume_from_checkpoint` {checkpoint!r}: its random numbers cannot be read"):
            super()._load_rng_state(checkpoint)
        if checkpoint and self.changed:
            reseed(self.changed, self.args.seed)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if self.args.hub_strategy.value not in ("end", "every_save"):
            raise ValueError(
                f"`hub_strategy` must be 'end' or 'every_save', got {self.args.hub_strategy.value!r}: the state of an "
                "optimizer is pickled."
            )
        token = token or self.args.hub_token
        check_token(token)
        with hub_errors(self.args.hub_model_id or Path(self.args.output_dir).name):
            if private is not None:  # no argument of the older versions of transformers
                self.args.hub_private_repo = private
            super().init_hf_repo(token=token)
            if self.hub_model_id is None or getattr(self.args, "hub_overwrite", False):
                return
            api = HfApi(token=token)
            head = api.repo_info(self.hub_model_id).sha
            record = {"seed": self.args.seed, "data_seed": self.args.data_seed}
            there, config = api.list_repo_files(self.hub_model_id, revision=head), self.model.config.to_dict()
            check_not_taken(api, self.hub_model_id, head, there, config, record)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the card of the model in the output folder; the arguments that transformers passes are not used."""
        if not self.is_world_process_zero():
            return
        write_card(self.args.output_dir, self.hub_model_id)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        """As in transformers, and always blocking; the output folder also gets the card."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card()
        self._finish_current_push()
        return self._push(self.args.output_dir, commit_message, token, revision)

    def _push(
        self, folder: str, message: str | None, token: str | None = None, revision: str | None = None
    ) -> CommitInfo:
        return push_folder(
            folder,
            self.hub_model_id,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            commit_message=message,
            overwrite=getattr(self.args, "hub_overwrite", False),
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy.value == "end":
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        staged = Path(tempfile.mkdtemp())  # the checkpoint may be gone before it is sent
        step = self.state.global_step

        def push() -> None:
            try:
                self._push(str(staged / "model"), f"Training in progress, step {step}")
            except ValueError as error:
                logger.warning(f"The model of step {step} was not pushed: {error}")
            finally:
                shutil.rmtree(staged)

        try:
            write_files(repository_files(checkpoint_folder, self.hub_model_id), staged / "model")
            if self.make_record:
                write_json(staged / "model" / TRAINING_RECORD, self.make_record())
        except (OSError, ValueError) as error:  # training continues
            logger.warning(f"The model of step {step} was not pushed: {error}")
            shutil.rmtree(staged)
        else:
            self.push_in_progress = PushInProgress([HfApi().run_as_future(push)])
