"""Requests spread over servers that die, hang, come back or refuse: doubles in threads."""

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from threading import Thread, Timer
from typing import Any

import pytest

from opsd_train.config.errors import UserError
from opsd_train.serving import vllm_servers
from opsd_train.serving.vllm_client import Refused, ServerLost, VllmServer
from opsd_train.serving.vllm_servers import VllmServers
from tests.helpers.vllm_double import VllmDouble, made_up

QUICK = {"interval": 0.05, "patience": 0.8}  # seconds: a busy machine answers within
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def doubles() -> Iterator[list[VllmDouble]]:
    made = [VllmDouble(), VllmDouble()]
    yield made
    for double in made:
        double.hung.clear()
        double.held.clear()
        double.kill()


def body(number: int, **options: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": [number, 7], "seed": number, "max_tokens": 3, **options}


def ask(server: VllmServer, number: int) -> list[int]:
    return server.complete(**body(number))["token_ids"]


def wanted(count: int) -> list[list[int]]:
    """What an undisturbed rollout gives."""
    return [made_up(body(number)).tokens for number in range(count)]


def servers(doubles: list[VllmDouble], lines: list[str] | None = None, **options: Any):
    say = (lines if lines is not None else []).append
    return VllmServers([double.url for double in doubles], say, **options)


def numbers(double: VllmDouble) -> list[int]:
    return sorted(asked["seed"] for asked in double.bodies)


def meanwhile(action: Callable[[], Any]) -> None:
    Thread(target=action, daemon=True).start()


def test_each_server_gets_its_share_and_neighbours_stay_together(doubles) -> None:
    assert servers(doubles).spread(range(21), ask) == wanted(21)
    assert [numbers(double) for double in doubles] == [[*range(11)], [*range(11, 21)]]


def test_no_server_gets_more_at_once_than_it_has_room_for(doubles, monkeypatch) -> None:
    monkeypatch.setattr(vllm_servers, "IN_FLIGHT", 4)
    slow, quick = doubles
    slow.held.set()
    Timer(0.3, slow.held.clear).start()
    assert servers(doubles).spread(range(40), ask) == wanted(40)
    assert slow.most_at_once == 4 and quick.most_at_once <= 4
    assert len(slow.bodies) < 20 < len(quick.bodies)  # what waits goes to whoever has room


def test_many_requests_are_in_flight_together(doubles) -> None:
    for double in doubles:
        double.hold_until(60)
    assert servers(doubles).spread(range(120), ask) == wanted(120)
    assert [double.most_at_once for double in doubles] == [60, 60]


def test_a_killed_server_loses_nothing(doubles) -> None:
    lines: list[str] = []
    doubles[1].held.set()
    meanwhile(lambda: (doubles[1].wait_for(10), doubles[1].kill()))
    start = time.perf_counter()
    found = servers(doubles, lines)
    assert found.spread(range(20), ask) == wanted(20)
    assert time.perf_counter() - start < 5
    gone = f"{doubles[1].url} is gone: connection lost; its 10 requests go to the others"
    assert lines == [gone]
    assert numbers(doubles[0]) == [*range(20)] and not doubles[1].bodies
    assert found.spread(range(5), ask) == wanted(5)  # it is not asked again
    assert lines == [gone]


def test_a_server_that_is_not_there(doubles) -> None:
    lines: list[str] = []
    found = VllmServers([NOWHERE, doubles[0].url], lines.append)
    assert found.spread(range(8), ask) == wanted(8)
    assert lines == [f"{NOWHERE} is gone: connection refused; its 4 requests go to the others"]


def test_a_server_that_hangs_is_noticed(doubles) -> None:
    lines: list[str] = []
    doubles[0].hung.set()
    start = time.perf_counter()
    assert servers(doubles, lines, **QUICK).spread(range(8), ask) == wanted(8)
    assert 0.8 < time.perf_counter() - start < 5
    reason = "no answer for 0.8 s; its 4 requests go to the others"
    assert lines == [f"{doubles[0].url} is gone: {reason}"]


def test_by_default_a_server_that_hangs_is_noticed_within_ten_seconds() -> None:
    found = VllmServers([NOWHERE], print)
    assert found._interval + found._patience < 10


def test_a_long_generation_is_no_fault(doubles) -> None:
    lines: list[str] = []
    doubles[0].held.set()
    Timer(1.5, doubles[0].held.clear).start()
    assert servers(doubles, lines, **QUICK).spread(range(8), ask) == wanted(8)
    assert numbers(doubles[0]) == [0, 1, 2, 3] and not lines


def test_an_idle_server_is_missed_too(doubles) -> None:
    lines: list[str] = []
    doubles[0].held.set()
    doubles[1].kill()
    Timer(0.5, doubles[0].held.clear).start()
    assert servers(doubles, lines, **QUICK).spread([0], ask) == wanted(1)
    assert lines == [f"{doubles[1].url} is gone: connection refused"]


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_none_left_is_one_line(doubles, how: str) -> None:
    lines: list[str] = []
    for double in doubles:
        double.hung.set() if how == "hung" else double.kill()
    with pytest.raises(UserError, match="no vLLM server is left") as error:
        servers(doubles, lines, **QUICK).spread(range(6), ask)
    text = str(error.value)
    assert all(double.url in text for double in doubles) and "--resume" in text
    assert "\n" not in text and len(text) < 300
    assert ("no answer for 0.8 s" if how == "hung" else "connection refused") in text


def test_a_wrong_request_ends_the_call_at_once(doubles) -> None:
    doubles[1].held.set()  # its requests are given up

    def too_long(server: VllmServer, number: int) -> list[int]:
        return server.complete(**body(number, max_tokens=9999 if number == 0 else 3))["token_ids"]

    start = time.perf_counter()
    with pytest.raises(Refused, match=r"HTTP 400.*maximum context length") as error:
        servers(doubles).spread(range(8), too_long)
    assert error.value.status == 400 and time.perf_counter() - start < 5


def test_ctrl_c_does_not_wait_for_requests(doubles) -> None:
    for double in doubles:
        double.held.set()
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a worker of xdist ignores it
    Timer(0.3, partial(os.kill, os.getpid(), signal.SIGINT)).start()
    start = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            servers(doubles).spread(range(8), ask)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - start < 5


def test_the_end_is_quick_and_quiet(doubles) -> None:
    """Requests in flight end, none moves to another server, and none is sent any more."""
    lines: list[str] = []
    for double in doubles:
        double.held.set()
    found = servers(doubles, lines)
    meanwhile(lambda: ([double.wait_for(4) for double in doubles], found.end()))
    start = time.perf_counter()
    with pytest.raises(UserError, match="the run has ended"):
        found.spread(range(8), ask)
    with pytest.raises(UserError, match="the run has ended"):
        found.spread([0], ask)
    assert time.perf_counter() - start < 5 and not lines
    assert not any(double.bodies for double in doubles)


def test_each_asks_all_and_leaves_out_who_is_lost(doubles) -> None:
    lines: list[str] = []
    found = servers(doubles, lines, **QUICK)
    names = {server.url: server.url[-2:] for server in found.all}
    assert found.each(lambda server: names[server.url]) == {s: names[s.url] for s in found.all}
    doubles[0].hung.set()
    models = found.each(lambda server: server.complete(**body(1))["token_ids"])
    assert models == {found.all[1]: made_up(body(1)).tokens}
    assert lines == [f"{doubles[0].url} is gone: no answer for 0.8 s"]
    doubles[1].kill()
    with pytest.raises(UserError, match="no vLLM server is left"):
        found.each(lambda server: server.model())


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ((500, b'{"error": {"message": "Engine\\n died"}}'), ServerLost, "HTTP 500: Engine died"),
        ((503, b""), ServerLost, "HTTP 503"),
        ((401, b"<html> no"), Refused, r"http://\S+ refused a request \(HTTP 401\): <html> no"),
        ((404, b'{"detail": "Not Found"}'), Refused, r"\(HTTP 404\): Not Found"),
        ((200, b'{"choices": [{"text": "hi"}]}'), UserError, "does not return token ids: update"),
    ],
)
def test_what_a_server_may_answer(doubles, monkeypatch, answer, error, words) -> None:
    def send(handler: Any, _: Any) -> None:
        handler.send_response(answer[0])
        handler.end_headers()
        handler.wfile.write(answer[1])

    monkeypatch.setattr("tests.helpers.vllm_double._Handler._complete", send)
    with pytest.raises(error, match=words):
        ask(VllmServer(doubles[0].url), 1)


