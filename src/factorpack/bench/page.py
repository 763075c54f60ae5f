"""The results of a task as one page that needs nothing else: curves to point at, tables, commands."""

import json
from importlib.resources import files
from math import isfinite

from factorpack.bench.looks import LOOKS, curves, floor
from factorpack.bench.registry import PEERS
from factorpack.bench.results import Results

PLACE = "/*DATA*/null"


def page(results: Results) -> str:
    """HTML with its data, style and script inside; it asks no other address for anything."""
    known = curves(results)
    data = {
        "task": results.name,
        "score": results.original.score,
        "original": {"bytes": results.original.bytes, "scores": results.original.scores},
        "floor": floor(results),
        "peers": [
            {
                "title": PEERS[name].title,
                "knob": PEERS[name].knob,
                "calibrated": PEERS[name].calibrated,
                "mark": LOOKS[name].mark,
                "dashes": LOOKS[name].dashes,
                "colour": LOOKS[name].colour,
                "points": [
                    {
                        "setting": point.setting, "bytes": point.bytes, "wrapped": point.wrapped_bytes,
                        "size": point.size_bytes,
                        "scores": {score: value for score, value in point.scores.items() if isfinite(value)},
                        "encode": point.encode_seconds, "decode": point.decode_seconds,
                        "encodePeak": point.encode_peak_bytes, "decodePeak": point.decode_peak_bytes,
                        "share": point.quantised_share, "dense": point.left_dense, "command": point.command,
                        "commit": point.commit, "versions": point.versions, "machine": point.machine,
                    }
                    for point in points
                ],
            }
            for name, points in known.items()
        ],
        "failed": [
            {"peer": PEERS[point.peer].title, "setting": point.setting, "error": point.error}
            for point in results.points if point.error and point.peer in PEERS
        ],
    }  # fmt: skip
    # "</script>" in a name would end the script.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    template = files("factorpack.bench").joinpath("page.html").read_text(encoding="utf-8")
    return template.replace(PLACE, text, 1)
