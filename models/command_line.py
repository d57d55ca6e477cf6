"""How the project's commands show their help."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions and examples keep their lines; an option's default stands behind its help,
    unless it is nothing at all, or the help tells it in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, text = action.default, action.help or ""
        if default is None or default is False or default == "" or "default" in text:
            return action.help
        return super()._get_help_string(action)
