"""Synthetic checkpoints against transformers' own classes, released sizes, and one another."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    SiglipVisionModel,
)

from models.awq import QuantizedWeight
from models.checkpoints import open_checkpoint
from models.checkpoints.__main__ import main
from models.checkpoints.synthesis import FAMILIES, OUTPUT_FORMATS, configs, synthesize
from models.checkpoints.synthesis.components import (
    language_parameters,
    projector_parameters,
    tower_parameters,
)
from models.checkpoints.synthesis.files import ShardWriter, TorchFileWriter
from models.checkpoints.synthesis.tokenizers import TOKENIZERS, WrittenTokenizer
from models.checkpoints.synthesis.weights import RandomWeights
from models.errors import ConfigurationError
from models.prompts import load_tokenizer
from tests.checkpoint_files import read_tensors

# ---- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "count"),
    [
        ("llava-v1.5-7b", 6_738_415_616),  # Llama-2 7B
        ("llava-v1.5-13b", 13_015_864_320),  # Llama-2 13B
        ("llava-v1.6-mistral-7b", 7_241_732_096),
        ("llava-v1.6-34b", 34_388_917_248),  # Yi-34B
        ("llama-3-vila1.5-8b", 8_030_261_248),
        # Qwen2-7B has 7,615,616,512 with 152,064 rows of embeddings and head.
        ("nvila-8b-resize", 7_615_616_512 - 2 * (152_064 - 151_648) * 3584),
    ],
)
def test_full_language_models_have_the_released_number_of_weights(family: str, count: int) -> None:
    added = {"qwen2": 5, "llama-3": 256}.get(FAMILIES[family].tokenizer, 0)
    parameters = language_parameters(FAMILIES[family], FAMILIES[family].vocabulary + added)
    assert sum(math.prod(parameter.shape) for parameter in parameters) == count


def test_full_towers_have_the_released_number_of_weights() -> None:
    clip = tower_parameters(FAMILIES["llava-v1.5-7b"])
    siglip = tower_parameters(FAMILIES["vila1.5-3b"])
    assert sum(math.prod(parameter.shape) for parameter in clip) == 303_507_456
    assert sum(math.prod(parameter.shape) for parameter in siglip) == 428_225_600


@pytest.mark.parametrize(
    ("kind", "vocabulary", "framed", "size", "tokens"),
    [
        ("llama", 32_000, False, 32_000, {"</s>": 2}),
        ("llama", 32_000, True, 32_003, {"<im_patch>": 32_000, "<im_end>": 32_002}),
        ("llama-hf", 32_000, False, 32_064, {"<image>": 32_000, "<pad>": 32_001}),
        ("yi", 64_000, False, 64_000, {"<|im_start|>": 6, "<|im_end|>": 7}),
        ("llama-3", 128_000, False, 128_256, {"<|eot_id|>": 128_009, "<|end_of_text|>": 128_001}),
        ("qwen2", 151_643, False, 151_648, {"<|im_end|>": 151_645, "<image>": 151_649}),
    ],
)
def test_full_vocabularies_have_the_released_ids(
    kind: str, vocabulary: int, framed: bool, size: int, tokens: dict[str, int], tmp_path: Path
) -> None:
    written = TOKENIZERS[kind].write(tmp_path, vocabulary, 4096, framed)
    tokenizer = load_tokenizer(tmp_path)
    assert written.vocab_size == size
    assert {token: tokenizer.token_to_id(token) for token in tokens} == tokens
    last = vocabulary - 1
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.decode([last]).strip().isalpha()


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_ones_are_of_three_megabytes(family: str, tmp_path: Path) -> None:
    (folder,) = synthesize(family, tmp_path / family, formats=["16bit"])
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3.3e6


# ---- names, against transformers --------------------------------------------------------------


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize(
    ("family", "model_class"),
    [
        ("llava-1.5-7b-hf", LlavaForConditionalGeneration),
        ("llava-v1.6-vicuna-7b-hf", LlavaNextForConditionalGeneration),
        ("llava-v1.6-mistral-7b-hf", LlavaNextForConditionalGeneration),
    ],
)
def test_names_and_shapes_are_those_that_transformers_saves(
    family: str, model_class: Any, original: bool, tmp_path: Path
) -> None:
    naming = "saved" if original else "modules"
    (folder,) = synthesize(family, tmp_path / family, formats=["16bit"], naming=naming)
    with torch.device("meta"):
        model = model_class(AutoConfig.from_pretrained(folder))
    model.to_empty(device="cpu").save_pretrained(tmp_path / "saved", save_original_format=original)
    assert _shapes(folder) == _shapes(tmp_path / "saved")


@pytest.mark.parametrize(
    ("family", "model_class"),
    [
        ("llava-1.5-7b-hf", LlavaForConditionalGeneration),
        ("llava-v1.6-mistral-7b-hf", LlavaNextForConditionalGeneration),
    ],
)
@pytest.mark.parametrize("naming", ["released", "saved", "modules"])
def test_transformers_loads_its_layout_whole(
    family: str, model_class: Any, naming: str, tmp_path: Path
) -> None:
    (folder,) = synthesize(family, tmp_path / family, formats=["16bit"], naming=naming)
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert all(bool(torch.isfinite(value).all()) for value in model.parameters())


@pytest.mark.parametrize(
    "family", ["vila1.5-3b", "llama-3-vila1.5-8b", "nvila-8b-resize", "nvila-lite-8b-resize"]
)
def test_transformers_loads_vilas_folders_whole(family: str, tmp_path: Path) -> None:
    (folder,) = synthesize(family, tmp_path / family, formats=["16bit"])
    model, report = AutoModelForCausalLM.from_pretrained(folder / "llm", output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    tower = load_file(folder / "vision_tower" / "model.safetensors")
    config = AutoConfig.from_pretrained(folder / "vision_tower")
    with torch.device("meta"):
        expected = SiglipVisionModel(config).state_dict()
    assert _own(tower, "vision_model.") == _own(expected, "vision_model.")


@pytest.mark.parametrize("family", ["llava-v1.5-7b", "llava-v1.6-mistral-7b"])
def test_llavas_tensors_have_its_names(family: str, tmp_path: Path) -> None:
    (folder,) = synthesize(family, tmp_path / family, formats=["16bit"])
    store = open_checkpoint(folder, precision="W16A16")
    names = {*store.language.names()}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < names
    assert "model.layers.1.self_attn.q_proj.weight" in names
    own = {"0.weight", "0.bias", "2.weight", "2.bias"}
    unpads = family != "llava-v1.5-7b"
    assert {*store.projector.names()} == (own | {"image_newline"} if unpads else own)
    config = json.loads((folder / "config.json").read_text())
    assert (folder / config["mm_vision_tower"] / "preprocessor_config.json").is_file()
    assert ("vision_tower" in store.vision.file_of("embeddings.class_embedding")) is False
    with torch.device("meta"):
        tower = CLIPVisionModel(AutoConfig.from_pretrained(folder / config["mm_vision_tower"]))
    expected = {name.removeprefix("vision_model.") for name, _ in tower.named_parameters()}
    assert {*store.vision.names()} == expected


def test_released_text_configs_leave_defaults_out() -> None:
    """llava-hf's files rely on transformers' LlamaConfig for the sizes of a 7B."""
    written = WrittenTokenizer(32_064, bos=1, eos=2, pad=32_001, image=32_000)
    config = configs.hf(FAMILIES["llava-1.5-7b-hf"], written)
    assert "hidden_size" not in config["text_config"]
    assert config["text_config"]["vocab_size"] == 32_064
    assert config["image_token_index"] == 32_000


# ---- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("family", ["llava-v1.5-7b", "nvila-8b-resize"])
def test_every_format_holds_the_same_weights(family: str, group_size: int, tmp_path: Path) -> None:
    names = [name for name in OUTPUT_FORMATS if name != "compressed-tensors-sym"]
    found: dict[str, dict[str, QuantizedWeight]] = {}
    for name in names:
        (folder,) = synthesize(
            family, tmp_path / name / family, formats=[name], group_size=group_size
        )
        if name == "16bit":
            plain = open_checkpoint(folder, precision="W16A16").language
            continue
        language = open_checkpoint(folder).language
        found[name] = {each: language.quantized(each) for each in language.quantized_linears()}
    reference = found.pop("llm-awq-v2")
    assert len(reference) == 2 * 7
    dtype = plain.get("model.norm.weight").dtype
    for linear, weight in reference.items():
        assert weight.group_size == group_size
        assert torch.equal(plain.get(f"{linear}.weight"), weight.dequantize(dtype))
        for other in (weights[linear] for weights in found.values()):
            assert torch.equal(other.q, weight.q) and torch.equal(other.zero, weight.zero)
            assert torch.equal(other.scale.float(), weight.scale.float())


def test_symmetric_weights_have_no_other_zero_point_than_eight(tmp_path: Path) -> None:
    (folder,) = synthesize("vila1.5-3b", tmp_path / "vila", formats=["compressed-tensors-sym"])
    language = open_checkpoint(folder).language
    weight = language.quantized("model.layers.0.mlp.up_proj")
    assert language.format_of("model.layers.0.mlp.up_proj") == "compressed-tensors-symmetric"
    assert bool((weight.zero == 8).all())


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    def weights(name: str, **options: Any) -> dict[str, Tensor]:
        synthesize("vila1.5-3b", tmp_path / name, **options)
        return load_file(tmp_path / name / "llm" / "model.safetensors")

    first = weights("a")
    again = weights("b", formats=["llm-awq-v1", "16bit"])
    other = weights("c", seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("family", ["llava-v1.5-7b", "vila1.5-3b"])
def test_equal_layers_are_the_first_one_again(family: str, tmp_path: Path) -> None:
    """Nothing else differs: names, shapes, dtypes, files."""
    formats = ["16bit", "llm-awq-v2"]
    (equal,) = synthesize(family, tmp_path / "a" / "x", formats=formats, equal_layers=True)
    (usual,) = synthesize(family, tmp_path / "b" / "x", formats=formats)
    names, others = (
        {path.relative_to(root) for path in root.rglob("*")} for root in (equal, usual)
    )
    assert names == others
    for name in (name for name in names if name.suffix in {".pt", ".bin", ".safetensors"}):
        got, expected = read_tensors(equal / name), read_tensors(usual / name)
        assert {*got} == {*expected}
        for key, tensor in got.items():
            first = re.sub(r"(model|encoder)\.layers\.\d+", r"\1.layers.0", key)
            assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[first])


def test_linears_keep_the_size_of_what_they_are_given() -> None:
    """So that activations neither vanish nor overflow through 60 layers."""
    weight = RandomWeights(0, 128).quantized("a layer", 384, 256).dequantize(torch.float32)
    given = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    assert 0.9 < float((given @ weight.t()).std()) < 1.1


# ---- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_bounded_and_indexed(suffix: Any, tmp_path: Path) -> None:
    family = replace(FAMILIES["llava-v1.5-7b"], file_format=suffix)
    limit = 700_000
    synthesize(family, tmp_path / "llava", formats=["16bit"], shard_bytes=limit)
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    shards = sorted((tmp_path / "llava").glob(f"{stem}-*"))
    count = len(shards)
    assert count > 2
    assert shards[0].name == f"{stem}-00001-of-{count:05d}.{suffix}"
    assert all(path.stat().st_size < limit + 50_000 for path in shards)
    index = json.loads((tmp_path / "llava" / f"{stem}.{suffix}.index.json").read_text())
    assert {*index["weight_map"].values()} == {path.name for path in shards}
    language = open_checkpoint(tmp_path / "llava", precision="W16A16").language
    assert language.get("lm_head.weight").nbytes < index["metadata"]["total_size"]


def test_a_torch_file_is_what_torch_would_have_written(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(15, dtype=torch.int16).view(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.randn(4, 6).t(),
    }
    with TorchFileWriter(tmp_path / "x.pt") as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    for mapped in (True, False):
        read = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped)
        assert [*read] == [*tensors]
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)
        assert all(read[name].dtype == tensors[name].dtype for name in tensors)


def test_an_interrupted_shard_leaves_no_index(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"), ShardWriter(tmp_path, "bin", 4) as writer:
        writer.add("a", torch.zeros(4))
        writer.add("b", torch.zeros(4))
        raise RuntimeError("stopped")
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob("*.bin"))


def test_awq_alone_leaves_vila_with_a_stale_index(tmp_path: Path) -> None:
    """As the released checkpoints have it; both lie side by side, and it does no harm."""
    (folder,) = synthesize("vila1.5-3b", tmp_path / "vila1.5-3b", formats=["llm-awq-v2"])
    assert sorted(path.name for path in (folder / "llm").glob("*model.s*")) == [
        "model.safetensors.index.json"
    ]
    assert open_checkpoint(folder).spec.precision == "W4A16"


def test_formats_that_replace_the_weights_get_folders_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "llava-v1.5-7b"
    folders = synthesize("llava-v1.5-7b", out, formats=[*OUTPUT_FORMATS])
    assert [folder.name.removeprefix(out.name) for folder in folders] == [
        "", "-autoawq", "-compressed-tensors", "-compressed-tensors-sym",
    ]  # fmt: skip
    assert len([*out.glob("*.pt")]) == 3
    quantization = json.loads((folders[1] / "config.json").read_text())["quantization_config"]
    assert (quantization["quant_method"], quantization["group_size"]) == ("awq", 128)


# ---- tokenizers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["USER: What is shown here? 42", "two  spaces\nand a line", "Grüße, 你好", "a</s>b <image>\nc"],
)
def test_the_fast_tokenizer_is_the_sentencepiece_one(text: str, tmp_path: Path) -> None:
    TOKENIZERS["llama-hf"].write(tmp_path, 400, 1024, False)
    fast = FastTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert fast.encode(text).ids == load_tokenizer(tmp_path).encode(text)


@pytest.mark.parametrize("kind", ["llama-hf", "llama-3", "qwen2"])
def test_transformers_reads_the_tokenizers_with_their_special_tokens(
    kind: str, tmp_path: Path
) -> None:
    written = TOKENIZERS[kind].write(tmp_path, 400, 1024, False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id == written.eos
    assert tokenizer.decode(tokenizer("a red square", add_special_tokens=False).input_ids) == (
        "a red square"
    )


# ---- the command ------------------------------------------------------------------------------


def test_the_command_writes_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "vila1.5-3b"
    assert main(["synthesize", "--like", "vila1.5-3b", "--format", "llm-awq-v2", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert open_checkpoint(out).spec.name == "vila1.5-3b"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--like", "llava-9b", "{new}"], "unknown family .* 'llava-9b'; known: llava-v1.5-7b, "),
        (["--like", "vila1.5-3b", "--format", "gguf", "{new}"], "unknown format 'gguf'; known: 16"),
        (["--like", "vila1.5-3b", "{full}"], "is not an empty folder"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    places = {"new": tmp_path / "new", "full": tmp_path / "full"}
    status = main(["synthesize", *(text.format(**places) for text in arguments)])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1
    assert re.search(expected, error)
    assert not (tmp_path / "new").exists()


def test_unparsable_arguments_are_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["synthesize", "--scale", "huge"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "huge" in error


def test_unknown_projectors_and_groups_are_refused(tmp_path: Path) -> None:
    family = replace(FAMILIES["vila1.5-3b"], projector="resampler")
    with pytest.raises(ConfigurationError, match="'resampler'; known: linear"):
        projector_parameters(family)
    with pytest.raises(ConfigurationError, match="group size 16"):
        synthesize("vila1.5-3b", tmp_path / "x", group_size=16)


def _shapes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _own(tensors: dict[str, Tensor], prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        name.removeprefix(prefix): tuple(value.shape)
        for name, value in tensors.items()
        if not name.endswith("position_ids")
    }
