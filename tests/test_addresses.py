"""URLs with a password or a signature: read as given, but identified, shown and stored without either."""

import base64
import logging
import shutil
import tarfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from forked_scripts import forked
from loopback import FileHandler, FileServer, serve
from small_runs import flags, metrics

from training import flow_writer
from training.addresses import public_url, video_name, without_secrets
from training.flow_files import FlowFiles
from training.pair_plans import PairSampling
from training.pretrain import main
from training.recipe import Recipe, parse_recipe
from training.resume import find_checkpoint
from training.video_checks import check_videos
from training.video_sources import find_videos
from training.video_stream import PairLoader

REPOSITORY = Path(__file__).resolve().parent.parent
SECRETS = ("hunter2-hunter2", "signed-yesterday", "signed-today")  # the password, and the signatures of two days
SAMPLING = PairSampling(crop_size=(64, 128), frame_gap_seconds=(0.2, 0.8), pairs_per_video=2)


class Guarded(FileHandler):
    """Answers only requests with the password and one of the two signatures."""

    def answer(self, body: bool) -> None:
        allowed = f"Basic {base64.b64encode(b'me:hunter2-hunter2').decode()}"
        signed = urlsplit(self.path).query in (f"sig={SECRETS[1]}*", f"sig={SECRETS[2]}*")
        if self.headers.get("Authorization") == allowed and signed:
            super().answer(body)
        else:
            self.reply(403, b"refused", body)


@pytest.fixture(scope="module")
def guarded(drives, tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    for number, path in enumerate(sorted(drives.glob("*.mp4"))):
        shutil.copy(path, folder / f"{number}.mp4")
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    with tarfile.open(folder / "both.tar", "w") as tar:
        for number in range(2):
            tar.add(folder / f"{number}.mp4", f"{number}?.mp4")
    with serve(folder, lambda folder: FileServer(folder, Guarded)) as server:
        yield server


def signed(server, name: str, signature: str = "signed-yesterday") -> str:
    return f"{server.url.replace('://', '://me:hunter2-hunter2@')}/{name}?sig={signature}*"


def sources(server, signature: str = "signed-yesterday") -> list[str]:
    return ["--videos", *(signed(server, name, signature) for name in ("0.mp4", "1.mp4", "broken.mp4", "gone.mp4"))]


def holds_secret(data: bytes) -> bool:
    return any(secret.encode() in data for secret in SECRETS)


def assert_no_secret_below(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / "config.yaml"]
    assert files and [path for path in files if holds_secret(path.read_bytes())] == []
    assert [path for path in folder.rglob("*") if holds_secret(path.name.encode())] == []


# --- one URL ---


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h/a.mp4", "https://h/a.mp4"),
        ("https://h:8080/@me/a,b.mp4", "https://h:8080/@me/a,b.mp4"),
        ("https://token@h/a.mp4", "https://h/a.mp4"),
        ("http://me:x@h:80/a.mp4?sig=x&t=http://i/?u#f", "http://h:80/a.mp4"),
        ("http://me:x/?#@y@h/a.mp4", "http://h/a.mp4"),
        ("http://me:x@[::1]:80/a.mp4?x", "http://[::1]:80/a.mp4"),
        ("http://[::1]:80/@me/a.mp4", "http://[::1]:80/@me/a.mp4"),
        ("http://h/a b.mp4?x y", "http://h/a b.mp4"),
        ("ftp://me:x@h/a?.mp4", "ftp://h/a?.mp4"),
        ("s3://bucket/a?.mp4", "s3://bucket/a?.mp4"),
        ("s3://bucket/a.mp4?versionId=x", "s3://bucket/a.mp4"),
        ("abfs://container@account/a.mp4", "abfs://container@account/a.mp4"),
        ("github://org:repo@main/a.mp4", "github://org:repo@main/a.mp4"),
        ("hf://datasets/org/name@main/a?.mp4", "hf://datasets/org/name@main/a?.mp4"),
        ("/videos/what?/me:x@y.mp4", "/videos/what?/me:x@y.mp4"),
        ("a:/b?c=d.mp4", "a:/b?c=d.mp4"),
    ],
)
def test_what_is_shown_of_a_url(url, shown):
    assert public_url(url) == shown and public_url(shown) == shown
    assert video_name(url) == shown
    assert without_secrets(f"no such file: {url!r}, or so", url) == f"no such file: {shown!r}, or so"


