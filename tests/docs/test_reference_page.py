"""docs/reference.md says what the code says: it is generated from types, fields, signatures and docstrings.

After a change of a public name or of its docstring, run `python tests/docs/test_reference_page.py` to write it again.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs" / "reference.md"
SECTIONS: Final = (
    ("Hooks and options", ("sftx/assembly/hookspecs.py", "sftx/secret.py")),
    ("", ("sftx/types.py",)),
    ("Batches", ("sftx/data/collate.py",)),
    ("Other models", ("sftx/trainer/frozen_model.py",)),
    ("Optimizers", ("sftx/trainer/parameter_groups.py",)),
    ("Events of a run", ("sftx/events.py",)),
    ("Errors", ("sftx/errors.py",)),
    ("From Python", ("sftx/api.py", "sftx/checkpoint/load_run.py")),
)
"""Titles and files of the public names of `sftx`, in the order of a run. An empty title: the file has its own."""
RETURNED: Final = ("TrainedRun", "Inspection", "LoadedRun")
"""What functions of `sftx` return, which has no public name of its own."""
PACKAGES: Final = (
    (ROOT, ROOT / "sftx/testing", "## sftx.testing\n\nFor the tests of a plugin; importing it imports torch.\n"),
    (ROOT / "kernels", ROOT / "kernels/sftx_kernels", "## sftx_kernels\n\nOperations that plugins may import.\n"),
)
INTRODUCTION: Final = """# Reference

Every public name, generated from the code: what plugins and scripts may import. A plugin imports nothing else of sftx,
and `sftx plugins check` says where it does. Types of the pipeline come in the order in which data meets them.

Suffixes of tensor names are their dimensions: B rows, T tokens, N = B * T, D hidden, V vocabulary.
"""

Definition: TypeAlias = ast.ClassDef | ast.FunctionDef | ast.AnnAssign | ast.Assign


@functools.cache
def source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def definitions(path: Path) -> dict[str, tuple[Definition, str]]:
    """Return the definitions of a file by name, each with the string below it, in their order."""
    found: dict[str, tuple[Definition, str]] = {}
    body = ast.parse(source(path)).body
    for node, below in zip(body, [*body[1:], None], strict=True):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                found[name] = node, ast.get_docstring(node) or ""
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                found[name] = node, _string(below)
    return found


def public_names(package: Path) -> tuple[str, ...]:
    node, _ = definitions(package / "__init__.py")["__all__"]
    assert isinstance(node, ast.Assign)
    return tuple(ast.literal_eval(node.value))


def home(root: Path, package: Path, name: str) -> Path:
    """Return the file that defines a name of a package's `__init__.py`, through any number of imports from `root`."""
    file = package / "__init__.py"
    while name not in definitions(file):
        imports = (node for node in ast.walk(ast.parse(source(file))) if isinstance(node, ast.ImportFrom))
        module = next(node.module or "" for node in imports if any(alias.name == name for alias in node.names))
        path = root / module.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file


def generated() -> str:
    core, left = ROOT / "sftx", {*public_names(ROOT / "sftx"), *RETURNED}
    parts = [INTRODUCTION]
    for title, files in SECTIONS:
        parts += [f"## {title}\n"] if title else []
        for file in files:
            path, end = ROOT / file, 0
            found = definitions(path)
            hooks = [
                _bullet(*found[name]) for name in found if file.endswith("hookspecs.py") and name.startswith("sftx_")
            ]
            parts += ["\n".join(hooks) + "\n"] if hooks else []
            lines = source(path).splitlines()
            for name, (node, doc) in found.items():
                comments = [line for line in lines[end : node.lineno] if line.startswith("# --- ") and not title]
                parts += [f"## {line.strip('# -').capitalize()}\n" for line in comments]
                end = node.lineno
                if name in left and (name in RETURNED or home(ROOT, core, name) == path):
                    left.remove(name)
                    parts.append(described(name, node, doc))
    assert not left, f"the files of {sorted(left)} are in no section of {Path(__file__).name}"
    for root, package, said in PACKAGES:
        parts.append(said)
        for name in public_names(package):
            parts.append(described(name, *definitions(home(root, package, name))[name]))
    return "\n".join(parts)


def described(name: str, node: Definition, doc: str) -> str:
    """Return the section of one public name."""
    lines = [f"### {name}\n"]
    if isinstance(node, ast.ClassDef):
        bases = [ast.unparse(base) for base in node.bases if ast.unparse(base) not in ("ABC", "Protocol")]
        is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
        is_protocol = any(ast.unparse(base) == "Protocol" for base in node.bases)
        kind = "dataclass" if is_dataclass else "protocol" if is_protocol else "class"
        lines.append(f"*{kind}{' of ' + ', '.join(bases) if bases else ''}*\n")
        lines.append(re.sub(r"^(\w+(?:, \w+)*): ", r"- `\1`: ", paragraphs(doc), flags=re.MULTILINE) + "\n")
        members = [_bullet(*member) for member in _members(node)]
        lines += [*members, ""] if members else []
    elif isinstance(node, ast.FunctionDef):
        lines.append(f"```python\n{_signature(node)}\n```\n\n{paragraphs(doc)}\n")
    else:
        value = "" if node.value is None else ast.unparse(node.value)
        lines.append(f"`{name} = {value}`\n\n{paragraphs(doc)}\n")
    return "\n".join(lines)


