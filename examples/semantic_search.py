"""Compresses a sentence encoder to 5.5 MB, loads it back and searches with both: do they find the same?

python examples/semantic_search.py
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

import minilm  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

import factorpack  # noqa: E402

SIZE = 5_500_000
SHOWN = 5
# Below these the demonstration fails; the first honest run, less a margin for other processors.
TOP1_AGREEING, TOP10_AGREEING, MEAN_COSINE = 29, 0.76, 0.94


def hits(encoder: torch.nn.Module, sentences: list[str], queries: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of the sentences (S, 384) and, for each query, the ten nearest of them (Q, 10)."""
    vectors = minilm.embed(encoder, sentences)
    return vectors, (minilm.embed(encoder, queries) @ vectors.T).topk(10).indices


def main() -> int:
    console = Console(width=120)
    model = minilm.model()
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    start = time.perf_counter()
    with Console(stderr=True).status(f"compressing all-MiniLM-L6-v2, {dense / 1e6:.1f} MB, to {SIZE / 1e6:.1f} MB ..."):
        packed = factorpack.compress(model, size=SIZE, calibration=minilm.calibration(), output=minilm.output)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "minilm.fpk"
        packed.save(path)
        size = path.stat().st_size
        small = factorpack.load(path, minilm.model())
    sentences, queries = minilm.lines("sentences.txt"), minilm.lines("queries.txt")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        searching = bar.add_task(f"searching {len(sentences)} sentences", total=2)
        vectors, found = hits(model, sentences, queries)
        bar.advance(searching)
        small_vectors, small_found = hits(small, sentences, queries)
    table = Table(
        "query",
        f"found by the original, {dense / 1e6:.1f} MB",
        f"found by the file, {size / 1e6:.2f} MB",
        show_lines=True,
    )
    for query, a, b in list(zip(queries, found[:, 0], small_found[:, 0], strict=True))[:SHOWN]:
        table.add_row(query, sentences[a], "the same" if a == b else sentences[b])
    console.print(table)
    top1 = int((found[:, 0] == small_found[:, 0]).sum())
    near = int((found[:, :3] == small_found[:, :1]).any(1).sum()) - top1
    pairs = zip(found, small_found, strict=True)
    top10 = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in pairs) / found.numel()
    cosine = float((vectors * small_vectors).sum(1).mean())
    console.print(f"file            {size:,} bytes, {dense / size:.1f} times smaller, made in {seconds:.0f} s")
    console.print(
        f"top-1 hits      {top1} of {len(queries)} agree; {near} of the others are the original's second or third"
    )
    console.print(f"top-10 hits     {100 * top10:.1f} % agree")
    console.print(f"mean cosine     {cosine:.4f} between the vectors of both")
    good = size <= SIZE and top1 >= TOP1_AGREEING and top10 >= TOP10_AGREEING and cosine >= MEAN_COSINE
    if not good:
        console.print(
            f"FAILED: at least {TOP1_AGREEING} top-1 hits, {100 * TOP10_AGREEING:.0f} % of the top-10 hits "
            f"and a mean cosine of {MEAN_COSINE} were expected"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
