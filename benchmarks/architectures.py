"""Every check of `checks.py` on hundreds of tiny models of transformers with random weights: what holds, what doesn't.

    python benchmarks/architectures.py --cases FOLDER [--only REGEX] [--variants lora dora ia3] [--json OUT]

FOLDER holds folders of a config.json and an inputs.json. Each runs in a process of its own. Its outcomes go as one line
to the file of --json as soon as they are known; what stands there already isn't run again.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker for each core: two that compete take several times as long
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from checks import CHECKS, OK, OUTCOMES, RAW, Result, results_of

import lora_lite as ll

WIDTH = 80  # columns of the report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True, help="a folder of folders with config.json, inputs.json")
    parser.add_argument("--only", default="", help="a regex that is searched in the cases' names")
    parser.add_argument("--variants", nargs="+", default=["lora"])
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=CHECKS)
    parser.add_argument("--json", type=Path, help="a line for each case and variant; a second run goes on with it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120, help="seconds for a case with a variant")
    args = parser.parse_args()
    folders = sorted(file.parent for file in args.cases.rglob("inputs.json"))
    folders = [folder for folder in folders if re.search(args.only, folder.name)]
    lines = (
        [json.loads(line) for line in args.json.read_text().splitlines()] if args.json and args.json.exists() else []
    )
    known = {(line["case"], line["variant"]) for line in lines}
    tasks = [
        (folder, variant) for variant in args.variants for folder in folders if (folder.name, variant) not in known
    ]
    random.Random(0).shuffle(tasks)  # a run that is cut short is a sample of all
    preload()
    for line in run_all(tasks, args.checks, args.workers, args.limit):
        lines.append(line)
        print(f"\r{len(lines)} of {len(known) + len(tasks)}", end="", file=sys.stderr, flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(line) + "\n")
    print(file=sys.stderr)
    for variant in args.variants:
        print("\n".join(report(variant, [line for line in lines if line["variant"] == variant])))


def preload() -> None:
    """Imports what a case needs and no other import brings, so that no process has to."""
    _ = ll.load, ll.save_peft, ll.merge_checkpoint
    config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):  # deepspeed logs to stdout
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        transformers.LlamaForCausalLM.from_pretrained(folder)


def work(pipe: Connection, case: Path, variant: str, checks: Iterable[str]) -> None:
    """A process of its own, forked, so that it need not import torch again; its imports of models go with it."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # progress bars, and warnings of PEFT
        os.dup2(nowhere, stream)
    for result in results_of(case, variant, checks):
        pipe.send(result)


def run_all(
    tasks: list[tuple[Path, str]], checks: Iterable[str], workers: int, limit: float
) -> Iterator[dict[str, Any]]:
    """A line for each task as it ends. What crashes or takes too long fails at the check that it was in."""
    context, waiting = multiprocessing.get_context("fork"), list(reversed(tasks))
    running: dict[Any, tuple[Any, float, Path, str]] = {}  # by the process: its pipe, start and task
    while waiting or running:
        while waiting and len(running) < workers:
            case, variant = waiting.pop()
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(writer, case, variant, checks))
            process.start()
            writer.close()  # the child's is the only one left, so that its end is seen
            running[process] = (reader, time.monotonic(), case, variant)
        wait([process.sentinel for process in running], timeout=1)
        for process, (reader, started, case, variant) in list(running.items()):
            seconds = time.monotonic() - started
            if process.is_alive() and seconds < limit:
                continue
            process.kill()
            process.join()
            del running[process]
            results = received(reader)
            if process.exitcode:
                why = "took too long" if seconds >= limit else f"the process ended with {process.exitcode}"
                results.append(Result(CHECKS[min(len(results), len(CHECKS) - 1)], RAW, why))
            yield {"case": case.name, "variant": variant, "seconds": round(seconds, 1), "results": results}


def received(reader: Connection) -> list[Result]:
    results = []
    try:
        while True:
            results.append(reader.recv())
    except (EOFError, OSError):  # the other end is closed
        return results


def report(variant: str, lines: list[dict[str, Any]]) -> Iterator[str]:
    counts: Counter[tuple[str, str]] = Counter()
    causes: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        for check, outcome, message in line["results"]:
            counts[check, outcome] += 1
            if outcome != OK:
                causes[outcome, starred(message)][check].append(line["case"])
    yield f"\n{variant}: {len(lines)} models, {sum(line['seconds'] for line in lines):.0f} seconds of processes"
    yield "check".ljust(10) + "".join(outcome.rjust(14 if " " in outcome else 9) for outcome in OUTCOMES)
    for check in CHECKS:
        numbers = [(counts[check, outcome], 14 if " " in outcome else 9) for outcome in OUTCOMES]
        yield check.ljust(10) + "".join((str(n) if n else "-").rjust(width) for n, width in numbers)
    order = sorted(causes.items(), key=lambda item: (OUTCOMES.index(item[0][0]), -sum(map(len, item[1].values()))))
    for (outcome, message), by_check in order:
        yield ""
        yield from textwrap.wrap(f"{outcome}: {message}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        for check, cases in by_check.items():
            names = f"{check} ({len(cases)}): {', '.join(cases)}"
            yield from textwrap.wrap(names, WIDTH, initial_indent="  ", subsequent_indent="    ")


def starred(message: str) -> str:
    """The message without what differs from model to model: paths, classes of models, lists of them, and numbers."""
    message = re.sub(r"[\w*]+(\.[\w*]+)+", "*", message)
    message = re.sub(r"\b[A-Z][A-Za-z]*\d*[A-Z]\w*(?<!Error)\b", "*", message)
    message = re.sub(r"/\S+|'[^']*'|\"[^\"]*\"|\b\d[\d.e+-]*|\(\d+\)", "*", message)
    return re.sub(r"\*(?:[,x ]*\*)+", "*", message)


if __name__ == "__main__":
    main()
