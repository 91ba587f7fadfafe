"""The harness: one YAML file trains many mixers on equal terms, and every number in its table can be checked.

config.py       what an ablation file may say
tasks/          pure functions from a task's config and a split's name to tensors
backbones.py    a model of a given mixer, and the search that makes parameter counts equal
data_order.py   which examples step t sees: a function of (seed, t), so it is equal for every mixer and needs no state
training.py     one run: AdamW, warmup and cosine, validation, checkpoints that resume bit for bit
results.py      the results folder: manifest, lock, JSON lines, checkpoints; every write is atomic
grid.py         tasks x mixers x learning rates x seeds: the cells, what is settled, which learning rate wins
cell.py         one cell, from config to record
workers.py      cells in this process or side by side, and how a signal stops them
ablation.py     all of it: cells, selection on validation, one reading of the test split
table.py        records to table rows; the check of a published table
report.py       Markdown, PNG and HTML out of the JSON lines
"""
