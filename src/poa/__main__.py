"""`python -m poa`, for `torchrun -m poa`."""

import sys

from poa.cli.main import main

sys.exit(main())
