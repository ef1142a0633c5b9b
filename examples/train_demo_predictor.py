"""Train the demo model's hash predictor on the training sentences and write it to examples/demo_predictor.

    python -m examples.train_demo_predictor             # some minutes on 2 cores; Ctrl-C and run again to go on
    python -m examples.train_demo_predictor --report    # train nothing; measure confident routing into the report again

The report is about the held-out sentences, which neither the model nor the predictor was trained on.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from examples.corpus import DEMO_MODEL, MAX_TOKENS, load_sentences
from examples.grouped_experts import grouped_experts
from sida_ext.models.classification import SwitchTransformersForSequenceClassification
from sida_ext.prediction.protocol import load_predictor
from sida_ext.training.distill import TrainingOptions, collect_traces, tokenized_batches, train_predictor
from sida_ext.training.report import write_report
from sida_ext.training.routing_curve import routing_curve

SENTENCES = 48  # of the curve of confident routing
DEMO_PREDICTOR = Path(__file__).parent / "demo_predictor"


def report_again(model, tokenizer, held_out: list[str], out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    predictor = load_predictor(out, model)
    traces = collect_traces(model, tokenized_batches(tokenizer, held_out[:SENTENCES], MAX_TOKENS))
    report["confident"] = routing_curve(predictor, model, traces, SENTENCES)
    write_report(out, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--out", type=Path, default=DEMO_PREDICTOR)
    parser.add_argument("--seconds", type=float, default=420.0, help="limit of the training time")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--variant", default="shadow")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only measure the curve of confident routing again")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = SwitchTransformersForSequenceClassification.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    options = TrainingOptions(
        variant=arguments.variant, epochs=arguments.epochs, seconds=arguments.seconds, max_length=MAX_TOKENS
    )
    held_out = [sentence.text for sentence in load_sentences("held_out")]
    if arguments.report:
        with grouped_experts():
            report_again(model, tokenizer, held_out, arguments.out)
        return
    with grouped_experts():
        train_predictor(
            model,
            tokenizer,
            [sentence.text for sentence in load_sentences("train")],
            arguments.out,
            options,
            held_out_texts=held_out,
        )


if __name__ == "__main__":
    main()
