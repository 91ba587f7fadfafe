"""`chela train`: one language model or image model at any scale on Lightning Fabric.

`config` what a file may say; `launch` one process or many; `loop` the training loop; `language` and `images` what
differs; `tokens` and `idx` data; `checkpoint` the run's folder; `flops` the model FLOPs behind MFU; `show` progress.
"""
