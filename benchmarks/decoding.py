"""Times greedy decoding of language models of 340 M parameters, eager and as a CUDA graph of a step; writes JSON.

    python benchmarks/decoding.py --out benchmarks/results/decoding_h100.json

Ours and fla's GLA, bf16, random weights, the sizes of `chela bench lm`. A prompt is read once as one row and its cache
repeated for the batch; then tokens follow one by one, each the last one's argmax. Milliseconds a token are wall time
over `TOKENS` of them between two synchronisations, the median of `REPEATS`. Both graphs hold the same: one step and the
copies that bring its new states to where the next one reads them (`chela_plugin/lm/decoding.py` for ours). GLA reads a
prompt of 64 tokens, for which it needs no chunk kernel and so no search: its state has one size whatever was read.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chela_plugin.bench.lm import SIZES, gla_model, our_model
from chela_plugin.bench.record import write
from chela_plugin.bench.timing import conditions
from chela_plugin.lm import ChelaCache
from chela_plugin.lm.decoding import CapturedDecoding

TOKENS, REPEATS = 24, 3
ROOM = TOKENS * (REPEATS + 2)
BOTH = ("eager", "graph")
CASES: list[tuple[str, list[tuple[int, int, tuple[str, ...]]]]] = [  # model, then batch, prompt and how
    ("chela", [(1, 2048, BOTH), (64, 2048, BOTH), *((b, t, BOTH[1:]) for t in (32768, 8192) for b in (1, 64))]),
    ("fla GLAForCausalLM", [(1, 64, BOTH[:1]), (64, 64, BOTH[:1]), (1, 64, BOTH[1:]), (64, 64, BOTH[1:])]),
    ("attention", [(1, 2048, BOTH), (64, 2048, BOTH)]),
    ("chela(long=multiscale)", [(1, 2048, BOTH), (1, 32768, ("graph",))]),
]
Step = Callable[[Tensor], Tensor]  # tokens [B, 1] to logits


def fla_states(cache: Any) -> list[tuple[dict[str, Any], str]]:
    """Where fla's cache holds its tensors."""
    states = [layer.state for layer in cache.layers] if getattr(cache, "layers", None) else cache.states
    return [(state, name) for state in states for name, value in state.items() if isinstance(value, Tensor)]


def fla_graph(model: Any, cache: Any, tokens: Tensor) -> Step:
    """A captured step of a model of fla, states copied back to where they were."""
    held = [(state, name, state[name]) for state, name in fla_states(cache)]
    read = tokens.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(input_ids=read, past_key_values=cache, use_cache=True).logits
        for state, name, tensor in held:
            if state[name] is not tensor:
                tensor.copy_(state[name])
                state[name] = tensor

    def step(new: Tensor) -> Tensor:
        read.copy_(new)
        graph.replay()
        return logits

    return step


def timed(step: Step, tokens: Tensor) -> tuple[list[float], list[int]]:
    """Milliseconds a token of each repeat, and the first row's tokens."""
    times, row = [], []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(TOKENS):
            tokens = step(tokens)[:, -1:].argmax(-1)
            row.append(tokens[0])
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / TOKENS * 1e3)
    return times[1:], torch.stack(row).flatten().tolist()


@torch.no_grad()
def rows(name: str, cases: list[tuple[int, int, tuple[str, ...]]]) -> Any:
    device, sizes = torch.device("cuda"), SIZES["cuda"]
    torch.manual_seed(0)
    ours = not name.startswith("fla")
    model: Any = our_model(name, sizes, device) if ours else gla_model(sizes, device)
    model = model.to(device=device, dtype=torch.bfloat16).eval()
    parameters = sum(p.numel() for p in model.parameters())
    told: dict[tuple[int, int], list[int]] = {}
    for batch, prompt, hows in cases:
        ids = torch.randint(sizes.vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
        for how in hows:
            cache: Any = ChelaCache(model.config, max_cache_len=prompt + ROOM) if ours else None
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1, past_key_values=cache)
            cache = out.past_key_values
            tokens = out.logits[:, -1:].argmax(-1).repeat(batch, 1)
            cache.batch_repeat_interleave(batch)

            def eager(new: Tensor, cache: Any = cache) -> Tensor:
                return model(input_ids=new, past_key_values=cache, use_cache=True).logits

            step: Step = eager
            if how == "graph" and ours:
                step = CapturedDecoding(model, cache)
            elif how == "graph":
                eager(tokens)  # compiles what a graph can't
                step = fla_graph(model, cache, tokens)
            times, row = timed(step, tokens)
            ms = statistics.median(times)
            before = told.setdefault((batch, prompt), row)
            yield {
                "model": name, "B": batch, "prompt": prompt, "how": how, "ms_token": round(ms, 4),
                "spread": [round(min(times), 4), round(max(times), 4)], "tokens_per_s": round(batch / ms * 1e3, 1),
                "parameters": parameters, "tokens_as_eager": f"{sum(map(int.__eq__, row, before))} of {len(row)}",
            }  # fmt: skip
            del cache, out, step, eager
            gc.collect()
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--revision", help="of the code, where it stands outside its repository")
    args = parser.parse_args()
    record: dict[str, Any] = {"benchmark": "decoding", **conditions(args.revision)}
    record |= {"tokens": TOKENS, "repeats": REPEATS, "results": []}
    for name, cases in CASES:
        if args.models and name not in args.models:
            continue
        try:
            for row in rows(name, cases):
                record["results"].append(row)
                print(json.dumps(row), flush=True)
                if args.out:
                    write(args.out, record)
        except Exception as error:  # one model's failure leaves the others' rows
            print(json.dumps({"model": name, "error": f"{type(error).__name__}: {error}"[:800]}), flush=True)


if __name__ == "__main__":
    main()
