"""How each family of models writes calls."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

from serve.tools import parsers
from serve.tools.format import Headers, Parameters, ToolFormat, Whole, Writing
from serve.tools.parameters import Marks

IDENTIFIER = re.compile(rf"(?!(?:{'|'.join(keyword.kwlist)})$)[A-Za-z_]\w*")
"""Of Python's, but for its own words."""
GEMMA_KEY = re.compile(r"""[^\s:,{}\[\]"<>]+""")
NAME = r"(?P<name>[^\s<>{}\[\]|]+)"


def _header(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)


def _marks(head: str, begin: str, opens: str, opening: str, close: str, **rest: Any) -> Marks:
    """`{n}` stands for a name in `head` and `opening`."""
    named = [re.compile(text.replace("{n}", r"(?P<name>[^<>\n]+?)"), re.DOTALL) for text in (head, opening)]
    return Marks(named[0], begin, opens, named[1], close, **rest)


def _objects(name: str, begin: str, end: str, *, key: str = "arguments", **rest: Any) -> ToolFormat:
    """`begin`, an object, `end`."""
    writing = Writing(f'{begin}{{"name": "{{name}}", "{key}": ', f"}}{end}", "\n")
    known: dict[str, Any] = {"marks": (begin.strip(),), "ends": (end.strip(),), "writing": writing}
    return ToolFormat(name, has_objects=True, **{**known, **rest})


