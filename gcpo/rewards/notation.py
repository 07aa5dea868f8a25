"""The normal form of an answer: one notation for answers that can be written in several ways."""

from __future__ import annotations

import functools
import re
import unicodedata
from decimal import Decimal

from gcpo.rewards.answers import boxed_answers

__all__ = ["DECIMAL", "NUMBER", "closing", "normalize", "plain", "plain_number", "split", "split_list", "without_fonts"]

DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
NUMBER = re.compile(rf"[+-]?{DECIMAL}", re.ASCII)
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+|(?:_\d{3})+)(?:\.\d+)?", re.ASCII)
TIME = re.compile(r"(\d{1,2})(?::00|(:\d\d))? *([ap])\.? ?m\.?", re.ASCII | re.IGNORECASE)
SCALES = {"%": -2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SCALED = re.compile(r"(.*[^ ]) ?(%|(?<![A-Za-z])(?:thousand|million|billion|trillion)(?![A-Za-z]))[A-Za-z ]*")
_FONT = r"\\(?:(?:text|math)(?:bf|it|rm|sf|tt|normal)?|mbox)\s*"
_UNIT = re.compile(rf"(?:\\cdot|\\times|/|\s)*{_FONT}\{{([\w ./^-]*)\}}\s*(?:\^\s*(?:\{{[^{{}}]*\}}|\w))?$", re.ASCII)
NO_UNIT = re.compile(
    r"(?i:\b(?:and|or|if|percent|thousand|million|billion|trillion|hundred|dozen|not|no|more|less|least|most|than|except"
    r"|times|plus|minus|over|squared|cubed|factorial|half|halves|thirds?|quarters?|fourths?|tenths?|hundredths?"
    r"|base|mod|pi|is|are|was|isn|wrong|false|incorrect)\b)|\b[a-fi-kn-ru-zBDEG-IO-UX-Z]\b"
)
"""Text after a number that is not a unit: words that change the value, and letters that are variables or constants."""

# ---- characters ------------------------------------------------------------------------------------------------------

_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"),
        **dict.fromkeys("\u00a0\u2009\u202f\u3000\t\r\n", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", None),
        **dict.fromkeys("\u3001\uff0c", ","), "\u3002": ".", "\uff05": "%", "\u00d7": r"\times ", "\u00b7": r"\cdot ",
        "\u22c5": r"\cdot ", "\u00f7": r"\div ", "\u221e": r"\infty ", "\u00b0": r"^\circ ", "\u2103": r"^\circ ",
        "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2248": r"\approx ", "\u222a": r"\cup ",
        "\u2229": r"\cap ", "\u2208": r"\in ", "\u2205": r"\emptyset ", "\u00b1": r"\pm ", "\u2213": r"\mp ",
        "\u27e8": r"\langle ", "\u27e9": r"\rangle ", "\u3008": r"\langle ", "\u3009": r"\rangle ",
        "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}", "\u2228": r"\lor ", "\u2227": r"\land ", "\u2220": r"\angle ",
        "\u2234": r"\therefore ", "\u2044": "/", "\u2032": "'", "\u2033": "''", "\u2026": r"\ldots ",
        **dict.fromkeys("\u2713\u2714\u2705", r"\checkmark "),
    }
)  # fmt: skip
_GREEK = str.maketrans(
    {
        chr(code): f"\\{'lambda' if name == 'LAMDA' else name.lower()} "
        for code in range(0x3B1, 0x3CA)
        if (name := unicodedata.name(chr(code)).rpartition(" ")[2]) not in ("OMICRON", "SIGMA") or code == 0x3C3
    }
    | {"\u0394": r"\Delta ", "\u03a9": r"\Omega ", "\u03a3": r"\Sigma ", "\u03a6": r"\Phi ", "\u03b8": r"\theta "}
)
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))  # noqa: RUF001
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙᵢ", "0123456789+-()ni", strict=True))  # noqa: RUF001
_RUN = re.compile(f"([{''.join(_RAISED)}]+)|([{''.join(_LOWERED)}]+)")
_WIDE = re.compile("[\uff01-\uffee\u3380-\u33df\U0001d400-\U0001d7ff]")
_VULGAR = re.compile("(\\d?) ?([\u00bc-\u00be\u2150-\u215e])")
_OVERLINED = re.compile(r"((?:\d\u0305)+)|(\d)\u0307")
_ROOT = re.compile(r"[\u221a\u221b\u221c] *")
_ROOTS = {"\u221a": r"\sqrt", "\u221b": r"\sqrt[3]", "\u221c": r"\sqrt[4]"}
_RADICAND = re.compile(rf"{DECIMAL}|\\[A-Za-z]+|\w", re.ASCII)
_CLOSED_BY = {"(": ")", "{": "}", "[": "]"}
_COUNTER = re.compile("(?<=[\\d})%]) *[\u4e00-\u9fff]{1,4}$")
_SCALED_COUNTER = re.compile("[\u5341\u767e\u5343\u4e07\u4ebf\u5146\u534a\u6210\u70b9\u4e4b\u6216\u548c]")
"""Chinese characters that change the number before them: ten, hundred, thousand, ..., half, tenth, point, of, or."""


