"""Ask a worker about a picture, from the terminal.

    python -m deployments.client picture.png "What is in this image?"

Speaks the worker protocol with `requests` alone: a template to copy for a client of one's own.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import requests

from models.command_line import HelpFormatter
from models.prompts import Message, get_template, written_templates

IMAGE_PLACEHOLDER = "<image>"
TIMEOUT_S = (5, 60)
"""To connect; between two records. A worker sends a sign of life every few seconds."""
CONTROLLER_CODES = {
    2: "; the controller knows no worker of the model {model!r}: give its registered --model",
    3: "; the controller cannot reach the worker of {model!r}",
}
"""What a controller's records mean, which all have the same text."""
EXAMPLES = """\
examples:
  python -m deployments.client docs/shapes.png "What is in this image?"
  python -m deployments.client photo.jpg "Describe it." --url http://192.0.2.10:40000 \\
      --template llama_3 --temperature 0
"""


class WorkerError(Exception):
    """The worker answered with an error record, or not at all."""


def ask(
    url: str,
    prompt: str,
    images: Sequence[bytes] = (),
    *,
    model: str = "",
    temperature: float = 0.2,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Yields the answer's pieces as they come.

    Args:
        url: the worker's address, "http://localhost:21002"; http:// may be left out.
        prompt: with one `<image>` for each picture.
        images: the pictures' files as they are.
        model: its name; only a controller in between needs it.
        stop: the answer ends before any of these; a worker knows only its model's tokens.

    Raises:
        WorkerError: the worker cannot be reached, or says what is wrong.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "images": [base64.b64encode(image).decode("ascii") for image in images],
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "stop": list(stop),
    }
    shown = len(prompt)
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        with requests.post(
            f"{url}/worker_generate_stream", json=body, stream=True, timeout=TIMEOUT_S
        ) as response:
            if response.status_code != requests.codes.ok:
                raise WorkerError(_refusal(url, response))
            for chunk in response.iter_lines(decode_unicode=False, delimiter=b"\0"):
                if not chunk:
                    continue
                record = json.loads(chunk.decode())
                if (code := record["error_code"]) != 0:
                    hint = CONTROLLER_CODES.get(code, "").format(model=model)
                    raise WorkerError(f"{record['text']} (error_code: {code}){hint}")
                if len(record["text"]) > shown:
                    yield record["text"][shown:]
                    shown = len(record["text"])
    except requests.ConnectionError as error:
        raise WorkerError(f"nothing answers at {url}; is the worker running there?") from error
    except requests.RequestException as error:
        raise WorkerError(f"no answer from {url}: {type(error).__name__}") from error


def _refusal(url: str, response: requests.Response) -> str:
    text = f"{url} answered {response.status_code}: {response.text[:200]}"
    if response.status_code == requests.codes.not_found:
        text += f"; is {url} a worker's or controller's address, without a path?"
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deployments.client",
        description="Ask a running worker about a picture, and print the answer as it comes.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("image", type=Path, help="a PNG, JPEG, WebP, GIF, BMP or TIFF file")
    parser.add_argument(
        "question",
        help="what to ask; the picture stands before it, or where it says <image>",
    )
    parser.add_argument(
        "--url", default="http://localhost:21002", help="the worker's address, or a controller's"
    )
    parser.add_argument(
        "--model", default="", help="its registered name, which only a controller needs"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.2, help="0 always takes the likeliest token"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest answer, in tokens"
    )
    parser.add_argument(
        "--template",
        choices=written_templates(),
        default="vicuna_v1",
        help="the conversation format that the model was trained with, as `python -m "
        "models.checkpoints inspect` names it",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        picture = options.image.read_bytes()
    except OSError as error:
        print(f"{options.image}: {error.strerror}", file=sys.stderr)
        return 1
    question = options.question
    if IMAGE_PLACEHOLDER not in question:
        question = f"{IMAGE_PLACEHOLDER}\n{question}"
    template = get_template(options.template)
    try:
        for piece in ask(
            options.url,
            template.render([Message("user", question)]),
            [picture],
            model=options.model,
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
            stop=template.stop_strings,
        ):
            print(piece, end="", flush=True)
    except WorkerError as error:
        print(str(error).replace("images[0]", str(options.image)), file=sys.stderr)
        return 1
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
