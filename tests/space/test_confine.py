"""What strangers type stays inside the folders and inside the limits."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from mergekit_unconstrained.errors import ModelError, OutputError, RecipeError
from mergekit_unconstrained.space import confine

HOSTILE = (
    "../secret",
    "a/../../secret",
    "/etc",
    "~/models",
    "..",
    "a\\..\\b",
    "C:\\models",
    "a\0b",
    "file:///etc/passwd",
    "<script>alert(1)</script>",
    "a b; rm -rf /",
    "$(id)",
    "`id`",
    "-rf",
    "org/name+/etc/adapter",
    "org/name@../x",
    "a\nb",
    "",
    "x" * 201,
)


def model(folder: Path, name: str, *files: str) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    for file in ("config.json", *(files or ("model.safetensors",))):
        (path / file).write_text("{}")
    return path


@pytest.mark.parametrize("name", HOSTILE, ids=lambda n: repr(n)[:24])
def test_a_name_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(ModelError):
        confine.checked_name(name)
    with pytest.raises(ModelError):
        confine.local_model(tmp_path, name)


@pytest.mark.parametrize("name", ["base", "org/name", "org/name@v1.0", "a/b-c_d.1", " base "])
def test_a_name_is_taken(name):
    assert confine.checked_name(name) == name.strip()


def test_the_message_shows_a_hostile_name_as_text_and_not_at_length():
    with pytest.raises(ModelError) as caught:
        confine.checked_name("<script>" + "a" * 150)
    assert len(str(caught.value)) < 250


def test_only_folders_below_the_root_are_listed_and_found(tmp_path):
    root = tmp_path / "models"
    model(root, "one")
    model(root, "family/two")
    model(tmp_path, "secret")
    model(root, "family/deep/three")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "family" / "link").symlink_to(tmp_path / "secret")
    model(root, "<b>")
    assert confine.local_models(root) == ["family/two", "one"]
    assert confine.local_model(root, "one") == root.resolve() / "one"
    assert confine.local_model(root, "nowhere") is None
    for name in ("link", "family/link"):
        with pytest.raises(ModelError, match=r"link|outside"):
            confine.local_model(root, name)


def test_a_link_to_a_folder_inside_is_not_followed_either(tmp_path):
    model(tmp_path, "one")
    (tmp_path / "again").symlink_to(tmp_path / "one")
    with pytest.raises(ModelError, match="link"):
        confine.local_model(tmp_path, "again")


def test_links_inside_a_model_and_pickles_are_refused(tmp_path):
    path = model(tmp_path, "one")
    (path / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(ModelError, match=r"tokenizer\.json.*link"):
        confine.local_model(tmp_path, "one")
    model(tmp_path, "old", "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"\*\.bin.*can run code"):
        confine.local_model(tmp_path, "old")


@pytest.mark.parametrize("shard", ["../one.safetensors", "/etc/x.safetensors", "a/b.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(tmp_path, shard):
    path = model(tmp_path, "one", "model.safetensors.index.json")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(ModelError, match="no plain file"):
        confine.local_model(tmp_path, "one")


@pytest.mark.parametrize("name", ["owner/name", "name", "a.b/c_d-e"])
def test_a_repository_is_taken(name):
    assert confine.checked_repository(name) == name


@pytest.mark.parametrize("name", ["", "a/b/c", "../a", "a--b", "a/b.git", "a b", "<b>", "x" * 300])
def test_a_repository_that_is_none_is_refused(name):
    with pytest.raises(OutputError):
        confine.checked_repository(name)


def test_a_recipe_has_limits():
    confine.check_recipe_text("a: [1, 2]\n" * 100)
    with pytest.raises(RecipeError, match="65,536 are the limit"):
        confine.check_recipe_text("# é\n" * 20_000)


def test_a_few_lines_that_stand_for_gigabytes_are_refused_at_once():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    started = time.perf_counter()
    with pytest.raises(RecipeError, match="recipe:1: aliases"):
        confine.check_recipe_text("\n".join(lines))
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("text", ["[" * 30_000, "{a: " * 10_000, "- " * 20_000])
def test_a_recipe_that_nests_without_end_is_refused(text):
    with pytest.raises(RecipeError, match="nested"):
        confine.check_recipe_text(text)
