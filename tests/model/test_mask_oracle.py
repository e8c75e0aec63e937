"""The block-diagonal mask, element by element as LLaMA-Factory's own function makes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import assets
from sftx.model.packed_attention import block_mask


@lru_cache
def prepare_4d_attention_mask() -> Callable[..., Any]:
    return assets.function(assets.path("llamafactory", "collator.py"), "prepare_4d_attention_mask", torch=torch)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=3),
    st.integers(0, 4),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_mask_is_llama_factorys(rows: list[list[int]], padding: int, dtype: torch.dtype) -> None:
    length = max(sum(row) for row in rows) + padding
    numbers_BT = torch.zeros(len(rows), length, dtype=torch.int64)
    for b, row in enumerate(rows):
        at = 0
        for number, size in enumerate(row, 1):
            numbers_BT[b, at : at + size] = number
            at += size
    assert torch.equal(block_mask(numbers_BT, dtype), prepare_4d_attention_mask()(numbers_BT, dtype))
