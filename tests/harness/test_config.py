"""Ablation files: what they may say, and that a mistake is one clear error."""

import pytest

from chela_plugin.harness.config import ConfigError, digest, identity, load_ablation, shipped


def test_every_shipped_ablation_loads():
    assert {"digits", "bytes"} <= set(shipped("ablations"))
    for name in shipped("ablations"):
        loaded, config = load_ablation(name)
        assert loaded == name
        assert config.baseline in config.mixers


def test_an_unknown_key_names_the_nearest_one(tiny):
    path = tiny(training__warm_up_steps=3)
    with pytest.raises(ConfigError, match=r"training: unknown key 'warm_up_steps'; did you mean 'warmup_steps'"):
        load_ablation(path)


def test_an_unknown_key_far_from_all_lists_them(tiny):
    with pytest.raises(ConfigError, match="known keys: tasks, mixers"):
        load_ablation(tiny(zzz=1))


def test_an_unknown_name_suggests_the_nearest_shipped_one():
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        load_ablation("digit")


def test_a_wrong_type_names_its_place_and_value(tiny):
    with pytest.raises(ConfigError, match=r"training\.steps: .*integer.*'many'"):
        load_ablation(tiny(training__steps="many"))


@pytest.mark.parametrize("change", [{"learning_rates": [float("inf")]}, {"training__gradient_clip": float("inf")}])
def test_a_number_that_is_not_finite_is_refused(tiny, change):
    with pytest.raises(ConfigError, match=r"finite number \(got inf\)"):
        load_ablation(tiny(**change))


def test_cells_that_would_collide_are_refused(tiny):
    with pytest.raises(ConfigError, match="mixers holds attention more than once"):
        load_ablation(tiny(mixers=["attention", "attention"]))


def test_the_baseline_must_be_one_of_the_mixers(tiny):
    with pytest.raises(ConfigError, match="baseline 'chela' is not one of the mixers"):
        load_ablation(tiny(baseline="chela"))


def test_a_task_of_another_backbone_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"task 'bytes' needs backbone\.kind: language"):
        load_ablation(tiny(tasks=["bytes"]))


def test_a_key_written_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("seeds: [0]\nseeds: [1]\n")
    with pytest.raises(ConfigError, match=r"'seeds' stands twice"):
        load_ablation(path)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_ablation(path)


def test_dotted_overrides_reach_sections_lists_and_named_tasks(tiny):
    _, config = load_ablation(
        tiny(), ["training.steps=7", "seeds=[3, 4]", "tasks.0.max_shift=2", "learning_rates.0=1e-4"]
    )
    assert (config.training.steps, config.seeds, config.tasks[0].max_shift) == (7, [3, 4], 2)
    assert config.learning_rates == [1e-4]


def test_an_override_may_name_other_tasks_and_change_them_too(tiny):
    _, config = load_ablation(
        tiny(backbone={"kind": "language"}), ["tasks=[mad_recall, mad_memorization]", "tasks.1.length=16"]
    )
    assert [(task.task, task.length) for task in config.tasks] == [("mad_recall", 128), ("mad_memorization", 16)]


def test_an_override_of_nothing_is_refused(tiny):
    with pytest.raises(ConfigError, match="no 'trainig'"):
        load_ablation(tiny(), ["trainig.steps=7"])


def test_the_checkpoint_interval_is_no_part_of_a_runs_identity(tiny):
    one = identity(load_ablation(tiny(checkpoint_seconds=1))[1])
    other = identity(load_ablation(tiny(checkpoint_seconds=2))[1])
    changed = identity(load_ablation(tiny(training__weight_decay=0.0))[1])
    assert digest(one) == digest(other) != digest(changed)
