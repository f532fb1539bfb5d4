"""What PoodleConfig accepts, and what it refuses with an error that names the field."""

import json

import pytest
import torch
from test_modeling_pretraining import RESNET, VIT, config
from transformers import AutoConfig, BertConfig, TimmBackboneConfig, UperNetConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from modeling_poodle import PoodleConfig, PoodleFlowConfig, PoodleModel
from modeling_poodle.config_checks import check_config
from modeling_poodle.configuration_poodle import PLAIN_VITS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_decoder_block": 1}, "Did you mean 'num_decoder_blocks'"),
        ({"num_decoder_blocks": -1}, "num_decoder_blocks must be an integer of at least 0"),
        ({"num_decoder_blocks": 4}, "num_decoder_blocks must be at most 3"),
        ({"decoder_laterals": 1}, "decoder_laterals must be true or false"),
        ({"decoder_laterals": False, "decoder_top_down": False}, "decoder_top_down must be true where"),
        ({"decoder_lateral_depth": 0}, "decoder_lateral_depth must be an integer of at least 1"),
        ({"projection_size": 0}, "projection_size must be an integer of at least 1"),
        ({"pooled_weight": -0.1}, "pooled_weight must be a finite number"),
        ({"dense_weight": 0, "pooled_weight": 0}, "one objective must be left"),
        ({"output_stride": 7}, "output_stride must be None, 8, 16 or 32"),
        ({"output_stride": 8.0}, "output_stride must be None, 8, 16 or 32"),
        ({"dense_stride": -4}, "dense_stride must be None or an integer of at least 1"),
        ({"num_decoder_blocks": 99}, "num_decoder_blocks must be at most 8"),
        (
            {"readout_stage": "stage9"},
            "PoodleConfig.readout_stage must be one of stem, stage1, .*, decoder, got 'stage9'",
        ),
        ({"backbone_config": {"depths": [1]}}, "must name its model_type"),
        ({"backbone_config": {"model_type": "bert"}}, "PoodleConfig.backbone_config: 'bert' is no backbone"),
        ({"backbone_config": {"model_type": "clip_vision_model"}}, "'clip_vision_model' is no backbone"),
        ({"backbone_config": {"model_type": "segformer"}}, "'segformer' is no backbone"),
        ({"backbone_config": BertConfig()}, "PoodleConfig.backbone_config: 'bert' is no backbone"),
        (
            {"backbone_config": {**RESNET, "depthz": [1, 1, 1, 1]}},
            "PoodleConfig.backbone_config: ResNetConfig has no field 'depthz'. Did you mean 'depths'[?]",
        ),
        (
            {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18", "out_indeces": [1, 2, 3, 4]}},
            "TimmBackboneConfig has no field 'out_indeces'. Did you mean 'out_indices'[?]",
        ),
        (
            {"backbone_config": TimmBackboneConfig(backbone="resnet18", out_indices=[3])},
            r"num_decoder_blocks must be at most 0: .* out_indices: \[1, 2, 3, 4\] has four\), got 2",
        ),
        (
            {"backbone_config": TimmBackboneConfig(backbone="resnet18", out_indices=[3, 4])},
            r"num_decoder_blocks must be at most 1: .* out_indices: \[1, 2, 3, 4\] has four\), got 2",
        ),
        ({"backbone_config": {**VIT, "foo": 1}}, "PoodleConfig.backbone_config: Dinov2Config has no field 'foo'.$"),
        (
            {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnt18"}},
            "backbone_config.backbone: timm has no network 'resnt18'. Did you mean 'resnet18'",
        ),
        ({"out_indices": [-7]}, r"out_indices must be integers that count stem, .*, decoder from 0, got \[-7\]"),
        ({"out_indices": [6]}, r"out_indices must be integers that count stem, .*, got \[6\]"),
        ({"backbone_config": "resnet"}, "backbone_config must be a config or a dict, got str"),
        (
            {"backbone_config": {**RESNET, "hidden_sizes": [8, 16, 32]}},
            r"backbone_config.hidden_sizes must give a width for each of the 4 depths, got \[8, 16, 32\]",
        ),
        (
            {"backbone_config": {**RESNET, "embedding_size": 0}},
            r"backbone_config.embedding_size must be at least 1, got 0",
        ),
        (
            {"backbone_config": {**RESNET, "num_channels": -1}},
            r"backbone_config.num_channels must be at least 1, got -1",
        ),
        (
            {"backbone_config": {**RESNET, "hidden_act": "rellu"}},
            r"hidden_act must name a function of transformers, got 'rellu'.*'relu'",
        ),
        (
            {"backbone_config": {**RESNET, "hidden_sizes": [0] * 4}},
            r"hidden_sizes must give a width for each .* \[0, 0, 0, 0\]",
        ),
        (
            {"backbone_config": {**RESNET, "depths": []}},
            r"backbone_config.depths must give a block or more a stage, got \[\]",
        ),
        ({"out_features": ["stage9"]}, "stage9"),
        ({"out_features": []}, r"PoodleConfig.out_features must be some of stem, stage1, .*, decoder, got \[\]"),
        ({"out_indices": []}, r"PoodleConfig.out_indices must be integers that count stem, .* from 0, got \[\]"),
        ({"out_indices": ["a"]}, r"PoodleConfig.out_indices must be integers that count stem, .* got \['a'\]"),
        ({"out_indices": 3}, "PoodleConfig.out_indices must be integers"),
        ({"semantic_loss_ignore_index": "a"}, "semantic_loss_ignore_index must be an integer, got 'a'"),
        ({"semantic_loss_ignore_index": None}, "semantic_loss_ignore_index must be an integer, got None"),
        ({"semantic_loss_ignore_index": 1.5}, "semantic_loss_ignore_index must be an integer, got 1.5"),
        ({"num_labels": -1}, "PoodleConfig.num_labels must be an integer of at least 0, got -1"),
        ({"num_labels": "x"}, "PoodleConfig.num_labels must be an integer of at least 0, got 'x'"),
        ({"num_labels": None}, "PoodleConfig.num_labels must be an integer of at least 0, got None"),
        ({"id2label": 3}, "PoodleConfig.id2label must be a mapping, a name for each number, got 3"),
        (
            {"id2label": {"road": 0}},
            "PoodleConfig.id2label must be a mapping, a name for each number, got {'road': 0}",
        ),
        ({"label2id": ["road"]}, "PoodleConfig.label2id must be a mapping, a number for each name, got .'road'"),
    ],
    ids=str,
)
def test_config_refuses_wrong_values(changes, message, tmp_path):
    """Also if the values are passed to `from_pretrained` of a config or a model, beside a file."""
    with pytest.raises(ValueError, match=message):
        config(**changes)
    if "backbone_config" in changes and "model_type" not in changes["backbone_config"]:
        return
    config().save_pretrained(tmp_path)
    for read in (PoodleConfig, PoodleModel, AutoConfig):
        with pytest.raises(ValueError, match=message):
            read.from_pretrained(tmp_path, **changes)


