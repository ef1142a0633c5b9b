"""Train the hash predictor of a decoder-only model's prompts on the bundled running text.

    python -m examples.train_demo_language_predictor                       # Ctrl-C and run again to go on
    python -m examples.train_demo_language_predictor --model out/lm_qwen/model --out out/lm_qwen/predictor

The same as `sida train MODEL TEXT... -o PREDICTOR`, with the corpus's own split: the report is about held-out works and
pages, which neither the model nor the predictor was trained on.
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from examples.running_text import load_documents, passages
from examples.train_demo_language_model import DEMO_LANGUAGE_MODEL, SEED
from sida_ext.training.distill import TrainingOptions, train_predictor

DEMO_LANGUAGE_PREDICTOR = Path(__file__).parent / "demo_language_predictor"
CHARACTERS = 1200  # of a passage
TOKENS = 384  # of a passage at the most


def texts(split: str, count: int) -> list[str]:
    """So many passages of one split, drawn from all its documents; all for a number above theirs."""
    found = [passage.text for passage in passages(load_documents(split), CHARACTERS)]
    return random.Random(SEED).sample(found, min(count, len(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_LANGUAGE_MODEL)
    parser.add_argument("--out", type=Path, default=DEMO_LANGUAGE_PREDICTOR)
    parser.add_argument("--passages", type=int, default=1500, help="to train on, of some 350 tokens each")
    parser.add_argument("--held-out", type=int, default=100, help="passages to report on")
    parser.add_argument("--seconds", type=float, default=420.0, help="limit of the training time")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    train_predictor(
        model,
        tokenizer,
        texts("train", arguments.passages),
        arguments.out,
        TrainingOptions(
            epochs=arguments.epochs, seconds=arguments.seconds, max_length=TOKENS, learning_rate=arguments.lr
        ),
        held_out_texts=texts("held_out", arguments.held_out),
        keep_traces=False,
    )


if __name__ == "__main__":
    main()
