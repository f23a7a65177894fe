"""Two gloo processes with torchrun's variables, each of which has to end within a time."""

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist


@dataclass
class Ended:
    """The two processes, once both have ended by themselves."""

    codes: list[int]
    logs: list[str]
    apart: float  # seconds between the end of the first and that of the last


def two_processes(script: str, *arguments: str | Path, folder: Path, timeout: float = 300, **env: str) -> Ended:
    """Run a script of this folder; TimeoutError for a process that doesn't end. Nobody ends the other one
    when the first has failed, as a launcher would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **env}
    logs = [folder / f"log{rank}" for rank in range(2)]
    with ExitStack() as stack:
        processes = []
        for rank, log in enumerate(logs):
            output = stack.enter_context(log.open("w"))
            env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = stack.enter_context(subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT))
            stack.callback(process.kill)
            processes.append(process)
        ends: dict[int, float] = {}
        deadline = time.monotonic() + timeout
        while len(ends) < 2:
            for rank, process in enumerate(processes):
                if process.poll() is not None:
                    ends.setdefault(rank, time.monotonic())
            if time.monotonic() > deadline:
                tails = "\n".join(log.read_text()[-3000:] for log in logs)
                raise TimeoutError(f"{2 - len(ends)} of 2 processes run after {timeout} s\n{tails}")
            time.sleep(0.05)
    codes = [process.returncode for process in processes]
    return Ended(codes, [log.read_text() for log in logs], abs(ends[0] - ends[1]))


def two_on_cpu() -> None:
    """Within a process, before its first Accelerator: Accelerate starts DeepSpeed on accelerators alone, and would
    count one process."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)  # type: ignore[method-assign]


def leave() -> NoReturn:
    """End this process, one of a group, with code 0 and without the interpreter's own end.

    Gloo's threads end with the group, and that outlives its destruction: functions of torch.distributed.nn.functional
    and deepspeed.comm.torch, imported once it is there, have it as a default argument. A thread that lets go of a
    collective call's tensor while the interpreter ends is unwound through C++, which aborts the process now and then:
    "terminate called without an active exception".
    """
    dist.barrier()  # nobody's connection ends while another process needs it
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def both_pass(*arguments: str | Path, folder: Path, **options: float) -> None:
    """Run the script in two processes that both have to end without an error."""
    script, *rest = arguments
    ended = two_processes(str(script), *rest, folder=folder, **options)  # type: ignore[arg-type]
    assert ended.codes == [0, 0], "\n".join(log[-3000:] for log in ended.logs)
