"""Publishing with the real Hub client: what is sent, and that every fault is reported in a sentence."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from forked_scripts import forked_before_hub
from huggingface_hub import ModelCard
from loopback_hub import TOKEN
from published import EVALUATION, REPOSITORY, publish, python
from safetensors.torch import load_file, save_file

from modeling_poodle.folders import sha256_of
from modeling_poodle.remote_code import CODE_FILES
from training import publish as publishing
from training.checkpoints import export_network
from training.hub import belongs
from training.publish import main as publish_main
from training.publish import parts_of, stage, without_local_paths
from training.recipe import Recipe

# --- what is sent ---


def test_what_is_sent_is_weights_configs_card_and_code_alone(shared_hub, published_run):
    common = {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "panel.png",
    }
    encoder, sdm = (shared_hub.repository(name).commits for name in ("org/poodle-r18", "org/poodle-r18-sdm"))
    assert len(encoder) == len(sdm) == 2  # the first commit is the Hub's own
    assert set(encoder[-1].files) == common
    assert set(sdm[-1].files) == common | {
        "config_checks.py",
        "configuration_poodle.py",
        "decoder_poodle.py",
        "encoder_poodle.py",
        "modeling_poodle.py",
    }
    for name in (
        "config_checks.py",
        "configuration_poodle.py",
        "decoder_poodle.py",
        "encoder_poodle.py",
        "modeling_poodle.py",
    ):
        assert sdm[-1].files[name].path.read_bytes() == (REPOSITORY / "modeling_poodle" / name).read_bytes()
    for name, blob in {**encoder[-1].files, **sdm[-1].files}.items():
        data = blob.path.read_bytes()
        for secret in (TOKEN, str(published_run), str(Path.home()) + "/", "/tmp/"):
            assert secret.encode() not in data, (name, secret)
    teacher = load_file(published_run / "checkpoints" / "step-2" / "model.safetensors")
    published = load_file(sdm[-1].files["model.safetensors"].path)
    assert published.keys() == {key.removeprefix("teacher.") for key in teacher if key.startswith("teacher.")} - {
        key.removeprefix("teacher.") for key in teacher if "projector" in key
    }
    assert all(torch.equal(value, teacher[f"teacher.{key}"]) for key, value in published.items())


def test_publishing_again_makes_one_commit_where_something_changed(own_hub, published_run, tmp_path):
    folder = tmp_path / "encoder"
    folder.mkdir()
    for path in (published_run / "encoder").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("optimizer.pt", "training_args.bin", ".env", "notes.txt"):
        (folder / name).write_text("not to be sent")
    for _ in range(2):
        assert publish(own_hub, folder, "--repo_id", "org/a").returncode == 0
        assert len(own_hub.repository("org/a").commits) == 2
    sent = sum(
        size for (method, path), size in own_hub.received.items() if path.startswith("/lfs/") and method == "PUT"
    )
    assert sent == (folder / "model.safetensors").stat().st_size  # sent only once
    first = own_hub.repository("org/a").commits[-1]
    weights = load_file(folder / "model.safetensors")
    changed_weights = {name: value + 1 for name, value in weights.items()}
    save_file(changed_weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert publish(own_hub, folder, "--repo_id", "org/a").returncode == 0
    commits = own_hub.repository("org/a").commits
    assert len(commits) == 3
    changed = {name for name, blob in commits[-1].files.items() if first.files.get(name) != blob}
    assert changed == {"model.safetensors"}
    script = """
import sys
from huggingface_hub import hf_hub_download
for revision in sys.argv[1:]:
    print(hf_hub_download("org/a", "model.safetensors", revision=revision))
