# %% [markdown]
# # Which position embedding? Three schemes on one text
#
# Three small language models that differ in one config field, `pos_embedding_type`, trained at 128 tokens with the plain `Trainer` and read at up to 1024.
# About five minutes on two CPU cores. `hf-relpos compare` does the same with several seeds, a learning rate for each scheme and intervals; one seed shows how it works and decides nothing.

# %%
# pip install "hf_relpos[sample] @ git+<address of the repository>"
STEPS = 300
SCHEMES = ["none", "rotary", "alibi"]
LENGTHS = [128, 256, 512, 1024]
WINDOWS = 40

# %% [markdown]
# ## The text
# The built-in corpus: messages on the State of the Union. Some of them are held out. A byte-level BPE is trained on the rest.

# %%
from hf_relpos.data.corpus import load_sotu
from hf_relpos.data.tokens import train_tokenizer

corpus = load_sotu()
tokenizer = train_tokenizer(corpus, vocab_size=1024)
documents = {name: [tokenizer(text)["input_ids"] for text in split["text"]] for name, split in corpus.splits.items()}
print({name: f"{len(split)} documents, {sum(map(len, split)):,} tokens" for name, split in documents.items()})

# %% [markdown]
# ## Three models
# Everything but the scheme is equal: the sizes, the data and its order, the seed.

# %%
import torch
from transformers import Trainer, TrainingArguments, set_seed

from hf_relpos import RelPosConfig, RelPosForCausalLM

tokens = torch.tensor([token for document in documents["train"] for token in document])
rows = tokens[: len(tokens) // 128 * 128].view(-1, 128)
dataset = [{"input_ids": row, "labels": row} for row in rows]


def train(scheme):
    set_seed(42)
    config = RelPosConfig(
        pos_embedding_type=scheme,
        vocab_size=len(tokenizer),
        num_hidden_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        hidden_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    arguments = TrainingArguments(
        output_dir=f"output/{scheme}",
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=STEPS // 10,
        logging_steps=max(1, STEPS // 5),
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    model = RelPosForCausalLM(config)
    Trainer(model=model, args=arguments, train_dataset=dataset).train()
    return model


models = {scheme: train(scheme) for scheme in SCHEMES}

# %% [markdown]
# ## Beyond the training length
# Every length is scored on the same target tokens: what changes is the context that a model sees.

# %%
from hf_relpos.evaluation.loss_by_length import evaluate_lengths

results = {}
for scheme, model in models.items():
    found = evaluate_lengths(model, documents["validation"], LENGTHS, train_length=128, max_windows=WINDOWS)
    results[scheme] = {length: found["lengths"][str(length)]["perplexity"] for length in LENGTHS}
    print(scheme, {length: round(value, 1) for length, value in results[scheme].items()})

# %%
import matplotlib.pyplot as plt

for scheme, perplexities in results.items():
    change = [100 * (perplexities[length] / perplexities[128] - 1) for length in LENGTHS]
    plt.plot(LENGTHS, change, marker="o", label=scheme)
plt.xscale("log", base=2)
plt.xlabel("evaluation length (tokens)")
plt.ylabel("change of perplexity (%)")
plt.legend()
plt.show()

# %% [markdown]
# ## What attention adds
# ALiBi's bias is a line for each head; `linear_cpb` would show what a network learned.

# %%
bias = models["alibi"].model.distance_bias(256)[0].detach().cpu()
plt.plot(bias.T)
plt.xlabel("distance (tokens)")
plt.ylabel("bias of each head")
plt.show()

# %% [markdown]
# With the same commands on your own text: `hf-relpos compare --text my_texts/ --schemes none rotary alibi --budget 20min`.
