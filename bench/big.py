"""What does it take to compress a large language model, calibrated block by block? Seconds, memory, and the file.

    python bench/big.py --blocks 22 --ratio 12

The folder is that of a Llama of random weights in bfloat16, 1.1 billion with 22 blocks, in files of 500 MB with an
index, beside a tokenizer of words; the sentences are drawn of these words. The last line is JSON. Fails where it takes
more than three times the largest tensor in float32 and 1 GB. On Linux.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from factorpack.container.reader import File

WIDTH, HIDDEN, VOCABULARY = 2048, 5632, 32000


def make(folder: Path, blocks: int, sentences: int) -> None:
    """Writes such a folder, and sentences.txt beside it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [f"word{place}" for place in range(VOCABULARY - 2)]
    vocabulary = {word: place for place, word in enumerate(["<unk>", "</s>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=draw.randint(8, 40))) for _ in range(sentences)]
    folder.with_name("sentences.txt").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=blocks,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="500MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--ratio", type=float, default=12.0)
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--form", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="make the folder here, and keep it")
    parser.add_argument("--only-make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_make:
        make(arguments.folder, arguments.blocks, arguments.sentences)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "model"
        if not folder.exists():
            folder.mkdir(parents=True)
            # In a process of its own: the memory of this one is the least that those it starts are said to have had.
            shape = ["--blocks", str(arguments.blocks), "--sentences", str(arguments.sentences)]
            subprocess.run([sys.executable, __file__, *shape, "--folder", folder, "--only-make"], check=True)
        out = folder.with_name("model.fpk")
        start = time.perf_counter()
        process = subprocess.Popen([
            Path(sys.executable).with_name("factorpack"), "compress", folder, "--ratio", str(arguments.ratio),
            "--calibrate", folder.with_name("sentences.txt"), "--form", arguments.form, "--jobs", str(arguments.jobs),
            "--out", out,
        ])  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        seconds = time.perf_counter() - start
        dense = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        bill = File(out).bill()
        peak, allowed = 1024 * usage.ru_maxrss, 3 * 4 * VOCABULARY * WIDTH + 10**9
        print(json.dumps({
            "dense_bytes": dense, "size_bytes": bill.size_bytes, "tensors": len(bill.weights), "seconds": seconds,
            "processor_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": peak, "allowed_bytes": allowed,
        }))  # fmt: skip
    return int(peak > allowed)


if __name__ == "__main__":
    sys.exit(main())
