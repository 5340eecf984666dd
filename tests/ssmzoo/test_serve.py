"""``ssmzoo serve`` as OpenAI's own client sees it: each answer is what ``generate`` gives alone."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time

import pytest
import torch

openai = pytest.importorskip("openai", reason="needs openai")
pytest.importorskip("fastapi", reason="needs fastapi")

from served import NAME, served, small_model  # noqa: E402

from ssmzoo.serve import Limits  # noqa: E402
from ssmzoo.train.vocabulary import Bytes, decode  # noqa: E402

KEY = "a-key"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
LIMITS = Limits(body=20_000, tokens=200, choices=6, waiting=2, body_seconds=0.5)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = {"chat_template": TEMPLATE, "bos_token": {"content": "!"}, "eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 10}))
    with served(model, folder, api_key=KEY, limits=LIMITS) as (address, service):
        yield address, service


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0, timeout=300) as made:
        yield made


@pytest.fixture
def idle(server):
    """Waits until nothing is under way → the service."""
    service = server[1]

    def wait():
        end = time.monotonic() + 300
        while (
            service.live or service.worker.engine.active or service.worker.engine.waiting
        ) and time.monotonic() < end:
            time.sleep(0.01)
        engine = service.worker.engine
        assert (service.live, engine.active, engine.waiting) == (0, 0, 0)
        return service

    return wait


def alone(model, prompt, count=16, **options):
    """The text that ``generate`` adds, up to a line end: that is the id that ends an answer."""
    ids = list(prompt.encode()) if isinstance(prompt, str) else prompt
    new = model.generate([ids], count, eos_id=10, **options)[0][len(ids) :]
    return decode(Bytes(), [id for id in new if id != 10]), "stop" if new[-1] == 10 else "length"


def post(server, body, path="/v1/completions", **headers):
    """Status, the answer's object and headers, of bytes or an object."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", **headers}
    connection = http.client.HTTPConnection(server[0].removeprefix("http://"), timeout=300)
    connection.request("POST", path, data, {k: v for k, v in sent.items() if v})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer, response.headers


def test_completions(client, model):
    for options in ({"temperature": 0}, {"temperature": 0.9, "top_p": 0.8, "seed": 3}):
        answer = client.completions.create(model=NAME, prompt="def f(", **options)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == alone(model, "def f(", **options)
        assert answer.usage.prompt_tokens == 6
        assert answer.usage.total_tokens == 6 + answer.usage.completion_tokens
    extra = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3}
    answer = client.completions.create(model=NAME, prompt="ab", seed=1, extra_body=extra)
    assert answer.choices[0].text == alone(model, "ab", seed=1, **extra)[0]


def test_penalties_and_bias(client, model):
    """Through the fields of OpenAI's client, several answers at once, streamed and not."""
    for options in (
        {"presence_penalty": 1.5, "frequency_penalty": -0.5, "seed": 2},
        {"frequency_penalty": 2.0, "temperature": 0, "logit_bias": {"97": 3, "98": -100}},
    ):
        sent = {"model": NAME, "max_tokens": 20, "n": 2, **options}
        own = {**options, "logit_bias": {int(id): by for id, by in options.get("logit_bias", {}).items()}}
        expected = [alone(model, "pe", 20, **{**own, "seed": 2 + i})[0] for i in range(2)]
        whole = client.completions.create(prompt="pe", **sent)
        assert [choice.text for choice in whole.choices] == expected
        texts = ["", ""]
        for event in client.completions.create(prompt="pe", stream=True, **sent):
            for choice in event.choices:
                texts[choice.index] += choice.text
        assert texts == expected
    sure = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "a"}], max_tokens=3, logit_bias={"120": 100}
    )
    assert sure.choices[0].message.content == "xxx"


