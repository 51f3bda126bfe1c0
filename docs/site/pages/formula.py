"""Formulas as docstrings write them, in plain text, set for a browser: Greek letters, indices, powers. No scripts."""

from __future__ import annotations

import html
import re

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "eta": "η", "theta": "θ", "kappa": "κ",
    "lambda": "λ", "mu": "μ", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ", "phi": "φ", "omega": "ω",
}  # fmt: skip
UPRIGHT = frozenset(("ln", "if", "in", "of", "or", "by", "to", "at", "is", "as", "on", "no"))
"""Short words that are no names of quantities."""
SIGNS = {
    "<=": "≤", ">=": "≥", "!=": "≠", "->": "→", "<-": "←", "~=": "≈", " - ": " − ", " * ": " · ", "||": "‖",
}  # fmt: skip
TOKEN = re.compile(
    r"(?P<low>_(?:\{[^}]*\}|[A-Za-z0-9]+))|(?P<high>\^(?:\{[^}]*\}|\([^)]*\)|[A-Za-z0-9]+))"
    r"|(?P<quote>\"[^\"]*\")|(?P<word>[A-Za-z][A-Za-z0-9]*'*)|(?P<bracket>\[[A-Z]+\])"
    r"|(?P<sign><=|>=|!=|->|<-|~=|\|\|| - | \* )|(?P<other>.)"
)


def typeset(line: str) -> str:
    """One line of a formula as HTML."""
    parts = []
    for match in TOKEN.finditer(line):
        kind, text = match.lastgroup, match[0]
        if kind == "low":
            parts.append(f"<sub>{typeset(_inner(text))}</sub>")
        elif kind == "high":
            parts.append(f"<sup>{typeset(_inner(text))}</sup>")
        elif kind == "word":
            parts.append(_word(text))
        elif kind == "sign":
            parts.append(SIGNS[text])
        else:
            parts.append(html.escape(text))
    return "".join(parts)


def _inner(text: str) -> str:
    inner = text[1:]
    return inner[1:-1] if inner[0] in "{(" else inner


def _word(text: str) -> str:
    bare = text.rstrip("'")
    marks = "′" * (len(text) - len(bare))
    if bare in GREEK:
        return f"<i>{GREEK[bare]}</i>{marks}"
    if bare == "sum":
        return "Σ"
    if len(bare) <= 2 and bare not in UPRIGHT and not bare.isupper():
        return f"<i>{bare}</i>{marks}"
    if len(bare) == 1:
        return f"<i>{bare}</i>{marks}"
    return bare + marks


def block(lines: list[str]) -> str:
    """An indented block of a docstring as a box with formulas, a line each."""
    rows = "".join(f"<div>{re.sub(r' {2,}', '&emsp;', typeset(line))}</div>" for line in lines)
    return f'<div class="formula">{rows}</div>'
