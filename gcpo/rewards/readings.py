"""The parts of an answer: a letter of multiple choice and its value, a name and its value, a modulus."""

from __future__ import annotations

import re
from typing import NamedTuple

from gcpo.rewards.notation import split, split_list, without_fonts

__all__ = ["Choice", "Statement", "by_name", "choice", "is_number", "modulus", "stated", "without_modulus"]

# ---- multiple choice -------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A letter of multiple choice, and the text behind it, which may be empty."""

    letter: str
    text: str


_CHOICE = re.compile(r"(?:\(([A-J])\)[.:]?|([A-J])(?=[.:)](?: |$))[.:)])(?P<space> *)(?P<rest>.*)", re.DOTALL)
_OPERATOR = re.compile(
    r"[\^_+=*/<>|,;&']|- |\\(?:cdot|times|cup|cap|in|le|leq|ge|geq|to|lor|land|pm|approx|equiv)(?![A-Za-z])|(?:and|or) "
)


def choice(text: str) -> Choice | None:
    """Return the choice of a plain answer, such as ``(B)``, ``(B) 25``, ``B. 25`` or ``B: 25``, or ``None``."""
    text = without_fonts(text).rstrip(". ")
    if re.fullmatch("[A-J]", text):
        return Choice(text, "")
    match = _CHOICE.fullmatch(text)
    if not match or _OPERATOR.match(match["rest"]):
        return None
    if match["rest"] and not match["space"] and not match["rest"][0].isdigit():
        return None  # a product
    return Choice(match[1] or match[2], match["rest"].strip())


# ---- a name and its value --------------------------------------------------------------------------------------------

_GREEK = (
    r"\\(?:alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau"
    + (r"|upsilon|(?:var)?phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|ell|hbar)")
)
_ATOM = (
    rf"(?:[A-Za-z]|{_GREEK}|\\(?:overline|overrightarrow|vec|hat|widehat|bar|tilde|dot|math(?:bb|bf|cal|frak|rm|it))"
    r"\s*\{?\\?[A-Za-z]+\}?)(?:_(?:\w|\{[^{}]*\})|\^(?:\*|\{\*\}|\{-1\}))*'*"
)
_TRIGONOMETRIC = r"\\(?:sin|cos|tan|cot|sec|csc)(?:\^(?:2|\{2\}))?"
_NAME = re.compile(
    rf"{_ATOM}(?: ?\([^=]*\)|\[[^=]*\])?|(?:m ?)?(?:\\(?:angle|triangle) ?)?[A-Z]{{1,4}}'*"
    r"|\|[A-Z]{2}\||\[[A-Z]{3,}\]"
    r"|\\frac\{d(?:\^\w)?\w\}\{d\w(?:\^\w)?\}|d\w/d\w"
    rf"|{_TRIGONOMETRIC} ?\(?(?:\\angle ?)?[A-Z]{{1,3}}\)?"
    r"|\\(?:gcd|max|min|det|Pr|deg|dim|arg|operatorname\{[A-Za-z ]+\})[^=]*",
    re.ASCII,
)
_QUANTITY = re.compile(
    r"(?i:.*\b(?:area|volume|perimeter|circumference|probability|answer|total|sum|product|difference|quotient|ratio"
    r"|length|width|height|depth|distance|speed|rate|time|cost|price|profit|number|radius|diameter|angle|slope|mean"
    r"|median|mode|range|average|value|result|max|min|maximum|minimum|gcd|lcm|age|remainder|money|amount|score)\b.*)"
    r"|[A-Z][a-z]{2,}",
    re.DOTALL,
)
_HAS_VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z]|" + _GREEK)
_EQUALS = {"=", ":=", "==", r"\coloneqq"}
_APPROXIMATELY = {r"\approx", r"\simeq", r"\doteq"}
_MODULUS = re.compile(r"\\?\(?\s*\\(?:pmod|bmod|mod)\s*\{?([^{}]*?)\}?\s*\)?$|\(\s*mod\s*(\w+)\s*\)$")


