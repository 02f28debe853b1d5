"""Training answers over HTTP, from a stand-in server on loopback that fails as planned: every record is
accounted for exactly once, whatever happens on the way.
"""

import gzip
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coral.data import replies
from coral.data.account import Regenerated
from coral.data.endpoint import answer_over_http, connect
from coral.data.regenerate import regenerate
from coral.errors import CoralError

FINE = "fine"
SOUND = (
    b'{"choices": [{"message": {"content": "A"}, "finish_reason": "stop"}], '
    b'"usage": {"completion_tokens": %s}}'
)
# Replies that would cost the run: name -> (bytes, whether they are said to be packed).
HOSTILE: dict[str, tuple[bytes, bool]] = {
    "bomb": (gzip.compress(SOUND % (b" " * 20_000_000 + b"1")), True),
    "large": (SOUND % (b" " * 2_000_000 + b"1"), False),
    "deep": (b"[" * 200_000, False),
    "no choice": (b'{"choices": {}}', False),
    "a number": (b'{"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]}', False),
    "infinite": (SOUND % b"1e999", False),
    "not a number": (SOUND % b"NaN", False),
    "long digits": (SOUND % (b"9" * 5000), False),
}


class Server(ThreadingHTTPServer):
    """The n-th request of a conversation (known by its first turn) meets the n-th entry of its plan."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, plan: dict[str, list[str]] | None = None, otherwise: str = FINE) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.otherwise, self.models = plan or {}, otherwise, ["tiny"]
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: set[str | None] = set()
        self.lock, self.together, self.most_together = threading.Lock(), 0, 0
        self.closing = threading.Event()
        self.pause = 0.0
        self.on_request: Callable[[], None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that have gone away are part of the plan."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        first = next(said["content"] for said in body["messages"] if said["role"] == "user")
        with server.lock:
            server.bodies.append(body)
            server.times.append(time.monotonic())
            server.keys.add(self.headers["authorization"])
            steps = server.plan.get(first, [])
            step = steps.pop(0) if steps else server.otherwise
            server.together += 1
            server.most_together = max(server.most_together, server.together)
        if server.on_request:
            server.on_request()
        server.closing.wait(server.pause)
        try:
            self.do(step, body)
        finally:
            with server.lock:
                server.together -= 1

    def do(self, step: str, body: dict[str, Any]) -> None:
        text = " ".join(said["content"] for said in body["messages"]).upper()
        if step == "hang":
            self.server.closing.wait(60)
        elif step == "disconnect":
            self.close_connection = True
        elif step == "half":
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
        elif step == "malformed":
            self.send_response(200)
            self.send_header("content-length", "9")
            self.end_headers()
            self.wfile.write(b'{"choices')
        elif step == "surrogate":
            self.answer("\ud83d", "stop")
        elif step == "aborted":
            self.answer("half of it", "abort")
        elif step in HOSTILE:
            self.send_response(200)
            content, packed = HOSTILE[step]
            if packed:
                self.send_header("content-encoding", "gzip")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        elif step.startswith("echo"):
            key = str(self.headers["authorization"])
            if step == "echo":
                self.answer(f"you sent {key}", "stop")
            else:
                self.reply(int(step[-3:]), {"error": {"message": "x" * 190 + key}})
        elif step == "empty":
            self.answer(None, "stop")
        elif step == "cut":
            self.answer(text + "\ufffd", "length")
        elif step == FINE:
            self.answer(text, "stop")
        else:  # a status, perhaps with what Retry-After says
            status, _, wait = step.partition(" ")
            self.reply(int(status), {"error": {"message": f"no: {status}"}}, {"retry-after": wait})

    def answer(self, text: str | None, reason: str) -> None:
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
        self.reply(200, {"choices": [choice], "usage": {"completion_tokens": 7}})

    def reply(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(*arguments: Any, **options: Any) -> Iterator[Server]:
    with Server(*arguments, **options) as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.005))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


def conversations(path: Path, turns: list[list[str]]) -> Path:
    said = [[{"role": "user", "content": turn} for turn in each] for each in turns]
    with_answers = [
        [m for user in each for m in (user, {"role": "assistant", "content": "OLD"})] for each in said
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in with_answers))
    return path


def run(
    source: Path, output: Path, *servers: Server, temperatures: tuple[float, ...] = (0.0, 0.8), **options: Any
) -> Regenerated:
    options = {"concurrency": 4, "retries": 3, "timeout": 60.0, "first_wait": 0.001, **options}
    keep = options.pop("keep_unfinished", True)
    connected = connect([server.url for server in servers], **options)
    answer = answer_over_http(connected, max_new_tokens=8, seed=3, keep_unfinished=keep)
    return regenerate(
        [source], output, answer, temperatures=temperatures,
        settings={"seed": 3, "max_new_tokens": 8, "model": connected.model},
    )  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def accounted(source: Path, output: Path, result: Regenerated) -> Counter[str]:
    """Checks the sum, in what is returned and on disk, and returns the failures by reason."""
    records = len(source.read_text().splitlines())
    assert result.written + result.failed.total + result.skipped.total == result.input == records
    written = [record["source"] for record in lines(output)]
    assert len(written) == len({*written}) == result.written
    failed = [record["source"] for record in lines(output.with_suffix(".failed.jsonl"))]
    assert not {*failed} & {*written} and len(failed) == len({*failed}) == result.failed.total - result.again
    account = json.loads(output.with_suffix(".account.json").read_text())
    assert (account["input"], account["written"]) == (records, result.written)
    assert sum(account["failed"].values()) == result.failed.total
    assert sum(account["skipped"].values()) == result.skipped.total
    return result.failed.counts


# What a conversation of one turn meets -> (is it written, the reason if not, does the same command ask again)
PLANS: dict[str, tuple[list[str], str, bool]] = {
    "fine": ([FINE], "", False),
    "429 with Retry-After": (["429 0.01", FINE], "", False),
    "500 twice": (["500", "500", FINE], "", False),
    "always 500": (["500"] * 4, "answers 500", True),
    "hangs": (["hang", FINE], "", False),
    "disconnects": (["disconnect", "half", FINE], "", False),
    "always disconnects": (["disconnect"] * 4, "the connection was lost", True),
    "malformed": (["malformed", "surrogate", "aborted", FINE], "", False),
    "always malformed": (["malformed"] * 4, "the reply cannot be read", True),
    "refused": (["400"], "answers 400", False),
    "too large": (["413"], "answers 413", False),
    "empty": (["empty"], "no usable answer", False),
}


@pytest.mark.parametrize("name", PLANS)
def test_each_way_to_fail_is_counted_exactly(tmp_path: Path, name: str) -> None:
    """Stops: a failure that loses a record, writes it twice, is retried in vain, or is not retried."""
    steps, problem, again = PLANS[name]
    source = conversations(tmp_path / "c.jsonl", [["bad"], ["good one"], ["good two"]])
    with serving({"bad": list(steps)}) as server:
        result = run(source, tmp_path / "out.jsonl", server, timeout=1.0 if name == "hangs" else 60.0)
        assert sum(body["messages"][0]["content"] == "bad" for body in server.bodies) == len(steps)
    assert accounted(source, tmp_path / "out.jsonl", result) == ({problem: 1} if problem else {})
    assert result.again == again and result.written == 3 - bool(problem)
    if problem.startswith("answers"):
        assert f"c.jsonl:1: {problem} (no: {steps[0]})" in str(result)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_reply_costs_its_own_record_alone(tmp_path: Path, name: str) -> None:
    """Stops: a reply that fills the memory or ends the run, and with it every record that was under way."""
    source = conversations(tmp_path / "c.jsonl", [["bad"], ["good one"], ["good two"]])
    with serving({"bad": [name] * 4}) as server:
        result = run(source, tmp_path / "out.jsonl", server)
    (problem,) = accounted(source, tmp_path / "out.jsonl", result)
    assert result.written == 2 and result.again == 1
    expected = {"bomb": "the reply is packed, which was not asked for",
                "large": "the reply is larger than its answer can be"}  # fmt: skip
    assert problem == expected.get(name, "the reply cannot be read")


def test_tokens_are_counted_within_what_was_asked_for(tmp_path: Path) -> None:
    """Stops: a speed that cannot be told since a server claims 10^300 tokens."""
    content = SOUND % (b"9" * 400)
    reply = replies.Reply(200, {}, content)
    assert replies.read_answer(reply, 8) == ("A", True, 8)
    assert replies.read_answer(replies.Reply(200, {}, SOUND % b"-5"), 8)[2] == 0


@pytest.mark.parametrize(
    ("step", "status"), [("echo", 0), ("echo 400", 400), ("echo 401", 401), ("echo 500", 500)]
)
def test_an_echoed_key_is_kept_nowhere(tmp_path: Path, capsys: Any, step: str, status: int) -> None:
    """Stops: the API key in a file that is shared, or in a log; half of it where a message is cut."""
    from rich.console import Console

    key = "sk-0123456789-secret"
    source = conversations(tmp_path / "c.jsonl", [["bad"], ["good"]])
    with serving({"bad": [step] * 4}) as server:
        console = Console(width=400)
        result = run(
            source, tmp_path / "out.jsonl", server, api_key=f"{key}\n", console=console, concurrency=1
        )
        assert server.keys == {f"Bearer {key}"}
    kept = "".join(path.read_text() for path in tmp_path.glob("out*")) + str(result) + capsys.readouterr().out
    assert key[:8] not in kept and result.failed.total >= 1
    assert status == 0 or f"answers {status}" in kept
    with serving() as server, pytest.raises(CoralError, match=r"characters that a header cannot") as caught:
        connect(server.url, api_key="sk-01\n23456789")
    assert "sk-" not in str(caught.value)


def test_a_word_that_stands_for_no_key_is_no_secret(tmp_path: Path) -> None:
    """Stops: answers that are refused for the word EMPTY, which is what vLLM's users set as their key."""
    source = conversations(tmp_path / "c.jsonl", [["empty"]])
    with serving() as server:
        assert run(source, tmp_path / "out.jsonl", server, api_key="EMPTY").written == 1


