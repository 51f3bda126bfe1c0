"""The entry point `lmms_eval.models`: what lmms-eval learns of us when it starts."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The model `tokenprune`, for messages (chat) and for a text with separate pictures (simple, `--force_simple`)."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    classes = "tokenprune.evals.lmms.model"
    return ModelManifest("tokenprune", simple_class_path=f"{classes}.Simple", chat_class_path=f"{classes}.Chat")
