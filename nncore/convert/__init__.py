"""
Models of other tools in, Mlp out: one reader a kind of source, and what they have in common.

    onnx_graph, onnx_operators         ONNX files; `onnx_node`, `onnx_constants`
    torch_graph, torch_operators       PyTorch modules; `torch_pt2`, `torch_program`: .pt2 files
    keras_model, keras_files           Keras models, and their files
    tflite_model                       TFLite files
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
