"""The registered operators: schema, fake kernels, autograd, and the choice of a backend.

Each family of losses has two operators. `*_tokens` returns the value of each token and, while the
head is frozen, the gradient of each value, so that backward only scales it by the upstream
gradient. If the head is trained, its backward calls `*_sum`, which returns the gradients of
sum(row_scale * value). A reduced loss with a trained head calls `*_sum` directly.
"""
