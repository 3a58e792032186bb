"""Our table of side files against all that transformers may save beside a model."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from policy_dsl.sources.side_files import SIDE_FILES, VOCABULARIES, is_one_of

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")
MODELS = Path(transformers.__file__).parent / "models"


def modules(pattern: str) -> Iterator[ModuleType]:
    for path in sorted(MODELS.glob(f"*/{pattern}.py")):
        try:
            yield importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        except (ImportError, NameError):
            # Those whose own libraries are not installed.
            continue


def test_every_vocabulary_file_of_a_tokenizer_class_is_known() -> None:
    known: dict[str, set[str]] = {}
    for module in modules("tokenization_*"):
        for name, found in inspect.getmembers(module, inspect.isclass):
            files = getattr(found, "vocab_files_names", None)
            if isinstance(files, dict):
                known[name] = set(files.values())
    assert len(known) > 60
    names = set.union(*known.values())
    assert {"vocab.txt", "spiece.model", "sentencepiece.bpe.model"} <= names
    assert [name for name in sorted(names) if not is_one_of(name, SIDE_FILES)] == []
    # What a tokenizer class reads includes a vocabulary that is known as one.
    without = [
        name
        for name, files in known.items()
        if files and not any(is_one_of(file, VOCABULARIES) for file in files)
    ]
    assert without == []


def test_every_name_that_savers_use_is_known() -> None:
    base = importlib.import_module("transformers.tokenization_utils_base")
    utils = importlib.import_module("transformers.utils")
    names = [value for key, value in vars(base).items() if key.endswith("_FILE")]
    wanted = ("PROCESSOR", "EXTRACTOR", "TOKENIZER", "CHAT_TEMPLATE", "GENERATION_CONFIG")
    for key in dir(utils):
        value = getattr(utils, key)
        if key.endswith(("_NAME", "_FILE")) and any(word in key for word in wanted):
            names.append(value)
        elif key.endswith("_DIR") and "TEMPLATE" in key:
            names.append(f"{value}/rag.jinja")
    assert {"processor_config.json", "chat_template.json"} < set(names)
    assert "additional_chat_templates/rag.jinja" in names
    assert [name for name in names if not is_one_of(name, SIDE_FILES)] == []


def test_every_second_tokenizer_has_its_folder_known() -> None:
    mixin = importlib.import_module("transformers.processing_utils").ProcessorMixin
    folders = set()
    for module in modules("processing_*"):
        for _, found in inspect.getmembers(module, inspect.isclass):
            if issubclass(found, mixin):
                folders |= {one for one in found.get_attributes() if "tokenizer" in one}
    assert "qformer_tokenizer" in folders
    folders -= {"tokenizer"}
    unknown = [name for name in folders if not is_one_of(f"{name}/vocab.txt", SIDE_FILES)]
    assert unknown == []


def test_all_that_a_tokenizer_with_several_templates_saves_is_known(tmp_path: Path) -> None:
    tokenizers = importlib.import_module("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=model)
    made.chat_template = {"default": "{{ x }}", "rag": "{{ y }}"}
    made.save_pretrained(tmp_path)
    saved = {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert "additional_chat_templates/rag.jinja" in saved
    assert [name for name in saved if not is_one_of(name, SIDE_FILES)] == []
