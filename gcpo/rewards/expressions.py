"""LaTeX expressions for math-verify, built from the value of an answer: a vector, a set, a region, a list."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gcpo.rewards.notation import normalize, split, split_list
from gcpo.rewards.rationals import exact_fractions

__all__ = ["cases", "column", "expression", "is_matrix", "is_ordered", "is_set", "special", "unit_vectors"]

_COLUMN = re.compile(
    r"\\begin\{([pbBvV]?|small)matrix\}(.*)\\end\{\1matrix\}(?:\^\{?\\?(?:T|top|intercal)\}?)?", re.DOTALL
)
_ARRAY = re.compile(r"[(\[]\\begin\{array\}\{[clr| ]*\}(.*?)\\end\{array\}[)\]]", re.DOTALL)
_CASES = re.compile(r"(?:\\\{)?\\begin\{(cases|array|aligned)\}(?:\{[clr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_ROW_END = re.compile(r"\\\\(?:\[[^\]]*\])?")
_ANGLES = re.compile(r"\\langle(?![A-Za-z])(.*)\\rangle", re.DOTALL)
_TRANSPOSED = re.compile(r"([(\[][^()\[\]]*,[^()\[\]]*[)\]])\^\{?\\?(?:T|top|intercal)\}?")
_UNIT_VECTOR = re.compile(
    r"\\(?:mathbf|boldsymbol|bm|hat|vec|widehat|textbf)\s*\{?\s*(?:\\(?:mathbf|boldsymbol|hat)\s*\{?)?\s*"
    r"\\?([ijk])(?:math)?(?![A-Za-z])\s*\}*"
)
_NOTHING = re.compile(
    r"(?i:\\(?:emptyset|varnothing|O)|\\\{\}|\{\}|(?:there (?:is|are) )?no(?: real)? solutions?|(?:the )?empty set"
    r"|[a-z]\\in(?: ?\\emptyset| ?\\varnothing))"
)
_ALL_REALS = re.compile(r"(?i:(?:[a-z] ?\\in ?|all )(?:\\mathbb\{R\}|reals?|real numbers)|\\mathbb\{R\}|\\R|\\Reals)")
_OR = re.compile(r" ?(?<![A-Za-z\\])or(?![A-Za-z]) ?|\\lor(?![A-Za-z])|\\vee(?![A-Za-z])")
_AND = re.compile(r" ?(?<![A-Za-z\\])and(?![A-Za-z]) ?|\\land(?![A-Za-z])|\\wedge(?![A-Za-z])")
_INEQUALITY = re.compile(r"[<>]|\\(?:le|leq|leqslant|ge|geq|geqslant|lt|gt|ne|neq)(?![A-Za-z])|!=")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_FACTOR = re.compile(r"(?<![\w.\\^}])(\d+(?:\.\d+)?)\(")
_RELATIONS = ((r"<=|\\leqslant(?![A-Za-z])", r"\\le "), (r">=|\\geqslant(?![A-Za-z])", r"\\ge "), (r"!=", r"\\ne "))
_BUILDER = re.compile(r"\\\{([a-z])(?:\\in(?:\\mathbb\{R\}|\\R))?(?:\\mid|\\colon|[|:])(.*)\\\}", re.DOTALL)


def unit_vectors(text: str) -> str:
    r"""Write ``2\mathbf{i}+3\mathbf{j}`` as ``(2,3)``; other plain text stays as it is."""
    if not _UNIT_VECTOR.search(text):
        return text
    components = {"i": "0", "j": "0"}
    for sign, term in split(text.replace(" ", ""), {"+", "-"}):
        if not sign and not term:
            continue
        match = _UNIT_VECTOR.search(term)
        if not match or term[match.end() :] or components.get(match[1], "0") != "0":
            return text
        components[match[1]] = sign.replace("+", "") + (term[: match.start()] or "1")
    return f"({','.join(components[name] for name in sorted(components))})"


def column(text: str) -> str | None:
    """Return a column vector as a tuple, or ``None`` if the text is not a column vector."""
    match = _COLUMN.fullmatch(text)
    if not match or "&" in match[2] or r"\begin" in match[2]:
        return None
    rows = [row.strip() for row in _ROW_END.split(match[2])]
    rows = rows if rows[-1] else rows[:-1]
    return f"({','.join(rows)})" if len(rows) > 1 and all(rows) else None


def is_matrix(text: str) -> bool:
    """Return whether a normalised text contains a matrix."""
    return "matrix}" in text


def is_set(text: str) -> bool:
    """Return whether a normalised text is a set in braces."""
    return text.startswith(r"\{") and text.endswith(r"\}")


def is_ordered(text: str) -> bool:
    """Return whether a normalised text is a tuple or an interval in parentheses or brackets."""
    return bool(re.fullmatch(r"[(\[].*,.*[)\]]", text, re.DOTALL)) and len(split_list(text)) == 1


def special(text: str) -> str | None:
    """Return the empty set or the set of the real numbers, if a normalised text means one of them, else ``None``."""
    if _NOTHING.fullmatch(text):
        return r"\emptyset"
    return r"\mathbb{R}" if _ALL_REALS.fullmatch(text) else None


def expression(text: str) -> str:
    """Return a normalised value as a LaTeX expression that math-verify can read."""
    if found := special(text):
        return found
    for pattern, new in _RELATIONS:
        text = re.sub(pattern, new, text)
    text = text.replace(r"\varnothing", r"\emptyset ")
    text = _ARRAY.sub(r"\\begin{pmatrix}\1\\end{pmatrix}", text)
    if (builder := _BUILDER.fullmatch(text)) and _INEQUALITY.search(builder[2]):
        text = builder[2]
    if (angles := _ANGLES.fullmatch(text)) and "," in angles[1]:
        text = f"({angles[1]})"
    text = _TRANSPOSED.sub(lambda m: f"({m[1][1:-1]})", text)
    if _INEQUALITY.search(text):
        text = _AND.sub(r"\\land ", _OR.sub(r"\\lor ", text))
    text = _FACTOR.sub(r"\1\\cdot(", exact_fractions(text))
    return ",".join(_both_signs(text)) if _PLUS_MINUS.search(text) else text


def cases(text: str) -> str:
    r"""Return the lines of a system, ``\begin{cases} x=1 \\ y=2 \end{cases}``, as a list; other text stays as it is."""
    match = _CASES.fullmatch(text)
    if not match or "&=" not in match[2].replace(" ", "") and "&" in match[2]:
        return text
    lines = [line.replace("&", "").strip(" ,;") for line in _ROW_END.split(match[2])]
    return ",".join(normalize(line) for line in lines if line)


def _both_signs(text: str) -> Iterator[str]:
    r"""Yield the elements of a list, with ``\pm`` expanded to all plus and to all minus signs."""
    for element in split_list(text):
        for plus in ("pm", "mp") if _PLUS_MINUS.search(element) else ("pm",):
            signed = _PLUS_MINUS.sub(lambda m: "+" if m[1] == plus else "-", element)  # noqa: B023 (called at once)
            yield re.sub(r"^\+|(?<=[{(=])\+", "", signed)
