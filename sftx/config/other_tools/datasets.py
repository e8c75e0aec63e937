"""Converts what other tools say of their data into sources of `data.train`, whose fields are those of `Source`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sftx.config.other_tools.rules import EACH_SOURCE, Answer, Given, Rule, made, stage

_DATASETS: Final = (
    "dataset",
    "train_dataset",
    "dataset_name",
    "dataset_path",
    "data_path",
    "train_file",
    "train_files",
)
OF_EACH_SOURCE: Final = "data.train says it of each source"
_COMPARED: Final = ("dpo", "kto", "orpo", "simpo", "rm", "ipo")
"""Stages whose records are compared answers, which the loss itself reads: no format is named for them."""


@dataclass
class _Read:
    """A source of data here that stands for one entry of another tool's data."""

    source: dict[str, Any] = field(default_factory=dict)
    plugins: dict[str, Any] = field(default_factory=dict)
    """Options beside the sources, by dotted names."""
    lost: list[str] = field(default_factory=list)

    @property
    def written(self) -> Any:
        """The source, as text where it is a path alone."""
        return self.source["path"] if list(self.source) == ["path"] else self.source


def _answer(target: str, entries: Sequence[_Read], why: str) -> Answer:
    options: dict[str, Any] = {target: [entry.written for entry in entries]}
    lost = [text for entry in entries for text in entry.lost]
    for entry in entries:
        for name, value in entry.plugins.items():
            if options.setdefault(name, value) != value:
                lost.append(f"{name}: sources need different values; convert the rows of one of them")
    return Answer("write", options, why, lost=tuple(dict.fromkeys(lost)))


def first_row(path: str) -> Mapping[str, Any]:
    """Return the first row of a local JSON or JSONL file, without reading all of it; an empty one if there is none."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(1 << 20).lstrip()
        row, _ = json.JSONDecoder().raw_decode(text[1:].lstrip() if text.startswith("[") else text)
    except (OSError, ValueError):
        return {}
    return row if isinstance(row, dict) else {}


# --- options that every source gets -----------------------------------------------------------------


def of_source(name: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """An option that every source gets: written where the sources are, if another option names them."""

    def make(value: Any, given: Given) -> Answer:
        if any(option in given for option in _DATASETS):
            return Answer("not here", why=OF_EACH_SOURCE)
        return Answer("write", {f"{EACH_SOURCE}{name}": convert(value)}, "of each source")

    return made(make, f"{EACH_SOURCE}{name}", why="of each source")


_SOURCE_FIELDS: Final = {"limit": "max_samples", "subset": "dataset_config", "split": "dataset_train_split"}


def _with_fields(source: dict[str, Any], given: Given) -> dict[str, Any]:
    """Add the values that other options give to each source."""
    values = {
        here: given[there] for here, there in _SOURCE_FIELDS.items() if given.get(there) not in (None, "train", "")
    }
    if given.get("dataset_text_field") not in (None, "text"):
        values["columns"] = {"text": given["dataset_text_field"]}
    return {**source, **values}


def named_dataset(target: str) -> Rule:
    """A path or a hub id."""

    def make(value: Any, given: Given) -> Answer:
        paths = value if isinstance(value, list) else [value]
        return _answer(target, [_Read(_with_fields({"path": path}, given)) for path in paths], "")

    return made(make, target)


# --- LLaMA-Factory's dataset_info.json -----------------------------------------------------------------


def dataset(target: str) -> Rule:
    """`dataset: identity,alpaca_en_demo`: names in dataset_info.json."""
    why = "the path of each file (LLaMA-Factory's names are those of its dataset_info.json), or a hub id"

    def make(value: Any, given: Given) -> Answer:
        names = value if isinstance(value, list) else [part.strip() for part in str(value).split(",")]
        directory = Path(str(given.get("dataset_dir") or "data"))
        try:
            known = json.loads((directory / "dataset_info.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        known = known if isinstance(known, dict) else {}
        entries = [_of_info(name, known.get(str(name)), directory, given) for name in names]
        return _answer(target, entries, "")

    return made(make, target, why=why)


_ALPACA: Final = {
    "prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history",
    "tools": "tools", "chosen": "chosen", "rejected": "rejected", "kto_tag": "kto_tag",
}  # fmt: skip
_SHAREGPT: Final = {
    "messages": "conversations", "system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected",
    "kto_tag": "label",
}  # fmt: skip
"""Fields of the formats here, by the names that dataset_info.json has for the columns."""
_UNNAMED: Final = {"prompt": "instruction", "query": "input", "response": "output"}
_UNNAMED_CHAT: Final = {"messages": "conversations"}
"""The columns that LLaMA-Factory reads where an entry names none."""
_TAGS: Final = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
"""LLaMA-Factory's defaults."""
_OPENAI: Final = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
_ROLES: Final = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "function_call",
    "system_tag": "system",
}  # fmt: skip


