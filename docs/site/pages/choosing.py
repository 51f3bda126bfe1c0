"""What the leaderboards say, in tables that docs/choosing.md and docs/faq.md ask for by name."""

from __future__ import annotations

from collections.abc import Callable

from pages.boards import BOARDS, CONTROLS, REFERENCE, Board, accuracy, against, budget_words, percent, point_name
from tokenprune.commands._methods import facts

SHOWN = 6


def _link(label: str) -> str:
    return f"[`{label}`](methods/{label.partition('(')[0]}.md)"


def _is_method(row: dict[str, str]) -> bool:
    return row["method"] not in (*CONTROLS, REFERENCE, "none")


def best(board: Board) -> str:
    """For each budget: the best method, what is not told apart from it, and the best control."""
    lines = [
        f"**{board.title}**: unpruned {accuracy(board.unpruned)} percent of {board.unpruned['n']} questions.", "",
        "| budget | best here | accuracy, % | not told apart from it, the fastest first | best control |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for entry in board.defaults:
        keep = next(keep for keep in board.budgets if float(keep) == float(entry["keep"]))
        rows = [row for row in board.overall if row["keep"] == keep]
        row = board.at(entry["best"], keep)
        others = [label for label in entry["recommended"] if label != entry["best"]]
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        control = max((one for one in rows if one["method"] in CONTROLS), key=lambda one: float(one["accuracy"]))
        lines.append(
            f"| {budget_words(keep, row)} | {_link(entry['best'])} | {accuracy(row)} | "
            f"{', '.join(map(_link, others[:SHOWN])) or 'none'}{more} | {_link(point_name(control))} {accuracy(control)} |"
        )
    return "\n".join([*lines, "", f"[All methods and columns](leaderboards/{board.file}.md)", ""])


def boards() -> str:
    """`best` of each board."""
    return "\n".join(best(board) for board in BOARDS)


def losses() -> str:
    """For each board and budget: how many methods are shown to lose against the unpruned model, and what FLOPs it buys."""
    lines = [
        "| model and pictures | budget | methods shown to lose accuracy | the best keeps, % of unpruned | FLOPs, % |"
    ]
    lines += ["|---|---|---|---|---|"]
    for board in BOARDS:
        for keep in board.budgets:
            rows = [row for row in board.overall if row["keep"] == keep and _is_method(row)]
            lost = [row for row in rows if float(row["vs_unpruned_high"]) < 0]
            top = max(rows, key=lambda row: float(row["accuracy"]))
            lines.append(
                f"| {board.title} | {budget_words(keep, top)} | {len(lost)} of {len(rows)} | "
                f"{percent(top['relative'], 0)} (`{point_name(top)}`) | {percent(top['flops_share'], 0)} |"
            )
    return "\n".join(lines)


def slower() -> str:
    """Methods with points whose prefill took at least as long as the unpruned model's, as a table."""
    lines = [
        "| model | method | prefill, % of unpruned, by budget | selection, % of unpruned prefill |",
        "|---|---|---|---|",
    ]
    for board in BOARDS:
        timed = [row for row in board.overall if row["keep"] and row["prefill_to_unpruned"]]
        rows = [row for row in timed if float(row["prefill_to_unpruned"]) >= 1]
        for label in dict.fromkeys(map(point_name, rows)):
            mine = [row for row in rows if point_name(row) == label]
            said = ", ".join(f"{percent(row['prefill_to_unpruned'], 0)} at {_short(row['keep'])}" for row in mine)
            shares = [100 * float(row["selection_to_unpruned_prefill"]) for row in mine]
            among = f"{min(shares):.0f} to {max(shares):.0f}" if len(mine) > 1 else f"{shares[0]:.0f}"
            lines.append(f"| {board.model} | {_link(label)} | {said} | {among} |")
    return "\n".join(lines)


def _short(keep: str) -> str:
    return keep if float(keep) >= 1 else f"{100 * float(keep):g} %"


def text_aware() -> str:
    """Accuracy, time and FLOPs of selection, of methods that read the question and of those that do not."""
    parts = []
    for board in BOARDS:
        keep = board.budgets[2]
        rows = [row for row in board.overall if row["keep"] == keep and _is_method(row)]
        rows.sort(key=lambda row: -float(row["accuracy"]))
        lines = [
            f"**{board.title}**, {budget_words(keep, rows[0])}, the best four of each kind:", "",
            "| method | reads the question | accuracy, % | against random, points | mean tokens over the layers | selection, % of FLOPs | "
            "selection, % of unpruned prefill |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for kind, words in ((True, "yes"), (False, "no")):
            for row in [row for row in rows if bool(facts(row["method"])["text_aware"]) is kind][:4]:
                share = float(row["gflops_selection"]) / float(board.unpruned["gflops_total"])
                lines.append(
                    f"| {_link(point_name(row))} | {words} | {accuracy(row)} | {against(row, 'random')} | "
                    f"{float(row['equivalent_tokens']):.0f} | {percent(str(share))} | "
                    f"{percent(row['selection_to_unpruned_prefill']) or 'not timed'} |"
                )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def kinds() -> str:
    """The best methods by kind of question, for boards that have kinds, at a ninth of the tokens."""
    parts = []
    for board in (BOARDS[0], BOARDS[2]):
        keep = board.budgets[2]
        rows = [row for row in board.rows if row["keep"] == keep and row["family"] != "overall"]
        unpruned = {row["family"]: row for row in board.rows if row["method"] == "none"}
        lines = [
            f"**{board.title}**, {budget_words(keep, rows[0])}:", "",
            "| questions | how many | unpruned, % | best methods, % | random, % |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for kind in dict.fromkeys(row["family"] for row in rows):
            mine = [row for row in rows if row["family"] == kind]
            methods = sorted((row for row in mine if _is_method(row)), key=lambda row: -float(row["accuracy"]))
            top = [row for row in methods if row["accuracy"] == methods[0]["accuracy"]]
            more = f" and {len(top) - 4} more" if len(top) > 4 else ""
            random = next(row for row in mine if row["method"] == "random")
            lines.append(
                f"| {kind} | {random['n']} | {percent(unpruned[kind]['accuracy'], 0)} | {percent(top[0]['accuracy'], 0)}: "
                f"{', '.join(_link(point_name(row)) for row in top[:4])}{more} | {percent(random['accuracy'], 0)} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def video() -> str:
    """What the video questions of pocket-qwen say, at each budget."""
    board = BOARDS[2]
    lines = ["| budget | questions | unpruned, % | methods, best first, % |", "|---|---|---|---|"]
    unpruned = next(row for row in board.rows if row["family"] == "video" and row["method"] == "none")
    for keep in board.budgets:
        rows = [row for row in board.rows if row["family"] == "video" and row["keep"] == keep]
        special = ("evs", "holitom", "vidcom2", "quota", "random", "uniform", "vtc_cls", "divprune", "cdpruner")
        mine = sorted((row for row in rows if row["method"] in special), key=lambda row: -float(row["accuracy"]))
        said = ", ".join(f"`{point_name(row)}` {percent(row['accuracy'], 0)}" for row in mine)
        lines.append(f"| {100 * float(keep):g} % | {unpruned['n']} | {percent(unpruned['accuracy'], 0)} | {said} |")
    return "\n".join(lines)


def one_line() -> str:
    """For each board one sentence at a ninth of the tokens."""
    lines = []
    for board in BOARDS:
        keep = board.budgets[2]
        entry = next(entry for entry in board.defaults if float(entry["keep"]) == float(keep))
        row = board.at(entry["best"], keep)
        random = next(one for one in board.overall if one["method"] == "random" and one["keep"] == keep)
        alike = len(entry["recommended"]) - 1
        lines.append(
            f"- {board.title}, at {budget_words(keep, row)}: {_link(entry['best'])}, {accuracy(row)} percent, where the "
            f"unpruned model has {percent(board.unpruned['accuracy'])} and random selection {accuracy(random)}; "
            f"{'no other is' if not alike else f'{alike} others are'} not told apart from it."
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "boards": boards, "losses": losses, "slower": slower, "text-aware": text_aware, "kinds": kinds, "video": video,
    "one-line": one_line,
}  # fmt: skip
