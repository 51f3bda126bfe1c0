"""Notebooks run from top to bottom without Jupyter: `python tests/_notebook.py examples/first_steps.ipynb` writes what
the cells say into the file.

A cell's output is what it prints and, as in Jupyter, the value of its last line, a picture as PNG. What a notebook may
hold beyond that (magics, widgets) is refused.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run_notebook(path: Path) -> dict[str, Any]:
    """The notebook with the outputs of this run in it."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell["execution_count"] = count
            cell["outputs"] = _outputs("".join(cell["source"]), names, f"{path.name}, cell {count}", count)
    return notebook


def _outputs(source: str, names: dict[str, Any], where: str, count: int) -> list[dict[str, Any]]:
    if source.lstrip().startswith(("%", "!")):
        raise ValueError(f"{where} begins with a magic, which only Jupyter knows.")
    parsed = ast.parse(source, where)
    last = parsed.body.pop() if parsed.body and isinstance(parsed.body[-1], ast.Expr) else None
    printed = io.StringIO()
    value = None
    with contextlib.redirect_stdout(printed):
        exec(compile(parsed, where, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(True)})
    if value is not None:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(True)}
        if hasattr(value, "_repr_png_"):
            encoded = base64.b64encode(value._repr_png_()).decode("ascii")
            data = {"image/png": encoded, "text/plain": [f"<{type(value).__name__} {value.size}>"]}
        outputs.append({"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    return outputs


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(json.dumps(run_notebook(file), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
