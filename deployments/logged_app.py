"""An ASGI application whose requests are logged, and have an id that their senders may choose."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.request_log import RequestLog, request_id_of

REQUEST_ID_HEADER = "x-request-id"
MAX_PATH_CHARS = 200


class LoggedApp:
    """Around the whole application, so that it sees every request to its end."""

    def __init__(self, app: ASGIApp, requests: RequestLog, *, sends_request_id: bool) -> None:
        """
        Args:
            sends_request_id: in the response's header, unless a proxy in front does it.
        """
        self._app = app
        self._requests = requests
        self._sends_request_id = sends_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(Headers(scope=scope).get(REQUEST_ID_HEADER))
        entry = self._requests.open(request_id, scope["method"])
        is_complete = False

        async def watched_receive() -> Message:
            try:
                message = await receive()
            except Exception:  # as Ray Serve says it, or by cancelling the whole request
                entry.client_gone = not is_complete
                raise
            if message["type"] == "http.disconnect" and not is_complete:
                entry.client_gone = True
            return message

        async def watched_send(message: Message) -> None:
            nonlocal is_complete
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                if self._sends_request_id:
                    MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                is_complete = True
            try:
                await send(message)
            except OSError:  # as ASGI 2.4 says it
                entry.client_gone = True
                raise

        try:
            await self._app(scope, watched_receive, watched_send)
        except asyncio.CancelledError:
            entry.client_gone = entry.client_gone or not is_complete
            raise
        except Exception as error:
            if not entry.client_gone:
                entry.note_error(error)
            raise
        finally:
            # Known only now. The pattern, since paths may hold anything.
            route = getattr(scope.get("route"), "path", None)
            entry.route = route or scope["path"][:MAX_PATH_CHARS]
            self._requests.close(entry)
