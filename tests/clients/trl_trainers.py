"""TRL: each trainer gets the model as an object, and three steps."""

from functools import partial

from clients.harness import Subject, client, losses_fall


COMMON = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 3e-3, "logging_steps": 1, "use_cpu": True}
COMMON |= {"bf16": False, "report_to": "none", "save_strategy": "no", "trust_remote_code": True}


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@client("TRL, SFT", "trl")
def run_sft(subject: Subject):
    """Supervised fine-tuning, padded and packed: the first loss is the model's own, and it falls."""
    import datasets
    import trl

    def fine_tune(packing: bool) -> str:
        args = trl.SFTConfig(str(subject.out), max_length=48, packing=packing, **COMMON)
        data = datasets.Dataset.from_dict({"text": subject.texts(16)})
        trainer = trl.SFTTrainer(subject.load(), args=args, train_dataset=data, processing_class=subject.tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        ours = subject.load()(**batch, use_cache=False).loss.item()
        loss = trainer.compute_loss(trainer.model, dict(batch)).item()
        assert abs(loss - ours) < 1e-4 * ours, f"TRL's loss {loss}, the model's {ours}"
        return losses_fall(losses_of(trainer))

    return {"padded": partial(fine_tune, False), "packed": partial(fine_tune, True)}


@client("TRL, preferences", "trl")
def run_preferences(subject: Subject):
    """DPO, KTO and a reward model, on four pairs of answers."""
    import datasets
    import trl
    from transformers import AutoModelForSequenceClassification

    texts = subject.texts(16)
    pairs = {"prompt": texts[:8], "chosen": texts[8:], "rejected": [text[::-1] for text in texts[8:]]}
    data, options = datasets.Dataset.from_dict(pairs), {"processing_class": subject.tokenizer}

    def dpo() -> str:
        args = trl.DPOConfig(str(subject.out), max_length=64, **COMMON)
        return losses_fall(losses_of(trl.DPOTrainer(subject.load(), args=args, train_dataset=data, **options)))

    def kto() -> str:
        args = trl.KTOConfig(str(subject.out), max_length=64, **COMMON)
        rows = {
            "prompt": texts[:8] * 2,
            "completion": pairs["chosen"] + pairs["rejected"],
            "label": [True] * 8 + [False] * 8,
        }
        labelled = datasets.Dataset.from_dict(rows)
        trainer = trl.KTOTrainer(subject.load(), ref_model=subject.load(), args=args, train_dataset=labelled, **options)
        return f"{len(losses_of(trainer))} steps"

    def reward() -> str:
        args = trl.RewardConfig(str(subject.out), max_length=64, **COMMON)
        load = AutoModelForSequenceClassification.from_pretrained
        model = load(subject.folder, num_labels=1, trust_remote_code=True)
        return losses_fall(losses_of(trl.RewardTrainer(model, args=args, train_dataset=data, **options)))

    return {"DPO": dpo, "KTO": kto, "reward": reward}


@client("TRL, online", "trl", seconds=400)
def run_online(subject: Subject):
    """GRPO and RLOO with a penalty by the reference model: two steps of generated answers and a reward by length."""
    import datasets
    import trl

    data = datasets.Dataset.from_dict({"prompt": subject.texts(8)})
    options = COMMON | {"max_steps": 2, "num_generations": 4, "max_completion_length": 8, "beta": 0.1}

    def train(kind: str) -> str:
        args = getattr(trl, f"{kind}Config")(str(subject.out), **options)
        trainer = getattr(trl, f"{kind}Trainer")(
            subject.load(),
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            args=args,
            train_dataset=data,
            processing_class=subject.tokenizer,
        )
        return f"{len(losses_of(trainer))} steps"

    return {"GRPO": partial(train, "GRPO"), "RLOO": partial(train, "RLOO")}
