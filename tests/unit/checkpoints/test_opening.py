"""Which layout a folder is of, what its configs say, and where its files lie."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from models.checkpoints import locations, open_checkpoint
from models.errors import CheckpointError, ConfigurationError
from tests.checkpoint_files import awq_file, rewrite_json, rewrite_tensors
from tests.parity.hf import text_configs, write_hf
from tests.tiny import write_tiny_llava, write_tiny_vila


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return write_tiny_llava(tmp_path / "llava-tiny")


@pytest.fixture
def vila(tmp_path: Path) -> Path:
    return write_tiny_vila(tmp_path / "vila1.5-tiny")


# ---- layouts and what they say --------------------------------------------------------------


@pytest.mark.parametrize("precision", ["W4A16", "W16A16"])
def test_a_flat_folder_is_llava(llava: Path, precision: str) -> None:
    spec = open_checkpoint(llava, precision=precision).spec  # type: ignore[arg-type]
    assert (spec.layout, spec.name, spec.precision) == ("llava", "llava-tiny", precision)
    assert spec.vision.config.model_type == "clip_vision_model"
    assert (spec.vision.select_layer, spec.vision.select_feature) == (-2, "patch")
    assert spec.vision.preprocessing.mode == "pad"
    assert (spec.projector.kind, spec.projector.token_order) == ("mlp2x_gelu", "row")
    assert (spec.projector.in_features, spec.projector.out_features) == (64, 256)
    assert spec.tokenizer_path == llava and spec.context_length == 1024
    assert spec.prompt.template == "vicuna_v1"


@pytest.mark.parametrize("precision", ["W4A16", "W16A16"])
def test_three_folders_are_vila(vila: Path, precision: str) -> None:
    spec = open_checkpoint(vila, precision=precision).spec  # type: ignore[arg-type]
    assert (spec.layout, spec.name) == ("vila", "vila1.5-tiny")
    assert spec.vision.config.model_type == "siglip_vision_model"
    assert (spec.vision.select_layer, spec.vision.select_feature) == (-2, "cls_patch")
    assert spec.vision.preprocessing.mode == "resize"
    assert (spec.projector.kind, spec.projector.token_order) == ("mlp_downsample", "column")
    assert spec.tokenizer_path == vila / "llm"


def test_defaults_of_keys_that_old_llava_configs_lack(llava: Path) -> None:
    """LLaVA's own: a linear projector, layer -2, patches, the processor's own preprocessing."""
    rewrite_json(
        llava / "config.json", mm_projector_type=None, mm_vision_select_layer=None,
        mm_vision_select_feature=None, image_aspect_ratio=None, mm_use_im_patch_token=None,
    )  # fmt: skip
    spec = open_checkpoint(llava).spec
    assert spec.projector.kind == "linear"
    assert (spec.vision.select_layer, spec.vision.select_feature) == (-2, "patch")
    assert spec.vision.preprocessing.mode == "default"
    assert spec.prompt.use_im_patch_token is True


@pytest.mark.parametrize(
    "key",
    [{"min_tiles": 1}, {"max_tiles": 12}, {"video_max_tiles": 1}, {"num_time_tokens": 0},
     {"dynamic_s2": False}],
    ids=str,
)  # fmt: skip
def test_vila_of_nvilas_era_goes_row_by_row(vila: Path, key: dict[str, object]) -> None:
    assert open_checkpoint(vila).spec.projector.token_order == "column"
    rewrite_json(vila / "config.json", **key)
    assert open_checkpoint(vila).spec.projector.token_order == "row"


RELEASED_KEYS: dict[str, dict[str, object]] = {
    "VILA1.5-3b": {
        "drop_path_rate": 0.0, "interpolate_mode": "linear", "model_dtype": "torch.bfloat16",
        "num_video_frames": 8, "s2": False, "s2_max_split_size": 336, "s2_scales": "336,672,1008",
        "tune_language_model": True, "vision_resolution": -1,
    },
    "NVILA-8B": {
        "drop_path_rate": 0.0, "dynamic_s2": True, "fps": 0.0, "interpolate_mode": "linear",
        "num_time_tokens": 0, "num_video_frames": 8, "s2": False, "s2_max_split_size": 448,
        "s2_resize_output_to_scale_idx": -1, "soft_ce_std": 1.0, "time_token_ids": [],
    },
}  # fmt: skip
"""Of config.json, as TensorRT-LLM's tests of modeling_vila quote the two; both name the projector
`mlp_downsample`, which alone does not tell their orders apart."""


@pytest.mark.parametrize(("name", "order"), [("VILA1.5-3b", "column"), ("NVILA-8B", "row")])
def test_the_eras_of_released_configs_are_told_apart(name: str, order: str, vila: Path) -> None:
    rewrite_json(vila / "config.json", **RELEASED_KEYS[name])
    assert open_checkpoint(vila).spec.projector.token_order == order


@pytest.mark.parametrize("kind", ["mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix"])
def test_nvila_with_one_tile_for_each_picture(vila: Path, kind: str) -> None:
    """Told by its projector, or by the keys of its time. Qwen2 lies in `llm/` as in VILA's."""
    plain = open_checkpoint(vila).spec.prompt
    assert (plain.tokenization, plain.image_suffix) == ("pieces", "")
    rewrite_json(vila / "mm_projector/config.json", mm_projector_type=kind)
    rewrite_json(vila / "llm/config.json", architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    for changes in ({}, {"min_tiles": 1}):
        rewrite_json(vila / "config.json", **changes)
        spec = open_checkpoint(vila).spec
        assert (spec.projector.kind, spec.projector.token_order) == (kind, "row")
        assert (spec.prompt.tokenization, spec.prompt.image_suffix) == ("whole", "\n")
        assert spec.language.model_type == "qwen2"
        assert spec.vision.preprocessing.mode == "resize"


@pytest.mark.parametrize("mode", ["dynamic", "dynamic_s2"])
def test_nvilas_tiling_is_refused_with_what_is_supported(vila: Path, mode: str) -> None:
    rewrite_json(vila / "config.json", image_aspect_ratio=mode, min_tiles=1)
    with pytest.raises(
        CheckpointError, match=rf"image_aspect_ratio is '{mode}'; .*not supported y"
    ):
        open_checkpoint(vila)


def test_llava_of_the_time_before_projector_types(tmp_path: Path) -> None:
    """LLaVA-v0 and v1: a linear projector that no key names, and pictures in a frame."""
    folder = write_tiny_llava(tmp_path / "LLaVA-7B-v0", projector="linear")
    rewrite_json(
        folder / "config.json", mm_projector_type=None, image_aspect_ratio=None,
        mm_use_im_start_end=True, mm_use_im_patch_token=None,
        mm_vision_tower="openai/clip-vit-large-patch14",
    )  # fmt: skip
    tower = folder / "openai/clip-vit-large-patch14"
    tower.parent.mkdir()
    (folder / "clip-tiny").rename(tower)
    checkpoint = open_checkpoint(folder)
    spec = checkpoint.spec
    assert (spec.projector.kind, spec.projector.merge) == ("linear", "flat")
    assert spec.prompt.use_im_start_end and spec.prompt.template == "llava_v0"
    assert spec.vision.preprocessing.mode == "default"
    assert checkpoint.projector.names() == {"0.weight", "0.bias"}


def test_vila_1_0_is_flat_and_its_4_bit_weights_may_lie_in_a_folder_of_their_own(
    tmp_path: Path,
) -> None:
    folder = write_tiny_llava(tmp_path / "VILA-7b", image_aspect_ratio="resize")
    quantised = folder / "VILA-7b-4bit-awq"
    quantised.mkdir()
    awq_file(folder).rename(quantised / "vila-7b-w4-g128-v2.pt")
    for path in ("VILA-7b-4bit-awq", "VILA-7b-4bit-awq/vila-7b-w4-g128-v2.pt"):
        checkpoint = open_checkpoint(folder, path)
        assert checkpoint.language.where == "VILA-7b-4bit-awq/vila-7b-w4-g128-v2.pt"
        assert (checkpoint.spec.layout, checkpoint.spec.prompt.template) == ("llava", "vicuna_v1")
        assert checkpoint.spec.vision.preprocessing.mode == "resize"


def test_the_newline_of_tiles_is_passed_over_where_there_are_none(tmp_path: Path) -> None:
    """A model trained on tiles may be served without them, by its image_aspect_ratio."""
    folder = write_tiny_llava(tmp_path / "llava-v1.6-tiny")
    rewrite_json(folder / "config.json", mm_patch_merge_type="spatial_unpad")
    rewrite_tensors(
        folder / "model.safetensors",
        lambda tensors: tensors.update({"model.image_newline": torch.zeros(256)}),
    )
    checkpoint = open_checkpoint(folder, precision="W16A16")
    assert checkpoint.spec.projector.merge == "flat"
    for source in (checkpoint.projector, checkpoint.language):
        assert not any("image_newline" in name for name in source.names())


def test_the_order_of_tokens_can_be_overridden(vila: Path) -> None:
    assert open_checkpoint(vila, token_order="row").spec.projector.token_order == "row"
    rewrite_json(vila / "config.json", min_tiles=1)
    assert open_checkpoint(vila, token_order="column").spec.projector.token_order == "column"
    with pytest.raises(ConfigurationError, match="token_order is 'diagonal'"):
        open_checkpoint(vila, token_order="diagonal")  # type: ignore[arg-type]


def test_a_folder_of_no_known_layout_says_what_is_missing(llava: Path) -> None:
    rewrite_json(llava / "config.json", mm_vision_tower=None)
    with pytest.raises(
        CheckpointError, match=r"no known layout \(vila, llava, hf\).*mm_vision_tower"
    ):
        open_checkpoint(llava)


def test_the_template_can_be_overridden(llava: Path) -> None:
    assert open_checkpoint(llava, template="llava_v0").spec.prompt.template == "llava_v0"


# ---- transformers' layout -------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers saves it."""
    folder = tmp_path_factory.mktemp("hf") / "llava-1.5-7b-hf"
    write_hf(folder, text_configs()["llama"])
    return folder


@pytest.fixture
def hf(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / saved.name)


def test_one_config_with_sub_configs_is_transformers(hf: Path) -> None:
    spec = open_checkpoint(hf, precision="W16A16").spec
    assert (spec.layout, spec.name) == ("hf", "llava-1.5-7b-hf")
    assert (spec.language.model_type, spec.language.vocab_size) == ("llama", 320)
    assert spec.vision.config.model_type == "clip_vision_model"
    assert (spec.vision.select_layer, spec.vision.select_feature) == (-2, "patch")
    assert (spec.vision.preprocessing.mode, spec.vision.preprocessing.resize) == (
        "default", "shortest_edge",
    )  # fmt: skip
    assert (spec.projector.kind, spec.projector.merge) == ("mlp2x_gelu", "flat")
    assert spec.prompt.tokenization == "whole" and not spec.prompt.use_im_start_end
    assert (spec.tokenizer_path, spec.context_length) == (hf, 1024)


def test_the_numbers_that_released_files_leave_out_are_their_familys(hf: Path) -> None:
    """llava-hf/llava-1.5-7b-hf's and llava-v1.6-mistral-7b-hf's text_config, as they were saved."""
    rewrite_json(hf / "config.json", text_config={
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
        "torch_dtype": "float16", "vocab_size": 32064,
    })  # fmt: skip
    language = open_checkpoint(hf, precision="W16A16").spec.language
    assert (language.hidden_size, language.intermediate_size) == (4096, 11008)
    assert (language.num_hidden_layers, language.num_key_value_heads) == (32, 32)
    assert (language.vocab_size, language.rms_norm_eps) == (32064, 1e-5)
    rewrite_json(hf / "config.json", text_config={
        "architectures": ["MistralForCausalLM"], "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
        "vocab_size": 32064,
    })  # fmt: skip
    spec = open_checkpoint(hf, precision="W16A16").spec
    assert (spec.language.hidden_size, spec.language.num_key_value_heads) == (4096, 8)
    assert spec.context_length == 32768


def test_an_older_processors_file_is_read_where_there_is_no_newer_one(hf: Path) -> None:
    nested = json.loads((hf / "processor_config.json").read_text())["image_processor"]
    expected = open_checkpoint(hf, precision="W16A16").spec.vision.preprocessing
    (hf / "preprocessor_config.json").write_text(json.dumps({**nested, "resample": 2}))
    assert open_checkpoint(hf, precision="W16A16").spec.vision.preprocessing == expected
    rewrite_json(hf / "processor_config.json", image_processor=None)
    assert open_checkpoint(hf, precision="W16A16").spec.vision.preprocessing.resample == 2
    (hf / "processor_config.json").unlink()
    assert open_checkpoint(hf, precision="W16A16").spec.vision.preprocessing.resample == 2
    (hf / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"^preprocessor_config\.json cannot be read"):
        open_checkpoint(hf, precision="W16A16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "paligemma"},
         "unknown model_type of transformers' layout 'paligemma'; known: llava, llava_next"),
        ({"projector_hidden_act": "silu"}, "projector_hidden_act is 'silu'; only gelu is"),
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer is [-2, -5]; joining the"),
        ({"vision_feature_select_strategy": "none"},
         "unknown vision_feature_select_strategy 'none'; known: default, full"),
        ({"text_config": {"model_type": "gemma"}}, "language model family 'gemma'; known: llama"),
        ({"text_config": {"vocab_size": "many"}},
         "config.json (text_config): vocab_size is 'many'; it must be of type int"),
        ({"vision_config": {"model_type": "pixtral"}}, "unknown vision tower 'pixtral'; known"),
    ],
    ids=str,
)  # fmt: skip
def test_what_transformers_layout_may_say_and_we_cannot_serve(
    hf: Path, changes: dict[str, object], message: str
) -> None:
    rewrite_json(hf / "config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(hf, precision="W16A16")
    assert message in str(caught.value)


# ---- the tower's folder ---------------------------------------------------------------------


def test_a_relative_tower_is_counted_from_the_checkpoints_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_llava(tmp_path / "llava-tiny", tower_inside=False)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "clip-tiny").mkdir(parents=True)  # of the same name, and empty
    monkeypatch.chdir(elsewhere)
    checkpoint = open_checkpoint(folder)
    name = "embeddings.patch_embedding.weight"
    assert checkpoint.vision.file_of(name) == "clip-tiny/model.safetensors"
    assert checkpoint.vision.shape(name) == (64, 3, 8, 8)


