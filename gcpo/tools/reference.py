"""Tables of the documentation that follow from the code: ``python -m gcpo.tools.reference TABLE`` writes one.

``configuration`` is docs/configuration.md below its introduction, ``batch_fields`` the table of docs/batch_fields.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import Any

from gcpo.methods import method_class, own_method_names
from gcpo.methods.fields import Field
from gcpo.methods.gcpo.presets import PRESETS
from gcpo.methods.gcpo.settings import GCPOSettings
from gcpo.selftraining.settings import SelfTrainingSettings
from gcpo.settings import Settings, group_class

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "`True`, `False`", "object": "mapping"}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    names = list(header)
    lines = (names, *([cell.replace("|", "\\|") for cell in row] for row in rows))
    first, *others = (f"| {' | '.join(line)} |\n" for line in lines)
    return f"{first}|{'---|' * len(names)}\n{''.join(others)}"


def text(docstring: str | None) -> str:
    """Return a docstring in one line, with code between single backticks."""
    return " ".join((docstring or "").replace("``", "`").split())


# ---- batch fields ----------------------------------------------------------------------------------------------------


def batch_fields(fields: Iterable[Field]) -> str:
    """Return the table of batch fields."""
    rows = (
        (
            f"`{field}`",
            f"{str(field.dtype).removeprefix('torch.')} {field.shape}" if field.dtype else field.shape or "object",
            field.writer,
            field.readers,
            field.meaning,
        )
        for field in fields
    )
    return table(("field", "type and shape of a row", "written by", "read by", "meaning"), rows)


# ---- configuration ---------------------------------------------------------------------------------------------------


def configuration() -> str:
    """Return the settings of every method, the values of GCPO's presets, and the settings of self-training."""
    methods = [name for name in own_method_names() if name != "gcpo"]
    classes = {"gcpo": GCPOSettings, **{name: method_class(name).settings_class for name in methods}}
    sections = [f"## `{name}`\n\n{settings_tables(cls, name)}" for name, cls in classes.items()]
    sections.insert(1, f"## Presets of `gcpo`\n\n{_presets()}\n")
    sections.append(f"## Self-training\n\n{settings_tables(SelfTrainingSettings, '')}")
    return "".join(sections).rstrip("\n") + "\n"


def settings_tables(cls: type[Settings], path: str) -> str:
    """Return the text and the table of the group at ``path``, and then those of the groups inside it."""
    prefix = f"{path}." if path else ""
    groups = {name: group for name in cls.model_fields if (group := group_class(cls, name))}
    schema = cls.model_json_schema()
    rows = [
        (f"`{prefix}{name}`", _values(schema["properties"][name]), _default(schema, name), _meaning(cls, name))
        for name in cls.model_fields
        if name not in groups
    ]
    own = table(("setting", "values", "default", "meaning"), rows) + "\n" if rows else ""
    inside = (f"### `{prefix}{name}`\n\n{settings_tables(group, prefix + name)}" for name, group in groups.items())
    about, _, _ = (cls.__doc__ or "").partition("\n\n")
    return f"{text(about)}\n\n{own}{''.join(inside)}"


def _values(schema: dict[str, Any]) -> str:
    """Return the values that a setting takes, from its JSON schema."""
    if "anyOf" in schema:
        return ", ".join(_values(choice) for choice in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "null":
        return "`null`"
    if schema["type"] == "array":
        return f"list of {_values(schema['items'])}s"
    bounds = [f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema]
    return f"{TYPES[schema['type']]} {' and '.join(bounds)}".rstrip()


def _default(schema: dict[str, Any], name: str) -> str:
    if name in schema.get("required", ()):
        return "–"
    value = schema["properties"][name]["default"]
    plain = isinstance(value, bool) or (isinstance(value, str) and value.isidentifier())
    return f"`{value if plain else json.dumps(value, ensure_ascii=False)}`"


def _meaning(cls: type[Settings], name: str) -> str:
    """Return the string under a field; a subclass that only changes the default has that of its base."""
    fields = (base.model_fields.get(name) for base in cls.__mro__ if issubclass(base, Settings))
    return text(next((field.description for field in fields if field and field.description), None))


def _presets() -> str:
    """Return the values of the fields that are ``null`` by default and follow from ``gcpo.preset``."""
    keys = {
        f"{group}.{name}": (group, name) for values in PRESETS.values() for group in values for name in values[group]
    }
    rows = (
        (f"`gcpo.{key}`", *(f"`{PRESETS[preset][group][name]}`".replace("`None`", "n") for preset in PRESETS))
        for key, (group, name) in keys.items()
    )
    return table(("setting", *(f"`{preset}`" for preset in PRESETS)), rows)


def main() -> None:
    """Write the table that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("configuration", "batch_fields"))
    if parser.parse_args().table == "configuration":
        print(configuration(), end="")
        return
    from gcpo.adapters.schema import all_fields

    print(batch_fields(all_fields()), end="")


if __name__ == "__main__":
    main()
