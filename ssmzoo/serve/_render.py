"""A program of its own that renders a chat template: a line of JSON in, a line of JSON out.

Templates come with models, and Jinja's sandbox bounds neither their time nor their memory. So this process has little
of either, and whoever runs it ends it where that is not enough.

Arguments: seconds for a line, bytes of memory, and characters of a text. The first line in is the template.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


def main(seconds: int, memory: int, characters: int) -> None:
    _bound(memory)
    template: jinja2.Template | None = None
    for line in sys.stdin:
        _alarm(2 * seconds)  # for when nobody is left to end this
        given = json.loads(line)
        try:
            if template is None:
                template = _template(given)
                answer = {"text": ""}
            else:
                text = template.render(**given)
                answer = {"text": text} if len(text) <= characters else {"error": f"more than {characters} characters"}
        except Exception as error:  # a template may do anything that Jinja's sandbox allows
            answer = {"error": f"{error!s:.300}" or type(error).__name__}
        _alarm(0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _template(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


class Generation(jinja2.ext.Extension):
    """``{% generation %}`` … ``{% endgeneration %}``, by which templates mark answers for training: what is inside."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja has it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: object) -> None:
    """What templates call where a conversation does not suit them."""
    raise jinja2.TemplateError(str(message))


def _bound(memory: int) -> None:
    """Makes memory beyond a bound an error, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _alarm(seconds: int) -> None:
    """Ends this process after so many seconds, where the system can; 0 for never."""
    with contextlib.suppress(ImportError, AttributeError):
        import signal

        signal.alarm(seconds)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
