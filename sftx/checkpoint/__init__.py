"""The files of a run: written atomically, and read back to resume the run or to use its result.

A run directory holds

- `run.yaml`, the resolved options; `manifest.json`, versions and content hashes; `summary.json`, written last;
- `adapter/` or `model/`, the artefact: files that PEFT or transformers loads, and the tokenizer;
- `checkpoints/step-N/`, the same files as of optimizer step N with the state of the run beside them.

`layout` has the names of all files. `run_directory` chooses the directory of a run, locks it and decides whether an
interrupted run may go on in it. `checkpoint` writes and reads artefacts and checkpoints, whose parts are
`sharded_files`, `optimizer_state` and `run_state`. `load_run` makes any of them a model that answers prompts.

The package may import errors, events, atomic_files, config, distributed, assembly, model and data; never the trainer
or inspection. `layout`, `run_directory` and `run_state` import no torch.
"""
