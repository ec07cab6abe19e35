"""
Rows of x -> rows of y: the forward pass of a multi-layer perceptron.

Glossary, the same letters everywhere:

    x (rows, n_in)    inputs of a layer        w (n_in, n_out)   weights
    b (n_out,)        bias                     y (rows, n_out)   activation(x @ w + b)

Accumulation order, the same for every row whatever batch it came in: y starts as b; then k = 0, 1, …
adds x[k] * w[k] with one rounding (a fused multiply-add). A row's bits therefore depend on the row and
the model alone.
"""
