"""The processes of a run: their process group, how `sftx run --nproc` launches them, and the signals that stop them.

- `process_group`, `torch_process_group`: which rank this process is, and the collectives by which ranks agree.
- `supervisor`, `launch`: starting N ranks on this host, watching them, and starting them again.
- `signals`: SIGINT, SIGTERM, SIGHUP and SIGUSR1 stop a run after the current optimizer step, once it is saved.
- `dtensor`: helpers for sharded tensors; each rank has one shard.

The package may import errors and config only. `process_group`, `supervisor` and `signals` import no torch.
"""