step = st.sampled_from(
    [FINE, "429", "500", "503 0.001", "400", "disconnect", "half", "malformed", "empty", "cut"]
)
plans = st.lists(st.tuples(st.integers(1, 3), st.lists(step, max_size=5)), min_size=1, max_size=10)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans, st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_written_failed_and_skipped_are_the_input(
    tmp_path_factory: pytest.TempPathFactory,
    plan: list[tuple[int, list[str]]],
    concurrency: int,
    retries: int,
    keep: bool,
) -> None:
    """Stops: any order of failures in which a record is lost or doubled, in one run or in the one after."""
    place = tmp_path_factory.mktemp("plan")
    turns = [[f"turn {k} of {i}" for k in range(count)] for i, (count, _) in enumerate(plan)]
    source = conversations(place / "c.jsonl", [*turns, turns[0]])
    with source.open("a") as file:
        file.write("torn\n")
    options = {"concurrency": concurrency, "retries": retries, "keep_unfinished": keep}
    with serving({turn[0]: list(steps) for turn, (_, steps) in zip(turns, plan, strict=True)}) as server:
        first = run(source, place / "out.jsonl", server, temperatures=(0.0,), **options)
        accounted(source, place / "out.jsonl", first)
        assert first.skipped.total == 2  # one repeats a greedy turn
        server.plan.clear()
        asked = len(server.bodies)
        second = run(source, place / "out.jsonl", server, temperatures=(0.0,), **options)
        assert (len(server.bodies) > asked) == (first.again > 0)
    accounted(source, place / "out.jsonl", second)
    assert second.again == 0 and second.written == first.written + first.again
    for record in lines(place / "out.jsonl"):
        users, answers = record["messages"][::2], record["messages"][1::2]
        assert len(users) == len(answers) >= 1 and "OLD" not in str(record)
        assert [m.get("finished") for m in answers[:-1]] == [None] * (len(answers) - 1)