_HERMES = _objects(
    "hermes", "<tool_call>\n", "\n</tool_call>",
    signs=(("<tool_call>", "</tool_call>"),), vocabulary=("<tool_call>", "</tool_call>"),
)  # fmt: skip
_QWEN3_CODER = ToolFormat(
    "qwen3_coder",
    marks=("<tool_call>", "<function=", "<seed:tool_call>"),
    ends=("</tool_call>", "</seed:tool_call>"),
    has_objects=True,
    wholes=(
        Whole(
            "<function=",
            "</function>",
            parsers.qwen3_coder,
            marks=_marks(
                r"<function=\s*{n}\s*>?\s*",
                "<parameter=",
                ">",
                r"<parameter=\s*{n}\s*>",
                "</parameter>",
                trim="lines",
            ),
        ),
    ),
    writing=Writing(
        "<tool_call>\n<function={name}>\n",
        "</function>\n</tool_call>",
        "\n",
        Parameters("<parameter={name}>\n", "\n</parameter>\n"),
    ),
    signs=(("<tool_call>\\n<function=",), ("<tool_call>\n<function=",), ("<function=", "<parameter=")),
)
_GLM = ToolFormat(
    "glm47",
    marks=("<tool_call>",),
    ends=(),
    has_objects=True,
    wholes=(
        Whole(
            "",
            "</tool_call>",
            parsers.glm47,
            is_inner=True,
            marks=_marks(
                r"\s*{n}\s*",
                "<arg_key>",
                "<arg_value>",
                r"<arg_key>\s*{n}\s*</arg_key>(?:\\n|\s)*<arg_value>",
                "</arg_value>",
            ),
        ),
    ),
    writing=Writing(
        "<tool_call>{name}\n",
        "</tool_call>",
        "\n",
        Parameters("<arg_key>{name}</arg_key>\n<arg_value>", "</arg_value>\n"),
    ),
    signs=(("<arg_key>", "<tool_call>"),),
)
_LONGCAT = ToolFormat(
    "longcat",
    marks=("<longcat_tool_call>",),
    wholes=(
        Whole(
            "",
            "</longcat_tool_call>",
            parsers.longcat,
            is_inner=True,
            marks=_marks(
                r"\s*{n}\s*",
                "<longcat_arg_key>",
                "<longcat_arg_value>",
                r"<longcat_arg_key>\s*{n}\s*</longcat_arg_key>(?:\\n|\s)*<longcat_arg_value>",
                "</longcat_arg_value>",
            ),
        ),
    ),
    writing=Writing(
        "<longcat_tool_call>{name}\n",
        "</longcat_tool_call>",
        "\n",
        Parameters(
            "<longcat_arg_key>{name}</longcat_arg_key>\n<longcat_arg_value>", "</longcat_arg_value>\n"
        ),
    ),
    signs=(("<longcat_tool_call>",),),
)
_LLAMA3 = ToolFormat(
    "llama3",
    marks=("<|python_tag|>",),
    has_objects=True,
    bare=True,
    writing=Writing('{"name": "{name}", "parameters": ', "}", "; "),
    end_tokens=("<|eom_id|>",),
    signs=(("<|python_tag|>",), ('"parameters"', "<|eot_id|>"), ("parameters", "<|eot|>")),
    vocabulary=("<|python_tag|>",),
)
_MISTRAL_HEADER = rf"\s*{NAME}\s*(?:\[CALL_ID\]\s*(?P<id>[\w-]+)\s*)?(?:\[ARGS\])?\s*"
_MISTRAL = ToolFormat(
    "mistral",
    marks=("[TOOL_CALLS]",),
    has_objects=True,
    header=_header(_MISTRAL_HEADER),
    writing=Writing("[TOOL_CALLS]{name}[ARGS]", ""),
    tokens=("[ARGS]", "[CALL_ID]"),
    short_ids=True,
    signs=(("[TOOL_CALLS]", "[ARGS]"),),
    vocabulary=("[TOOL_CALLS]", "[ARGS]"),
)
_MISTRAL_V3 = ToolFormat(
    "mistral_v3",
    marks=("[TOOL_CALLS]",),
    has_objects=True,
    header=_header(_MISTRAL_HEADER),
    writing=Writing('{"name": "{name}", "arguments": ', "}", ", ", opening="[TOOL_CALLS] [", closing="]"),
    short_ids=True,
    signs=(("[TOOL_CALLS]",),),
    vocabulary=("[TOOL_CALLS]",),
)
_GEMMA4 = ToolFormat(
    "gemma4",
    marks=("<|tool_call>",),
    wholes=(Whole("", "<tool_call|>", parsers.gemma, is_inner=True),),
    writing=Writing(
        "<|tool_call>call:{name}{",
        "}<tool_call|>",
        parameters=Parameters("{name}:", "", ",", ('<|"|>', '<|"|>'), GEMMA_KEY),
    ),
    tokens=('<|"|>',),
    signs=(("<|tool_call>",),),
    vocabulary=("<|tool_call>", "<tool_call|>"),
)
_FUNCTION_GEMMA = ToolFormat(
    "function_gemma",
    marks=("<start_function_call>",),
    wholes=(Whole("", "<end_function_call>", parsers.gemma, is_inner=True),),
    writing=Writing(
        "<start_function_call>call:{name}{",
        "}<end_function_call>",
        parameters=Parameters("{name}:", "", ",", ("<escape>", "<escape>"), GEMMA_KEY),
    ),
    tokens=("<escape>",),
    end_tokens=("<start_function_response>",),
    signs=(("<start_function_call>",),),
    vocabulary=("<start_function_call>", "<end_function_call>"),
)
_TOOL_CODE = ToolFormat(
    "tool_code",
    marks=("```tool_code",),
    wholes=(Whole("", "```", parsers.python, is_inner=True),),
    writing=Writing(
        "```tool_code\n{name}(", ")\n```", "\n", Parameters("{name}=", "", ", ", None, IDENTIFIER)
    ),
    signs=(("tool_code",),),
)
_PYTHONIC = ToolFormat(
    "pythonic",
    marks=("<|tool_call_start|>",),
    wholes=(Whole("", "<|tool_call_end|>", parsers.python, is_inner=True),),
    writing=Writing(
        "{name}(", ")", ", ", Parameters("{name}=", "", ", ", None, IDENTIFIER),
        opening="<|tool_call_start|>[", closing="]<|tool_call_end|>",
    ),
    signs=(("<|tool_list_start|>",), ("<|tool_call_start|>",)),
    vocabulary=("<|tool_call_start|>", "<|tool_call_end|>"),
)  # fmt: skip
_OLMO3 = ToolFormat(
    "olmo3",
    marks=("<function_calls>",),
    wholes=(Whole("", "</function_calls>", parsers.python, is_inner=True),),
    writing=Writing(
        "{name}(", ")", "\n", Parameters("{name}=", "", ", ", None, IDENTIFIER),
        opening="<function_calls>", closing="</function_calls>",
    ),
    signs=(("<function_calls>", "</function_calls>", "<functions>"),),
)  # fmt: skip
_DEEPSEEK_BEGIN, _DEEPSEEK_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_DEEPSEEK: dict[str, Any] = {
    "marks": ("<｜tool▁calls▁begin｜>", _DEEPSEEK_BEGIN),
    "ends": ("```", _DEEPSEEK_END, "<｜tool▁calls▁end｜>"),
    "header": _header(
        r"\s*(?:function\s*<｜tool▁sep｜>)?\s*(?P<name>[^\s<>{}｜]+)\s*(?:<｜tool▁sep｜>)?\s*(?:```(?:json)?)?\s*"
    ),
    "tokens": ("<｜tool▁sep｜>",),
}
_DEEPSEEK_V3 = ToolFormat(
    "deepseek_v3",
    **_DEEPSEEK,
    writing=Writing(
        f"{_DEEPSEEK_BEGIN}function<｜tool▁sep｜>{{name}}\n```json\n", f"\n```{_DEEPSEEK_END}", "\n",
        opening="<｜tool▁calls▁begin｜>", closing="<｜tool▁calls▁end｜>",
    ),
    signs=(("<｜tool▁calls▁begin｜>", "```json"),),
)  # fmt: skip
_DEEPSEEK_V31 = ToolFormat(
    "deepseek_v31",
    **_DEEPSEEK,
    writing=Writing(
        f"{_DEEPSEEK_BEGIN}{{name}}<｜tool▁sep｜>", _DEEPSEEK_END,
        opening="<｜tool▁calls▁begin｜>", closing="<｜tool▁calls▁end｜>",
    ),
    signs=(("<｜tool▁calls▁begin｜>",),),
    vocabulary=("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"),
)  # fmt: skip
_DEEPSEEK_V32 = ToolFormat(
    "deepseek_v32",
    marks=("<｜DSML｜function_calls>", "<｜DSML｜invoke"),
    ends=("</｜DSML｜function_calls>",),
    wholes=(
        Whole(
            "<｜DSML｜invoke",
            "</｜DSML｜invoke>",
            parsers.deepseek_v32,
            marks=_marks(
                r'<｜DSML｜invoke\s+name="{n}"\s*>\s*',
                "<｜DSML｜parameter",
                ">",
                r'<｜DSML｜parameter\s+name="{n}"(?:\s+string="(?P<kind>true|false)")?\s*>',
                "</｜DSML｜parameter>",
                trim="none",
                text_kinds=("true", None),
            ),
        ),
    ),
    writing=Writing(
        '<｜DSML｜invoke name="{name}">\n',
        "</｜DSML｜invoke>",
        "\n",
        Parameters('<｜DSML｜parameter name="{name}" string="{is_text}">', "</｜DSML｜parameter>\n"),
        opening="<｜DSML｜function_calls>\n",
        closing="\n</｜DSML｜function_calls>",
    ),
    signs=(("｜DSML｜",),),
    vocabulary=("｜DSML｜",),
)
_KIMI_K2 = ToolFormat(
    "kimi_k2",
    marks=("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
    ends=("<|tool_call_end|>", "<|tool_calls_section_end|>"),
    header=_header(
        r"\s*(?P<id>(?:functions\.)?(?P<name>[^\s<>{}|:]+)(?::\d+)?)\s*<\|tool_call_argument_begin\|>\s*"
    ),
    tokens=("<|tool_call_argument_begin|>",),
    writing=Writing(
        "<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>", "<|tool_call_end|>",
        opening="<|tool_calls_section_begin|>", closing="<|tool_calls_section_end|>",
    ),
    signs=(("<|tool_calls_section_begin|>",),),
    vocabulary=("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"),
)  # fmt: skip
_KIMI_K3 = ToolFormat(
    "kimi_k3",
    marks=("<|open|>tools<|sep|>", "<|open|>call"),
    ends=("<|close|>tools<|sep|>",),
    wholes=(
        Whole(
            "<|open|>call",
            "<|close|>call<|sep|>",
            parsers.kimi_k3,
            marks=_marks(
                r'<\|open\|>call(?:\s+(?!tool=)\w+="[^"]*")*\s+tool="{n}"[^<>]*<\|sep\|>\s*',
                "<|open|>argument",
                "<|sep|>",
                r'<\|open\|>argument(?:\s+(?:key="{n}"|type="(?P<kind>[^"]*)"))+\s*<\|sep\|>',
                "<|close|>argument<|sep|>",
                trim="none",
                text_kinds=("string", None),
            ),
        ),
    ),
    writing=Writing(
        '<|open|>call tool="{name}" index="{number}"<|sep|>',
        "<|close|>call<|sep|>",
        parameters=Parameters(
            '<|open|>argument key="{name}" type="{kind}"<|sep|>', "<|close|>argument<|sep|>"
        ),
        opening="<|open|>tools<|sep|>",
        closing="<|close|>tools<|sep|>",
    ),
    tokens=("<|open|>", "<|close|>", "<|sep|>"),
    signs=(("<|open|>tools",),),
    vocabulary=("<|open|>", "<|close|>", "<|sep|>"),
)
_INVOKE = Parameters('<parameter name="{name}">', "</parameter>\n")
_MINIMAX_M2 = ToolFormat(
    "minimax_m2",
    marks=("<minimax:tool_call>", "<invoke name="),
    ends=("</minimax:tool_call>",),
    wholes=(
        Whole(
            "<invoke name=", "</invoke>", parsers.minimax_m2,
            marks=_marks(
                r"<invoke name=\s*{n}\s*>\s*", "<parameter name=", ">", r"<parameter name=\s*{n}\s*>", "</parameter>"
            ),
        ),
    ),
    writing=Writing(
        '<invoke name="{name}">\n', "</invoke>", "\n", _INVOKE,
        opening="<minimax:tool_call>\n", closing="\n</minimax:tool_call>",
    ),
    signs=(("<minimax:tool_call>",),),
    vocabulary=("<minimax:tool_call>", "</minimax:tool_call>"),
)  # fmt: skip
_M3 = "]<]minimax[>["
_MINIMAX_M3 = ToolFormat(
    "minimax_m3",
    marks=(f"{_M3}<tool_call>", f"{_M3}<invoke"),
    ends=(f"{_M3}</tool_call>",),
    wholes=(
        Whole(
            f"{_M3}<invoke",
            f"{_M3}</invoke>",
            parsers.minimax_m3,
            marks=_marks(
                rf"{re.escape(_M3)}<invoke\s+name\s*=\s*{{n}}\s*>\s*",
                f"{_M3}<",
                ">",
                rf"{re.escape(_M3)}<(?P<name>[A-Za-z_$][\w:.$-]*)>",
                f"{_M3}</{{name}}>",
                nests=True,
            ),
        ),
    ),
    writing=Writing(
        f'{_M3}<invoke name="{{name}}">',
        f"{_M3}</invoke>",
        "\n",
        Parameters(f"{_M3}<{{name}}>", f"{_M3}</{{name}}>", names=re.compile(r"[A-Za-z_$][\w:.$-]*")),
        opening=f"{_M3}<tool_call>\n",
        closing=f"\n{_M3}</tool_call>",
    ),
    tokens=(_M3,),
    signs=((f"{_M3}<tool_call>",), ("<mm:think>",)),
    vocabulary=(_M3,),
)
_MINICPM5 = ToolFormat(
    "minicpm5",
    marks=("<function name=",),
    wholes=(
        Whole(
            "<function name=",
            "</function>",
            parsers.minicpm5,
            marks=_marks(
                r"<function name=\s*{n}\s*>\s*",
                "<param",
                ">",
                r"<param\s+name\s*=\s*{n}\s*>",
                "</param>",
                wraps="<![CDATA[",
            ),
        ),
    ),
    writing=Writing(
        '<function name="{name}">', "</function>", "\n", Parameters('<param name="{name}">', "</param>")
    ),
    signs=(("<function name=", "<param name="),),
)
_MUSE_SPARK = ToolFormat(
    "muse_spark",
    marks=("<atem:function_calls>", "<atem:invoke"),
    ends=("</atem:function_calls>",),
    wholes=(
        Whole(
            "<atem:invoke",
            "</atem:invoke>",
            parsers.muse_spark,
            marks=_marks(
                r'<atem:invoke\b[^>]*?\bname="{n}"\s*>\s*',
                "<atem:parameter",
                ">",
                r'<atem:parameter\b[^>]*?\bname="{n}"[^>]*>',
                "</atem:parameter>",
            ),
        ),
    ),
    writing=Writing(
        '<atem:invoke name="{name}">\n',
        "</atem:invoke>",
        "\n",
        Parameters('<atem:parameter name="{name}">', "</atem:parameter>\n"),
        opening="<atem:function_calls>\n",
        closing="\n</atem:function_calls>",
    ),
    signs=(("<atem:function_calls>",),),
)
_GRANITE = _objects(
    "granite", "<|tool_call|>", "", marks=("<|tool_call|>", "<tool_call>"), ends=("</tool_call>",),
    writing=Writing('{"name": "{name}", "arguments": ', "}", ", ", opening="<|tool_call|>[", closing="]"),
    signs=(("<|tool_call|>", "granite"), ("<|tool_call|>", "<|start_of_role|>")),
)  # fmt: skip
_PHI4 = _objects(
    "phi4", "<|tool_call|>", "<|/tool_call|>", marks=("<|tool_call|>", "functools"), ends=("<|/tool_call|>",),
    writing=Writing(
        '{"name": "{name}", "arguments": ', "}", ", ",
        opening="<|tool_call|>[", closing="]<|/tool_call|>",
    ),
    signs=(("<|tool|>", "<|/tool|>"), ("functools",)),
    vocabulary=("<|tool_call|>", "<|/tool_call|>"),
)  # fmt: skip
_COHERE = _objects(
    "cohere2", "<|START_ACTION|>", "<|END_ACTION|>",
    writing=Writing(
        '{"tool_call_id": "{number}", "tool_name": "{name}", "parameters": ', "}", ",\n    ",
        opening="<|START_ACTION|>[\n    ", closing="\n]<|END_ACTION|>",
    ),
    signs=(("<|START_ACTION|>",),), vocabulary=("<|START_ACTION|>", "<|END_ACTION|>"),
)  # fmt: skip
_JAMBA = _objects(
    "jamba", "<tool_calls>", "</tool_calls>",
    writing=Writing(
        '{"name": "{name}", "arguments": ', "}", ", ", opening="<tool_calls>[", closing="]</tool_calls>"
    ),
    signs=(("<tool_calls>", "</tool_calls>"),),
)  # fmt: skip
_INTERNLM = _objects(
    "internlm", "<|action_start|><|plugin|>", "<|action_end|>", key="parameters",
    tokens=("<|action_start|>", "<|plugin|>", "<|action_end|>"),
    signs=(("<|action_start|>", "<|plugin|>"),), vocabulary=("<|action_start|>", "<|plugin|>"),
)  # fmt: skip
_GPT_OSS = ToolFormat(
    "gpt_oss",
    marks=("<|channel|>commentary to=",),
    ends=("<|call|>",),
    header=_header(r"(?:functions\.)?(?P<name>[^\s<>{}|]+)[^{}]*?<\|message\|>\s*"),
    end_tokens=("<|call|>",),
    writing=Writing(
        "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
        "<|call|>",
        headers=Headers(
            "<|channel|>analysis<|message|>",
            "<|channel|>commentary<|message|>",
            "<|channel|>final<|message|>",
            "<|end|><|start|>assistant",
        ),
    ),
    tokens=("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"),
    signs=(("<|channel|>commentary", "<|call|>"),),
    vocabulary=("<|channel|>", "<|message|>", "<|call|>"),
)

FORMATS: Mapping[str, ToolFormat] = {
    format.name: format
    for format in (
        # In the order of looking: who shares another's signs and has more stands before it.
        *(_GPT_OSS, _MUSE_SPARK, _GEMMA4, _FUNCTION_GEMMA, _COHERE, _MINIMAX_M3, _MINIMAX_M2),
        *(_MINICPM5, _LONGCAT, _GLM, _PYTHONIC, _QWEN3_CODER, _KIMI_K3, _KIMI_K2),
        *(_DEEPSEEK_V32, _DEEPSEEK_V3, _DEEPSEEK_V31, _MISTRAL, _MISTRAL_V3, _INTERNLM),
        *(_GRANITE, _PHI4, _JAMBA, _OLMO3, _HERMES, _LLAMA3, _TOOL_CODE),
    )
}
ALIASES: Mapping[str, str] = {
    **{"qwen": "hermes", "qwen2": "hermes", "qwen3": "hermes", "json_tools": "hermes", "smollm3": "hermes"},
    **{"qwen3_xml": "qwen3_coder", "seed_oss": "qwen3_coder", "qwen3_5": "qwen3_coder"},
    **{"llama3_json": "llama3", "llama4_json": "llama3", "llama": "llama3"},
    **{"gemma": "tool_code", "gemma3": "tool_code", "functiongemma": "function_gemma"},
    **{"deepseek": "deepseek_v31", "deepseek_r1": "deepseek_v3"},
    **{"glm4": "glm47", "glm45": "glm47", "laguna": "glm47"},
    **{"harmony": "gpt_oss", "openai": "gpt_oss"},
    **{"granite4": "hermes", "phi4_mini_json": "phi4", "phi4_mini": "phi4"},
    **{"minimax": "minimax_m2", "cohere2_moe": "cohere2", "cohere": "cohere2", "atem": "muse_spark"},
    **{"lfm2": "pythonic", "kimi": "kimi_k2"},
}
"""Other servers' names."""
AUTO, NONE = "auto", "none"
NAMES: Sequence[str] = (AUTO, NONE, *FORMATS, *ALIASES)


def named(name: str) -> ToolFormat:
    """The format of that name, or of that other name. KeyError for none."""
    return FORMATS[ALIASES.get(name, name)]