def closing(text: str, start: int) -> int:
    """Return the index of the bracket that closes the one at ``start``, or -1; escaped brackets do not count."""
    opening, depth, at = text[start], 0, start
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] == opening:
            depth += 1
        elif text[at] == _CLOSED_BY[opening]:
            depth -= 1
            if depth == 0:
                return at
        at += 1
    return -1


def _latex_characters(text: str) -> str:
    """Convert full-width characters, superscripts, fractions and other Unicode symbols to ASCII and LaTeX."""
    if text.isascii():
        return text
    text = _WIDE.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text)
    text = _VULGAR.sub(_vulgar, text)
    text = _RUN.sub(_run, text)
    text = _OVERLINED.sub(
        lambda m: f"\\overline{{{m[1].replace(chr(0x305), '')}}}" if m[1] else f"\\dot{{{m[2]}}}", text
    )
    text = text.translate(_SYMBOLS).translate(_GREEK)
    return _with_roots(text)


def _vulgar(match: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", match[2]).partition("\u2044")
    return f"{match[1]}\\frac{{{above}}}{{{below}}}" if below else match[0]


def _run(match: re.Match[str]) -> str:
    sign, names = ("^", _RAISED) if match[1] else ("_", _LOWERED)
    script = "".join(names[one] for one in match[0])
    return f"{sign}{script}" if len(script) == 1 else f"{sign}{{{script}}}"


def _with_roots(text: str) -> str:
    """Convert root signs to LaTeX; a sign spans the whole number, bracket, letter or command that follows it."""
    while signs := list(_ROOT.finditer(text)):
        sign = signs[-1]
        start = sign.end()
        if start < len(text) and text[start] in "({" and (end := closing(text, start)) > 0:
            inside, rest = text[start + 1 : end], text[end + 1 :]
        elif operand := _RADICAND.match(text, start):
            end = operand.end()
            while operand[0].startswith("\\") and text[end : end + 1] in ("{", "[") and closing(text, end) > 0:
                end = closing(text, end) + 1
            inside, rest = text[start:end], text[end:]
        else:
            inside, rest = "", text[start:]
        text = f"{text[: sign.start()]}{_ROOTS[sign[0][0]]}{{{inside}}}{rest}"
    return text


# ---- decoration ------------------------------------------------------------------------------------------------------


def _rules(*rules: tuple[str, str], flags: int = 0) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern, re.ASCII | flags), new) for pattern, new in rules]


def _apply(rules: list[tuple[re.Pattern[str], str]], text: str) -> str:
    for pattern, new in rules:
        text = pattern.sub(new, text)
    return text.strip()


