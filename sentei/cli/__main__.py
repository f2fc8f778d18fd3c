"""`python -m sentei.cli` is `sentei`."""

import sys

from sentei.cli import main

sys.exit(main())
