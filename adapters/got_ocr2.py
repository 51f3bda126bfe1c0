"""GOT-OCR 2: a SAM tower over a page, over tiles of it, or over the pages of a document.

The processor puts a picture's tiles, or a document's pages, in one unbroken run of placeholders between <img> and
</img>: they are one picture. It has no chat template, because it writes the whole prompt itself when it is given no
text: that form is kept, with the question where its own would stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tokenprune.adapters._generic import Generic
from tokenprune.adapters._tiles import pictures_by_run
from tokenprune.interfaces.visual import Pictures
from tokenprune.registry import register_model

_TEMPLATE = (
    "{{ begin + system + end }}{% for message in messages %}{{ begin + message['role'] + '\n' }}"
    "{% for content in message['content'] %}"
    "{{ picture if content['type'] == 'image' else content['text'] }}{% endfor %}"
    "{{ end }}{% endfor %}{% if add_generation_prompt %}{{ begin + 'assistant\n' }}{% endif %}"
)


@register_model("got_ocr2")
class GotOcr2(Generic):
    """Stock `GotOcr2ForConditionalGeneration`."""

    classes = ("GotOcr2ForConditionalGeneration",)

    @classmethod
    def chat_template(cls, processor: Any) -> str:
        said = {
            "begin": processor.message_start_token,
            "end": processor.message_end_token,
            "system": processor.system_query,
            "picture": f"{processor.img_start_token}{processor.image_token}{processor.img_end_token}\n",
        }
        return "".join(f"{{% set {name} = {text!r} %}}" for name, text in said.items()) + _TEMPLATE

    def pictures(self, kind: str, ids: Tensor | None, places: Sequence[Tensor]) -> Pictures:
        return pictures_by_run(places)
