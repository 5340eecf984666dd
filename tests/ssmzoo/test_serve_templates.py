"""Chat templates that take too long or too much: they are cut off, and the next conversation is answered."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import urllib.error
import urllib.request

import pytest

pytest.importorskip("fastapi", reason="needs fastapi")

from served import NAME, served, small_model

from ssmzoo.serve import Prompter, templates
from ssmzoo.serve.errors import Refused
from ssmzoo.serve.templates import ChatTemplate, EndlessTemplateError, TemplateError
from ssmzoo.train.vocabulary import Bytes

# Each goes on for ever, or nearly, once there is a second message.
ENDLESS = "{% for i in range(99999 if m else 1) %}{% for j in range(99999 if m else 1) %}{% endfor %}{% endfor %}x"
DOUBLING = (
    "{% set n = namespace(t='x') %}{% for i in range(60 if m else 0) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}"
)
LONG = "x{% for i in range(90000 if m else 0) %}{{ 'a' * 900 }}{% endfor %}"
ONE = [{"role": "user", "content": "a"}]


def template(source):
    return "{% set m = messages|length > 1 %}" + source


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (ENDLESS, EndlessTemplateError, r"^took longer than 2 seconds$"),
        (
            DOUBLING,  # whichever comes first on a busy machine
            (TemplateError, EndlessTemplateError),
            r"^(MemoryError|its process ended with status .*|more than \d+ characters|took longer than 2 seconds)$",
        ),
        (LONG, TemplateError, r"^more than 4194304 characters$"),
    ],
)
def test_it_is_cut_off(source, error, message, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 2)
    made = ChatTemplate(template(source))
    for _ in range(2):
        with pytest.raises(error, match=message):
            made.render(messages=ONE * 2)
        assert made.render(messages=ONE) == "x"


def test_a_server_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 2)
    (tmp_path / "chat_template.jinja").write_text(template(ENDLESS))
    with served(small_model(), tmp_path) as (address, _):

        def ask(messages):
            data = json.dumps({"messages": messages, "model": NAME, "max_tokens": 2}).encode()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{address}/v1/chat/completions", data, headers)
            return json.loads(urllib.request.urlopen(request, timeout=60).read())

        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(ONE * 2)
        assert refused.value.code == 500
        told = json.loads(refused.value.read())["error"]
        assert (told["message"], told["param"]) == ("the model's chat template took longer than 2 seconds", "messages")
        assert ask(ONE)["usage"] == {
            "prompt_tokens": 1,
            "completion_tokens": 2,
            "total_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


def test_one_that_does_not_end_while_it_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "START", 4)
    (tmp_path / "chat_template.jinja").write_text("{{ 10 ** (10 ** 9) }}")
    with pytest.raises(ValueError, match="the chat template took longer than 4 seconds while it was compiled"):
        Prompter(Bytes(), tmp_path)


def test_a_process_that_is_ended_from_outside():
    """While nobody waits for it: the next conversation has another one."""
    made = ChatTemplate("{{ messages[0].content }}")
    process = made._process
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert made.render(messages=[{"content": "ü\n\u2028"}]) == "ü\n\u2028"
    assert made._process is not process


def test_one_that_is_ended_while_it_renders():
    made = ChatTemplate(template(ENDLESS))
    timer = threading.Timer(0.5, made._process.kill)
    timer.start()
    with pytest.raises(TemplateError, match="its process ended with status -9"):
        made.render(messages=ONE * 2)
    assert made.render(messages=ONE) == "x"


def test_an_interrupted_conversation_is_nobody_elses_answer(monkeypatch):
    made = ChatTemplate("{{ messages[0].content }}")

    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt

        def close(self):
            pass

    monkeypatch.setattr(made._process, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        made.render(messages=[{"content": "mine"}])
    assert made.render(messages=[{"content": "yours"}]) == "yours"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}!{% endfor %}", "a!"),
        ("{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}", '[{"content":"a","role":"user"}]'),
        ("{{ 'ü' | tojson }}{{ 'ü' | tojson(ensure_ascii=True) }}", '"ü""\\u00fc"'),
        ("{{ 'tools' if tools is not none }}{{ 'documents' if documents is not none }}x", "x"),
        ("{{ bos_token }}{{ eos_token }}", "</s>"),
    ],
)
def test_what_published_templates_count_on(source, expected, tmp_path):
    """Beyond Jinja's own: the tags, filters and names that tokenizers of other libraries give to a template."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": {"content": "</s>"}}))
    (tmp_path / "chat_template.jinja").write_text(source)
    assert bytes(Prompter(Bytes(), tmp_path).of_messages(ONE)).decode() == expected


def test_its_process_ends_with_it():
    made = ChatTemplate("")
    process = made._process
    del made
    gc.collect()
    assert process.returncode is not None


def test_a_server_tells_what_a_template_refuses(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no\nsuch\trole') }}")
    with pytest.raises(Refused, match="refuses `messages`: no\nsuch\trole") as refused:
        Prompter(Bytes(), tmp_path).of_messages(ONE)
    assert refused.value.body["error"]["message"].endswith("no such role")
