"""`python -m instructmining_core` is `instructmining`."""

import sys

from instructmining_core.cli import main

sys.exit(main())
