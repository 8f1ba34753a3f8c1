"""A `vllm serve` process as the trainer sees it: JSON over HTTP, token ids in and out."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from opsd_train.config.errors import UserError

PATIENCE = 8.0  # seconds: a server whose health check takes longer hangs
_SHOWN = 300  # characters of a server's message


class ServerLost(Exception):
    """The server does not answer, or can no longer serve; the message says why in a few words."""


class Refused(UserError):
    """The server answers, and says no."""

    def __init__(self, url: str, status: int, message: str) -> None:
        super().__init__(f"{url} refused a request (HTTP {status}): {message}")
        self.status, self.message = status, message


@dataclass(frozen=True)
class ServedModel:
    """The base model of a server."""

    name: str
    """What requests call it."""
    weights: str
    """Folder or hub name that it was loaded from."""
    max_model_len: int
    """Tokens of a prompt and its completion."""


class VllmServer:
    """One server by its URL. Threads may share it; every request has a connection of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.lost: str | None = None
        """Why the server is no longer asked; None while it is."""
        self._lock, self._sockets = Lock(), set[socket.socket]()

    def check_health(self, patience: float = PATIENCE) -> None:
        """Raises ServerLost unless the server says within `patience` seconds that it is well."""
        self._ask("GET", "/health", None, patience)

    def model(self) -> ServedModel:
        """The base model. Raises ServerLost if the server does not answer."""
        answer = self._ask("GET", "/v1/models", None, PATIENCE)
        try:
            models = json.loads(answer)["data"]
            base = next(model for model in models if model.get("parent") is None)
            return ServedModel(base["id"], base["root"], base["max_model_len"])
        except (ValueError, LookupError, TypeError, StopIteration):
            raise UserError(f"{self.url} is not a vLLM server: its /v1/models says none") from None

    def complete(self, **body: Any) -> dict[str, Any]:
        """The only choice of a request to /v1/completions, with `token_ids`.

        `body`: `model`, `prompt` as token ids, and vLLM's sampling parameters. It waits as long as
        the server is not `lost`. Raises ServerLost, and Refused for a request that is wrong.
        """
        body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
        (choice,) = json.loads(self._ask("POST", "/v1/completions", body))["choices"]
        if choice.get("token_ids") is None:
            raise UserError(f"{self.url} does not return token ids: update its vLLM")
        return choice

    def load_adapter(self, name: str, folder: str) -> None:
        """Make the adapter in `folder`, in PEFT's format, a model with this name.

        Raises ServerLost, and Refused where the server cannot.
        """
        self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    def unload_adapter(self, name: str) -> None:
        """Forget the adapter, if the server has one of this name. Raises ServerLost."""
        try:
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except Refused as error:
            if error.status != 404:
                raise

    def lose(self, reason: str) -> None:
        """Count the server as lost, for the first reason given; requests in flight end at once."""
        self.lost = self.lost or reason
        self.abort()

    def abort(self) -> None:
        """End all requests in flight: they raise ServerLost, and the server stops their work."""
        with self._lock:
            for opened in self._sockets:
                with suppress(OSError):  # the server closed it first
                    opened.shutdown(socket.SHUT_RDWR)

    def _ask(self, method: str, path: str, body: Any, patience: float | None = None) -> bytes:
        """The body of the response. `patience`: seconds; None waits until the server is lost."""
        try:
            with self._connected(patience) as connection:
                text = None if body is None else json.dumps(body)
                headers = {"Content-Type": "application/json", "Connection": "close"}
                connection.request(method, path, text, headers)
                response = connection.getresponse()
                answer = response.read()
        except (OSError, HTTPException) as error:
            raise ServerLost(self.lost or _reason(error, patience)) from None
        if response.status >= 500 and path != "/v1/load_lora_adapter":  # whose errors are all 500
            raise ServerLost(f"HTTP {response.status}: {_message(answer)}")
        if response.status >= 400:
            raise Refused(self.url, response.status, _message(answer))
        return answer

    @contextmanager
    def _connected(self, patience: float | None) -> Iterator[HTTPConnection]:
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=patience or PATIENCE)
        connection.connect()
        opened = connection.sock  # which http.client takes back once it has read the headers
        opened.settimeout(patience)
        with self._lock:
            self._sockets.add(opened)
        try:
            if self.lost is not None and patience is None:
                raise ServerLost(self.lost)
            yield connection
        finally:
            with self._lock:
                self._sockets.discard(opened)
            connection.close()


def _reason(error: Exception, patience: float | None) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer for {patience or PATIENCE:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ConnectionError | HTTPException):
        return "connection lost"
    return getattr(error, "strerror", None) or str(error)


def _message(text: bytes) -> str:
    """The error message of a response, on one line."""
    message: Any = text.decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        answer = json.loads(message)
        message = answer["error"]["message"] if "error" in answer else answer["detail"]
    return " ".join(str(message).split())[:_SHOWN]
