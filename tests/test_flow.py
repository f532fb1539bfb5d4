import json
import pickle

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import optical_flow

from training.flow import DisFlow, ExactFlow, RaftFlow, build_flow, check_sidecars, flow_function, flow_to_rgb
from training.flow_quality import build_estimator
from training.street import Street


def smooth_frames(height, width, shift, seed=0):
    """Return a textured picture, and the same picture moved by `shift` pixels to the right, uint8 (2, 3, H, W)."""
    noise = np.random.default_rng(seed).random((height // 4, width // 4, 3)).astype(np.float32)
    wide = cv2.resize(noise, (width + 64, height), interpolation=cv2.INTER_CUBIC)
    pair = [wide[:, 32:-32], wide[:, 32 - shift : width + 32 - shift]]
    return np.stack([(np.clip(p, 0, 1) * 255).astype(np.uint8).transpose(2, 0, 1) for p in pair])


def test_exact_flow_of_other_videos_is_refused_at_the_start(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"street": Street(3, 32, 64, camera="walking").to_json()}))
    check_sidecars([str(tmp_path / "a.mp4")])
    with pytest.raises(ValueError, match="flow exact exists only for the street, and .*b.mp4 has no sidecar"):
        check_sidecars([str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "Expecting value"),
        ('{"title": 1}', "it has no mapping 'street'"),
        ('["street"]', "it has no mapping 'street'"),
        ('{"street": {"foo": 1}}', "unexpected keyword argument 'foo'"),
        ('{"street": {"speed": "fast"}}', "not supported between"),
        ('{"street": {"width": 3}}', "Street.width must be an integer of at least 16, got 3"),
    ],
)
def test_a_sidecar_of_another_program_is_refused_at_the_start_with_what_is_wrong(tmp_path, content, said):
    (tmp_path / "clip.json").write_text(content)
    video = str(tmp_path / "clip.mp4")
    refusal = f"flow exact exists only for the street, and clip.json beside .*clip.mp4 is no sidecar of it .*{said}"
    with pytest.raises(ValueError, match=refusal):
        check_sidecars([video])
    with pytest.raises(RuntimeError, match=refusal):
        ExactFlow()(
            {"video": video, "crop": (0, 0, 8, 8), "frames": np.zeros((2, 3, 8, 8), np.uint8), "times": (0, 1)}
        )


def test_dis_finds_a_shift_in_both_directions():
    flow = DisFlow().estimate(smooth_frames(96, 160, 6))
    inner = flow[:, :, 16:-16, 16:-16]
    assert np.median(np.abs(inner[0, 0] - 6)) < 0.3 and np.median(np.abs(inner[1, 0] + 6)) < 0.3
    assert np.median(np.abs(inner[:, 1])) < 0.2
    sample = {"frames": smooth_frames(96, 160, 6)}
    DisFlow()(sample)
    assert sample["flow"].dtype == np.float16 and sample["flow"].shape == (2, 2, 96, 160)


