"""Functions of the task pocket_lmms."""

import io

from PIL import Image


def visuals(doc):
    return [Image.open(io.BytesIO(doc["image"]["bytes"])).convert("RGB")]


def results(doc, answers):
    from tokenprune.evals.pocket.suite import answer_matches

    said = answers[0]
    right = float(answer_matches(said, doc["answer"]))
    return {"pocket_accuracy": right, "pocket_yes_ratio": {"said": said.strip().lower()}}


def yes_ratio(found):
    return sum(one["said"] == "yes" for one in found) / len(found)