"""
    old, new = map(load_file, python(own_hub, tmp_path, script, first.oid, "main").stdout.split())
    assert all(torch.equal(old[name], weights[name]) for name in weights)
    assert all(torch.equal(new[name], changed_weights[name]) for name in weights)


def test_files_in_folders_of_a_repository_are_not_ours_to_delete():
    assert belongs("config.json") and belongs("model.safetensors") and belongs("modeling_poodle.py")
    assert not belongs("onnx/config.json") and not belongs("old/model.safetensors") and not belongs("notes.txt")


def test_all_code_that_is_sent_is_taken_away_again_where_it_is_no_longer_sent():
    assert all(belongs(name) for names in CODE_FILES.values() for name in names)
    assert not belongs("my_poodle.py")


def test_a_dry_run_writes_the_folder_and_sends_nothing(own_hub, published_run):
    done = publish(own_hub, published_run, "--repo_id", "org/dry", "--dry_run")
    assert done.returncode == 0 and not own_hub.requests
    assert "model.safetensors" in done.stdout and "would be sent to org/dry-sdm" in done.stdout
    config = json.loads((published_run / "hub" / "model" / "config.json").read_text())
    assert config["auto_map"]["AutoBackbone"] == "modeling_poodle.PoodleBackbone"
    assert "org/dry-sdm" in (published_run / "hub" / "model" / "README.md").read_text()


def test_the_student_on_request(published_run, tmp_path):
    arguments = [str(published_run / "model"), "--repo_id", "org/student", "--which", "student", "--dry_run"]
    publish_main(arguments)
    checkpoint = load_file(published_run / "checkpoints" / "step-2" / "model.safetensors")
    sent = load_file(published_run / "hub" / "model" / "model.safetensors")
    assert all(torch.equal(value, checkpoint[f"student.{key}"]) for key, value in sent.items())
    first = "encoder.embedder.embedder.convolution.weight"
    assert not torch.equal(sent[first], checkpoint[f"teacher.{first}"])
    text = (published_run / "hub" / "model" / "README.md").read_text()
    assert "Weights of the student after 2 steps" in text and "cores" in text and "(panel.png)" in text
    # The folder that a dry run left was evaluated elsewhere; the figures are matched to it by the checksum of the weights.
    measured = shutil.copytree(published_run / "hub" / "model", tmp_path / "student")
    digest = sha256_of([measured / "model.safetensors"])
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({**EVALUATION, "model": str(measured), "weights_sha256": digest}))
    publish_main([*arguments, "--evaluation", str(file)])
    assert "mIoU 25.0 %" in (published_run / "hub" / "model" / "README.md").read_text()


def test_the_student_s_card_takes_no_path_for_a_name_on_the_hub(published_run, tmp_path):
    """A relative path such as my/drives does not exist from another working folder than the run's, and looks like org/name."""
    run = shutil.copytree(published_run, tmp_path / "run")
    fields = yaml.safe_load((run / "config.yaml").read_text())
    fields |= {"videos": ["my/drives", "org/drives@main"], "init_encoder": "converted/encoder"}
    (run / "config.yaml").write_text(yaml.safe_dump(fields))
    checkpoint = run / "checkpoints" / "step-2"
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["hub_names"] == []  # the run read a local folder
    (checkpoint / "state.json").write_text(json.dumps({**state, "hub_names": ["org/drives@main"]}))
    names = sorted(path.name for path in checkpoint.iterdir() if path.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (checkpoint / "SHA256SUMS").write_text("".join(sums))
    export_network(run, tmp_path, "student")
    text = (tmp_path / "encoder" / "README.md").read_text()
    assert ModelCard(text).data.datasets == ["org/drives"] and ModelCard(text).data.base_model is None
    assert "1 local source" in text and "a local encoder" in text
    assert "my/drives" not in text and "converted/encoder" not in text


@pytest.mark.parametrize("private", [True, None])
def test_a_new_repository_is_private_where_that_was_asked_for(published_run, monkeypatch, private):
    asked = []

    def push(folder, repo_id, message, private=None):
        asked.append((repo_id, private))
        return SimpleNamespace(commit_url="")

    monkeypatch.setattr(publishing, "push", push)
    publish_main([str(published_run), "--repo_id", "org/p", *(["--private"] if private else [])])
    assert asked == [("org/p", private), ("org/p-sdm", private)]


def test_a_folder_is_staged_without_places_of_this_machine_and_without_what_was_there(published_run, tmp_path):
    inner = {"_name_or_path": "/home/me", "auto_map": {}, "depths": [1, 2]}
    assert without_local_paths({"parts": [inner], "inner": inner}) == {
        "parts": [{"depths": [1, 2]}],
        "inner": {"depths": [1, 2]},
    }
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "adapter.safetensors").touch()
    stage(published_run / "encoder", tmp_path / "staged", "org/p", [])
    assert not (tmp_path / "staged" / "adapter.safetensors").exists()


# --- faults ---


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "README.md"])
def test_a_token_is_found_in_whatever_is_sent(published_run, tmp_path, monkeypatch, name):
    folder = Path(shutil.copytree(published_run / "encoder", tmp_path / "encoder"))
    monkeypatch.setattr(publishing, "get_token", lambda: TOKEN)
    stage(folder, tmp_path / "staged", "org/p", [])
    text = (folder / name).read_text()
    (folder / name).write_text(
        json.dumps({**json.loads(text), "note": TOKEN}) if name != "README.md" else text + TOKEN
    )
    with pytest.raises(ValueError, match=f"{name} holds your Hub token"):
        stage(folder, tmp_path / "staged", "org/p", [])


