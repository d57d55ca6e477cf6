"""A tokenizer's own chat template: Jinja, from the checkpoint, and therefore a stranger's program.

It runs in Jinja's immutable sandbox, which gives it no way to Python's objects, files or modules.
What it writes is bounded in length. It is tried out when it is loaded, where one that does not
come to an end is refused.

Source of the surroundings (names, filters, whitespace rules): transformers 5,
utils/chat_template_utils.py.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from models.errors import CheckpointError, InvalidRequest
from models.json_config import JsonConfig
from models.prompts.messages import IMAGE, Conversation, Message, Part, joined
from models.prompts.templates import TEMPLATES, Template
from models.prompts.tokenizer import IMAGE_PLACEHOLDER, Tokenizer

NAME = "tokenizer"
MAX_SOURCE_CHARS = 2**18
MAX_RENDERED_CHARS = 2**23
TRIAL_SECONDS = 5.0

JINJA_FILE = "chat_template.jinja"
PLACES = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
"""JSON files that may hold one under `chat_template`. A processor's goes before a tokenizer's:
it knows of pictures."""
SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "image_token",
)  # fmt: skip
QUESTION, ANSWER = "Question-of-the-trial", "Answer-of-the-trial"


def find_chat_template(folder: Path) -> tuple[str, str] | None:
    """(file's name, the template's source) of a checkpoint's own chat template, if it has one.

    Raises:
        CheckpointError: a file that should hold one cannot be read.
    """
    path = folder / JINJA_FILE
    if path.is_file():
        try:
            return JINJA_FILE, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{JINJA_FILE} cannot be read as UTF-8 text") from error
    for name in PLACES:
        if not (folder / name).is_file():
            continue
        config = JsonConfig.read(folder / name, name)
        if "chat_template" in config:
            return name, _source(config)
    return None


def _source(config: JsonConfig) -> str:
    """A text, or several by name, in either of transformers' two ways."""
    value = config.values["chat_template"]
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict):
        value = value.get("default")
    if not isinstance(value, str):
        raise CheckpointError(
            f"{config.label}: chat_template must be a text, or texts by name with one 'default'"
        )
    return value


