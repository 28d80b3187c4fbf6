"""Judges: a local model's verdict by hand, both orders, an endpoint over loopback, and how each of them fails."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from relatives_tiny import make_inputs, make_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_scratch_gpt.alignment.endpoint import EndpointJudge
from hf_scratch_gpt.alignment.judges import (
    Comparison,
    FunctionJudge,
    ModelJudge,
    ask_both_ways,
    conversation_text,
    read_letter,
)
from hf_scratch_gpt.model import encode_conversation

TEMPLATE = "Q {question} A {first} B {second}"


def compare(first, second, number=0):
    return Comparison(make_rows(number + 1)[number]["prompt"], first, second)


# ---- What is read


def test_braces_and_names_in_the_texts_stay_what_they_are():
    comparison = Comparison([{"role": "user", "content": "{first} {x}"}], "{second}", "{question.__class__}")
    assert comparison.text(TEMPLATE) == "Q {first} {x} A {second} B {question.__class__}"
    assert comparison.turned().text(TEMPLATE) == "Q {first} {x} A {question.__class__} B {second}"


def test_a_longer_conversation_is_read_with_its_roles():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    assert conversation_text(messages[:1]) == "Hi"
    assert conversation_text(messages) == "user: Hi\nassistant: Yes?"


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("A", 1.0), (" B.", 0.0), ("**B**", 0.0), ("Answer: A", 1.0), ("A or B", None), ("", None), ("Both", None)],
)
def test_a_reply_counts_only_if_it_names_one_letter(reply, verdict):
    assert read_letter(reply) == verdict


# ---- A local model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_local_judges_verdict_is_the_chance_of_its_letters_by_hand(inputs):
    model = AutoModelForCausalLM.from_pretrained(inputs / "sft").eval()
    tokenizer = AutoTokenizer.from_pretrained(inputs / "sft")
    comparisons = [compare("red", "blue"), compare("white", "a much longer one", 1), compare("<|im_end|>", "x", 2)]
    expected = []
    for comparison in comparisons:
        messages = [{"role": "user", "content": comparison.text(TEMPLATE)}]
        ids = encode_conversation(tokenizer, messages, add_generation_prompt=True)["input_ids"]
        assert ids.count(tokenizer.eos_token_id) == 1
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        first, second = (logits[tokenizer(letter)["input_ids"][0]].exp().item() for letter in "AB")
        expected.append(first / (first + second))
    assert ModelJudge(str(inputs / "sft"), TEMPLATE).prefer(comparisons) == pytest.approx(expected, abs=1e-6)


def test_a_comparison_that_is_too_long_gets_no_verdict_and_a_warning(inputs, caplog):
    verdicts = ModelJudge(str(inputs / "sft"), TEMPLATE).prefer([compare("red", "blue"), compare("red " * 90, "blue")])
    assert verdicts[0] is not None
    assert verdicts[1] is None
    assert "1 of 2 comparisons are too long for it" in caplog.text


# ---- Both orders


class Fixed:
    """Says what it is told, in the order in which it is asked."""

    def __init__(self, *rounds):
        self.rounds, self.asked = list(rounds), []

    def prefer(self, comparisons):
        self.asked.append([(comparison.first, comparison.second) for comparison in comparisons])
        return self.rounds.pop(0)


def test_every_comparison_is_asked_again_with_the_places_exchanged():
    judge = Fixed([0.9, 1.0, None], [0.9, 0.0, 1.0])
    told = ask_both_ways(judge, [compare("a", "b"), compare("c", "d"), compare("e", "f")])
    assert judge.asked == [[("a", "b"), ("c", "d"), ("e", "f")], [("b", "a"), ("d", "c"), ("f", "e")]]
    assert told == [(0.9, pytest.approx(0.1)), (1.0, 1.0), (None, 0.0)]


# ---- A function


def test_a_functions_verdicts_are_checked(monkeypatch):
    import relatives_tiny

    comparisons = [compare("blue", "red"), compare("red", "blue"), compare("red", "red")]
    assert FunctionJudge("relatives_tiny:prefers_blue").prefer(comparisons) == [1.0, 0.0, 0.5]
    monkeypatch.setattr(relatives_tiny, "prefers_blue", lambda *lists: [2.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"'relatives_tiny:prefers_blue' returned 2\.0, expected the chance from 0"):
        FunctionJudge("relatives_tiny:prefers_blue").prefer(comparisons)
    monkeypatch.setattr(relatives_tiny, "prefers_blue", lambda *lists: 1 / 0)
    with pytest.raises(ValueError, match="raised ZeroDivisionError"):
        FunctionJudge("relatives_tiny:prefers_blue").prefer(comparisons)


# ---- An endpoint


@pytest.fixture
def endpoint():
    """An OpenAI-compatible server whose replies a test sets: text, a status, or `None` to hang up."""
    seen, replies = [], []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((self.path, dict(self.headers), body))
                reply = replies.pop(0) if replies else "A"
            if callable(reply):
                reply = reply(body)
            if reply is None:
                self.connection.close()
                return
            status = reply if isinstance(reply, int) else 200
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            if status == 429:
                self.send_header("Retry-After", "0")
            content = reply if isinstance(reply, bytes) else message(reply)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    def message(reply):
        return json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen, replies
    server.shutdown()
    server.server_close()


def ask(url, comparisons, key_variable="", retries=2, requests=1, timeout=60.0, name="judge-1"):
    judge = EndpointJudge(url, name, key_variable, TEMPLATE, timeout, retries, requests, first_wait=0.01)
    return judge.prefer(comparisons)


def test_an_endpoint_is_asked_as_openais_is(endpoint, monkeypatch):
    url, seen, replies = endpoint
    monkeypatch.setenv("JUDGE_KEY", "secret-123")
    replies += ["A", "I prefer B", "neither"]
    verdicts = ask(url + "/", [compare("red", "blue"), compare("x", "y"), compare("z", "w")], "JUDGE_KEY")
    assert verdicts == [1.0, 0.0, None]
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret-123"
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    assert body["messages"] == [{"role": "user", "content": compare("red", "blue").text(TEMPLATE)}]


def test_replies_keep_the_order_of_the_questions_however_many_are_asked_at_once(endpoint):
    url, _, replies = endpoint
    replies += [lambda body: "A" if "A red" in body["messages"][0]["content"] else "B"] * 12
    comparisons = [compare("red" if number % 3 else "blue", "x", number) for number in range(12)]
    assert ask(url, comparisons, requests=4) == [float(number % 3 != 0) for number in range(12)]


@pytest.mark.parametrize("failure", [429, 500, 503, None])
def test_what_may_pass_is_tried_again(endpoint, failure):
    url, seen, replies = endpoint
    replies += [failure, failure, "B"]
    assert ask(url, [compare("a", "b")]) == [0.0]
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("replies_given", "told", "tries"),
    [
        ([401], "answered 401 Unauthorized", 1),
        ([302], "answered 302 Found", 1),  # followed, the key would go to another host
        ([500, 500, 500], r"answered 500 Internal Server Error \(3 tries\)", 3),
    ],
)
def test_an_endpoint_that_refuses_is_named_without_the_key(endpoint, monkeypatch, replies_given, told, tries):
    url, seen, replies = endpoint
    monkeypatch.setenv("JUDGE_KEY", "secret-123")
    replies += replies_given
    with pytest.raises(OSError, match=told) as caught:
        ask(url, [compare("a", "b")], "JUDGE_KEY")
    assert url in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(seen) == tries


def test_an_endpoint_that_hangs_is_given_up_after_its_time(endpoint):
    url, _, replies = endpoint
    gate = threading.Event()
    replies += [lambda body: gate.wait(10) and "A"] * 2
    try:
        with pytest.raises(OSError, match=r"cannot be reached: .*timed out \(2 tries\)"):
            ask(url, [compare("a", "b")], retries=1, timeout=0.2)
    finally:
        gate.set()


def test_nobody_there_and_what_is_no_completion_are_told(endpoint):
    url, _, replies = endpoint
    replies.append(b"<html>hello")
    with pytest.raises(ValueError, match="sent no chat completion, but b'<html>hello'"):
        ask(url, [compare("a", "b")])
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9/v1/chat/completions: cannot be reached"):
        ask("http://127.0.0.1:9/v1", [compare("a", "b")], retries=0)


@pytest.mark.parametrize(
    ("url", "name", "variable", "told"),
    [
        ("file:///etc/passwd", "m", "", "'judge_url' is 'file:///etc/passwd', expected http"),
        ("host/v1", "m", "", "expected http"),
        ("http://127.0.0.1/v1", "", "", "'judge_name' is missing"),
        ("https://example.org/v1", "m", "NO_SUCH_KEY", "'NO_SUCH_KEY' .* is not set"),
        ("http://example.org/v1", "m", "JUDGE_KEY", "a key is sent over https only"),
    ],
)
def test_an_endpoint_that_may_not_be_asked_is_refused(monkeypatch, url, name, variable, told):
    monkeypatch.setenv("JUDGE_KEY", "secret-123")
    with pytest.raises(ValueError, match=told):
        EndpointJudge(url, name, variable, TEMPLATE, 1.0, 0, 1)
