r"""The model between a step before it and one behind it, each a deployment of its own.

# beside `make serve`, in the same Ray; Ctrl-C of one that blocks would stop the model, too
serve run --non-blocking --address auto --name finder --route-prefix /find \
    docs.examples.chat_pipeline:app
curl --data-binary @docs/shapes.png "localhost:21002/find?thing=circle"
"""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request

LONGEST_SIDE = 512


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Shrink:
    """Before: pictures of any size become small ones, which cost less to send and to decode."""

    def __call__(self, picture: bytes) -> bytes:
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Report:
    """Behind: a chat completion becomes what the caller wants to know."""

    def __call__(self, thing: str, completion: dict[str, Any]) -> dict[str, Any]:
        answer = completion["choices"][0]["message"]["content"]
        return {
            "thing": thing,
            "found": answer == "Yes",
            "tokens": completion["usage"]["total_tokens"],
        }


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Finder:
    """Whether a thing is in a picture."""

    def __init__(
        self, shrink: DeploymentHandle[Any], report: DeploymentHandle[Any], application: str
    ) -> None:
        self._shrink = shrink
        self._report = report
        self._application = application

    async def __call__(self, request: Request) -> dict[str, Any]:
        return await self.find(await request.body(), request.query_params["thing"])

    async def find(self, picture: bytes, thing: str) -> dict[str, Any]:
        """
        Args:
            picture: a PNG or JPEG file.
        """
        model = serve.get_app_handle(self._application)
        small = base64.b64encode(await self._shrink.remote(picture)).decode("ascii")
        completion = await model.chat.remote(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "image_url",
                                "image_url": {"url": f"data:image/png;base64,{small}"},
                            },
                            {"type": "text", "text": f"Is there a {thing} in the image?"},
                        ],
                    }
                ],
                "structured_outputs": {"choice": ["Yes", "No"]},
                "temperature": 0,
            }
        )
        result: dict[str, Any] = await self._report.remote(thing, completion)
        return result


app = Finder.bind(Shrink.bind(), Report.bind(), "tinychat")
