"""Every code block of every page is valid; the commands of the pages named here are run, those of others elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import pages
from environments import make_environment, variables
from pages import DOCS, ROOT, SHELLS, Block, Ran, blocks

QUESTIONS = Path(pages.__file__).with_name("questions.jsonl")
NOT_RUN = (
    "a drawing",
    "a formula",
    "answers until it is stopped",
    "needs a hub",
    "needs several GPUs",
    "needs ollama",
    "needs the configuration of a model of the hub",
    "sets up what the tests run in",
    "takes a file of another tool",
    "takes a run of the demo",
    "takes an exporter with a fault",
)
"""Reasons for which the commands of a block may be checked without being run."""
RUN_ELSEWHERE = {
    "docs/distillation.md": "docs/test_distillation_page.py",
    "docs/distributed.md": "docs/test_distributed_page.py",
    "docs/inspect.md": "inspection/test_docs.py",
    "docs/launching.md": "docs/test_launching_page.py",
    "docs/plugins.md": "docs/test_plugins_page.py",
    "docs/ppo.md": "docs/test_ppo_page.py",
    "docs/preference.md": "docs/test_preference_page.py",
    "docs/reinforcement.md": "docs/test_reinforcement_page.py",
    "docs/remote-files.md": "docs/test_remote_files_page.py",
    "docs/starting.md": "docs/test_starting_page.py",
    "docs/verify.md": "docs/test_verify_page.py",
}
"""Pages whose commands the tests of another file run, under tests."""
MIGRATING = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.glob("migrating/*.md"))
"""Pages for users of other tools, whose commands `docs/test_migrating_pages.py` runs to compare what they write."""
INSTALLING = ("docs/howto/my-loss.md", "docs/howto/my-template.md")
"""Pages that install a package, into an environment of their own."""
WITH_ITS_FILES = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.glob("howto/*.md"))
"""Pages that show every file that their commands read."""
WITH_A_RUN = (
    "docs/adapters.md", "docs/answering.md", "docs/data.md", "docs/exporting.md", "docs/hooks/exporter.md",
    "docs/observers.md", "docs/planning.md", "docs/templates.md", "docs/training.md",
)  # fmt: skip
"""Pages whose commands read a run file, its data and runs that are there."""
PARSED = ("README.md", "docs/commands.md", "docs/index.md", "docs/installing.md", "docs/migrating.md")
"""Pages that name commands which another page shows, and a test of that page runs."""
EMBEDDED = ("docs/tutorial.md",)
"""Pages that are run with the embedded model, as they stand there."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with the files that pages name without showing them, as far as they must be there to be named."""
    (tmp_path / "run.yaml").write_text("data: {train: chats.jsonl}\nplugins: {chatml: {}, lora: {}}\n")
    shutil.copy(QUESTIONS, tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_are_valid(page: Path, directory: Path) -> None:
    pages.write_files(page, directory)
    wrong = []
    for block in blocks(page):
        assert block.not_run in (None, *NOT_RUN), f"{block}: {block.not_run!r} is no reason that is known"
        try:
            pages.check(block, directory)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("language", "text", "said"),
    [
        ("console", "$ sftx run --plugin chatml --plugin lora --set lora.rank=8", "rank"),
        ("console", "$ sftx run --plugin chatml --max-step 3", "max_step"),
        ("console", "$ sftx look run.yaml", "no command look"),
        ("console", "wrote runs/mine", "begins with a command"),
        ("sh", "sftx merge runs/mine --bits 4", "--bits"),
        ("sh", "pip install 'sftx[nothing]'", "no extra nothing"),
        ("sh", "make everything", "no target"),
        ("sh", "trl sft --model x", "what is trl?"),
        ("yaml", "train: {learning_rte: 1.0e-4}", "learning_rte"),
        ("yaml", "plugins: {chatml: {}, lora: {r: no}}", "lora"),
        ("json", "{'prompt': 'a'}", "JSONDecodeError"),
        ("python", "from sftx import Nothing", "no public"),
        ("python", "def f(:", "SyntaxError"),
        ("text", "wrote 3 files", "why nothing checks it"),
        ("", "sftx run", "name the language"),
    ],
)
def test_a_wrong_block_is_found(language: str, text: str, said: str, directory: Path) -> None:
    block = Block(DOCS / "page.md", 1, language, text, None, None)
    with pytest.raises(AssertionError, match=r"docs/page\.md:1: ") as caught:
        pages.check(block, directory)
    assert said in str(caught.value)


def test_the_output_that_a_page_shows_is_compared() -> None:
    block = Block(DOCS / "page.md", 1, "console", "$ sftx run\nstep 1  loss 2.5\n...\nresult: a\n", None, None)
    (command,) = pages.commands(block)
    assert Ran(block, command, 0, "step 1   loss 0.71\nmore\nresult: a").lacks() == []
    assert Ran(block, command, 0, "result: a\nstep 1  loss 0.71").lacks() == ["result: a"]
    assert Ran(block, command, 0, "step 1  loss 0.71\nresult: b").lacks() == ["result: a"]


