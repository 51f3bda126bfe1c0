"""Write what a pocket model can do into its card: `python -m tokenprune.evals.pocket_training.card pocket-qwen`.

The numbers come from the JSON file that `tokenprune.evals.pocket_training.measure` wrote; nobody types one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenprune.evals.pocket_training.measure import BUDGETS, DATA
from tokenprune.evals.report.readme import between

CONDITIONS = {
    "1_answers": "it answers: at least 90 percent overall and 80 in each local family, and not without the picture",
    "2_headroom": "there is headroom: random selection loses, the oracle hardly",
    "3_cls": "methods by [CLS] attention (without [CLS]: received attention) beat random",
    "4_stable": "two halves of the questions rank the methods alike",
}


def card_table(result: dict[str, Any], tight: int | float) -> str:
    """Accuracies in percent by family, and which conditions are met.

    Args:
        result: what `measure.conditions` returned.
        tight: the smaller of its two budgets.
    """
    at = f"{tight} tokens" if isinstance(tight, int) else f"{100 * tight:g} percent of the tokens"
    rows = {"all tokens": "none", f"oracle, {at}": f"oracle@{tight}", f"random, {at}": f"random@{tight}"}
    rows |= {f"vtc_cls, {at}": f"vtc_cls@{tight}", "noise for a picture": "noise"}
    columns = [name for name in result["accuracy"]["none"] if name != "local"]
    lines = [f"On {result['questions']} test questions, in percent:", ""]
    lines += ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for title, label in rows.items():
        found = result["accuracy"][label]
        lines.append(f"| {title} | " + " | ".join(f"{found[name]:.1f}" for name in columns) + " |")
    lines += ["", "What the suite asks of its model (`python -m tokenprune.evals.pocket_training.measure --help`):", ""]
    for name, text in CONDITIONS.items():
        verdict = "met" if result["conditions"][name]["met"] else "**not met**"
        lines.append(f"- {verdict}: {text}")
    return "\n".join(lines)


def main() -> None:
    """Rewrite the card in place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(BUDGETS))
    model = parser.parse_args().model
    result = json.loads((DATA / f"{model.replace('-', '_')}_conditions.json").read_text(encoding="utf-8"))
    card = Path(__file__).parents[1] / "pocket" / "models" / model / "README.md"
    text = between(card.read_text(encoding="utf-8"), "conditions", card_table(result, BUDGETS[model][0]))
    card.write_text(text, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