def test_adapters_of_a_server(doubles, tmp_path) -> None:
    server = VllmServer(doubles[0].url)
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    server.load_adapter("a", str(tmp_path))
    assert doubles[0].adapters == {"a": str(tmp_path)}
    assert server.model().name == "base"  # not the adapter
    with pytest.raises(Refused, match="already been loaded"):
        server.load_adapter("a", str(tmp_path))
    server.unload_adapter("a")
    server.unload_adapter("a")  # it has none: nothing to do
    assert not doubles[0].adapters


@pytest.mark.parametrize("text", [b"<html>", b"{}", b'{"data": [{"id": "gpt"}]}', b'{"data": []}'])
def test_what_is_no_vllm_server(doubles, monkeypatch, text: bytes) -> None:
    def send(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(text)

    monkeypatch.setattr("tests.helpers.vllm_double._Handler.do_GET", send)
    with pytest.raises(UserError, match=r"http://\S+ is not a vLLM server"):
        VllmServer(doubles[0].url).model()


@pytest.mark.parametrize(
    ("files", "count", "room"),
    [(1024, 1, 256), (1024, 4, 128), (64, 40, 1), (resource.RLIM_INFINITY, 9, 256)],
)
def test_there_are_sockets_for_all_requests(monkeypatch, files: int, count: int, room: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert VllmServers([f"http://a:{n}" for n in range(count)], print)._room == room