def test_turns_are_answered_in_order_with_the_models_own_answers(tmp_path: Path) -> None:
    """Stops: the old answer in the history, a request that says other settings than the record, an unfinished
    answer that is taken for a finished one.
    """
    source = conversations(tmp_path / "c.jsonl", [["one", "two"], ["three"], ["long", "never asked"]])
    with serving({"long": ["cut"]}) as server:
        run(source, tmp_path / "out.jsonl", server, api_key="secret")
        assert server.keys == {"Bearer secret"}
        bodies = {body["messages"][-1]["content"]: body for body in server.bodies}
    assert bodies.keys() == {"one", "two", "three", "long"}
    assert [said["content"] for said in bodies["two"]["messages"]] == ["one", "ONE", "two"]
    assert (bodies["one"]["temperature"], bodies["three"]["temperature"]) == (0.0, 0.8)
    assert bodies["one"]["max_tokens"] == 8 and bodies["one"]["seed"] != bodies["three"]["seed"]
    records = {record["source"]: record for record in lines(tmp_path / "out.jsonl")}
    assert [m["content"] for m in records[f"{source}:1"]["messages"]] == ["one", "ONE", "two", "ONE ONE TWO"]
    assert records[f"{source}:3"]["messages"][1:] == [
        {"role": "assistant", "content": "LONG", "finished": False}
    ]
    assert records[f"{source}:2"]["regenerated"] == {
        "temperature": 0.8, "seed": 3, "max_new_tokens": 8, "model": "tiny",
    }  # fmt: skip