def test_a_tower_may_be_named_by_an_absolute_path(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "llava-tiny", tower_inside=False)
    tower = (folder / "clip-tiny").rename(tmp_path / "clip-elsewhere")
    rewrite_json(folder / "config.json", mm_vision_tower=str(tower))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.vision.shape("pre_layrnorm.weight") == (64,)


def test_a_tower_inside_the_checkpoint_goes_before_its_folder(tmp_path: Path) -> None:
    """Fine-tuned towers are saved with the model; the folder has the original."""
    folder = write_tiny_llava(tmp_path / "llava-tiny", tower_inside=True)
    other = write_tiny_llava(tmp_path / "other", tower_inside=False, seed=1)
    name = "clip-tiny/model.safetensors"
    (other / name).rename(folder / name)
    vision = open_checkpoint(folder).vision
    assert vision.file_of("pre_layrnorm.weight") == "model.safetensors"


def test_the_text_half_of_a_whole_clip_is_passed_over(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "llava-tiny", tower_inside=False)
    rewrite_tensors(
        folder / "clip-tiny/model.safetensors",
        lambda tensors: tensors.update({
            "text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.ones(1),
            "visual_projection.weight": torch.ones(4, 4),
        }),
    )  # fmt: skip
    names = open_checkpoint(folder).vision.names()
    assert "pre_layrnorm.weight" in names
    assert not any("text" in n or "logit" in n or "projection" in n for n in names)


