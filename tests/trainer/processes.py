"""Two gloo processes with torchrun's variables, each of which has to end within a time."""

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from loguru import logger

LOGS = "LORA_LITE_TEST_LOGS"  # the folder of what the processes print


@dataclass
class Ended:
    """The two processes, once both have ended by themselves."""

    codes: list[int]
    logs: list[str]
    apart: float  # seconds between the end of the first and that of the last


def two_processes(script: str, *arguments: str | Path, folder: Path, timeout: float = 300) -> Ended:
    """Run a script of this folder, which ends with `in_two`; TimeoutError for processes that don't end. Nobody ends the
    other one when the first has failed, as a launcher would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", LOGS: str(folder)}
    logs, ended = [folder / f"log{rank}" for rank in range(2)], folder / "ended.json"
    ended.unlink(missing_ok=True)
    with (folder / "log").open("w") as output:
        first = subprocess.Popen(
            command, env=os.environ | env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            first.wait(timeout)
        except subprocess.TimeoutExpired as error:
            tails = "\n".join(log.read_text()[-3000:] for log in logs if log.exists())
            raise TimeoutError(f"processes run after {timeout} s\n{tails}") from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)
            first.wait()
    assert first.returncode == 0, (folder / "log").read_text()[-3000:]
    return Ended(**json.loads(ended.read_text()), logs=[log.read_text() for log in logs])


def in_two(job: Callable[[], None], seconds: int = 280) -> list[int]:
    """Do a job in two processes with torchrun's variables, which fork from this one: its imports, most of the time of a
    short job, are done once. Returns their exit codes."""
    folder = Path(os.environ[LOGS])
    ranks: dict[int, int] = {}
    ends: dict[int, tuple[int, float]] = {}
    for rank in range(2):
        log = (folder / f"log{rank}").open("w")
        if (process := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            faulthandler.dump_traceback_later(seconds, exit=True)  # whatever hangs says where
            logger.disable("lora_lite")
            torch.set_num_threads(1)
            try:
                job()
                leave()
            except BaseException:
                traceback.print_exc()
                sys.stdout.flush()
                os._exit(1)
        ranks[process] = rank
    while len(ends) < 2:
        process, status = os.wait()
        ends[ranks[process]] = os.waitstatus_to_exitcode(status), time.monotonic()
    codes, times = zip(*(ends[rank] for rank in range(2)), strict=True)
    (folder / "ended.json").write_text(json.dumps({"codes": codes, "apart": max(times) - min(times)}))
    return list(codes)


def two_on_cpu() -> None:
    """Within a process, before its first Accelerator: Accelerate starts DeepSpeed on accelerators alone, and would
    count one process."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)  # type: ignore[method-assign]


def leave() -> NoReturn:
    """End this process, one of a group, with code 0, with the group as it is and without the interpreter's own end.

    Gloo's threads need the interpreter's lock to let go of a collective call's tensor. Whoever drops the last reference
    to the group (`destroy_process_group`, or a DDP model as it goes) holds that lock and waits for those threads: now
    and then for ever. Where the group lives on, as a default argument of torch's own functions, a thread is unwound
    through C++ as the interpreter ends, which aborts the process: "terminate called without an active exception".
    """
    dist.barrier()  # nobody's connection ends while another process needs it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def both_pass(*arguments: str | Path, folder: Path, **options: float) -> None:
    """Run the script in two processes that both have to end without an error."""
    script, *rest = arguments
    ended = two_processes(str(script), *rest, folder=folder, **options)  # type: ignore[arg-type]
    assert ended.codes == [0, 0], "\n".join(log[-3000:] for log in ended.logs)