def test_a_config_is_of_its_own_kind():
    for kind, own in ((PoodleConfig, "poodle"), (PoodleFlowConfig, "poodle_flow")):
        assert kind(model_type=own).model_type == own
        with pytest.raises(ValueError, match=f"{kind.__name__}.model_type must be '{own}', got 'resnet'"):
            kind(model_type="resnet")


def test_fields_beside_a_file_change_the_config_as_a_whole(tmp_path):
    config(out_features=["stage3", "decoder"]).save_pretrained(tmp_path)
    read = PoodleConfig.from_pretrained(tmp_path, num_decoder_blocks=0)
    assert read.to_dict() == config(num_decoder_blocks=0).to_dict() and read.out_features == ["stage4"]
    read = PoodleConfig.from_pretrained(tmp_path, num_decoder_blocks=0, out_features=["stage2"], dense_stride=4)
    assert (read.out_features, read.dense_stride, read.num_decoder_blocks) == (["stage2"], 4, 0)
    with pytest.raises(ValueError, match="decoder"):
        PoodleConfig.from_pretrained(tmp_path, num_decoder_blocks=0, out_features=["stage4", "decoder"])
    read = PoodleConfig.from_pretrained(tmp_path, backbone_config={"depths": [2, 1, 1, 1]})
    assert read.backbone_config.depths == [2, 1, 1, 1] and read.backbone_config.hidden_sizes == RESNET["hidden_sizes"]
    with pytest.raises(ValueError, match="decoder"):  # the stages are the file's, and the network would not have them
        PoodleConfig.from_dict({**config(out_features=["decoder"]).to_dict(), "num_decoder_blocks": 0})
    read, unused = PoodleConfig.from_pretrained(tmp_path, dense_weight=0.25, foo=1, return_unused_kwargs=True)
    assert read.dense_weight == 0.25 and unused == {"foo": 1}


def test_what_a_later_version_wrote_is_left_alone_and_a_misspelt_field_is_not(tmp_path, caplog):
    config().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": None, "cache_layout": "ring"}))
    with caplog.at_level("WARNING", logger="transformers"):
        read = PoodleConfig.from_pretrained(tmp_path)
    assert read.projection_size == config().projection_size
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_decoder_block": 1}))
    with pytest.raises(ValueError, match="Did you mean 'num_decoder_blocks'"):
        PoodleConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("stages", [{"out_indices": [1, 2, 3, 4]}, {}], ids=["four stages", "as transformers has it"])