class Statement(NamedTuple):
    """The value that an answer gives to a name.

    Attributes:
        name: the name, or "" if the answer is only a value.
        value: the value.
        links: texts of numbers that must equal the value, for the answer to be consistent.
        equation: the whole text if it is an equation without a value, else "".
    """

    name: str
    value: str
    links: tuple[str, ...] = ()
    equation: str = ""


def _is_name(text: str) -> bool:
    if text.startswith("(") and text.endswith(")"):
        return all(map(_NAME.fullmatch, split_list(text[1:-1])))
    if "\\text" in text or "\\mbox" in text:
        return bool(re.search(r"[A-Za-z]{2}", without_fonts(text)))
    return bool(_NAME.fullmatch(text) or _QUANTITY.fullmatch(text))


def is_number(text: str) -> bool:
    """Return whether a normalised text has no variables."""
    return not _HAS_VARIABLE.search(re.sub(r"\\[A-Za-z]+", lambda m: m[0] if re.match(_GREEK, m[0]) else " ", text))


def statement(text: str) -> Statement:
    """Return the value that a normalised answer states.

    ``x = 2 + 3 = 5`` states 5 for x, and ``2 + 3 = 5`` states 5. ``x + y = 5`` is an equation and states no value.
    """
    contained = split(text, {r"\in"})
    if len(contained) == 2 and all(map(_NAME.fullmatch, split_list(contained[0][1]))):
        return Statement(contained[0][1], contained[1][1])
    parts = split(text, _EQUALS | _APPROXIMATELY | ({r"\equiv"} if modulus(text) else set()))
    if len(parts) == 1:
        return Statement("", text)
    texts = [part for _, part in parts]
    if not all(texts):
        return Statement("", text, equation=text)
    named = _is_name(texts[0])
    # In "x = exact value \approx decimal" the exact value counts.
    end = next((at for at, (sign, _) in enumerate(parts) if sign in _APPROXIMATELY and at > named), len(parts))
    value, chain = texts[end - 1], texts[named : end - 1]
    if named:
        name = texts[0][1:-1] if texts[0].startswith("(") else texts[0]
        return Statement(name, value, tuple(link for link in chain if is_number(link)))
    if all(map(is_number, texts[:end])):
        return Statement("", value, tuple(chain))
    return Statement("", text, equation=text)


def stated(text: str) -> Statement:
    """Return the value that a normalised answer or a list of them states.

    ``x=3, y=5`` is the tuple (3,5), and ``x=3 or x=5`` the list 3,5.
    """
    return _listed(text) or statement(text)


def _listed(text: str) -> Statement | None:
    text = re.sub(r" ?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]) ?|\\l(?:or|and)(?![A-Za-z])", ",", text)
    parts = [part for part in split_list(text) if part]
    if len(parts) < 2 or not any(split(part, _EQUALS)[1:] for part in parts):
        return None
    found = [statement(part) for part in parts]
    names = [one.name for one in found]
    if not names[0] or any(one.equation or one.links for one in found):
        return None
    if set(names) <= {"", names[0]}:
        return Statement(names[0], ", ".join(one.value for one in found))
    if len(set(names)) < len(names) or not all(names):
        return None
    return Statement(",".join(names), f"({','.join(one.value for one in found)})")


def by_name(found: Statement) -> Statement:
    """Sort the values of several names by the names; other statements stay as they are."""
    names, values = found.name.split(","), split_list(found.value[1:-1])
    if len(names) < 2 or len(names) != len(values):
        return found
    ordered = sorted(zip(names, values, strict=True))
    return Statement(",".join(name for name, _ in ordered), f"({','.join(one for _, one in ordered)})")


def modulus(text: str) -> str:
    r"""Return the modulus that ends a text, as ``7`` for ``x \equiv 3 \pmod 7``, or "" without one."""
    match = _MODULUS.search(text)
    if match and r"\bmod" in match[0] and r"\equiv" not in text:
        return ""  # an operation: 7 \bmod 3 is 1
    return (match[1] or match[2] or "").strip() if match else ""


def without_modulus(text: str) -> str:
    """Remove the modulus at the end of a text."""
    return _MODULUS.sub("", text).strip()
