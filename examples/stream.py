"""Stream the answer of a pruned model word by word.

For a 7B checkpoint: MODEL = "llava-hf/llava-1.5-7b-hf", dtype=torch.bfloat16 and device_map="cuda" in
`from_pretrained`, `.to(model.device, torch.bfloat16)` behind the processor's call, and a longer max_new_tokens.
"""

import threading

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer

import tokenprune
from tokenprune.evals.models.load import model_source
from tokenprune.evals.tasks.load import load_task

MODEL = model_source("pocket-llava")

model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(MODEL)
sample = next(load_task("pocket").load(4, 5))
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}]
text = processor.apply_chat_template(turn, add_generation_prompt=True)
inputs = processor(text=text, images=sample.image, return_tensors="pt")

streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
handle = tokenprune.apply(model, "vtc_cls@64")  # before the thread starts, and removed after it has ended
failed: list[BaseException] = []


def generate() -> None:
    """Runs beside the loop below. An error ends the stream, or the loop would wait for ever."""
    try:
        model.generate(**inputs, max_new_tokens=8, do_sample=False, streamer=streamer)
    except BaseException as error:
        failed.append(error)
        streamer.end()


thread = threading.Thread(target=generate)
thread.start()
print(sample.question, end="")
for piece in streamer:
    print(piece, end="", flush=True)
print()
thread.join()
print(f"{len(handle.kept[0][0])} visual tokens were kept")
handle.remove()
if failed:
    raise failed[0]
