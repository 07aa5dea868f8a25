"""``python -m gcpo.tools.launch``."""

from gcpo.tools.launch.command import main

raise SystemExit(main())
