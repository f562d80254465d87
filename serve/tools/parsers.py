"""The text of a whole call → who is called and with what, for formats that are no JSON.

These are mlx-lm's and mlx-vlm's parsers, and our own where theirs lose arguments or take quadratic time.

Theirs are foreign code: whatever they raise says that it is no call.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, wraps
from typing import Any, NamedTuple

from serve.tools.scan import MAX_NAME_CHARS, is_clean, loads
from serve.tools.tool import Tool, properties_of


class Found(NamedTuple):
    """A call that was read."""

    name: str
    arguments: str


Parse = Callable[[str, Sequence[Tool]], list[Found]]
"""Text and the tools there are → its calls. ValueError if it holds none, or no whole one."""


class Theirs:
    """A parser of mlx-lm's or mlx-vlm's."""

    def __init__(self, module: str, library: str = "mlx_lm.tool_parsers") -> None:
        self._module = f"{library}.{module}"

    @cached_property
    def parse(self) -> Callable[[str, Any], Any]:
        """Theirs. Importing it may take seconds."""
        return importlib.import_module(self._module).parse_tool_call

    def __call__(self, text: str, tools: Sequence[Tool]) -> list[Found]:
        return _guarded(self._read)(text, tools)

    def _read(self, text: str, tools: Sequence[Tool]) -> list[Found]:
        found = self.parse(text, [_plain(tool) for tool in tools])
        return [_found(each) for each in (found if isinstance(found, list) else [found])]


def _guarded(parse: Parse) -> Parse:
    @wraps(parse)
    def guarded(text: str, tools: Sequence[Tool]) -> list[Found]:
        try:
            found = parse(text, tools)
        except Exception as error:  # foreign code, on a model's words
            raise ValueError(f"no call: {error!r:.200}") from None
        if not found:
            raise ValueError("no call")
        return found

    return guarded


def _plain(tool: Tool) -> dict[str, Any]:
    """With nothing that their parsers stumble over: a schema that is a boolean says nothing of types."""
    told = tool.for_template()
    plain = {key: value if isinstance(value, dict) else {} for key, value in properties_of(tool).items()}
    told["function"]["parameters"]["properties"] = plain
    return told


def _found(call: Any) -> Found:
    """ValueError for what is no call."""
    name, arguments = call["name"], call.get("arguments")
    if isinstance(arguments, str):
        arguments = loads(arguments or "{}")
    if not isinstance(arguments, (Mapping, type(None))) or not isinstance(name, str):
        raise ValueError("no object")
    name, text = name.strip(), json.dumps(arguments or {}, ensure_ascii=False, allow_nan=False)
    if not 0 < len(name) <= MAX_NAME_CHARS or not is_clean(name):
        raise ValueError("no name")
    return Found(name, text if is_clean(text) else json.dumps(arguments, allow_nan=False))


qwen3_coder = Theirs("qwen3_coder")
minimax_m2 = Theirs("minimax_m2")
minimax_m3 = Theirs("minimax_m3", "mlx_vlm.tools.parsers")
_longcat = Theirs("longcat")
kimi_k3 = Theirs("kimi_k3")
minicpm5 = Theirs("minicpm5")
muse_spark = Theirs("muse_spark")
_glm47 = Theirs("glm47")


def glm47(text: str, tools: Sequence[Tool]) -> list[Found]:
    """mlx-lm's, which takes any words for a call of the first of them; that is none."""
    known = {tool.name for tool in tools}
    found = _glm47(text, tools)
    for call in found:
        is_raw = "<arg_key>" not in text and set(json.loads(call.arguments)) == {"raw"}
        if (is_raw or any(character.isspace() for character in call.name)) and call.name not in known:
            raise ValueError("words")
    return found


def longcat(text: str, tools: Sequence[Tool]) -> list[Found]:
    """mlx-lm's, which knows no call without arguments."""
    name = text.strip()
    if re.fullmatch(r"[\w.:/-]+", name):
        return [Found(name, "{}")]
    return _longcat(text, tools)


_INVOKE = re.compile(r'<｜DSML｜invoke\s+name="([^"]+)"\s*>(.*?)</｜DSML｜invoke>', re.DOTALL)
_PARAMETER = re.compile(
    r'<｜DSML｜parameter\s+name="([^"]+)"(?:\s+string="(true|false)")?\s*>(.*?)</｜DSML｜parameter>',
    re.DOTALL,
)


