"""How a server begins and ends: its command, signals, and an engine that fails."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("fastapi", reason="needs fastapi")

from served import NAME, served, small_model

import ssmzoo
from ssmzoo import cli, serve
from ssmzoo.serve.errors import Refused
from ssmzoo.train.vocabulary import Bytes, decode


def ask(address, **body):
    """The lines of an answer as they come."""
    data = json.dumps({"prompt": "a", "model": NAME, **body}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=300)


def test_the_command_ends_well_at_a_signal(tmp_path):
    model = small_model()
    ssmzoo.save(model, tmp_path / NAME)
    command = [sys.executable, "-m", "ssmzoo", "serve", str(tmp_path / NAME), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        address = re.fullmatch(r"small is served at (http://127.0.0.1:\d+)/v1\n", process.stdout.readline())[1]
        with ask(address, max_tokens=60, seed=1, stream=True) as stream:
            first = stream.readline()
            process.send_signal(signal.SIGTERM)
            events = [first, *stream]
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (0, "", "")
    assert events[-2] == b"data: [DONE]\n"
    made = [json.loads(event[6:]) for event in events if event.startswith(b"data: {")]
    text = "".join(event["choices"][0]["text"] for event in made)
    ids = model.generate([[97]], 60, seed=1)[0][1:]
    assert text == decode(Bytes(), ids)
    with pytest.raises(urllib.error.URLError):
        ask(address)


def test_what_takes_longer_than_the_grace_is_cut(monkeypatch):
    model = small_model()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: (time.sleep(0.02), forward(*a, **k))[1])
    with served(model, grace=0.2) as (address, service):
        stream = ask(address, max_tokens=4000, stream=True)
        stream.readline()
        waiting = {}

        def wait():
            try:
                ask(address, max_tokens=4000)
            except urllib.error.HTTPError as error:
                waiting.update(json.loads(error.read())["error"], status=error.code)

        thread = threading.Thread(target=wait)
        thread.start()
        while service.live < 2:
            time.sleep(0.01)
    last = [line for line in stream if line.startswith(b"data: ")][-1]
    thread.join()
    told = "the request was ended: the server has stopped, and the request took longer than 0.2 seconds more"
    assert json.loads(last[6:])["error"]["message"] == told
    assert (waiting["status"], waiting["message"], waiting["type"]) == (503, told, "server_error")
    assert not service.worker._thread.is_alive()


def test_an_engine_that_fails(monkeypatch, caplog):
    """Those who wait are told so, and the next request is answered."""
    with served(small_model()) as (address, service):
        engine = service.worker.engine

        def broken(*_):
            raise MemoryError("of the machine")

        monkeypatch.setattr(engine._active, "admit", broken)
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(address)
        assert refused.value.code == 503
        assert json.loads(refused.value.read())["error"]["message"] == (
            "the request was ended: the engine failed with MemoryError"
        )
        monkeypatch.undo()
        assert json.loads(ask(address, max_tokens=3).read())["usage"]["completion_tokens"] == 3
    assert "a step of the engine failed" in caplog.text


@pytest.fixture
def error_of(capsys, monkeypatch):
    """What the command says of arguments that it refuses."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ssmzoo", "serve", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 1
        return " ".join(capsys.readouterr().err.split())

    return run


def test_refused_commands(error_of, monkeypatch, tmp_path):
    name, other = "mamba-hybrid-tiny", tmp_path / "other.yaml"
    other.write_text("{d_model: 8, n_layers: 1, pattern: [mamba], vocab_size: 300}")
    with serve.listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert error_of(name, "--port", port).startswith(f"error: cannot listen on '127.0.0.1', port {port}: ")
    assert "--memory must be bytes, or a text such as '5GB'; got 'much'" in error_of(name, "--memory", "much")
    assert "--max-body must be bytes" in error_of(name, "--max-body", "0")
    assert "--api-key (or SSMZOO_API_KEY) must be printable ASCII" in error_of(name, "--api-key", "ö")
    monkeypatch.setenv("SSMZOO_API_KEY", "")
    assert "at least one" in error_of(name)
    monkeypatch.delenv("SSMZOO_API_KEY")
    assert "--eos-id must be from 0 to 255; got 256" in error_of(name, "--port", "0", "--eos-id", "256")
    assert "`draft` must have the model's vocabulary of 256 ids" in error_of(name, "--port", "0", "--draft", str(other))
    for module in [module for module in sys.modules if module.startswith("ssmzoo.serve")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(ssmzoo, "serve")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert error_of(name) == "error: `ssmzoo serve` needs fastapi: pip install 'ssmzoo[serve]'"


def prompter(folder, **files):
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
    return serve.Prompter(Bytes(), folder)


def test_files_of_a_tokenizer(tmp_path):
    several = {"chat_template": [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ 1 + 1 }}"}]}
    made = prompter(tmp_path, tokenizer_config__json=several, generation_config__json={"eos_token_id": [3, 4, 3]})
    assert (made.of_messages([]), made.ends) == ([ord("2")], [3, 4])
    made = prompter(tmp_path, chat_template__jinja="{{ messages[0] | tojson }}{{ ''.__class__.__mro__ }}")
    with pytest.raises(Refused, match="chat template refuses `messages`: access to attribute '__class__'"):
        made.of_messages([{"role": "ü"}])
    endless = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
    with pytest.raises(Refused, match="chat template refuses `messages`: maximum recursion depth"):
        prompter(tmp_path, chat_template__jinja=endless).of_messages([])
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template.jinja must be UTF-8: "):
        prompter(tmp_path)
    with pytest.raises(ValueError, match="the chat template is no valid Jinja: "):
        prompter(tmp_path, chat_template__jinja="{{")
    with pytest.raises(ValueError, match="tokenizer_config.json must hold a JSON object; got list"):
        prompter(tmp_path, tokenizer_config__json=[])
    with pytest.raises(ValueError, match="generation_config.json must be JSON: "):
        prompter(tmp_path, tokenizer_config__json={}, chat_template__jinja="", generation_config__json="{")
    with pytest.raises(Refused, match="this model has no chat template, neither in tokenizer_config.json"):
        serve.Prompter(Bytes()).of_messages([])


@pytest.mark.parametrize("id", [-1, 256, 2**70])
def test_ids_that_end_nothing(tmp_path, id):
    """Found at the start, and not with every request."""
    made = prompter(tmp_path, generation_config__json={"eos_token_id": id})
    worker = serve.Worker(ssmzoo.Engine(small_model()))
    with pytest.raises(ValueError, match=f"must be from 0 to 255, the model's vocabulary; got {id}, from generation_c"):
        serve.Service(worker, made, "small", serve.Limits())


def test_refused_limits():
    with pytest.raises(ValueError, match="Limits: `tokens` must be an int of at least 1; got 0"):
        serve.Limits(tokens=0)
    with pytest.raises(ValueError, match="Limits: `body_seconds` must be above 0; got nan"):
        serve.Limits(body_seconds=float("nan"))
