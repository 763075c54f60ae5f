"""Factorpack itself, with its own forms.

A setting is FORM/RATIO, times smaller than the original tensors. Sizes of form "auto" share an analysis, as those of
`factorpack curve` do; what is said to be spent on one of its files is what making it alone takes: all of the analysis
and the file itself. The other forms have too few sizes for an analysis of all λ to pay: each size is searched for.
"""

import json
import shutil
import time
from pathlib import Path

from torch import nn

from factorpack.bench.protocol import Encoded, Subject, peak_bytes, serve
from factorpack.cache import analyse
from factorpack.container import write
from factorpack.options import Options
from factorpack.pipeline import Source, dense_bytes, load, one_thread, silent
from factorpack.search import pack
from factorpack.store import unheard


def encode(subject: Subject, setting: str, path: Path) -> Encoded:
    form, ratio = setting.split("/")
    options = Options(form)
    source = Source(subject.model, subject.batches or None, subject.output)
    if form != "auto":
        with one_thread():
            state = source.state(options)
            write(path, pack(state, int(dense_bytes(state) / float(ratio)), options, silent).data)
        return Encoded(state.layers)
    folder = subject.work / form
    spent = folder / "spent.json"
    if folder.exists() and not spent.exists():
        # Of an analysis that was stopped nobody knows what it took.
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    analysis = analyse(source, options, folder, silent, unheard)
    if spent.exists():
        earlier = json.loads(spent.read_text())
    else:
        write(spent, json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}).encode())
        earlier = {"seconds": 0.0, "peak_bytes": 0}
    write(path, analysis.pack(int(dense_bytes(analysis.state) / float(ratio)), silent).data)
    return Encoded(analysis.state.layers, **earlier)


def decode(model: nn.Module, path: Path) -> nn.Module:
    return load(path, model)


if __name__ == "__main__":
    serve(encode, decode)
