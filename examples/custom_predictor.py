"""A predictor of one's own: every token is expected to want its layer's most popular experts.

Any object with this `predict` can be given to `sida_ext.stream`. To name it on the command line, let its package
declare an entry point in the group `sida_ext.predictors` whose target is called with the model, here `make`:

    [project.entry-points."sida_ext.predictors"]
    popular = "custom_predictor:make"
"""

import torch

from sida_ext.prediction.hash_table import HashTable
from sida_ext.prediction.moe_facts import stack_facts
from sida_ext.training.traces import collect_traces


class PopularExperts:
    def __init__(self, model, batches):
        traces = list(collect_traces(model, batches))
        experts = stack_facts(model).experts
        chosen = torch.cat([trace.top1 for trace in traces])  # [tokens, layers]
        self.share = torch.stack([layer.bincount(minlength=experts) / len(layer) for layer in chosen.T])
        self.gate = torch.cat([trace.gate for trace in traces]).mean(0)  # [layers]

    def predict(self, input_ids, attention_mask=None, top_k=1):
        probability, experts = self.share.topk(top_k)  # [layers, top_k]
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = real[:, :, None, None]
        index = torch.where(real == 1, experts, -1)
        gate = self.gate[:, None].expand_as(probability) * real
        return HashTable(index, gate.float(), (probability * real).float())


def make(model):
    tokens = torch.arange(64 * 32) % stack_facts(model).embedding.shape[0]
    return PopularExperts(model, [{"input_ids": sentence[None]} for sentence in tokens.view(64, 32)])