def _members(node: ast.ClassDef) -> Iterator[tuple[Definition, str]]:
    """Yield the public fields and methods of a class with their docstrings, fields first."""
    fields: list[tuple[Definition, str]] = []
    methods: list[tuple[Definition, str]] = []
    for member, below in zip(node.body, [*node.body[1:], None], strict=True):
        match member:
            case ast.AnnAssign(target=ast.Name(id=name)) if not name.startswith("_"):
                fields.append((member, _string(below)))
            case ast.FunctionDef(name=name) if not name.startswith("_") or name == "__call__":
                is_property = _is_property(member)
                (fields if is_property else methods).append((member, ast.get_docstring(member) or ""))
    yield from fields
    yield from methods


def _is_property(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list)


def _bullet(node: Definition, doc: str) -> str:
    if isinstance(node, ast.FunctionDef):
        is_property = _is_property(node)
        returned = "" if node.returns is None else ast.unparse(node.returns)
        what = f"{node.name}: {returned}" if is_property else " ".join(_signature(node).split())
        what = what.replace("( ", "(").replace(",)", ")").replace(", )", ")")
    else:
        what = ast.unparse(node).replace("field(default_factory=dict)", "{}")
    first, _, rest = paragraphs(doc).partition("\n\n")
    first = " ".join(first.split())
    shown = f"- `{what}`" + (f": {first}" if first else "")
    return shown + ("\n\n" + textwrap.indent(rest, "  ") if rest else "")


def _signature(node: ast.FunctionDef) -> str:
    """Return name, parameters and result; on several lines where it is long."""
    own = node.args
    positional = [*own.posonlyargs, *own.args]
    defaults = [None] * (len(positional) - len(own.defaults)) + own.defaults
    parameters = [_parameter(*pair) for pair in zip(positional, defaults, strict=True) if pair[0].arg != "self"]
    parameters += [f"*{_parameter(own.vararg)}"] if own.vararg else ["*"] if own.kwonlyargs else []
    parameters += [_parameter(*pair) for pair in zip(own.kwonlyargs, own.kw_defaults, strict=True)]
    parameters += [f"**{_parameter(own.kwarg)}"] if own.kwarg else []
    returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    line = f"{node.name}({', '.join(parameters)}){returns}"
    return line if len(line) <= 100 else f"{node.name}(\n    " + ",\n    ".join(parameters) + f",\n){returns}"


def _parameter(argument: ast.arg, default: ast.expr | None = None) -> str:
    kind = "" if argument.annotation is None else f": {ast.unparse(argument.annotation)}"
    value = "" if default is None else f" = {ast.unparse(default)}"
    return f"{argument.arg}{kind}{value}"


def paragraphs(doc: str) -> str:
    """Return a docstring as Markdown: what is indented below `Args:` becomes a list."""
    lines = inspect.cleandoc(doc).splitlines()
    for number, line in enumerate(lines):
        if named := re.match(r"    (\w+(?:, \w+)*): ", line):
            lines[number] = f"- `{named[1]}`: {line[named.end() :]}"
        elif re.match(r"`\w+`(, `\w+`)*: ", line):
            lines[number] = f"- {line}"
        elif line in ("Args:", "Returns:", "Raises:"):
            lines[number] = f"{line}\n"
        elif line.startswith("    "):
            lines[number] = "  " + line.strip()
    return "\n".join(lines)


def _string(node: ast.stmt | None) -> str:
    match node:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return inspect.cleandoc(text)
    return ""


def test_the_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == generated(), (
        "a public name or its docstring has changed; run `python tests/docs/test_reference_page.py`"
    )


def test_the_page_has_every_public_name_with_its_fields() -> None:
    import dataclasses

    import sftx
    import sftx.testing
    import sftx_kernels

    page = PAGE.read_text(encoding="utf-8")
    for module in (sftx, sftx.testing, sftx_kernels):
        for name in module.__all__:
            section = re.search(rf"^### {name}\n(.*?)(?=^##|\Z)", page, flags=re.MULTILINE | re.DOTALL)
            assert section, name
            thing = getattr(module, name)
            for field in dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ():
                assert f"- `{field.name}: " in section[1], f"{name}.{field.name}"


if __name__ == "__main__":
    PAGE.write_text(generated(), encoding="utf-8")
