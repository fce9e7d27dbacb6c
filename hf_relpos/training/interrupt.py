"""Interruption: a run that is stopped finishes its step and saves a checkpoint."""

import signal
import time
from typing import Any

import torch
from transformers import TrainerCallback

from .output_stream import reader_has_gone


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class EvaluationInterrupted(Exception):
    """An evaluation that was stopped."""


class InterruptCallback(TrainerCallback):
    """Ctrl-C, SIGTERM, a closed terminal (SIGHUP, unless nohup ignores it) or a pipe that nobody reads any more: finish
    the step, or leave the evaluation, save a checkpoint and stop. A signal once more, a second later: stop at once.

    Launchers of several processes send each worker signals of their own on top of the terminal's, so there all further
    ones are ignored; a launcher kills workers that do not end in time.
    """

    def __init__(self) -> None:
        self.requested = self.stopped = False
        self.request_time = 0.0
        self.previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.world_size = args.world_size
        for number in SIGNALS:
            if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self.previous[number] = signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested and self.world_size == 1 and time.monotonic() - self.request_time > 1:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self.request_time = True, time.monotonic()

    def restore(self) -> None:
        """Signals do again what they did before training."""
        while self.previous:
            signal.signal(*self.previous.popitem())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped = self.requested or reader_has_gone()
        if args.world_size > 1:  # all processes must stop after the same step
            flag = torch.tensor(float(self.stopped), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.stopped = bool(flag)  # a request that came meanwhile waits for the next step
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # a signal reaches processes one after the other, and the best model is chosen by a whole evaluation
        is_asked = self.requested and self.previous  # and training has not ended
        if is_asked and args.world_size == 1 and args.metric_for_best_model is None:
            self.stopped = True
            raise EvaluationInterrupted

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()
