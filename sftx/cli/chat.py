"""`sftx chat`: talk to a trained model, as it was trained."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sftx.cli.answering import loaded_model, model_argument, sampling_options
from sftx.errors import ConfigError, DataError, OutputError, SftxError, one_line, printable

if TYPE_CHECKING:
    from sftx.serving.chat import Chat

_HELP: Final = (
    ("/system TEXT", "begin anew with this system message; without text, with none"),
    ("/reset", "forget the turns so far"),
    ("/save FILE", "append the chat to a JSONL file, as a row that can be trained on"),
    ("/help", "this list"),
    ("/exit", "leave; so does Ctrl-D"),
    ('"""', "begin and end a message of several lines"),
)


@click.command()
@model_argument
@click.option("--system", metavar="TEXT", default="", help="System message.")
@click.option("--compare-base", is_flag=True, help="Show the answers of the base model beside those of its adapter.")
@sampling_options
def command(*, model: str, system: str, compare_base: bool, stop: tuple[str, ...], **options: Any) -> None:
    """Talk to MODEL: a run directory, an adapter, a model directory or a hub id.

    The prompt is that of the run's template, and answers end where it was trained to end. From a pipe, all of the
    input is one message: `echo hi | sftx chat runs/run-1`. Ctrl-C ends an answer.
    """
    is_terminal = sys.stdin.isatty()
    if compare_base and not is_terminal:
        raise ConfigError("option '--compare-base': shows two columns on a terminal, and the input is none")
    message = "" if is_terminal else _read_all()
    loaded, sampling = loaded_model(model, merge=not compare_base, **options)
    from sftx.serving.chat import Chat

    if compare_base and not loaded.lm.adapters:
        raise ConfigError(f"option '--compare-base': {model} has no adapter, so that there is no base model to compare")
    chat = Chat(loaded, sampling, system=system, stop=stop)
    if not is_terminal:
        _print_answer(chat, message)
        return
    base = Chat(loaded, sampling, system=system, stop=stop, adapters=False) if compare_base else None
    click.echo(f"{loaded.directory}: /help lists the commands", err=True)
    for line in _messages():
        with _shown_errors():
            if line.startswith("/"):
                if line == "/exit":
                    break
                _obey(line, [chat] if base is None else [chat, base])
            elif base is None:
                _print_answer(chat, line)
            else:
                _print_side_by_side(chat, base, line)


def _read_all() -> str:
    try:
        message = sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise DataError(f"the input is no text in {sys.stdin.encoding}: {one_line(error)}") from error
    if not message:
        raise DataError("the input is empty; write a message to it, as in: echo hi | sftx chat MODEL")
    return message


def _messages() -> Iterator[str]:
    """Yield the messages that are typed, until the end of the input. Arrow keys bring earlier ones back."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() uses it when it is imported)
    while True:
        try:
            text = input("> ").strip()
            if text.startswith('"""'):
                lines = [text.removeprefix('"""')]
                while not lines[-1].endswith('"""'):
                    lines.append(input(". "))
                text = "\n".join(lines).removesuffix('"""').strip()
        except EOFError:
            click.echo()
            return
        if text:
            yield text


@contextlib.contextmanager
def _shown_errors() -> Iterator[None]:
    """Show an error, or that an answer was interrupted, and go on with the chat."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("\n(interrupted)", err=True)
    except (SftxError, OSError) as error:
        click.echo(f"sftx: error: {printable(one_line(error))}", err=True)


def _obey(line: str, chats: list[Chat]) -> None:
    name, _, rest = line.partition(" ")
    match name:
        case "/reset":
            for chat in chats:
                chat.reset()
        case "/system":
            for chat in chats:
                chat.reset()
                chat.system = rest.strip()
        case "/save":
            _save(rest.strip(), chats[0])
        case "/help":
            for command_name, what in _HELP:
                click.echo(f"  {command_name:<13} {what}")
        case _:
            raise ConfigError(f"{name}: is no command; /help lists them")


def _save(name: str, chat: Chat) -> None:
    if not name:
        raise ConfigError("/save: name a file, as in /save chats.jsonl")
    if not chat.turns:
        raise ConfigError("/save: nothing was said yet")
    path = Path(name).expanduser()
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(chat.as_record(), ensure_ascii=False) + "\n")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {one_line(error)}") from error
    click.echo(f"appended to {path}")


def _print_answer(chat: Chat, message: str) -> None:
    for piece in chat.answer(message):
        click.echo(printable(piece), nl=False)
    click.echo()
    if chat.last is not None and chat.last.finish_reason == "length":
        click.echo("(the answer was cut after --max-new-tokens)", err=True)


def _print_side_by_side(chat: Chat, base: Chat, message: str) -> None:
    """Show both answers while they are generated, a piece of each in turn."""
    import rich
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    answers = {"trained": chat.answer(message), "base": base.answer(message)}
    texts = dict.fromkeys(answers, "")

    def table() -> Table:
        shown = Table(*texts, expand=True)
        shown.add_row(*(Text(printable(text)) for text in texts.values()))
        return shown

    open_ones = dict(answers)
    try:
        with Live(table(), console=rich.get_console(), refresh_per_second=8, vertical_overflow="visible") as live:
            while open_ones:
                for name, pieces in list(open_ones.items()):
                    piece = next(pieces, None)
                    if piece is None:
                        del open_ones[name]
                    else:
                        texts[name] += piece
                live.update(table())
    finally:
        for pieces in answers.values():
            pieces.close()  # type: ignore[attr-defined]
