"""Fine-tune a LoRA on a pruned model with peft and TRL, so that it learns to answer from the tokens that are kept.

For a 7B checkpoint: MODEL = "llava-hf/llava-1.5-7b-hf", dtype=torch.bfloat16 in `from_pretrained`, bf16=True,
use_cpu=False and a rate near 1e-4 in SFTConfig, thousands of rows, and the method and budget that you will deploy.
Pruned prompts are shorter, so a step needs less memory and time as well.
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

import tokenprune
from tokenprune.evals.models.load import model_source
from tokenprune.evals.pocket import suite

MODEL = model_source("pocket-llava")
METHOD, KEEP, STEPS, ROWS = "uniform", 64, 4, 3

torch.manual_seed(0)
model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(MODEL)
lora = LoraConfig(r=8, lora_alpha=16, target_modules=r".*language_model.*\.(q_proj|v_proj)")
model = get_peft_model(model, lora)

rows = [  # signs of training scenes, which 64 tokens spread over the picture hardly show; yours are thousands of rows
    {
        "images": [row["image"]],
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }
    for row in suite.load("train", scenes=ROWS)
    if row["family"] == "read"
]

handle = tokenprune.apply(model, METHOD, keep=KEEP)  # after get_peft_model, before the trainer
with tempfile.TemporaryDirectory() as folder:
    settings = SFTConfig(
        folder, max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=2e-3, lr_scheduler_type="constant",
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
        max_length=None,
    )  # fmt: skip
    trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=processor)
    trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print("loss by step:", ", ".join(f"{loss:.2f}" for loss in losses))
print(handle.report())
handle.remove()  # the adapter stays: model.save_pretrained(folder) writes it
