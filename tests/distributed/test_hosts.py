"""One run on two hosts, which two addresses of this one stand for: two agents of torchrun that find one another."""

from __future__ import annotations

import pytest

from ranked import Starter, free_port
from same_run import DDP, FSDP2, compare


@pytest.mark.parametrize("mode", [DDP, FSDP2 + "--plugin lora"], ids=["ddp", "fsdp2-lora"])
def test_two_hosts_give_the_run_of_one_process(mode: str, starter: Starter, common: str) -> None:
    meet = f"127.0.0.2:{free_port('127.0.0.2')}"
    common_options = f"--nnodes 2 --nproc-per-node 1 --rdzv-id two-hosts --rdzv-backend c10d --rdzv-endpoint {meet}"
    agents = [
        f"{common_options} --local-addr {address} --rdzv-conf is_host={is_host}".split()
        for address, is_host in (("127.0.0.2", 1), ("127.0.0.3", 0))
    ]
    arguments = f"{common} {mode}".split()
    alone = starter.alone(arguments)
    out = starter.torchrun(agents, arguments).succeed()
    compare(out, alone)