def test_no_picture_is_sent_where_none_is_wanted(own_hub, published_run, tmp_path):
    for more in ([], ["--no_panel"]):
        assert publish(own_hub, published_run, "--repo_id", "org/p", *more).returncode == 0
        commit = own_hub.repository("org/p").commits[-1]
        assert ("panel.png" in commit.files) == (not more)
    # Somebody downloads the folder with its picture and publishes it again.
    publish_main([str(published_run), "--repo_id", "org/p", "--dry_run"])
    downloaded = Path(shutil.copytree(published_run / "hub" / "encoder", tmp_path / "downloaded"))
    assert (downloaded / "panel.png").exists()
    text = (downloaded / "README.md").read_text()
    stage(downloaded, tmp_path / "staged", "org/other", [], panel=False)
    assert not (tmp_path / "staged" / "panel.png").exists()
    (picture,) = [line for line in text.splitlines() if "(panel.png)" in line]
    assert (tmp_path / "staged" / "README.md").read_text() == text.replace(f"{picture}\n\n", "")


def test_a_picture_from_elsewhere_and_a_checkpoint_are_not_sent(published_run, tmp_path):
    shutil.copytree(published_run / "encoder", tmp_path / "encoder")
    (tmp_path / "panels").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "panels" / "step-000001.png").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="step-000001.png is a link to .*secret"):
        stage(tmp_path / "encoder", tmp_path / "staged", "org/p", [])
    with pytest.raises(ValueError, match="step-2 is a checkpoint with its optimizer: publish the run"):
        parts_of(published_run / "checkpoints" / "step-2", "org/p")


@pytest.mark.parametrize(
    ("pattern", "outcome", "message"),
    [
        ("POST .*/preupload/", 401, "401, the Hub does not accept the token"),
        ("POST .*/commit/", 403, "403, the token may not write there: it needs write permission for org"),
        ("POST .*/commit/", 409, "409, another commit was made at the same time: publish again"),
        ("POST .*/commit/", 429, "429, the Hub takes no more requests for now"),
        ("POST .*/commit/", 500, "500, the Hub fails at the moment"),
        ("POST .*/commit/", "drop", "the connection failed or broke off"),
        ("PUT /lfs/", 403, "403, the token may not write there"),
    ],
)
def test_a_fault_is_a_sentence_and_leaves_the_earlier_revision(shared_hub, published_run, pattern, outcome, message):
    repository = shared_hub.repository("org/poodle-r18")
    before = list(repository.commits)
    weights = {
        name: value + outcome_number(outcome, pattern)
        for name, value in load_file(published_run / "encoder" / "model.safetensors").items()
    }
    folder = shared_hub.folder / "changed"
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "preprocessor_config.json", "README.md"):
        (folder / name).write_bytes((published_run / "encoder" / name).read_bytes())
    shared_hub.fail(pattern, outcome)
    try:
        done = publish(shared_hub, folder, "--repo_id", "org/poodle-r18")
    finally:
        shared_hub.faults.clear()
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr and TOKEN not in done.stderr + done.stdout
    assert repository.commits == before


def outcome_number(outcome, pattern: str) -> float:
    """A number that makes each case's weights different, because the Hub is not sent a file that it already has."""
    return float(sum(map(ord, f"{outcome}{pattern}")))


def test_a_passing_fault_passes_unseen(own_hub, published_run):
    own_hub.fail("PUT /lfs/", "drop", 1)
    own_hub.fail("PUT /lfs/", 500, 1)
    own_hub.fail("POST .*/preupload/", 429, 1)
    done = publish(own_hub, published_run / "encoder", "--repo_id", "org/p")
    assert done.returncode == 0 and len(own_hub.repository("org/p").commits) == 2
    assert [fault[2] for fault in own_hub.faults] == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (("--repo_id", "other/p"), TOKEN, "403, the token may not write there: it needs write permission for other"),
        (
            ("--repo_id", "org/p"),
            None,
            "401, the Hub does not accept the token, or there is none: log in with `hf auth login`",
        ),
        (("--repo_id", "org/p"), "hf_wrong", "401, the Hub does not accept the token"),
        (("--repo_id", "a b/c"), TOKEN, "--repo_id must be a name on the Hub such as org/poodle-r50, got 'a b/c'"),
    ],
    ids=["namespace", "no token", "wrong token", "name"],
)
def test_wrong_names_and_tokens(own_hub, published_run, arguments, token, message):
    done = publish(own_hub, published_run / "encoder", *arguments, token=token)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not own_hub.repositories


