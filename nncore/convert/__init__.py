"""
Models of other tools in, Mlp out: one reader a kind of source, and what they have in common.

    onnx_graph, onnx_operators         ONNX files
    torch_graph, torch_operators       PyTorch modules and .pt2 files; `torch_program` runs the latter
    keras_model, tflite_model          Keras models and files, TFLite files
    sklearn_estimator, plain_weights   fitted estimators; arrays with a description

    flow                               tensors with shapes on their way through a graph
    expressions                        what is computed for a row, simplified as it is put together
    lowering                           expressions -> layers

    command                            `nncore convert`
    sources                            a file -> its kind, the model, and what it can be checked against
    verification                       a model beside its source, on random and edge rows
    archives                           zip archives, of a bounded size

Nothing that is read is ever executed, but for pickles of scikit-learn, which only `sources` reads.
"""
