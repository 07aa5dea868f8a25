"""Messages between the judge and the child that runs a program, and the values in them.

This file is sent to the sandbox as text, together with the others that ``judge.py`` names, so it uses the standard
library only. It is written for Python 3.10 and later.
"""

import collections
import json
import os

MESSAGE_LIMIT = 8 * 2**20
"""Bytes that the child may send at once."""
DEPTH_LIMIT = 200
"""Nesting of a value that is sent."""
REASON_LIMIT = 300


class Gone(BaseException):
    """The child ended, hung, or sent what can't be read. No Exception: a test's own ``except`` must not swallow it."""


def frame(message):
    """An object as JSON, after 16 hexadecimal digits that say how long it is."""
    data = json.dumps(message).encode()
    return b"%016x" % len(data) + data


def write_message(fd, message, wait=None):
    """Send an object; ``wait`` is called before every write."""
    view = memoryview(frame(message))
    while view:
        if wait is not None:
            wait()
        view = view[os.write(fd, view) :]


def read_message(fd, limit=None, wait=None):
    """Receive an object; ``wait`` is called before every read. Raises Gone at the end or where it can't be read."""
    header = _read_exactly(fd, 16, wait)
    try:
        size = int(header, 16)
    except ValueError:
        raise Gone("it sent something unreadable") from None
    if limit is not None and not 0 <= size <= limit:
        raise Gone("it returned more than can be looked at")
    try:
        return json.loads(_read_exactly(fd, size, wait))
    except (ValueError, RecursionError):
        raise Gone("it sent something unreadable") from None


def _read_exactly(fd, size, wait):
    parts = []
    while size:
        if wait is not None:
            wait()
        part = os.read(fd, min(size, 2**20))
        if not part:
            raise Gone("it ended before its tests did")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# ---- values ----------------------------------------------------------------------------------------------------------
#
#
# Lists, strings, floats and small integers stand for themselves; everything else is an object with one key.


def pack(value, handles=None, depth=0):
    """A value as JSON. Subclasses become their plain type; what is no data becomes a handle, or a TypeError."""
    if depth > DEPTH_LIMIT:
        raise ValueError("a value is nested too deeply")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        number = int(value)
        return number if -(2**63) < number < 2**63 else {"int": hex(number)}
    if isinstance(value, str):
        return str.__str__(value)
    for name, (type_, _) in _SEQUENCES.items():
        if isinstance(value, type_):
            items = [pack(item, handles, depth + 1) for item in value]
            return items if name == "list" else {name: items}
    if isinstance(value, dict):
        return {"dict": [[pack(k, handles, depth + 1), pack(v, handles, depth + 1)] for k, v in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, range):
        return {"range": [pack(n) for n in (value.start, value.stop, value.step)]}
    if kind.__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        return pack(value.item(), handles, depth + 1)
    if (
        isinstance(value, type)
        and value.__module__ == "builtins"
        and getattr(builtin_module(), value.__name__, 0) is value
    ):
        return {"type": value.__name__}
    if isinstance(value, Remote):
        return {"handle": object.__getattribute__(value, "_handle")}
    if handles is None:
        raise TypeError("a " + kind.__name__ + " can't be given to the program")
    if hasattr(kind, "__next__"):  # iterators and generators: the test can go through them once, as it expects
        return {"iterator": [pack(item, handles, depth + 1) for item in value]}
    handles.append(value)
    return {"handle": len(handles) - 1}


_SEQUENCES = {  # their types, and what makes one of a list
    "list": (list, list),
    "tuple": (tuple, tuple),
    "set": (set, set),
    "frozenset": (frozenset, frozenset),
    "deque": (collections.deque, collections.deque),
    "dict_keys": (type({}.keys()), lambda items: dict.fromkeys(items).keys()),
    "dict_values": (type({}.values()), lambda items: dict(enumerate(items)).values()),
    "dict_items": (type({}.items()), lambda items: dict(items).items()),
}


def unpack(data, handle):
    """The value that was packed; ``handle`` makes something of a handle's number."""
    if isinstance(data, list):
        return [unpack(item, handle) for item in data]
    if not isinstance(data, dict):
        return data
    ((name, inner),) = data.items()
    if name in _SEQUENCES:
        return _SEQUENCES[name][1]([unpack(item, handle) for item in inner])
    if name == "dict":
        return {unpack(k, handle): unpack(v, handle) for k, v in inner}
    if name == "int":
        return int(inner, 16)
    if name == "complex":
        return complex(*inner)
    if name == "bytes":
        return bytes.fromhex(inner)
    if name == "range":
        return range(*(unpack(n, handle) for n in inner))
    if name == "iterator":
        return iter([unpack(item, handle) for item in inner])
    if name == "type":
        type_ = getattr(builtin_module(), inner)
        if isinstance(type_, type):
            return type_
    if name == "handle" and isinstance(inner, int):
        return handle(inner)
    raise ValueError(name)


def builtin_module():
    import builtins

    return builtins


class Remote:
    """Something in the child: a name of the program, or an object that is no plain data. It equals only itself."""

    def __init__(self, server, name, handle=None):
        object.__setattr__(self, "_server", server)
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_handle", handle)

    def _ask(self, **request):
        get = object.__getattribute__
        if get(self, "_handle") is not None:
            request["on"] = get(self, "_handle")
        elif request["do"] == "call":
            request["name"] = get(self, "_name")
        else:
            raise AttributeError(request["name"])
        return get(self, "_server").ask(**request)

    def __call__(self, *arguments, **keywords):
        """Call it in the child."""
        packed = [pack(value) for value in arguments]
        return self._ask(do="call", arguments=packed, keywords={k: pack(v) for k, v in keywords.items()})

    def __getattr__(self, name):
        """Look the attribute up in the child."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask(do="get", name=name)

    def __setattr__(self, name, value):
        """Set the attribute in the child."""
        self._ask(do="set", name=name, value=pack(value))


def describe(error):
    """An exception in one line."""
    try:
        text = "".join(str(error).split("\n")[:1])
    except BaseException:
        text = ""
    return (type(error).__name__ + (": " + text if text else ""))[:REASON_LIMIT]
