"""The tests of this folder need the tools whose models are converted: `make test-convert` installs them."""

import importlib.util
import os

NEEDED = ("onnx", "onnxruntime", "torch", "keras", "h5py", "skl2onnx", "ai_edge_litert")

# Keras computes with PyTorch here, which is installed anyway. Read when keras is first imported.
os.environ.setdefault("KERAS_BACKEND", "torch")

collect_ignore_glob = []
if any(importlib.util.find_spec(name) is None for name in NEEDED):
    collect_ignore_glob.append("test_*.py")
