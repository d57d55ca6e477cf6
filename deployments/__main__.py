"""`python -m deployments`; see launcher.py."""

from __future__ import annotations

import sys

from deployments.ingress import prefer_haproxy

prefer_haproxy()  # before Ray Serve is imported

from deployments.launcher import main  # noqa: E402

sys.exit(main())