class TokenizerTemplate(Template):
    """The chat template that a checkpoint brings along."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        label: str = "chat_template",
    ) -> None:
        """
        Args:
            source: the template.
            special_tokens: names that it may use ("bos_token") and the tokens' texts.
            label: where it comes from, for messages.

        Raises:
            CheckpointError: it is no Jinja, uses what the sandbox forbids, does not come to an
                end, or cannot write the simplest conversation.
        """
        if len(source) > MAX_SOURCE_CHARS:
            raise CheckpointError(
                f"{label}: the chat template has {len(source)} characters; at most "
                f"{MAX_SOURCE_CHARS} are read"
            )
        self.name = NAME
        self.system = ""
        self.stop_strings = ()
        self._label = label
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _Environment().from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"{label}: the chat template is no valid Jinja (line {error.lineno}: "
                f"{error.message})"
            ) from error
        # Where the tokenizer puts it first by itself, the template's own would be a second one.
        bos = self._special_tokens.get("bos_token", "")
        begins = tokenizer.encode("")[:1]
        self._implied = bos if bos and begins == [tokenizer.token_to_id(bos)] else ""
        self._takes_parts = False
        self._takes_parts = self._try_parts()
        self.stop_tokens = self._find_stop_tokens(tokenizer)

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> TokenizerTemplate:
        """
        Raises:
            CheckpointError: the folder holds none, or one that cannot be used.
        """
        found = find_chat_template(folder)
        if found is None:
            raise CheckpointError(
                f"template is {NAME!r}, but {folder.name} holds no chat template (looked for "
                f"{JINJA_FILE}, and chat_template in {', '.join(PLACES)}); choose another template"
            )
        label, source = found
        return cls(source, tokenizer, _special_tokens(folder), label)

    def render(self, messages: Iterable[Message], *, add_generation_prompt: bool = True) -> str:
        """
        Raises:
            InvalidRequest: also where the template itself refuses the conversation.
        """
        conversation = Conversation.of(messages)
        if add_generation_prompt:
            conversation.require_question()
        try:
            text = self._render(conversation, add_generation_prompt)
        except TemplateError as error:
            # What a template raises on purpose (`raise_exception`) is written for its user.
            raise InvalidRequest(
                "messages", f"the model's chat template refuses them: {error}"
            ) from error
        except Exception as error:
            raise InvalidRequest(
                "messages", f"the model's chat template fails on them: {type(error).__name__}"
            ) from error
        return text.removeprefix(self._implied)

    def _render(self, conversation: Conversation, add_generation_prompt: bool) -> str:
        messages: list[dict[str, Any]] = []
        if conversation.system is not None:
            messages.append({"role": "system", "content": self._content([conversation.system])})
        for index, parts in enumerate(conversation.turns):
            role = "assistant" if index % 2 else "user"
            messages.append({"role": role, "content": self._content(parts)})
        written: list[str] = []
        remaining = MAX_RENDERED_CHARS
        for piece in self._template.generate(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
            documents=None, **self._special_tokens,
        ):  # fmt: skip
            written.append(piece)
            remaining -= len(piece)
            if remaining < 0:
                raise TemplateError(f"more than {MAX_RENDERED_CHARS} characters")
        return "".join(written)

    def _content(self, parts: Sequence[Part]) -> str | list[dict[str, str]]:
        """As the template takes it: typed parts, or one text with placeholders."""
        if not self._takes_parts:
            return joined(parts, IMAGE_PLACEHOLDER, "\n")
        return [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in parts
        ]

    # ---- tried out at loading ---------------------------------------------------------------

    def _try_parts(self) -> bool:
        """Whether content has to be given in parts: whether a picture then has its place."""
        asked = Conversation(None, ((IMAGE, QUESTION),))
        self._takes_parts = True
        try:
            text = self._trial(asked)
        except CheckpointError:
            text = ""
        if text.count(IMAGE_PLACEHOLDER) == text.count(QUESTION) == 1:
            return True
        self._takes_parts = False
        text = self._trial(asked)
        if text.count(IMAGE_PLACEHOLDER) != 1 or text.count(QUESTION) != 1:
            raise CheckpointError(
                f"{self._label}: the chat template drops or repeats what it is given; choose "
                "another template"
            )
        return False

    def _find_stop_tokens(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        """The tokens that the template puts behind answers, as VILA finds them."""
        turns: tuple[tuple[Part, ...], ...] = ((QUESTION,), (ANSWER,)) * 2
        _, *behind = self._trial(Conversation(None, (*turns, (QUESTION,)))).split(ANSWER)
        found = [max((t for t in tokenizer.added_tokens if text.startswith(t)), key=len, default="")
                 for text in behind]  # fmt: skip
        return tuple(dict.fromkeys(token for token in found if token))

    def _trial(self, conversation: Conversation) -> str:
        """Renders in a thread of its own, since nothing can interrupt a template's loop."""
        outcome: list[str | Exception] = []

        def attempt() -> None:
            try:
                outcome.append(self._render(conversation, True))
            except Exception as error:
                outcome.append(error)

        thread = threading.Thread(target=attempt, name="chat-template-trial", daemon=True)
        thread.start()
        thread.join(TRIAL_SECONDS)
        if not outcome:
            raise CheckpointError(
                f"{self._label}: the chat template does not come to an end within "
                f"{TRIAL_SECONDS:g} s; choose another template"
            )
        (result,) = outcome
        if isinstance(result, Exception):
            raise CheckpointError(
                f"{self._label}: the chat template cannot write a conversation "
                f"({type(result).__name__}: {result}); choose another template"
            ) from result
        return result


def _special_tokens(folder: Path) -> dict[str, str]:
    """Texts by name ("bos_token"), from either of the two files that name them."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config = JsonConfig.read(folder / name, name)
            for key in SPECIAL_TOKENS:
                value = config.values.get(key)
                text = value.get("content") if isinstance(value, dict) else value
                if isinstance(text, str):
                    tokens[key] = text
    return tokens


class _Generation(Extension):
    """`{% generation %}` marks answers for training; here they are text like any other."""

    tags = {"generation"}  # noqa: RUF012 - declared so by the base class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _PlainNamespace(Namespace):
    """Jinja's `namespace()`, without names that mean something to Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Without a parameter called self, which is a name that templates may use.
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a chat template cannot name an attribute {name!r}")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with the names that transformers adds to it."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
        )
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _PlainNamespace
        self.globals["dict"] = _to_dict


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _to_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict()`; the class itself would come with its methods."""
    return dict(*args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own it escapes no HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


TEMPLATES.register(NAME, TokenizerTemplate)
