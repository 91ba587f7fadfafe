"""What stands between the projections of a gated linear attention and the attention, in one pass each way.

`reference.py` is the definition, `triton.py` the kernels, `launch.py` their launches. There is no operator of torch
here: the layer that uses them (`layers/fused.py`) is one node of autograd as a whole.
"""
