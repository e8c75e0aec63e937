"""Say how much of a model the adapters of a run reach, by its configuration alone."""

from __future__ import annotations

from sftx.errors import ModelError, SftxError, one_line
from sftx.inspection.dataset_view import DatasetView


def coverage_lines(view: DatasetView) -> tuple[str, ...]:
    """Return the lines that the run would say of weights that it leaves as they are; none without an adapter.

    What stops the run is one of the lines. Where the model's configuration cannot be read there are none.
    """
    import torch

    from sftx.model.language_model import CausalLM
    from sftx.model.load import load_spec

    assembly = view.pipeline.assembly
    if not (assembly.providers("sftx_adapter") or assembly.providers("sftx_trainable")):
        return ()
    try:
        spec = load_spec(view.pipeline.model, trust_remote_code=view.config.trust_remote_code)
        with torch.device("meta"):
            lm = CausalLM(spec.skeleton, view.pipeline.tokenizer)
            lm.attach(assembly.adapters(spec), assembly.trainable(spec))
    except ModelError:
        return ()
    except SftxError as error:
        return (f"the run stops: {one_line(error)}",)
    return (*([lm.reach] if lm.reach else []), *lm.untrained_parts())
