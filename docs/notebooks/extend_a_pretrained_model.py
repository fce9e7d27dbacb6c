# %% [markdown]
# # Extend a pretrained model
#
# A pretrained Llama becomes a model of this family, with the same logits; its rotation is then changed for a longer context, and dropped, and the loss by length says what that did.
# With SmolLM2-135M about ten minutes on two CPU cores, and a download of 270 MB.

# %%
# pip install "hf_relpos[sample] @ git+<address of the repository>"
MODEL = "HuggingFaceTB/SmolLM2-135M"
LENGTHS = [512, 2048, 4096]
TRAIN_LENGTH = 2048
WINDOWS = 4
STEPS = 20

# %% [markdown]
# ## Import
# The weights are taken over one by one; nothing of another family's code is patched.

# %%
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_relpos

tokenizer = AutoTokenizer.from_pretrained(MODEL)
original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
model = hf_relpos.import_model(original)
print(model.config.pos_embedding_type, f"{model.num_parameters():,} parameters")

ids = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")["input_ids"]
with torch.no_grad():
    print("largest difference of the logits:", (model(ids).logits - original(ids).logits).abs().max().item())
model.save_pretrained("output/imported")
tokenizer.save_pretrained("output/imported")

# %% [markdown]
# ## The loss by length, before and after
# The same weights with other rotations: as it is, YaRN and position interpolation for twice the length, and none at all.

# %%
from hf_relpos import RelPosConfig, RelPosForCausalLM
from hf_relpos.data.corpus import load_sotu
from hf_relpos.evaluation.loss_by_length import evaluate_lengths

texts = load_sotu().splits["validation"]["text"]
documents = [tokenizer(text)["input_ids"] for text in texts]

# a rotation for twice the length
base = model.config.rope_parameters
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": TRAIN_LENGTH}
LINEAR = {"rope_type": "linear", "factor": 2.0}
CHANGES = {
    "as it is": {},
    "yarn": {"rope_parameters": {"rope_theta": base["rope_theta"], **YARN}},
    "interpolation": {"rope_parameters": {"rope_theta": base["rope_theta"], **LINEAR}},
    "no positions": {"pos_embedding_type": "none"},
}


def losses(model):
    found = evaluate_lengths(model, documents, LENGTHS, train_length=TRAIN_LENGTH, max_windows=WINDOWS)
    return {length: found["lengths"][str(length)]["loss"] for length in LENGTHS}


def changed_model(change):
    """The imported weights under another configuration."""
    changed = RelPosForCausalLM(RelPosConfig.from_pretrained("output/imported", **change))
    changed.load_state_dict(model.state_dict())
    return changed


results = {}
for name, change in CHANGES.items():
    results[name] = losses(changed_model(change))
    print(name, {length: round(loss, 3) for length, loss in results[name].items()})

# %% [markdown]
# ## A few steps heal it
# Without positions the loss is far off at first. Some steps of training bring it down: DroPE takes some hundred of them, these few only show the direction.

# %%
tokens = [token for document in documents for token in document]
rows = torch.tensor(tokens[: len(tokens) // 128 * 128]).view(-1, 128)
changed = changed_model({"pos_embedding_type": "none"}).train()
optimizer = torch.optim.AdamW(changed.parameters(), lr=1e-4)
for step in range(STEPS):
    batch = rows[torch.randint(len(rows), (2,))]
    loss = changed(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % max(1, STEPS // 4) == 0:
        print(step, round(loss.item(), 3))

# %% [markdown]
# For real, with validation, checkpoints and LoRA: `hf-relpos finetune`, see the guide to pretrained models.
