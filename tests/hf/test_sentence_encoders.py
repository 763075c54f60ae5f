"""Folders of sentence-transformers: pooled embeddings in calibration, and ready encoders afterwards."""

import json

import hf_folders
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers", reason="folders of Hugging Face need transformers")

import factorpack
from factorpack.cache import key_of
from factorpack.errors import TaskError, UnsupportedError
from factorpack.hf.calibration import MOST_SENTENCES, MOST_TOKENS, POOLINGS, calibrated
from factorpack.hf.folder import read_folder, write_around

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(hf_folders.sentences()))
    return path


def source_of(path, data):
    folder = read_folder(path)
    assert folder is not None
    return folder, calibrated(folder, data, 0)


def test_a_cut_of_minilm_becomes_an_encoder(tmp_path, data):
    package = pytest.importorskip("sentence_transformers", reason="ready encoders need that package")
    path, out = hf_folders.sentence_encoder(tmp_path / "source", place="0_Transformer"), tmp_path / "small"
    folder, source = source_of(path, data)
    # Without data: that is much quicker.
    packed = factorpack.compress(source.model, 1_200_000, options=factorpack.Options(form="direct"))
    tensors = source.model.state_dict()
    packed.save(write_around(folder, out, tensors, (), 4 * sum(tensor.numel() for tensor in tensors.values())))
    assert (out / "0_Transformer" / "model.fpk").stat().st_size <= 1_200_000
    encoder, original = factorpack.sentence_transformer(out), package.SentenceTransformer(str(path))
    texts = hf_folders.sentences()[:20]
    found, expected = (torch.tensor(each.encode(texts)) for each in (encoder, original))
    assert F.cosine_similarity(found, expected).min() > 0.99
    # The same through transformers, pooled by hand.
    network = factorpack.from_pretrained(out)
    with torch.inference_mode():
        tokens = encoder.tokenizer(texts, padding=True, return_tensors="pt")
        hidden, mask = network(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    torch.testing.assert_close(found, F.normalize((hidden * mask).sum(1) / mask.sum(1)), rtol=0, atol=1e-5)


def test_calibration_looks_at_the_pooled_embedding(tmp_path, data):
    _, source = source_of(hf_folders.sentence_encoder(tmp_path / "source"), data)
    assert source.output == "embedding"
    with torch.inference_mode():
        embeddings = [source.model(**batch) for batch in source.batches]
    assert sum(map(len, embeddings)) == len(hf_folders.sentences())
    torch.testing.assert_close(torch.cat(embeddings).norm(dim=1), torch.ones(len(hf_folders.sentences())))


@pytest.mark.parametrize("name", POOLINGS)
def test_padding_does_not_count_in_any_pooling(name):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 4, generator=draw)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])[..., None].float()
    pooled = POOLINGS[name](hidden, mask)
    torch.testing.assert_close(pooled[0], POOLINGS[name](hidden[:1, :3], mask[:1, :3])[0])
    hidden[0, 3:] = 100
    torch.testing.assert_close(POOLINGS[name](hidden, mask), pooled)


def test_poolings_are_those_of_sentence_transformers():
    module = pytest.importorskip("sentence_transformers.models", reason="that package has the definition")
    hidden, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for name, pool in POOLINGS.items():
        theirs = module.Pooling(4, pooling_mode=name)({"token_embeddings": hidden, "attention_mask": mask})
        torch.testing.assert_close(pool(hidden, mask[..., None].float()), theirs["sentence_embedding"])


def test_both_ways_of_naming_a_pooling_are_read(tmp_path, data):
    path = hf_folders.sentence_encoder(tmp_path / "source", {"pooling_mode": "cls"})
    _, source = source_of(path, data)
    batch = source.batches[0]
    with torch.inference_mode():
        found = source.model(**batch)
        source.model._forward_hooks.clear()
        torch.testing.assert_close(found, F.normalize(source.model(**batch).last_hidden_state[:, 0]))
    for config in ({"pooling_mode": ["cls", "mean"]}, {"pooling_mode_weightedmean_tokens": True}, {}):
        (path / "1_Pooling" / "config.json").write_text(json.dumps(config))
        with pytest.raises(TaskError, match="write a task file"):
            source_of(path, data)


def test_a_cache_tells_one_pooling_from_another(tmp_path, data):
    path = hf_folders.sentence_encoder(tmp_path / "source")
    _, mean = source_of(path, data)
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    _, first = source_of(path, data)
    assert key_of(mean, factorpack.Options()) != key_of(first, factorpack.Options())
    assert key_of(mean, factorpack.Options()) == key_of(mean, factorpack.Options())


@pytest.mark.parametrize("modules", [[{"path": "../elsewhere", "type": "a.Dense"}], [{"path": "/etc"}], ["a"]])
def test_modules_of_strangers_stay_in_their_folder(tmp_path, modules):
    path = tmp_path / "source"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "bert"}')
    (path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(TaskError, match="modules.json"):
        read_folder(path)


def test_long_files_and_long_sentences_are_cut(tmp_path):
    data = tmp_path / "long.txt"
    data.write_text("\n".join(f"a cat {'and then ' * (place % 200)}" for place in range(700)))
    _, source = source_of(hf_folders.sentence_encoder(tmp_path / "source"), data)
    shapes = [batch["input_ids"].shape for batch in source.batches]
    assert sum(samples for samples, _ in shapes) == MOST_SENTENCES
    assert max(tokens for _, tokens in shapes) == MOST_TOKENS
    assert all(samples * tokens <= 4096 for samples, tokens in shapes)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("factorpack.hf.loading.find_spec", lambda _: None)
    with pytest.raises(UnsupportedError, match="pip install sentence-transformers"):
        factorpack.sentence_transformer(tmp_path)
