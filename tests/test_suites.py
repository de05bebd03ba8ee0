"""Every shipped task: its classes, prompts, metrics, counts and published figures hold together."""

import re

import pytest

from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation.prompts import compile_negatives, compile_prompts
from biomedclip.evaluation.selection import choose_tasks, find_data, folder_task, tasks_table
from biomedclip.evaluation.tasks import load_tasks
from biomedclip.layouts import LAYOUTS, _check_options

SUITES = {
    "pathology", "radiology", "ophthalmology", "dermatology", "endoscopy", "microscopy", "parasitology", "retrieval",
    "general",
}  # fmt: skip
MEDMNIST = """pathmnist chestmnist dermamnist octmnist pneumoniamnist retinamnist breastmnist bloodmnist tissuemnist
organamnist organcmnist organsmnist organmnist3d nodulemnist3d adrenalmnist3d fracturemnist3d vesselmnist3d
synapsemnist3d""".split()
UNIMED = """chexpert_5x200 rsna_pneumonia refuge fives odir200x3 deepdrid deepdrid_uwf organamnist organcmnist
organsmnist acl_mri meniscus_mri thyroid_ultrasound busi lc25000_lung_all lc25000_colon pcam crc_val_he_8 bach
osteosarcoma
skin_cancer_16 skin_tumor_4 sicapv2""".split()
BIOMEDCLIP = {"pcam", "lc25000_lung_all", "lc25000_colon", "tcga_til", "rsna_pneumonia"}


def test_there_are_enough_tasks_in_all_suites_and_the_named_ones_are_there():
    tasks = load_tasks()
    assert len(tasks) >= 100
    assert {task.suite for task in tasks.values()} == SUITES
    named = {*MEDMNIST, *UNIMED, *BIOMEDCLIP, "ubench_domain", "biomedica_closed", "rocov2", "article_retrieval"}
    assert named <= set(tasks)
    for name in BIOMEDCLIP:
        assert "biomedclip" in tasks[name].prompt_sets
        assert any(entry.model == "BiomedCLIP" for entry in tasks[name].published)


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_every_task_of_a_suite_is_consistent(suite):
    for task in choose_tasks(suite, ()):
        options = {key: value for key, value in task.layout.items() if key != "type"}
        if task.classes and task.layout["type"] in ("medmnist_npz", "hdf5"):
            options.setdefault("classes", [entry.label for entry in task.classes])
        _check_options(task.layout["type"], LAYOUTS[task.layout["type"]], options)
        if task.layout["type"] in ("csv", "dicom_folder"):
            assert task.layout.get("split") not in ("train", "val", "test"), f"{task.name}: split names a column"
        labels = [entry.label for entry in task.classes]
        assert len(set(labels)) == len(labels)
        assert len({entry.name for entry in task.classes}) == len(labels), task.name
        for prompt_set in task.prompt_sets:
            prompts = compile_prompts(task, prompt_set)
            assert set(prompts) == set(labels)
            assert all(prompts.values())
            if task.labels == "multi":
                negatives = compile_negatives(task, prompt_set)
                assert all(set(prompts[label]).isdisjoint(negatives[label]) for label in labels), task.name
        if task.expect.classes and task.expect.n:
            assert sum(task.expect.classes.values()) == task.expect.n
        if task.bootstrap.by == "group":
            assert task.group, task.name
        assert task.licence
        assert task.citation
        assert task.contamination
        for entry in task.published:
            assert entry.source
            assert entry.metric in {*task.metrics.names, "quadratic_kappa"}, (task.name, entry.metric)
            assert 0 < entry.value < 1
            assert entry.prompt_set is None or entry.prompt_set in task.prompt_sets


def test_a_label_that_is_an_absence_says_its_complement():
    task = load_tasks()["chexpert"]
    assert "no edema" not in str(compile_negatives(task)["No Finding"])
    assert not re.search(r"\bno (?:no|without)\b", str(compile_negatives(task)))
    assert compile_negatives(task)["Edema"] == ["no pulmonary edema"]


def test_data_is_looked_for_under_the_name_of_the_task(tmp_path):
    (tmp_path / "bccd").mkdir()
    found, skipped = find_data("microscopy", (), tmp_path)
    assert found == {"bccd": str(tmp_path / "bccd")}
    assert "no data in" in skipped["bloodmnist"]
    with pytest.raises(ConfigError, match="has no data of bloodmnist"):
        find_data(None, ("bloodmnist",), tmp_path)
    with pytest.raises(ConfigError, match="no folder named as a task"):
        find_data("radiology", (), tmp_path)
    with pytest.raises(ConfigError, match="is not known"):
        find_data("radiologie", (), tmp_path)
    with pytest.raises(ConfigError, match="--data-root"):
        find_data("radiology", (), None)


def test_a_folder_of_class_folders_is_a_task(tmp_path):
    for name in ("red_cell", "white_cell"):
        (tmp_path / name).mkdir()
    task = folder_task(tmp_path, ["a photo of a {}"])
    assert compile_prompts(task)["red_cell"] == ["a photo of a red cell"]
    with pytest.raises(ConfigError, match="--template"):
        folder_task(tmp_path, [])
    (tmp_path / "red_cell").rmdir()
    with pytest.raises(DataError, match="two or more class folders"):
        folder_task(tmp_path, ["a {}"])


def test_the_table_says_what_is_not_verified():
    text = tasks_table(choose_tasks("parasitology", ()))
    assert "unverified" in text
    assert text.endswith("3 tasks")


def test_pitfall_09_breastmnist_0_is_malignant():
    task = load_tasks()["breastmnist"]
    assert [entry.label for entry in task.classes] == ["malignant", "normal, benign"]
    assert "labels" in task.contamination
