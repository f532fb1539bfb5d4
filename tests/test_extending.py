"""The code of docs/extending.md, run as it stands there."""

import json
import re
from pathlib import Path

import torch
from forked_scripts import forked
from small_runs import MODEL, flags
from transformers import AutoModel

from modeling_poodle import PoodleConfig

CODE = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs" / "extending.md").read_text(), re.S)


def test_a_script_with_subclasses_trains_and_goes_on(drives, tmp_path):
    script = tmp_path / "variance.py"
    script.write_text(CODE[0])
    done = forked(script, *flags(drives, tmp_path / "run", steps=2))
    assert done.returncode == 0, done.stderr
    assert forked("training/pretrain.py", *flags(drives, tmp_path / "plain", steps=2)).returncode == 0
    changed, original = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "plain")
    )
    assert len(changed) == 2 and changed[0]["dense_loss"] != original[0]["dense_loss"]
    assert AutoModel.from_pretrained(tmp_path / "run" / "model").config.num_decoder_blocks == 2
    more = ("--resume_from_checkpoint", "latest", "--resume_inexact", "true")
    done = forked(script, *flags(drives, tmp_path / "run", *more, steps=3))
    assert done.returncode == 0 and "resuming from" in done.stderr + done.stdout


def test_the_loop_trains_a_student_and_a_teacher(drives, tmp_path, monkeypatch):
    changes = (
        ("path/to/my/videos", str(drives)), (" 1000\n", " 2\n"), ("num_workers=1", "num_workers=0"),
        ("[128, 256], num_subcrops=4, subcrop_size=64", "[64, 128], num_subcrops=2, subcrop_size=32"),
        ('PoodleConfig(backbone_config={"model_type": "resnet"})', f"PoodleConfig(**{MODEL!r})"),
    )  # fmt: skip
    code = CODE[1]
    for before, after in changes:
        assert before in code
        code = code.replace(before, after)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(code, "extending.md", "exec"), found)
    assert 0 < found["output"].loss.item() < 4 and found["step"] == 1
    teacher, student = found["model"].teacher.state_dict(), found["model"].student.state_dict()
    kept = AutoModel.from_pretrained(tmp_path / "mine").state_dict()
    assert all(torch.equal(kept[name], teacher[name]) for name in kept)
    assert not torch.equal(teacher["decoder.0.conv1.weight"], student["decoder.0.conv1.weight"])
    assert isinstance(found["model"].config, PoodleConfig)
