"""Batches picked where the split lies are the batches of the split."""

import pytest
import torch

from chela_plugin.harness import feed
from chela_plugin.harness.backbones import Logits, build, loss_sum
from chela_plugin.harness.config import LanguageBackbone
from chela_plugin.harness.data_order import batch_rows, bucket_rows
from chela_plugin.harness.tasks import IGNORE, Examples
from chela_plugin.harness.training import evaluate
from chela_plugin.harness.update import adamw, set_learning_rate

CPU = torch.device("cpu")
MIXTURE = "[{length: 16, pairs: 2, examples: 12}, {length: 24, pairs: 4, examples: 12}]"


def test_a_split_on_the_device_gives_the_same_batches(recall):
    plain, resident = feed.Feed(recall, CPU), feed.ResidentFeed(recall, CPU, may_select=False)
    for step in range(6):
        rows = bucket_rows(recall.buckets, 4, 0, step)
        one, other = plain.batch(rows), resident.batch(rows)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_answers_places_are_where_targets_count(recall):
    resident = feed.ResidentFeed(recall, CPU, may_select=True)
    rows = bucket_rows(recall.buckets, 4, 0, 1)
    inputs, targets = recall.batch(rows)
    batch = resident.batch(rows)
    assert batch["inputs"].shape == inputs.shape
    assert torch.equal(batch["places"], (targets.flatten() != IGNORE).nonzero().squeeze(1))
    assert torch.equal(batch["targets"], targets.flatten()[batch["places"]].long())


def test_loss_and_score_need_no_logits_where_nothing_is_asked(recall):
    torch.manual_seed(0)
    backbone = LanguageBackbone(kind="language", dim=16, depth=1, mlp_hidden=16)
    model = build(backbone, recall, "attention", 16)
    assert isinstance(model, Logits)
    rows = bucket_rows(recall.buckets, 4, 0, 0)
    losses = [
        loss_sum(*feed.forward(model, f.batch(rows))).item()
        for f in (feed.Feed(recall, CPU), feed.ResidentFeed(recall, CPU, may_select=True))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # sums in another order
    scores = []
    for select in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            resident = feed.ResidentFeed(recall, CPU, may_select=select)
            patch.setattr("chela_plugin.harness.training.feed_for", lambda *_, f=resident, **__: f)
            scores.append(evaluate(model, recall, 5, CPU))
    assert scores[0].slices == scores[1].slices and scores[0].metric == scores[1].metric
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-5)


def test_rows_of_unequal_answers_get_logits_everywhere():
    targets = torch.full((2, 6), IGNORE)
    targets[0, 1] = targets[1, 2] = targets[1, 4] = 7
    data = Examples(torch.zeros(2, 6, dtype=torch.int16), targets, classes=2048, metric="accuracy")
    assert "places" not in feed.ResidentFeed(data, CPU, may_select=True).batch(torch.tensor([0, 1]))


def test_an_epoch_boundary_inside_a_batch_changes_the_permutation():
    rows = torch.cat([batch_rows(10, 4, 3, step) for step in range(5)])
    assert rows[:10].sort().values.tolist() == rows[10:].sort().values.tolist() == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()


def test_the_learning_rate_is_set_in_place_where_it_is_a_tensor():
    optimizer = adamw(torch.nn.Linear(2, 2), 0.1)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    rate = torch.zeros(())
    for group in optimizer.param_groups:
        group["lr"] = rate
    set_learning_rate(optimizer, 0.25)
    assert rate.item() == 0.25