def test_a_timm_encoder_may_come_as_its_config(stages):
    pytest.importorskip("timm")
    changes = {"backbone": "resnet18", **stages}
    torch.manual_seed(0)
    model = PoodleModel(config(backbone_config=TimmBackboneConfig(**changes))).eval()
    twin = PoodleModel(config(backbone_config={"model_type": "timm_backbone", **changes})).eval()
    assert model.config.to_dict() == twin.config.to_dict() == PoodleConfig.from_dict(twin.config.to_dict()).to_dict()
    twin.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 64, 96)
    features = model(images).last_hidden_state
    assert features.shape == (1, 512, 8, 12) and torch.equal(features, twin(images).last_hidden_state)


def test_a_timm_encoder_returns_as_many_stages_as_the_decoder_reads():
    encoder = {"model_type": "timm_backbone", "backbone": "resnet18"}
    for blocks, indices in ((0, [-1]), (1, [-2, -1]), (2, [-3, -2, -1]), (4, [-5, -4, -3, -2, -1])):
        assert config(backbone_config=encoder, num_decoder_blocks=blocks).backbone_config.out_indices == indices
    alone = config(backbone_config=encoder, decoder_laterals=False)
    assert alone.backbone_config.out_indices == [-1]
    assert PoodleConfig.from_dict(alone.to_dict(), decoder_laterals=True).decoder_inputs == [
        "stage1",
        "stage2",
        "stage3",
    ]


