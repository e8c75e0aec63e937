"""A chat asks as the run was trained, keeps its turns, and is a command for terminals and pipes."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from itertools import zip_longest
from pathlib import Path

import pytest
from click.testing import CliRunner

from sftx.checkpoint.load_run import LoadedRun, load_run
from sftx.cli import main
from sftx.model import tiny
from sftx.model.decoding import Decoder, Request, Sampling
from sftx.serving.chat import Chat
from sftx.serving.settings import sampling_of
from sftx.testing.runs import run_tiny
from sftx.types import Conversation, Message


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose adapter has clearly changed the model."""
    directory = tmp_path_factory.mktemp("chat")
    settings = {"train.learning_rate": 0.05, "train.max_steps": 4, "lora.r": 8}
    return run_tiny(["lora"], directory, settings=settings).output_dir


@pytest.fixture(scope="module")
def loaded(run_dir: Path) -> LoadedRun:
    return load_run(run_dir)


def whole(loaded: LoadedRun, *messages: Message, max_new_tokens: int = 12) -> str:
    """Return the answer to messages, all of them computed anew."""
    request = Request(loaded.prompt(Conversation(messages)), Sampling(max_new_tokens))
    list(Decoder(loaded.lm, stop_ids=loaded.stop_ids, max_rows=1).run([request]))
    return str(loaded.tokenizer.decode(request.answer_ids))


def test_each_turn_is_asked_with_those_before_it(loaded: LoadedRun) -> None:
    chat = Chat(loaded, Sampling(12), system="Be brief.")
    system, first = Message("system", "Be brief."), Message("user", "Hello!")
    answer = "".join(chat.answer("Hello!"))
    assert answer == whole(loaded, system, first)
    second = "".join(chat.answer("And again?"))
    assert second == whole(loaded, system, first, Message("assistant", answer), Message("user", "And again?"))
    assert [message.role for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.as_record()["messages"][-1] == {"role": "assistant", "content": second}
    chat.reset()
    assert "".join(chat.answer("Hello!")) == answer


def test_the_base_model_answers_as_before_training(loaded: LoadedRun) -> None:
    chat, base = Chat(loaded, Sampling(12)), Chat(loaded, Sampling(12), adapters=False)
    answers = chat.answer("Hello!"), base.answer("Hello!")
    trained, untrained = ("".join(pieces) for pieces in answers)
    assert trained != untrained
    with loaded.lm.without_adapters():
        assert untrained == whole(loaded, Message("user", "Hello!"))
    # A piece of each in turn, as two columns show them.
    chat.reset()
    base.reset()
    pieces = list(zip_longest(chat.answer("Hello!"), base.answer("Hello!"), fillvalue=""))
    assert ["".join(one) for one in zip(*pieces, strict=True)] == [trained, untrained]


def test_an_answer_that_is_not_read_to_its_end_ends_there(loaded: LoadedRun) -> None:
    chat = Chat(loaded, Sampling(50))
    pieces = chat.answer("Hello!")
    said = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert chat.turns[-1] == Message("assistant", said)
    assert chat.last is not None
    assert chat.last.finish_reason == "cancelled"


def test_the_models_own_settings_decide_what_is_not_chosen(loaded: LoadedRun) -> None:
    from transformers import GenerationConfig

    assert sampling_of(GenerationConfig()) == Sampling(512)
    own = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, max_new_tokens=40)
    assert sampling_of(own) == Sampling(40, temperature=0.6, top_p=0.9, top_k=20)
    assert sampling_of(own, temperature=0.0, seed=3).temperature == 0
    assert sampling_of(GenerationConfig(temperature=0.6)) == Sampling(512)  # it does not sample
    assert sampling_of(GenerationConfig(), temperature=0.5).temperature == 0.5


def test_a_pipe_is_one_message(run_dir: Path, loaded: LoadedRun) -> None:
    result = CliRunner().invoke(main, ["chat", str(run_dir), "--max-new-tokens", "12"], input="Hello!\nAnd again?\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip("\n") == whole(loaded, Message("user", "Hello!\nAnd again?")).rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        ([], "", "sftx: error: the input is empty; write a message to it"),
        (["--compare-base"], "hi", "shows two columns on a terminal, and the input is none"),
        (["--device", "cuda:9"], "hi", "option '--device': 'cuda:9' cannot be used"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(run_dir: Path, arguments: list[str], text: str, message: str) -> None:
    result = CliRunner().invoke(main, ["chat", str(run_dir), *arguments], input=text)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not result.stdout


def test_a_model_without_a_template_is_refused(tmp_path: Path) -> None:
    for file in tiny.model_dir().iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "tokenizer_config.json"
    values = json.loads(config.read_text())
    values.pop("chat_template", None)
    config.write_text(json.dumps(values))
    result = CliRunner().invoke(main, ["chat", str(tmp_path)], input="hi")
    assert result.exit_code == 1
    assert "its tokenizer has no chat template; only plain text can be continued" in result.stderr


def test_a_session_on_a_terminal(run_dir: Path, tmp_path: Path) -> None:
    """A real process on a pseudo-terminal: two turns, commands, a wrong one, and the end by Ctrl-D."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "sftx", "chat", str(run_dir), "--max-new-tokens", "4"]
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, cwd=tmp_path, env={**os.environ, "TERM": "dumb"}
    )
    os.close(terminal)
    shown = ""

    def until(text: str, count: int = 1) -> None:
        nonlocal shown
        deadline = time.monotonic() + 180
        while shown.count(text) < count and time.monotonic() < deadline:
            if select.select([controller], [], [], 1)[0]:
                shown += os.read(controller, 65536).decode(errors="replace")
        assert shown.count(text) >= count, shown

    until("> ")
    for number, line in enumerate(["Hello!", "/nonsense", "/save chats.jsonl", "/reset", "/save x.jsonl"], start=2):
        os.write(controller, f"{line}\n".encode())
        until("> ", number)
    os.write(controller, b"\x04")
    process.wait(60)
    os.close(controller)
    assert process.returncode == 0
    assert "/nonsense: is no command; /help lists them" in shown
    assert "appended to chats.jsonl" in shown
    assert "/save: nothing was said yet" in shown
    row = json.loads((tmp_path / "chats.jsonl").read_text())
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