def test_a_refused_later_turn_keeps_the_answers_before_it(tmp_path: Path) -> None:
    """Stops: a long conversation that is lost whole when its last prompt outgrows the context; one that is
    kept as if it were whole when the server failed for a moment.
    """
    source = conversations(tmp_path / "c.jsonl", [["one", "two"], ["three", "four"]])
    with serving({"one": [FINE, "400"], "three": [FINE, "500"]}) as server:
        result = run(source, tmp_path / "out.jsonl", server, retries=0)
        assert accounted(source, tmp_path / "out.jsonl", result) == {"answers 500": 1} and result.again == 1
        (record,) = lines(tmp_path / "out.jsonl")
        assert [said["content"] for said in record["messages"]] == ["one", "ONE"]
        result = run(source, tmp_path / "out.jsonl", server, retries=0)
    assert result.written == 2 and len(lines(tmp_path / "out.jsonl")[1]["messages"]) == 4


def test_a_server_is_asked_no_sooner_than_it_says(tmp_path: Path) -> None:
    """Stops: an overloaded server that is asked again at once, by seconds or by date, or after an hour."""
    source = conversations(tmp_path / "c.jsonl", [["one"]])
    with serving({"one": ["429 0.4", FINE]}) as server:
        run(source, tmp_path / "out.jsonl", server)
        assert server.times[1] - server.times[0] >= 0.4

    dates = (
        "Wed, 21 Oct 2015 07:28:00 GMT",
        "Fri, 31 Dec 2100 23:59:59 GMT",
        "Fri, 31 Dec 9999 23:59:59 -2359",
    )
    waits = [replies.retry_after(asked) for asked in (*dates, "soon", "-5", "12", "nan", "1e999")]
    longest = replies.LONGEST_RETRY_AFTER
    assert waits[:2] == [0, longest] and waits[3:] == [0, 0, 12, 0, longest] and 0 <= waits[2] <= longest


def test_as_many_requests_are_under_way_as_asked_for(tmp_path: Path) -> None:
    """Stops: requests one after another, and more of them at once than the server was promised."""
    source = conversations(tmp_path / "c.jsonl", [[f"turn {i}"] for i in range(24)])
    with serving() as server:
        server.pause = 0.05
        run(source, tmp_path / "out.jsonl", server, concurrency=6)
        assert 1 < server.most_together <= 6


def test_a_dead_endpoint_is_left_out_and_the_other_does_its_work(tmp_path: Path, capsys: Any) -> None:
    """Stops: a broken server that fails fast and so draws every request to itself, until all have failed."""
    from rich.console import Console

    source = conversations(tmp_path / "c.jsonl", [[f"turn {i}"] for i in range(40)])
    with serving() as good, serving(otherwise="500") as bad:
        good.pause = 0.01
        result = run(source, tmp_path / "out.jsonl", good, bad, patience=0.0, console=Console(width=300))
        assert accounted(source, tmp_path / "out.jsonl", result) == {}
        assert len(bad.bodies) <= 8 and result.written == 40
        assert f"{bad.url}/v1 is left out: " in capsys.readouterr().out
        good.models = ["another"]
        with pytest.raises(CoralError, match=r"serves another, not tiny; name one"):
            connect([bad.url, good.url], "tiny")


