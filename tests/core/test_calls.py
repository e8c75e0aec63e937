"""Follow one row of a file from the record to its loss, and count the functions of ours that hand it on.

ARCHITECTURE.md lists them; a test compares that list with what is called. Counted is each function of sftx that the row
passes through, each method of a plugin that sftx calls with it, and the entry points of the kernels, once each. Not
counted are functions that only check it or answer a question (they return a bool or a number), properties,
constructors, and the helpers inside a plugin or a kernel.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import sftx

ROOT = Path(sftx.__file__).parents[1]
MOST_CALLS = 37  # two of them are operations that the model's own modules compute by
_CORE, _OTHERS = "sftx/", ("plugins/sftx_plugins/", "kernels/sftx_kernels/")
# Who calls a plugin, and who calls a kernel, for the call to count.
_CALLERS = {"plugins": (_CORE,), "kernels": (_CORE, "plugins/sftx_plugins/adapters")}
_NOT_COUNTED = re.compile(r"^<|^__(?!call__|getitem__|iter__)|^_attribute$|^_?check")
_ANSWERS = (bool, int, float)


def place_of(code: CodeType) -> str | None:
    """`file.py:Class.function` of a function of ours; None for any other."""
    path = Path(code.co_filename)
    if not path.is_relative_to(ROOT) or _NOT_COUNTED.match(code.co_name) or "<locals>" in code.co_qualname:
        return None
    name = path.relative_to(ROOT).as_posix()
    return f"{name}:{code.co_qualname}" if name.startswith((_CORE, *_OTHERS)) else None


def caller_of(frame: FrameType) -> str:
    """The nearest function of ours that led to this call."""
    above = frame.f_back
    while above is not None:
        if (place := place_of(above.f_code)) is not None:
            return place
        above = above.f_back
    return ""


@contextmanager
def followed(calls: dict[str, None]) -> Iterator[None]:
    """Adds the functions that are entered, in their order; takes out those that only answer."""
    answers: set[str] = set()

    def profile(frame: FrameType, event: str, value: Any) -> None:
        if event not in ("call", "return") or (place := place_of(frame.f_code)) is None:
            return
        if event == "return":
            if isinstance(value, _ANSWERS):
                answers.add(place)
            return
        if place.startswith(_OTHERS) and not caller_of(frame).startswith(_CALLERS[place.split("/")[0]]):
            return
        owner = type(frame.f_locals["self"]) if "self" in frame.f_locals else None
        if not isinstance(getattr(owner, frame.f_code.co_name, None), property):
            calls.setdefault(place)

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
        for place in answers:
            calls.pop(place, None)


def calls_of_a_row() -> list[str]:
    """What a row of messages goes through with ChatML, the padded collator, LoRA and masked cross-entropy."""
    import torch

    from sftx.assembly.registry import activate
    from sftx.config.loading import load
    from sftx.config.options import Source
    from sftx.data.dataset import Writer
    from sftx.data.pipeline import build_pipeline
    from sftx.data.sampler import EpochSampler
    from sftx.model.language_model import CausalLM
    from sftx.model.load import load_model, load_spec
    from sftx.trainer.precision import choose
    from sftx.trainer.trainer import Trainer
    from sftx.types import Location

    given = {"model": "sftx:tiny", "data.train": ["rows.jsonl"], "train.use_cpu": True, "train.max_steps": 1}
    assignments = [(name, value, name) for name, value in given.items()]
    loaded = load(None, add=["chatml", "lora"], assignments=assignments)
    config, assembly = loaded.config, activate(loaded)
    pipeline = build_pipeline(config, assembly, loaded.origins)
    spec = load_spec(pipeline.model)
    adapters = assembly.adapters(spec)
    model = load_model(spec, list(adapters.values()), dtype=torch.float32, device=torch.device("cpu"))
    lm = CausalLM(model, pipeline.tokenizer)
    lm.attach(adapters)
    optimizer, schedule = assembly.optimizer(), assembly.schedule(0, 1)
    trainer = Trainer(
        lm, assembly.loss(), pipeline.collator, optimizer, schedule, config.train, choose(config.train), 1
    )
    record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}

    calls: dict[str, None] = {}
    with followed(calls):
        (row,) = pipeline.encode.rows([(Location("rows.jsonl", 1), record)], Source("rows.jsonl"))
        writer = Writer()
        writer.add(row, 0)
    sampler = EpochSampler(writer.finish(), pipeline.collator, config.train)
    sampler._planned = None  # planned once already, to count the steps
    with followed(calls):
        planned = next(iter(sampler))
        (micro_batch,) = trainer.micro_batches(planned)
        out = trainer.strategy.module(micro_batch.batch.to(lm.device))
    assert float(out.sum.detach()) > 0
    return list(calls)


PAGE = ROOT / "ARCHITECTURE.md"
_BEGIN, _END = "<!-- calls -->\n", "<!-- end of calls -->"


def listed(calls: list[str]) -> str:
    """The calls as the page lists them."""
    lines = [f"{number}. `{call.partition(':')[2]}` {call.partition(':')[0]}" for number, call in enumerate(calls, 1)]
    return "\n" + "\n".join(lines) + "\n\n"


def test_a_row_reaches_its_loss_in_few_calls_which_the_architecture_lists() -> None:
    calls = calls_of_a_row()
    assert len(calls) <= MOST_CALLS, calls
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(_BEGIN)[2].partition(_END)[0] == listed(calls), "run `python tests/core/test_calls.py`"


if __name__ == "__main__":
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    PAGE.write_text(before + begin + listed(calls_of_a_row()) + _END + rest.partition(_END)[2], encoding="utf-8")