def test_a_tower_that_is_nowhere_is_named_by_its_key(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locations, "HF_HUB_OFFLINE", True)
    rewrite_json(llava / "config.json", mm_vision_tower="openai/clip-vit-none")
    with pytest.raises(CheckpointError, match=r"mm_vision_tower in config\.json.*HF_HUB_OFFLINE"):
        open_checkpoint(llava)
    rewrite_json(llava / "config.json", mm_vision_tower="./clip nowhere")
    with pytest.raises(CheckpointError, match=r"mm_vision_tower in config\.json '\./clip nowhere'"):
        open_checkpoint(llava)


# ---- paths and Hub ids ----------------------------------------------------------------------


def test_a_hub_id_comes_from_the_local_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--someone--llava-v1-tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    write_tiny_llava(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(locations, "HF_HUB_OFFLINE", True)
    spec = open_checkpoint("someone/llava-v1-tiny").spec
    assert (spec.name, spec.prompt.template) == ("llava-v1-tiny", "llava_v1")
    # The same folder by its path has the model's name too, not the commit's.
    assert open_checkpoint(cached / "snapshots" / commit).spec.name == "llava-v1-tiny"
    with pytest.raises(CheckpointError, match="someone/else.*HF_HUB_OFFLINE is set"):
        open_checkpoint("someone/else")


@pytest.mark.parametrize("path", ["/nowhere/at/all", "nowhere", "a/b/c", "~/nothing here"])
def test_what_is_neither_folder_nor_hub_id_is_refused(path: str) -> None:
    with pytest.raises(CheckpointError, match=f"model_path '{path}' is no folder"):
        open_checkpoint(path)


def test_home_and_relative_paths_are_understood(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(llava.parent))
    monkeypatch.chdir(llava.parent)
    for path in ("~/llava-tiny", "llava-tiny", "./llava-tiny/"):
        assert open_checkpoint(path).spec.name == "llava-tiny"


# ---- the file of 4-bit weights --------------------------------------------------------------


def test_quant_path_may_be_a_file_or_a_folder_from_here_or_from_the_checkpoint(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "quant"
    elsewhere.mkdir()
    awq_file(llava).rename(elsewhere / "weights.pt")
    with pytest.raises(CheckpointError, match="precision is W4A16, but there are no 4-bit weights"):
        open_checkpoint(llava)
    monkeypatch.chdir(tmp_path)
    for path in (elsewhere, elsewhere / "weights.pt", "quant", "quant/weights.pt", "../quant"):
        language = open_checkpoint(llava, path).language
        assert language.is_quantized("model.layers.0.mlp.up_proj")
        assert os.path.basename(language.where) == "weights.pt"


def test_quant_path_must_lead_to_4_bit_weights(llava: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match=r"quant_path '\S*plain.pt' holds no 4-bit weights"):
        open_checkpoint(llava, tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="is a folder without a .pt file of 4-bit weights"):
        open_checkpoint(llava, tmp_path)
    with pytest.raises(CheckpointError, match="quant_path 'none.pt' is neither"):
        open_checkpoint(llava, "none.pt")


def test_a_v2_file_goes_before_others_and_two_of_a_kind_must_be_told_apart(llava: Path) -> None:
    v2 = awq_file(llava)
    other = llava / "a-first-w4-g128.pt"
    other.write_bytes(v2.read_bytes())
    torch.save({"scale": torch.zeros(2)}, llava / "awq-search.pt")  # no weights: passed over
    assert open_checkpoint(llava).language.where == v2.name
    v2.rename(llava / "b-w4-g128.pt")
    with pytest.raises(CheckpointError, match=f"{other.name}, b-w4-g128.pt; name one of them"):
        open_checkpoint(llava)


def test_the_format_is_told_by_the_tensors_and_not_by_the_name(llava: Path) -> None:
    awq_file(llava).rename(llava / "weights.pt")
    language = open_checkpoint(llava).language
    assert language.is_quantized("model.layers.0.mlp.up_proj")
    assert language.quantized("model.layers.0.mlp.up_proj").group_size == 128


def test_vilas_quantised_weights_lie_in_llm_or_beside_it(vila: Path) -> None:
    path = awq_file(vila)
    assert open_checkpoint(vila).language.where == f"llm/{path.name}"
    assert open_checkpoint(vila, vila / "llm").language.where == f"llm/{path.name}"
    path.rename(vila / path.name)
    assert open_checkpoint(vila).language.where == path.name


def test_a_stale_index_beside_the_awq_file_does_no_harm(tmp_path: Path) -> None:
    vila = write_tiny_vila(tmp_path / "vila1.5-tiny", awq_only=True)
    assert (vila / "llm/model.safetensors.index.json").is_file()
    assert not list((vila / "llm").glob("*.safetensors"))
    assert open_checkpoint(vila).language.is_quantized("model.layers.0.mlp.up_proj")
    with pytest.raises(CheckpointError, match="precision is W16A16, but there are no 16-bit"):
        open_checkpoint(vila, precision="W16A16")


@pytest.mark.parametrize("layout", ["llava", "vila"])
def test_each_precision_says_what_it_lacks(layout: str, tmp_path: Path) -> None:
    write = write_tiny_llava if layout == "llava" else write_tiny_vila
    folder = write(tmp_path / "sixteen", awq=False)
    with pytest.raises(CheckpointError, match="give|Give the file as quant_path, or set precision"):
        open_checkpoint(folder)
    folder = write(tmp_path / "four", awq_only=True)
    with pytest.raises(CheckpointError, match="precision is W16A16.*set precision: W4A16"):
        open_checkpoint(folder, precision="W16A16")
    with pytest.raises(ConfigurationError, match="precision is 'W8A8'; it must be one of"):
        open_checkpoint(folder, precision="W8A8")  # type: ignore[arg-type]


def test_4_bit_tensors_among_the_16_bit_files_are_not_served_as_16_bit(llava: Path) -> None:
    from safetensors.torch import save_file

    save_file(torch.load(awq_file(llava), weights_only=True), llava / "model.safetensors")
    with pytest.raises(CheckpointError, match="is in 4 bits; set precision: W4A16"):
        open_checkpoint(llava, precision="W16A16")
