"""Units of measurement after a number."""

from __future__ import annotations

import re

from gcpo.rewards.notation import DECIMAL, NO_UNIT, without_fonts

__all__ = ["conflicting_units", "without_unit"]

_NAMES = """
m meter meters metre metres|cm centimeter centimeters centimetre centimetres|mm millimeter millimeters|km
kilometer kilometers kilometre kilometres|in inch inches|ft foot feet|yd yard yards|mi mile miles|g gram
grams|kg kilogram kilograms |mg milligram milligrams|lb lbs pound pounds|oz ounce ounces|ton tons|s sec secs
second seconds|min mins minute minutes |h hr hrs hour hours|day days|week weeks|month months|year years yr
yrs|L l liter liters litre litres|mL ml milliliter milliliters|gallon gallons gal|dollar dollars USD|cent
cents|euro euros|mph|km/h kmh kph|m/s|cm/s|J joule joules|N newton newtons|W watt watts|V volt volts|A amp
amps ampere amperes|Hz hertz|kHz|MHz|Pa pascal pascals|kPa|K kelvin|degree degrees deg|rad radian radians|bit
bits|byte bytes|eV|keV|MeV|kJ|kW|kcal cal
"""
_UNITS = {name: at for at, names in enumerate(" ".join(_NAMES.split()).split("|")) for name in names.split()}
"""Names of units, each with the number of its unit."""
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3", "squared": "2", "cubed": "3"}
_LETTER_UNITS = "mgshlLJNWVAK"
_BARE = r"[+-]?(?:[\d.,{}()+*/ ^-]|\\(?:frac|sqrt|pi|cdot|times|pm)(?![A-Za-z]))*[\d})]|[+-]?[\d.{}()\\frac]*\\pi"
"""A number without variables, before its unit."""
_PLAIN_UNIT = re.compile(
    rf"({_BARE})(?: *([{_LETTER_UNITS}])| *((?:(?:square|sq|cubic|cu)\.? )?(?:[A-Za-z]{{2,}}|[A-Za-z]+/[A-Za-z]+))|"
    r" +([a-z]{3,}(?: [a-z]+)*))(?:\^\{?([23])\}?)?\.?",
    re.ASCII,
)
_MEASURE = re.compile(rf"{DECIMAL}\}}* *([A-Za-z/]+(?:\. )?(?: [A-Za-z/]+)?) *(?:\^ *\{{?([23])\}}?)?\.?$", re.ASCII)


def without_unit(text: str, *, letters: bool) -> str:
    """Remove a plain unit after a number; other text stays as it is.

    Args:
        text: a normalised answer.
        letters: whether a single letter such as m may be a unit. It may not be in a right answer, where it is a
            variable.
    """
    match = _PLAIN_UNIT.fullmatch(text)
    if not match:
        return text
    number, letter, name, words, _ = match.groups()
    if letter:
        return number if letters else text
    if name and name.rpartition(" ")[2] not in _UNITS and not (text[len(number)] == " " and len(name) > 2):
        return text
    return text if NO_UNIT.search(name or words) else number


def conflicting_units(answer: str, truth: str) -> bool:
    """Return whether two plain answers are numbers in different known units, such as 5 cm and 5 m."""
    one, other = _measure(answer), _measure(truth)
    return one is not None and other is not None and one != other


def _measure(text: str) -> tuple[int, str] | None:
    """Return the known unit of a plain answer and its exponent."""
    match = _MEASURE.search(without_fonts(text))
    if not match:
        return None
    words = match[1].replace(".", "").split()
    powers = [_POWERS[word] for word in words if word in _POWERS] + ([match[2]] if match[2] else [])
    units = [_UNITS[word] for word in words if word in _UNITS]
    if len(units) != 1 or len(units) + len(powers) != len(words) + bool(match[2]):
        return None
    return units[0], powers[0] if powers else "1"
