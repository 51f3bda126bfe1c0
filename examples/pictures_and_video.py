"""Several pictures in one prompt, and a video: the budget holds for each of them.

For a larger checkpoint: MODEL = "Qwen/Qwen2.5-VL-7B-Instruct", dtype=torch.bfloat16 and device_map="cuda" in
`from_pretrained`, `.to(model.device)` behind the processor's call. `vidcom2`, `holitom` and `quota` were made for long
videos.
"""

import torch
from transformers import AutoModelForImageTextToText

import tokenprune
from tokenprune.evals.models.load import model_source
from tokenprune.evals.models.processor import load_processor
from tokenprune.evals.tasks.load import load_task

MODEL = model_source("pocket-qwen")  # a small Qwen2.5-VL

model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
processor = load_processor(MODEL)  # AutoProcessor does, where torchvision is installed


def ask(content: list[dict], **media: object) -> str:
    """The greedy answer to one turn."""
    turn = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], return_tensors="pt", **media)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


task = load_task("pocket-mixed")
first, second = next(task.load(4, 5)), next(task.load(12, 13))
clip = next(task.load(6, 7))

with tokenprune.applied(model, "divprune", keep=0.25) as handle:
    question = {"type": "text", "text": first.question}
    said = ask([{"type": "image"}, {"type": "image"}, question], images=[first.image, second.image])
    sizes = [len(kept) for kept in handle.kept[0]]  # of each picture of the first prompt
    print(f"two pictures: a quarter of each, {sizes[0]} and {sizes[1]} tokens. {first.question} {said}")
    # pocket-qwen saw one picture a prompt when it was trained, so which of the two it means is its guess

    question = {"type": "text", "text": clip.question}
    metadata = [{"fps": 2.0, "total_num_frames": len(clip.image), "frames_indices": list(range(len(clip.image)))}]
    said = ask([{"type": "video"}, question], videos=[clip.image], video_metadata=metadata, do_sample_frames=False)
    report = handle.report()
    print(f"a video of {len(clip.image)} frames: {report.kept_tokens} of {report.visual_tokens} tokens. ", end="")
    print(f"{clip.question} {said} (right: {clip.answer})")
