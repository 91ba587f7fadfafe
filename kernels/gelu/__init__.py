"""The gradient of GELU behind a linear layer, and of the layer's bias, in one pass.

`reference.py` is the definition, `triton.py` the kernel, `launch.py` its launch. There is no operator of torch here:
the MLP that uses it (`layers/gelu_mlp.py`) is one node of autograd as a whole.
"""
