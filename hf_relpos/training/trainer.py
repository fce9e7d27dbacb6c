"""The Trainer of transformers with this package's way of publishing."""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import Trainer
from transformers.utils import PushInProgress

from ..hub.model_card import CARD
from ..hub.push import check_not_taken, check_token, hub_errors, push_folder
from ..hub.repository import repository_files, write_files


logger = logging.getLogger(__name__)


class RelPosTrainer(Trainer):
    """The Trainer of transformers, whose pushes are those of `hf_relpos.hub.push`: a complete repository in one commit.

    `hub_strategy` is "end" or "every_save"; the latter pushes the model of each checkpoint in the background. The
    optimizer's state and the pickled arguments are not pushed.
    """

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
        folder = Path(self.args.output_dir)
        try:
            card = repository_files(folder, self.hub_model_id)[CARD]
        except ValueError as error:  # the model is saved already
            logger.warning(f"No card was written: {error}")
        else:
            if isinstance(card, bytes):
                (folder / CARD).write_bytes(card)

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
        except (OSError, ValueError) as error:  # training continues
            logger.warning(f"The model of step {step} was not pushed: {error}")
            shutil.rmtree(staged)
        else:
            self.push_in_progress = PushInProgress([HfApi().run_as_future(push)])