def _of_info(name: Any, entry: Any, directory: Path, given: Given) -> _Read:
    """Return what dataset_info.json says of one name; the name itself where it has none."""
    if not isinstance(entry, dict):
        is_path = str(directory) == "ONLINE" or Path(str(name)).exists()
        unknown = (
            f"{name}: {directory}/dataset_info.json does not say what it is; write the path of its file, or a hub id"
        )
        return _Read(_with_fields({"path": name}, given), lost=[] if is_path else [unknown])
    read = _Read()
    file, hub = entry.get("file_name"), entry.get("hf_hub_url")
    if file is not None:
        read.source["path"] = str(directory / str(file))
    else:
        read.source["path"] = hub or name
        if hub is None:
            read.lost.append(f"{name}: it is neither a file nor on the Hugging Face hub; download it and give its path")
    for field_name in ("subset", "split"):
        if entry.get(field_name) not in (None, "train", "default"):
            read.source[field_name] = entry[field_name]
    read.source = _with_fields(read.source, given)
    if isinstance(entry.get("num_samples"), int):
        limit = read.source.get("limit")
        read.source["limit"] = min(entry["num_samples"], limit) if isinstance(limit, int) else entry["num_samples"]
    if entry.get("folder"):
        read.lost.append(f"folder of {name}: give the path of the files as the source")
    _columns(read, name, entry, given)
    return read


def _columns(read: _Read, name: Any, entry: Mapping[str, Any], given: Given) -> None:
    """The columns and tags of an entry. What LLaMA-Factory does not name it does not read."""
    is_chat = entry.get("formatting") in ("sharegpt", "openai")
    tags = {**_TAGS, **(entry["tags"] if isinstance(entry.get("tags"), dict) else {})}
    is_openai = is_chat and all(tags[tag] == word for tag, word in _OPENAI.items())
    theirs = entry["columns"] if isinstance(entry.get("columns"), dict) else _UNNAMED_CHAT if is_chat else _UNNAMED
    ours = {**_SHAREGPT, "messages": "messages"} if is_openai else _SHAREGPT if is_chat else _ALPACA
    if stage(given) == "pt" and not is_chat:
        ours = {"prompt": "text"}
    columns = {ours[key]: column for key, column in theirs.items() if key in ours and column}
    media = [key for key in theirs if key in ("images", "videos", "audios")]
    if media:
        read.lost.append(f"{', '.join(media)} of {name}: text models only; leave such rows out")
    row = first_row(str(read.source["path"])) if entry.get("file_name") else {}
    is_same = all(field_name == column for field_name, column in columns.items())
    unread = {"system", "history", "tools", "label", "kto_tag", "text", "messages", "conversations"} & set(row)
    is_there = not row or not columns or bool(set(columns.values()) & set(row))
    if is_there and (not is_same or unread - set(columns.values())):
        read.source["columns"] = columns
    if is_chat and not is_openai and stage(given) not in _COMPARED:
        for key, option in (("role_tag", "role_key"), ("content_tag", "content_key")):
            if tags[key] != _TAGS[key] and (tags["role_tag"], tags["content_tag"]) != ("role", "content"):
                read.plugins[f"plugins.sharegpt.{option}"] = tags[key]
        roles = {tags[key]: role for key, role in _ROLES.items() if tags[key] != _TAGS[key]}
        roles = {tag: role for tag, role in roles.items() if tag not in ("user", "assistant", "tool", "system")}
        if roles:
            read.plugins["plugins.sharegpt.roles"] = roles


