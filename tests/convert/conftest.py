"""The tests of this folder need the tools whose models are converted: `make test-convert` installs them."""

import importlib.util

NEEDED = ("onnx", "onnxruntime", "torch", "keras", "skl2onnx", "ai_edge_litert")

collect_ignore_glob = []
if any(importlib.util.find_spec(name) is None for name in NEEDED):
    collect_ignore_glob.append("test_*.py")