def test_a_config_that_is_saved_anew_names_no_code(tmp_path):
    """Nor does the config of a network that contains it. Files saved this way have no code beside them."""
    values = {**config().to_dict(), "auto_map": {"AutoModel": "modeling_poodle.PoodleModel"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = PoodleConfig.from_pretrained(tmp_path)
    assert loaded.auto_map == values["auto_map"]
    loaded.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    check_config(UperNetConfig(backbone_config=loaded).to_dict(), "UperNetConfig")


def test_a_bottleneck_without_channels_is_refused():
    assert PoodleModel(config(decoder_reduction=64)).decoder[0].conv1.out_channels == 1
    with pytest.raises(ValueError, match="PoodleConfig.decoder_reduction must be at most 64, the channels .*, got 65"):
        config(decoder_reduction=65)
    swin = {
        "model_type": "swin",
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 1, 1],
    }  # has no hidden_sizes
    with pytest.raises(ValueError, match="PoodleConfig.decoder_reduction must be at most 64, the channels .*, got 65"):
        PoodleModel(config(decoder_reduction=65, backbone_config=swin))
    PoodleModel(config(decoder_reduction=65, decoder_top_down=False))
    PoodleModel(config(decoder_reduction=65, num_decoder_blocks=0))


def test_stages_and_labels_are_looked_at_when_they_are_set_later(tmp_path):
    changed = config(
        out_indices=(2, -1), id2label={"0": "road", "1": "sky"}, num_labels=2, semantic_loss_ignore_index=-100
    )
    assert changed.out_features == ["stage2", "decoder"] and changed.id2label == {0: "road", 1: "sky"}
    changed.out_features = ["stage1"]
    with pytest.raises(ValueError, match="PoodleConfig.out_features must be some of"):
        changed.out_features = []
    changed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PoodleConfig.out_indices must be integers"):
        PoodleConfig.from_pretrained(tmp_path, out_indices=["a"])
    with pytest.raises(ValueError, match="PoodleConfig.num_labels must be an integer of at least 0, got -1"):
        PoodleConfig.from_pretrained(tmp_path, num_labels=-1)
    assert PoodleConfig.from_pretrained(tmp_path, num_labels=3).id2label[2] == "LABEL_2"


@pytest.mark.parametrize("model_type", [*sorted({*MODEL_FOR_BACKBONE_MAPPING_NAMES} - {"tipsv2"}), *PLAIN_VITS])
def test_configs_that_transformers_writes_are_taken(model_type):
    """As an object, as JSON, and without `transformers_version`, as inside another config. (The config of tipsv2 has no stages.)"""
    backbone = AutoConfig.for_model(model_type)
    for given in (backbone, backbone.to_dict(), json.loads(backbone.to_json_string())):
        taken = PoodleConfig(backbone_config=given, num_decoder_blocks=0)
        assert taken.backbone_config.to_dict() == backbone.to_dict()
        assert PoodleConfig.from_dict(taken.to_dict()).to_dict() == taken.to_dict()
        assert PoodleConfig(**json.loads(taken.to_json_string())).to_dict() == taken.to_dict()
        if isinstance(given, dict):
            del given["transformers_version"]
            assert PoodleConfig(backbone_config=given, num_decoder_blocks=0).to_dict() == taken.to_dict()
            with pytest.raises(ValueError, match=f"no field '{model_type}_'"):
                PoodleConfig(backbone_config={**given, f"{model_type}_": 1}, num_decoder_blocks=0)


def test_keys_of_other_versions_and_synonyms_are_taken(tmp_path):
    """`path_norm` is in checkpoints of Swin but is no field. The other keys once were in every config, or are synonyms of fields."""
    swin = {
        "model_type": "swin",
        "embed_dim": 8,
        "num_attention_heads": [1] * 4,
        "torch_dtype": "float32",
        "num_labels": 3,
    }
    swin |= {
        "output_attentions": False,
        "pruned_heads": {},
        "is_decoder": False,
        "tie_word_embeddings": True,
        "pad_token_id": None,
    }
    assert PoodleConfig(backbone_config=swin).backbone_config.num_heads == [1] * 4
    PoodleConfig(backbone_config={"model_type": "hiera", "num_layers": 4})
    with pytest.raises(ValueError, match="SwinConfig has no field 'path_norm'"):
        PoodleConfig(backbone_config={**swin, "path_norm": True})
    (tmp_path / "config.json").write_text(json.dumps({**swin, "path_norm": True, "transformers_version": "4.16.0"}))
    for _ in range(2):
        read = PoodleConfig(backbone_config=AutoConfig.from_pretrained(tmp_path))
        assert read.backbone_config.path_norm
        read.save_pretrained(tmp_path / "poodle")
        again = PoodleConfig.from_pretrained(tmp_path / "poodle")
        assert again.to_dict() == read.to_dict()
        again.backbone_config.save_pretrained(tmp_path)


def test_config_round_trip(tmp_path):
    original = config(num_decoder_blocks=1, out_features=["stage2", "decoder"])
    original.save_pretrained(tmp_path)
    assert PoodleConfig.from_pretrained(tmp_path).to_dict() == original.to_dict()


def test_a_config_that_is_changed_once_it_is_made_is_that_of_its_network(tmp_path):
    """Configs of transformers are changed by assignment (`config.num_decoder_blocks = 0`). The model saved then could not be loaded."""
    changed = config()
    changed.num_decoder_blocks = 0
    assert changed.out_features == ["stage4"] and changed.to_dict() == config(num_decoder_blocks=0).to_dict()
    PoodleModel(changed).save_pretrained(tmp_path)
    assert PoodleModel.from_pretrained(tmp_path).config.stage_names[-1] == "stage4"
    changed.num_decoder_blocks = 2
    assert changed.out_features == ["decoder"] and changed.stage_names == config().stage_names
    changed.out_features = ["stage2", "decoder"]
    changed.num_decoder_blocks = 0
    assert changed.out_features == ["stage2"]
    changed.backbone_config = VIT
    assert changed.backbone_config.model_type == "dinov2" and changed.out_features == ["stage2"]
    assert len(PoodleModel(changed)(torch.rand(1, 3, 64, 64)).last_hidden_state.shape) == 4
    for name, value, message in (
        ("num_decoder_blocks", 9, "num_decoder_blocks must be at most 8"),
        ("output_stride", 8, "output_stride must be None for a 'dinov2' encoder"),
        ("backbone_config", {"depths": [1]}, "must name its model_type"),
        ("projection_size", "x", "projection_size must be an integer of at least 1, got 'x'"),
        ("dense_weight", -1, "dense_weight must be a finite number"),
        ("readout_stage", "stage9", "readout_stage must be one of .*, got 'stage9'"),
        ("out_indices", [-9], r"out_indices must be integers .*, got \[-9\]"),
    ):
        before = changed.to_dict()
        with pytest.raises(ValueError, match=message):
            setattr(changed, name, value)
        assert changed.to_dict() == before
    read = config(readout_stage="decoder")
    with pytest.raises(ValueError, match="readout_stage must be one of .*stage4, got 'decoder'"):
        read.num_decoder_blocks = 0
    assert read.num_decoder_blocks == 2


def test_what_follows_from_other_fields_cannot_be_given(tmp_path):
    PoodleConfig().save_pretrained(tmp_path)
    for name, value in (("num_channels", 4), ("readout_map", "stage4")):
        with pytest.raises(
            ValueError, match=f"PoodleConfig.{name} follows from its other fields, and cannot be given"
        ):
            PoodleConfig.from_pretrained(tmp_path, **{name: value})


def test_impossible_values_of_a_flow_network_are_refused_when_they_are_assigned():
    config = PoodleFlowConfig()
    for name, value in (("num_levels", "a"), ("correlation_radius", 0), ("decoder_sizes", [])):
        before = getattr(config, name)
        with pytest.raises(ValueError, match=f"PoodleFlowConfig.{name} must be"):
            setattr(config, name, value)
        assert getattr(config, name) == before
    config.num_levels = 4
    assert config.stride == 16