def test_every_estimator_of_frames_is_one_function():
    frames = torch.from_numpy(np.stack([smooth_frames(128, 136, shift) for shift in (3, 6)]))
    dis, raft = flow_function("dis")(frames), flow_function("raft_small", weights="random", num_updates=1)(frames)
    for flow in (dis, raft):
        assert flow.shape == (2, 2, 2, 128, 136) and flow.dtype == torch.float32
    for number, shift in enumerate((3, 6)):
        np.testing.assert_array_equal(dis[number], DisFlow().estimate(frames[number].numpy()))
        assert abs(float(dis[number, 0, 0, 16:-16, 16:-16].median()) - shift) < 0.3
    for name in ("exact", "precomputed"):
        with pytest.raises(ValueError, match=f"flow {name} belongs to videos"):
            flow_function(name)
    with pytest.raises(ValueError, match="flow unflow needs its network"):
        flow_function("unflow")
    with pytest.raises(ValueError, match="did you mean 'dis'"):
        flow_function("diss")
    raft = flow_function("raft_small", weights="random", num_updates=1)
    for function in (flow_function("dis"), raft):
        for wrong in (torch.rand(1, 2, 3, 128, 128), torch.zeros(2, 3, 128, 128, dtype=torch.uint8)):
            with pytest.raises(ValueError, match=r"frames must be \(B, 2, 3, H, W\) of torch.uint8, got \(.*128\)"):
                function(wrong)
    with pytest.raises(ValueError, match="dis needs frames of at least 16x16, got 8x16"):
        flow_function("dis")(torch.zeros(1, 2, 3, 8, 16, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("variant", "size"), [("raft_small", (128, 136)), ("raft_large", (128, 128)), ("raft_small", (131, 150))]
)
def test_raft_in_both_directions_at_once_equals_torchvision_twice(variant, size):
    torch.manual_seed(0)
    ours = RaftFlow(variant, "random", num_updates=3)
    frames = torch.from_numpy(
        np.stack([smooth_frames(size[0] + 4, size[1] + 4, 3, s)[:, :, : size[0], : size[1]] for s in (0, 1)])
    )
    result = ours(frames)
    pad = torch.nn.ReplicationPad2d(
        (-size[1] % 8 // 2, -size[1] % 8 - -size[1] % 8 // 2, -size[0] % 8 // 2, -size[0] % 8 - -size[0] % 8 // 2)
    )
    earlier, later = (pad(frames[:, k].float() / 127.5 - 1) for k in (0, 1))
    with torch.no_grad():
        for index, (a, b) in enumerate(((earlier, later), (later, earlier))):
            theirs = ours.raft(a, b, num_flow_updates=3)[-1]
            top, left = pad.padding[2], pad.padding[0]
            theirs = theirs[..., top : top + size[0], left : left + size[1]]
            assert (result[:, index] - theirs).abs().max() < 1e-3


def test_raft_encodes_once_and_upsamples_once():
    raft = RaftFlow("raft_large", "random", num_updates=4)
    calls = {"encoder": 0, "mask": 0}
    raft.raft.feature_encoder.register_forward_hook(lambda *_: calls.__setitem__("encoder", calls["encoder"] + 1))
    raft.raft.mask_predictor.register_forward_hook(lambda *_: calls.__setitem__("mask", calls["mask"] + 1))
    raft(torch.zeros(1, 2, 3, 128, 128, dtype=torch.uint8))
    assert calls == {"encoder": 1, "mask": 1}
    assert not any(p.requires_grad for p in raft.parameters())


def test_raft_weights_from_files(tmp_path):
    torch.manual_seed(1)
    source = optical_flow.raft_small(weights=None).state_dict()
    torch.save(source, tmp_path / "raft.pth")
    save_file({k: v.contiguous().clone() for k, v in source.items()}, tmp_path / "raft.safetensors")
    for name in ("raft.pth", "raft.safetensors"):
        loaded = RaftFlow("raft_small", str(tmp_path / name)).raft.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in source.items())
    with pytest.raises(ValueError, match="(?s)do not fit raft_large.*--flow dis"):
        RaftFlow("raft_large", str(tmp_path / "raft.pth"))
    torch.save({"module.fnet.conv1.weight": torch.zeros(1)}, tmp_path / "raft-things.pth")
    with pytest.raises(ValueError, match="keys of RAFT's original repository; .*/raft_large_C_T_V1"):
        RaftFlow("raft_large", str(tmp_path / "raft-things.pth"))
    for strange in ({"weights": Street(0)}, torch.zeros(1)):
        torch.save(strange, tmp_path / "strange.pth")
        with pytest.raises(ValueError, match="(?s)cannot be loaded .*--flow_weights FILE"):
            RaftFlow("raft_small", str(tmp_path / "strange.pth"))


def test_unknown_names_and_small_frames():
    with pytest.raises(ValueError, match="did you mean 'raft_large'"):
        build_flow("raft_larg")
    with pytest.raises(ValueError, match="--flow precomputed is of other pairs: name the estimator"):
        build_estimator("precomputed")
    with pytest.raises(ValueError, match="at least 128x128"):
        RaftFlow("raft_small", "random", 1)(torch.zeros(1, 2, 3, 64, 128, dtype=torch.uint8))


def test_exact_flow_through_a_crop(tmp_path):
    street = Street(3, 64, 128)
    (tmp_path / "drive.json").write_text(json.dumps({"street": street.to_json()}))
    whole = {
        "video": str(tmp_path / "drive.mp4"),
        "times": np.array([1.0, 1.2]),
        "crop": np.array([0.0, 0, 128, 64]),
        "frames": np.zeros((2, 3, 64, 128), np.uint8),
    }
    ExactFlow()(whole)
    flow, visible = street.flow(1.0, 1.2)
    np.testing.assert_allclose(whole["flow"][0][:, visible], flow[:, visible].astype(np.float16), atol=0.01)
    assert np.array_equal(whole["valid_mask"][0], visible)
    part = {**whole, "crop": np.array([32.0, 16, 96, 48]), "frames": np.zeros((2, 3, 96, 192), np.uint8)}
    ExactFlow()(part)
    centre = part["flow"][0][:, 1::3, 1::3].astype(
        np.float32
    )  # at a scale of 3, every third centre is that of a source pixel
    np.testing.assert_allclose(centre, 3 * flow[:, 16:48, 32:96], rtol=2e-3, atol=0.05)
    with pytest.raises(RuntimeError, match="only for the street"):
        ExactFlow()({**whole, "video": str(tmp_path / "other.mp4")})


def test_flow_colours_do_not_follow_one_outlier():
    flow = torch.ones(2, 40, 40)
    plain = flow_to_rgb(flow)
    flow[:, 0, 0] = 1000
    assert (flow_to_rgb(flow)[:, 20, 20].int() - plain[:, 20, 20].int()).abs().max() < 12


def test_exact_flow_of_a_crop_that_is_stretched_stays_in_it(tmp_path):
    """The crop keeps its width of 64 and has three times its height of 32. Every third row of centres is that of source pixels."""
    street = Street(3, 64, 128)
    (tmp_path / "drive.json").write_text(json.dumps({"street": street.to_json()}))
    flow, visible = street.flow(1.0, 1.2)
    part = {
        "video": str(tmp_path / "drive.mp4"), "times": np.array([1.0, 1.2]), "crop": np.array([32.0, 16, 96, 48]),
        "frames": np.zeros((2, 3, 96, 64), np.uint8),
    }  # fmt: skip
    ExactFlow()(part)
    found = part["flow"][0][:, 1::3].astype(np.float32)
    stretched = flow[:, 16:48, 32:96] * np.float32([1, 3])[:, None, None]
    np.testing.assert_allclose(found, stretched, rtol=2e-3, atol=0.05)
    x, y = np.arange(64) + 0.5 + stretched[0], np.arange(1, 96, 3)[:, None] + 0.5 + stretched[1]
    stays = (x >= 0) & (x <= 64) & (y >= 0) & (y <= 96)
    assert not stays[visible[16:48, 32:96]].all()
    assert np.array_equal(part["valid_mask"][0][1::3], visible[16:48, 32:96] & stays)


def test_dis_sees_the_luma_and_goes_to_workers_when_it_was_used():
    rng = np.random.default_rng(0)
    frames = np.stack([cv2.resize(rng.integers(0, 255, (8, 12, 3), np.uint8), (96, 64)) for _ in range(2)])
    frames[1] = np.roll(frames[0], 3, axis=1)
    grey = np.stack([np.repeat(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2) for frame in frames])
    dis = DisFlow()
    coloured, plain = (dis.estimate(np.ascontiguousarray(pair.transpose(0, 3, 1, 2))) for pair in (frames, grey))
    assert np.array_equal(coloured, plain)
    again = pickle.loads(pickle.dumps(dis)).estimate(np.ascontiguousarray(grey.transpose(0, 3, 1, 2)))
    assert np.array_equal(again, plain)
