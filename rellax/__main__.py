"""`python -m rellax`, as launchers of several processes call it."""

import sys

from rellax.ctr.cli import main

sys.exit(main())
