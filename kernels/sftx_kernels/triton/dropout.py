"""`keep_mask` computes dropout's mask inside the kernels that use it; the mask is never stored.

Philox4x32 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011) is a function from a counter and a
key to 128 random bits. With (column // 8, row) as the counter and the seed as the key, an element's 16 bits do not
depend on the tile, the kernel or the width of the matrix. 7 is the smallest number of rounds that passed all of
BigCrush in the paper (table 2).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_mask(seed, first_row, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return int1 [ROWS, COLUMNS], True where an element is kept. first_column and COLUMNS are multiples of 8."""
    EIGHTHS: tl.constexpr = COLUMNS // 8
    zero = tl.zeros((ROWS, EIGHTHS), tl.int32)
    column = zero + (first_column // 8 + tl.arange(0, EIGHTHS))[None, :]
    row = zero + (first_row + tl.arange(0, ROWS))[:, None]
    word0, word1, word2, word3 = tl.philox(seed, column, row, zero, zero, n_rounds=7)
    pair0 = _halves(word0, threshold)
    pair1 = _halves(word1, threshold)
    pair2 = _halves(word2, threshold)
    pair3 = _halves(word3, threshold)
    # Each join adds the fastest dimension: element 4 h + w of the eight is half h of word w.
    joined = tl.join(tl.join(pair0, pair2), tl.join(pair1, pair3))
    return tl.reshape(joined, (ROWS, COLUMNS))


@triton.jit
def _halves(word, threshold):
    """Return [..., 2]: True where the low and the high 16 bits are at or over the threshold."""
    word = word.to(tl.uint32, bitcast=True)
    return tl.join((word & 0xFFFF).to(tl.int32) >= threshold, (word >> 16).to(tl.int32) >= threshold)