def test_a_member_of_a_tar_keeps_its_place_and_name():
    assert video_name("https://me:x@h/a.tar?sig=x::5:9:b?.mp4") == "https://h/a.tar::5:9:b?.mp4"
    assert video_name("https://h/a.tar::5:9:b.tar?c::0:1:d") == "https://h/a.tar::5:9:b.tar?c::0:1:d"
    for local in ("/d/a.tar::5:9:https://me:x@h/b.mp4?c=d", "/d/a.tar?x::5:9:b.mp4", "a.tar?b.tar::5:9:c"):
        assert video_name(local) == local


def test_urls_within_a_text():
    text = "404, url='http://me:x@h/a.mp4?sig=x', from <ftp://me:x@h/b> and s3://b/c (by https://h/?x)"
    assert without_secrets(text) == "404, url='http://h/a.mp4', from <ftp://h/b> and s3://b/c (by https://h/"


# --- sources ---


def test_a_query_is_no_pattern(guarded):
    urls = [signed(guarded, "1.mp4"), signed(guarded, "0.mp4")]
    assert find_videos(urls) == urls[::-1]
    assert check_videos(urls, SAMPLING) == []
    members = find_videos([signed(guarded, "both.tar")])
    assert [member.rsplit(":", 1)[1] for member in members] == ["0?.mp4", "1?.mp4"]
    assert check_videos(members, SAMPLING) == []


def test_two_videos_that_only_a_query_tells_apart_are_refused(guarded):
    with pytest.raises(ValueError, match=f"differ by their user or query alone: {guarded.url}/0.mp4. ") as caught:
        find_videos([signed(guarded, "0.mp4"), signed(guarded, "0.mp4", "signed-today")])
    assert not holds_secret(str(caught.value).encode())


def test_errors_of_sources_show_no_secret(guarded, caplog):
    base = signed(guarded, "").split("?")[0]
    with pytest.raises(ValueError, match="no videos found") as caught:
        find_videos(
            [
                signed(guarded, "none.tar"),
                f"{base}*.mp4?sig=signed-today",
                "nosuch://me:hunter2-hunter2@h/*?sig=signed-today",
            ]
        )
    assert str(caught.value).count("cannot be listed") == 2 and "not a readable tar" in caplog.text
    with pytest.raises(ValueError, match=f"(?s)no usable video.*{guarded.url}/gone.mp4: ") as unusable:
        check_videos([signed(guarded, "gone.mp4"), signed(guarded, "broken.mp4")], SAMPLING)
    with pytest.raises(ValueError, match="unexpected argument 'http://127") as flag:
        parse_recipe(["--seed", "1", signed(guarded, "0.mp4")])
    found = "".join(map(str, (caught.value, unusable.value, flag.value))) + caplog.text
    assert not holds_secret(found.encode())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("tar", [False, True])
def test_another_signature_draws_the_same_pairs_and_goes_on(guarded, workers, tar):
    def loader(signature):
        names = ["both.tar"] if tar else ["0.mp4", "1.mp4"]
        return PairLoader(find_videos([signed(guarded, name, signature) for name in names]), SAMPLING, 2, workers)

    before, after = loader("signed-yesterday"), loader("signed-today")
    stream = iter(before)
    next(stream)
    state = before.state_dict()
    expected = next(stream)
    reading = [note.value for note in before.workers._notes]  # the video to name if a worker crashes
    assert len(reading) == workers and all(note.startswith(guarded.url.encode()) for note in reading)
    assert not holds_secret(repr(reading).encode())
    before.close()
    assert not holds_secret(repr(state).encode()) and state["first_path"].startswith(guarded.url)
    after.load_state_dict(state)
    batch = next(iter(after))
    after.close()
    assert batch["video"] == expected["video"] and len(set(batch["video"])) == 2
    assert all(torch.equal(batch[name], expected[name]) for name in ("frames", "times", "crop", "epoch"))
    assert not holds_secret(repr(batch["video"]).encode())