# --- Axolotl's `datasets`, and TRL's -----------------------------------------------------------------

_KNOWN_KEYS: Final = frozenset(
    {
        "path", "data_files", "data_dir", "name", "subset", "split", "type", "field_messages", "field", "ds_type",
        "message_property_mappings", "field_chosen", "field_rejected", "field_system", "field_instruction",
        "field_input", "field_output", "columns", "train_on_split", "conversation", "roles_to_train", "train_on_eos",
        "chat_template", "message_field_role", "message_field_content", "field_tools",
    }
)  # fmt: skip
_CUSTOM: Final = {
    "field_system": "system", "field_instruction": "instruction", "field_input": "input", "field_output": "output",
}  # fmt: skip
_USUAL_MESSAGES: Final = ("messages", "conversations")


def source_list(target: str) -> Rule:
    """A list of mappings."""
    why = "a path or a mapping for each; the format of a row is recognised by its fields"

    def make(value: Any, given: Given) -> Answer:
        entries = value if isinstance(value, list) else [value]
        return _answer(target, [_of_list(entry, given) for entry in entries], "")

    return made(make, target, why=why)


def _of_list(entry: Any, given: Given) -> _Read:
    if not isinstance(entry, dict):
        return _Read({"path": entry})
    read = _Read()
    files = entry.get("data_files")
    read.source["path"] = (files[0] if isinstance(files, list) and files else files) or entry.get("path")
    if isinstance(files, list) and len(files) > 1:
        read.lost.append("data_files: the first is taken; write a source for each other file")
    for here, names in (("subset", ("name", "subset")), ("split", ("split",))):
        value = next((entry[name] for name in names if entry.get(name) is not None), None)
        if value is not None and value != "train":
            read.source[here] = value
    kind = entry.get("type")
    if isinstance(kind, dict):
        _custom_type(read, kind)
    elif isinstance(kind, str):
        _type(read, kind, given)
    _fields(read, entry, given)
    for name, option in (("roles_to_train", "data.train_roles"), ("train_on_eos", "data.train_turn_end")):
        if entry.get(name) is not None:
            read.plugins[option] = entry[name] if name == "roles_to_train" else entry[name] != "none"
    for name in sorted(set(entry) - _KNOWN_KEYS):
        if name != "roles" and entry[name] is not None:
            read.lost.append(f"{name}: nothing here says it of a source; prepare the file so that it needs none")
    if isinstance(entry.get("roles"), dict):
        usual = {"user": {"user", "human"}, "assistant": {"assistant", "gpt"}, "system": {"system"}, "tool": {"tool"}}
        roles = {
            word: role
            for role, words in entry["roles"].items()
            for word in (words if isinstance(words, list) else [words])
            if word not in usual.get(role, ())
        }
        if roles:
            read.plugins["plugins.sharegpt.roles"] = roles
    return read


def _custom_type(read: _Read, kind: Mapping[str, Any]) -> None:
    """Axolotl's own prompt: fields of a row and a text around them."""
    columns = {here: kind[there] for there, here in _CUSTOM.items() if kind.get(there)}
    if any(here != column for here, column in columns.items()):
        read.source["columns"] = columns
    if kind.get("format") or kind.get("no_input_format"):
        read.lost.append("type.format: the text around a turn is a template here; docs/hooks/template.md shows one")


