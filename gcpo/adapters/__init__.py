"""The connection of GCPO to verl: thin subclasses over its extension points.

verl loads its plug-ins at the end of its own import. The import here, before any module of this package, makes this
happen once and in one order, regardless of the module that a process imports first.
"""

import verl  # noqa: F401
