"""``python -m tests.simulation SEED``, ``--seeds N`` or ``--mutants``."""

from __future__ import annotations

import sys

from tests.simulation.search import main

sys.exit(main())