def _type(read: _Read, kind: str, given: Given) -> None:
    """The name of one of Axolotl's prompt strategies, which says the format and often the template too."""
    base, _, _ = kind.partition(".")
    base, _, style = base.partition(":")
    has_template = any(given.get(name) for name in ("chat_template", "template"))
    if base == "alpaca" and stage(given) not in _COMPARED:
        read.source["format"] = "alpaca"
        if style in ("", "alpaca"):
            read.plugins["plugins.alpaca-template"] = {}
        elif not has_template:
            read.lost.append(f"type: {kind}: name the template that the rows are to be written in, such as chatml")
    elif base == "sharegpt":
        read.source["format"] = "sharegpt"
    elif base in ("completion", "pretrain"):
        read.source["format"] = "text"
    elif base in ("chatml", "llama3", "zephyr") and stage(given) in _COMPARED:
        if not has_template:
            read.plugins[f"plugins.{base}"] = {}
    elif base == "chat_template":
        if not has_template:
            read.plugins["plugins.tokenizer"] = {}
    else:
        read.lost.append(f"type: {kind}: formats here are recognised by the fields of a row (docs/data.md)")


def _fields(read: _Read, entry: Mapping[str, Any], given: Given) -> None:
    columns: dict[str, Any] = {}
    mapping = entry.get("message_property_mappings")
    mapping = mapping if isinstance(mapping, dict) else {}
    role = mapping.get("role", entry.get("message_field_role", "role"))
    content = mapping.get("content", entry.get("message_field_content", "content"))
    messages = entry.get("field_messages")
    is_openai = (role, content) == ("role", "content")
    here = "messages" if is_openai else "conversations"
    if messages not in (None, *_USUAL_MESSAGES):
        columns[here] = messages
    if not is_openai and (role, content) != ("from", "value"):
        read.plugins |= {"plugins.sharegpt.role_key": role, "plugins.sharegpt.content_key": content}
    if entry.get("field") not in (None, "text"):
        columns["text"] = entry["field"]
    for there, here in (("field_chosen", "chosen"), ("field_rejected", "rejected"), ("field_tools", "tools")):
        if entry.get(there) not in (None, here):
            columns[here] = entry[there]
    if columns and stage(given) in _COMPARED:
        columns = {"chosen": "chosen", "rejected": "rejected", **columns}
    if isinstance(entry.get("columns"), list):
        columns = {str(name): str(name) for name in entry["columns"]}
    if columns:
        read.source["columns"] = columns
    if entry.get("data_dir"):
        read.lost.append("data_dir: give the directory of the files as the source")


# --- ms-swift ----------------------------------------------------------------------------------------

_SWIFT_ID: Final = re.compile(r"(?P<path>[^#]+?)(?:(?<=[^/\\]):(?P<subset>[\w\-/]+))?(?:#(?P<limit>\d+))?")


def swift_dataset(target: str) -> Rule:
    """`ID_OR_PATH:SUBSET#LIMIT`, several of them."""

    def make(value: Any, given: Given) -> Answer:
        entries = []
        for text in value if isinstance(value, list) else [value]:
            found = _SWIFT_ID.fullmatch(str(text).removeprefix("HF::").removeprefix("MS::"))
            if found is None:
                raise ValueError(text)
            read = _Read({"path": found["path"]})
            read.source |= {"subset": found["subset"]} if found["subset"] not in (None, "default") else {}
            read.source |= {"limit": int(found["limit"])} if found["limit"] else {}
            if found["path"] == "swift/self-cognition":
                read.lost.append(f"{text}: ms-swift puts model_name and model_author into these rows; write your own")
            entries.append(read)
        return _answer(target, entries, "ids are looked up on the Hugging Face hub")

    return made(make, target)


def swift_columns() -> Rule:
    """`columns: {theirs: ms-swift's}`."""

    def make(value: Any, _: Given) -> Answer:
        mapping = json.loads(value) if isinstance(value, str) else value
        names = {"query": "prompt", "response": "completion", "rejected_response": "rejected"}
        return Answer("write", {f"{EACH_SOURCE}columns": {names.get(v, v): k for k, v in mapping.items()}})

    return made(make, f"{EACH_SOURCE}columns")
