"""A compressed network as a file of another format: `onnx` puts it together, from what `tracing` and `nodes` give."""
