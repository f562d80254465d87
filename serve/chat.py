"""`lathe chat`: a conversation in the terminal, or with the lines of a pipe. Text and pictures in, answers printed.

In a terminal a message may have lines: pasted ones stay together. Ctrl-C ends an answer and never the talk.
"""

from __future__ import annotations

import os
import signal
import sys
import termios
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType

from prompt_toolkit import PromptSession
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output
from rich.console import Console

from serve.conversation import Conversation, path_of
from serve.errors import LatheError
from serve.remote_answer import Thought

KEYS = "Enter sends, Alt-Enter or Ctrl-J breaks the line, Ctrl-C ends an answer, Ctrl-D ends the talk."
COMMANDS = (
    "/image PATH-or-URL shows a picture with the next message, /retry asks again, /reset forgets the conversation, "
    "/adapter NAME lets an adapter answer (NAME=PATH loads it, none is its base), /model NAME another model; either "
    "alone lists them. /system TEXT sets the system prompt (none: no such prompt), /save FILE appends the talk as a "
    "training row, /exit ends."
)
NOTHING = "none"
"""What takes an adapter, or the system prompt, away."""
HISTORY = Path("~/.cache/lathe/chat_history")
MAX_HISTORY_MIB = 1
PROMPT = "you: "
DIM, PLAIN = "\x1b[2m", "\x1b[22m"
"""How a terminal shows a thought, and an answer."""
INPUT_FLAGS, LOCAL_FLAGS = 0, 3
"""Where termios keeps them in its list."""
CONTROLS = {
    **{
        code: "\N{REPLACEMENT CHARACTER}"
        for code in (*range(32), *range(127, 160))
        if chr(code) not in "\n\t"
    },
    ord("\r"): None,
}
"""What a terminal would obey rather than show, and what is shown in its place."""


def from_pipe(conversation: Conversation, lines: Iterable[bytes], console: Console) -> None:
    """Each line is a turn, printed before its answer, until /exit or the lines end.

    Raises LatheError at the first turn that fails: those after it would speak of an answer that is not there.
    """
    for line in lines:
        text = line.decode(errors="replace").strip()
        if text:
            print(f"> {text}", file=console.file, flush=True)
        if not _take(conversation, text, console):
            return


def at_terminal(conversation: Conversation, read: Callable[[], str], console: Console) -> None:
    """Messages from `read`, until it raises EOFError or one of them is /exit. Main thread only.

    Ctrl-C ends the answer under way; what failed is told, and the talk goes on. SIGINT is this function's until it
    returns.
    """
    console.print(f"{conversation.model}. {KEYS}\n{COMMANDS}", style="dim", markup=False)
    with Interrupts() as interrupts:
        while True:
            try:
                text = read()
            except EOFError:
                return
            except KeyboardInterrupt:
                console.print("(Ctrl-D or /exit ends the talk)", style="dim")
                continue
            if not _try(conversation, text, console, interrupts):
                return


class Interrupts:
    """A context manager. Inside it Ctrl-C raises KeyboardInterrupt within `taken`, once, and elsewhere does nothing.

    So the second one of an impatient hand meets neither the clearing up nor the next prompt.
    """

    def __init__(self) -> None:
        self._is_taken = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Let the next Ctrl-C through."""
        self._is_taken = True
        try:
            yield
        finally:
            self._is_taken = False

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_taken:
            self._is_taken = False
            raise KeyboardInterrupt


class Keyboard:
    """The person at the terminal, who writes messages; they may have lines.

    Inside its `with`, what is typed or pasted while an answer comes waits for the next `read`, unchanged, and does
    not show in the answer; Ctrl-C still interrupts. After it the terminal is as it was.
    """

    def __init__(
        self, source: Input | None = None, screen: Output | None = None, history: Path | None = None
    ) -> None:
        """history: a file of messages of earlier talks, which the arrow keys bring back; it gets this one's."""
        # Where standard output is no terminal, the question stands on standard error.
        self._screen = screen or create_output(always_prefer_tty=True)
        self._session: PromptSession[str] = PromptSession(
            [("bold", PROMPT)],
            multiline=True,
            prompt_continuation=" " * len(PROMPT),
            key_bindings=_keys(),
            enable_suspend=True,
            history=_history(history),
            input=source,
            output=self._screen,
        )

    def read(self) -> str:
        """The next message. Raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C."""
        message = self._session.prompt()
        # Between two prompts too, so that lines pasted meanwhile stay together.
        self._screen.enable_bracketed_paste()
        self._screen.flush()
        return message

    def __enter__(self) -> Keyboard:
        self._before = termios.tcgetattr(sys.stdin)
        settings = termios.tcgetattr(sys.stdin)
        settings[INPUT_FLAGS] &= ~termios.ICRNL
        settings[LOCAL_FLAGS] &= ~(termios.ECHO | termios.ICANON)
        termios.tcsetattr(sys.stdin, termios.TCSANOW, settings)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._screen.disable_bracketed_paste()
        self._screen.flush()
        termios.tcsetattr(sys.stdin, termios.TCSANOW, self._before)


