"""The harness: one YAML file trains many mixers on equal terms, and every number in its table can be checked.

config.py       what an ablation file may say
task_configs/   what a task's YAML may say
tasks/          pure functions from a task's config and a split's name to tensors
backbones.py    a model of a given mixer, and the search that makes parameter counts equal
sequence_model.py  from sequences, pairs of them or signals to one answer each
preview.py      a look at a task's examples
data_order.py   which examples step t sees: a function of (seed, t), so it is equal for every mixer and needs no state
training.py     one run: AdamW, warmup and cosine, validation, checkpoints that resume bit for bit
results.py      the results folder: manifest, lock, JSON lines, checkpoints; every write is atomic
grid.py         tasks x mixers x learning rates x seeds: the cells, what is settled, which learning rate wins
cell.py         one cell, from config to record
workers.py      cells in this process or side by side, and how a signal stops them
ray_cluster.py  cells over a Ray cluster
trackers.py     TensorBoard, and wandb or trackio when asked
ablation.py     all of it: cells, selection on validation, one reading of the test split
table.py        records to table rows; the check of a published table
terms.py        whether all runs had equal terms, re-derived from the records
figures.py      the report's pictures
report.py       Markdown, PNG and HTML out of the JSON lines
"""
