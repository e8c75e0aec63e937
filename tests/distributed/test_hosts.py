"""One run on two hosts, simulated by two agents of torchrun on two addresses of this host."""

from __future__ import annotations

import pytest

from rank_faults import kill_rank_1_in_step_5
from ranked import Starter, free_port
from same_run import DDP, FSDP2, compare, differing


def agents(*more: str) -> list[list[str]]:
    """Return the options of torchrun on each of the two hosts."""
    endpoint = f"127.0.0.2:{free_port('127.0.0.2')}"
    common = f"--nnodes 2 --nproc-per-node 1 --rdzv-id two-hosts --rdzv-backend c10d --rdzv-endpoint {endpoint}"
    return [
        [*f"{common} --local-addr {address} --rdzv-conf is_host={is_host}".split(), *more]
        for address, is_host in (("127.0.0.2", 1), ("127.0.0.3", 0))
    ]


@pytest.mark.parametrize(
    "mode",
    [pytest.param(DDP, id="ddp"), pytest.param(FSDP2 + "--plugin lora", id="fsdp2-lora", marks=pytest.mark.slow)],
)
def test_two_hosts_give_the_run_of_one_process(mode: str, starter: Starter, common: str) -> None:
    arguments = f"{common} {mode}".split()
    compare(starter.torchrun(agents(), arguments).succeed(), starter.alone(arguments))


@pytest.mark.slow
def test_a_rank_that_is_killed_on_one_host_leaves_no_trace(starter: Starter, common: str) -> None:
    """The other host's torchrun starts its process again too, and counts no failure of its own."""
    arguments = f"{common} {FSDP2} --save-steps 3".split()
    undisturbed = starter.run(arguments, 2).succeed()
    group = starter.torchrun(agents("--max-restarts=1"), arguments, prepare=kill_rank_1_in_step_5)
    out = group.succeed()
    assert (group.directory / "killed").exists()
    assert differing(out, undisturbed) == []
