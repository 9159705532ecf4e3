"""`python -m instructmining` is `instructmining`."""

import sys

from .cli import main

sys.exit(main())
