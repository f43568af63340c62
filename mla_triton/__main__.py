"""`python -m mla_triton`: the command line where its script is not on the path."""

import sys

from mla_triton.cli import main

sys.exit(main())
