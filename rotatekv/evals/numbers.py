"""The numbers in a text as people, Markdown and LaTeX write them, in one spelling per value."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

_CURRENCY = "$€£¥₹"
# A minus right behind a digit, a letter or a closing bracket subtracts: "20-12" holds 20 and 12.
_SIGN = r"(?:(?<![^\W_])(?<![)\]}])-)?"
_FRACTION = r"[0-9]{1,15}/[0-9]{0,14}[1-9][0-9]{0,14}(?![0-9/]|\.[0-9])"  # not a date
_DECIMAL = r"(?:[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?"
_NUMBER = re.compile(
    rf"{_SIGN}[{_CURRENCY}]?(?:(?<=[{_CURRENCY}])-)?(?:[0-9]{{1,15}} {_FRACTION}|(?<!/){_FRACTION}|{_DECIMAL})"
)
_THOUSANDS = r"(?<![\w.,/])([1-9][0-9]{{0,2}})([{}])([0-9]{{3}}(?:\2[0-9]{{3}})*)(?![0-9/-])"
_SPACES = "\u00a0\u2009\u202f'’_"  # between thousands; a plain space there says so only where one number is expected
_LATEX = [
    (r"\{([,.])\}", r"\1"),  # 1{,}234
    (r"(?<=[0-9])\\(?:[,;:! ]|thinspace)\s*(?=[0-9]{3})", ""),  # 1\,234
    (rf"\\([{_CURRENCY}%])", r"\1"),
    (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1 "),
    (r"(?<=[0-9])\s*(?=\\[dtc]?frac)", " "),
    (r"\\[dtc]?frac\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))", r"\1\2/\3\4"),
    (r"(?<=[0-9])\s*(?:\\times|\\cdot|[×·*])\s*10\s*\^\s*(?:\{\s*([+-]?[0-9]{1,3})\s*\}|([+-]?[0-9]{1,3}))", r"e\1\2"),
]
_BOXED = re.compile(r"\\f?boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


def first_number(text: str) -> str | None:
    """The first number, normalised, of a text that is to say one: "1 234" is 1234 here. None: no number."""
    text = re.sub(_THOUSANDS.format(" "), _joined, plain(text))
    found = _NUMBER.search(text)
    return normalise(found[0]) if found else None


def last_number(text: str) -> str | None:
    """The last number of a text, normalised; None: no number."""
    numbers = _NUMBER.findall(plain(text))
    return normalise(numbers[-1]) if numbers else None


def boxed(text: str) -> str:
    r"""What stands in the last ``\boxed{…}``; empty where there is none."""
    found = _BOXED.findall(text)
    return found[-1] if found else ""


def plain(text: str) -> str:
    """The same numbers in ASCII: other scripts' digits, minus signs, ½, LaTeX, and what separates thousands."""
    text = "".join(_ascii(letter) for letter in text)
    for pattern, replacement in _LATEX:
        text = re.sub(pattern, replacement, text)
    return re.sub(_THOUSANDS.format(_SPACES), _joined, text)


def normalise(number: str) -> str:
    """One spelling per value: ``$1,234.00`` → ``1234``, ``-.50`` → ``-0.5``, ``3/4`` → ``0.75``, ``1e3`` → ``1000``.

    A fraction with no end as a decimal stays one, in its lowest terms.
    """
    digits = re.sub(rf"^[{_CURRENCY}−-]+|,", "", number)
    if "/" in digits:
        value = sum((Fraction(part) for part in digits.split(" ")), Fraction(0))
        digits = _decimal(value)
    elif "e" in digits.lower():
        digits = format(Decimal(digits), "f")
    if "/" not in digits:
        whole, _, fraction = digits.partition(".")
        whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
        digits = f"{whole}.{fraction}" if fraction else whole
    negative = re.match(rf"[{_CURRENCY}]?[−-]", number) is not None
    return f"-{digits}" if negative and digits != "0" else digits


def _decimal(value: Fraction) -> str:
    rest, places = value.denominator, 0
    while rest % 10 == 0 or rest % 5 == 0 or rest % 2 == 0:
        rest //= 10 if rest % 10 == 0 else 5 if rest % 5 == 0 else 2
        places += 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    scaled = str(value.numerator * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{scaled[: len(scaled) - places]}.{scaled[len(scaled) - places :]}"


def _joined(match: re.Match) -> str:
    return match[0].replace(match[2], "")


def _ascii(letter: str) -> str:
    if letter.isascii():
        return letter
    if letter in "−–‒﹣－":
        return "-"
    if unicodedata.name(letter, "").startswith("VULGAR FRACTION"):  # 2½ is 2 1/2
        return " " + unicodedata.normalize("NFKC", letter).replace("\u2044", "/")
    return str(unicodedata.decimal(letter, letter))