_TIDY = _rules(
    (r"\\(?:left|right)\s*\.", ""),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![A-Za-z])", ""),
    (r"\\(?:bf|it|rm|sf|tt|em|tiny|small|normalsize|large|Large|LARGE|huge|Huge|bfseries|boldmath)(?![A-Za-z])", ""),
    (r"\\(?:text)?color(?:box)?\s*(?:\[\w*\])?\s*\{[\w!.#-]*\}", ""),
    (r"(?<![\^_])\\(?:boldsymbol|bm|pmb|underline|uline|ensuremath|colorbox)\s*\{([^{}]*)\}", r"\1"),
    (r"\\(?:boldsymbol|bm|pmb|underline|uline|ensuremath)\s*(?=\{)", ""),
    (r"\\(?:checkmark|blacksquare|qed)(?![A-Za-z])", ""),
    (r",\\!\s*|\{,\}", ","),
    (r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))", ""),
    (r"(?<!\\)\\!", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\\?[$\u00a3\u20ac]", ""),
)
_WRAPPERS = _rules(
    (r"\*\*([^*]+)\*\*|__([^_]+)__|`([^`]+)`|\*([^*]+)\*|\"([^\"]+)\"|''([^']+)''", r"\1\2\3\4\5\6"),
    (r"\\\((.*)\\\)|\\\[(.*)\\\]", r"\1\2"),
    (r"(?:=|:|\\approx(?![A-Za-z])|\\(?:therefore|implies|Rightarrow|Longrightarrow)(?![A-Za-z])) *([^ ].*)", r"\1"),
    (
        r"(?:(?:so|thus|hence|therefore),? )?(?:the |my )?(?:final |correct |right )?answer(?: is|:| =)[:=]? *(.*)",
        r"\1",
    ),
    flags=re.IGNORECASE,
)


_GROUP = re.compile(rf"(?:(?:{_FONT})?\{{)?")
"""The opening of a group; it matches the empty text if there is none."""


def _undecorated(text: str) -> str:
    """Remove emphasis, colour, sizes, delimiters and words such as "the answer is" around an answer."""
    while True:
        before = text
        for pattern, new in _WRAPPERS:
            if match := pattern.fullmatch(text.rstrip(". ")):
                text = match.expand(new).strip()
        group = _GROUP.match(text)
        start = group.end() - 1 if group else -1
        if start >= 0 and closing(text, start) == len(text) - 1 and (start == 0 or "{" in text[start + 1 :]):
            text = text[start + 1 : -1].strip()
        if text == before:
            return text


@functools.lru_cache(maxsize=10_000)
def plain(answer: str) -> str:
    """Return an answer in ASCII LaTeX without decoration, but with units, fonts and choices."""
    answer = _latex_characters(answer).translate(_SYMBOLS).strip()
    if answer.startswith(("\\boxed", "\\fbox")):
        answer = ", ".join(boxed_answers(answer) or []) or answer
    while True:
        before = answer
        answer = _undecorated(_apply(_TIDY, answer))
        if (counter := _COUNTER.search(answer)) and not _SCALED_COUNTER.search(counter[0]):
            answer = answer[: counter.start()]
        if answer == before:
            return answer


# ---- the normal form -------------------------------------------------------------------------------------------------

_NO_FONT = _rules((_FONT + r"\{([^{}]*)\}", r"\1"))
_SHORTEN = _rules(
    (r"\.{3,}", r"\\ldots "),
    (r"\\?%|(?<![A-Za-z])percent(?![A-Za-z])", "%"),
    (r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree)\s*[CF]?\s*(?=$|[,)\]])", ""),
    (r"(?<=\d)\s*\^\s*\{?(?:\s*\\prime)+\s*\}?$", ""),
    (r"\^(?:\\prime(?![A-Za-z])|\{\s*\\prime\s*\})", "'"),
    (r"\\[cdt]frac(?![A-Za-z])", r"\\frac"),
    (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
    (r"\\frac\s*(\\[A-Za-z]+)(?![A-Za-z{]) *(?=[\w{\\])", r"\\frac{\1}"),
    (r"\\frac\s*(\{[^{}]*\})\s*(\\[A-Za-z]+)(?![A-Za-z{])", r"\\frac\1{\2}"),
    (r"(?<=\d)\s*\^?\s*(?:\{(?:st|nd|rd|th)\}|(?:st|nd|rd|th))$", ""),
    (r"\\frac\s*(\w)\s*(?=[\w{])", r"\\frac{\1}"),
    (r"\\frac\s*(\{[^{}]*\})\s*(\w)", r"\\frac\1{\2}"),
    (r"\\sqrt\s*(\[[^\[\]]*\])?\s*(\d+|[A-Za-z])", r"\\sqrt\1{\2}"),
    (r" +", " "),
    (r"(?<![\w,]) | (?!\w)", ""),  # other spaces separate words, numbers, list items, or a command from its argument
)