def test_several_prompts_and_answers(client, model):
    prompts = ["one", "another", "x"]
    answer = client.completions.create(model=NAME, prompt=prompts, n=2, max_tokens=7, seed=5)
    expected = [alone(model, prompt, 7, seed=5 + i)[0] for prompt in prompts for i in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.prompt_tokens == 11
    ids = client.completions.create(model=NAME, prompt=[[1, 2], [3]], max_tokens=7, temperature=0)
    assert [choice.text for choice in ids.choices] == [alone(model, p, 7, temperature=0)[0] for p in ([1, 2], [3])]
    assert client.completions.create(model=NAME, prompt=[1, 2], max_tokens=7, temperature=0).choices[0].text == (
        ids.choices[0].text
    )


def test_streams(client, model):
    stream = client.completions.create(
        model=NAME, prompt="s", max_tokens=30, n=2, seed=8, stream=True, stream_options={"include_usage": True}
    )
    texts, finishes, usage = ["", ""], [None, None], None
    for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            assert finishes[choice.index] is None
            texts[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason
    expected = [alone(model, "s", 30, seed=8 + i) for i in range(2)]
    assert list(zip(texts, finishes, strict=True)) == expected
    assert usage.prompt_tokens == 1


def test_chats(client, model):
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": [{"type": "text", "text": " Hi "}]}]
    prompt = "!<system>Be.\n<user>Hi\n<assistant>"
    expected = alone(model, prompt, 12, seed=2)
    whole = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=12, seed=2)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == expected
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.prompt_tokens == len(prompt)
    parts = list(client.chat.completions.create(model=NAME, messages=messages, max_tokens=12, seed=2, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected[0]
    assert parts[-1].choices[0].finish_reason == expected[1]
    with pytest.raises(openai.BadRequestError, match="chat template refuses `messages`: no such role"):
        client.chat.completions.create(model=NAME, messages=[{"role": "nobody", "content": ""}])


def test_stop_strings(client, model):
    text, _ = alone(model, "abc", 40, seed=4)
    stop = text[9:12]
    end = text.find(stop)
    assert end >= 0
    whole = client.completions.create(model=NAME, prompt="abc", max_tokens=40, seed=4, stop=[stop, "never there"])
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text[:end], "stop")
    stream = client.completions.create(model=NAME, prompt="abc", max_tokens=40, seed=4, stop=stop, stream=True)
    assert "".join(event.choices[0].text for event in stream) == text[:end]


def test_logprobs(client, model):
    answer = client.completions.create(model=NAME, prompt="lp", max_tokens=6, seed=1, logprobs=3, temperature=0.5)
    noted, text = answer.choices[0].logprobs, answer.choices[0].text
    ids = model.generate([list(b"lp")], 6, seed=1, temperature=0.5, eos_id=10)[0]
    scores = model(torch.tensor([ids]))[0].detach().log_softmax(-1)
    expected = [float(scores[i + 1, id]) for i, id in enumerate(ids[2:]) if id != 10]
    assert noted.token_logprobs == pytest.approx(expected)
    assert [max(top.values()) for top in noted.top_logprobs] == pytest.approx(
        [float(scores[i + 1].max()) for i in range(len(expected))]
    )
    assert all(text[o:].startswith(t) for o, t in zip(noted.text_offset, noted.tokens, strict=True) if "id:" not in t)
    chat = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "a"}], max_tokens=4, seed=1, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 2 and token.logprob <= token.top_logprobs[0].logprob for token in content)
    assert chat.usage.completion_tokens - 1 <= len(content) <= 4


def test_models_health_and_metrics(client, server):
    (found,) = client.models.list().data
    assert found.id == client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="no model 'other'; there is 'small'"):
        client.models.retrieve("other")
    connection = http.client.HTTPConnection(server[0].removeprefix("http://"))
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "ok"}
    connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
    page = connection.getresponse().read().decode()
    connection.close()
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(values["ssmzoo_generated_tokens_total"]) > 0
    assert float(values['ssmzoo_requests_total{route="/v1/models",status="200"}']) >= 1
    assert float(values["ssmzoo_state_bytes_limit"]) == 2**30
    assert values["ssmzoo_first_token_seconds_count"] == values['ssmzoo_first_token_seconds_bucket{le="+Inf"}']


