"""``python -m gcpo.tools.launch``."""

import sys

from gcpo.tools.launch.command import main

sys.exit(main())
