"""`octavo chat`: talk to a running server, or to a model that is loaded for the purpose, from the terminal."""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Coroutine, Generator
from contextlib import ExitStack, closing, suppress
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from octavo.config import EngineConfig, config_fields, flag_of
from octavo.errors import OctavoError
from octavo.tools.client_headers import client_headers
from octavo.tools.no_answer import no_answer, other_scheme

__all__ = ["Local", "Remote", "add_arguments", "run"]

DEFAULT_URL = "http://localhost:8000"
HELP = "At the prompt, /clear forgets what was said, /quit or Ctrl-D leaves, /help lists these.\nCtrl-C stops an answer."
LEAVE = ("/quit", "/exit", "/bye", "exit", "quit")
Event = dict[str, Any]
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    group = parser.add_argument_group("chat", HELP)
    group.add_argument("--complete", action="store_true", help="complete plain text instead of chatting")
    group.add_argument("--system", metavar="TEXT", help="what the model is told first")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    group.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default: the model's own)")
    group.add_argument("--api-key", metavar="KEY", help="the server's (default: $OPENAI_API_KEY)")


class Backend(Protocol):
    """Something that answers a request of the OpenAI API with the events of a stream."""

    def events(self, path: str, body: dict[str, Any]) -> Generator[Event, None, None]: ...
    def close(self) -> None: ...


def run(args: argparse.Namespace, config: EngineConfig, started: float) -> int:
    """Talks until the input ends."""
    url = _url(args.model)
    if url is not None:
        _refuse_engine_flags(args, url)
    elif args.api_key is not None:
        raise OctavoError(f"--api-key is for a server, and {args.model} is none; leave it out.")
    backend: Backend = Remote(url, args.api_key or os.environ.get("OPENAI_API_KEY")) if url is not None else Local(args, config)
    with closing(backend):
        if sys.stdin is not None and sys.stdin.isatty():
            _converse(backend, args)
        elif text := _piped():
            _answer(backend, args, _first(args), text)
    return 0


def _url(model: str | None) -> str | None:
    """The URL that MODEL is; None for a directory or a name of the hub. localhost:8000 is one, unless it is a directory."""
    if model is None:
        return DEFAULT_URL
    if model.lower().startswith(("http://", "https://")):
        return model
    is_address = re.fullmatch(r"(localhost|[\w-]+(\.[\w-]+)*|\[[\da-fA-F:]+\]):\d+(/.*)?", model)
    return f"http://{model}" if is_address and not os.path.exists(model) else None


def _refuse_engine_flags(args: argparse.Namespace, url: str) -> None:
    """Raises OctavoError for flags that say how a model is loaded, where a server has loaded its own."""
    names = (field.name for field in config_fields() if field.name != "model")
    given = [flag_of(name) for name in names if getattr(args, name, None) is not None]
    if given:
        raise OctavoError(
            f"{given[0]} is for a model that this command loads, and the server at {url} has loaded its own; "
            "leave it out, or give a checkpoint directory."
        )


def _piped() -> str:
    """The one prompt that a pipe or a file holds; none where there is no standard input at all."""
    if sys.stdin is None:
        return ""
    try:
        return sys.stdin.buffer.read().decode().replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise OctavoError(f"The input is no UTF-8 (byte {error.start}); convert it first, with iconv for example.") from error
    except OSError as error:
        raise OctavoError(f"The input cannot be read: {error.strerror or error}.") from error


def _first(args: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _converse(backend: Backend, args: argparse.Namespace) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() a history and line editing)
    print("/help lists what can be said here; Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr)
    messages = _first(args)
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if not (word := text.strip().lower()):
            continue
        if word in LEAVE:
            return
        if re.fullmatch(r"/[a-z]*", word):  # one word: a path or a sentence that begins so is for the model
            if word == "/clear":
                messages = _first(args)
            print({"/help": HELP, "/clear": "What was said is forgotten."}.get(word, f"{word} is not known. {HELP}"))
            continue
        try:
            _answer(backend, args, messages, text)
        except OctavoError as error:  # the next try may do better
            print(textwrap.fill(f"octavo: {error}", shutil.get_terminal_size().columns), file=sys.stderr)


def _answer(backend: Backend, args: argparse.Namespace, messages: list[dict[str, str]], text: str) -> None:
    """Prints the answer to `text` as it comes, and adds both to `messages`."""
    limits = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    body = {"stream": True, **{name: value for name, value in limits.items() if value is not None}}
    if args.complete:
        print(text, end="", flush=True)
        events = backend.events("/v1/completions", {"prompt": text, "max_tokens": 256, **body})
    else:
        asked = [*messages, {"role": "user", "content": text}]
        events = backend.events("/v1/chat/completions", {"messages": asked, **body})
    said = []
    try:
        with closing(events):
            for event in events:
                said.append(_text(event))
                print(said[-1], end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print(flush=True)
    if not args.complete:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(said)}]