BAD = [
    (b"{", 400, "the body must be a JSON object of the request: Invalid JSON: EOF"),
    (b'{"model": "\xff"}', 400, "the body must be a JSON object"),
    (b"[" * 9000, 400, "the body must be a JSON object of the request: Invalid JSON: recursion limit"),
    (b"[]", 400, "the body must be a JSON object"),
    ({"prompt": "a"}, 400, "`model`: Field required"),
    ({"model": "gpt"}, 400, "`prompt`: Field required"),
    ({"model": "gpt", "prompt": "a"}, 404, "`model` must be 'small', the one that is served; got 'gpt'"),
    ({"prompt": ""}, 400, "`prompt` must hold at least one token; got an empty text"),
    ({"prompt": []}, 400, "`prompt` must be a text, a list of texts"),
    ({"prompt": ["a", 1]}, 400, "`prompt` must be a text, a list of texts"),
    ({"prompt": [1, 256]}, 400, "`prompt` must be from 0 to 255, the vocabulary; got 256"),
    ({"prompt": "a", "max_tokens": 201}, 400, "`max_tokens` must be at most 200; got 201"),
    ({"prompt": "a", "max_tokens": 0}, 400, "`max_tokens`: Input should be greater than or equal to 1; got 0"),
    ({"prompt": "a", "temperature": "warm"}, 400, "`temperature`: Input should be a valid number"),
    ({"prompt": "a", "temperature": -1}, 400, "`temperature`: Input should be greater than or equal to 0; got -1"),
    ({"prompt": "a", "temperature": "1"}, 400, "`temperature`: Input should be a valid number; got '1'"),
    ({"prompt": "a", "stream": "yes"}, 400, "`stream`: Input should be a valid boolean; got 'yes'"),
    ({"prompt": "a", "n": True}, 400, "`n`: Input should be a valid integer; got True"),
    ({"prompt": "a", "n": 7}, 400, "`n` and the prompts make 7 answers; at most 6 go together"),
    ({"prompt": ["a"] * 4, "n": 2}, 400, "`n` and the prompts make 8 answers"),
    ({"prompt": "a", "stop": [""]}, 400, "`stop` must be a text of 1 to 256 characters"),
    ({"prompt": "a", "tools": []}, 400, "`tools` is not supported by this server"),
    ({"prompt": "a", "presence_penalty": 3}, 400, "`presence_penalty`: Input should be less than or equal to 2; got 3"),
    ({"prompt": "a", "logit_bias": {"a": 1}}, 400, "`logit_bias` must be an object of at most 1024 token ids, each"),
    ({"prompt": "a", "logit_bias": {"01": 1, "1": 2}}, 400, "`logit_bias` must be an object of at most 1024 token ids"),
    ({"prompt": "a", "logit_bias": {"1": 101}}, 400, "`logit_bias` must be an object of at most 1024 token ids, each"),
    (
        {"prompt": "a", "logit_bias": {"256": 1}},
        400,
        "`logit_bias` must be of ids from 0 to 255, the vocabulary; got",
    ),
    ({"prompt": "a" * 30_000}, 413, "the body must be at most 20000 bytes"),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD)
def test_bad_bodies(body, status, message, server):
    if isinstance(body, dict) and "model" not in body and body != {"prompt": "a"}:
        body = {"model": NAME, **body}
    got, answer, _ = post(server, body)
    assert (got, set(answer)) == (status, {"error"})
    assert answer["error"]["message"].startswith(message)
    assert "\n" not in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 400


def test_requests_that_are_refused_before_their_bodies(server, client):
    body = {"model": NAME, "prompt": "a"}
    for key in ("", "Bearer", "Bearer no", f"Basic {KEY}", f"Bearer {KEY}x"):
        status, answer, headers = post(server, body, Authorization=key)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert headers["WWW-Authenticate"] == "Bearer"
    status, answer, _ = post(server, body, **{"Content-Type": "text/plain"})
    assert (status, answer["error"]["message"]) == (415, "the header Content-Type must be application/json")
    status, answer, _ = post(server, body, "/v1/nothing")
    assert (status, answer["error"]["message"]) == (404, "POST '/v1/nothing': Not Found")
    status, answer, _ = post(server, body, "/health")
    assert (status, answer["error"]["type"]) == (405, "invalid_request_error")


def test_a_body_that_does_not_arrive(server):
    host, port = server[0].removeprefix("http://").split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=300) as slow:
        slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    with socket.create_connection((host, int(port)), timeout=300) as long:  # of a length that it does not tell
        long.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 6)
        assert long.recv(100).startswith(b"HTTP/1.1 413")


def test_more_than_fit_are_told_to_come_again(server, client, idle, model):
    idle()
    streams = [
        client.completions.create(model=NAME, prompt="wait", max_tokens=200, n=3, stream=True, seed=i) for i in (0, 3)
    ]
    status, answer, headers = post(server, {"model": NAME, "prompt": "a"})
    assert (status, headers["Retry-After"]) == (429, "1")
    assert answer["error"]["message"] == "the server has 6 answers under way, and takes 6; try again later"
    for stream in streams:
        stream.close()
    idle()
    again = client.completions.create(model=NAME, prompt="a", temperature=0)
    assert again.choices[0].text == alone(model, "a", temperature=0)[0]


def test_a_client_that_leaves_ends_its_requests(server, client, idle):
    service = idle()
    stream = client.completions.create(model=NAME, prompt="leave", max_tokens=200, n=2, stream=True)
    next(iter(stream))
    assert service.live == 2
    stream.close()
    idle()
    connection = http.client.HTTPConnection(server[0].removeprefix("http://"))
    body = json.dumps({"model": NAME, "prompt": "leave", "max_tokens": 200})
    connection.request(
        "POST", "/v1/completions", body, {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    )
    while not service.live:
        time.sleep(0.001)
    connection.close()
    idle()


def test_threads_of_clients(client, model):
    """More than the batch takes, less than the server does."""
    found = {}

    def ask(i):
        answer = client.completions.create(model=NAME, prompt=f"thread {i}", max_tokens=10, seed=i)
        found[i] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: alone(model, f"thread {i}", 10, seed=i)[0] for i in range(6)}
