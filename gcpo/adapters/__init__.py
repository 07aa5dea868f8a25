"""Where GCPO touches verl: thin subclasses over its extension points.

verl loads its plug-ins at the end of its own import. Importing it here, before any module of this package, makes that
happen once and in one order, whichever of them a process asks for first.
"""

import verl  # noqa: F401
