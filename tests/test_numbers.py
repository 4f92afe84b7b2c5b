"""Answers as people, Markdown and LaTeX write them, and what of lm_eval's metric stays as it is."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from rotatekv.evals import gsm8k
from rotatekv.evals.numbers import normalise

WRITTEN = [
    (r"\boxed{1{,}234}", "1234"),
    (r"$\boxed{1\,234}$", "1234"),
    (r"\boxed{\$1,234.50}", "1234.5"),
    (r"\boxed{42\text{ dollars}}", "42"),
    (r"\boxed{\text{42}}", "42"),
    (r"\boxed{\mathbf{-7}}", "-7"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{-\dfrac{3}{4}}", "-0.75"),
    (r"\boxed{2\frac{1}{2}}", "2.5"),
    (r"\boxed{\frac12}", "0.5"),
    (r"\boxed{\frac{1}{3}}", "1/3"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{1.5 \times 10^{3}}", "1500"),
    (r"\boxed{1 234}", "1234"),
    ("$1,234.50", "1234.5"),
    ("1 234", "1234"),
    ("12 345 678 people", "12345678"),
    ("1\u202f234\u202f567", "1234567"),
    ("1\u00a0234 €", "1234"),
    ("1'234", "1234"),
    ("1_000_000", "1000000"),
    ("1,000,000 dollars", "1000000"),
    ("\u22125", "-5"),
    ("–5", "-5"),
    ("_-5_", "-5"),
    ("-€5", "-5"),
    ("€-5.50", "-5.5"),
    ("½", "0.5"),
    ("2½ hours", "2.5"),
    ("3/4", "0.75"),
    ("2 1/2", "2.5"),
    ("6/4", "1.5"),
    ("2/6", "1/3"),
    ("1/0", "1"),
    ("1.5e3", "1500"),
    ("2E-2", "0.02"),
    ("1.5 × 10^3", "1500"),
    ("**42**", "42"),
    ("**42.**", "42"),
    ("`42`", "42"),
    ("42.", "42"),
    ("50%", "50"),
    ("１２３４", "1234"),
    ("٤٢", "42"),
    ("9/11/2001", "9"),
    ("12:30", "12"),
    ("3–5 apples", "3"),
    ("1e99999", "1"),
]


@pytest.mark.parametrize("before", ["The answer is ", "The answer is: ", "2 + 3 = 5. The answer is\n"])
@pytest.mark.parametrize(("written", "number"), WRITTEN)
def test_an_answer_as_it_is_written(written, number, before):
    assert gsm8k.extract_number(before + written) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"So it is \boxed{42}. Check: 40 + 2 = 42, as 6 * 7.", "42"),
        (r"\boxed{5} at first, then \boxed{6}, after 7 steps", "6"),
        (r"\boxed{5}. The answer is 6.", "6"),
        (r"\boxed{\text{yes}} for 3 of them", "3"),
        ("They need 12 buses and 7 vans: 3/4 of 24", "24"),
        ("He is left with 1\u202f234.", "1234"),
        ("He paid 20, 5 100 dollar bills", "100"),  # two numbers: only an answer is read as one
        ("Half of it is 2½.", "2.5"),
        ("20 - 12", "12"),
        ("x}-4", "4"),
        ("The answer is twelve, from 3 * 4", "3"),
        ("twelve", None),
        (r"\frac{a}{b}", None),
        ("", None),
    ],
)
def test_a_text_without_the_words_gives_the_boxed_or_the_last_number(text, number):
    assert gsm8k.extract_number(text) == number


def test_fractions_and_powers_of_ten_have_one_spelling_per_value():
    generator = random.Random(0)
    for _ in range(300):
        above, below = generator.randint(0, 5000), generator.randint(1, 400)
        value = Fraction(above, below)
        spelling = normalise(f"{above}/{below}")
        assert Fraction(spelling) == value and spelling == normalise(f"{7 * above}/{7 * below}")
        ends = 10**9 % value.denominator == 0
        assert ("/" in spelling) != ends
        assert not ends or normalise(spelling) == spelling == normalise(f"{float(1000 * value):.9f}e-3")


def test_gold_answers_of_the_data_set_are_read_as_before():
    for answer, number in (("#### 1,234", "1234"), ("#### -5.0", "-5"), ("#### 10000", "10000"), ("#### 0.5", "0.5")):
        assert gsm8k.gold_number(f"some work = 77\n{answer}", 0) == number
