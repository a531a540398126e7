"""What a GPU takes for a call, whatever the host takes to ask for it; for gpu_check.py and tune_kernels.py."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]


def by_kernel(calls: Sequence[Call], rounds: int, device: str) -> dict[str, float]:
    """Milliseconds a call, by kernel, the longest first; on a CPU, which has none, the whole as "wall".

    Args:
        calls: the same on other tensors each, in turns: what one reads should not be in the cache from its last turn.
    """
    for call in calls:
        call()
    if device == "cpu":
        started = time.perf_counter()
        for call in islice(cycle(calls), rounds):
            call()
        return {"wall": round(1e3 * (time.perf_counter() - started) / rounds, 3)}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for call in islice(cycle(calls), rounds):
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        times[event.name] += event.self_device_time_total / 1e3 / rounds
    return {name[:90]: round(ms, 4) for name, ms in sorted(times.items(), key=lambda item: -item[1]) if ms > 0}


def replayed(call: Call, rounds: int) -> float:
    """Median milliseconds of a CUDA graph with one call in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles; a capture must not
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for before, after in events:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return round(statistics.median(before.elapsed_time(after) for before, after in events), 4)
