"""
Models of other tools in, Mlp out: one module a kind of source, and what they have in common.

    source                          -> expressions    what is computed for a row, as a small graph
    expressions -> layers           `lowering`        affine parts are folded, the rest becomes layers

    `onnx_graph`, `torch_graph`, `keras_model`, `tflite_model`, `sklearn_estimator`, `plain_weights`
                                    readers; nothing that they read is ever executed
    `flow`                          tensors with shapes on the way through a graph
    `verification`                  a converted model beside its source, on random and edge inputs
"""
