"""All data sets by name."""

from __future__ import annotations

import difflib

from data_prep import code_sets, math_sets
from data_prep.schema import DataError, DataSet

SETS: dict[str, DataSet] = {dataset.name: dataset for dataset in (*math_sets.SETS, *code_sets.SETS)}


def find_set(name: str) -> DataSet:
    """Return the set with this name.

    Raises:
        DataError: there is no such set.
    """
    if name in SETS:
        return SETS[name]
    close = difflib.get_close_matches(name, SETS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(SETS)}"
    raise DataError(f"there is no set {name}; {hint} (python -m data_prep --list)")