def _history(path: Path | None) -> History:
    """Of the file, which is its owner's alone, and forgets its older half when it has grown large. In memory where
    it cannot be had."""
    if path is None:
        return InMemoryHistory()
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            os.chmod(path, 0o600)
            if file.tell() > MAX_HISTORY_MIB * 2**20:
                file.seek(file.tell() // 2)
                # An entry begins behind an empty line, with the time.
                _, mark, newer = file.read().partition(b"\n\n# ")
                file.truncate(0)
                file.write(mark + newer)
    except OSError:
        return InMemoryHistory()
    return _KeptHistory(str(path))


class _KeptHistory(FileHistory):
    """One whose disk may fill up while people talk."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def _keys() -> KeyBindings:
    """Enter sends; Alt-Enter and Ctrl-J break the line."""
    keys = KeyBindings()
    is_typing = has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=is_typing)
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=is_typing)
    @keys.add("c-j", filter=is_typing)
    def _break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _try(conversation: Conversation, text: str, console: Console, interrupts: Interrupts) -> bool:
    """As `_take`; an interrupt or a failure is told, with what became of the turn."""
    before, num_asked = conversation.messages, conversation.num_asked
    try:
        with interrupts.taken():
            return _take(conversation, text, console)
    except KeyboardInterrupt:
        console.print("\n(stopped)", style="dim")
    except LatheError as error:
        console.print(f"\n{error}", style="red", markup=False, soft_wrap=True)
    if conversation.num_asked == num_asked:
        return True
    if conversation.messages is before:
        console.print("(no answer came; the conversation is as it was; /retry asks again)", style="dim")
    else:
        console.print("(the answer is kept as far as it came; /retry asks again)", style="dim")
    return True


def _take(conversation: Conversation, text: str, console: Console) -> bool:
    """Do what `text` asks, a command or a message; False where it ends the talk. Raises LatheError."""
    text = text.rstrip().lstrip("\r\n")
    word, _, rest = text.partition(" ")
    if word in ("/exit", "/quit"):
        return False
    do = DOING.get(word) if _is_command(text) else None
    if do is not None and (rest.strip() or word not in TAKE_WORDS):
        do(conversation, rest.strip(), console)
    elif _is_command(text):
        console.print(COMMANDS, style="dim", markup=False)
    elif text:
        show(conversation.say(text), console)
        if conversation.finish == "length" and console.is_terminal:
            console.print("(cut off: --max-tokens, or the model's context, allows no more)", style="dim")
    return True


def _retry(conversation: Conversation, _: str, console: Console) -> None:
    if conversation.has_turn:
        show(conversation.retry(), console)
    else:
        _tell(console, "(nothing has been asked yet)")


def _reset(conversation: Conversation, _: str, console: Console) -> None:
    conversation.reset()
    _tell(console, "(forgotten)")


def _image(conversation: Conversation, picture: str, console: Console) -> None:
    conversation.show(picture)
    _tell(console, "(goes with the next message)")


def _model(conversation: Conversation, name: str, console: Console) -> None:
    if name:
        conversation.choose(name)
        _tell(console, f"(now {name})")
    else:
        _tell_names(conversation, [*conversation.served()], console)


def _adapter(conversation: Conversation, words: str, console: Console) -> None:
    if not words:
        adapters = [name for name, parent in conversation.served().items() if parent]
        return _tell_names(conversation, adapters, console)
    name, equals, path = words.partition("=")
    if equals:
        conversation.load(name.strip(), path.strip())
    else:
        conversation.switch(None if name == NOTHING else name)
    return _tell(console, f"(now {conversation.model})")


def _system(conversation: Conversation, text: str, console: Console) -> None:
    if text:
        conversation.system = None if text == NOTHING else text
    _tell(console, f"(system prompt: {conversation.system or NOTHING})")


def _save(conversation: Conversation, typed: str, console: Console) -> None:
    path = path_of(typed)
    conversation.save(path)
    _tell(console, f"(a row more in {path})")


DOING: Mapping[str, Callable[[Conversation, str, Console], None]] = {
    "/retry": _retry,
    "/reset": _reset,
    "/image": _image,
    "/model": _model,
    "/adapter": _adapter,
    "/system": _system,
    "/save": _save,
}
"""What a command does with the words behind it. Raises LatheError."""
TAKE_WORDS = frozenset({"/image", "/save"})


def _tell(console: Console, text: str) -> None:
    console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _tell_names(conversation: Conversation, names: Sequence[str], console: Console) -> None:
    """The one that answers is marked."""
    marked = [f"{name} (answers)" if name == conversation.model else name for name in names]
    _tell(console, f"({', '.join(marked) or NOTHING})")


def _is_command(text: str) -> bool:
    """A slash and one word begin it. A path, a comment or several lines are things to say."""
    word = text.partition(" ")[0]
    return "\n" not in text and word.startswith("/") and word[1:].isalpha()


def show(pieces: Generator[str, None, None], console: Console) -> None:
    """Each piece as it comes and as it is, but for control characters in a terminal. Thoughts are dim there, with a
    line between them and the answer; a pipe gets answers alone."""
    was_thought = False
    with closing(pieces):
        for piece in pieces:
            is_thought = isinstance(piece, Thought)
            if console.is_terminal:
                if was_thought and not is_thought:
                    console.file.write("\n\n")
                text = piece.translate(CONTROLS)
                is_dim = is_thought and not console.is_dumb_terminal
                console.file.write(f"{DIM}{text}{PLAIN}" if is_dim else text)
            elif not is_thought:
                console.file.write(piece)
            was_thought = is_thought
            console.file.flush()
    console.file.write("\n")
    console.file.flush()