_DEGREES = r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree)(?![A-Za-z])"
_ANGLE = re.compile(
    r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])\s*(?:\^\s*(?:\d|\{\d+\})\s*)?"
    rf"(?:\([^()]*\)|\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|{DECIMAL}{_DEGREES})"
)
"""A trigonometric function with its argument, which is in brackets or a number of degrees."""
_IN_DEGREES = re.compile(rf"({DECIMAL}){_DEGREES}")


def in_radians(text: str) -> str:
    r"""Write ``\sin 30^\circ`` as ``\sin {\frac{30\pi}{180}}``; degrees elsewhere only name the unit of an angle."""
    return _ANGLE.sub(lambda angle: _IN_DEGREES.sub(r"{\\frac{\1\\pi}{180}}", angle[0]), text)


def without_fonts(text: str) -> str:
    """Return a plain answer whose text and font commands are replaced by their contents."""
    return _apply(_NO_FONT, text)


@functools.lru_cache(maxsize=10_000)
def normalize(answer: str) -> str:
    """Remove the parts of an answer that do not change its value.

    Removed are boxes, decoration, dollar signs, fonts, spaces, units, degree signs, thousands separators, leading zeros
    and decimals that are zero. Unicode characters become LaTeX. Normalising a result again changes
    nothing. Percent signs and words like "million" stay.
    """
    answer = plain(answer)
    if time := TIME.fullmatch(without_fonts(answer)):
        return f"{time[1]}{time[2] or ''} {time[3].lower()}.m."
    while unit := _UNIT.search(answer):
        number = answer[: unit.start()]
        if NO_UNIT.search(unit[1]) or not re.search(r"[\d\\]", number):
            break
        answer = number
    answer = _apply(_SHORTEN, in_radians(without_fonts(answer))).rstrip(".,; ")
    if scaled := SCALED.fullmatch(answer):
        return plain_number(scaled[1]) + ("%" if scaled[2] == "%" else f" {scaled[2]}")
    return plain_number(answer)


def plain_number(text: str) -> str:
    """Return ``1027`` for ``01,027.0``; other text stays as it is."""
    ungrouped = re.sub("[, _]", "", text) if _GROUPED.fullmatch(text) else text
    if not NUMBER.fullmatch(ungrouped):
        return text
    number = Decimal(ungrouped)
    if number == 0:
        return "0"
    digits = f"{number:f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


# ---- the parts of a text ---------------------------------------------------------------------------------------------

_TOKENS = re.compile(r"\\(?:begin|end)\s*\{\w+\*?\}|\\[A-Za-z]+|\\.|<=|>=|!=|:=|==|\D|\d+", re.DOTALL)
_OPENING = {"(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil"}
_CLOSING = {")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil"}


def split(text: str, separators: set[str]) -> list[tuple[str, str]]:
    """Split a text at separators outside all brackets; return every part with the separator before it."""
    parts, depth, start, before = [], 0, 0, ""
    for token in _TOKENS.finditer(text):
        if token[0] in _OPENING or token[0].startswith(r"\begin"):
            depth += 1
        elif token[0] in _CLOSING or token[0].startswith(r"\end"):
            depth = max(0, depth - 1)
        elif depth == 0 and token[0] in separators:
            parts.append((before, text[start : token.start()].strip()))
            start, before = token.end(), token[0]
    return [*parts, (before, text[start:].strip())]


def split_list(text: str) -> list[str]:
    """Return the elements of a list without brackets, or the whole text as one element."""
    return [part for _, part in split(text, {",", ";"})]
