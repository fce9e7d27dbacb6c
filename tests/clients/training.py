"""Training: the Trainer and what it reports to, Lightning, a search of hyperparameters."""

import json
import math
import os
import sqlite3
from functools import partial
from pathlib import Path

import torch
from clients.harness import Subject, client, losses_fall


class Tokens(torch.utils.data.Dataset):
    """16 rows, each of them its own labels."""

    def __init__(self, subject: Subject):
        self.rows = subject.tokens(16, 24)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def make_trainer(subject: Subject, model=None, **options):
    from transformers import Trainer, TrainingArguments

    common = {"per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 3e-3, "logging_steps": 1}
    common |= {"use_cpu": True, "report_to": "none", "save_strategy": "no"}
    args = TrainingArguments(str(subject.out / "run"), **(common | options))
    return Trainer(model or subject.load(), args=args, train_dataset=Tokens(subject))


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@client("`Trainer`", "transformers")
def run_trainer(subject: Subject):
    """Losses fall, plain and with each option; a resumed run ends with the weights of one that was not cut."""
    from transformers import AutoModelForCausalLM

    def train(**options) -> str:
        return losses_fall(losses_of(make_trainer(subject, **options)))

    def resume() -> None:
        whole = make_trainer(subject, save_strategy="steps", save_steps=2)
        whole.train()
        again = make_trainer(subject)
        again.train(resume_from_checkpoint=str(subject.out / "run" / "checkpoint-2"))
        for name, weight in whole.model.state_dict().items():
            torch.testing.assert_close(again.model.state_dict()[name], weight, rtol=1e-4, atol=1e-6)

    def save() -> None:
        trainer = make_trainer(subject)
        trainer.train()
        trainer.save_model(str(subject.out / "saved"))
        loaded = AutoModelForCausalLM.from_pretrained(subject.out / "saved", trust_remote_code=True).eval()
        tokens = subject.tokens()
        assert torch.equal(loaded(tokens).logits, trainer.model.eval()(tokens).logits)

    return {
        "plain": train,
        "label smoothing": partial(train, label_smoothing_factor=0.1),
        "gradient checkpointing": partial(train, gradient_checkpointing=True),
        "accumulation": partial(train, per_device_train_batch_size=4, gradient_accumulation_steps=2),
        "bf16": partial(train, bf16=True),
        "NEFTune": partial(train, neftune_noise_alpha=5.0),
        "Adafactor": partial(train, optim="adafactor", learning_rate=1e-2),
        "a frozen layer": partial(train_frozen, subject),
        "resume": resume,
        "save and load": save,
    }


def train_frozen(subject: Subject) -> str:
    model = subject.load()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad = False
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    note = losses_fall(losses_of(make_trainer(subject, model)))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    return note


@client("TensorBoard", "tensorboard", schemes=("linear_cpb",))
def run_tensorboard(subject: Subject):
    """`Trainer(report_to="tensorboard")`: the file of events has the losses."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(subject.out / "logs")
    losses = losses_of(make_trainer(subject, report_to="tensorboard"))
    events = EventAccumulator(str(subject.out / "logs")).Reload()
    assert [round(event.value, 3) for event in events.Scalars("train/loss")] == [round(loss, 3) for loss in losses]


@client("Weights & Biases", "wandb", schemes=("linear_cpb",))
def run_wandb(subject: Subject):
    """`Trainer(report_to="wandb")`, offline: a run is written, with the configuration and the losses."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": str(subject.out), "WANDB_SILENT": "true"}
    losses_of(make_trainer(subject, report_to="wandb"))
    import wandb

    assert "train/loss" in wandb.run.summary.keys() and wandb.run.config["hidden_size"] == 64
    wandb.finish()
    assert [*Path(subject.out).glob("wandb/offline-run-*/*.wandb")]


@client("MLflow", "mlflow-skinny", schemes=("linear_cpb",))
def run_mlflow(subject: Subject):
    """`Trainer(report_to="mlflow")` into a local folder: the run holds the losses and the configuration."""
    address = f"file://{subject.out}/mlruns"
    os.environ |= {"MLFLOW_TRACKING_URI": address, "MLFLOW_FLATTEN_PARAMS": "TRUE", "MLFLOW_DISABLE_TELEMETRY": "true"}
    os.environ |= {"MLFLOW_MAX_LOG_PARAMS": "150", "MLFLOW_ALLOW_FILE_STORE": "true", "DO_NOT_TRACK": "true"}
    losses = losses_of(make_trainer(subject, report_to="mlflow"))
    import mlflow

    run = mlflow.MlflowClient(address).search_runs(["0"])[0]
    history = mlflow.MlflowClient(address).get_metric_history(run.info.run_id, "loss")
    assert [metric.value for metric in history] == losses and run.data.params["hidden_size"] == "64"


@client("trackio", "trackio", schemes=("linear_cpb",))
def run_trackio(subject: Subject):
    """`Trainer(report_to="trackio")`: the local database has the losses."""
    os.environ["TRACKIO_DIR"] = str(subject.out / "trackio")
    losses = losses_of(make_trainer(subject, report_to="trackio", project="clients"))
    (path,) = (subject.out / "trackio").glob("clients*.db")
    with sqlite3.connect(path) as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by id")]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == losses


@client("Lightning", "lightning")
def run_lightning(subject: Subject):
    """`Trainer` of Lightning with validation and a checkpoint that loads; Fabric: losses fall."""
    import lightning
    from lightning.fabric import Fabric

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = subject.load(), []

        def training_step(self, batch, index):
            loss = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch, index):
            self.log("val_loss", self.model(**batch).loss)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=3e-3)

    loader = torch.utils.data.DataLoader(Tokens(subject), batch_size=8)

    def lightning_trainer() -> str:
        module, quiet = Module(), {"logger": False, "enable_progress_bar": False, "enable_model_summary": True}
        trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=subject.out, **quiet)
        trainer.fit(module, loader, loader)
        trainer.save_checkpoint(subject.out / "model.ckpt")
        state = torch.load(subject.out / "model.ckpt", weights_only=True)["state_dict"]
        again = Module()
        again.load_state_dict(state)
        tokens = subject.tokens()
        assert torch.equal(again.model.eval()(tokens).logits, module.model.eval()(tokens).logits)
        assert math.isfinite(trainer.callback_metrics["val_loss"])
        return losses_fall(module.losses)

    def fabric() -> str:
        fabric = Fabric(accelerator="cpu", devices=1)
        model = subject.load().train()
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
        losses = []
        for batch in [*fabric.setup_dataloaders(loader)] * 2:
            loss = model(**batch).loss
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses_fall(losses)

    return {"Trainer": lightning_trainer, "Fabric": fabric}


@client("Optuna", "optuna")
def run_optuna(subject: Subject):
    """`Trainer.hyperparameter_search(backend="optuna")` over a learning rate, two trials."""
    trainer = make_trainer(subject)
    trainer.model_init = lambda trial=None: subject.load()
    trainer.eval_dataset = trainer.train_dataset
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=2,
        direction="minimize",
        backend="optuna",
    )
    assert math.isfinite(best.objective)
