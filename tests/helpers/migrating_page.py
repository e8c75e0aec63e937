"""Writes the tables of docs/migrating.md: `python tests/helpers/migrating_page.py`."""

from __future__ import annotations

from pathlib import Path

from sftx.config.other_tools import ANY, TABLE, Rule

PAGE = Path(__file__).parents[2] / "docs" / "migrating.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def page(text: str) -> str:
    """Returns the page with the tables of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def tables() -> str:
    lines = []
    for topic, rows in TABLE.items():
        lines += [f"### {topic}", "", "| there | with the value | here |", "| --- | --- | --- |"]
        for row in rows:
            names = ", ".join(f"`{name}`" for name in row.names)
            for number, (key, rule) in enumerate(row.rules):
                lines.append(
                    f"| {'' if number else names} | {_value(key, alone=len(row.rules) == 1)} | {_here(rule)} |"
                )
        lines.append("")
    return "\n".join(lines)


def _value(key: object, *, alone: bool) -> str:
    if key is ANY:
        return "" if alone else "any other"
    if isinstance(key, type):
        return {"float": "a share", "int": "a number", "str": "a word", "dict": "a mapping"}[key.__name__]
    return f"`{str(key).lower() if isinstance(key, bool) else key}`"


def _here(rule: Rule) -> str:
    why = rule.why.replace("|", "\\|").replace("<", "&lt;")
    if rule.kind == "write":
        return ", ".join(f"`{target}`" for target in rule.targets) + (f": {why}" if why else "")
    return f"left out{f': {why}' if why else ''}" if rule.kind == "leave out" else f"not here: {why}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
