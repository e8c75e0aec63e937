"""Rows with everything that `sftx inspect` can show: markup, control characters, weights, rows that no parser reads."""

from __future__ import annotations

from typing import Any

ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Say <script>alert(1)</script> and <|im_end|>, in 中文 with a 🦙\tplease"},
            {"role": "assistant", "content": "No.\n\nI will not \x1b[31mdo\x07 that, 不行 🦙🦙."},
        ]
    },
    {"messages": [{"role": "user", "content": "a question that nobody answers"}]},
    {"what": "no format <!-- </script>"},
    {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "the first answer", "weight": 0.5},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "the second answer", "train": False},
            {"role": "user", "content": "three", "train": True},
            {"role": "assistant", "content": "   the third   answer"},
        ]
    },
    {"text": "Plain text, as in 预训练."},
    {"input_ids": [65, 66, 67, 68], "loss_mask": [False, False, True, True]},
    {"messages": [{"role": "user", "content": "x " * 300}, {"role": "assistant", "content": "y " * 200}]},
]
