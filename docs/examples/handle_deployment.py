r"""A deployment of one's own that asks the model: a captioner with an HTTP route.

# beside `make serve`, in the same Ray; Ctrl-C of one that blocks would stop the model, too
serve run --non-blocking --address auto --name captioner --route-prefix /caption \
    docs.examples.handle_deployment:app
curl --data-binary @docs/shapes.png localhost:21002/caption
"""

from __future__ import annotations

from ray import serve
from starlette.requests import Request


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Captioner:
    """PNG or JPEG in, one sentence out."""

    def __init__(self, application: str) -> None:
        self._application = application

    async def __call__(self, request: Request) -> str:
        return await self.caption(await request.body())

    async def caption(self, picture: bytes) -> str:
        """One sentence about a picture's file."""
        model = serve.get_app_handle(self._application).options(stream=True)
        pieces = model.generate.remote(
            prompt="USER: <image>\nWhat is in this image? ASSISTANT:",
            images=[picture],
            temperature=0,
        )
        return "".join([piece["text"] async for piece in pieces])


app = Captioner.bind("tinychat")
