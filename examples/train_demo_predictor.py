"""Train the demo model's hash predictor on the training sentences and write it to examples/demo_predictor.

    python examples/train_demo_predictor.py             # some minutes on 2 cores; Ctrl-C and run again to go on

The report is about the held-out sentences, which neither the model nor the predictor was trained on.
"""

import argparse
from pathlib import Path

import torch
from corpus import DEMO_MODEL, MAX_TOKENS, load_sentences
from grouped_experts import grouped_experts
from transformers import PreTrainedTokenizerFast

from sida_ext.classification import SwitchTransformersForSequenceClassification
from sida_ext.distill import TrainingOptions, train_predictor

DEMO_PREDICTOR = Path(__file__).parent / "demo_predictor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--out", type=Path, default=DEMO_PREDICTOR)
    parser.add_argument("--seconds", type=float, default=420.0, help="limit of the training time")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--variant", default="shadow")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = SwitchTransformersForSequenceClassification.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    options = TrainingOptions(
        variant=arguments.variant, epochs=arguments.epochs, seconds=arguments.seconds, max_length=MAX_TOKENS
    )
    with grouped_experts():
        train_predictor(
            model,
            tokenizer,
            [sentence.text for sentence in load_sentences("train")],
            arguments.out,
            options,
            held_out_texts=[sentence.text for sentence in load_sentences("held_out")],
        )


if __name__ == "__main__":
    main()
