"""The playground: the web page that `/` shows to browsers.

    pages.py           the routes
    draw_examples.py   draws the example pictures
    static/            what browsers load: one page, one style sheet, ES modules; nothing is built

The page knows the server by `/v1/models`, `/v1/chat/completions` and `/health` alone, all relative
to its own address, so that it works under a route prefix and behind a proxy's path.
"""

from deployments.playground.pages import accepts_html, index_page, playground_routes

__all__ = ["accepts_html", "index_page", "playground_routes"]