def test_the_commands_of_every_page_are_run_or_it_is_said_where() -> None:
    known = {*RUN_ELSEWHERE, *MIGRATING, *WITH_ITS_FILES, *WITH_A_RUN, *PARSED, *EMBEDDED}
    with_commands = {
        page.relative_to(ROOT).as_posix()
        for page in pages.pages()
        if any(block.language in SHELLS and not block.not_run for block in blocks(page))
    }
    assert with_commands <= known
    for page, file in RUN_ELSEWHERE.items():
        assert Path(page).name in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_no_page_that_is_run_starts_a_server() -> None:
    """Such a block has the mark `<!-- not run: answers until it is stopped -->`."""
    starts = [
        f"{block}: {command.line}"
        for page in (*WITH_ITS_FILES, *WITH_A_RUN, *EMBEDDED)
        for block in blocks(ROOT / page)
        if block.language in SHELLS and not block.not_run
        for command in pages.commands(block)
        if pages.answers_until_it_is_stopped(command)
    ]
    assert starts == []


@pytest.mark.parametrize("line", ["sftx serve runs/a --port 0", "sftx merge runs/a && PORT=1 sftx serve a=runs/a"])
def test_a_server_is_not_started(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(DOCS / "page.md", 1, "sh", line, None, None)
    monkeypatch.setattr(pages, "blocks", lambda page: [block])
    with pytest.raises(AssertionError, match=r"docs/page\.md:1: .*never ends"):
        list(pages.run_page(block.page, lambda line, directory: pytest.fail("it was run"), tmp_path))


def test_a_command_that_does_not_end_is_killed_and_fails(tmp_path: Path) -> None:
    exit_code, printed = pages.in_a_shell("echo begun; sleep 600 | sleep 600", tmp_path, limit_s=0.5)
    assert exit_code != 0
    assert printed.startswith("begun\n")
    assert "had not ended after 0.5 s" in printed


def failures(page: str, directory: Path, run: pages.Runner) -> list[str]:
    """Run a page, and return what went otherwise than the page says."""
    failed = []
    for ran in pages.run_page(ROOT / page, run, directory):
        if ran.exit_code:
            failed.append(f"{ran.block}: {ran.command.line}: {ran.output}")
        failed += [f"{ran.block}: {ran.command.line}: no line {line!r} in: {ran.output}" for line in ran.lacks()]
    return failed


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in WITH_ITS_FILES if page not in INSTALLING])
def test_a_page_that_has_its_files_works(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert failures(page, tmp_path, pages.in_a_process) == []


@pytest.mark.slow
@pytest.mark.parametrize("page", INSTALLING)
def test_a_page_that_installs_a_package_works(page: str, tmp_path: Path) -> None:
    environment = make_environment(tmp_path / "environment")
    here = tmp_path / "here"
    here.mkdir()

    def run(line: str, directory: Path) -> tuple[int, str]:
        words = pages.with_tiny_model(pages.Command(line, ()).simple()[0])
        words = words[2:] if words[:2] == ["python", "-m"] else words
        if words[:2] == ["pip", "install"]:
            words[2:2] = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
        return pages.run_limited([str(environment.python), "-m", *words], directory, variables())

    assert failures(page, here, run) == []


@pytest.fixture(scope="module")
def with_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what pages take for granted: a model, rows, a run file and finished runs."""
    from click.testing import CliRunner
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from sftx.cli import main
    from sftx.model.tiny import model_dir

    directory = tmp_path_factory.mktemp("with-a-run")
    rows = "".join(json.dumps({"prompt": f"{n} + 1", "completion": str(n + 1)}) + "\n" for n in range(12))
    for name in ("chats.jsonl", "rows.jsonl", "train.jsonl", "questions.jsonl"):
        (directory / name).write_text(rows)
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(model_dir(), num_hidden_layers=4))
    for name in ("MODEL", "DIR"):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    tags = ("think", "tool_call", "tool_response")  # which Qwen3's template needs
    tokenizer.add_tokens([token for tag in tags for token in (f"<{tag}>", f"</{tag}>")], special_tokens=True)
    tokenizer.save_pretrained(directory / "DIR")
    train = "{max_steps: 2, use_cpu: true}"
    (directory / "run.yaml").write_text(
        "model: MODEL\ndata: {train: chats.jsonl, eval_fraction: 2, max_overlap: 1}\nplugins: {chatml: {}, lora: {}}\n"
        f"train: {train}\ngeneration: {{max_new_tokens: 4}}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        done = CliRunner().invoke(main, ["run", "run.yaml", "--output-dir", "runs/run-1"])
        assert done.exit_code == 0, done.output
        for name in ("other", "demo", "a", "b"):
            shutil.copytree("runs/run-1", f"runs/{name}")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_A_RUN)
def test_a_page_that_takes_a_run_for_granted_works(
    page: str, with_a_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    shutil.copytree(with_a_run, here)
    monkeypatch.chdir(here)
    assert failures(page, here, pages.in_a_process) == []


@pytest.mark.slow
@pytest.mark.usefixtures("real_model_dir")
@pytest.mark.parametrize("page", EMBEDDED)
def test_the_tutorial_works_as_it_is_written(page: str, tmp_path: Path) -> None:
    assert failures(page, tmp_path, pages.in_a_shell) == []