# --- runs ---


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_shows_and_keeps_no_secret_of_a_url(guarded, drives, tmp_path):
    pytest.importorskip("tensorboard")
    more = ["--report_to", "tensorboard", "--save_steps", "1", "--save_total_limit", "9", "--flow", "dis", "--dataloader_num_workers", "1"]  # fmt: skip
    run = tmp_path / "run"
    arguments = flags(drives, run, *more, *sources(guarded), steps=4)
    done = forked(REPOSITORY / "training" / "pretrain.py", *arguments)
    assert done.returncode == 0, done.stderr
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["skipped_videos"] == 2
    for name in ("broken.mp4", "gone.mp4"):
        assert f"skipped {guarded.url}/{name}: cannot be opened" in done.stderr
    assert not holds_secret((done.stdout + done.stderr).encode())
    assert f"{guarded.url}/gone.mp4" in (run / "checkpoints" / "step-4" / "rank-0.json").read_text()
    assert f"{guarded.url}/gone.mp4" in next((run / "poodle").rglob("hparams.yml")).read_text()
    assert signed(guarded, "gone.mp4") in (run / "config.yaml").read_text()
    assert_no_secret_below(run)
    # The next day, with a new signature: the same pairs.
    resume = ["--resume_from_checkpoint", str(run / "checkpoints" / "step-2")]
    main(flags(drives, run, *more, *sources(guarded, "signed-today"), *resume, steps=4))
    assert metrics(run) == lines
    assert "signed-today" in (run / "config.yaml").read_text()
    assert_no_secret_below(run)


def test_another_video_is_refused_without_a_secret(guarded, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    first = Recipe(videos=[signed(guarded, "0.mp4")], output_dir=str(run))
    (run / "config.yaml").write_text(first.to_yaml())
    other = Recipe(videos=[signed(guarded, "1.mp4")], output_dir=str(run), resume_from_checkpoint="latest")
    with pytest.raises(
        ValueError, match=f"videos: .'{guarded.url}/0.mp4'. in the run, .'{guarded.url}/1.mp4'. now"
    ) as caught:
        find_checkpoint(other)
    assert not holds_secret(str(caught.value).encode())


@pytest.mark.usefixtures("fresh_accelerator")
def test_flow_of_signed_urls_is_kept_by_their_names(guarded, tmp_path, caplog):
    out = tmp_path / "flow"
    arguments = ["--config", "street", "--crop_size", "64", "128", "--dataloader_num_workers", "0", *sources(guarded)]
    with caplog.at_level(logging.INFO, "poodle"):
        flow_writer.main([*arguments, "--flow", "dis", "--epochs", "1", "--out", str(out)])
    assert len(list(out.rglob("*.safetensors"))) == 2 and len(list(out.rglob("*.skipped"))) == 2
    assert f"skipped {guarded.url}/gone.mp4" in caplog.text and not holds_secret(caplog.text.encode())
    assert_no_secret_below(out)
    recipe = parse_recipe(arguments)
    paths = find_videos([signed(guarded, name, "signed-today") for name in ("0.mp4", "1.mp4")])
    loader = PairLoader(paths, PairSampling.of(recipe), 4, pair_flow=FlowFiles(out))
    loader.epochs = 1
    batch = next(iter(loader))
    assert batch["flow"].float().abs().mean() > 0.5 and batch["skipped"] == []
