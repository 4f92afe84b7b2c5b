"""Words of 16 codes spread into float16 numbers that a dot takes, without arithmetic on any of them.

Number c = 4a + b of a word is cut out with a mask that leaves it at bits 2b and up of a 16-bit pattern: as float16 that
is ``code · 4^b · 2^-24`` exactly, as the pattern lies in the part of float16 below its normal numbers, whose step is
2^-24 (tensor cores keep such numbers). What meets the number in the dot is multiplied by 4^-b instead.

A word's 16 numbers stay in the registers of its thread, so they go through shared memory 16 bytes at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

PAIRS = tl.constexpr(0)  # ORDER: a plane of two bits a code
SINGLES = tl.constexpr(1)  # of one bit, in the order of ``transform_coding.py``
SINGLES_IN_TURN = tl.constexpr(2)  # of one bit, in the order of ``layout.py``


@triton.jit
def token_bits(number):
    """2b of number 4a + b of a word: log2 of the factor that it has in a dot."""
    return number % 4 * 2


@triton.jit
def _number(words, mask, c: tl.constexpr, ORDER: tl.constexpr, LIFT: tl.constexpr):
    a: tl.constexpr = c // 4
    b: tl.constexpr = c % 4
    singles_at: tl.constexpr = 4 * (a % 2 * 2 + a // 2) + b if ORDER == SINGLES else c
    right: tl.constexpr = (2 * c if ORDER == PAIRS else singles_at) - 2 * b - LIFT
    words = words >> right if right >= 0 else words << -right
    return (words & (mask << (2 * b))).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _two(words, mask, c: tl.constexpr, ORDER: tl.constexpr, LIFT: tl.constexpr):
    return tl.join(_number(words, mask, c, ORDER, LIFT), _number(words, mask, c + 8, ORDER, LIFT))


@triton.jit
def _four(words, mask, c: tl.constexpr, ORDER: tl.constexpr, LIFT: tl.constexpr):
    return tl.join(_two(words, mask, c, ORDER, LIFT), _two(words, mask, c + 4, ORDER, LIFT))


@triton.jit
def _eight(words, mask, c: tl.constexpr, ORDER: tl.constexpr, LIFT: tl.constexpr):
    return tl.join(_four(words, mask, c, ORDER, LIFT), _four(words, mask, c + 2, ORDER, LIFT))


@triton.jit
def spread(words, mask, ORDER: tl.constexpr, LIFT: tl.constexpr):
    """(M, N) int32 words → (M, 16·N) float16, times 2^LIFT.

    Args:
        mask: of a code at bit 0, after the lift; a tensor that broadcasts to ``words``, or a number.
    """
    x = tl.join(_eight(words, mask, 0, ORDER, LIFT), _eight(words, mask, 1, ORDER, LIFT))
    return tl.reshape(x, (words.shape[0], words.shape[1] * 16))
