"""`python -m deployments`; see launcher.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from deployments.ingress import prefer_haproxy


def main(arguments: Sequence[str] | None = None) -> int:
    prefer_haproxy()  # before Ray Serve is imported
    from deployments.launcher import main as launch

    return launch(arguments)


if __name__ == "__main__":
    sys.exit(main())