def test_when_no_endpoint_is_left_the_rest_fails_at_once_and_is_asked_again(tmp_path: Path) -> None:
    """Stops: a dead server that is waited for once a record, and records that are given up with it."""
    source = conversations(tmp_path / "c.jsonl", [[f"turn {i}"] for i in range(30)])
    plan = {f"turn {i}": [FINE] for i in range(5)}
    with serving(plan, otherwise="disconnect") as server:
        result = run(source, tmp_path / "out.jsonl", server, patience=0.0, retries=8, concurrency=1)
        failed = accounted(source, tmp_path / "out.jsonl", result)
        assert failed == {"no endpoint answers any more": 25} and result.again == 25
        assert len(server.bodies) < 10
        server.otherwise = FINE
        result = run(source, tmp_path / "out.jsonl", server)
    assert accounted(source, tmp_path / "out.jsonl", result) == {} and result.written == 30


def test_a_server_that_has_gone_is_left_out_by_its_first_record(tmp_path: Path) -> None:
    """Stops: each of a million records waiting out its tries at an address where nobody listens."""
    source = conversations(tmp_path / "c.jsonl", [[f"turn {i}"] for i in range(30)])
    with serving() as server:
        servers = connect([server.url], concurrency=1, retries=2, first_wait=0.001)
    answer = answer_over_http(servers, max_new_tokens=8)
    result = regenerate([source], tmp_path / "out.jsonl", answer, settings={"seed": 0})
    failed = accounted(source, tmp_path / "out.jsonl", result)
    assert failed == {"the endpoint cannot be reached": 1, "no endpoint answers any more": 29}
    assert result.again == 30 and not servers.alive


def test_ctrl_c_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    """Stops: answers that were paid for and are asked for again, and an account that says nothing of them."""
    import signal

    source = conversations(tmp_path / "c.jsonl", [[f"turn {i}"] for i in range(20)])
    with serving() as server:
        server.on_request = lambda: len(server.bodies) == 8 and signal.raise_signal(signal.SIGINT)  # type: ignore[func-returns-value]
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out.jsonl", server, concurrency=1)
        signal.signal(signal.SIGINT, before)
        server.on_request = None
        done = len(lines(tmp_path / "out.jsonl"))
        assert 7 <= done <= 8
        assert json.loads((tmp_path / "out.account.json").read_text())["written"] == done
        asked = len(server.bodies)
        result = run(source, tmp_path / "out.jsonl", server)
        assert len(server.bodies) - asked == 20 - done
    accounted(source, tmp_path / "out.jsonl", result)


def test_the_command(coral: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops: options that reach nothing, and mistakes that are found after hours or in a traceback."""
    source, output = (
        conversations(tmp_path / "c.jsonl", [[f"turn {i}"] for i in range(6)]),
        tmp_path / "o.jsonl",
    )
    monkeypatch.setenv("MY_KEY", "secret")
    with serving() as server:
        command = (
            "data",
            "regenerate",
            source,
            "--output",
            output,
            "--endpoint",
            server.url,
            "--max-new-tokens",
            8,
        )
        result = coral(*command, "--api-key-env", "MY_KEY", "--temperature", 0.5)
        assert result.code == 0 and "6 records = 6 written + 0 skipped + 0 failed" in result.out, result.err
        assert server.keys == {"Bearer secret"} and {body["temperature"] for body in server.bodies} == {0.5}
        assert "'model' was" not in result.err
        server.models = ["tiny", "huge"]
        assert "the endpoints serve huge, tiny; name one (--model)" in coral(*command).err
        wrong = coral(*command, "--model", "other")
        assert wrong.code == 2 and "serves tiny, huge, not other; name one of them" in wrong.err
        changed = coral(*command, "--model", "huge", "--temperature", 0.5)
        assert "model was 'tiny' and is 'huge'" in changed.err
        assert "exclude each other" in coral(*command, "--target", "x").err
    gone = coral(*command)
    assert gone.code == 2 and "no endpoint answers: http" in gone.err and "does not answer" in gone.err
    assert "cannot read --endpoint 'nonsense'" in coral(*command[:-4], "--endpoint", "nonsense").err
