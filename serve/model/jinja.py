"""One Jinja chat template: its text in; the variables it reads, and prompts as text out, each within a time.

It renders as transformers does; a test holds them equal. A template is foreign code, and how long it takes depends
on what a client sends: each turn of a loop and each call of a macro looks at the clock of its own thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from datetime import date, datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_CLOCK = "clock of the rendering"
"""A variable that no template can name."""
_MARKS = "marks of the rendering"
"""Another: (what opens, what closes) each block of `{% generation %}` in the text."""
_NOW = "strftime_now"


class TooSlowError(Exception):
    """The template used up its time. Not of Lathe's tree: ChatTemplate says it as a RequestError."""


class JinjaTemplate:
    """A compiled chat template. Raises jinja2's TemplateSyntaxError for a text that is none."""

    def __init__(self, source: str) -> None:
        environment = _environment()
        tree = environment.parse(source)
        self.reads_clock: bool = any(name.name == _NOW for name in tree.find_all(nodes.Name))
        """Whether it may print the day."""
        read = {name for name, is_read in _first_uses(tree).items() if is_read}
        self.variables: frozenset[str] = frozenset(read & meta.find_undeclared_variables(tree))
        """Names that it reads before it sets them, if it sets them at all."""
        code = environment.compile(_Clocked().visit(tree))
        self._template = jinja2.Template.from_code(environment, code, environment.globals)

    def render(
        self,
        variables: Mapping[str, Any],
        limit_s: float | None = None,
        marks: tuple[str, str] | None = None,
        today: date | None = None,
    ) -> str:
        """The prompt. TooSlowError after `limit_s` seconds of this thread's CPU; else what the template raises.

        marks  texts to put before and after what stands in each block of `{% generation %}`
        today  the day that `strftime_now` tells, at its first second; None: the moment itself
        """
        clock = None if limit_s is None else time.thread_time() + limit_s
        frozen = {} if today is None else {_NOW: datetime(today.year, today.month, today.day).strftime}
        return self._template.render({**variables, **frozen, _CLOCK: clock, _MARKS: marks})


@lru_cache(maxsize=32)
def compiled(source: str) -> JinjaTemplate:
    """The template of this text, as one that others have too: it keeps nothing of a rendering. A long one takes a
    tenth of a second to compile."""
    return JinjaTemplate(source)


def _first_uses(tree: nodes.Template) -> dict[str, bool]:
    """Name -> whether the first that is done with it is to read it."""
    first: dict[str, bool] = {}
    for name, is_read in _uses(tree, frozenset()):
        first.setdefault(name, is_read)
    return first


def _uses(node: nodes.Node, bound: frozenset[str]) -> Iterator[tuple[str, bool]]:
    """(name, whether it is read) in the order of rendering, without loop variables and arguments (`bound`)."""
    if isinstance(node, nodes.Name):
        if node.name not in bound:
            yield node.name, node.ctx == "load"
        return
    inner = bound
    children = list(node.iter_child_nodes())
    if isinstance(node, nodes.Assign):
        children = [node.node, node.target]
    elif isinstance(node, nodes.AssignBlock):
        children = [*node.body, *filter(None, [node.filter]), node.target]
    elif isinstance(node, nodes.For):
        yield from _uses(node.iter, bound)
        inner = bound | {
            name.name
            for name in (node.target, *node.target.find_all(nodes.Name))
            if isinstance(name, nodes.Name)
        }
        children = [*filter(None, [node.test]), *node.body, *node.else_]
    elif isinstance(node, (nodes.Macro, nodes.CallBlock)):
        inner = bound | {argument.name for argument in node.args}
        children = [*node.defaults, *node.body]
        if isinstance(node, nodes.CallBlock):
            yield from _uses(node.call, bound)
    for child in children:
        yield from _uses(child, inner)


class _Clocked(NodeTransformer):
    """Puts a look at the clock before the body of each loop and macro."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        return self._with_look(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        return self._with_look(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        return self._with_look(node)

    def _with_look(self, node: Any) -> Any:
        self.generic_visit(node)
        look = nodes.Filter(nodes.Const(None), _look.__name__, [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(look).set_lineno(node.lineno, override=True))
        return node


@jinja2.pass_context
def _look(context: Context, _: None) -> None:
    ends_s = context.resolve_or_missing(_CLOCK)
    if isinstance(ends_s, float) and time.thread_time() > ends_s:
        raise TooSlowError


class _Generation(Extension):
    """`{% generation %}`, by which a template says what the model writes: between marks, if there are any."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own way

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opens, closes = (
            nodes.Output([nodes.Filter(nodes.Const(end), _mark.__name__, [], [], None, None)])
            for end in (0, 1)
        )
        return nodes.Scope([opens, *body, closes]).set_lineno(lineno)


@jinja2.pass_context
def _mark(context: Context, end: int) -> str:
    marks = context.resolve_or_missing(_MARKS)
    return str(marks[end]) if isinstance(marks, tuple) else ""


class _Namespace(Namespace):
    """Without names that lead into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


class _Dict:
    """`dict(...)`, and nothing else of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters |= {"tojson": _tojson, _look.__name__: _look, _mark.__name__: _mark}
    environment.globals |= {
        "raise_exception": _raise_exception,
        _NOW: _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace holds no name that begins with '_': {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: jinja2's own escapes what HTML gives a meaning."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
