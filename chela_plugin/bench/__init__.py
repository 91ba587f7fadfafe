"""`chela bench`: operators, layers, vision backbones and language models, ours and the peers' interleaved."""
