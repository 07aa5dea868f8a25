"""``python -m gcpo.launch``."""

import sys

from gcpo.launch.command import main

sys.exit(main())