@_guarded
def deepseek_v32(text: str, tools: Sequence[Tool]) -> list[Found]:
    """DeepSeek's markup: of each parameter it says whether it is a text."""
    return [
        _found(
            {
                "name": name,
                "arguments": {
                    key: value if is_text != "false" else loads(value)
                    for key, is_text, value in _PARAMETER.findall(body)
                },
            }
        )
        for name, body in _INVOKE.findall(text)
    ]


@_guarded
def python(text: str, tools: Sequence[Tool]) -> list[Found]:
    """Calls in Python's words, in a list or one a line, printed or not: `f(a=1)`. Arguments without a name are the
    tool's parameters in their order."""
    orders = {tool.name: list(properties_of(tool)) for tool in tools}
    calls: list[Found] = []
    for statement in ast.parse(text.strip()).body:
        if not isinstance(statement, ast.Expr):
            raise ValueError("no expression")
        value = statement.value
        for node in value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value]:
            calls.append(_python_call(node, orders))
    return calls


def _python_call(node: ast.expr, orders: Mapping[str, Sequence[str]]) -> Found:
    if not isinstance(node, ast.Call):
        raise ValueError("no call")
    name = ast.unparse(node.func)
    if name == "print" and name not in orders and len(node.args) == 1:
        return _python_call(node.args[0], orders)
    arguments = dict(zip(orders.get(name, ()), node.args, strict=False))
    if len(arguments) < len(node.args) or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("arguments without names")
    arguments |= {str(keyword.arg): keyword.value for keyword in node.keywords}
    return _found({"name": name, "arguments": {key: _literal(each) for key, each in arguments.items()}})


_CONSTANTS = {"true": True, "false": False, "null": None}


class _Constants(ast.NodeTransformer):
    """JSON's words for Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_CONSTANTS[node.id]) if node.id in _CONSTANTS else node


def _literal(node: ast.expr) -> Any:
    return ast.literal_eval(_Constants().visit(node))


_GEMMA_CALL = re.compile(r"\s*call:\s*([^\s{}]+?)\s*(?=\{)")
_GEMMA_QUOTES = ('<|"|>', "<escape>", '"')
_GEMMA_KEY = re.compile(r"\s*([^\s:,{}\[\]\"<>]+)\s*:")
_GEMMA_BARE = re.compile(r"[^,{}\[\]]*")
_SPACE = re.compile(r"[\s,]*")
MAX_DEPTH = 64


@_guarded
def gemma(text: str, tools: Sequence[Tool]) -> list[Found]:
    """Gemma's `call:name{key:<|"|>text<|"|>,other:1}`, or with `<escape>` around texts."""
    calls: list[Found] = []
    at = 0
    while (begun := _GEMMA_CALL.match(text, at)) is not None:
        arguments, at = _gemma_value(text, begun.end(), 0)
        calls.append(_found({"name": begun[1], "arguments": arguments}))
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing too
    if at < len(text.rstrip()):
        raise ValueError("more than calls")
    return calls


def _gemma_value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """A value, and where it ends."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    at = _past_white(text, at)
    quote = next((each for each in _GEMMA_QUOTES if text.startswith(each, at)), None)
    if quote == '"':
        value, end = json.JSONDecoder(strict=False).raw_decode(text, at)
        return value, end
    if quote is not None:
        end = text.index(quote, at + len(quote))
        return text[at + len(quote) : end], end + len(quote)
    if text.startswith("{", at):
        return _gemma_object(text, at + 1, depth)
    if text.startswith("[", at):
        return _gemma_list(text, at + 1, depth)
    bare = _GEMMA_BARE.match(text, at)
    assert bare is not None
    words = bare[0].strip()
    try:
        return loads(words), bare.end()
    except ValueError:
        return words, bare.end()


def _gemma_object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if text[at] == "}":
            return found, at + 1
        quote = next((each for each in _GEMMA_QUOTES if text.startswith(each, at)), None)
        if quote is not None:
            end = text.index(quote, at + len(quote))
            key, at = text[at + len(quote) : end], text.index(":", end) + 1
        elif (bare := _GEMMA_KEY.match(text, at)) is not None:
            key, at = bare[1], bare.end()
        else:
            raise ValueError("no key")
        found[key], at = _gemma_value(text, at, depth + 1)


def _gemma_list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if text[at] == "]":
            return found, at + 1
        value, end = _gemma_value(text, at, depth + 1)
        if end == at:
            raise ValueError("no value")
        found.append(value)
        at = end


def _past_white(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
