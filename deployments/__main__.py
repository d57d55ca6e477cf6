"""`python -m deployments`; see launcher.py."""

from __future__ import annotations

import sys

from deployments.launcher import main

sys.exit(main())
