"""Train the predictor of the demo denoiser's decoder and write it to examples/demo_denoiser/decoder_predictor.

    python -m examples.train_demo_decoder_predictor     # some minutes on one core; Ctrl-C and run again to go on

The decoder is traced while it restores the training sentences, each damaged in `--copies` ways, under teacher forcing.
The report is about held-out sentences, which neither the model nor the predictor was trained on.
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, SwitchTransformersForConditionalGeneration

from examples.corpus import load_sentences
from examples.grouped_experts import grouped_experts
from examples.train_demo_denoiser import DEMO_DENOISER, MAX_TOKENS, SEED, damage
from sida_ext.training.decoder_distill import train_decoder_predictor
from sida_ext.training.objective import TrainingOptions

Pair = tuple[list[int], list[int]]


def damaged_pairs(tokenizer: PreTrainedTokenizerFast, split: str, copies: int = 1) -> list[Pair]:
    """Token ids of damaged sentences and of the whole ones, the same on every call."""
    rng = random.Random(f"{SEED} {split}")
    texts = [sentence.text for sentence in load_sentences(split)]
    rows = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return [(damage(ids, tokenizer.mask_token_id, rng)[0], ids) for _ in range(copies) for ids in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_DENOISER)
    parser.add_argument("--out", type=Path, default=DEMO_DENOISER / "decoder_predictor")
    parser.add_argument("--seconds", type=float, default=420.0, help="limit of the training time")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--cells", type=int, default=None, help="recurrent cells; default: 2")
    parser.add_argument("--hidden", type=int, default=None, help="width; default: the model's")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = SwitchTransformersForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    net = {name: value for name in ("cells", "hidden") if (value := getattr(arguments, name)) is not None}
    options = TrainingOptions(
        net=net,
        epochs=arguments.epochs,
        seconds=arguments.seconds,
        learning_rate=arguments.learning_rate,
        max_length=MAX_TOKENS,
    )
    with grouped_experts():
        train_decoder_predictor(
            model,
            tokenizer,
            damaged_pairs(tokenizer, "train", arguments.copies),
            arguments.out,
            options,
            held_out_pairs=damaged_pairs(tokenizer, "held_out"),
        )


if __name__ == "__main__":
    main()