def _text(event: Event) -> str:
    if "error" in event:
        raise OctavoError(event["error"]["message"])
    if not event["choices"]:
        return ""
    choice = event["choices"][0]
    delta = choice.get("delta", {})
    return choice.get("text") or delta.get("reasoning_content") or delta.get("content") or ""


class Remote:
    """A server at a URL. Only the standard library: a terminal needs no more."""

    def __init__(self, url: str, api_key: str | None = None):
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise OctavoError(f"{url} is no URL ({error}).") from error
        self._url = f"{parts.scheme}://{parts.netloc}"
        self._secure, self._host = parts.scheme == "https", parts.netloc
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = client_headers(api_key)
        try:
            self._model = json.loads(self._request("GET", "/v1/models").read())["data"][0]["id"]
        except (ValueError, LookupError, TypeError, OSError, http.client.HTTPException) as error:
            raise OctavoError(f"{url} is no server of OpenAI's API: it does not list its models.") from error

    def events(self, path: str, body: dict[str, Any]) -> Generator[Event, None, None]:
        """The events of one request; closing the generator closes the connection, and the server aborts the request."""
        with closing(self._request("POST", path, {"model": self._model, **body})) as response:
            try:
                for line in response:
                    data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                    if data == b"[DONE]":
                        return
                    if data:
                        yield json.loads(data)
            except (ValueError, OSError, http.client.HTTPException):
                pass  # as if it had ended
        raise OctavoError(f"The answer of {self._url} broke off; the server may have ended.")

    def close(self) -> None:
        """Nothing is kept open between requests."""

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        make = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        none = f"No server answers at {self._url}; start one with `octavo serve`, or name a checkpoint directory."
        try:
            connection = make(self._host)
        except http.client.HTTPException as error:
            raise OctavoError(none) from error
        with ExitStack() as failed:
            failed.callback(connection.close)
            try:
                connection.request(method, self._prefix + path, json.dumps(body) if body else None, self._headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise OctavoError(no_answer(self._url, error) or none) from error
            if response.status == 401:
                raise OctavoError(f"The server at {self._url} asks for an API key; give it with --api-key KEY.")
            if response.status != 200:
                answered = f"The server answered {response.status} {response.reason}."
                raise OctavoError(_refusal(response) or other_scheme(self._url) or answered)
            failed.pop_all()
        return response


def _refusal(response: http.client.HTTPResponse) -> str | None:
    """The sentence of an error in OpenAI's form; None for another answer."""
    try:
        return str(json.loads(response.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None


class Local:
    """A model of this process's own, behind the same handlers as the server's."""

    def __init__(self, args: argparse.Namespace, config: EngineConfig):
        from octavo.frontend.async_engine import AsyncEngine
        from octavo.frontend.loading_bar import LoadingBar
        from octavo.frontend.model_files import with_files
        from octavo.server.serve import make_served

        config = with_files(config)
        self._runner = asyncio.Runner()
        with closing(LoadingBar()) as progress:
            self._engine = self._run(AsyncEngine.start(config, progress.update))
        self._served = make_served(self._engine, [args.model])

    def events(self, path: str, body: dict[str, Any]) -> Generator[Event, None, None]:
        """The events of one request, made without HTTP."""
        from octavo.server.chat import chat
        from octavo.server.completions import complete
        from octavo.server.events import EventStream, fields_of
        from octavo.server.protocol import ChatRequest, CompletionRequest

        if path.endswith("/chat/completions"):
            answer = self._run(chat(self._served, ChatRequest(**body), "terminal"))
        else:
            answer = self._run(complete(self._served, CompletionRequest(**body), "terminal"))
        assert isinstance(answer, EventStream)  # the body asked for one
        try:
            while (event := self._run(_next(answer.events))) is not None:
                yield fields_of(event)
        finally:
            self._run(answer.events.aclose())

    def close(self) -> None:
        """Ends the engine."""
        self._run(self._engine.shutdown(0))
        self._runner.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)


async def _next(events: Any) -> Event | None:
    return await anext(events, None)
