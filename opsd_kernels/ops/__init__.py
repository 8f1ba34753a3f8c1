"""The registered operators: schema, fake kernels, autograd, and the choice of a backend.

Each family has two operators. `*_tokens` returns values per token and, while the head is frozen,
the gradient of each token's value, so that backward is a scaling whatever the upstream. With a
trained head its backward calls `*_sum`, which returns the gradients of sum(row_scale * value);
a reduced loss with a trained head calls that one directly.
"""