def test_a_name_that_is_too_long_with_its_ending_is_refused_before_anything_is_sent(own_hub, published_run):
    name = f"org/{'n' * 93}"
    done = publish(own_hub, published_run, "--repo_id", name)
    assert (
        done.returncode == 1
        and f"--repo_id must be a name on the Hub such as org/poodle-r50, got '{name}-sdm'" in done.stderr
    )
    assert not own_hub.repositories
    with pytest.raises(ValueError, match="hub_model_id must be a name on the Hub .*n-sdm'"):
        Recipe(hub_model_id=name)
    assert Recipe(hub_model_id=name[:-1]).hub_model_id == name[:-1]


def test_a_hub_that_is_not_there(own_hub, published_run, tmp_path):
    command = ("training.publish", published_run / "encoder", "--repo_id", "org/p")
    for change, message in (
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the connection failed or broke off"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set: unset it"),
    ):
        done = forked_before_hub(*command, environment=own_hub.environment(tmp_path), timeout=60, **change)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_folders_that_cannot_be_published(as_script, published_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "empty").mkdir()
    (tmp_path / "fitted" / "readout").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (tmp_path / "mine" / name).write_bytes((published_run / "encoder" / name).read_bytes())
    for folder, readme, message in (
        (tmp_path / "none", None, "no such folder; give a run"),
        (tmp_path / "empty", None, "is no run and holds no weights"),
        (tmp_path / "fitted", None, f"it holds readout: give {tmp_path}/fitted/readout"),
        (tmp_path / "mine", f"---\nlicense: mit\n---\nmy token is {TOKEN}", "README.md holds your Hub token"),
        (tmp_path / "mine", "---\ntags: [a\n---\n", "README.md: its metadata"),
    ):
        if readme:
            (folder / "README.md").write_text(readme)
        said = as_script("training/publish.py", folder, "--repo_id", "org/p")
        assert said.startswith("error: ") and message in said
    said = as_script("training/publish.py", tmp_path / "mine", "--repo_id", "org/p", "--which", "student")
    assert "--which student needs a run" in said


def test_incomplete_folders_are_a_sentence(as_script, published_run, tmp_path, capsys):
    def copied(name: str, *without: str) -> Path:
        shutil.copytree(published_run, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints", "panels", "hub"))
        for part in without:
            path = tmp_path / name / part
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return tmp_path / name

    cut = copied("cut")
    (cut / "encoder" / "preprocessor_config.json").write_text('{"image_mean": [0.5')
    bare = copied("no processor", "encoder/preprocessor_config.json") / "encoder"
    config = json.loads((bare / "config.json").read_text())  # changed below to a ResNet that timm has
    known = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "embedding_size": 64}
    (bare / "config.json").write_text(json.dumps({**config, **known}))
    half = copied("half")
    (half / "model" / "model.safetensors").write_bytes((half / "model" / "model.safetensors").read_bytes()[:-8])
    unnamed = []
    for field in ("model_type", "architectures"):
        unnamed.append(copied(f"no {field}") / "encoder")
        (unnamed[-1] / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != field}))
    for folder, message in (
        (half, "model/model.safetensors is damaged"),
        (unnamed[0], "config.json has no model_type: nobody could load"),
        (unnamed[1], "config.json has no architectures: nobody could load"),
        (bare, "preprocessor_config.json cannot be read"),
        (cut / "encoder", "preprocessor_config.json cannot be read"),
        (copied("no model", "model"), "has encoder/ but no model/config.json, as a run has: give"),
        (copied("no config", "encoder/config.json") / "encoder", "is no run and holds no weights"),
        (copied("no config of it", "encoder/config.json"), "encoder is no run and holds no weights"),
        (copied("no weights", "encoder/model.safetensors"), "encoder is no run and holds no weights"),
    ):
        said = as_script("training/publish.py", folder, "--repo_id", "org/p", "--dry_run")
        assert said.startswith("error: ") and message in said and len(said.splitlines()) == 1
        assert not any(capsys.readouterr())
    whole = copied("whole")
    (whole / "hub").write_text("in the way of the folder of the dry run")
    said = as_script("training/publish.py", whole, "--repo_id", "org/p", "--dry_run")
    assert said.startswith("error: ") and "hub" in said
