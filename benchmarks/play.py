"""How long the page of `lora-lite play` takes to write, alone, while a map is drawn, and fifty times together.

    make play ARGS=--no-open &
    python benchmarks/play.py

It asks a server that runs already, as the page does: eight tokens of two columns, drawn at temperature 1.
"""

import asyncio
import json
import statistics
import sys
import time
from importlib import resources

import httpx

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8421"
TOKENS, ALONE, TOGETHER = 8, 5, 50


async def write(client: httpx.AsyncClient, seed: int) -> tuple[float, float]:
    """(seconds to the first token of both columns, seconds in all). Raises for a refusal."""
    body = {"prompt": "Tell me about the sea.", "seed": seed, "temperature": 1.0, "tokens": TOKENS}
    started, first = time.perf_counter(), 0.0
    async with client.stream("POST", f"{ADDRESS}/api/write", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not first and json.loads(line)["kind"] == "tokens":
                first = time.perf_counter() - started
    return first, time.perf_counter() - started


async def draw_map(client: httpx.AsyncClient, drawing: asyncio.Event) -> None:
    """Draw a map of sentences, until it is cancelled; `drawing` is set at its first cell."""
    presets = json.loads(resources.files("lora_lite.play").joinpath("presets.json").read_text(encoding="utf-8"))
    sides = {side: [f"{line} {time.time()}" for line in presets[-1][side]] for side in ("positive", "negative")}
    body = {**sides, "method": "steer", "direction": "difference", "layer": 0, "cs": [-1.0, -0.5, 0.5, 1.0]}
    async with client.stream("POST", f"{ADDRESS}/api/map", json=body) as answer:
        async for line in answer.aiter_lines():
            if json.loads(line)["kind"] == "cell":
                drawing.set()


async def main() -> None:
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=TOGETHER + 1)) as client:
        alone = [await write(client, seed) for seed in range(ALONE)]
        print(f"alone: first token {statistics.median(first for first, _ in alone):.2f} s (median of {ALONE})")
        drawing = asyncio.Event()
        task = asyncio.create_task(draw_map(client, drawing))
        await drawing.wait()
        during = [(await write(client, seed))[0] for seed in range(ALONE)]
        task.cancel()
        print(f"while a map is drawn: first token {min(during):.2f} to {max(during):.2f} s")
        started = time.perf_counter()
        together = await asyncio.gather(*(write(client, seed) for seed in range(TOGETHER)))
        latest = max(first for first, _ in together)
        print(f"{TOGETHER} together: first tokens within {latest:.1f} s, all in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    asyncio.run(main())
