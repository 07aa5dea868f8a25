"""Messages between the judge and the child that runs a program, and the values in them.

The file is sent to the sandbox as text (see ``judge.py``), so it uses only the standard library, from Python 3.10 on.
"""

import builtins
import collections
import json
import os

MESSAGE_LIMIT = 8 * 2**20
"""Largest message of the child in bytes."""
DEPTH_LIMIT = 200
"""Deepest nesting of a value in a message."""
REASON_LIMIT = 300


class Gone(BaseException):
    """The child ended, hung or sent an unreadable message. Not an Exception, so that a test's ``except`` ignores it."""


def frame(message):
    """Return an object as JSON after its length in 16 hexadecimal digits."""
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
    """Receive an object; ``wait`` is called before every read. Raises Gone at the end or if it cannot be read."""
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


class Remote:
    """A name or an object in the child that is not plain data. It equals only itself."""

    def __init__(self, server, name, handle=None):
        vars(self).update(_server=server, _name=name, _handle=handle)  # bypasses __setattr__

    def _ask(self, **request):
        if self._handle is not None:
            request["on"] = self._handle
        elif request["do"] == "call":
            request["name"] = self._name
        else:
            raise AttributeError(request["name"])
        return self._server.ask(**request)

    def __call__(self, *arguments, **keywords):
        """Call the object in the child."""
        packed = [pack(value) for value in arguments]
        return self._ask(do="call", arguments=packed, keywords={k: pack(v) for k, v in keywords.items()})

    def __getattr__(self, name):
        """Read the attribute in the child."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask(do="get", name=name)

    def __setattr__(self, name, value):
        """Set the attribute in the child."""
        self._ask(do="set", name=name, value=pack(value))


# ---- values ----------------------------------------------------------------------------------------------------------
#
# Lists, strings, floats and small integers are sent as they are; all other values are objects with one key. Nothing is
# pickled, because a program could then run code in the judge.


def pack(value, handles=None, depth=0):
    """Return a value as JSON. Subclasses become their plain type; other objects become a handle or raise TypeError."""
    if depth > DEPTH_LIMIT:
        raise ValueError("a value is nested too deeply")

    def packed(items):
        return [pack(item, handles, depth + 1) for item in items]

    for types, pack_one in _PLAIN:
        if isinstance(value, types):
            return pack_one(value)
    for name, (type_, _) in _SEQUENCES.items():
        if isinstance(value, type_):
            return packed(value) if name == "list" else {name: packed(value)}
    if isinstance(value, dict):
        return {"dict": [packed(pair) for pair in value.items()]}
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        return pack(value.item(), handles, depth + 1)
    return _pack_object(value, handles, packed)


def _pack_object(value, handles, packed):
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return {"type": value.__name__}
    if handles is None:
        raise TypeError("a " + type(value).__name__ + " can't be given to the program")
    if hasattr(type(value), "__next__"):  # iterators and generators: the test can iterate over them once, as it expects
        return {"iterator": packed(value)}
    handles.append(value)
    return {"handle": len(handles) - 1}


def _pack_int(value):
    number = int(value)
    # Python limits the length of integers in decimal digits, but not in hexadecimal digits.
    return number if -(2**63) < number < 2**63 else {"int": hex(number)}


_PLAIN: "tuple" = (  # types without items and their packing functions; bool precedes its base class int
    ((type(None), bool), lambda value: value),
    (float, float),
    (int, _pack_int),
    (str, str.__str__),
    (complex, lambda value: {"complex": [value.real, value.imag]}),
    ((bytes, bytearray), lambda value: {"bytes": bytes(value).hex()}),
    (range, lambda value: {"range": [_pack_int(n) for n in (value.start, value.stop, value.step)]}),
    (Remote, lambda value: {"handle": vars(value)["_handle"]}),
)
_SEQUENCES = {  # their types, and the constructor from a list
    "list": (list, list),
    "tuple": (tuple, tuple),
    "set": (set, set),
    "frozenset": (frozenset, frozenset),
    "deque": (collections.deque, collections.deque),
    "dict_keys": (type({}.keys()), lambda items: dict.fromkeys(items).keys()),
    "dict_values": (type({}.values()), lambda items: dict(enumerate(items)).values()),
    "dict_items": (type({}.items()), lambda items: dict(items).items()),
    "iterator": ((), iter),
}
_OBJECTS = {  # constructors of the other types
    "int": lambda digits: int(digits, 16),
    "complex": lambda parts: complex(*parts),
    "bytes": bytes.fromhex,
    "range": lambda numbers: range(*(unpack(n, None) for n in numbers)),
    "type": lambda name: _builtin_type(name),
}


def _builtin_type(name):
    type_ = getattr(builtins, name)
    if not isinstance(type_, type):
        raise ValueError(name)
    return type_


def unpack(data, handle):
    """Return the value of packed data; ``handle`` maps a handle's number to an object. Raises for unpacked data."""
    if isinstance(data, list):
        return [unpack(item, handle) for item in data]
    if not isinstance(data, dict):
        return data
    ((name, inner),) = data.items()
    if name in _SEQUENCES:
        return _SEQUENCES[name][1](unpack(list(inner), handle))
    if name == "dict":
        return {unpack(k, handle): unpack(v, handle) for k, v in inner}
    if name == "handle" and isinstance(inner, int):
        return handle(inner)
    return _OBJECTS[name](inner)


def describe(error):
    """Return one line about an exception."""
    try:
        text = "".join(str(error).split("\n")[:1])
    except BaseException:
        text = ""
    return (type(error).__name__ + (": " + text if text else ""))[:REASON_LIMIT]
