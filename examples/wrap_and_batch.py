"""Prune a stock model and ask it about several pictures at once.

For a 7B checkpoint: MODEL = "llava-hf/llava-1.5-7b-hf", dtype=torch.bfloat16 and device_map="cuda" in
`from_pretrained`, `.to(model.device, torch.bfloat16)` behind the processor's call, and questions of your own.
"""

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenprune
from tokenprune.evals.models.load import model_source
from tokenprune.evals.tasks.load import load_task

MODEL = model_source("pocket-llava")  # a folder; a hub id goes here as well

model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(MODEL)
processor.tokenizer.padding_side = "left"  # generation wants the prompts' ends to stand in one column

samples = list(load_task("pocket").load(0, 4))  # drawn pictures with questions that pocket-llava knows
turns = [
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}] for sample in samples
]
texts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
pictures = [[sample.image] for sample in samples]
inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")


def answers() -> list[str]:
    """Greedy answers to the batch."""
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


whole = answers()
with tokenprune.applied(model, "vtc_cls", keep=64) as handle:  # 64 tokens of each picture; 0.11 would be a fraction
    pruned = answers()
    report = handle.report()

for sample, before, after in zip(samples, whole, pruned):
    print(f"{sample.question:60} {sample.answer:10} unpruned: {before:10} 64 tokens: {after}")
print(report)
print("the model is as it was:", answers() == whole)
